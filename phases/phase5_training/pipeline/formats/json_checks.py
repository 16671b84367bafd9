"""What orjson takes and Forge does not: a key that occurs twice, and nesting that no array needs."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

MAX_DEPTH = 64  # levels of nesting within a record; arrays have at most as many dimensions
_STRING = re.compile(rb'(?s)"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


class _TwiceError(Exception):
    """Carries the key."""


def fault_of(text: bytes, value: Any) -> str | None:
    r"""Why a value that was parsed is refused all the same; None where nothing is wrong.

    Args:
        text: of the value.
        value: what orjson made of it, which keeps the last of equal keys.

    Example:
        >>> fault_of(b'{"a": 1, "\\u0061": 2}', {"a": 2})
        "has the key 'a' twice"
    """
    strings, quotes, flat = _near_the_top(value)
    # A key that was dropped leaves its quotes in the text. Only an escape by number brings a quote to the
    # value and none to the text.
    once_each = text.count(b'"') == 2 * strings + quotes and not (quotes and b"u0022" in text)
    if once_each and flat:
        return None
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        return f"is nested deeper than {MAX_DEPTH} levels"
    if once_each:
        return None
    if without_strings(text).count(b":") == _keys(value):
        return None
    try:
        json.loads(text, object_pairs_hook=_once_each, parse_int=float)
    except _TwiceError as error:
        return f"has the key {error.args[0]!r} twice"
    return None


def without_strings(text: bytes) -> bytes:
    """JSON text without its strings, whose brackets mean nothing."""
    return _STRING.sub(b"", text)


def _depth(text: bytes) -> int:
    steps = _STEP[np.frombuffer(without_strings(text), np.uint8)]
    return int(np.cumsum(steps[steps != 0], dtype=np.int64).max(initial=0))


def _once_each(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise _TwiceError(max(names, key=names.count)[:100])


def _near_the_top(value: Any) -> tuple[int, int, bool]:
    """How many strings, keys among them, are quickly found, the quotes they hold, and if those are all."""
    strings, flat = list[str](), type(value) is dict
    parts = [value] if flat else []
    for part in parts:  # and the objects in it
        strings += part
        for held in part.values():
            kind = type(held)
            if kind is str:
                strings.append(held)
            elif kind is dict and part is value:
                parts.append(held)
            elif kind is dict or kind is list:
                flat = False
                strings += [text for text in held if type(text) is str] if held and _is_text(held) else []
    return len(strings), sum(text.count('"') for text in strings if '"' in text), flat


def _is_text(held: dict | list) -> bool:
    return type(held) is list and type(held[0]) is str


def _keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_keys, value.values()))
    if isinstance(value, list) and not {int, float}.issuperset(map(type, value)):
        return sum(map(_keys, value))
    return 0
