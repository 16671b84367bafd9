"""Columns: the shape in which every reader hands over records.

A column is one of four things: a numpy array with one row per record, a `Ragged` array of integer
sequences of different lengths, `Texts`, or a list (of text, or of arrays whose shapes differ). Batches are
gathered column by column, never record by record.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from phase5_training.pipeline.formats import native

_PADDED_NATIVELY = (np.dtype(np.uint8), np.dtype(np.int32), np.dtype(np.int64))


class Ragged:
    """Integer sequences of different lengths in one flat array.

    Args:
        flat: (total,) every element, one sequence after another.
        offsets: (n + 1,) int64; sequence i is ``flat[offsets[i]:offsets[i + 1]]``.

    Example:
        >>> rows = Ragged.from_rows([np.array([1, 2, 3]), np.array([4])])
        >>> rows.take(np.array([1, 0])).padded(4, fill=0).tolist()
        [[4, 0, 0, 0], [1, 2, 3, 0]]
    """

    __slots__ = ("flat", "offsets")

    def __init__(self, flat: np.ndarray, offsets: np.ndarray) -> None:
        self.flat = flat
        self.offsets = offsets

    @classmethod
    def from_rows(cls, rows: Sequence[np.ndarray]) -> Ragged:
        """Join 1-D arrays; their element types are promoted to a common one."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.concatenate(rows) if len(rows) else np.zeros(0, np.int64)
        return cls(flat, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64 length of each sequence."""
        return np.diff(self.offsets)

    def row(self, i: int) -> np.ndarray:
        """Sequence i, as a view."""
        return self.flat[self.offsets[i] : self.offsets[i + 1]]

    def take(self, rows: np.ndarray | slice) -> Ragged:
        """The chosen sequences, gathered in one operation; a view where ``rows`` is a slice."""
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(len(self))
            offsets = self.offsets[start : max(start, stop) + 1]
            return Ragged(self.flat[offsets[0] : offsets[-1]], offsets - offsets[0])
        starts = np.ascontiguousarray(self.offsets[:-1][rows], np.int64)
        lengths = self.offsets[1:][rows] - starts
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        fast = native.ready()
        if fast is None or not self._holds(starts, lengths):
            shift = np.repeat(starts - offsets[:-1], lengths)
            return Ragged(self.flat[shift + np.arange(offsets[-1])], offsets)
        flat = np.empty(offsets[-1], self.flat.dtype)
        fast.forge_take_rows(
            native.address(self.flat), ctypes.c_int64(flat.itemsize), native.address(starts),
            native.address(offsets), ctypes.c_int64(len(lengths)), native.address(flat),
        )  # fmt: skip
        return Ragged(flat, offsets)

    def _holds(self, starts: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether native code, which does not check, may read these rows: a file may have stated offsets."""
        if not len(starts):
            return True
        inside = starts.min() >= 0 and lengths.min() >= 0 and (starts + lengths).max() <= len(self.flat)
        return bool(inside) and self.flat.flags.c_contiguous

    def followed_by(self, token: int) -> Ragged:
        """Every sequence with one more element at its end."""
        n, total = len(self), int(self.offsets[-1])
        offsets = self.offsets + np.arange(n + 1)
        flat = np.full(total + n, token, np.int64)
        flat[np.arange(total) + np.repeat(np.arange(n), self.lengths)] = self.flat[:total]
        return Ragged(flat, offsets)

    def padded(self, width: int, fill: int) -> np.ndarray:
        """(n, width) int64: sequences cut at ``width`` and right-padded with ``fill``."""
        if not len(self.flat):
            return np.full((len(self), width), fill, np.int64)
        fast = native.ready()
        if (
            fast is not None
            and self.flat.dtype in _PADDED_NATIVELY
            and self._holds(self.offsets[:-1], self.lengths)
        ):
            padded = np.empty((len(self), width), np.int64)
            offsets = np.ascontiguousarray(self.offsets, np.int64)
            fast.forge_pad_rows(
                native.address(self.flat), ctypes.c_int64(self.flat.itemsize), native.address(offsets),
                ctypes.c_int64(len(self)), ctypes.c_int64(width), ctypes.c_int64(fill),
                native.address(padded),
            )  # fmt: skip
            return padded
        columns = np.arange(width)
        positions = np.minimum(self.offsets[:-1, None] + columns, len(self.flat) - 1)
        inside = columns < self.lengths[:, None]
        # Widened before filling: -100 does not fit into bytes.
        return np.where(inside, self.flat[positions].astype(np.int64, copy=False), fill)


class Texts:
    """Texts as their UTF-8, one after another; iterating gives them as ``str``.

    Args:
        encoded: uint8 rows.

    Example:
        >>> list(Texts.of(["ab", "é"]).take(np.array([1, 0])))
        ['é', 'ab']
    """

    __slots__ = ("encoded",)

    def __init__(self, encoded: Ragged) -> None:
        self.encoded = encoded

    @classmethod
    def of(cls, texts: Sequence[str | bytes]) -> Texts:
        """Join loose texts. A lone surrogate is legal in a Python string and in no UTF-8 file."""
        raw = [text if isinstance(text, bytes) else text.encode("utf-8", "replace") for text in texts]
        offsets = np.zeros(len(raw) + 1, np.int64)
        np.cumsum([len(text) for text in raw], out=offsets[1:])
        return cls(Ragged(np.frombuffer(b"".join(raw), np.uint8), offsets))

    def __len__(self) -> int:
        return len(self.encoded)

    def __iter__(self) -> Iterator[str]:
        flat, ends = self.encoded.flat.tobytes(), self.encoded.offsets.tolist()
        return (flat[a:b].decode("utf-8", "replace") for a, b in pairwise(ends))

    def __getitem__(self, i: int) -> str:
        return self.encoded.row(i).tobytes().decode("utf-8", "replace")

    def take(self, rows: np.ndarray | slice) -> Texts:
        """The chosen ones."""
        return Texts(self.encoded.take(rows))


Values: TypeAlias = np.ndarray | Ragged | Texts | list
Targets: TypeAlias = Values | dict[str, Values] | None


@dataclass
class Columns:
    """Some records as columns.

    ``index`` (n,) int64 holds each record's position in its source; ``quality`` (n,) float64 is NaN
    where a record states none. Records the reader could not turn into numbers are not in the columns:
    ``bad`` names them (position -> reason), and the caller decides whether that fails the run.
    """

    index: np.ndarray
    input: Values
    target: Targets = None
    quality: np.ndarray | None = None
    bad: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows: np.ndarray | slice) -> Columns:
        """The chosen rows of every column (views where ``rows`` is a slice of arrays)."""
        return Columns(
            self.index[rows],
            take_values(self.input, rows),
            take_target(self.target, rows),
            None if self.quality is None else self.quality[rows],
        )


