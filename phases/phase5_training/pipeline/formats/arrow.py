"""Parquet, Arrow (Feather) and CSV, through pyarrow: the extra forge-training[arrow].

Columns named as records name them (input, target, quality, targets.NAME) are taken so. Where no column is
called input, all other columns of numbers are the features, in the order of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phase5_training.errors import DataError, UsageError
from phase5_training.pipeline.formats.arrow_bodies import MAGIC, check_bodies
from phase5_training.pipeline.formats.columns import (
    Columns,
    Ragged,
    Values,
    concat,
    gather_parts,
    take_target,
    take_values,
)
from phase5_training.pipeline.formats.forward import open_forward
from phase5_training.pipeline.formats.limits import check_inflation, check_memory
from phase5_training.pipeline.formats.objects import QUALITY_KEYS
from phase5_training.pipeline.formats.record_columns import INPUT_KEYS, TARGET_KEYS, choose_key, narrow
from phase5_training.pipeline.formats.source import CHUNK_ROWS, Access, ArraySource, ReadOptions, Source

KEPT_BLOCKS = 4  # row groups held decoded


def _pyarrow(path: Path, module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise UsageError(
            f"{path}: {path.suffix} files need the pyarrow package: pip install 'forge-training[arrow]'"
        ) from error


def open_parquet(path: Path, options: ReadOptions) -> Source:
    """A Parquet file as a source: loaded when it fits, else read by row groups.

    Raises:
        DataError: damage, a column of another kind, or a row group that does not fit in memory.
    """
    parquet = _pyarrow(path, "parquet")
    with _told(path):
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        chunks = [[group.column(i) for i in range(group.num_columns)] for group in groups]
    # Text that repeats stays a dictionary: decoded, one long text in a million rows is a million long texts.
    text = sorted({c.path_in_schema for own in chunks for c in own if c.physical_type == "BYTE_ARRAY"})
    sizes = [
        max(group.total_byte_size, sum(8 * chunk.num_values for chunk in own))
        for group, own in zip(groups, chunks, strict=True)
    ]
    check_memory(path, max(sizes, default=0), "a row group")
    # A column of equal values takes a few bytes, whatever their number.
    check_inflation(f"{path}: a row group", path.stat().st_size, max(sizes, default=0))

    def read(number: int) -> Any:
        # Each process opens the file for itself: a handle must not cross a fork.
        own = parquet.ParquetFile(path, read_dictionary=text)
        return own.read_row_group(number, use_threads=False)

    return _blocks(path, "parquet", [group.num_rows for group in groups], read, sum(sizes), options)


def open_arrow(path: Path, options: ReadOptions) -> Source:
    """An Arrow file (Feather version 2) by record batches, or an Arrow stream read forward.

    Raises:
        DataError: damage, or a column of another kind.
    """
    ipc = _pyarrow(path, "ipc")
    arrow = _pyarrow(path, "lib")
    with path.open("rb") as raw:
        is_file = raw.read(6) == MAGIC
    with _told(path):
        check_bodies(path, ipc, arrow, is_file=is_file)
    if not is_file:

        def walk() -> Iterator[Columns]:
            start = 0
            with _told(path), ipc.open_stream(str(path)) as stream:
                for batch in stream:
                    batch.validate(full=True)
                    yield from _cut(_columns(path, arrow.Table.from_batches([batch]), start))
                    start += batch.num_rows

        return open_forward(path, "arrow", walk, options)
    with _told(path), ipc.open_file(str(path)) as file:
        rows = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]

    def read(number: int) -> Any:
        with ipc.open_file(str(path)) as own:
            batch = own.get_batch(number)
        # Arrow maps what the file holds: offsets out of its lists would be read as they are.
        batch.validate(full=True)
        return arrow.Table.from_batches([batch])

    return _blocks(path, "arrow", rows, read, path.stat().st_size, options)


def open_csv(path: Path, options: ReadOptions) -> Source:
    """A table of comma-separated (.csv) or tab-separated (.tsv) values with a line of names.

    Raises:
        DataError: no columns that make records, or a value that does not fit its column.
    """
    csv, arrow = _pyarrow(path, "csv"), _pyarrow(path, "lib")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","

    def walk() -> Iterator[Columns]:
        start = 0
        with _told(path):
            found = csv.open_csv(
                str(path), parse_options=csv.ParseOptions(delimiter=delimiter),
                read_options=csv.ReadOptions(use_threads=False),
            )  # fmt: skip
            for batch in found:
                yield from _cut(_columns(path, arrow.Table.from_batches([batch]), start))
                start += batch.num_rows

    return open_forward(path, "csv", walk, options)


class _told:  # noqa: N801 - reads as a word in a with statement
    """Says what pyarrow found in one line that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, DataError) or not isinstance(error, (ValueError, OSError, TypeError, KeyError)):
            return  # pyarrow's own are among the latter
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{self._path}: cannot be read ({said[:200]})") from error


