"""Whether the objects that a user hands over can be trained and saved."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phase5_training.errors import UsageError
from phase5_training.loss_registry import Loss


def check_optimizer(optimizer: Optimizer, model: nn.Module, loss: Loss) -> None:
    """Whether an optimizer instance moves what is to be trained, all of it and nothing else.

    Args:
        optimizer: as given.
        model: whose parameters with ``requires_grad`` it has to hold.
        loss: the same for what it learns.

    Raises:
        UsageError: it holds parameters of something else, or lacks some.
    """
    named = {f"model.{name}": p for name, p in model.named_parameters()}
    if loss.module is not None:
        named |= {f"loss.{name}": p for name, p in loss.module.named_parameters()}
    known = {id(p) for p in named.values()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [p for p in held if id(p) not in known]
    if foreign:
        raise UsageError(
            f"the optimizer holds {len(foreign)} of {len(held)} parameters that are neither the model's nor "
            f"the loss's, the first of shape {tuple(foreign[0].shape)}; build it over the parameters() of "
            "the model that is passed"
        )
    moved = {id(p) for p in held}
    missing = [name for name, p in named.items() if p.requires_grad and id(p) not in moved]
    if missing:
        raise UsageError(
            f"{len(missing)} trainable parameters are not in the optimizer and would never change, "
            f"{missing[0]} first; give it those too, or set requires_grad_(False) on them"
        )


def check_storable(model: nn.Module, loss: Loss) -> None:
    """Whether the weights can be kept, saved and stored: dense tensors, under their names.

    Raises:
        UsageError: a state holds something else, such as what ``get_extra_state`` returned.
    """
    for owner, state in (("model", model.state_dict()), ("loss", loss.state_dict())):
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.layout != torch.strided:
                found = f"{value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(
                    f"{owner}.state_dict() holds {name!r}, a {found}, which a checkpoint does not store; "
                    "keep it in a buffer as a dense tensor, or leave it out of the state"
                )
