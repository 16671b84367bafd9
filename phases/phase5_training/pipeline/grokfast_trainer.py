"""Gradient filters that amplify the slow part of the gradient (Grokfast), and a trainer to use by hand.

Lee et al. 2024 (arXiv:2405.20233). With g the gradient, mu its slow average and l the gain:

============  =====================================  ===========================================
``filter``    mu                                     gradient handed to the optimizer
============  =====================================  ===========================================
"ema"         alpha mu + (1 - alpha) g, from mu = g  g + l mu         (Grokfast-EMA, algorithm 1)
"ma"          mean of the last ``window`` gradients  g + l mu         (Grokfast-MA, once full)
"high_pass"   as "ema"                               g + l (g - mu)   (amplifies the fast part)
"ademamix"    as "ema", from mu = 0                  g; the update then has l mu in its numerator
"auto"        as "ema"                               g + l e mu       (e: evidence that it helps)
============  =====================================  ===========================================

"ademamix" is Pagliardini et al. 2024 (arXiv:2409.03137, equation 2): an Adam moves by (m + l mu) / sqrt(v),
so the slow average does not enter v. An optimizer without v gets g + l mu. "auto" is ours
(:mod:`phase5_training.generalization`): e is 0 until the network fits its training set better than its
validation set.

The user's gain is constant; a warm-up and a factor per phase may shape it. The average lives in
``optimizer.state[p]["slow_gradient"]``, so whatever carries optimizer state carries it. It is float32, or
bfloat16 on request (:mod:`phase5_training.slow_average`), also where gradients are of a shorter type.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phase4_bitnet import native
from phase5_training.errors import UsageError, nearest_match
from phase5_training.events import CallbackRegistry, Event
from phase5_training.generalization import GeneralizationLag
from phase5_training.phases import Phase, Schedule
from phase5_training.slow_average import (
    COUNT,
    SLOW,
    WINDOW,
    LinearFilter,
    divides_by_second_moment,
    filter_in_float32_,
)

FILTERS: tuple[str, ...] = ("auto", "ema", "ma", "high_pass", "ademamix")
AVERAGE_DTYPES: tuple[str, ...] = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class GrokfastConfig:
    """How the gradient is filtered.

    Args:
        alpha: decay of the slow average per optimizer step, in [0, 1).
        lambda_reg: the gain l, 0 or more; 0 leaves the gradient as it is.
        filter: "ema", "ma", "high_pass", "ademamix" or "auto".
        window: length of the moving average in optimizer steps, for "ma". It keeps that many
            copies of the gradient.
        unit_gain: divide by (1 + l), so that a constant gradient passes unchanged; not for "ademamix".
        gain_warmup_steps: raise l linearly from 0 over this many optimizer steps.
        phase_gains: factor on l by phase; phases that are not named have 1.
        average_dtype: "float32", or "bfloat16" for half the memory of the average, for all but "ma";
            rounded at random, so that it does not stall.
    """

    alpha: float = 0.98
    lambda_reg: float = 2.0
    filter: str = "ema"
    window: int = 100
    unit_gain: bool = False
    gain_warmup_steps: int = 0
    phase_gains: Mapping[str, float] = field(default_factory=dict)
    average_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise UsageError(f"grokfast_alpha={self.alpha} is not in [0, 1); the paper uses 0.98")
        if not self.lambda_reg >= 0:
            raise UsageError(
                f"grokfast_lambda={self.lambda_reg} is negative; use 0 for no filter, 2.0 as the paper"
            )
        if self.filter not in FILTERS:
            near = nearest_match(self.filter, FILTERS)
            raise UsageError(
                f"filter={self.filter!r} is not known; {f'did you mean {near!r}? ' if near else ''}"
                f"use one of {', '.join(FILTERS)}"
            )
        if self.window < 1 or self.gain_warmup_steps < 0:
            raise UsageError(
                f"window={self.window} must be at least 1, "
                f"gain_warmup_steps={self.gain_warmup_steps} at least 0"
            )
        if self.average_dtype not in AVERAGE_DTYPES:
            raise UsageError(
                f"average_dtype={self.average_dtype!r} is not known; use one of {', '.join(AVERAGE_DTYPES)}"
            )
        if self.average_dtype != "float32" and self.filter == "ma":
            raise UsageError(
                "filter='ma' keeps a window of gradients, not a running average; "
                "use average_dtype='float32', or filter='ema'"
            )
        if self.unit_gain and self.filter == "ademamix":
            raise UsageError(
                "filter='ademamix' leaves the gradient as it is, so there is no gain to divide by; "
                "use grokfast_unit_gain=False, or filter='ema'"
            )
        for name in self.phase_gains:
            if name not in set(Phase):
                raise UsageError(f"phase_gains has {name!r}; the phases are {', '.join(Phase)}")

    def gain(self, step: int, phase: Phase | None = None) -> float:
        """l at optimizer step ``step``, counted from 0."""
        ramp = min(1.0, (step + 1) / self.gain_warmup_steps) if self.gain_warmup_steps else 1.0
        return self.lambda_reg * ramp * (self.phase_gains.get(phase, 1.0) if phase else 1.0)


def filter_linear_(
    grads: list[Tensor], slow: list[Tensor], linear: LinearFilter, seeds: Sequence[int] = ()
) -> None:
    """Update the slow averages and filter the gradients, in place.

    Args:
        grads: gradients, any shapes, overwritten.
        slow: averages of the same shapes, of the type that the filter asks for, overwritten.
        linear: the filter.
        seeds: for the rounding of bfloat16 averages, one for each gradient.
    """
    plain = all(g.dtype == torch.float32 and g.is_cpu and g.is_contiguous() for g in grads)
    if plain and all(s.is_contiguous() for s in slow) and native.available():
        torch.ops.forge.filter_gradients_(
            grads, slow, list(seeds), linear.decay, linear.of_gradient, linear.of_average
        )
    elif all(g.dtype == s.dtype for g, s in zip(grads, slow, strict=True)):
        torch._foreach_lerp_(slow, grads, 1 - linear.decay)
        if linear.of_gradient != 1:
            torch._foreach_mul_(grads, linear.of_gradient)
        torch._foreach_add_(grads, slow, alpha=linear.of_average)
    else:
        filter_in_float32_(grads, slow, linear, seeds)


class GradientFilter:
    """Applies a filter to the gradients of a list of parameters; the state stays with the optimizer.

    Args:
        config: the filter and its figures.
        schedule: names the phase of a step, when ``phase_gains`` are used.
    """

    def __init__(self, config: GrokfastConfig, schedule: Schedule | None = None) -> None:
        self.config, self.schedule = config, schedule
        self.lag = GeneralizationLag()
        self._new: list[tuple[nn.Parameter, dict[str, Tensor]]] = []

    def gain(self, step: int) -> float:
        """l at optimizer step ``step``, counted from 0; with "auto" times the evidence at hand."""
        gain = self.config.gain(step, self.schedule.phase(step) if self.schedule else None)
        return gain * self.lag.evidence if self.config.filter == "auto" else gain

    def watch(self, callbacks: CallbackRegistry) -> None:
        """Follow the figures of a loop, which "auto" goes by."""
        if self.config.filter == "auto":
            callbacks.register(Event.LOG, lambda step, metrics: self.lag.observe_training(metrics))
            callbacks.register(Event.EVAL_END, lambda step, metrics: self.lag.observe_validation(metrics))

    def state_dict(self) -> dict[str, Any]:
        """What does not live in the optimizer's state: the evidence of "auto"."""
        return self.lag.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.lag.load_state_dict(state)

    def linear(self, step: int) -> LinearFilter | None:
        """The figures of the filter at optimizer step ``step``; None where one pass cannot apply it.

        That is "ma", which is no such filter, and "ademamix", which also acts after the update.
        """
        if self.config.filter in ("ma", "ademamix"):
            return None
        return self._linear(step, self.gain(step))

    def _linear(self, step: int, gain: float) -> LinearFilter:
        config = self.config
        high_pass = config.filter == "high_pass"
        of_gradient, of_average = (1 + gain, -gain) if high_pass else (1.0, gain)
        unit = 1 + gain if config.unit_gain else 1.0
        half = config.average_dtype == "bfloat16"
        return LinearFilter(config.alpha, of_gradient / unit, of_average / unit, half)

    @torch.no_grad()
    def filter_(
        self,
        params: Sequence[nn.Parameter],
        state: Mapping[Any, Any],
        step: int,
        *,
        divides: bool = False,
    ) -> None:
        """Filter ``p.grad`` of each parameter in place.

        Args:
            params: those with a gradient; all others keep their average.
            state: ``optimizer.state``; averages that exist are updated there.
            step: the optimizer step, counted from 0.
            divides: the optimizer divides by a second moment, so that "ademamix" waits for
                :meth:`add_slow_`.
        """
        # torch's optimizers take a parameter with any state for one they have seen, so the first
        # averages wait until the optimizer has made its own state (store_).
        self._new = []
        gain = self.gain(step)
        linear = None
        if self.config.filter != "ma":
            linear = self._linear(step, 0.0 if divides and self.config.filter == "ademamix" else gain)
        averages: list[dict[str, Tensor]] = []
        for p in params:
            assert p.grad is not None
            own = state.get(p, {})
            if SLOW not in own or (linear is None and WINDOW not in own):
                own = self._first_state(p.grad)
                self._new.append((p, own))
            if linear is not None and own[SLOW].dtype != (wanted := linear.dtype(p.grad)):
                own[SLOW] = own[SLOW].to(wanted)
            averages.append(own)
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            return
        if linear is None:
            self._filter_ma_(grads, averages, gain)
            if self.config.unit_gain:
                torch._foreach_div_(grads, 1 + gain)
        else:
            filter_linear_(grads, [own[SLOW] for own in averages], linear, linear.seeds(step, len(grads)))

    def store_(self, state_of: Callable[[nn.Parameter], dict[str, Any]]) -> None:
        """Hand averages that were made in this step to the optimizer's state, after its step.

        Args:
            state_of: gives the optimizer's own state dict of a parameter.
        """
        for p, own in self._new:
            state_of(p).update(own)
        self._new = []

    @torch.no_grad()
    def add_slow_(self, optimizer: Optimizer, params: Sequence[nn.Parameter], step: int) -> None:
        """The slow average's part of an AdEMAMix update, after the optimizer's own: nothing for others.

        ``p -= lr l mu / (sqrt(v / (1 - beta2**t)) + eps)``, with the v of this step.

        Args:
            optimizer: an Adam that has just stepped; others are left alone.
            params: those with a gradient.
            step: the optimizer step, counted from 0.
        """
        if self.config.filter != "ademamix" or not divides_by_second_moment(optimizer):
            return
        moved, gain = {id(p) for p in params}, self.gain(step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in moved:
                    continue
                own = optimizer.state[p]
                # In float32: 0.999**t is 1 in bf16. And no float() of a step count: that waits for a device.
                correction = 1 - group["betas"][1] ** own["step"].to(p.device, torch.float32)
                second = own["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"].float()
                root = (second / correction).sqrt_().add_(group["eps"])
                rate = float(group["lr"]) * gain * (1 if group.get("maximize") else -1)
                p.add_((own[SLOW].float() / root).to(p.dtype), alpha=rate)

    def _first_state(self, grad: Tensor) -> dict[str, Tensor]:
        if self.config.filter == "ma":
            ring = grad.new_zeros((self.config.window, *grad.shape))
            return {
                SLOW: torch.zeros_like(grad),
                WINDOW: ring,
                COUNT: grad.new_zeros((), dtype=torch.float32),
            }
        first = grad.clone(memory_format=torch.contiguous_format)
        return {SLOW: first.zero_() if self.config.filter == "ademamix" else first}

    def _filter_ma_(
        self, grads: Sequence[Tensor], averages: Sequence[dict[str, Tensor]], gain: float
    ) -> None:
        window = self.config.window
        for grad, own in zip(grads, averages, strict=True):
            # Counted in the state, not by the step number: a step that is skipped leaves no gap.
            own[WINDOW].index_copy_(0, (own[COUNT] % window).long()[None], grad[None])
            own[COUNT] += 1
            own[SLOW].copy_(torch.where(own[COUNT] >= window, own[WINDOW].mean(0), 0.0))
            grad.add_(own[SLOW], alpha=gain)


class GrokfastTrainer:
    """Filtered training steps by hand, for a loop of one's own.

    Args:
        model: called as ``model(batch["input"])``.
        optimizer: any torch optimizer, or a :class:`BitNetOptimizer`.
        config: the filter.
        schedule: the phases, for the figures that ``train_step`` reports and for ``phase_gains``.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> trainer = GrokfastTrainer(model, torch.optim.SGD(model.parameters(), 0.1), GrokfastConfig())
        >>> batch = {"input": torch.ones(4, 2), "target": torch.ones(4, 1)}
        >>> sorted(trainer.train_step(batch, nn.functional.mse_loss))
        ['loss', 'multiplier', 'phase']
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, config: GrokfastConfig, schedule: Schedule | None = None
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.filter = GradientFilter(config, schedule)
        self.step_count = 0
        # An optimizer with a place for a filter runs it between its own clipping and update.
        self._hosted = hasattr(optimizer, "gradient_filter")
        if self._hosted:
            optimizer.gradient_filter = self.filter

    @property
    def alpha(self) -> float:
        """Decay of the slow average."""
        return self.filter.config.alpha

    @property
    def lambda_reg(self) -> float:
        """Gain of the slow average, before its warm-up and the factor of a phase."""
        return self.filter.config.lambda_reg

    def get_current_phase(self) -> Phase:
        """The phase of the next step; refinement when there is no schedule."""
        return self.schedule.phase(self.step_count) if self.schedule else Phase.REFINEMENT

    def get_phase_multiplier(self) -> float:
        """The phase's factor on the learning rate; 1 when there is no schedule."""
        return self.schedule.multiplier(self.step_count) if self.schedule else 1.0

    def train_step(
        self, batch: Mapping[str, Any], loss_fn: Callable[[Any, Any], Tensor]
    ) -> dict[str, float | str]:
        """One step on one batch.

        Args:
            batch: "input" for the model, "target" for the loss.
            loss_fn: ``loss_fn(outputs, targets)`` -> () tensor.

        Returns:
            "loss" before the step, and "phase" and "multiplier" of the step.
        """
        report: dict[str, float | str] = {
            "phase": self.get_current_phase().value,
            "multiplier": self.get_phase_multiplier(),
        }
        self.optimizer.zero_grad()
        loss = loss_fn(self.model(batch["input"]), batch["target"])
        loss.backward()
        if not self._hosted:
            params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
            divides = divides_by_second_moment(self.optimizer)
            self.filter.filter_(params, self.optimizer.state, self.step_count, divides=divides)
        self.optimizer.step()
        if not self._hosted:
            self.filter.store_(self.optimizer.state.__getitem__)
            self.filter.add_slow_(self.optimizer, params, self.step_count)
        self.step_count += 1
        return {"loss": loss.item(), **report}
