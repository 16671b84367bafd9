"""Clip, gradient filter, AdamW, decay and codes in one pass over memory, on a CPU.

The kernel (phase4_bitnet/native/optimizer_step.cpp) works on the state that ``torch.optim.AdamW`` itself
keeps, so a run may go back and forth between it and the optimizer's own step. The first step of a parameter
is the optimizer's own, which makes that state; so is every step that the kernel does not know: other
options, types and layouts, hooks on the optimizer. Both compute the same numbers to rounding. The kernel
reads the gradients and leaves them as they are; the optimizer's own step leaves the filtered ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from phase4_bitnet import native
from phase4_bitnet.layers import TernaryWeight
from phase5_training.slow_average import SLOW, LinearFilter

_NO_FILTER = LinearFilter(decay=0.0, of_gradient=1.0, of_average=0.0)
_OTHER_FORMULAS = ("amsgrad", "maximize", "capturable", "differentiable")
_STATE = ("exp_avg", "exp_avg_sq", "step")


def fused_step(
    optimizer: Optimizer,
    layers: Sequence[TernaryWeight],
    linear: LinearFilter | None,
    clip: float,
    step: int,
) -> list[TernaryWeight] | None:
    """Take the next step of an optimizer in the kernel, if the kernel knows it.

    Args:
        optimizer: on parameters that hold their gradients.
        layers: those whose codes are to follow their latent.
        linear: the gradient filter, None for none.
        clip: factor on the gradients.
        step: the optimizer step, counted from 0, for the rounding of bfloat16 averages.

    Returns:
        The layers whose codes are still to be derived, or None where the optimizer has to step by itself;
        nothing has changed then.
    """
    if type(optimizer) is not AdamW or not _calls_nothing_else(optimizer) or not native.available():
        return None
    own = linear or _NO_FILTER
    average_dtype = torch.bfloat16 if own.half else torch.float32
    params: list[Tensor] = []
    grads: list[Tensor] = []
    state: tuple[list[Tensor], ...] = ([], [], [])
    averages: list[Tensor] = []
    group_of: list[int] = []
    figures: list[float] = []
    for number, group in enumerate(optimizer.param_groups):
        if any(group.get(option) for option in _OTHER_FORMULAS):
            return None
        figures += _figures(group)
        for p in group["params"]:
            if p.grad is None:
                continue
            kept = optimizer.state.get(p)
            # A subclass of Tensor may keep its numbers elsewhere.
            if not kept or not p.is_cpu or type(p) not in (Tensor, nn.Parameter):
                return None
            if linear is not None:
                average = kept.get(SLOW)
                if average is None or average.dtype is not average_dtype:
                    return None
                averages.append(average)
            params.append(p)
            grads.append(p.grad)
            group_of.append(number)
            for values, name in zip(state, _STATE, strict=True):
                values.append(kept[name])
    if not params:
        return None
    layer_of, coded, left = _assign(params, layers)
    codes, scales = [layer.codes for layer in coded], [layer.scale for layer in coded]
    taken = torch.ops.forge.adamw_step_(
        params, grads, *state, averages, own.seeds(step, len(params)), group_of, figures,
        layer_of, codes, scales, [1 if layer.weight_bits == 1 else 2 for layer in coded],
        clip, own.decay, own.of_gradient, own.of_average,
    )  # fmt: skip
    if not taken:
        return None
    # Autograd then refuses a backward through what was computed with the old values.
    torch.autograd.graph.increment_version([*params, *codes, *scales])
    return left


def _assign(
    params: Sequence[Tensor], layers: Sequence[TernaryWeight]
) -> tuple[list[int], list[TernaryWeight], list[TernaryWeight]]:
    """For each parameter its place among the layers that the kernel codes or -1, those layers, the others."""
    position = {id(p): i for i, p in enumerate(params)}
    layer_of = [-1] * len(params)
    coded: list[TernaryWeight] = []
    left: list[TernaryWeight] = []
    for layer in layers:
        at = position.get(id(layer.weight), -1)
        drawn = layer.quantization_mode == "stochastic"
        # Of layers that share a weight, the kernel sees to the first.
        if at < 0 or layer_of[at] >= 0 or drawn or not layer.codes.is_contiguous():
            left.append(layer)
        else:
            layer_of[at] = len(coded)
            coded.append(layer)
    return layer_of, coded, left


def _figures(group: dict[str, Any]) -> list[float]:
    """lr, both betas, eps and decay of a group."""
    beta1, beta2 = group["betas"]
    return [float(x) for x in (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])]


def _calls_nothing_else(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step is torch's own, with no hook that would see it."""
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    if any(hooks):
        return False
    replaced = vars(optimizer).get("step")
    if replaced is None:
        return True
    if not getattr(replaced, "_wrapped_by_lr_sched", False):
        return False
    # torch's schedulers replace step() by one that notes that it was called, and warn when it was not.
    optimizer._opt_called = True  # type: ignore[attr-defined]
    return True
