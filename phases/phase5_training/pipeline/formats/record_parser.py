"""Text of JSON records into columns: by the native reader where they are plain, else by orjson."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from phase5_training.pipeline.formats import native
from phase5_training.pipeline.formats.column_stats import is_text
from phase5_training.pipeline.formats.columns import Columns, Ragged, Texts, Values, concat
from phase5_training.pipeline.formats.json_checks import fault_of
from phase5_training.pipeline.formats.json_records import Found
from phase5_training.pipeline.formats.record_columns import RecordColumns

TRIES = 4  # stretches with many records that are not plain, after which the native reader is left alone
MANY = 8  # one in so many


# A string, to be passed over, or an integer of so many digits that it may not fit.
_LONG = re.compile(rb'"(?:[^"\\]|\\.)*"|(?<![\d.eE+-])(-?\d{19,})(?![\d.eE])')
_FIRST_HUGE = 2.0**63
# What Python's json writes for numbers that are not finite.
_NO_NUMBER = re.compile(rb"[:,\[]\s*(-?Infinity|NaN)\b")


def _sound(found: Found) -> np.ndarray:
    """(n,) bool: of which records it is known that `fault_of` finds nothing."""
    sound = np.zeros(len(found.starts), bool)
    reader = native.reader()
    if reader is not None and not found.faults:
        reader.forge_check_records(
            found.text, native.address(found.starts), native.address(found.stops),
            ctypes.c_int64(len(sound)), native.address(sound),
        )  # fmt: skip
    return sound


def holds_huge_floats(columns: Columns) -> bool:
    """Whether some number is so large that orjson may have made it of an integer beyond 64 bits."""
    target = columns.target
    parts = [columns.input, *(target.values() if isinstance(target, dict) else [target])]
    arrays = [part for part in parts if isinstance(part, np.ndarray) and part.dtype.kind == "f"]
    return any(bool((np.abs(array) >= _FIRST_HUGE).any()) for array in arrays)


def _with_huge_integers(found: Found) -> set[int]:
    """Which of the records hold an integer that 64 signed bits do not."""
    spans = zip(found.starts.tolist(), found.stops.tolist(), strict=True)
    return {
        i
        for i, (a, b) in enumerate(spans)
        if any(
            token.group(1) and not -(2**63) <= int(token.group(1)[:40]) < 2**63
            for token in _LONG.finditer(found.text, a, b)
        )
    }


def _reason(line: bytes, error: orjson.JSONDecodeError) -> str:
    found = _NO_NUMBER.search(line)
    if found and line[error.pos : error.pos + 1] in (b"N", b"I", b"-"):
        return f"{found.group(1).decode()} is no number in JSON; leave the record out, or write a number"
    reason = error.msg.split(":")[0]
    return reason + ("; save the file without it" if "BOM" in reason else "")


@dataclass
class _Field:
    key: bytes
    shape: tuple[int, ...]
    kind: str  # "i", "f" or "text"

    def column(self, n: int, room: int) -> tuple[native.Column, list[np.ndarray]]:
        """Where n records are to be read into: the structure, and the arrays that it points at."""
        column = native.Column(key=self.key, key_length=len(self.key))
        if self.kind == "text":
            text, offsets = np.empty(room, np.uint8), np.zeros(n + 1, np.int64)
            column.text, column.offsets = text.ctypes.data, offsets.ctypes.data
            return column, [text, offsets]
        column.dimensions = len(self.shape)
        column.shape[: len(self.shape)] = self.shape
        values = np.empty((n, *self.shape), np.float64 if self.kind == "f" else np.int64)
        if self.kind == "f":
            column.floats = values.ctypes.data
        else:
            column.integers = values.ctypes.data
        return column, [values]


def _values(arrays: list[np.ndarray]) -> np.ndarray | Texts:
    if len(arrays) == 2:
        text, offsets = arrays
        return Texts(Ragged(text[: offsets[-1]].copy(), offsets))  # what was left over is given back
    with np.errstate(over="ignore"):
        return arrays[0].astype(np.float32) if arrays[0].dtype.kind == "f" else arrays[0]


def _alike(a: Any, b: Any) -> bool:
    """Whether two parts of a column make the column that all their rows would have made."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape[1:] == b.shape[1:]
    return type(a) is type(b)


