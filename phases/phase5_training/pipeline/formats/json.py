"""JSON: ``{"samples": [records]}`` or a bare list of records (.json), and JSON Lines (.jsonl, .ndjson).

Small files are parsed once by orjson. A JSON array too large for that, or read as a stream, goes
through ijson in one forward pass; JSON Lines are indexed by byte offset and read in any order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import ijson
import numpy as np
import orjson

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.columns import Columns, concat
from phase5_training.pipeline.formats.objects import source_from_object
from phase5_training.pipeline.formats.record_columns import RecordColumns
from phase5_training.pipeline.formats.source import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    Access,
    ArraySource,
    ReadOptions,
    SequentialWindow,
    Source,
)


def open_json(path: Path, options: ReadOptions) -> Source:
    """A .json file as a source: loaded when it fits, walked forward when it does not.

    Raises:
        DataError: with line and column for broken JSON, or naming what stands in place of the records.
    """
    if options.loads(path.stat().st_size):
        return source_from_object(_parse(path), "json", str(path))
    stream = JsonStream(path, options.window)
    if options.streaming:
        return stream
    # Too large for a tree of Python objects: arrays are several times smaller.
    return ArraySource.from_columns("json", [str(path)], concat(list(stream.iterate())))


def _parse(path: Path) -> Any:
    raw = path.read_bytes()
    if not raw.strip():
        raise DataError(f'{path}: the file is empty; wanted {{"samples": [...]}} or a list of records')
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        hint = ""
        if error.lineno > 1 and _is_object(raw.split(b"\n", 1)[0]):
            hint = "; the first line is a record by itself: name the file .jsonl"
        where, reason = f"line {error.lineno} column {error.colno}", error.msg.split(":")[0]
        raise DataError(f"{path} {where}: not valid JSON ({reason}){hint}") from error


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


MAX_DEPTH = 64  # levels of nesting; ijson's time grows with the square of it
_STEP = np.zeros(256, np.int8)
_STEP[[ord("["), ord("{")]], _STEP[[ord("]"), ord("}")]] = 1, -1
_MARKS = _STEP != 0
_MARKS[ord('"')] = True


class DepthGuard:
    """A file whose reader stops at JSON nested deeper than `MAX_DEPTH`."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._tail = b""
        self._depth = self._quotes = 0

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, as the file has them."""
        block = self._file.read(size)
        text = self._tail + block
        # A backslash at the end belongs to the first byte of the next block.
        odd = (len(text) - len(text.rstrip(b"\\"))) % 2
        self._tail, text = text[len(text) - odd :], text[: len(text) - odd]
        if b"\\" in text:
            text = text.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        codes = np.frombuffer(text, np.uint8)
        codes = codes[_MARKS[codes]]
        quotes = self._quotes + np.cumsum(codes == ord('"'))
        depth = self._depth + np.cumsum(_STEP[codes] * (quotes % 2 == 0), dtype=np.int64)
        if len(codes):
            self._quotes, self._depth = int(quotes[-1]) % 2, int(depth[-1])
            if depth.max() > MAX_DEPTH:
                raise DataError(f"{self._path}: nested deeper than {MAX_DEPTH} levels; no array needs that")
        return block


class JsonStream:
    """A JSON array of records read forward with bounded memory; random access by `SequentialWindow`.

    Opening it counts the records: one pass over the file.
    """

    format = "json"
    access: Access = "parsed"
    vocab_size: int | None = None

    def __init__(self, path: Path, window: int) -> None:
        self.path, self.paths = path, [str(path)]
        self._window = SequentialWindow(self.iterate, window)
        self._length: int | None = None

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(len(chunk) + len(chunk.bad) for chunk in self.iterate())
        return self._length

    def gather(self, indices: np.ndarray) -> Columns:
        """See `Source.gather`."""
        return self._window.gather(indices)

    def _records(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            head = file.read(4096).lstrip()
            if not head:
                raise DataError(f'{self.path}: the file is empty; wanted {{"samples": [...]}}')
            if head[:1] not in b"[{":
                raise DataError(f"{self.path}: begins with {head[:12]!r}; wanted an object or a list")
            file.seek(0)
            prefix = "item" if head[:1] == b"[" else "samples.item"
            try:
                yield from ijson.items(DepthGuard(file, self.path), prefix, use_float=True)
            except (ijson.JSONError, UnicodeDecodeError) as error:
                line = str(error).split("\n")[0]
                raise DataError(f"{self.path} near byte {file.tell()}: not valid JSON ({line})") from error

    def iterate(self) -> Iterator[Columns]:
        """See `Source.iterate`."""
        convert, start, records = RecordColumns(), 0, self._records()
        while chunk := list(itertools.islice(records, CHUNK_ROWS)):
            yield convert(chunk, range(start, start + len(chunk)))
            start += len(chunk)
        if not start:
            raise DataError(f"{self.path}: no records; wanted a list, or an object with a 'samples' list")

    def locate(self, index: int) -> tuple[str, int]:
        """See `Source.locate`."""
        return self.paths[0], index

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {"format": self.format, "access": "streamed", "records": len(self)}


def open_json_lines(path: Path, options: ReadOptions) -> Source:
    """A JSON Lines file as a source: loaded when it fits, else indexed by byte offset.

    Raises:
        DataError: the file holds no records.
    """
    lines = JsonLines(path)
    if not options.loads(path.stat().st_size):
        return lines
    columns = concat(list(lines.iterate()))
    source = ArraySource.from_columns("jsonl", [str(path)], columns)
    return source


class JsonLines:
    """JSON Lines in place: the offset of every line is known, a record is parsed when asked for."""

    format = "jsonl"
    access: Access = "parsed"
    vocab_size: int | None = None

    def __init__(self, path: Path) -> None:
        self.path, self.paths = path, [str(path)]
        if not path.stat().st_size:
            raise DataError(f"{path}: the file is empty; wanted one record a line")
        self._bytes = np.memmap(path, np.uint8, mode="r")
        self._starts, self._stops = self._index()
        if not len(self._starts):
            raise DataError(f"{path}: only blank lines; wanted one record a line")
        self._convert = RecordColumns()
        self._convert(self._parse(0, min(len(self), 64))[0], range(min(len(self), 64)))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_bytes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bytes = np.memmap(self.path, np.uint8, mode="r")

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of every line that is not blank."""
        ends = [
            np.flatnonzero(self._bytes[at : at + CHUNK_BYTES] == 10) + at
            for at in range(0, len(self._bytes), CHUNK_BYTES)
        ]
        stops = np.concatenate(ends)
        if not len(stops) or stops[-1] != len(self._bytes) - 1:
            stops = np.append(stops, len(self._bytes))
        starts = np.concatenate([[0], stops[:-1] + 1])
        full = stops > starts
        # Only short lines can be blank ones; looking into those is cheap.
        for i in np.flatnonzero(full & (stops - starts < 16)).tolist():
            full[i] = bool(bytes(self._bytes[starts[i] : stops[i]]).strip())
        return starts[full], stops[full]

    def _parse(self, start: int, stop: int) -> tuple[list[Any], dict[int, str]]:
        raw = bytes(self._bytes[self._starts[start] : self._stops[stop - 1]])
        base = int(self._starts[start])
        bounds = zip(self._starts[start:stop].tolist(), self._stops[start:stop].tolist(), strict=True)
        return self._load([raw[a - base : b - base] for a, b in bounds], range(start, stop))

    def _load(self, lines: list[bytes], index: range | list[int]) -> tuple[list[Any], dict[int, str]]:
        records, bad = [], {}
        for position, line in zip(index, lines, strict=True):
            try:
                records.append(orjson.loads(line))
            except orjson.JSONDecodeError as error:
                records.append(None)
                offset = int(self._starts[position])
                number = int(np.count_nonzero(self._bytes[:offset] == 10)) + 1
                bad[position] = f"(line {number}, byte {offset}) is not valid JSON: {error.msg.split(':')[0]}"
        return records, bad

    def __len__(self) -> int:
        return len(self._starts)

    def _columns(self, records: list[Any], bad: dict[int, str], index: range | list[int]) -> Columns:
        if bad:
            kept = [i for i, position in enumerate(index) if position not in bad]
            records, index = [records[i] for i in kept], [index[i] for i in kept]
        columns = self._convert(records, index)
        columns.bad |= bad
        return columns

    def gather(self, indices: np.ndarray) -> Columns:
        """See `Source.gather`."""
        index = indices.tolist()
        bounds = zip(self._starts[indices].tolist(), self._stops[indices].tolist(), strict=True)
        records, bad = self._load([bytes(self._bytes[a:b]) for a, b in bounds], index)
        return self._columns(records, bad, index)

    def iterate(self) -> Iterator[Columns]:
        """See `Source.iterate`."""
        start = 0
        while start < len(self):
            byte = int(self._starts[start]) + CHUNK_BYTES
            stop = min(start + CHUNK_ROWS, int(np.searchsorted(self._starts, byte)), len(self))
            stop = max(stop, start + 1)
            records, bad = self._parse(start, stop)
            yield self._columns(records, bad, range(start, stop))
            start = stop

    def locate(self, index: int) -> tuple[str, int]:
        """See `Source.locate`."""
        return self.paths[0], index

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {"format": self.format, "access": "indexed", "records": len(self)}
