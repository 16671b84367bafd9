"""Where the records of a JSON text begin and end, found block by block in bounded memory.

A list of records (`ListFinder`) is followed by its brackets, JSON Lines (`find_lines`) by the ends of the
lines. What a record holds is left to orjson, or to the reader of plain records in `record_parser.py`.
"""

from __future__ import annotations

import ctypes
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import orjson

from phase5_training.errors import DataError
from phase5_training.pipeline.formats import native
from phase5_training.pipeline.formats.json_checks import fault_of

BLOCK_BYTES = 4 << 20  # read at a time
MAX_RECORD = 64 << 20  # bytes of one record
SPLIT = "split it, or write arrays as .npy or .h5"
MAX_AROUND = 1 << 20  # bytes before and after the list of records

_STEP = np.zeros(256, np.int8)
_STEP[[ord("["), ord("{")]], _STEP[[ord("]"), ord("}")]] = 1, -1
_MARKS = _STEP != 0
_MARKS[ord('"')] = True
_BETWEEN = np.zeros(256, bool)
_BETWEEN[list(b" \t\r\n,")] = True
_SPACE = b" \t\r\n"


@dataclass
class Found:
    """Records in a stretch of text: number i is ``text[starts[i]:stops[i]]``.

    ``base`` is the offset of the text in its file; ``offsets`` are those of the records where they do not
    follow each other. ``lines`` are the numbers of their lines where lines are counted. ``faults`` says
    which of them are no records, and why.
    """

    base: int
    text: bytes
    starts: np.ndarray
    stops: np.ndarray
    lines: np.ndarray | None = None
    offsets: np.ndarray | None = None
    faults: dict[int, str] = field(default_factory=dict)

    def take(self, rows: np.ndarray) -> Found:
        """Some of them, none of which has a fault."""
        lines, offsets = (None if part is None else part[rows] for part in (self.lines, self.offsets))
        return Found(self.base, self.text, self.starts[rows], self.stops[rows], lines, offsets)


class NoListError(DataError):
    """The text begins as JSON and has no list of records."""


def find_in_list(text: bytes) -> tuple[np.ndarray, np.ndarray, int, int]:
    """The bracketed records in a part of a JSON list that begins between two of them.

    Returns:
        Starts and stops of the records that end in the text, the place of the bracket that closes the list
        (-1 where it is not in the text), and the greatest depth.

    Example:
        >>> starts, stops, end, depth = find_in_list(b' {"a": "]"}, [[1]], {"b"')
        >>> starts.tolist(), stops.tolist(), end, depth
        ([1, 13], [11, 18], -1, 2)
    """
    reader = native.reader()
    return _find_in_python(text) if reader is None else _find_natively(reader, text)


def _find_natively(reader: ctypes.CDLL, text: bytes) -> tuple[np.ndarray, np.ndarray, int, int]:
    room = text.count(b"{") + text.count(b"[")
    starts, stops = np.empty(room, np.int64), np.empty(room, np.int64)
    state = (ctypes.c_int64 * 2)()
    count = reader.forge_find_records(
        text, ctypes.c_int64(len(text)), ctypes.c_void_p(starts.ctypes.data),
        ctypes.c_void_p(stops.ctypes.data), ctypes.c_int64(room), state,
    )  # fmt: skip
    return starts[:count].copy(), stops[:count].copy(), int(state[0]), int(state[1])


def _find_in_python(text: bytes) -> tuple[np.ndarray, np.ndarray, int, int]:
    if b"\\" in text:
        text = text.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
    codes = np.frombuffer(text, np.uint8)
    places = np.flatnonzero(_MARKS[codes])
    codes = codes[places]
    outside = np.cumsum(codes == ord('"')) % 2 == 0
    steps = _STEP[codes] * outside
    depth = np.cumsum(steps, dtype=np.int64)
    over = np.flatnonzero(depth < 0)
    end = -1
    if len(over):
        end, places, steps, depth = (
            int(places[over[0]]),
            places[: over[0]],
            steps[: over[0]],
            depth[: over[0]],
        )
    starts = places[(steps == 1) & (depth == 1)]
    stops = places[(steps == -1) & (depth == 0)] + 1
    return starts[: len(stops)], stops, end, int(depth.max()) if len(depth) else 0


