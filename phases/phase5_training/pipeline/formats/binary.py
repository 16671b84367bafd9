"""Binary arrays: .npy, .npz, .safetensors, and token .bin files with a JSON sidecar.

Declared shapes are compared with what the file holds before anything is allocated.
"""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import safetensors

from phase5_training.errors import DataError, first_line
from phase5_training.pipeline.formats.limits import (
    check_companion,
    check_inflation,
    check_memory,
    check_width,
)
from phase5_training.pipeline.formats.objects import QUALITY_KEYS, source_from_arrays
from phase5_training.pipeline.formats.record_columns import INPUT_KEYS, TARGET_KEYS, choose_key
from phase5_training.pipeline.formats.source import ArraySource, ReadOptions
from phase5_training.pipeline.formats.text import TokenBlocks

_MAX_SIDECAR = 1 << 16  # bytes
_TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32")
_SAFETENSORS_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "BF16": "<u2",
}  # fmt: skip


def _npy_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        reader = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = reader(file)
    except KeyError as error:
        raise DataError(f"{name}: .npy version {error} is unknown; save it again with numpy.save") from error
    except Exception as error:  # the header is parsed as Python, which fails in many ways
        raise DataError(f"{name}: not a .npy file ({first_line(error)})") from error
    if dtype.hasobject:
        raise DataError(f"{name}: holds Python objects, not numbers; save an array of numbers or text")
    if any(type(n) is not int or n < 0 for n in shape):
        raise DataError(f"{name}: declares the impossible shape {shape}")
    check_width(name, shape, dtype)
    return shape, fortran, dtype


def _check_size(name: str, shape: tuple[int, ...], dtype: np.dtype, held: int) -> None:
    needed = math.prod(shape) * dtype.itemsize
    if needed != held:
        raise DataError(
            f"{name}: declares shape {shape} of {dtype}, {needed} bytes, and holds {held}; "
            "the file is cut short or damaged"
        )


def _open_npy(path: Path, options: ReadOptions) -> np.ndarray:
    """A .npy file mapped, or loaded when it fits."""
    with path.open("rb") as file:
        shape, fortran, dtype = _npy_header(file, str(path))
        start = file.tell()
    _check_size(str(path), shape, dtype, path.stat().st_size - start)
    if not math.prod(shape):
        return np.empty(shape, dtype)
    array = np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
    return np.array(array) if options.loads(array.nbytes) else array


def open_npy(path: Path, options: ReadOptions) -> ArraySource:
    """A .npy array; targets in ``<stem>_targets.npy`` and quality in ``<stem>_quality.npy`` beside it.

    A structured array with fields ``input`` and ``target`` holds all columns itself.

    Raises:
        DataError: a damaged header, a size that does not match it, rows that do not match.
    """
    array = _open_npy(path, options)
    if array.ndim == 0:
        raise DataError(f"{path}: holds a single number; wanted one row per record")
    if array.dtype.names:
        arrays: dict[str, np.ndarray] = {name: array[name] for name in array.dtype.names}
    else:
        arrays = {"inputs": array}
        for name in ("targets", "quality"):
            beside = path.with_name(f"{path.stem}_{name}.npy")
            if beside.is_file():
                check_companion(path, beside)
                arrays[name] = _open_npy(beside, options)
    access = "memory" if options.loads(array.nbytes) else "mapped"
    return source_from_arrays(arrays, "npy", str(path), access=access)  # type: ignore[arg-type]


def open_npz(path: Path, options: ReadOptions) -> ArraySource:
    """A .npz archive with ``inputs``, and perhaps ``targets`` and ``quality``; loaded as a whole.

    Raises:
        DataError: not an archive, a member that lies about its size, or too large to hold while
            streaming is asked for.
    """
    with path.open("rb") as file:
        # zipfile also takes an archive with something else before it, which numpy does not.
        if file.read(2) != b"PK":
            raise DataError(f"{path}: not a readable .npz archive (it does not begin as one)")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            size = sum(info.file_size for info in archive.infolist())
            _check_members(path, archive.infolist(), size)
            if options.streaming and size > options.memory_limit:
                raise DataError(
                    f"{path}: {size / 1e6:.0f} MB of .npz cannot be streamed, it loads as a whole; "
                    "write them as .npy or .h5"
                )
            check_memory(path, size, "loading the archive")
            arrays, keys = {}, _keys(members)
            for name, info in members.items():
                if not _wanted(name, keys):
                    continue
                with archive.open(info) as file:
                    shape, fortran, dtype = _npy_header(file, f"{path} [{name}]")
                    _check_size(f"{path} [{name}]", shape, dtype, info.file_size - file.tell())
                    flat = np.frombuffer(file.read(), dtype)
                arrays[name] = flat.reshape(shape, order="F" if fortran else "C")
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npz archive ({error})") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable .npz archive ({error})") from error
    return source_from_arrays(arrays or dict.fromkeys(members), "npz", str(path))


