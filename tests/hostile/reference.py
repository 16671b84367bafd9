"""Slow, plain readers of every format, from the formats' own libraries: what a file says, record by record.

A record is (input, target): numbers as numpy arrays, text as text. None stands for one that no strict
reader would take.
"""

import csv
import gzip
import io
import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import safetensors.numpy
import torch
import zstandard
from pyarrow import parquet

BLOCK = 16  # tokens of a block; each holds one more
Records = list[tuple[Any, Any] | None]
INPUTS, TARGETS = (
    ("input", "inputs", "text", "x", "X", "input_ids"),
    ("target", "targets", "label", "labels", "y", "Y"),
)


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def strict(text: bytes) -> Any:
    return json.loads(text.decode("utf-8"), object_pairs_hook=once_each, parse_constant=no_constant)


def as_record(value: Any) -> tuple[Any, Any] | None:
    if not isinstance(value, Mapping):
        return None
    found = [[value[name] for name in names if name in value] for names in (INPUTS, TARGETS)]
    return (found[0][0], found[1][0] if found[1] else None) if len(found[0]) == 1 else None


def parts_of_list(text: str) -> list[str]:
    """The records of a JSON list in a damaged text, sign by sign; the last may be cut off."""
    start = text.index("[")
    assert text[:start].strip(" \t\r\n") == "" or re.fullmatch(r'\s*{\s*"samples"\s*:\s*', text[:start])
    parts, depth, quoted, escaped, begin = [], 0, False, False, start + 1
    for at in range(start + 1, len(text)):
        sign = text[at]
        if quoted:
            quoted, escaped = escaped or sign != '"', not escaped and sign == "\\"
        elif sign == '"':
            quoted = True
        elif sign in "[{":
            begin, depth = (at if depth == 0 else begin), depth + 1
        elif sign in "]}":
            depth -= 1
            if depth < 0:
                return parts
            if depth == 0:
                parts.append(text[begin : at + 1])
    return [*parts, text[begin:] if depth else ""]


def as_record_of(part: str) -> tuple[Any, Any] | None:
    try:
        return as_record(strict(part.encode("latin-1")))
    except (ValueError, RecursionError):
        return None


def read_json(path: Path) -> Records:
    return records_of_json(path.read_bytes())


def read_packed_json(path: Path) -> Records:
    return records_of_json(gzip.decompress(path.read_bytes()))


def records_of_json(text: bytes) -> Records:
    try:
        value = strict(text)
    except (ValueError, RecursionError):
        return [as_record_of(part) for part in parts_of_list(text.decode("latin-1"))]
    if isinstance(value, Mapping):
        if "samples" not in value:
            return columns(value)
        value = value["samples"]
    return [as_record(record) for record in value]


def read_json_lines(path: Path) -> Records:
    return records_of_lines(path.read_bytes())


def read_gzip(path: Path) -> Records:
    return records_of_lines(gzip.decompress(path.read_bytes()))


def read_zstd(path: Path) -> Records:
    with path.open("rb") as file:
        text = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    return records_of_lines(text)


def read_csv(path: Path) -> Records:
    rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8"), newline="")))
    names, rows = rows[0], [row for row in rows[1:] if row]
    label = next((names.index(name) for name in TARGETS if name in names), None)
    plain = next((names.index(name) for name in INPUTS if name in names), None)
    taken = [plain] if plain is not None else [i for i in range(len(names)) if i != label]
    labels = [None if label is None or label >= len(row) else row[label] for row in rows]
    numbers = all(is_number(text) for text in labels if text)  # else they are names of classes
    found: Records = []
    for row, target in zip(rows, labels, strict=True):
        if target == "" or not all(i < len(row) and is_number(row[i]) for i in taken):
            found.append(None)
            continue
        values = np.array([float(row[i]) for i in taken])
        named = target if target is None or not numbers else float(target)
        found.append((values[0] if plain is not None else values, named))
    return found


def is_number(text: str | None) -> bool:
    try:
        float(text or "none")
    except ValueError:
        return False
    return True


def read_table(made: Any) -> Records:
    return [as_record(row) for row in made.to_pylist()]


def read_parquet(path: Path) -> Records:
    return read_table(parquet.ParquetFile(path).read())


def read_arrow(path: Path) -> Records:
    if path.read_bytes()[:6] != b"ARROW1":
        with pa.ipc.open_stream(str(path)) as stream:
            return read_table(stream.read_all())
    with pa.ipc.open_file(str(path)) as file:
        return read_table(file.read_all())


def records_of_lines(text: bytes) -> Records:
    records: Records = []
    for line in text.split(b"\n"):
        if not line.strip() and len(line) < 16:
            continue  # longer ones are no blank lines but records that cannot be read
        try:
            records.append(as_record(strict(line)))
        except (ValueError, RecursionError):
            records.append(None)
    return records


def columns(arrays: Mapping[str, Any]) -> Records:
    inputs = next(arrays[name] for name in INPUTS if name in arrays)
    targets = next((arrays[name] for name in TARGETS if name in arrays), None)
    return [(x, None if targets is None else targets[i]) for i, x in enumerate(inputs)]


def read_npy(path: Path) -> Records:
    array = np.load(path, allow_pickle=False)
    if array.dtype.names:
        return columns({name: array[name] for name in array.dtype.names})
    beside = path.with_name(path.stem + "_targets.npy")
    return columns({"inputs": array, "targets": np.load(beside, allow_pickle=False)})


def read_npz(path: Path) -> Records:
    with np.load(path, allow_pickle=False) as archive:
        return columns({name: archive[name] for name in archive.files})


def read_safetensors(path: Path) -> Records:
    return columns(safetensors.numpy.load_file(path))


def read_hdf5(path: Path) -> Records:
    with h5py.File(path, "r") as file:
        group = file.get("dataset", file)
        return columns({name: group[name][:] for name in group if name in (*INPUTS, *TARGETS)})


class Plain(pickle.Unpickler):
    """The standard unpickler, limited to numpy's own functions."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in {
            ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.numeric", "_frombuffer"),
            ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy._core.multiarray", "scalar"),
            ("_codecs", "encode"),
        }:  # fmt: skip
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def of_object(value: Any) -> Records:
    if isinstance(value, Mapping) and "samples" not in value:
        return columns(value)
    return [as_record(record) for record in (value["samples"] if isinstance(value, Mapping) else value)]


def read_pickle(path: Path) -> Records:
    return of_object(Plain(io.BytesIO(path.read_bytes())).load())


def read_torch(path: Path) -> Records:
    return of_object(torch.load(path, weights_only=True))


def blocks(stream: np.ndarray) -> Records:
    count = (len(stream) - 1) // BLOCK
    rows = [stream[i * BLOCK : i * BLOCK + BLOCK + 1].astype(np.int64) for i in range(count)]
    return [(row[:-1], row[1:]) for row in rows]


def read_tokens(path: Path) -> Records:
    sidecar = json.loads(path.with_name(path.name + ".json").read_bytes())
    return blocks(np.fromfile(path, np.dtype(sidecar["dtype"]).newbyteorder("<")))


def read_text(path: Path) -> Records:
    return blocks(np.frombuffer(path.read_bytes(), np.uint8))


READERS: dict[str, Callable[[Path], Records]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".npy": read_npy,
    ".npz": read_npz,
    ".safetensors": read_safetensors,
    ".h5": read_hdf5,
    ".pkl": read_pickle,
    ".pt": read_torch,
    ".bin": read_tokens,
    ".txt": read_text,
    ".json.gz": read_packed_json,
    ".jsonl.gz": read_gzip,
    ".jsonl.zst": read_zstd,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
