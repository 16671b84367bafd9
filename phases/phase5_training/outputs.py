"""What a model returned and what it is compared with: the conventions every part shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from phase5_training.errors import UsageError

IGNORE_INDEX = -100  # a target that does not count: padding, or no label


def unwrap_outputs(outputs: Any, target: Any = None) -> Any:
    """The tensor a model returned, out of whatever it was wrapped in.

    In this order: a tensor is itself; an object with ``.logits`` (Hugging Face) or a mapping with a
    "logits" key gives those; a mapping of one entry gives that entry; a tuple or list gives its
    first element. A mapping of several entries, or one that goes with a mapping of targets, is
    returned as it is: those are the outputs of a multi-task model.

    Example:
        >>> import torch
        >>> unwrap_outputs({"logits": torch.zeros(2, 3), "hidden": None}).shape
        torch.Size([2, 3])
    """
    if isinstance(outputs, Tensor) or (isinstance(outputs, Mapping) and isinstance(target, Mapping)):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(outputs, Mapping):
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs
    if isinstance(outputs, (tuple, list)) and outputs:
        return outputs[0]
    return outputs


def count_units(targets: Any) -> int | Tensor:
    """Over how many units a mean over these targets is, without waiting for the device.

    Samples (an int) for float targets and for a dict of tasks; for integers the targets other than
    -100, as a 0-dim tensor on their device.

    Example:
        >>> import torch
        >>> int(count_units(torch.tensor([[5, 7, -100]])))
        2
    """
    if isinstance(targets, Mapping):
        return next(iter(targets.values())).shape[0]
    if targets.is_floating_point():
        return targets.shape[0]
    return (targets != IGNORE_INDEX).sum()


def as_mean(value: Any, name: str) -> Tensor:
    """What a loss returned, when it is a 0-dim tensor.

    Args:
        value: what it returned.
        name: of the loss, for the message.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(value, Tensor) or value.ndim != 0:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"loss {name} returned {found}; wanted a 0-dim tensor, the mean over the batch")
    return value


class PlainLoss:
    """A function of (outputs, targets) as the loop's loss: the mean over samples or tokens.

    Args:
        fn: called with the unwrapped outputs and the batch's targets.

    Example:
        >>> import torch
        >>> loss = PlainLoss(torch.nn.functional.mse_loss)
        >>> batch = {"target": torch.ones(2)}
        >>> float(loss(torch.zeros(2), batch)), loss.units(batch)
        (1.0, 2)
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """The mean loss, 0-dim."""
        name = getattr(self._fn, "__name__", type(self._fn).__name__)
        return as_mean(self._fn(unwrap_outputs(outputs), batch["target"]), name)

    def units(self, batch: Mapping[str, Any]) -> int | Tensor:
        """See :func:`count_units`."""
        return count_units(batch["target"])
