"""Pickle, read by an unpickler that knows only containers, numbers, text, arrays and tensors.

A pickle is a program; the standard unpickler runs it. Ours may name nothing outside `_ALLOWED`, and
the callables there are wrapped so that they only rebuild data. .pt and .pth files go through
torch.load(weights_only=True), which has an allowlist of its own.
"""

from __future__ import annotations

import collections
import io
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from phase5_training.errors import DataError, first_line
from phase5_training.pipeline.formats.limits import check_memory
from phase5_training.pipeline.formats.objects import source_from_object
from phase5_training.pipeline.formats.pickle_opcodes import check_contents, check_opcodes
from phase5_training.pipeline.formats.source import ArraySource, ReadOptions


class ForbiddenGlobal(pickle.UnpicklingError):
    """The pickle asked for something that is not data."""


class _Callable:
    """What a pickle may call; a pickle may also set attributes of what it names, and here it cannot."""

    __slots__ = ("_make",)
    _make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ForbiddenGlobal(f"an attribute {name!r} of what it calls")

    def __setstate__(self, state: Any) -> None:
        raise ForbiddenGlobal("a state of what it calls")


class _Dtype:
    """A numpy dtype in the making.

    numpy believes the state that a pickle applies to a dtype: fields past the end of a row, or objects
    where there are bytes. So the state is applied to this, and numpy's own constructor checks it.
    """

    __slots__ = ("dtype",)

    def __init__(self, description: Any, align: bool = False, copy: bool = False) -> None:
        if not isinstance(description, str):
            raise ForbiddenGlobal("a dtype that is not named by a string")
        self.dtype = np.dtype(description)

    def __setstate__(self, state: tuple) -> None:
        _, order, part, names, fields, size = state[:6]
        if part is not None:
            self.dtype = np.dtype((_dtype_of(part[0]), part[1]))
        elif names is not None:
            kept = [fields[name] for name in names]
            self.dtype = np.dtype(
                {
                    "names": list(names),
                    "formats": [_dtype_of(field[0]) for field in kept],
                    "offsets": [field[1] for field in kept],
                    "itemsize": size,
                }
            )
        elif order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


def _dtype_of(made: Any) -> np.dtype:
    if not isinstance(made, _Dtype):
        raise ForbiddenGlobal("something else in the place of a dtype")
    return made.dtype


class _Array(np.ndarray):
    """An array whose pickled state is checked; numpy fills one in place, "an empty one, then its state"."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, made, fortran, content = state
        dtype = _dtype_of(made)
        needed = math.prod(shape) if dtype.hasobject else math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or len(content) != needed:
            raise ForbiddenGlobal(f"an array of shape {shape} over {len(content)} bytes or objects")
        super().__setstate__((1, shape, dtype, fortran, content))


_ARRAY_TYPE = object()  # stands for numpy.ndarray, which a pickle may name and not call


def _empty_array(subtype: Any, shape: tuple, dtype: bytes) -> np.ndarray:
    # Any other shape would allocate unchecked.
    if subtype is not _ARRAY_TYPE or tuple(shape) != (0,):
        raise ForbiddenGlobal("an array that is not rebuilt from empty")
    return _Array((0,), np.int8)


def _array_from_buffer(buffer: Any, made: Any, shape: tuple, order: str, *axes: Any) -> np.ndarray:
    dtype = _dtype_of(made)
    if dtype.hasobject:
        raise ForbiddenGlobal("an array of objects over raw memory")
    return np.frombuffer(buffer, dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(made: Any, raw: bytes = b"") -> np.generic:
    dtype = _dtype_of(made)
    if dtype.hasobject or len(raw) != dtype.itemsize:
        raise ForbiddenGlobal("a numpy scalar that is not plain bytes")
    return np.frombuffer(raw, dtype)[0]


def _encode_latin1(text: str, encoding: str) -> bytes:
    # Protocols 0 to 2 write bytes as text in latin-1.
    if encoding != "latin1":
        raise ForbiddenGlobal(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


def _bytes(*parts: bytes) -> bytes:
    if parts and not isinstance(parts[0], bytes):
        raise ForbiddenGlobal("bytes made from something else than bytes")
    return bytes(*parts)


def _bytearray(*parts: bytes) -> bytearray:
    if parts and not isinstance(parts[0], bytes):
        raise ForbiddenGlobal("bytearray made from something else than bytes")
    return bytearray(*parts)


def _storage(raw: bytes) -> Any:
    if raw[:2] == b"PK":
        _check_archive(io.BytesIO(raw), len(raw))
    return torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *rest: Any) -> torch.Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ForbiddenGlobal("a tensor over something that is not a storage")
    # Torch would enlarge a storage that is too small, by as much as the file asks for.
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or (0 not in size and last >= storage._size()):
        raise ForbiddenGlobal("a tensor larger than its storage")
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, None)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytes"): _Callable(_bytes),
    ("builtins", "bytearray"): _Callable(_bytearray),
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "deque"): collections.deque,
    ("_codecs", "encode"): _Callable(_encode_latin1),
    ("numpy", "ndarray"): _ARRAY_TYPE,
    ("numpy", "dtype"): _Callable(_Dtype),
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(_tensor),
    ("torch.storage", "_load_from_bytes"): _Callable(_storage),
}
for _package in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2 spellings
    _ALLOWED[f"{_package}.multiarray", "_reconstruct"] = _Callable(_empty_array)
    _ALLOWED[f"{_package}.multiarray", "scalar"] = _Callable(_scalar)
    _ALLOWED[f"{_package}.numeric", "_frombuffer"] = _Callable(_array_from_buffer)


class DataUnpickler(pickle.Unpickler):
    """An unpickler that builds data and nothing else.

    Example:
        >>> DataUnpickler(io.BytesIO(pickle.dumps([1, "a"]))).load()
        [1, 'a']
    """

    def find_class(self, module: str, name: str) -> Any:
        """The allowed callable of that name; `ForbiddenGlobal` for every other."""
        # Protocol 2 calls the builtins module by its Python 2 name.
        module = "builtins" if module == "__builtin__" else module
        if (module, name) not in _ALLOWED:
            raise ForbiddenGlobal(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Never: it would reach outside the file."""
        raise ForbiddenGlobal("a persistent reference")


