"""Eval mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode afterwards, also when the inside raises.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval())
        >>> with eval_mode(model):
        ...     model.training
        False
        >>> [m.training for m in model]
        [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def training_modes(model: nn.Module, before: dict[nn.Module, bool]) -> dict[nn.Module, bool]:
    """Put a model in train mode; parts that the caller put in eval mode, as a frozen BatchNorm, stay in it.

    A model that is in eval mode itself is trained whole.

    Args:
        model: to train.
        before: what this function gave the first time; empty for that.

    Returns:
        The mode of each module.
    """
    if not before:
        if not model.training:
            model.train()
        before = {m: m.training for m in model.modules()}
    for module, training in before.items():
        module.training = training
    return before
