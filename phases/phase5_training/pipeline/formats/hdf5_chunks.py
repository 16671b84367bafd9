"""Whether the chunks of an HDF5 data set can be decompressed in bounded memory, and what damage is called.

The library inflates a chunk until it ends, whatever size the data set declares for it.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from phase5_training.errors import DataError, first_line

# Filters inside the HDF5 library itself; any other is code from a plug-in folder.
FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
_GZIP, _LZF = 1, 32000
MAX_CHUNK = 256 << 20  # bytes
# A byte of deflate stands for 1032 at most, one of LZF for 88: smaller chunks need no look.
_TRUSTED = {_GZIP: MAX_CHUNK // 1032, _LZF: MAX_CHUNK // 88}
_STEP = 1 << 20


@contextlib.contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Says in one line what the library finds wrong in a file; it reports damage by errors of many types."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path}: the HDF5 file is damaged ({first_line(error)})") from error


def check_filters(where: str, data: h5py.Dataset) -> None:
    """Refuse filters that are plug-ins, and a filter applied twice.

    Raises:
        DataError: naming the filter.
    """
    numbers = _filters(data)
    for number in numbers:
        if number not in FILTERS:
            raise DataError(
                f"{where} is compressed by plug-in filter {number}; "
                f"write it with {', '.join(sorted(FILTERS.values()))} or none"
            )
    packers = [FILTERS[number] for number in numbers if FILTERS[number] in ("gzip", "szip", "lzf")]
    if len(packers) > 1 or len(set(numbers)) < len(numbers):
        names = ", ".join(FILTERS[number] for number in numbers)
        raise DataError(f"{where} is compressed twice ({names}); write it with one compression")


def check_chunks(where: str, data: h5py.Dataset) -> None:
    """Refuse chunks too large to hold, and those whose stored bytes inflate beyond their size.

    Raises:
        DataError: naming the size, or the place of the chunk.
    """
    if not data.chunks:
        return
    size = data.dtype.itemsize
    for n in data.chunks:
        size *= n
    if size > MAX_CHUNK:
        raise DataError(
            f"{where} has chunks of {size >> 20} MB; write it with chunks of {MAX_CHUNK >> 20} MB or less"
        )
    packer = next((number for number in _filters(data) if number in _TRUSTED), None)
    if packer is None:
        return
    large: list[Any] = []

    def look(chunk: Any) -> None:
        if chunk.size > _TRUSTED[packer]:
            large.append(chunk)

    data.id.chunk_iter(look)
    for chunk in large:
        if packer == _LZF:
            raise DataError(
                f"{where} has an LZF chunk of {chunk.size >> 20} MB; write it with smaller chunks"
            )
        if not chunk.filter_mask and _inflated(data.id.read_direct_chunk(chunk.chunk_offset)[1], size) > size:
            raise DataError(
                f"{where} has a chunk at {chunk.chunk_offset} that inflates beyond its {size} bytes; "
                "the file is damaged, or made to harm"
            )


def _filters(data: h5py.Dataset) -> list[int]:
    properties = data.id.get_create_plist()
    return [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]


def _inflated(stored: bytes, limit: int) -> int:
    """Bytes that deflated data become, counted until they pass ``limit``."""
    inflate, rest, total = zlib.decompressobj(), stored, 0
    try:
        while rest and not inflate.eof and total <= limit:
            total += len(inflate.decompress(rest, _STEP))
            rest = inflate.unconsumed_tail
    except zlib.error:
        pass  # the library will say so when it reads the chunk
    return total
