"""What one pass over a text file found, kept beside it: where records begin, and numbers as rows.

A side file ``.NAME.forge-index`` holds sections of plain arrays and a footer that describes them. It is
used when size, modification time and a hash of head and tail of the data file agree and every byte of the
sections has the checksum that the footer states; anything else is made again. It is written under a
temporary name and renamed, so processes that make it at once do not disturb each other. Where the data
folder cannot be written it lies in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.columns import Columns
from phase5_training.pipeline.formats.native import cache_folder
from phase5_training.pipeline.formats.row_file import ROW_TYPES, RowFile

logger = logging.getLogger("forge")

VERSION = 1  # of the layout and of what the readers put into it; another one is made again
MAGIC = b"forge-index\n"
HASHED = 64 << 10  # bytes of head and tail that tell files apart
PIECE = 8 << 20  # read at a time to check a section
MAX_FOOTER = 64 << 20
MAX_BAD = 100_000  # unreadable records; a file with more is looked at again each time
RESIDENT = 32 << 20  # mapped bytes that are touched before they are given back, where memory is to be spared
STALE_SECONDS = 86400  # age of a temporary file that nobody writes any more


def file_key(path: Path, kind: str) -> dict[str, Any]:
    """What tells a version of a data file, read as ``kind``, from any other."""
    found = path.stat()
    with path.open("rb") as file:
        head = file.read(HASHED)
        file.seek(max(found.st_size - HASHED, 0))
        tail = file.read(HASHED)
    return {
        "version": VERSION,
        "kind": kind,
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "head": hashlib.sha256(head).hexdigest(),
        "tail": hashlib.sha256(tail).hexdigest(),
    }


def places(path: Path) -> list[Path]:
    """Where the side file of a data file may lie, in the order they are tried."""
    path = path.resolve()
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return [path.with_name(f".{path.name}.forge-index"), cache_folder() / "indexes" / f"{name}.forge-index"]


class RecordIndex:
    """Where the records of a file are, and their numbers where all are of one shape.

    Args:
        count: records.
        spans: (count, 2) int64, where each record begins and ends; an array, or the file and offset where
            it lies.
        bad: records that could not be read, with the reason.
        rows: (count,) structured rows with the fields input, target (or target.NAME) and quality, or None.
        path: of the side file; None while it is held in memory only.
        mapped: what ``rows`` lie in.

    ``frugal`` gives mapped memory back as the walk goes on, and leaves the spans in the file.
    """

    frugal = False

    def __init__(
        self,
        count: int,
        spans: np.ndarray | tuple[Path, int],
        bad: dict[int, str],
        rows: np.ndarray | None = None,
        path: Path | None = None,
        mapped: mmap.mmap | None = None,
    ) -> None:
        self.count, self.bad, self.rows, self.path = count, bad, rows, path
        self._spans, self._mapped, self._touched = spans, mapped, 0
        self._bad = np.sort(np.fromiter(bad, np.int64, len(bad)))

    def spans(self, indices: np.ndarray) -> np.ndarray:
        """(n, 2) int64: where each of the records at ``indices`` begins and ends in the data file."""
        if isinstance(self._spans, np.ndarray):
            return self._spans[indices]
        path, offset = self._spans
        first, last = int(indices.min()), int(indices.max())
        near = np.fromfile(path, np.int64, 2 * (last + 1 - first), offset=offset + 16 * first)
        return near.reshape(-1, 2)[indices - first]

    def hold_spans(self) -> None:
        """Keep the places of all records in memory, for reading in any order."""
        self._spans = self.spans(np.arange(self.count)) if self.count else np.empty((0, 2), np.int64)

    def bad_between(self, start: int, stop: int) -> dict[int, str]:
        """The unreadable ones among the records ``start`` to ``stop``."""
        first, last = np.searchsorted(self._bad, (start, stop))
        return {position: self.bad[position] for position in self._bad[first:last].tolist()}

    def take(self, indices: np.ndarray) -> Columns:
        """The numbers of the records at ``indices``, in one indexing operation."""
        assert self.rows is not None
        columns = _columns(self.rows[indices], indices)
        if self.frugal and self._mapped is not None and len(indices):
            # What was touched counts as this process's memory until it is given back; it stays cached.
            self._touched += (int(indices.max()) + 1 - int(indices.min())) * self.rows.dtype.itemsize
            if self._touched > RESIDENT:
                self._mapped.madvise(mmap.MADV_DONTNEED)
                self._touched = 0
        return columns


def _columns(rows: np.ndarray, index: np.ndarray) -> Columns:
    names = rows.dtype.names or ()
    # Copied even where numpy calls it contiguous: of a single row it keeps strides that torch refuses.
    fields = {name: rows[name].copy() for name in names}
    named = {name.removeprefix("target."): fields[name] for name in names if name.startswith("target.")}
    target: Any = named or fields.get("target")
    return Columns(np.asarray(index, np.int64), fields["input"], target, fields.get("quality"))


def load(path: Path, kind: str, with_rows: bool) -> RecordIndex | None:
    """The index of a data file, if a sound one is kept.

    Args:
        path: of the data file.
        kind: of reader.
        with_rows: refuse one whose maker was not asked for rows.
    """
    key = file_key(path, kind)
    for place in places(path):
        try:
            found = _load(place, key)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            logger.info("%s is not used and made again: %s", place, error)
            continue
        if found is not None and (found[1] or not with_rows):
            return found[0]
    return None


def _load(place: Path, key: dict[str, Any], check: bool = True) -> tuple[RecordIndex, bool] | None:
    # A pipe of that name may have come with the data: opened the plain way it waits for a writer for ever.
    with open(place, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        size = os.fstat(file.fileno()).st_size
        end = len(MAGIC) + 8
        if size < len(MAGIC) + end or file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it is no index")
        file.seek(size - end)
        length = int.from_bytes(file.read(8), "little")
        if file.read() != MAGIC or length > min(MAX_FOOTER, size - end - len(MAGIC)):
            raise ValueError("it is cut short")
        file.seek(size - end - length)
        footer = orjson.loads(file.read(length))
        if footer["key"] != key:
            return None  # of another version of the file
        count, body = footer["count"], size - end - length
        if not isinstance(count, int) or count < 0:
            raise ValueError("it counts no records")
        sections = footer["sections"]
        dtype = _row_type(footer["fields"]) if footer["fields"] else None
        sizes = {"spans": 16 * count, "rows": count * dtype.itemsize if dtype else 0}
        at = len(MAGIC)
        for name in ("rows", "spans"):
            if sections[name]["offset"] != at or sections[name]["size"] != sizes[name]:
                raise ValueError(f"its section {name} is not of the declared size")
            if check and _checksum(file, at, sizes[name]) != sections[name]["crc32"]:
                raise ValueError(f"its section {name} does not have its checksum")
            at += sizes[name]
        if at != body:
            raise ValueError("its sections do not fill it")
        bad = {int(position): str(reason) for position, reason in footer["bad"].items()}
        if any(not 0 <= position < count for position in bad):
            raise ValueError("it names records that are not there")
        mapped, rows = None, None
        if dtype is not None and count:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            rows = np.frombuffer(mapped, dtype, count, len(MAGIC))
    spans = (place, sections["spans"]["offset"])
    return RecordIndex(count, spans, bad, rows, place, mapped), bool(footer["tried_rows"])


def _checksum(file: IO[bytes], offset: int, size: int) -> int:
    file.seek(offset)
    found = 0
    while size:
        piece = file.read(min(size, PIECE))
        if not piece:
            raise ValueError("it is cut short")
        found, size = zlib.crc32(piece, found), size - len(piece)
    return found


def _row_type(fields: list[list[Any]]) -> np.dtype:
    described = []
    for name, kind, shape in fields:
        if kind not in ROW_TYPES and (name, kind) != ("quality", "float64"):
            raise ValueError(f"its field {name} is of type {kind}")
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"its field {name} has shape {shape}")
        described.append((str(name), kind, tuple(shape)))
    if "input" not in dict.fromkeys(name for name, *_ in described):
        raise ValueError("its rows have no input")
    return np.dtype(described)


class IndexWriter:
    """Writes the index of a data file while its records are read; see the module.

    Args:
        path: of the data file.
        kind: of reader.
        with_rows: keep the numbers of the records too, as long as all have one shape.
    """

    def __init__(self, path: Path, kind: str, with_rows: bool) -> None:
        self._path, self._kind, self._tried = path, kind, with_rows
        self._key = file_key(path, kind)
        self._rows: RowFile | None = None
        self._held: list[np.ndarray] = []  # spans, where there is no file
        self._spans: IO[bytes] | None = None
        self._crc = 0
        self.bad: dict[int, str] = {}
        self.count = 0
        self.why_memory = ""
        self._file, self._target = self._open()
        if with_rows and self._file is not None:
            self._rows = RowFile(self._file, len(MAGIC))

    def _open(self) -> tuple[IO[bytes] | None, Path | None]:
        for target in places(self._path):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                _remove_stale(target)
                if shutil.disk_usage(target.parent).free < 2 * self._key["size"]:
                    self.why_memory = f"no room for it in {target.parent}"
                    continue
                file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed by finish or close
                    dir=target.parent, prefix=f"{target.name}.", suffix=".part", delete=False
                )
            except OSError as error:
                self.why_memory = f"{target.parent} cannot be written ({error.strerror or error})"
                continue
            os.chmod(file.name, stat.S_IMODE(self._path.stat().st_mode))
            file.write(MAGIC)
            self._spans = tempfile.TemporaryFile(dir=target.parent)  # noqa: SIM115
            return file, target
        return None, None

    def add(self, spans: np.ndarray, columns: Columns) -> None:
        """Take in the next records: their (n, 2) places in the data file, and what they hold."""
        if len(self.bad) <= MAX_BAD:
            self.bad |= columns.bad
        try:
            if self._rows is not None and not self._rows.add(columns, self.count, len(spans)):
                self._rows = None
            if self._spans is not None:
                raw = spans.astype(np.int64).tobytes()
                self._spans.write(raw)
                self._crc = zlib.crc32(raw, self._crc)
        except OSError as error:
            self._give_up(error)
        if self._spans is None:
            self._held.append(spans)
        self.count += len(spans)

    def _give_up(self, error: OSError) -> None:
        """Go on in memory, with what was written so far."""
        self._rows, self.why_memory = None, f"it could not be written ({error.strerror or error})"
        if self._spans is not None:
            self._spans.seek(0)
            self._held = [np.frombuffer(self._spans.read(), np.int64)[: 2 * self.count].reshape(-1, 2)]
        self.close()

    def finish(self) -> RecordIndex:
        """Put it in place; where that cannot be, an index in memory."""
        if self._file is not None and len(self.bad) <= MAX_BAD:
            try:
                return self._put_in_place(self._file)
            except OSError as error:
                self._give_up(error)
        if self._spans is not None:
            self._give_up(OSError(f"more than {MAX_BAD} records are unreadable"))
        spans = np.concatenate(self._held) if self._held else np.empty((0, 2), np.int64)
        return RecordIndex(self.count, spans, self.bad)

    def _put_in_place(self, file: IO[bytes]) -> RecordIndex:
        rows, spans, target = self._rows, self._spans, self._target
        assert spans is not None
        assert target is not None
        size = self.count * rows.dtype.itemsize if rows is not None and rows.dtype is not None else 0
        at = len(MAGIC)
        file.seek(at + size)
        file.truncate()
        spans.seek(0)
        shutil.copyfileobj(spans, file, PIECE)
        footer = orjson.dumps({
            "key": self._key,
            "count": self.count,
            "tried_rows": self._tried,
            "fields": rows.fields() if size and rows is not None else [],
            "sections": {
                "rows": {"offset": at, "size": size, "crc32": rows.crc if size and rows is not None else 0},
                "spans": {"offset": at + size, "size": 16 * self.count, "crc32": self._crc},
            },
            "bad": {str(position): reason for position, reason in self.bad.items()},
        })  # fmt: skip
        file.write(footer + len(footer).to_bytes(8, "little") + MAGIC)
        file.flush()
        os.replace(file.name, target)
        file.close()
        spans.close()
        self._file = self._spans = None
        found = _load(target, self._key, check=False)
        if found is None:  # another process put that of a newer version in its place
            raise DataError(f"{self._path}: the file changed while it was read; begin again")
        return found[0]

    def close(self) -> None:
        """Leave nothing behind, unless it was put in place."""
        if self._file is not None:
            self._file.close()
            with contextlib.suppress(OSError):
                os.unlink(self._file.name)
        if self._spans is not None:
            self._spans.close()
        self._file = self._spans = None


def _remove_stale(target: Path) -> None:
    """Delete what a process that was killed has left here."""
    for part in target.parent.glob(f"{target.name}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()


def chunks_of(index: RecordIndex, rows: int) -> Iterator[Columns]:
    """The rows of an index in order, in portions; what could not be read is named, not in them."""
    for start in range(0, index.count, rows):
        stop = min(start + rows, index.count)
        bad = index.bad_between(start, stop)
        kept = np.setdiff1d(np.arange(start, stop), np.fromiter(bad, np.int64, len(bad)))
        columns = index.take(kept)
        columns.bad = bad
        yield columns
