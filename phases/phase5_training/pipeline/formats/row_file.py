"""Records of one shape as rows of a file, each column in the narrowest type that holds it."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from phase5_training.pipeline.formats.columns import Columns, Values

PIECE = 8 << 20  # bytes copied at a time
_INTEGERS = ("uint8", "int8", "uint16", "int16", "int32", "int64")
ROW_TYPES = (*_INTEGERS, "float32")


class RowFile:
    """Rows of one type in a file; written again where a later record needs a wider type.

    Args:
        file: to append to; it has a name.
        offset: where the rows begin in it.
    """

    def __init__(self, file: IO[bytes], offset: int) -> None:
        self._file, self._offset = file, offset
        self.dtype: np.dtype | None = None
        self.crc = 0

    def fields(self) -> list[list[Any]]:
        """The type as the footer states it."""
        assert self.dtype is not None
        found = []
        for name in self.dtype.names or ():
            kind = self.dtype[name]
            found.append([name, kind.base.name, list(kind.shape)])
        return found

    def add(self, columns: Columns, written: int, count: int) -> bool:
        """Append ``count`` records, zeros where one could not be read; False where they have no rows."""
        if not len(columns):
            if self.dtype is None and count:
                return False  # nothing to tell the type by
            self._append(np.zeros(count, self.dtype))
            return True
        fields: dict[str, Any] = {"input": columns.input}
        if isinstance(columns.target, dict):
            fields |= {f"target.{name}": values for name, values in columns.target.items()}
        elif columns.target is not None:
            fields["target"] = columns.target
        if not all(isinstance(values, np.ndarray) for values in fields.values()):
            return False
        if columns.quality is not None or (self.dtype is not None and "quality" in (self.dtype.names or ())):
            none = np.full(len(columns), np.nan)
            fields["quality"] = none if columns.quality is None else columns.quality
        kinds = {
            name: np.dtype(np.float64) if name == "quality" else narrowest(values)
            for name, values in fields.items()
        }
        shapes = {name: values.shape[1:] for name, values in fields.items()}
        wanted = np.dtype([(name, kinds[name], shapes[name]) for name in fields])
        if self.dtype is None:
            if written:
                return False
            self.dtype = wanted
        elif wanted != self.dtype and not self._widen(wanted, written):
            return False
        rows = np.zeros(count, self.dtype)
        present = columns.index - written
        for name, values in fields.items():
            rows[name][present] = values
        if len(columns) < count and "quality" in fields:
            absent = np.setdiff1d(np.arange(count), present)
            rows["quality"][absent] = np.nan
        self._append(rows)
        return True

    def _append(self, rows: np.ndarray) -> None:
        raw = rows.tobytes()
        self._file.write(raw)
        self.crc = zlib.crc32(raw, self.crc)

    def _widen(self, wanted: np.dtype, written: int) -> bool:
        """Make the type hold ``wanted`` too, by writing again what is there."""
        assert self.dtype is not None
        old = self.dtype
        names = [*(old.names or ()), *(n for n in wanted.names or () if n not in (old.names or ()))]
        described = []
        for name in names:
            have = [t[name] for t in (old, wanted) if name in (t.names or ())]
            if len(have) < 2 and name != "quality":
                return False
            if len({kind.shape for kind in have}) > 1:
                return False
            described.append((name, _common([kind.base for kind in have]), have[0].shape))
        new = np.dtype(described)
        if new == old:
            return True
        self._file.flush()
        self.crc = 0
        step = max(1, PIECE // max(old.itemsize, 1))
        with tempfile.TemporaryFile(dir=Path(self._file.name).parent) as again:
            with open(self._file.name, "rb") as before:
                before.seek(self._offset)
                for start in range(0, written, step):
                    rows = np.fromfile(before, old, min(step, written - start))
                    wide = np.zeros(len(rows), new)
                    for name in new.names or ():
                        wide[name] = rows[name] if name in (old.names or ()) else np.nan
                    raw = wide.tobytes()
                    again.write(raw)
                    self.crc = zlib.crc32(raw, self.crc)
            again.seek(0)
            self._file.seek(self._offset)
            self._file.truncate()
            shutil.copyfileobj(again, self._file, PIECE)
        self.dtype = new
        return True


def narrowest(values: np.ndarray) -> np.dtype:
    """The narrowest type that holds integers and keeps them what they are; floats keep theirs.

    Example:
        >>> narrowest(np.array([3, -300]))
        dtype('int16')
    """
    if values.dtype.kind == "f":
        return values.dtype
    if not values.size:
        return np.dtype(np.uint8)
    low, high = int(values.min()), int(values.max())
    return np.dtype(next(k for k in _INTEGERS if np.iinfo(k).min <= low and high <= np.iinfo(k).max))


def _common(kinds: list[np.dtype]) -> np.dtype:
    """The type for numbers of several types: float32 where one is, as a batch of features is."""
    if any(kind.kind == "f" for kind in kinds):
        return next(kind for kind in kinds if kind.kind == "f")
    low = min(np.iinfo(kind).min for kind in kinds)
    high = max(np.iinfo(kind).max for kind in kinds)
    return np.dtype(next(k for k in _INTEGERS if np.iinfo(k).min <= low and high <= np.iinfo(k).max))


def narrowed(columns: Columns) -> Columns:
    """The same records with integers in the narrowest types that hold them."""

    def smaller(values: Values) -> Values:
        return values.astype(narrowest(values)) if isinstance(values, np.ndarray) else values

    target = columns.target
    if isinstance(target, dict):
        target = {name: smaller(values) for name, values in target.items()}
    elif target is not None:
        target = smaller(target)
    return Columns(columns.index, smaller(columns.input), target, columns.quality, columns.bad)
