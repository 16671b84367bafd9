"""Text of JSON records into columns: by the native reader where they are plain numbers, else by orjson."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from phase5_training.pipeline.formats import native
from phase5_training.pipeline.formats.columns import Columns
from phase5_training.pipeline.formats.json_checks import fault_of
from phase5_training.pipeline.formats.json_records import Found
from phase5_training.pipeline.formats.record_columns import RecordColumns

TRIES = 4  # stretches with a record that is not plain, after which the native reader is left alone


# A string, to be passed over, or an integer of so many digits that it may not fit.
_LONG = re.compile(rb'"(?:[^"\\]|\\.)*"|(?<![\d.eE+-])(-?\d{19,})(?![\d.eE])')
_FIRST_HUGE = 2.0**63
# What Python's json writes for numbers that are not finite.
_NO_NUMBER = re.compile(rb"[:,\[]\s*(-?Infinity|NaN)\b")


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
    floats: bool


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
            columns = self._by_orjson(found, index)
            if holds_huge_floats(columns):
                columns = self._by_orjson(found, index, refused=_with_huge_integers(found))
            self._learn(columns)
        return columns

    def _by_orjson(self, found: Found, index: Sequence[int], refused: Collection[int] = ()) -> Columns:
        records: list[Any] = []
        kept: list[int] = []
        bad: dict[int, str] = {}
        for i, (a, b) in enumerate(zip(found.starts.tolist(), found.stops.tolist(), strict=True)):
            fault = found.faults.get(i) or (
                "holds an integer beyond 64 signed bits" if i in refused else None
            )
            if fault is None:
                line = found.text[a:b]
                try:
                    record = orjson.loads(line)
                    fault = fault_of(line, record)
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

    # -- plain numbers --------------------------------------------------------------------------------

    def _learn(self, columns: Columns) -> None:
        """From records that orjson read, what the native reader is to expect; None where it cannot."""
        convert = self._convert
        if self._failures >= TRIES or convert.kinds is None or convert.names or not len(columns):
            self._fields = None
            return
        fields = []
        for key, kind, values in (
            (convert.input_key, convert.kinds[0], columns.input),
            (convert.target_key, convert.kinds[1], columns.target),
        ):
            if kind == "nothing":
                continue
            plain = isinstance(values, np.ndarray) and values.ndim <= native.MAX_DIMENSIONS
            if kind not in ("a number", "a list") or not plain or key in (None, "metadata", "quality"):
                self._fields = None
                return
            assert isinstance(values, np.ndarray)
            assert key is not None
            fields.append(_Field(key.encode(), values.shape[1:], values.dtype.kind == "f"))
        self._fields = fields

    def _natively(self, found: Found, index: Sequence[int]) -> Columns | None:
        reader = native.reader()
        assert self._fields is not None
        if reader is None:
            return None
        n = len(found.starts)
        quality = np.empty(n)
        for _ in range(3):  # again where a column turned out to hold the other kind of numbers
            fields, arrays = (native.Column * len(self._fields))(), []
            for column, field in zip(fields, self._fields, strict=True):
                values = np.empty((n, *field.shape), np.float64 if field.floats else np.int64)
                column.key, column.key_length, column.dimensions = field.key, len(field.key), len(field.shape)
                column.shape[: len(field.shape)] = field.shape
                address = values.ctypes.data
                column.floats, column.integers = (address, None) if field.floats else (None, address)
                arrays.append(values)
            graded = native.Quality(quality.ctypes.data, 0)
            done = reader.forge_read_records(
                found.text, ctypes.c_void_p(found.starts.ctypes.data),
                ctypes.c_void_p(found.stops.ctypes.data), ctypes.c_int64(n), fields,
                ctypes.c_int64(len(self._fields)), ctypes.byref(graded),
            )  # fmt: skip
            changed = False
            for column, field in zip(fields, self._fields, strict=True):
                if (done == n or column.saw_float) and field.floats != bool(column.saw_float):
                    field.floats, changed = bool(column.saw_float), True
            if changed:
                continue
            if done < n:
                break
            return self._columns(arrays, quality if graded.seen else None, index)
        self._failures += 1
        return None

    def _columns(self, arrays: list[np.ndarray], quality: np.ndarray | None, index: Sequence[int]) -> Columns:
        with np.errstate(over="ignore"):
            narrow = [a.astype(np.float32) if a.dtype.kind == "f" else a for a in arrays]
        return Columns(np.array(index, np.int64), narrow[0], narrow[1] if len(narrow) > 1 else None, quality)
