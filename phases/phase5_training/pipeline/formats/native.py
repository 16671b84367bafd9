"""The C++ reader of plain records and of ragged rows, compiled at first use; see `reader`."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

logger = logging.getLogger("forge")

SOURCES = tuple(Path(__file__).with_name(name) for name in ("plain_records.cpp", "ragged_rows.cpp"))
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")
MAX_DIMENSIONS = 4


class Column(ctypes.Structure):
    """A column to be filled; as in plain_records.cpp."""

    _fields_ = (
        ("key", ctypes.c_char_p),
        ("key_length", ctypes.c_int64),
        ("dimensions", ctypes.c_int64),
        ("shape", ctypes.c_int64 * MAX_DIMENSIONS),
        ("integers", ctypes.c_void_p),
        ("floats", ctypes.c_void_p),
        ("text", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("saw_float", ctypes.c_int64),
    )


class Quality(ctypes.Structure):
    """Where qualities go, and whether there was one; as in plain_records.cpp."""

    _fields_ = (("values", ctypes.c_void_p), ("seen", ctypes.c_int64))


def cache_folder() -> Path:
    """Where this user's compiled code and indexes of read-only folders are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forge-training"


@cache
def reader() -> ctypes.CDLL | None:
    """The compiled functions; None where ``FORGE_NATIVE=0``, or no compiler is found or works.

    The first call on a machine compiles for a second or two. The same records come out without it; large
    JSON files then take several times as long to open.
    """
    if os.environ.get("FORGE_NATIVE") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        logger.info("large JSON files are read without the native reader: no C++ compiler; install g++")
        return None
    path = _library(compiler)
    try:
        if not path.exists():
            _build(compiler, path)
            ready.cache_clear()
        found = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        logger.info("large JSON files are read without the native reader: %s", said.strip().splitlines()[0])
        return None
    for name in ("forge_read_records", "forge_find_records", "forge_read_runs"):
        getattr(found, name).restype = ctypes.c_int64
    for name in ("forge_check_records", "forge_take_rows", "forge_pad_rows"):
        getattr(found, name).restype = None
    return found


@cache
def ready() -> ctypes.CDLL | None:
    """`reader` where nothing has to be compiled for it: nobody waits for a compiler to copy a few rows."""
    compiler = _compiler()
    return reader() if compiler is not None and _library(compiler).exists() else None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _library(compiler: str) -> Path:
    digest = hashlib.sha256(" ".join((*FLAGS, platform.machine(), compiler)).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    return cache_folder() / f"records-{digest.hexdigest()[:20]}.so"


def read_runs(descriptor: int, firsts: np.ndarray, sizes: np.ndarray) -> bytes | None:
    """Stretches of a file, one after the other; None where it ends before one of them does.

    Args:
        descriptor: of the open file.
        firsts: (n,) int64, where they begin.
        sizes: (n,) int64, their bytes.
    """
    total, fast = int(sizes.sum()), reader()
    if fast is None:
        spans = zip(firsts.tolist(), sizes.tolist(), strict=True)
        joined = b"".join([os.pread(descriptor, size, first) for first, size in spans])
        return joined if len(joined) == total else None
    text = np.empty(total, np.uint8)
    count = fast.forge_read_runs(
        ctypes.c_int(descriptor), address(firsts), address(sizes), ctypes.c_int64(len(sizes)), address(text)
    )
    return text.tobytes() if count == len(sizes) else None


def address(array: np.ndarray) -> ctypes.c_void_p:
    """Of the first element of an array that lies in one piece."""
    return ctypes.c_void_p(array.ctypes.data)


def _build(compiler: str, path: Path) -> None:
    """Compile into a temporary file and rename it, so that processes that start together do not clash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *FLAGS, *map(str, SOURCES), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(built, path)