def _cut(columns: Columns) -> Iterator[Columns]:
    """In portions; the first of them names what could not be read."""
    for start in range(0, max(len(columns), 1), CHUNK_ROWS):
        part = columns.take(slice(start, start + CHUNK_ROWS))
        # Each portion names the unreadable ones between its own records.
        last = start + CHUNK_ROWS >= len(columns)
        low = -1 if start == 0 else int(part.index[0]) - 1
        high = int(part.index[-1]) if not last and len(part) else 1 << 62
        part.bad = {p: reason for p, reason in columns.bad.items() if low < p <= high}
        yield part


def _blocks(
    path: Path, format: str, rows: list[int], read: Callable[[int], Any], size: int, options: ReadOptions
) -> Source:
    if not sum(rows):
        raise DataError(f"{path}: holds no records; wanted at least one")
    source = TableBlocks(path, format, rows, read)
    if not options.loads(size):
        return source
    return ArraySource.from_columns(format, [str(path)], concat(list(source.iterate())))


class TableBlocks:
    """A table in blocks that are decoded as a whole: row groups, or record batches."""

    access: Access = "mapped"
    vocab_size: int | None = None

    def __init__(self, path: Path, format: str, rows: list[int], read: Callable[[int], Any]) -> None:
        self.path, self.paths, self.format = path, [str(path)], format
        self._starts = np.cumsum([0, *rows])
        self._read = read
        self._kept: dict[int, Columns] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _block(self, number: int) -> Columns:
        found = self._kept.pop(number, None)
        if found is None:
            with _told(self.path):
                found = _columns(self.path, self._read(number), int(self._starts[number]))
        self._kept[number] = found
        while len(self._kept) > KEPT_BLOCKS:
            del self._kept[next(iter(self._kept))]
        return found

    def gather(self, indices: np.ndarray) -> Columns:
        """See `Source.gather`."""
        return gather_parts(self._starts, indices, self._gather_of)

    def _gather_of(self, number: int, indices: np.ndarray) -> Columns:
        block = self._block(number)
        return block.take(np.searchsorted(block.index, indices))

    def blocks(self) -> np.ndarray:
        """See `Blocked`."""
        return np.unique(self._starts[:-1])

    def iterate(self) -> Iterator[Columns]:
        """See `Source.iterate`."""
        for number in range(len(self._starts) - 1):
            yield from _cut(self._block(number))

    def locate(self, index: int) -> tuple[str, int]:
        """See `Source.locate`."""
        return self.paths[0], index

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {
            "format": self.format, "access": "in place", "records": len(self),
            "blocks": len(self._starts) - 1,
        }  # fmt: skip


# -- a table as columns -------------------------------------------------------------------------------


def _columns(path: Path, table: Any, start: int) -> Columns:
    """The records of a table, the first of which has the position ``start``."""
    names = list(table.column_names)
    try:
        input_key, target_key = choose_key(names, INPUT_KEYS), choose_key(names, TARGET_KEYS)
        quality_key = choose_key(names, QUALITY_KEYS)
    except ValueError as error:
        raise DataError(f"{path}: the table {error}") from error
    bad: dict[int, str] = {}
    several = {n[8:]: n for n in names if n.startswith(("targets.", "targets/"))}
    target: Any = None
    if several:
        target = {n: _values(path, table, key, bad) for n, key in sorted(several.items())}
    elif target_key is not None:
        target = _values(path, table, target_key, bad)
    quality = None
    if quality_key is not None:
        quality = table.column(quality_key).cast("float64").to_numpy()
    if input_key is not None:
        inputs = _values(path, table, input_key, bad)
    else:
        taken = {target_key, quality_key, *several.values()}
        inputs = _features(path, table, [name for name in names if name not in taken], bad)
    index = np.arange(start, start + table.num_rows)
    if not bad:
        return Columns(index, inputs, target, quality)
    rows = np.setdiff1d(np.arange(table.num_rows), list(bad))
    return Columns(
        index[rows], take_values(inputs, rows), take_target(target, rows),
        None if quality is None else quality[rows], {start + row: reason for row, reason in bad.items()},
    )  # fmt: skip