def _check_members(path: Path, members: list[zipfile.ZipInfo], size: int) -> None:
    names: set[str] = set()
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{path} [{member.filename}]: method {member.compress_type} is not numpy's; "
                            "save it again with numpy.savez")  # fmt: skip
        if member.filename in names:
            raise DataError(f"{path}: holds {member.filename!r} twice; save it again with numpy.savez")
        names.add(member.filename)
    check_inflation(str(path), path.stat().st_size, size)


def _keys(names: Any) -> list[str | None] | None:
    """The names that are columns by themselves; None where two are one column, which is told later."""
    try:
        return [choose_key(list(names), known) for known in (INPUT_KEYS, TARGET_KEYS, QUALITY_KEYS)]
    except ValueError:
        return None


def _wanted(name: str, keys: list[str | None] | None) -> bool:
    return keys is None or name in keys or name.startswith(("targets.", "targets/"))


def open_safetensors(path: Path, options: ReadOptions) -> ArraySource:
    """A .safetensors file with the tensors ``inputs``, and perhaps ``targets`` and ``quality``.

    Raises:
        DataError: a header the safetensors library rejects, or a missing tensor.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # SafetensorError, OSError and what numpy may add
        raise DataError(f"{path}: not a readable .safetensors file ({first_line(error)})") from error
    # The library has checked that the spans lie inside the file, in order and without gaps.
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        try:
            header = json.loads(raw.read(length), object_pairs_hook=_once_each)
        except ValueError as error:
            raise DataError(f"{path}: not a readable .safetensors file ({error})") from error
    header.pop("__metadata__", None)
    arrays = {}
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    keys = _keys(header)
    for name, entry in header.items():
        if not _wanted(name, keys):
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise DataError(f"{path} [{name}]: dtype {entry['dtype']} is unsupported; save float32 or int64")
        dtype, shape = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        check_width(f"{path} [{name}]", shape, dtype)
        first, last = entry["data_offsets"]
        _check_size(f"{path} [{name}]", shape, dtype, last - first)
        if first == last:
            array = np.empty(shape, dtype)
        else:
            array = np.memmap(path, dtype, "r", 8 + length + first, shape)
        if entry["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        arrays[name] = np.array(array) if options.loads(total) else array
    return source_from_arrays(
        arrays or dict.fromkeys(header),
        "safetensors",
        str(path),
        access="memory" if options.loads(total) else "mapped",
        details={"metadata": metadata} if metadata else None,
    )


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} occurs twice in its header")
    return found


def open_tokens(paths: list[Path], options: ReadOptions) -> TokenBlocks:
    """Token files (.bin), each with a sidecar, as one stream cut into blocks for next-token training.

    The sidecar is ``<name>.bin.json`` or ``<stem>.json``:
    ``{"dtype": "uint8|uint16|uint32|int32", "vocab_size": N}``.

    Raises:
        DataError: no sidecar, one that says something else, or a size that is no whole number of tokens.
    """
    streams, sizes = [], set()
    for path in paths:
        dtype, vocab_size = _sidecar(path)
        size = path.stat().st_size
        if not size:
            raise DataError(f"{path}: the file is empty; wanted {dtype} tokens")
        if size % dtype.itemsize:
            raise DataError(f"{path}: {size} bytes are no whole number of {dtype} tokens; check its sidecar")
        streams.append(np.memmap(path, dtype, "r"))
        sizes.add(vocab_size)
    if len(sizes) > 1:
        raise DataError(f"{paths[0]}: the token files state different vocabulary sizes {sorted(sizes)}")
    return TokenBlocks(
        "bin", [str(path) for path in paths], streams,
        block_length=options.block_length, vocab_size=sizes.pop(), details={"files": len(paths)},
    )  # fmt: skip


def _sidecar(path: Path) -> tuple[np.dtype, int]:
    example = '{"dtype": "uint16", "vocab_size": 50257}'
    for beside in (path.with_name(path.name + ".json"), path.with_suffix(".json")):
        if beside.is_file():
            break
    else:
        raise DataError(f"{path}: has no sidecar {path.name}.json; write one beside it, such as {example}")
    check_companion(path, beside)
    if beside.stat().st_size > _MAX_SIDECAR:
        raise DataError(f"{beside}: {beside.stat().st_size} bytes are no sidecar; wanted {example}")
    try:
        stated = orjson.loads(beside.read_bytes())
    except orjson.JSONDecodeError as error:
        reason = error.msg.split(":")[0]
        raise DataError(f"{beside} line {error.lineno}: not valid JSON ({reason})") from error
    if not isinstance(stated, dict):
        raise DataError(f"{beside}: wanted an object such as {example}")
    if stated.get("dtype") not in _TOKEN_DTYPES:
        raise DataError(f"{beside}: dtype is {stated.get('dtype')!r}; wanted {'|'.join(_TOKEN_DTYPES)}")
    vocab_size = stated.get("vocab_size")
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= 2**32:
        raise DataError(f"{beside}: vocab_size is {vocab_size!r}; wanted a whole number from 1 to 2^32")
    return np.dtype(stated["dtype"]).newbyteorder("<"), vocab_size
