"""Data files, Datasets and batches behind one loader.

`DataLoaderFactory.create_loader` opens the data, looks at all of it once (`formats/scan.py`) and
returns a `ForgeDataLoader`. The order of samples is a pure function of (seed, epoch), so a resumed
run seeks to its place instead of reading its way there, and worker processes change nothing.
"""

from __future__ import annotations

import atexit
import os
import signal
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from phase5_training.errors import DataError, UsageError
from phase5_training.meter import cores
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.data_prepared import Portion, Prepared
from phase5_training.pipeline.data_workers import POLL_SECONDS, WorkerBoard, start, unwarned, watched
from phase5_training.pipeline.formats import data_files, open_source
from phase5_training.pipeline.formats.batches import BatchLoader, BatchStream
from phase5_training.pipeline.formats.dataset import is_map_style, open_dataset
from phase5_training.pipeline.formats.fingerprint import fingerprint
from phase5_training.pipeline.formats.length_buckets import LengthBuckets
from phase5_training.pipeline.formats.order import BatchPlan, EpochOrder, split_indices
from phase5_training.pipeline.formats.selection import Selection
from phase5_training.pipeline.formats.source import Source, blocks_of, is_forward_only
from phase5_training.pipeline.formats.spec import DataSpec, normalize_task

Split = Literal["train", "validation"]
TOGETHER_BYTES = 4 << 20  # of batches that are read together, so that the cost of a call is shared
MAX_TOGETHER = 256
WINDOW_BYTES = 64 << 20  # of blocks whose samples are shuffled together, at most
WINDOW_BLOCKS = 16  # blocks whose samples are shuffled together, at least
GRACE_SECONDS = 30  # that a worker goes on after SIGTERM
Quarantine = Callable[[dict[str, Any]], None]


