"""What a ternary model needs around the optimizer steps of a loop that is not ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phase4_bitnet.layers import TernaryWeight, requantize_layers, ternary_layers
from phase5_training.errors import UsageError
from phase5_training.phases import Schedule, build_schedule
from phase5_training.pipeline.grokfast_trainer import GradientFilter, GrokfastConfig


class ForeignLoop:
    """Filters gradients before each optimizer step and derives the codes after it.

    The codes then hold for every forward until the next step; without this, layers derive them in each
    forward, which is as right and slower. The averages of the filter are in ``optimizer.state``, so they are
    in the checkpoints that the loop writes.

    Args:
        grokfast: the filter; None for none. "auto" goes by figures that other loops do not tell us.
        schedule: "phases", "constant", "cosine" or "linear"; None leaves the rate to the loop.
        max_grad_norm: clip the gradient to this norm before the filter; None leaves clipping to the loop.
        options: figures of the schedule, as for :func:`build_schedule`.

    Raises:
        UsageError: a filter or schedule that does not exist, or the filter "auto".
    """

    def __init__(
        self,
        grokfast: GrokfastConfig | None = None,
        schedule: str | None = None,
        *,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        if grokfast is not None and grokfast.filter == "auto":
            raise UsageError(
                "filter='auto' needs our own loop; use filter='ema', or create_training_pipeline"
            )
        if schedule is not None:
            build_schedule(schedule, 1000, **options)  # names and figures are checked before the run
        elif options:
            raise UsageError(f"{next(iter(options))} is a figure of a schedule; give schedule='phases'")
        self._grokfast, self._schedule, self._options = grokfast, schedule, options
        self._max_grad_norm = max_grad_norm
        self.schedule: Schedule | None = None
        self._filter: GradientFilter | None = None
        self._filtered = False
        self._layers: list[TernaryWeight] = []
        self._hooks: list[Any] = []
        self._step: Callable[[], int] = lambda: 0

    def begin(
        self, model: nn.Module, optimizers: Sequence[Optimizer], total_steps: int, step: Callable[[], int]
    ) -> None:
        """Take over codes and filter.

        Args:
            model: with its weights loaded.
            optimizers: torch's own, not their wrappers.
            total_steps: length of the run in optimizer steps.
            step: optimizer steps taken so far.

        Raises:
            UsageError: the model has no ternary layer, or the run no length.
        """
        self.end()
        layers = [layer for _, layer in ternary_layers(model)]
        if not layers:
            raise UsageError(
                f"{type(model).__name__} has no ternary layer; call convert_model_to_bitnet(model) first"
            )
        if self._schedule is not None:
            if total_steps < 1:
                raise UsageError("the run has no length in steps, which the schedule needs; give max_steps")
            self.schedule = build_schedule(self._schedule, total_steps, **self._options)
        self._filter = GradientFilter(self._grokfast, self.schedule) if self._grokfast else None
        self._step = step
        self._layers = layers
        requantize_layers(layers)
        for layer in layers:
            layer.codes_are_current, layer.codes_owner = True, self
        self._hooks = [optimizer.register_step_post_hook(self._after) for optimizer in optimizers]

    def before(self, optimizer: Optimizer) -> None:
        """Clip and filter the gradients that an optimizer is about to use."""
        params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        self._filtered = False
        if not grads:
            return
        if self._max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(params, self._max_grad_norm)
        else:
            norm = torch.nn.utils.get_total_norm(grads)
        # Where a loss scaler skips the step, the average is to skip it too.
        if self._filter is not None and norm.isfinite():
            self._filter.before_step(optimizer, params, self._step())
            self._filtered = True

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._filter is not None and self._filtered:
            params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            self._filter.after_step(optimizer, params, self._step())
        requantize_layers([layer for layer in self._layers if layer.weight.requires_grad])

    def end(self) -> None:
        """Give the codes back to the layers; harmless to call again."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            if layer.codes_owner is self:
                layer.codes_are_current, layer.codes_owner = False, None
        self._hooks, self._layers = [], []
