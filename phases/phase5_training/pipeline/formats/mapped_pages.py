"""Pages of mapped files: memory that a process touches counts as its own until it is given back."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import numpy as np

RESIDENT = 32 << 20  # bytes that are touched before they are given back


class TouchedPages:
    """Gives the pages of mapped arrays back as a walk through them goes on; they stay in the page cache.

    Args:
        arrays: mapped from files, or views of such; others are left alone.
    """

    def __init__(self, arrays: Iterable[object]) -> None:
        found = (mapped_under(array) for array in arrays)
        self._maps = {id(m): m for m in found if m is not None}
        self._touched = 0

    def touch(self, size: int) -> None:
        """Note that about so many bytes were read."""
        self._touched += size
        if self._touched > RESIDENT:
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


def mapped_under(array: object) -> mmap.mmap | None:
    """What an array is mapped by, through any number of views.

    Example:
        >>> mapped_under(np.zeros(3)[1:]) is None
        True
    """
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) else None
