"""What orjson takes and Forge does not: a key that occurs twice, and nesting that no array needs."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

MAX_DEPTH = 64  # levels of nesting within a record; arrays have at most as many dimensions
_STRING = re.compile(rb'(?s)"[^"\\]*+(?:\\.[^"\\]*+)*+"')


_QUOTE_AND_BLANK = (b'" ', b'"\t', b'"\r', b'"\n')
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
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        return f"is nested deeper than {MAX_DEPTH} levels"
    # Each key brings a quote, blanks, and a colon. Text may hold the like, so fewer keys are only a reason
    # to look.
    if text.count(b'":') == _keys_near_the_top(value) and not any(map(text.count, _QUOTE_AND_BLANK)):
        return None
    if _STRING.sub(b"", text).count(b":") == _keys(value):
        return None
    try:
        json.loads(text, object_pairs_hook=_once_each, parse_int=float)
    except _TwiceError as error:
        return f"has the key {error.args[0]!r} twice"
    return None


def _depth(text: bytes) -> int:
    steps = _STEP[np.frombuffer(_STRING.sub(b"", text), np.uint8)]
    return int(np.cumsum(steps[steps != 0], dtype=np.int64).max(initial=0))


def _once_each(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise _TwiceError(max(names, key=names.count)[:100])


def _keys_near_the_top(value: Any) -> int:
    if type(value) is not dict:
        return 0
    return len(value) + sum(len(part) for part in value.values() if type(part) is dict)


def _keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_keys, value.values()))
    if isinstance(value, list) and not {int, float}.issuperset(map(type, value)):
        return sum(map(_keys, value))
    return 0