class ForgeDataLoader:
    """One epoch of batches per iteration; made by `DataLoaderFactory`.

    Each batch is ``{"input": Tensor, "target": Tensor or dict of Tensors, "index": LongTensor}``.
    Iterating again gives the next epoch; `set_position` chooses another place. ``spec`` is what the
    data are.

    With ``world_size=R`` the samples of a batch are divided among R ranks: the order of samples and the
    number of batches stay those of one rank, and ``rank`` says whose part is handed out. ``num_samples``
    and ``len`` count all ranks together.
    """

    def __init__(self, prepared: Prepared, kept: Selection | None, split: Split) -> None:
        self._prepared, self.split = prepared, split
        self.config, self.spec = prepared.config, prepared.spec
        self.num_samples: int | None = len(prepared) if kept is None else len(kept)
        train = split == "train"
        blocks = blocks_of(prepared.source)
        self._order: EpochOrder | LengthBuckets = EpochOrder(
            self.num_samples, kept, seed=self.config.seed, shuffle=self.config.shuffle and train,
            window=self._window(blocks), blocks=blocks, frugal=self.config.streaming,
        )  # fmt: skip
        lengths = prepared.scan.lengths
        if self.config.bucket_by_length and train and lengths is not None and not self.config.pack_text:
            self._order = LengthBuckets(self._order, lengths, self.config.batch_size, self.config.seed)
        self._plan = BatchPlan(
            samples=self.num_samples, size=self.config.batch_size,
            drop_last=self.config.drop_last and train, whole_tail=not train,
            rank=self.config.rank, world_size=self.config.world_size,
        )  # fmt: skip
        self._batches = len(self._plan)
        if not self._batches:
            raise DataError(
                f"{prepared.source.paths[0]}: {self.num_samples} samples make no batch of "
                f"{self.config.batch_size} with drop_last; use batch_size={self.num_samples} or "
                "drop_last=False"
            )
        self._plan.check(prepared.source.paths[0])
        self._position = (0, 0)
        self._hits = self._lookups = 0
        batch_bytes = prepared.row_bytes * self.config.batch_size
        self._together = max(1, min(TOGETHER_BYTES // batch_bytes, MAX_TOGETHER))
        self._begun = False
        self._makes_ahead = not self.config.num_workers and prepared.reads_ahead
        self._crosses_epochs = self._makes_ahead and prepared.source.access == "memory"
        # Batches of the next epochs, and the number of the first of them from the first epoch on.
        self._ready: tuple[int, list[dict[str, Any]]] = (0, [])
        self._workers: DataLoader | None = None
        self._board: WorkerBoard | None = None
        self._pending = _Pending()
        self.while_waiting: Callable[[], None] = lambda: None
        """Called now and then while a batch of the workers is awaited; may raise to leave."""

    def __len__(self) -> int:
        return self._batches

    @property
    def reads_ahead(self) -> bool:
        """Whether batches may be drawn before the step that asks for them."""
        return self._prepared.reads_ahead

    @property
    def mode(self) -> str:
        """How the records are reached: "in memory", "random access" or "streaming"."""
        source = self._prepared.source
        if source.access == "memory":  # also where a format that loads as a whole is to be streamed
            return "in memory"
        return "streaming" if self.config.streaming or is_forward_only(source) else "random access"

    def sentence(self) -> str:
        """The format, the number of samples and how they are reached, in words."""
        order = "" if self._order.window is None else f", shuffled within {self._order.window} records"
        size = f"{self.num_samples:,} samples in batches of {self.config.batch_size}"
        return f"{self.split} data: {self._prepared.source.format}, {size}, {self.mode}{order}"

    def _window(self, blocks: np.ndarray | None) -> int | None:
        """Samples that are shuffled together; None for all."""
        if blocks is None:
            streams = self.config.streaming or is_forward_only(self._prepared.source)
            return self.config.shuffle_buffer if streams else None
        # Of many blocks, so that neighbors in the file part; of whole batches, so that each window is read
        # for its own batches only.
        largest = int(np.diff(np.append(blocks, len(self._prepared))).max())
        wanted = max(self.config.shuffle_buffer, WINDOW_BLOCKS * largest)
        least = max(min(wanted, WINDOW_BYTES // self._prepared.row_bytes), largest)
        return -(-least // self.config.batch_size) * self.config.batch_size

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration begin at ``batch`` of ``epoch``, by seeking.

        Raises:
            UsageError: the epoch has no such batch.
        """
        if epoch < 0 or not 0 <= batch <= self._batches:
            raise UsageError(
                f"no position epoch {epoch}, batch {batch}: an epoch has {self._batches} batches"
            )
        # The place after the last batch is the beginning of the next epoch.
        self._position = (epoch + 1, 0) if batch == self._batches else (epoch, batch)

    def first(self) -> dict[str, Any]:
        """The first batch of the first epoch, prepared in this process; the position stays."""
        return self._prepared.batch(self.batch_indices(0, 0))

    def batch_indices(self, epoch: int, batch: int) -> np.ndarray:
        """(n,) int64 positions, in their source, of this rank's samples of one batch."""
        return self._order.slice(epoch, *self._plan.share(batch))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, first = self._position
        self._position = (epoch + 1, 0)
        # A chain hands out a ready batch without running Python, whose code has left the processor's caches
        # by the end of a step.
        return chain.from_iterable(
            self._across_epochs(epoch, first) if self._crosses_epochs else self._within_epoch(epoch, first)
        )

    def _across_epochs(self, epoch: int, first: int) -> Iterator[list[dict[str, Any]]]:
        """The rest of an epoch, read together with what follows it.

        Otherwise each short epoch would begin with a read of its own, which costs as much as a small step.
        """
        at, end = epoch * self._batches + first, (epoch + 1) * self._batches
        while at < end:
            start, ready = self._ready
            if not start <= at < start + len(ready):
                start, ready = at, self._prepared.batches(self._portion_from(at))
            # Nothing is handed out twice: who got a batch may have changed it.
            mine, rest = ready[at - start : end - start], ready[end - start :]
            at += len(mine)
            self._ready = (at, rest)
            yield mine

    def _portion_from(self, start: int) -> Portion:
        """Batches from here on, by their number from the first epoch on, as many as are read together."""
        # The first batch of all is not to wait for others.
        end = start + (self._together if self._begun else 1)
        self._begun = True
        parts = []
        while start < end:
            epoch, first = divmod(start, self._batches)
            last = min(first + end - start, self._batches)
            parts.append(self._portion(epoch, first, last))
            start += last - first
        return Portion.joined(parts)

    def _within_epoch(self, epoch: int, first: int) -> Iterator[list[dict[str, Any]]]:
        """The rest of an epoch."""
        portions = self._portions(epoch, first)
        workers = self.config.num_workers
        fetched = self._from_workers(portions) if workers else map(self._prepared.__getitems__, portions)
        for found in fetched:
            if isinstance(found, DataError):
                raise found
            batches, hits, lookups = found
            self._hits += hits
            self._lookups += lookups
            yield batches

    def _portions(self, epoch: int, first: int) -> Iterator[Portion]:
        """The rest of an epoch in portions of batches that are read together."""
        # The first batch of all is not to wait for others.
        together = self._together if self._begun and self._makes_ahead else 1
        self._begun = True
        while first < self._batches:
            last = first + together
            if self._order.by_blocks:
                # To the end of the window: its blocks are read once.
                window = self._order.window or 1
                last = -(-(first * self.config.batch_size + 1) // window) * window // self.config.batch_size
            last = min(last, self._batches)
            yield self._portion(epoch, first, last)
            first = last
            if self._makes_ahead:
                together = self._together

    def _portion(self, epoch: int, first: int, last: int) -> Portion:
        """This rank's samples of the batches ``first`` to ``last``."""
        if self.config.world_size > 1:
            shares = [self.batch_indices(epoch, batch) for batch in range(first, last)]
            return Portion.joined([Portion(share, [len(share)]) for share in shares])
        start, stop = self._plan.bounds(first)[0], self._plan.bounds(last - 1)[1]
        sizes = [self.config.batch_size] * (last - first)
        sizes[-1] = stop - start - sum(sizes[:-1])
        return Portion(self._order.slice(epoch, start, stop), sizes)

    def _from_workers(self, portions: Iterator[Portion]) -> Iterator[Any]:
        if self._workers is None:
            rows = self._order.window if self._order.by_blocks else None
            self._board = self._prepared.board = WorkerBoard(
                self.config.num_workers, rows or self.config.batch_size
            )
            # A generator of our own: torch would draw the workers' seed from the global one, and
            # dropout would then differ between runs with and without workers.
            generator = torch.Generator()
            generator.manual_seed(self.config.seed)
            with unwarned():
                self._workers = DataLoader(
                    self._prepared,  # type: ignore[arg-type]
                    batch_sampler=self._pending,  # type: ignore[arg-type]
                    num_workers=self.config.num_workers,
                    collate_fn=_as_is,
                    persistent_workers=True,
                    worker_init_fn=_prepare_worker,
                    timeout=POLL_SECONDS,
                    generator=generator,
                )
            atexit.register(_let_go, weakref.ref(self._workers))
        self._pending.portions = portions
        return self._watched(start(self._workers))

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        assert self._board is not None
        try:
            yield from watched(
                batches,
                self._board,
                timeout=self.config.timeout,
                locate=self._prepared.source.locate,
                while_waiting=lambda: self.while_waiting(),
            )
        except DataError:
            self._workers = None  # they are not all there any more; the next epoch starts new ones
            raise

    def description(self) -> dict[str, Any]:
        """What a run's record says about its data: format, counts, shapes, dropped records, cache."""
        scanned, spec, source = self._prepared.scan, self.spec, self._prepared.source
        return {
            "format": source.format,
            "mode": self.mode,
            "files": source.paths[:20],
            "split": self.split,
            "records": scanned.records,
            "samples": self.num_samples,
            "batches": self._batches,
            "batch_size": self.config.batch_size,
            "world_size": self.config.world_size,
            "dropped": scanned.dropped,
            "without_quality": scanned.without_quality,
            "truncated": scanned.truncated,
            "task": spec.task,
            "input_kind": spec.input_kind,
            "input_shape": list(spec.input_shape),
            "input_dtype": spec.input_dtype,
            "target_kind": spec.target_kind,
            "target_shape": list(spec.target_shape),
            "num_classes": spec.num_classes,
            "vocab_size": spec.vocab_size,
            "max_length": spec.max_length,
            "tokenizer": spec.tokenizer,
            "num_workers": self.config.num_workers,
            "seed": self.config.seed,
            "cache_size": self._prepared.cached_samples,
            "cache_hit_rate": self._hits / self._lookups if self._lookups else None,
            "shuffle_window": self._order.window,
            "source": source.describe(),
            "content": self._prepared.content,
        }


class _Pending:
    """The batch sampler of the worker processes: whatever epoch is being handed out now.

    It does not point back at the loader. Torch stops its workers when the loader's last reference
    goes; a cycle would leave that to the garbage collector, which cuts the queues first, and each
    worker would then be waited for in vain.
    """

    def __init__(self) -> None:
        self.portions: Iterable[Portion] = ()

    def __iter__(self) -> Iterator[Portion]:
        return iter(self.portions)


def _as_is(batch: Any) -> Any:
    return batch


def _let_go(workers: weakref.ref[DataLoader]) -> None:
    """Stop workers at the end of the program by torch's own way, not by a SIGTERM that they survive."""
    loader = workers()
    iterator: Any = None if loader is None else loader._iterator
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def _prepare_worker(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal, and SIGTERM from a service or batch system every
    # process of the job; the run saves first, and needs its workers for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
    # Its threads do not survive a fork; the library warns unless told so.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


AnyLoader = ForgeDataLoader | BatchLoader


class DataLoaderFactory:
    """Opens data. See `create_loader`."""

    @staticmethod
    def create_loader(
        source: Any,
        config: DataConfig | None = None,
        *,
        split: Split = "train",
        task: str | None = None,
        spec: DataSpec | None = None,
        quarantine: Quarantine | None = None,
    ) -> AnyLoader:
        """A loader over one split of the data.

        Args:
            source: a file, a folder, a glob, a list of files, a torch Dataset, an iterable of batches
                or a function returning one.
            config: how to read; the defaults suit small data.
            split: "train", or "validation". With ``validation_split=0`` the whole source is the split
                asked for. Validation is read in file order, and completely.
            task: overrides ``config.task``.
            spec: the training loader's spec, for a validation file of its own: classes are numbered as
                there.
            quarantine: called with a dict for every record left out.

        Raises:
            DataError: bad files or records, in one line that names them.
            UsageError: arguments that do not go together.

        Example:
            >>> data = torch.utils.data.TensorDataset(torch.rand(10, 4), torch.arange(10) % 3)
            >>> loader = DataLoaderFactory.create_loader(data, DataConfig(batch_size=4))
            >>> len(loader), loader.spec.num_classes, next(iter(loader))["input"].shape
            (3, 3, torch.Size([4, 4]))
        """
        if split not in ("train", "validation"):
            raise UsageError(f"split={split!r} is unknown; wanted 'train' or 'validation'")
        train, validation = _create(source, config or DataConfig(), task, spec, quarantine, whole=split)
        return train if split == "train" or validation is None else validation

    @staticmethod
    def create_loaders(
        source: Any,
        config: DataConfig | None = None,
        *,
        task: str | None = None,
        quarantine: Quarantine | None = None,
    ) -> tuple[AnyLoader, AnyLoader | None]:
        """Both splits from one look at the data; the second is None with ``validation_split=0``."""
        return _create(source, config or DataConfig(), task, None, quarantine, whole="train")


def _create(
    source: Any,
    config: DataConfig,
    task: str | None,
    spec: DataSpec | None,
    quarantine: Quarantine | None,
    *,
    whole: Split,
) -> tuple[AnyLoader, AnyLoader | None]:
    """Both splits; without a validation_split the only one is ``whole``."""
    task = normalize_task(task) or normalize_task(config.task)
    opened = _open(source, config, task)
    if whole == "train":  # validation data may be of another format than the training data
        config.check_format(opened)
    if isinstance(opened, BatchStream):
        if config.validation_split:
            raise UsageError(
                "validation_split cannot divide ready batches; pass validation data of their own"
            )
        return BatchLoader(opened, whole, task, config.rank, config.world_size), None
    prepared = Prepared(opened, config, task, spec, quarantine)
    if names_files(source) and not config.rank:  # of several ranks the first keeps the records
        prepared.content = fingerprint(data_files(source))
    if whole == "train":  # once for a run
        _advise(prepared)
    keep = prepared.scan.keep
    if not config.validation_split:
        return ForgeDataLoader(prepared, keep, whole), None
    usable = len(prepared) if keep is None else len(keep)
    held_out = round(usable * config.validation_split)
    if not 0 < held_out < usable:
        raise DataError(
            f"{opened.paths[0]}: validation_split={config.validation_split} of {usable} records leaves "
            f"{usable - held_out} for training and {held_out} for validation; both need at least one"
        )
    train, validation = split_indices(len(prepared), keep, held_out, config.seed)
    return ForgeDataLoader(prepared, train, "train"), ForgeDataLoader(prepared, validation, "validation")


def _advise(prepared: Prepared) -> None:
    """Warn of workers that take longer than none; torch says only that there may be too many."""
    workers, available = prepared.config.num_workers, cores()
    if workers and prepared.source.access == "memory":
        said = "the data are in memory, where making a batch takes less than sending it; use num_workers=0"
    elif workers > available:
        said = f"cores available: {available}; more workers help only where a disk or network is waited for"
    else:
        return
    warnings.warn(f"num_workers={workers}: {said}", stacklevel=4)


def _open(source: Any, config: DataConfig, task: str | None) -> Source | BatchStream:
    if names_files(source):
        return open_source(source, config.read_options())
    if is_map_style(source):
        return open_dataset(source, full_scan=config.quality_threshold > 0)
    if isinstance(source, IterableDataset):
        return BatchStream(DataLoader(source, batch_size=config.batch_size, drop_last=config.drop_last))
    if callable(source) or isinstance(source, Iterable):
        return BatchStream(source)
    raise UsageError(
        f"cannot read data from {type(source).__name__}; wanted a path, a list of paths, a folder, a torch "
        "Dataset or an iterable of batches"
    )


def names_files(source: Any) -> bool:
    """Whether a source is a path, or several."""
    return isinstance(source, (str, Path)) or (
        isinstance(source, Sequence)
        and not isinstance(source, Dataset)
        and all(isinstance(item, (str, Path)) for item in source)
    )
