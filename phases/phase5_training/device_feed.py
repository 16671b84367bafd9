"""Batches moved to a CUDA device while the step before them runs."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]


def moved_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches whose inputs and targets lie on a CUDA device, each copied from pinned memory beside the step.

    One batch is drawn ahead. What the data raise meanwhile is raised when its batch is asked for, and not
    before. Sample ids stay where they are: they are read on the CPU. Elsewhere batches pass as they are.

    Args:
        batches: their making must not depend on what happens between two of them.
        device: where they go.

    Example:
        >>> next(moved_ahead(iter([{"input": torch.ones(2)}]), torch.device("cpu")))["input"].tolist()
        [1.0, 1.0]
    """
    return _moved_ahead(batches, device) if device.type == "cuda" else batches


def _moved_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    beside = torch.cuda.Stream(device)
    waiting = _draw(batches, device, beside)
    while waiting is not None:
        if isinstance(waiting, BaseException):
            raise waiting
        own = torch.cuda.current_stream(device)
        own.wait_stream(beside)
        batch, waiting = waiting, None
        for tensor in _tensors(batch):
            tensor.record_stream(own)  # its memory is not reused before the step is done with it
        waiting = _draw(batches, device, beside)
        yield batch


def _draw(
    batches: Iterator[Batch], device: torch.device, beside: torch.cuda.Stream
) -> Batch | BaseException | None:
    try:
        batch = next(batches, None)
    except BaseException as error:  # also a stop: the batch before this one is whole
        return error
    if batch is None:
        return None
    with torch.cuda.stream(beside):
        return {key: part if key == "index" else _moved(part, device) for key, part in batch.items()}


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, dict):
        return {name: _moved(value, device) for name, value in part.items()}
    return part.pin_memory().to(device, non_blocking=True) if isinstance(part, Tensor) else part


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        if part.is_cuda:
            yield part
    elif isinstance(part, dict):
        for value in part.values():
            yield from _tensors(value)
