"""Opened and scanned data, from which any batch can be made."""

from __future__ import annotations

from typing import Any

import numpy as np

from phase5_training.pipeline.data_collate import Collator, SampleCache
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.data_workers import WorkerBoard
from phase5_training.pipeline.formats.columns import Columns, concat
from phase5_training.pipeline.formats.scan import Scan, ScanOptions, scan
from phase5_training.pipeline.formats.source import ArraySource, Source
from phase5_training.pipeline.formats.spec import DataSpec
from phase5_training.pipeline.formats.text import make_tokenizer


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
            input_kind=config.input_kind, pad_id=config.pad_id, max_length=config.max_length,
            record_policies=config.record_policies, max_dropped_share=config.max_dropped_share,
            num_classes=config.num_classes,
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
