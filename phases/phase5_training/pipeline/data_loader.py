"""Data files, Datasets and batches behind one loader.

`DataLoaderFactory.create_loader` opens the data, looks at all of it once (`formats/scan.py`) and
returns a `ForgeDataLoader`. The order of samples is a pure function of (seed, epoch), so a resumed
run seeks to its place instead of reading its way there, and worker processes change nothing.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from phase5_training.errors import DataError, UsageError
from phase5_training.pipeline.data_collate import Collator, SampleCache
from phase5_training.pipeline.data_workers import POLL_SECONDS, WorkerBoard, start, watched
from phase5_training.pipeline.formats import open_source
from phase5_training.pipeline.formats.batches import BatchLoader, BatchStream
from phase5_training.pipeline.formats.columns import Columns, concat
from phase5_training.pipeline.formats.dataset import is_map_style, open_dataset
from phase5_training.pipeline.formats.order import EpochOrder, split_indices
from phase5_training.pipeline.formats.scan import Scan, ScanOptions, scan
from phase5_training.pipeline.formats.source import ArraySource, ReadOptions, Source
from phase5_training.pipeline.formats.spec import DataSpec, normalize_task
from phase5_training.pipeline.formats.text import make_tokenizer

Split = Literal["train", "validation"]
GRACE_SECONDS = 30  # that a worker goes on after SIGTERM
Quarantine = Callable[[dict[str, Any]], None]
DEFAULT_BLOCK = 256  # tokens of a training sequence cut from a stream when max_length is not set


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How data are read and put into batches.

    Args:
        batch_size: samples per batch.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        cache_size: parsed samples kept in memory, where a sample has to be parsed at each use; 0: none.
        streaming: never hold a whole file; shuffle within windows of ``shuffle_buffer`` records.
        quality_threshold: records whose metadata state a lower quality are left out.
        validation_split: share of the records kept for validation, in [0, 1).
        seed: fixes the order of every epoch and the split.
        shuffle: a new order each epoch; False reads in file order. Validation is never shuffled.
        drop_last: leave out the last batch of an epoch when it is smaller than the others.
        max_length: tokens a sequence may have; longer ones are cut, and counted.
        tokenizer: "bytes", or the path of a tokenizer.json.
        task: "classification", "regression", "next_token", "multi_task", or None to infer it.
        invalid_records: "fail" stops at the first bad record, "drop" leaves bad records out.
        input_kind: "tokens" or "features" where whole numbers could be either; "auto" takes lists of
            whole numbers for tokens.
        pad_id: token with which to pad lists of token ids of different lengths; None refuses them.
        shuffle_buffer: records shuffled together when streaming.
        memory_limit_mb: larger files are mapped or indexed, not loaded.
        timeout: seconds to wait for a batch of the worker processes.

    Example:
        >>> DataConfig(batch_size=64, validation_split=0.1).batch_size
        64
    """

    batch_size: int = 32
    num_workers: int = 0
    cache_size: int = 1000
    streaming: bool = False
    quality_threshold: float = 0.0
    validation_split: float = 0.0
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    max_length: int | None = None
    tokenizer: str | Path = "bytes"
    task: str | None = None
    invalid_records: Literal["fail", "drop"] = "fail"
    input_kind: Literal["auto", "features", "tokens"] = "auto"
    pad_id: int | None = None
    shuffle_buffer: int = 4096
    memory_limit_mb: int = 1024
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1), ("num_workers", 0), ("cache_size", 0), ("seed", 0), ("max_length", 1),
            ("pad_id", 0), ("shuffle_buffer", 1), ("memory_limit_mb", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in ("max_length", "pad_id"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name}={value!r} is not a whole number of at least {least}")
        if not 0 <= self.validation_split < 1:
            raise UsageError(f"validation_split={self.validation_split} is not in [0, 1); 0.1 keeps a tenth")
        if not self.timeout > 0:
            raise UsageError(f"timeout={self.timeout} is not above 0; 600 waits ten minutes for a batch")
        if not math.isfinite(self.quality_threshold):
            raise UsageError(f"quality_threshold={self.quality_threshold} is not a finite number")
        for name, known in (
            ("invalid_records", ("fail", "drop")),
            ("input_kind", ("auto", "features", "tokens")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name}={getattr(self, name)!r} is unknown; wanted one of {', '.join(known)}"
                )
        normalize_task(self.task)


class _Prepared:
    """Opened and scanned data, from which any batch can be made: ``batch(indices)``.

    This is what a worker process holds; it is also the Dataset that torch's DataLoader sees.
    """

    def __init__(
        self, source: Source, config: DataConfig, task: str | None, spec: DataSpec | None, quarantine: Any
    ) -> None:
        self.config = config
        tokenizer = make_tokenizer(config.tokenizer)
        options = ScanOptions(
            task=task, quality_threshold=config.quality_threshold, invalid_records=config.invalid_records,
            input_kind=config.input_kind, pad_id=config.pad_id, max_length=config.max_length,
        )  # fmt: skip
        self.scan: Scan = scan(source, tokenizer, options, reference=spec, quarantine=quarantine)
        self.spec = self.scan.spec
        self.source = source
        self.collator = Collator(self.spec, tokenizer)
        self.board: WorkerBoard | None = None
        self._encoded: ArraySource | None = None
        self._cache: SampleCache | None = None
        if source.access == "memory" and self.spec.tokenizer is not None:
            self._encoded = self._encode_all()
        elif source.access == "parsed" and config.cache_size:
            self._cache = SampleCache(source, self.collator, config.cache_size)

    def _encode_all(self) -> ArraySource:
        """Text held in memory is turned into tokens once, not once an epoch."""
        lost = np.zeros(self.scan.records, bool)
        if self.scan.keep is not None:
            lost[:] = True
            lost[self.scan.keep] = False
        parts: list[Columns] = []
        for chunk in self.source.iterate():
            chunk.bad = {}
            parts.append(self.collator.encode(chunk.take(np.flatnonzero(~lost[chunk.index]))))
        columns = concat(parts)
        # Positions stay those of the file, so what was dropped counts as unreadable here.
        columns.bad = dict.fromkeys(np.flatnonzero(lost).tolist(), "was dropped")
        return ArraySource.from_columns(self.source.format, self.source.paths, columns)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        """The samples at ``indices`` as a batch."""
        if self._encoded is not None:
            return self.collator.collate(self._encoded.gather(indices))
        if self._cache is not None:
            return self.collator.collate(self._cache.fetch(indices))
        return self.collator(self.source.gather(indices))

    def counters(self) -> tuple[int, int]:
        """Cache hits and look-ups so far, in this process."""
        return (0, 0) if self._cache is None else (self._cache.hits, self._cache.lookups)

    def __len__(self) -> int:
        return self.scan.records

    def __getitems__(self, indices: np.ndarray) -> tuple[dict[str, Any], int, int]:
        """A batch, and what it added to the cache's counters; called in worker processes."""
        if self.board is not None:
            self.board.begin(indices)
        hits, lookups = self.counters()
        batch = self.batch(indices)
        after = self.counters()
        if self.board is not None:
            self.board.end()
        return batch, after[0] - hits, after[1] - lookups


class ForgeDataLoader:
    """One epoch of batches per iteration; made by `DataLoaderFactory`.

    Each batch is ``{"input": Tensor, "target": Tensor or dict of Tensors, "index": LongTensor}``.
    Iterating again gives the next epoch; `set_position` chooses another place. ``spec`` is what the
    data are.
    """

    def __init__(self, prepared: _Prepared, indices: np.ndarray | None, split: Split) -> None:
        self._prepared, self.split = prepared, split
        self.config, self.spec = prepared.config, prepared.spec
        self.num_samples: int | None = len(prepared) if indices is None else len(indices)
        train = split == "train"
        self._order = EpochOrder(
            self.num_samples, indices, seed=self.config.seed,
            shuffle=self.config.shuffle and train,
            window=self.config.shuffle_buffer if self.config.streaming else None,
        )  # fmt: skip
        size = self.config.batch_size
        drop = self.config.drop_last and train
        self._batches = self.num_samples // size if drop else -(-self.num_samples // size)
        if not self._batches:
            raise DataError(
                f"{prepared.source.paths[0]}: {self.num_samples} samples make no batch of {size} with "
                f"drop_last; use batch_size={self.num_samples} or drop_last=False"
            )
        self._position = (0, 0)
        self._hits = self._lookups = 0
        self._workers: DataLoader | None = None
        self._board: WorkerBoard | None = None
        self._pending = _Pending()
        self.while_waiting: Callable[[], None] = lambda: None
        """Called now and then while a batch of the workers is awaited; may raise to leave."""

    def __len__(self) -> int:
        return self._batches

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
        """(n,) int64 positions, in their source, of the samples of one batch."""
        return next(_epoch(self._order, self.config.batch_size, epoch, batch, batch + 1))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, first = self._position
        self._position = (epoch + 1, 0)
        order = _epoch(self._order, self.config.batch_size, epoch, first, self._batches)
        fetch = (
            self._from_workers(order) if self.config.num_workers else map(self._prepared.__getitems__, order)
        )
        for batch, hits, lookups in fetch:
            self._hits += hits
            self._lookups += lookups
            yield batch

    def _from_workers(self, order: Iterator[np.ndarray]) -> Iterator[Any]:
        if self._workers is None:
            self._board = self._prepared.board = WorkerBoard(self.config.num_workers, self.config.batch_size)
            # A generator of our own: torch would draw the workers' seed from the global one, and
            # dropout would then differ between runs with and without workers.
            generator = torch.Generator()
            generator.manual_seed(self.config.seed)
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
        self._pending.batches = order
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
        modes = {"memory": "in memory", "mapped": "in place", "parsed": "indexed"}
        return {
            "format": source.format,
            "mode": "streaming" if self.config.streaming else modes[source.access],
            "files": source.paths[:20],
            "split": self.split,
            "records": scanned.records,
            "samples": self.num_samples,
            "batches": self._batches,
            "batch_size": self.config.batch_size,
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
            "cache_size": self.config.cache_size if self._prepared._cache is not None else 0,
            "cache_hit_rate": self._hits / self._lookups if self._lookups else None,
            "source": source.describe(),
        }


def _epoch(order: EpochOrder, size: int, epoch: int, first: int, last: int) -> Iterator[np.ndarray]:
    """Positions of the samples of the batches ``first`` to ``last`` of an epoch."""
    for batch in range(first, last):
        yield order.slice(epoch, batch * size, min((batch + 1) * size, order.n))


class _Pending:
    """The batch sampler of the worker processes: whatever epoch is being handed out now.

    It does not point back at the loader. Torch stops its workers when the loader's last reference
    goes; a cycle would leave that to the garbage collector, which cuts the queues first, and each
    worker would then be waited for in vain.
    """

    def __init__(self) -> None:
        self.batches: Iterable[np.ndarray] = ()

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.batches)


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
        train, validation = _create(source, config or DataConfig(), task, spec, quarantine)
        if validation is None:
            return _relabel(train, split)
        return train if split == "train" else validation

    @staticmethod
    def create_loaders(
        source: Any,
        config: DataConfig | None = None,
        *,
        task: str | None = None,
        quarantine: Quarantine | None = None,
    ) -> tuple[AnyLoader, AnyLoader | None]:
        """Both splits from one look at the data; the second is None with ``validation_split=0``."""
        return _create(source, config or DataConfig(), task, None, quarantine)


