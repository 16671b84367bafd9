"""Files that can only be read from their beginning: compressed JSON Lines, CSV, Arrow streams.

What fits in memory is held there. Else numbers of one shape are kept as rows of an index by the first walk
and read in any order after it (`index_file.py`); all other records are read forward, through a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.columns import Columns, Ragged, Values, concat
from phase5_training.pipeline.formats.index_file import IndexWriter, RecordIndex, load
from phase5_training.pipeline.formats.indexed import IndexedSource
from phase5_training.pipeline.formats.reading import tell_read
from phase5_training.pipeline.formats.row_file import narrowed
from phase5_training.pipeline.formats.source import Access, ArraySource, ReadOptions, SequentialWindow, Source

Walk = Callable[[], Iterator[Columns]]


def open_forward(path: Path, format: str, walk: Walk, options: ReadOptions) -> Source:
    """A source over a file that ``walk`` reads from its beginning, in chunks in order."""
    if not options.streaming:
        held, size, records = [], 0, 0
        for chunk in walk():
            held.append(narrowed(chunk))
            size, records = size + _size(held[-1]), records + len(chunk)
            tell_read(str(path), records, None, "records")
            if size > options.memory_limit:
                break
        else:
            if not held:
                raise DataError(f"{path}: holds no records; wanted at least one")
            return ArraySource.from_columns(format, [str(path)], concat(held))
    return ForwardSource(path, format, walk, options)


def _size(chunk: Columns) -> int:
    """Bytes that a chunk holds, about."""
    target = chunk.target
    parts: list[Values | None] = [chunk.input, *(target.values() if isinstance(target, dict) else [target])]
    total = 0
    for part in parts:
        if isinstance(part, np.ndarray):
            total += part.nbytes
        elif isinstance(part, Ragged):
            total += part.flat.nbytes + part.offsets.nbytes
        elif part is not None:
            total += sum(len(row) * getattr(row, "itemsize", 1) + 64 for row in part)
    return total


class ForwardSource(IndexedSource):
    """Records of a file that is read from its beginning.

    Args:
        path: the file.
        format: its name.
        walk: starts reading, in chunks in order.
        options: ``window`` is how far apart the records of neighboring batches may lie.
    """

    def __init__(self, path: Path, format: str, walk: Walk, options: ReadOptions) -> None:
        super().__init__(path, format, with_rows=not options.streaming)
        self._walk = walk
        self._window = SequentialWindow(walk, options.window)
        self._use(load(path, format, self._with_rows))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._use(load(self.path, self.format, self._with_rows))

    @property
    def access(self) -> Access:
        """See `Source`."""
        return "parsed" if self.forward_only else "mapped"

    @property
    def forward_only(self) -> bool:
        """See `MayBeForwardOnly`."""
        return self._index is None or self._index.rows is None

    def _first_walk(self) -> Iterator[Columns]:
        writer = IndexWriter(self.path, self.format, self._with_rows)
        try:
            for chunk in self._walk():
                count = len(chunk) + len(chunk.bad)
                writer.add(np.zeros((count, 2), np.int64), chunk)  # no places: nothing is sought
                yield chunk
            if not writer.count:
                raise DataError(f"{self.path}: holds no records; wanted at least one")
            self._use(writer.finish())
            self._note = writer.why_memory
        finally:
            writer.close()

    def _walk_again(self, index: RecordIndex) -> Iterator[Columns]:
        return self._walk()

    def _seek(self, indices: np.ndarray) -> Columns:
        return self._window.gather(indices)

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        found, index = self._described("streamed"), self._made()
        return found if index.rows is None else {**found, "index": str(index.path)}
