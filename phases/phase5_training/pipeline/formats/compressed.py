"""JSON and JSON Lines compressed by gzip (.gz) or zstd (.zst), read forward in bounded memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from phase5_training.errors import DataError, UsageError
from phase5_training.pipeline.formats.columns import Columns
from phase5_training.pipeline.formats.forward import open_forward
from phase5_training.pipeline.formats.json_records import Finder, ListFinder, cut, find_lines
from phase5_training.pipeline.formats.record_parser import RecordParser
from phase5_training.pipeline.formats.source import CHUNK_ROWS, ReadOptions, Source

MAX_GROWTH = 1100  # gzip cannot grow more; a zstd file that does is a bomb
LEAST_GROWTH = 64 << 20  # bytes that any file may grow to
MAX_ZSTD_WINDOW = 128 << 20
ZSTD_PIECE = 512  # bytes unpacked at a time: no more than 16 MB of text each


class _Inflated:
    """The text of a compressed file; stops at damage, and at one that grows out of proportion."""

    def __init__(self, path: Path, file: Any, errors: tuple[type[Exception], ...]) -> None:
        self._path, self._file, self._errors = path, file, errors
        self._limit, self._at = MAX_GROWTH * path.stat().st_size + LEAST_GROWTH, 0

    def read(self, size: int) -> bytes:
        """The next bytes, ``size`` at most."""
        try:
            block: bytes = self._file.read(size)
        except self._errors as error:
            raise DataError(
                f"{self._path}: damaged or cut short after {self._at} bytes of text ({error})"
            ) from error
        self._at += len(block)
        if self._at > self._limit:
            raise DataError(
                f"{self._path}: grows to more than {self._limit} bytes, {MAX_GROWTH} times its size; unpack "
                "it if it is meant to"
            )
        return block


def _gzip(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    return gzip.open(path, "rb"), (gzip.BadGzipFile, EOFError, zlib.error)


def _zstd(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        import zstandard
    except ImportError as error:
        raise UsageError(
            f"{path}: zstd files need the zstandard package: pip install 'forge-training[zstd]'"
        ) from error
    return _ZstdText(path, zstandard), (zstandard.ZstdError, EOFError)


class _ZstdText:
    """The text of a zstd file, of one frame or several.

    The package's own reader takes a file that was cut short for a whole one.
    """

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._file, self._text = path.open("rb"), bytearray()
        self._reader = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
        self._frame: Any = None

    def __enter__(self) -> _ZstdText:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        while len(self._text) < size:
            raw = self._file.read(ZSTD_PIECE)
            if not raw:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                break
            while raw:
                self._frame = self._frame or self._reader.decompressobj()
                self._text += self._frame.decompress(raw)
                raw = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
        block = bytes(self._text[:size])
        del self._text[:size]
        return block


_OPENERS: dict[str, Callable[[Path], tuple[Any, tuple[type[Exception], ...]]]] = {".gz": _gzip, ".zst": _zstd}
COMPRESSIONS = tuple(_OPENERS)


def open_compressed(path: Path, options: ReadOptions) -> Source:
    """A compressed .json, .jsonl or .ndjson file as a source.

    Raises:
        DataError: damage, a text that grows out of proportion, or what the reader of the text finds.
        UsageError: a package that the compression needs is missing.
    """
    kind = Path(path.stem).suffix.lower()
    finder: Finder = ListFinder(path) if kind == ".json" else find_lines
    name = "json" if kind == ".json" else "jsonl"

    def walk() -> Iterator[Columns]:
        parser, count = RecordParser(), 0
        file, errors = _OPENERS[path.suffix.lower()](path)
        with file:
            text: IO[bytes] = _Inflated(path, file, errors)  # type: ignore[assignment]
            for whole in finder(text):
                for found in cut(whole, CHUNK_ROWS):
                    yield parser(found, range(count, count + len(found.starts)))
                    count += len(found.starts)

    return open_forward(path, name, walk, options)
