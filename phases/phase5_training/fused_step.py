"""Clip, gradient filter, AdamW, decay and codes in one pass over memory, on a CPU.

The kernel (phase4_bitnet/native/optimizer_step.cpp) works on the state that ``torch.optim.AdamW`` itself
keeps, so a run may go back and forth between it and the optimizer's own step. The first step of a parameter
is the optimizer's own, which makes that state; so is every step that the kernel does not know: other
options, types and layouts, hooks on the optimizer. Both compute the same numbers to rounding. The kernel
reads the gradients and leaves them as they are; the optimizer's own step leaves the filtered ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from phase4_bitnet import native
from phase4_bitnet.layers import TernaryWeight
from phase5_training.slow_average import SLOW, LinearFilter

_NO_FILTER = LinearFilter(decay=0.0, of_gradient=1.0, of_average=0.0)
_OTHER_FORMULAS = ("amsgrad", "maximize", "capturable", "differentiable")


@dataclass
class FusedStep:
    """The tensors of one AdamW step, in the order in which the kernel takes them."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    firsts: list[Tensor] = field(default_factory=list)
    seconds: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    averages: list[Tensor] = field(default_factory=list)
    group_of: list[int] = field(default_factory=list)
    figures: list[float] = field(default_factory=list)

    def run(
        self,
        layers: Sequence[TernaryWeight],
        linear: LinearFilter | None,
        clip: float,
        step: int,
    ) -> list[TernaryWeight]:
        """Take the step.

        Args:
            layers: those whose codes may follow their latent.
            linear: the filter, None for none.
            clip: factor on the gradients.
            step: the optimizer step, for the rounding of bfloat16 averages.

        Returns:
            The layers whose codes the kernel did not derive.
        """
        position = {id(p): i for i, p in enumerate(self.params)}
        layer_of = [-1] * len(self.params)
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
        own = linear or _NO_FILTER
        codes, scales = [layer.codes for layer in coded], [layer.scale for layer in coded]
        torch.ops.forge.adamw_step_(
            self.params, self.grads, self.firsts, self.seconds, self.steps, self.averages,
            own.seeds(step, len(self.params)), self.group_of, self.figures,
            layer_of, codes, scales, [1 if layer.weight_bits == 1 else 2 for layer in coded],
            clip, own.decay, own.of_gradient, own.of_average,
        )  # fmt: skip
        # Autograd then refuses a backward through what was computed with the old values.
        torch.autograd.graph.increment_version([*self.params, *codes, *scales])
        return left


def fused_step(optimizer: Optimizer, linear: LinearFilter | None) -> FusedStep | None:
    """What the kernel needs for the next step of an optimizer; None where it has to step by itself.

    Args:
        optimizer: on parameters that hold their gradients.
        linear: the gradient filter, None for none.
    """
    if type(optimizer) is not AdamW or not _calls_nothing_else(optimizer) or not native.available():
        return None
    job = FusedStep()
    state = optimizer.state
    average_dtype = torch.bfloat16 if linear and linear.half else torch.float32
    for number, group in enumerate(optimizer.param_groups):
        figures = _figures(group)
        if figures is None:
            return None
        job.figures += figures
        for p in group["params"]:
            if p.grad is None:
                continue
            own = state.get(p)
            if not own or p.grad.layout is not torch.strided:
                return None
            tensors = (p, p.grad.contiguous(), own["exp_avg"], own["exp_avg_sq"], own["step"])
            if not all(_is_plain(t, torch.float32) for t in tensors):
                return None
            if linear is not None:
                average = own.get(SLOW)
                if average is None or not _is_plain(average, average_dtype):
                    return None
                job.averages.append(average)
            for values, tensor in zip(
                (job.params, job.grads, job.firsts, job.seconds, job.steps), tensors, strict=True
            ):
                values.append(tensor)
            job.group_of.append(number)
    return job if job.params else None


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return (
        tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
        and type(tensor) in (Tensor, torch.nn.Parameter)
    )


def _figures(group: dict[str, Any]) -> list[float] | None:
    """lr, both betas, eps and decay of a group; None where its options ask for another formula."""
    if any(group.get(option) for option in _OTHER_FORMULAS) or not group.get("decoupled_weight_decay", True):
        return None
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
