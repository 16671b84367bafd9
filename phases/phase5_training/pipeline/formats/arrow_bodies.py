"""How much the compressed batches of an Arrow file become, before any of them is unpacked.

pyarrow allocates what a buffer declares. Where the buffers are is said in the metadata of a message, a
flatbuffer (https://arrow.apache.org/docs/format/Columnar.html, Message.fbs and File.fbs); of those few fields
are needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.limits import check_inflation

MAGIC = b"ARROW1"
VALUE_BYTES = 8  # that a value takes once it is read; the least it takes in a buffer is one bit
_DICTIONARY, _RECORDS = 2, 3  # kinds of messages that have a body


def check_bodies(path: Path, ipc: Any, lib: Any, *, is_file: bool) -> None:
    """Refuse batches whose buffers are far larger than the file that declares them.

    Args:
        path: an Arrow file, or a stream.
        ipc: pyarrow.ipc. lib: pyarrow.lib.
        is_file: whether the footer says where the batches are; else they follow each other.

    Raises:
        DataError: names what the batch would become.
    """
    size = path.stat().st_size
    try:
        with lib.memory_map(str(path)) as mapped:
            for message in _messages(mapped, ipc, size) if is_file else ipc.MessageReader.open_stream(mapped):
                unpacked, values = _unpacked(bytes(message.metadata), message.body)
                check_inflation(f"{path}: a record batch", size, unpacked)
                # Columns of nothing, and lists of no elements, have any number of rows and no buffers.
                check_inflation(f"{path}: a record batch", unpacked, VALUE_BYTES * values)
    except (struct.error, EOFError) as error:
        raise DataError(f"{path}: cannot be read (its metadata are damaged)") from error


def _messages(mapped: Any, ipc: Any, size: int) -> Iterator[Any]:
    """The messages that the footer of a file names."""
    mapped.seek(size - len(MAGIC) - 4)
    (length,) = struct.unpack("<i", mapped.read(4))
    if not 0 < length <= size:
        raise struct.error("no footer")
    mapped.seek(size - len(MAGIC) - 4 - length)
    footer = mapped.read(length)
    root = _root(footer)
    for field in (2, 3):  # dictionaries and record batches: blocks of 24 bytes
        for at in _vector(footer, root, field, 24):
            mapped.seek(struct.unpack_from("<q", footer, at)[0])
            yield ipc.read_message(mapped)


def _unpacked(metadata: bytes, body: Any) -> tuple[int, int]:
    """Bytes of the buffers of a message once they are unpacked, and the values of its columns."""
    root = _root(metadata)
    kind = _field(metadata, root, 1)
    kind = metadata[kind] if kind else 0
    if kind not in (_DICTIONARY, _RECORDS) or body is None:
        return 0, 0
    batch = _follow(metadata, _field(metadata, root, 2))
    if kind == _DICTIONARY:
        batch = _follow(metadata, _field(metadata, batch, 1))
    # A column, and the elements of each list, is a node that begins with its length.
    values = sum(struct.unpack_from("<q", metadata, at)[0] for at in _vector(metadata, batch, 1, 16))
    if not _field(metadata, batch, 3):  # no compression
        return len(body), values
    total = 0
    for at in _vector(metadata, batch, 2, 16):
        offset, length = struct.unpack_from("<qq", metadata, at)
        # A compressed buffer begins with the size it unpacks to; -1 says that it is stored as it is.
        total += max(struct.unpack_from("<q", body, offset)[0], length) if length else 0
    return total, values


# -- flatbuffers: a table points back to its vtable, which says where its fields are ------------------------


def _root(raw: bytes) -> int:
    return _follow(raw, 0)


def _follow(raw: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", raw, at)[0])


def _field(raw: bytes, table: int, number: int) -> int:
    """Where a field of a table is; 0 where it is left out."""
    vtable = table - struct.unpack_from("<i", raw, table)[0]
    size, at = struct.unpack_from("<H", raw, vtable)[0], 4 + 2 * number
    offset = struct.unpack_from("<H", raw, vtable + at)[0] if at < size else 0
    return table + offset if offset else 0


def _vector(raw: bytes, table: int, number: int, size: int) -> range:
    """Where the elements of a vector of structs are."""
    field = _field(raw, table, number)
    if not field:
        return range(0)
    start = _follow(raw, field)
    count = struct.unpack_from("<I", raw, start)[0]
    if start + 4 + count * size > len(raw):
        raise struct.error("a vector beyond the metadata")
    return range(start + 4, start + 4 + count * size, size)
