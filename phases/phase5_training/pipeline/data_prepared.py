"""Opened and scanned data, from which any batch can be made."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from phase5_training.errors import DataError, UsageError
from phase5_training.gradients import is_out_of_memory
from phase5_training.memory import usable_memory
from phase5_training.pipeline.data_collate import Collator, HeldSamples, SampleCache, split_batch
from phase5_training.pipeline.data_config import DEFAULT_BLOCK, DataConfig
from phase5_training.pipeline.data_workers import WorkerBoard
from phase5_training.pipeline.formats.columns import Columns, Ragged, as_ragged, concat
from phase5_training.pipeline.formats.dataset import DatasetSource
from phase5_training.pipeline.formats.packing import PackedText
from phase5_training.pipeline.formats.scan import Scan, ScanOptions, scan
from phase5_training.pipeline.formats.source import ArraySource, Source, Tokenizer
from phase5_training.pipeline.formats.spec import DataSpec
from phase5_training.pipeline.formats.text import make_tokenizer

PADDING_COPIES = 3  # of a padded batch of int64 that there are while it is made: places, values, the batch
HELD_BYTES = 32 << 20  # of data that are held in the form of batches; larger ones in the types of their file


class Portion(NamedTuple):
    """Batches that are read together.

    Args:
        indices: (n,) int64, positions of their samples in the source, one batch after the other.
        sizes: samples of each batch.
    """

    indices: np.ndarray
    sizes: list[int]

    @classmethod
    def joined(cls, parts: Sequence[Portion]) -> Portion:
        """Several as one, in their order."""
        if len(parts) == 1:
            return parts[0]
        sizes = [size for part in parts for size in part.sizes]
        return cls(np.concatenate([part.indices for part in parts]), sizes)


class Prepared:
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
            input_kind=config.input_kind, pad_id=config.pad_id,
            max_length=None if config.pack_text else config.max_length,
            keep_lengths=config.pack_text or config.bucket_by_length,
            record_policies=config.record_policies, max_dropped_share=config.max_dropped_share,
            num_classes=config.num_classes, reads=config.reads,
        )  # fmt: skip
        self.scan: Scan = scan(source, tokenizer, options, reference=spec, quarantine=quarantine)
        self.spec = self.scan.spec
        self.has_targets = self.scan.has_targets
        self.source = source
        self.collator = Collator(self.spec, tokenizer)
        self.board: WorkerBoard | None = None
        self.content: dict[str, Any] | None = None
        """What tells the files from others; None where there are none."""
        self._encoded: ArraySource | None = None
        self._held: HeldSamples | None = None
        self._cache: SampleCache | None = None
        if source.access == "memory" and self.spec.tokenizer is not None:
            self._encoded = self._encode_all()
        if not config.pack_text:
            self._check_padding()
        usable = self.scan.records if self.scan.keep is None else len(self.scan.keep)
        if config.pack_text:
            self._pack(tokenizer)
        elif source.access == "parsed" and config.cache_size >= usable:
            # In a shuffled epoch a smaller one would drop nearly every sample before it comes again.
            self._cache = SampleCache(source, self.collator, config.cache_size, config.cache_mb << 20)
        if source.access == "memory" and not self.spec.ragged and not config.pack_text:
            self._hold()

    def _encode_all(self) -> ArraySource:
        """Text held in memory is turned into tokens once, not once an epoch."""
        keep = self.scan.keep
        lost = np.zeros(self.scan.records, bool) if keep is None else ~keep.mask(0, self.scan.records)
        parts: list[Columns] = []
        for chunk in self.source.iterate():
            chunk.bad = {}
            left_out = lost[chunk.index]
            chunk = chunk.take(np.flatnonzero(~left_out)) if left_out.any() else chunk
            parts.append(self.collator.encode(chunk))
        columns = concat(parts)
        # Positions stay those of the file, so what was dropped counts as unreadable here.
        columns.bad = dict.fromkeys(np.flatnonzero(lost).tolist(), "was dropped")
        return ArraySource.from_columns(self.source.format, self.source.paths, columns)

    def _hold(self) -> None:
        """Small data are put into the form of batches once."""
        keep = self.scan.keep
        positions = np.arange(self.scan.records) if keep is None else keep.positions()
        one = self.batch(positions[:1])
        targets = one["target"].values() if isinstance(one["target"], dict) else [one["target"]]
        if sum(part.nbytes for part in (one["input"], *targets)) * len(positions) <= HELD_BYTES:
            self._held = HeldSamples(self.batch(positions), None if keep is None else positions)

    def _pack(self, tokenizer: Tokenizer) -> None:
        """From here on a sample is a block of the joined texts."""
        spec, found, whole = self.spec, self.scan, self._encoded
        if spec.task != "next_token" or found.lengths is None or self.has_targets:
            raise UsageError(
                f"{self.source.paths[0]}: pack_text joins texts for next-token training, and these data are "
                f"for {spec.task}{' with targets' if self.has_targets else ''}; leave it out"
            )
        block = self.config.max_length or DEFAULT_BLOCK
        texts, collator = self.source, self.collator

        def tokens(records: np.ndarray) -> Ragged:
            columns = collator.encode(texts.gather(records)) if whole is None else whole.gather(records)
            return as_ragged(columns.input)

        records = np.arange(found.records) if found.keep is None else found.keep.positions()
        blocks = PackedText(
            texts, tokens, records, found.lengths[records], separator=tokenizer.separator,
            block_length=block, vocab_size=spec.vocab_size,
        )  # fmt: skip
        shape = (block,)
        self.source, self._encoded = blocks, None
        self.spec = replace(spec, ragged=False, input_shape=shape, target_shape=shape, max_length=block)
        self.scan = replace(found, spec=self.spec, records=len(blocks), keep=None, longest=block)
        self.collator = Collator(self.spec, tokenizer)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        """The samples at ``indices`` as a batch."""
        with self._memory_for(len(indices)):
            if self._held is not None:
                return self._held.take(indices)
            return self.collator.collate(self._fetch(indices))

    def batches(self, portion: Portion) -> list[dict[str, Any]]:
        """Several batches: one call per column for all of them."""
        with self._memory_for(max(portion.sizes)):
            if self._held is not None:
                return split_batch(self._held.take(portion.indices), portion.sizes)
            return self.collator.collate_parts(self._fetch(portion.indices), portion.sizes)

    def _check_padding(self) -> None:
        """Refuse batches that are padded to a length which the memory here does not hold.

        Raises:
            DataError: one sample may be far longer than all others; names the remedies.
        """
        config = self.config
        if not self.spec.ragged:
            return
        ranks, makers = config.world_size, max(1, config.num_workers)
        each, limit = PADDING_COPIES * makers * self.row_bytes, usable_memory() // 2
        size = each * -(-config.batch_size // ranks)
        if size <= limit:
            return
        remedies = ["set max_length, to which longer ones are cut"]
        if limit >= each:
            remedies.append(f"batch_size={limit // each * ranks}")
        if self.spec.task == "next_token" and not self.has_targets:
            remedies.append("pack_text=True, which cuts texts into blocks")
        raise DataError(
            f"{self.source.paths[0]}: the longest sample has {self.longest} tokens, and to pad a batch of "
            f"{config.batch_size} to it takes {size / 1e9:.1f} GB, more than half of the memory here "
            f"({limit / 1e9:.1f} GB); {', or '.join(remedies)}"
        )

    @contextlib.contextmanager
    def _memory_for(self, samples: int) -> Iterator[None]:
        """Say in one line that the memory ran out while so many samples were put together."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
                raise
            longest = f" of up to {self.longest} tokens" if self.spec.ragged else ""
            remedy = ", or max_length" if self.spec.ragged else ""
            raise DataError(
                f"{self.source.paths[0]}: the memory does not hold a batch of {samples} samples{longest} "
                f"({self.row_bytes * samples / 1e9:.2g} GB and what making it takes); use a smaller "
                f"batch_size{remedy}"
            ) from error

    def _fetch(self, indices: np.ndarray) -> Columns:
        if self._encoded is not None:
            return self._encoded.gather(indices)
        if self._cache is not None:
            return self._cache.fetch(indices)
        return self.collator.encode(self.source.gather(indices))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, as a batch takes it in."""
        limit = self.spec.max_length
        return self.scan.longest if limit is None else min(self.scan.longest, limit)

    @property
    def row_bytes(self) -> int:
        """Bytes that the input of one sample takes in a batch, at most."""
        elements = math.prod(self.longest if n is None else n for n in self.spec.input_shape)
        return max(1, elements) * (4 if self.spec.input_dtype == "float32" else 8)

    @property
    def reads_ahead(self) -> bool:
        """Whether batches may be made before their time: not where a Dataset draws random numbers."""
        return not isinstance(self.source, DatasetSource)

    @property
    def cached_samples(self) -> int:
        """How many samples the cache holds at most; 0 without one."""
        return 0 if self._cache is None else self.config.cache_size

    def counters(self) -> tuple[int, int]:
        """Cache hits and look-ups so far, in this process."""
        return (0, 0) if self._cache is None else (self._cache.hits, self._cache.lookups)

    def __len__(self) -> int:
        return self.scan.records

    def __getitems__(self, portion: Portion) -> tuple[list[dict[str, Any]], int, int] | DataError:
        """Batches, and what they added to the cache's counters; called in worker processes.

        What is wrong with the data is handed over: torch would put a traceback into its message.
        """
        if self.board is not None:
            self.board.begin(portion.indices)
        hits, lookups = self.counters()
        try:
            batches = self.batches(portion)
        except DataError as error:
            return error
        after = self.counters()
        if self.board is not None:
            self.board.end()
        return batches, after[0] - hits, after[1] - lookups
