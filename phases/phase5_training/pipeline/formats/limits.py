"""What a data file may ask for: memory in proportion, and nothing outside its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from phase5_training.errors import DataError
from phase5_training.memory import usable_memory

INFLATED_FLOOR = 64 << 20  # bytes below which any compression ratio will do
MAX_RATIO = 100  # bytes in memory for each in the file; data seldom shrink so far, files of zeros do


def check_memory(path: str | Path, size: int, what: str) -> None:
    """Refuse to hold ``size`` bytes when that is more than half of the memory that a process may have."""
    limit = usable_memory() // 2
    if size > limit:
        raise DataError(
            f"{path}: {what} takes {size / 1e9:.1f} GB, more than half of the memory here "
            f"({limit / 1e9:.1f} GB); write it as .npy, .h5 or .jsonl, which can be read in place"
        )


def check_inflation(where: str, stored: int, size: int) -> None:
    """Refuse what grows out of proportion when it is decompressed from ``stored`` to ``size`` bytes."""
    if size > max(INFLATED_FLOOR, MAX_RATIO * stored):
        raise DataError(
            f"{where} inflates from {stored / 1e6:.3g} MB to {size / 1e6:.0f} MB, over {MAX_RATIO} times "
            "as much; write it uncompressed"
        )


def check_companion(path: Path, beside: Path) -> None:
    """Refuse a file read along with another (targets, a sidecar) that is a link to somewhere else."""
    if beside.resolve().parent != path.resolve().parent:
        raise DataError(f"{beside}: a link that leads out of the data folder; copy the file in")


def check_width(where: str, shape: Sequence[int], dtype: np.dtype) -> None:
    """Refuse rows that hold nothing: a file of no bytes can declare any number of them."""
    if not dtype.itemsize:
        raise DataError(f"{where} has elements of no bytes ({dtype}); wanted numbers or text")
    if 0 in shape[1:]:
        raise DataError(f"{where} has shape {tuple(shape)}: its records are empty; wanted numbers in each")
