"""JSON: ``{"samples": [records]}`` or a bare list of records (.json), and JSON Lines (.jsonl, .ndjson).

Small .json files are parsed once by orjson. All others are walked through once, block by block; where they
do not fit in memory the places of their records are kept in a side file (`index_file.py`), and so are the
numbers of records of one shape. Records are then read in any order.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from phase5_training.errors import DataError
from phase5_training.pipeline.formats import native
from phase5_training.pipeline.formats.columns import Columns, concat
from phase5_training.pipeline.formats.index_file import IndexWriter, RecordIndex, load
from phase5_training.pipeline.formats.indexed import READ_BYTES, IndexedSource
from phase5_training.pipeline.formats.json_checks import fault_of, without_strings
from phase5_training.pipeline.formats.json_records import (
    Finder,
    Found,
    ListFinder,
    NoListError,
    cut,
    find_lines,
)
from phase5_training.pipeline.formats.objects import source_from_object
from phase5_training.pipeline.formats.reading import tell_read
from phase5_training.pipeline.formats.record_parser import RecordParser, holds_huge_floats
from phase5_training.pipeline.formats.row_file import narrowed
from phase5_training.pipeline.formats.source import CHUNK_ROWS, Access, ArraySource, ReadOptions, Source

WHOLE_BYTES = 2 << 20  # a .json file up to this size is parsed as one document
WHOLE_OBJECTS = 200_000  # of so many records, objects and lists; a bad record takes more yet
OBJECT_BYTES = 64  # that a list or an object takes, which may be two bytes of text
TEXT_GROWTH = 4  # a digit and a comma become eight bytes at most
MAX_LINE = 1 << 20  # bytes looked at to tell JSON Lines that are named .json
MAX_GAP = 4096  # bytes between two records that are read over rather than sought over
FIRST = 64  # records that fix the form of the others
MAX_LOST = 500_000  # unreadable records, each of which is kept with its reason


def open_json(path: Path, options: ReadOptions) -> Source:
    """A .json file as a source: loaded when it fits, else indexed and read in any order.

    Raises:
        DataError: broken JSON with its place, or what stands where the records should be.
    """
    size = path.stat().st_size
    if size <= WHOLE_BYTES and options.loads(size):
        whole = _whole(path)
        if whole is not None:
            return whole
    try:
        return _open(path, "json", ListFinder(path), options)
    except NoListError:
        if not options.loads(TEXT_GROWTH * size):
            raise
        return source_from_object(_columns(path, options), "json", str(path))


def open_json_lines(path: Path, options: ReadOptions) -> Source:
    """A JSON Lines file as a source: loaded when it fits, else indexed and read in any order.

    Raises:
        DataError: the file holds no records.
    """
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty; wanted one record a line")
    return _open(path, "jsonl", find_lines, options)


def _open(path: Path, format: str, finder: Finder, options: ReadOptions) -> Source:
    loads = options.loads(TEXT_GROWTH * path.stat().st_size)
    source = JsonRecords(path, format, finder, with_rows=not options.streaming, keep_index=not loads)
    if not loads:
        return source
    chunks = []
    for chunk in source.iterate():
        chunks.append(narrowed(chunk))
    return ArraySource.from_columns(format, [str(path)], concat(chunks))


def _whole(path: Path) -> Source | None:
    """A file as one document; None where its records have to be looked at one by one."""
    raw = path.read_bytes()
    if not raw.strip():
        raise DataError(f'{path}: the file is empty; wanted {{"samples": [...]}} or a list of records')
    if raw.count(b"{") + raw.count(b"[") > WHOLE_OBJECTS:
        return None
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    records = data.get("samples") if isinstance(data, dict) else data
    many = isinstance(records, list) and len(records) > WHOLE_OBJECTS
    if many or fault_of(raw, data) is not None:
        return None
    source = source_from_object(data, "json", str(path))
    return None if any(holds_huge_floats(chunk) for chunk in source.iterate()) else source


def _columns(path: Path, options: ReadOptions) -> Any:
    """A document without a list of records, as an object."""
    raw = path.read_bytes()
    _check_columns(path, raw, options)
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        where, reason = f"line {error.lineno} column {error.colno}", error.msg.split(":")[0]
        hint = "" if error.lineno == 1 else _hint(raw)
        raise DataError(f"{path} {where}: not valid JSON ({reason}){hint}") from error
    fault = fault_of(raw, data)
    if fault is not None:
        raise DataError(f"{path}: {fault}")
    return data


def _check_columns(path: Path, raw: bytes, options: ReadOptions) -> None:
    """Refuse what is far larger parsed than as text: columns hold no objects, and rows take memory too."""
    if raw.count(b"{") + raw.count(b"[") <= WHOLE_OBJECTS:
        return
    plain = without_strings(raw)
    objects, lists = plain.count(b"{"), plain.count(b"[")
    if objects > WHOLE_OBJECTS:
        raise DataError(
            f"{path}: {objects} objects and no list of records; put the records under 'samples'{_hint(raw)}"
        )
    size = TEXT_GROWTH * len(raw) + OBJECT_BYTES * lists
    if not options.loads(size):
        raise DataError(
            f"{path}: {lists} lists in columns take {size / 1e6:.0f} MB while they are read, more than "
            "memory_limit_mb allows; write records under 'samples', which are read one by one, or .npz"
        )


def _hint(raw: bytes) -> str:
    """What to say of JSON Lines under another name; nothing of other text."""
    first, _, rest = raw[:MAX_LINE].partition(b"\n")
    try:
        lines = rest.lstrip()[:1] == b"{" and isinstance(orjson.loads(first), dict)
    except orjson.JSONDecodeError:
        lines = False
    return "; the first line is a record by itself: name the file .jsonl" if lines else ""


def _close(process: int, descriptor: int) -> None:
    if process == os.getpid():  # a forked child leaves the descriptor to its owner
        os.close(descriptor)


class JsonRecords(IndexedSource):
    """Records of a JSON text in place: each is parsed when asked for, or taken from its row in the index.

    The index is made by the first walk through the file.

    Args:
        path: the file.
        format: "json" or "jsonl".
        finder: of the records in its text.
        with_rows: keep numbers as rows too.
        keep_index: False only walks.
    """

    def __init__(
        self, path: Path, format: str, finder: Finder, *, with_rows: bool, keep_index: bool = True
    ) -> None:
        super().__init__(path, format, with_rows)
        self._finder, self._keep = finder, keep_index
        self._parser = RecordParser()
        self._file: tuple[int, int] | None = None  # process and descriptor
        if keep_index:
            self._use(load(path, format, with_rows))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None, "_file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._keep:
            self._use(load(self.path, self.format, self._with_rows))

    @property
    def access(self) -> Access:
        """See `Source`."""
        return "mapped" if self._index is not None and self._index.rows is not None else "parsed"

    def _use(self, index: RecordIndex | None) -> None:
        super()._use(index)
        if index is not None and index.rows is None:
            if not index.frugal:
                index.hold_spans()
            if index.count:
                self._seek(np.arange(min(index.count, FIRST)))

    def _walk_again(self, index: RecordIndex) -> Iterator[Columns]:
        start = end = 0
        while start < index.count:
            near = index.spans(np.arange(start, min(start + CHUNK_ROWS, index.count)))
            if near[0, 0] < end:
                raise self._overlap()
            fitting = int(np.searchsorted(near[:, 1], near[0, 0] + READ_BYTES, side="right"))
            stop = start + max(fitting, 1)
            end = int(near[stop - start - 1, 1])
            columns = self._seek(np.arange(start, stop))
            columns.bad |= index.bad_between(start, stop)
            yield columns
            start = stop

    def _first_walk(self) -> Iterator[Columns]:
        writer = IndexWriter(self.path, self.format, self._with_rows) if self._keep else None
        self._parser = RecordParser()
        count = lost = 0
        try:
            with self.path.open("rb", buffering=0) as file:
                for whole in self._finder(file):
                    tell_read(str(self.path), file.tell(), None, "bytes")
                    for found in cut(whole, CHUNK_ROWS, 0 if count else FIRST):
                        columns = self._parser(found, range(count, count + len(found.starts)))
                        count += len(found.starts)
                        lost += len(columns.bad)
                        if lost > MAX_LOST:
                            reason = next(iter(columns.bad.values()))
                            raise DataError(
                                f"{self.path}: {lost} records cannot be read; one of them {reason}"
                            )
                        if writer is not None:
                            spans = np.stack([found.starts, found.stops], 1) + found.base
                            writer.add(spans, columns)
                        yield columns
            if not count:
                raise DataError(
                    f"{self.path}: no records; wanted "
                    + ("one a line" if self.format == "jsonl" else "at least one in the list")
                )
            if writer is not None:
                index = writer.finish()
                self._note = writer.why_memory
                self._use(index)
        finally:
            if writer is not None:
                writer.close()

    def _overlap(self) -> DataError:
        assert self._index is not None
        return DataError(f"{self.path}: {self._index.path} names records that overlap; delete it")

    def _seek(self, indices: np.ndarray) -> Columns:
        # Neighbors are read from the file at once.
        assert self._index is not None
        spans = self._index.spans(indices)
        # An index that came with its file may say anything, and has the right checksum all the same.
        if len(spans) and (spans[:, 0].min() < 0 or (spans[:, 1] < spans[:, 0]).any()):
            raise DataError(f"{self.path}: {self._index.path} names places that no file has; delete it")
        if len(spans) and spans[:, 1].max() > self.path.stat().st_size:
            raise DataError(f"{self.path}: shorter than its index {self._index.path} says; delete that one")
        order = np.argsort(spans[:, 0], kind="stable")
        starts, stops = spans[order, 0], spans[order, 1]
        # Records that share their text cost more than the file holds; asked for twice, one is cheap.
        if ((starts[1:] < stops[:-1]) & (np.diff(indices[order]) != 0)).any():
            raise self._overlap()
        stops = np.maximum.accumulate(stops)
        first_of_run = np.ones(len(order), bool)
        first_of_run[1:] = starts[1:] - stops[:-1] > MAX_GAP
        cuts = np.flatnonzero(first_of_run)
        firsts = starts[cuts]
        sizes = np.maximum.reduceat(stops, cuts) - firsts if len(cuts) else firsts
        text = native.read_runs(self._descriptor(), firsts, sizes)
        if text is None:
            raise DataError(f"{self.path}: the file became shorter while it was read")
        shift = (np.cumsum(sizes) - sizes - firsts)[np.cumsum(first_of_run) - 1]
        moved = np.empty_like(spans)
        moved[order] = spans[order] + shift[:, None]
        begin, end = np.ascontiguousarray(moved.T)
        return self._parser(Found(0, text, begin, end, offsets=spans[:, 0]), indices.tolist())

    def _descriptor(self) -> int:
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
            # Not __del__: at the end of the program that runs when modules are gone.
            weakref.finalize(self, _close, *self._file)
        return self._file[1]

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        index = self._made()
        place = str(index.path) if index.path else f"in memory: {self._note}"
        return {**self._described("indexed"), "index": place}