def _create(
    source: Any, config: DataConfig, task: str | None, spec: DataSpec | None, quarantine: Quarantine | None
) -> tuple[AnyLoader, AnyLoader | None]:
    task = normalize_task(task) or normalize_task(config.task)
    opened = _open(source, config, task)
    if isinstance(opened, BatchStream):
        if config.validation_split:
            raise UsageError(
                "validation_split cannot divide ready batches; pass validation data of their own"
            )
        return BatchLoader(opened, "train", task), None
    prepared = _Prepared(opened, config, task, spec, quarantine)
    keep = prepared.scan.keep
    if not config.validation_split:
        return ForgeDataLoader(prepared, keep, "train"), None
    usable = len(prepared) if keep is None else len(keep)
    held_out = round(usable * config.validation_split)
    if not 0 < held_out < usable:
        raise DataError(
            f"{opened.paths[0]}: validation_split={config.validation_split} of {usable} records leaves "
            f"{usable - held_out} for training and {held_out} for validation; both need at least one"
        )
    train, validation = split_indices(len(prepared), keep, held_out, config.seed)
    return ForgeDataLoader(prepared, train, "train"), ForgeDataLoader(prepared, validation, "validation")


def _relabel(loader: AnyLoader, split: Split) -> AnyLoader:
    if split == "train":
        return loader
    if isinstance(loader, BatchLoader):
        loader.split = split
        return loader
    return ForgeDataLoader(loader._prepared, loader._order.indices, split)


def _open(source: Any, config: DataConfig, task: str | None) -> Source | BatchStream:
    if isinstance(source, (str, Path)) or _is_paths(source):
        tokenizer = make_tokenizer(config.tokenizer)
        options = ReadOptions(
            streaming=config.streaming, window=config.shuffle_buffer,
            block_length=config.max_length or DEFAULT_BLOCK,
            memory_limit=config.memory_limit_mb << 20, tokenizer=tokenizer,
        )  # fmt: skip
        return open_source(source, options)
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


def _is_paths(source: Any) -> bool:
    return (
        isinstance(source, Sequence)
        and not isinstance(source, Dataset)
        and all(isinstance(item, (str, Path)) for item in source)
    )
