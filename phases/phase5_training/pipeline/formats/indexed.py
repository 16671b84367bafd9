"""Files whose records are found by one walk: from then on an index says where they are, or holds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phase5_training.pipeline.formats.columns import Columns
from phase5_training.pipeline.formats.index_file import RecordIndex, chunks_of

READ_BYTES = 8 << 20  # of a file or of its rows, read at a time


class IndexedSource:
    """What sources with an index have in common; the first walk through the file makes the index.

    Args:
        path: the file.
        format: its name.
        with_rows: keep numbers of one shape as rows of the index. Without, memory is spared.
    """

    vocab_size: int | None = None

    def __init__(self, path: Path, format: str, with_rows: bool) -> None:
        self.path, self.paths, self.format = path, [str(path)], format
        self._with_rows = with_rows
        self._index: RecordIndex | None = None
        self._note = ""  # why the index is held in memory

    def _first_walk(self) -> Iterator[Columns]:
        """Every record in order; leaves the index in place."""
        raise NotImplementedError

    def _walk_again(self, index: RecordIndex) -> Iterator[Columns]:
        """Every record in order, where the index holds no rows."""
        raise NotImplementedError

    def _seek(self, indices: np.ndarray) -> Columns:
        """The records at ``indices``, where the index holds no rows."""
        raise NotImplementedError

    def _use(self, index: RecordIndex | None) -> None:
        self._index = index
        if index is not None:
            index.frugal = not self._with_rows

    def _made(self) -> RecordIndex:
        if self._index is None:
            for _ in self.iterate():
                pass
        assert self._index is not None
        return self._index

    def __len__(self) -> int:
        return self._made().count

    @property
    def known_length(self) -> int | None:
        """See `source.CountedLater`."""
        return None if self._index is None else self._index.count

    def iterate(self) -> Iterator[Columns]:
        """See `Source.iterate`."""
        index = self._index
        if index is None:
            yield from self._first_walk()
        elif index.rows is None:
            yield from self._walk_again(index)
        else:
            yield from chunks_of(index, max(1, min(READ_BYTES // index.rows.dtype.itemsize, 1 << 16)))

    def gather(self, indices: np.ndarray) -> Columns:
        """See `Source.gather`."""
        index = self._made()
        return self._seek(indices) if index.rows is None else index.take(indices)

    def locate(self, index: int) -> tuple[str, int]:
        """See `Source.locate`."""
        return self.paths[0], index

    def _described(self, otherwise: str) -> dict[str, Any]:
        index = self._made()
        access = "rows of the index" if index.rows is not None else otherwise
        return {"format": self.format, "access": access, "records": index.count}