def take_values(values: Values, rows: np.ndarray | slice) -> Values:
    """Rows of one column, as a new column."""
    if isinstance(values, np.ndarray):
        return np.asarray(values[rows])
    if isinstance(values, (Ragged, Texts)):
        return values.take(rows)
    return values[rows] if isinstance(rows, slice) else [values[i] for i in rows.tolist()]


def take_target(target: Targets, rows: np.ndarray | slice) -> Targets:
    """`take_values` for a target column, which may be absent or a dict of columns."""
    if target is None:
        return None
    if isinstance(target, dict):
        return {name: take_values(values, rows) for name, values in target.items()}
    return take_values(target, rows)


def as_rows(values: Values) -> list:
    """One column as a list with one element per record."""
    return [values.row(i) for i in range(len(values))] if isinstance(values, Ragged) else list(values)


def concat_values(parts: Sequence[Values]) -> Values:
    """Columns of several chunks as one; a list or ragged array only where the shapes demand it."""
    if len(parts) == 1:
        return parts[0]
    arrays = [p for p in parts if isinstance(p, np.ndarray)]
    if len(arrays) == len(parts) and len({p.shape[1:] for p in arrays}) == 1:
        return np.concatenate(arrays)
    texts = [p.encoded for p in parts if isinstance(p, Texts)]
    if len(texts) == len(parts):
        return Texts(_joined(texts))
    if texts or any(isinstance(p, list) for p in parts):
        return [row for part in parts for row in as_rows(part)]
    flat = [p for p in arrays if p.ndim == 2 and p.dtype.kind == "i"]
    if len(flat) + sum(isinstance(p, Ragged) for p in parts) == len(parts):
        return _joined([as_ragged(p) for p in parts])
    return [row for part in parts for row in as_rows(part)]