class RecordParser:
    """Turns records into `Columns`, holding every one to the form of the first.

    Example:
        >>> text = b'{"input": [1, 2], "target": 0}'
        >>> found = Found(0, text, np.array([0]), np.array([len(text)]))
        >>> RecordParser()(found, range(1)).input
        array([[1, 2]])
    """

    def __init__(self) -> None:
        self._convert = RecordColumns()
        self._fields: list[_Field] | None = None
        self._failures = 0

    def __call__(self, found: Found, index: Sequence[int]) -> Columns:
        """The records found, whose positions in the source are ``index``."""
        columns = self._natively(found, index) if self._fields and not found.faults else None
        if columns is None:
            columns = self._otherwise(found, index)
            self._learn(columns)
        return columns

    def _otherwise(self, found: Found, index: Sequence[int]) -> Columns:
        columns = self._by_orjson(found, index)
        if holds_huge_floats(columns):
            columns = self._by_orjson(found, index, refused=_with_huge_integers(found))
        if is_text(columns.input):
            columns.input = Texts.of(columns.input)  # type: ignore[arg-type]
        return columns

    def _by_orjson(self, found: Found, index: Sequence[int], refused: Collection[int] = ()) -> Columns:
        records: list[Any] = []
        kept: list[int] = []
        bad: dict[int, str] = {}
        sound = _sound(found)
        for i, (a, b) in enumerate(zip(found.starts.tolist(), found.stops.tolist(), strict=True)):
            fault = found.faults.get(i) or (
                "holds an integer beyond 64 signed bits" if i in refused else None
            )
            if fault is None:
                line = found.text[a:b]
                try:
                    record = orjson.loads(line)
                    fault = None if sound[i] else fault_of(line, record)
                except orjson.JSONDecodeError as error:
                    fault = f"is not valid JSON: {_reason(line, error)}"
            if fault is None:
                records.append(record)
                kept.append(index[i])
                continue
            where = f"byte {found.base + a if found.offsets is None else found.offsets[i]}"
            if found.lines is not None:
                where = f"line {found.lines[i]}, {where}"
            bad[int(index[i])] = f"({where}) {fault}"
        columns = self._convert(records, kept)
        columns.bad |= bad
        return columns

    # -- plain records --------------------------------------------------------------------------------

    def _learn(self, columns: Columns) -> None:
        """From records that orjson read, what the native reader is to expect; None where it cannot."""
        convert = self._convert
        self._fields = None
        if self._failures >= TRIES or convert.kinds is None or convert.names or not len(columns):
            return
        fields = []
        for key, kind, values in (
            (convert.input_key, convert.kinds[0], columns.input),
            (convert.target_key, convert.kinds[1], columns.target),
        ):
            if kind == "nothing":
                continue
            if key in (None, "metadata", "quality"):
                return
            assert key is not None
            if kind == "text":
                fields.append(_Field(key.encode(), (), "text"))
                continue
            plain = isinstance(values, np.ndarray) and values.ndim <= native.MAX_DIMENSIONS
            if kind not in ("a number", "a list") or not plain:
                return
            assert isinstance(values, np.ndarray)
            fields.append(_Field(key.encode(), values.shape[1:], "f" if values.dtype.kind == "f" else "i"))
        self._fields = fields

    def _natively(self, found: Found, index: Sequence[int]) -> Columns | None:
        reader = native.reader()
        if reader is None:
            return None
        assert self._fields is not None
        n = len(found.starts)
        room = int((found.stops - found.starts).sum())
        quality, odd = np.full(n, np.nan), np.zeros(n, bool)
        for _ in range(3):  # again where a column turned out to hold the other kind of numbers
            made = [field.column(n, room) for field in self._fields]
            columns = (native.Column * len(made))(*(column for column, _ in made))
            graded = native.Quality(quality.ctypes.data, 0)
            odd[:] = False
            unread = reader.forge_read_records(
                found.text, native.address(found.starts), native.address(found.stops), ctypes.c_int64(n),
                columns, ctypes.c_int64(len(made)), ctypes.byref(graded), native.address(odd),
                ctypes.c_int64(n // MANY),
            )  # fmt: skip
            changed = False
            for column, field in zip(columns, self._fields, strict=True):
                kind = "f" if column.saw_float else "i"
                if field.kind != "text" and field.kind != kind and (kind == "f" or unread <= n // MANY):
                    field.kind, changed = kind, True
            if changed:
                continue
            if unread > n // MANY:
                break
            values: list[Values] = [_values(arrays) for _, arrays in made]
            if len(values) > 1 and isinstance(values[1], Texts):
                values[1] = list(values[1])
            target = values[1] if len(values) > 1 else None
            read = Columns(np.array(index, np.int64), values[0], target, quality if graded.seen else None)
            joined = self._with_odd(read, found, np.flatnonzero(odd)) if unread else read
            if joined is None:
                break
            return joined
        self._failures += 1
        return None

    def _with_odd(self, read: Columns, found: Found, rows: np.ndarray) -> Columns | None:
        """The records at ``rows`` put right by orjson; None where they change the form of a column."""
        index, n = read.index, len(read)
        read.index = np.arange(n)
        plain = read.take(np.delete(read.index, rows))
        rest = self._otherwise(found.take(rows), rows.tolist())
        parts = [plain, rest]
        if len(rest):
            if not _alike(plain.input, rest.input) or not _alike(plain.target, rest.target):
                return None
            whole = concat(parts)
            whole = whole.take(np.argsort(whole.index))
        else:
            whole = plain
        whole.index = index[whole.index]
        whole.bad = {int(index[row]): reason for row, reason in rest.bad.items()}
        return whole