def open_pickle(path: Path, options: ReadOptions) -> ArraySource:
    """A pickle or a torch file holding records, or inputs and targets, as a source in memory.

    Raises:
        DataError: anything but plain data in it (the message names it), a damaged file, or a file
            too large to hold while streaming is asked for.
    """
    size = path.stat().st_size
    if not size:
        raise DataError(f"{path}: the file is empty; wanted a pickled list of records")
    if options.streaming and size > options.memory_limit:
        raise DataError(
            f"{path}: a pickle of {size / 1e6:.0f} MB cannot be streamed, it loads as a whole; "
            "write it as .jsonl, .npy or .h5"
        )
    check_memory(path, size, "loading the pickle")
    try:
        data = _load(path)
        check_contents(data, size)
    except ForbiddenGlobal as error:
        raise DataError(_not_data(path, str(error))) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        refused = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if refused:
            raise DataError(_not_data(path, refused.group(1))) from error
        refused = re.search(r"(?:Unsupported|Can only|GLOBAL)[^\n]*", str(error))
        first = refused.group() if refused else first_line(error)
        raise DataError(f"{path}: cannot be read as a pickle of plain data: {first}") from error
    if isinstance(data, (torch.Tensor, np.ndarray)):
        data = {"inputs": data}
    elif isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        data = {"inputs": data[0], "targets": data[1]}
    return source_from_object(data, "pickle", str(path))


def _not_data(path: Path, name: str) -> str:
    return (
        f"{path}: the pickle asks for {name}, which is not data; Forge loads containers, numbers, text, "
        "numpy arrays and torch tensors only: save those"
    )


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            _check_archive(file, path.stat().st_size)
        elif path.suffix.lower() not in (".pt", ".pth"):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                check_opcodes(content)
            file.seek(0)
            return DataUnpickler(file).load()
        file.seek(0)
        return torch.load(file, weights_only=True, map_location="cpu")


def _check_archive(file: IO[bytes], size: int) -> None:
    """Refuse an archive that inflates: torch stores its tensors as they are."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        stored = {
            m.filename: m for m in members if m.compress_type == zipfile.ZIP_STORED and m.file_size <= size
        }
        for name in stored:
            if name.endswith("/data.pkl"):
                check_opcodes(archive.read(name))
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("a compressed archive; torch.save writes none")
    if sum(member.file_size for member in members) > size:
        raise ValueError(f"an archive of {size} bytes that declares more content than it has")
