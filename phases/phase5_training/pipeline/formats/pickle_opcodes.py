"""What a pickle may ask for, checked before it is loaded: lengths, memo indices, and shared contents.

The C unpickler trusts what a file declares: a memo index of 4 billion makes it clear 64 GB, and ten lists
that hold each other ten times over are a billion numbers once they become an array.
"""

from __future__ import annotations

import collections
import mmap
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

MAX_DEPTH = 64  # containers in containers; arrays have at most 64 dimensions
SHARED = 64  # elements that a byte of the file may stand for: a repeated text is stored once
SHARED_FLOOR = 1 << 26
MAX_HUGE = 1000  # integers beyond 64 bits: as keys, ten thousands of them can be made to collide
WORD, DIGITS = 9, 22  # bytes, or decimal digits with what surrounds them, of integers that arrays hold

# Opcodes of fixed length run at the speed of a regular expression; see pickletools for their names.
_ALONE = b"(012N\x88\x89]})\x8faesut\x85\x86\x87ld\x90\x91Rbo\x81\x92\x93\x94Q"
# Possessive: a run of a hundred million leaves nothing to go back to.
_FIXED = re.compile(
    rb"(?s:(?:G.{8})++|(?:K.)++|[" + re.escape(_ALONE) + rb"]++|[hq\x80\x82].|[M\x83]..|[Jj\x84].{4})++"
)
_LENGTHS = {  # opcode: bytes of the length that follows it
    **dict.fromkeys(b"U\x8cC\x8a", 1), **dict.fromkeys(b"TXB\x8b", 4), **dict.fromkeys(b"\x8d\x8e\x96", 8),
}  # fmt: skip
_LINES = {**dict.fromkeys(b"ILFSVPgp", 1), **dict.fromkeys(b"ci", 2)}
_STOP, _FRAME, _LONG_PUT, _PUT = b".\x95rp"


def check_opcodes(raw: bytes | mmap.mmap) -> None:
    r"""Walk through a pickle without executing it.

    Args:
        raw: the file; what follows the end of the pickle is not looked at.

    Raises:
        ValueError: a length beyond the end of the file, a memo index beyond what the file can have stored,
            an opcode that data never need, thousands of integers beyond 64 bits, or no end.

    Example:
        >>> check_opcodes(b"]r\xff\xff\xff\xff.")
        Traceback (most recent call last):
        ValueError: a memo index of 4294967295 in a file of 7 bytes
    """
    at, size, huge = 0, len(raw), 0
    while at < size:
        run = _FIXED.match(raw, at)
        if run:
            at = run.end()
            continue
        code, at = raw[at], at + 1
        if code == _STOP:
            return
        if code in _LENGTHS:
            width = _LENGTHS[code]
            length = int.from_bytes(raw[at : at + width], "little")
            at += width + length
            huge += code in b"\x8a\x8b" and length > WORD
        elif code in _LINES:
            first = at
            for _ in range(_LINES[code]):
                at = raw.find(b"\n", at) + 1
                if not at:
                    raise ValueError("it is cut short")
            if code == _PUT:
                _check_index(raw[first : at - 1], size)
            huge += code in b"IL" and at - first > DIGITS
        elif code == _LONG_PUT:
            _check_index(int.from_bytes(raw[at : at + 4], "little"), size)
            at += 4
        elif code == _FRAME:
            if int.from_bytes(raw[at : at + 8], "little") > size - at:
                raise ValueError("it is cut short")
            at += 8
        else:
            raise ValueError(f"an opcode {code:#04x}, which data do not need")
        if huge > MAX_HUGE:
            raise ValueError(f"more than {MAX_HUGE} integers beyond 64 bits")
    raise ValueError("it is cut short")


def _check_index(index: int | bytes, size: int) -> None:
    # Each entry of the memo takes at least a byte, so an honest index is below the size.
    if isinstance(index, bytes):
        index = int(index) if index.isdigit() and len(index) < 20 else size
    if index >= size:
        raise ValueError(f"a memo index of {index} in a file of {size} bytes")


_PLAIN = frozenset({int, float, bool, type(None), complex})
_HOLDERS = (Mapping, list, tuple, set, frozenset, collections.deque)


def check_contents(data: Any, size: int) -> None:
    """Refuse contents that are far larger once written out than the file they came from.

    Args:
        data: what the file held.
        size: bytes of the file.

    Raises:
        ValueError: lists in circles, deeper than `MAX_DEPTH`, or repeated beyond `SHARED` elements a byte,
            or a tensor that is no plain array.
    """
    limit = max(SHARED_FLOOR, SHARED * size)
    total = _Weights().of(data, 0)
    if total > limit:
        raise ValueError(f"it repeats its parts until they hold {total:.3g} elements")


class _Weights:
    """Elements of a container with all that it holds, each counted as often as it occurs."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def of(self, value: Any, depth: int) -> int:
        if isinstance(value, torch.Tensor):
            _check_tensor(value)
            return value.numel()
        if isinstance(value, np.ndarray) and value.dtype != object:
            return value.size
        if isinstance(value, (str, bytes, bytearray)):
            return len(value)
        if not isinstance(value, (*_HOLDERS, np.ndarray)):
            return 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        if id(value) not in self._known:
            self._known[id(value)] = -1
            items = value.values() if isinstance(value, Mapping) else value
            items = items.ravel().tolist() if isinstance(items, np.ndarray) else items
            held = 0 if _PLAIN.issuperset(map(type, items)) else sum(self.of(i, depth + 1) for i in items)
            self._known[id(value)] = max(held, len(items))
        known = self._known[id(value)]
        if known < 0:
            raise ValueError("it has a list that holds itself")
        return known


def _check_tensor(tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        raise ValueError(f"it holds a tensor that is no plain array ({kind}); save a dense one of numbers")