def between_is_sound(text: bytes, starts: np.ndarray, stops: np.ndarray, first: bool) -> int:
    """Where, between records, something else stands than blanks and one comma; -1 where nowhere does.

    Args:
        text: begins where the record before it ended, or the list began.
        starts: of the records in it.
        stops: their ends.
        first: whether the list began there, so that no comma comes before the first record.
    """
    if not len(starts):
        return -1
    befores = np.concatenate([[0], stops[:-1]])
    lengths = starts - befores
    ends = np.cumsum(lengths)
    gaps = np.frombuffer(text, np.uint8)[np.repeat(befores - ends + lengths, lengths) + np.arange(ends[-1])]
    odd = np.flatnonzero(~_BETWEEN[gaps])
    if len(odd):
        return int(befores[np.searchsorted(ends, odd[0], side="right")])
    commas = np.concatenate([[0], np.cumsum(gaps == ord(","))])[np.concatenate([[0], ends])]
    wanted = np.ones(len(starts), np.int64)
    wanted[0] = 0 if first else 1
    wrong = np.flatnonzero(np.diff(commas) != wanted)
    return int(befores[wrong[0]]) if len(wrong) else -1


class ListFinder:
    """The records of a JSON list, or of the list under "samples" in an object.

    Args:
        path: for messages.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path

    def __call__(self, file: IO[bytes]) -> Iterator[Found]:
        """Walk through a file from its beginning.

        Raises:
            DataError: no list of records, something between records that is neither blank nor comma, or a
                record too long.
        """
        head, at = self._head(file)
        text, base, first = head[at:], at, True
        while True:
            starts, stops, end, _ = find_in_list(text)
            wrong = between_is_sound(text, starts, stops, first)
            if wrong >= 0:
                raise DataError(
                    f"{self.path} byte {base + wrong}: not valid JSON ({text[wrong : wrong + 20]!r} "
                    "between two records; wanted one comma)"
                )
            if len(starts):
                yield Found(base, text, starts, stops)
            used = int(stops[-1]) if len(stops) else 0
            first = first and not len(stops)
            if end >= 0:
                if text[used:end].strip(_SPACE):
                    raise DataError(
                        f"{self.path} byte {base + used}: not valid JSON ({text[used:end][:20]!r} at the end "
                        "of the list)"
                    )
                self._check_around(head[:at], text[end:], file)
                return
            if len(text) - used > MAX_RECORD:
                raise DataError(
                    f"{self.path} byte {base + used}: a record of more than {MAX_RECORD / 1e6:.0f} MB; "
                    f"{SPLIT}, or close its brackets where one is missing"
                )
            block = file.read(BLOCK_BYTES)
            if not block:
                at = len(text) - len(text[used:].lstrip(_SPACE + b","))
                fault = "is cut off: the file ends within the list of records"
                yield Found(base, text, np.array([at]), np.array([len(text)]), faults={0: fault})
                return
            text, base = text[used:] + block, base + used

    def _head(self, file: IO[bytes]) -> tuple[bytes, int]:
        """The beginning of the file, and the place after the bracket that opens the list."""
        head = file.read(BLOCK_BYTES)
        body = head.lstrip(_SPACE)
        if not body:
            raise DataError(f'{self.path}: the file is empty; wanted {{"samples": [...]}}')
        if body[:1] == b"[":
            return head, len(head) - len(body) + 1
        if body[:1] != b"{":
            mark = "; save it as UTF-8 without a byte order mark" if body[:3] == BOM_UTF8 else ""
            raise DataError(f"{self.path}: begins with {body[:12]!r}; wanted an object or a list{mark}")
        at = _list_of_samples(head[:MAX_AROUND])
        if at < 0:
            raise NoListError(
                f"{self.path}: no records; wanted a list, or an object with a 'samples' list within its "
                f"first {MAX_AROUND} bytes"
            )
        return head, at

    def _check_around(self, before: bytes, after: bytes, file: IO[bytes]) -> None:
        """Whether the text without its records is JSON."""
        after += file.read(MAX_AROUND)
        if file.read(1):
            raise DataError(f"{self.path}: more than {MAX_AROUND} bytes follow the list of records")
        try:
            fault = fault_of(before + after, orjson.loads(before + after))
            if fault is not None:
                raise DataError(f"{self.path}: {fault}, around the list of records")
        except orjson.JSONDecodeError as error:
            reason = error.msg.split(":")[0]
            raise DataError(f"{self.path}: not valid JSON around the list of records ({reason})") from error


def _list_of_samples(head: bytes) -> int:
    """The place after the bracket that opens the list under "samples"; -1 where there is none."""
    plain = head.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
    codes = np.frombuffer(plain, np.uint8)
    depth, opened = 0, -1
    for place in np.flatnonzero(_MARKS[codes]).tolist():
        code = plain[place]
        if code == ord('"'):
            if opened < 0:
                opened = place
                continue
            name, opened = head[opened + 1 : place], -1
            rest = head[place + 1 :][:256].lstrip(_SPACE) if depth == 1 and name == b"samples" else b""
            value = rest[1:].lstrip(_SPACE)
            if rest[:1] == b":" and value[:1] == b"[":
                return head.index(b"[", place) + 1
        elif opened < 0:
            depth += int(_STEP[code])
    return -1


def find_lines(file: IO[bytes]) -> Iterator[Found]:
    """Walk through a JSON Lines text from its beginning: the lines that are not blank."""
    text, base, line = b"", 0, 1
    while True:
        block = file.read(BLOCK_BYTES)
        text += block
        last = not block
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
        if last and len(text) and not text.endswith(b"\n"):
            ends = np.append(ends, len(text))
        starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
        lines = line + np.arange(len(ends))
        full = ends > starts
        # Only short lines can be blank ones; looking into those is cheap.
        for i in np.flatnonzero(full & (ends - starts < 16)).tolist():
            full[i] = bool(text[starts[i] : ends[i]].strip())
        if full.any():
            yield Found(base, text, starts[full], ends[full], lines[full])
        if last:
            return
        used = int(ends[-1]) + 1 if len(ends) else 0
        text, base, line = text[used:], base + used, line + len(ends)
        if len(text) > MAX_RECORD:
            length, rest = _pass_over_line(file, len(text))
            fault = f"is {length / 1e6:.0f} MB long; a record has at most {MAX_RECORD / 1e6:.0f}: {SPLIT}"
            nothing = np.zeros(1, np.int64)
            yield Found(base, b"", nothing, nothing, np.array([line]), faults={0: fault})
            text, base, line = rest, base + length + 1, line + 1


def _pass_over_line(file: IO[bytes], length: int) -> tuple[int, bytes]:
    """The length of a line of which so many bytes are read, and what was read beyond its end."""
    while block := file.read(BLOCK_BYTES):
        end = block.find(b"\n")
        if end >= 0:
            return length + end, block[end + 1 :]
        length += len(block)
    return length, b""


Finder = Callable[[IO[bytes]], Iterator[Found]]


def cut(found: Found, rows: int, first: int = 0) -> Iterator[Found]:
    """The same in portions of at most ``rows`` records, the first of them of ``first`` unless that is 0."""
    count = len(found.starts)
    for start in [*range(0, min(first, 1)), *range(first, count, rows)]:
        part = slice(start, start + rows if start >= first else first)
        lines = None if found.lines is None else found.lines[part]
        faults = {i - start: fault for i, fault in found.faults.items() if start <= i < part.stop}
        yield Found(found.base, found.text, found.starts[part], found.stops[part], lines, faults=faults)
