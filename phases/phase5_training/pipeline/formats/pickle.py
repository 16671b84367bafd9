"""Pickle, read by an unpickler that knows only containers, numbers, text, arrays and tensors.

A pickle is a program; the standard unpickler runs it. Ours may name nothing outside `_ALLOWED`, and
the callables there are wrapped so that they only rebuild data. .pt and .pth files go through
torch.load(weights_only=True), which has an allowlist of its own.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.objects import source_from_object
from phase5_training.pipeline.formats.source import ArraySource, ReadOptions, check_memory


class ForbiddenGlobal(pickle.UnpicklingError):
    """The pickle asked for something that is not data."""


def _empty_array(subtype: type, shape: tuple, dtype: bytes) -> np.ndarray:
    # numpy pickles an array as "an empty one, then its state"; any other shape would allocate unchecked.
    if subtype is not np.ndarray or tuple(shape) != (0,):
        raise ForbiddenGlobal("an array that is not rebuilt from empty")
    return np.ndarray((0,), np.int8)


def _array_from_buffer(buffer: Any, dtype: np.dtype, shape: tuple, order: str, *axes: Any) -> np.ndarray:
    if dtype.hasobject:
        raise ForbiddenGlobal("an array of objects over raw memory")
    return np.frombuffer(buffer, dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: np.dtype, raw: bytes = b"") -> np.generic:
    if not isinstance(dtype, np.dtype) or dtype.hasobject or len(raw) != dtype.itemsize:
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


def _dtype(description: Any, align: bool = False, copy: bool = False) -> np.dtype:
    if not isinstance(description, str):
        raise ForbiddenGlobal("a dtype that is not named by a string")
    # A copy: the pickled state is applied to it, and the plain np.dtype is shared by all of numpy.
    return np.dtype(description, False, True)


def _storage(raw: bytes) -> Any:
    return torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *rest: Any) -> torch.Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ForbiddenGlobal("a tensor over something that is not a storage")
    # Torch would enlarge a storage that is too small, by as much as the file asks for.
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or (0 not in size and last >= storage._size()):
        raise ForbiddenGlobal("a tensor larger than its storage")
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, None)


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytearray,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "deque"): collections.deque,
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}
for _package in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2 spellings
    _ALLOWED[f"{_package}.multiarray", "_reconstruct"] = _empty_array
    _ALLOWED[f"{_package}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_package}.numeric", "_frombuffer"] = _array_from_buffer


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
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
        file.seek(0)
        try:
            if is_zip or path.suffix in (".pt", ".pth"):
                data = torch.load(file, weights_only=True, map_location="cpu")
            else:
                data = DataUnpickler(file).load()
        except ForbiddenGlobal as error:
            raise DataError(
                f"{path}: the pickle asks for {error}, which is not data; Forge loads containers, numbers, "
                "text, numpy arrays and torch tensors only: save those"
            ) from error
        except Exception as error:  # a damaged pickle can raise nearly anything
            refused = re.search(r"(?:Unsupported|Can only|GLOBAL)[^\n]*", str(error))
            first = refused.group() if refused else str(error).strip().split("\n")[0] or type(error).__name__
            raise DataError(f"{path}: cannot be read as a pickle of plain data: {first}") from error
    if isinstance(data, (torch.Tensor, np.ndarray)):
        data = {"inputs": data}
    elif isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        data = {"inputs": data[0], "targets": data[1]}
    return source_from_object(data, "pickle", str(path))