def _features(path: Path, table: Any, names: list[str], bad: dict[int, str]) -> np.ndarray:
    columns = [_values(path, table, name, bad) for name in names]
    odd = [n for n, c in zip(names, columns, strict=True) if not isinstance(c, np.ndarray) or c.ndim != 1]
    if not names or odd:
        raise DataError(
            f"{path}: no column is named 'input', and {odd or names} are no numbers to take for features; "
            "name the input column 'input', or leave the others out"
        )
    return narrow(np.stack(columns, 1))  # type: ignore[arg-type]


def _values(path: Path, table: Any, name: str, bad: dict[int, str]) -> Values:
    """One column; rows with nothing in them are noted in ``bad`` and hold zeros."""
    import pyarrow as pa

    array = table.column(name).combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_dictionary(array.type):
        _check_repeats(path, name, array)
        array = array.dictionary_decode()
    kind = array.type
    missing = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)) if array.null_count else ()
    bad.update({int(row): f"has nothing as {name!r}" for row in missing})
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        filled = array.fill_null(False if pa.types.is_boolean(kind) else 0)
        return narrow(np.asarray(filled.to_numpy(zero_copy_only=False)))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return [value if value is not None else "" for value in array.to_pylist()]
    if _is_list(kind):
        return _lists(path, name, array, bad)
    raise DataError(f"{path}: column {name!r} holds {kind}; wanted numbers, text or lists of numbers")


def _check_repeats(path: Path, name: str, array: Any) -> None:
    """Refuse a column that is small only because its long texts are named by numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type.value_type
    if pa.types.is_primitive(kind):
        return
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
        raise DataError(f"{path}: column {name!r} holds a dictionary of {kind}; wanted numbers or text")
    lengths = pc.binary_length(array.dictionary).cast("int64")
    size = pc.sum(lengths.take(array.indices)).as_py() or 0
    check_inflation(f"{path}: column {name!r}", path.stat().st_size, size)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _lists(path: Path, name: str, array: Any, bad: dict[int, str]) -> Values:
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = np.asarray(pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    flat = array.flatten()
    owners = np.repeat(np.arange(len(array)), lengths)
    shape: tuple[int, ...] = ()
    while _is_list(flat.type):
        inner = np.unique(pc.list_value_length(flat).to_numpy(zero_copy_only=False))
        if len(inner) != 1 or flat.null_count:
            raise DataError(f"{path}: column {name!r} holds nested lists of different lengths")
        shape, flat = (*shape, int(inner[0])), flat.flatten()
    if not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type)):
        held = flat.type.value_type if pa.types.is_dictionary(flat.type) else flat.type
        raise DataError(f"{path}: column {name!r} holds lists of {held}; wanted lists of numbers")
    if flat.null_count:
        holes = np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False)) // max(int(np.prod(shape)), 1)
        bad.update({int(row): f"has nothing within {name!r}" for row in np.unique(owners[holes])})
        flat = flat.fill_null(0)
    numbers = narrow(np.asarray(flat.to_numpy(zero_copy_only=False))).reshape(-1, *shape)
    present = np.setdiff1d(np.arange(len(array)), [row for row in bad if lengths[row] == 0])
    if len(np.unique(lengths[present])) == 1:
        rows = np.zeros((len(array), int(lengths[present[0]]), *shape), numbers.dtype)
        rows[present] = numbers.reshape(len(present), *rows.shape[1:])
        return rows
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if shape or numbers.dtype.kind == "f":
        return [numbers[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return Ragged(numbers, offsets)
