"""How far a first pass over data is, told to whoever wants to know.

Readers tell it from deep inside; who opens the data listens for as long as that takes. Nobody listens by
default, so that a program that opens data sees no output of ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple


class Reading(NamedTuple):
    """How far a pass is.

    Args:
        what: the file or data set.
        done: bytes or records read.
        total: of them; None while nobody knows.
        unit: "bytes" of a file, or "records" of all files.
    """

    what: str
    done: int
    total: int | None
    unit: str


Listener = Callable[[Reading], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have what is read inside told to ``listener``.

    Example:
        >>> with listening(lambda found: print(found.done, found.unit)):
        ...     tell_read("a.jsonl", 8, 100, "bytes")
        8 bytes
        >>> tell_read("a.jsonl", 16, 100, "bytes")
    """
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def tell_read(what: str, done: int, total: int | None, unit: str) -> None:
    """Tell the listener, if there is one, how far a pass is; see `Reading`."""
    listener = _listener.get()
    if listener is not None:
        listener(Reading(what, done, total, unit))
