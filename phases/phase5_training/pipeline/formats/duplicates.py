"""Records that occur more than once, found by a hash of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from phase5_training.pipeline.formats.columns import Columns, Ragged, Values
from phase5_training.pipeline.formats.record_columns import narrow

_DIGEST = 16  # bytes: two of 10^9 different records agree with a chance of 10^-21


class Duplicates:
    """Collects the hash of every record, 24 bytes each, and names those that came before.

    Example:
        >>> seen = Duplicates()
        >>> seen.add(Columns(np.arange(3), np.array([[1], [2], [1]]), np.array([0, 0, 0])))
        >>> seen.repeated()
        {2: 0}
    """

    def __init__(self) -> None:
        self._digests: list[np.ndarray] = []
        self._index: list[np.ndarray] = []

    def add(self, columns: Columns) -> None:
        """Take in records: input and target count, quality does not."""
        target = columns.target
        named = target if isinstance(target, dict) else {} if target is None else {"": target}
        parts = [_rows_as_bytes(columns.input), *(_rows_as_bytes(named[name]) for name in sorted(named))]
        digests = bytearray()
        for fields in zip(*parts, strict=True):
            digest = hashlib.blake2b(digest_size=_DIGEST)
            for field in fields:
                # The length tells [1] with target 2 from [1, 2] without.
                digest.update(len(field).to_bytes(8, "little"))
                digest.update(field)
            digests += digest.digest()
        self._digests.append(np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2))
        self._index.append(np.asarray(columns.index, np.int64))

    def repeated(self) -> dict[int, int]:
        """Position of each record that occurred before, and the position of its first occurrence."""
        if not self._index:
            return {}
        digests, index = np.concatenate(self._digests), np.concatenate(self._index)
        order = np.lexsort((index, digests[:, 1], digests[:, 0]))
        same = (digests[order[1:]] == digests[order[:-1]]).all(1)
        # The first of each run of equal ones, carried along the run.
        firsts = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(order)), 0))
        later = np.flatnonzero(same) + 1
        return dict(zip(index[order[later]].tolist(), index[order[firsts[later]]].tolist(), strict=True))


def _rows_as_bytes(values: Values) -> Iterable[bytes | memoryview]:
    """The bytes of each row, the same for equal numbers whatever type a part of the file gave them."""
    if isinstance(values, Ragged):
        wide = Ragged(narrow(values.flat), values.offsets)
        return (wide.row(i).tobytes() for i in range(len(wide)))
    if isinstance(values, np.ndarray):
        rows = np.ascontiguousarray(narrow(values)).reshape(-1).data.cast("B")
        size = len(rows) // max(len(values), 1)
        return (rows[i * size : (i + 1) * size] for i in range(len(values)))
    return (_row_as_bytes(row) for row in values)


def _row_as_bytes(row: object) -> bytes:
    if isinstance(row, bytes):
        return row
    if isinstance(row, str):
        return row.encode("utf-8", "surrogatepass")
    array = np.asarray(row)
    return str(array.shape).encode() + narrow(array).tobytes()
