"""Batches as the loop handles them: counted, cut into micro-batches, moved to the device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def count_samples(batch: Mapping[str, Any]) -> int:
    """Samples in a batch, read off its inputs."""
    value: Any = batch["input"]
    while isinstance(value, Mapping):
        value = next(iter(value.values()))
    return len(value)


def rows_of(value: Any, rows: slice) -> Any:
    """Some samples of a batch, or of a part of one.

    Example:
        >>> rows_of({"input": torch.arange(4)}, slice(1, 3))
        {'input': tensor([1, 2])}
    """
    if isinstance(value, Mapping):
        return {k: rows_of(v, rows) for k, v in value.items()}
    return value[rows]


def micro_batches_of(batch: Mapping[str, Any], size: int | None) -> list[Mapping[str, Any]]:
    """A batch cut into micro-batches of at most ``size`` samples; None leaves it whole."""
    samples = count_samples(batch)
    if size is None or samples <= size:
        return [batch]
    return [rows_of(batch, slice(start, start + size)) for start in range(0, samples, size)]


def to_device(value: Any, device: torch.device) -> Any:
    """A batch or a part of one on the device, without waiting for the copy."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    return value