def _joined(parts: list[Ragged]) -> Ragged:
    starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
    flat = _neighbors([part.flat for part in parts])
    if flat is None:
        flat = np.concatenate([part.flat for part in parts])
    return Ragged(flat, np.concatenate([*offsets, starts[-1:]]))


def _neighbors(parts: list[np.ndarray]) -> np.ndarray | None:
    """The stretch of an array that its neighboring parts make, not copied; None where they are not such."""
    whole = parts[0].base
    if not isinstance(whole, np.ndarray) or whole.ndim != 1 or not whole.flags.c_contiguous:
        return None
    if any(p.base is not whole or p.dtype != whole.dtype or not p.flags.c_contiguous for p in parts):
        return None
    if any(a.ctypes.data + a.nbytes != b.ctypes.data for a, b in pairwise(parts)):
        return None
    start = (parts[0].ctypes.data - whole.ctypes.data) // whole.itemsize
    return whole[start : start + sum(map(len, parts))]


def concat(chunks: Sequence[Columns]) -> Columns:
    """Several chunks as one. Their targets must agree in presence and names (the scan checks it)."""
    if len(chunks) == 1:
        return chunks[0]
    first = chunks[0].target
    target: Targets
    if first is None:
        target = None
    elif isinstance(first, dict):
        target = {name: concat_values([c.target[name] for c in chunks]) for name in first}  # type: ignore[index,call-overload,misc]
    else:
        target = concat_values([c.target for c in chunks])  # type: ignore[misc]
    has_quality = any(c.quality is not None for c in chunks)
    quality = [np.full(len(c), np.nan) if c.quality is None else c.quality for c in chunks]
    return Columns(
        np.concatenate([c.index for c in chunks]),
        concat_values([c.input for c in chunks]),
        target,
        np.concatenate(quality) if has_quality else None,
        {position: reason for c in chunks for position, reason in c.bad.items()},
    )


def gather_parts(
    starts: np.ndarray, indices: np.ndarray, gather: Callable[[int, np.ndarray], Columns]
) -> Columns:
    """Records of a source that lies in parts, one call for each part that is touched.

    Args:
        starts: (parts + 1,) int64, ascending: position of the first record of each part, then of the end.
        indices: (n,) positions, in any order.
        gather: given the number of a part and positions in it, counted as in ``indices``, those records.

    Returns:
        The records in the order of ``indices``.
    """
    owner = np.searchsorted(starts, indices, side="right") - 1
    touched = np.unique(owner).tolist()
    places = [np.flatnonzero(owner == number) for number in touched]
    parts = [gather(number, indices[rows]) for number, rows in zip(touched, places, strict=True)]
    return parts[0] if len(parts) == 1 else concat(parts).take(np.argsort(np.concatenate(places)))


def as_ragged(values: Values) -> Ragged:
    """Sequences of integers, equal in length or not, as a `Ragged`."""
    assert not isinstance(values, Texts)
    if isinstance(values, Ragged):
        return values
    if isinstance(values, np.ndarray):
        n, length = values.shape
        return Ragged(np.ascontiguousarray(values).reshape(-1), np.arange(n + 1, dtype=np.int64) * length)
    return Ragged.from_rows(values)
