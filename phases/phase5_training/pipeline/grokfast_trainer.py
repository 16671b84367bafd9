"""Gradient filters that amplify the slow part of the gradient (Grokfast), and a trainer to use by hand.

Lee et al. 2024 (arXiv:2405.20233). With g the gradient, mu its slow average and l the gain:

============  =====================================  ===========================================
``filter``    mu                                     gradient handed to the optimizer
============  =====================================  ===========================================
"ema"         alpha mu + (1 - alpha) g, from mu = g  g + l mu         (Grokfast-EMA, algorithm 1)
"ma"          mean of the last ``window`` gradients  g + l mu         (Grokfast-MA, once full)
"high_pass"   as "ema"                               g + l (g - mu)   (amplifies the fast part)
"ademamix"    as "ema", from mu = 0                  g; the update then has l mu in its numerator
"auto"        as "ema", from mu = 0                  g + l e mu       (e: evidence that it helps)
============  =====================================  ===========================================

"ademamix" is Pagliardini et al. 2024 (arXiv:2409.03137, equation 2): an Adam moves by (m + l mu) / sqrt(v),
so the slow average does not enter v. An optimizer without v gets g + l mu. "auto" is ours
(:mod:`phase5_training.generalization`): e is 0 until the network fits its training set better than its
validation set, and while it is 0 no average is kept. Adam and Muon move alike whatever the size of the
gradient; for any other optimizer "auto" divides by (1 + l e) and keeps l e so small that it cannot swing
(:func:`slow_average.steady_gain`).

The user's gain is constant; a warm-up and a factor per phase may shape it. The average lives in
``optimizer.state[p]["slow_gradient"]``, so whatever carries optimizer state carries it. It is float32, or
bfloat16 on request (:mod:`phase5_training.slow_average`), also where gradients are of a shorter type.
"""

import math
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
from phase5_training.phases import DecaySchedule, Phase, Schedule
from phase5_training.slow_average import (
    COUNT,
    SLOW,
    WINDOW,
    LinearFilter,
    divides_by_second_moment,
    filter_in_float32_,
    ignores_scale,
    steady_gain,
)

FILTERS: tuple[str, ...] = ("auto", "ema", "ma", "high_pass", "ademamix")
AVERAGE_DTYPES: tuple[str, ...] = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class GrokfastConfig:
    """How the gradient is filtered.

    Args:
        alpha: decay of the slow average per optimizer step, in [0, 1).
        lambda_reg: the gain l, 0 or more; 0 leaves the gradient as it is. With "auto" the greatest.
        filter: "ema", "ma", "high_pass", "ademamix" or "auto".
        window: length of the moving average in optimizer steps, for "ma". It keeps that many
            copies of the gradient, and adds nothing before it has them.
        unit_gain: divide by (1 + l), so that a constant gradient passes unchanged; not for "ademamix".
        gain_warmup_steps: raise l linearly from 0 over this many optimizer steps.
        phase_gains: factor on l by phase, 0 or more; phases that are not named have 1.
        average_dtype: "float32", or "bfloat16" for half the memory of the average, for all but "ma";
            rounded at random, so that it does not stall.

    Raises:
        UsageError: a figure out of its range, an unknown name, or figures that do not go together.

    Example:
        >>> GrokfastConfig(lambda_reg=2.0, gain_warmup_steps=4).gain(step=1)
        1.0
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
        if not 0 <= self.lambda_reg < math.inf:
            raise UsageError(
                f"grokfast_lambda={self.lambda_reg} is not a number of 0 or more; use 0 for no filter, "
                "2.0 as the paper"
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
        for name, factor in self.phase_gains.items():
            if name not in set(Phase):
                raise UsageError(f"phase_gains has {name!r}; the phases are {', '.join(Phase)}")
            if not 0 <= factor < math.inf:
                raise UsageError(f"phase_gains has {name}={factor}; a factor on the gain is 0 or more")

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
    """Applies a filter to the gradients of an optimizer's parameters; the state stays with the optimizer.

    Each step of the optimizer stands between :meth:`before_step` and :meth:`after_step`.

    Args:
        config: the filter and its figures.
        schedule: names the phase of a step, when ``phase_gains`` are used.

    Raises:
        UsageError: ``phase_gains`` name a phase that the schedule does not have.
    """

    def __init__(self, config: GrokfastConfig, schedule: Schedule | None = None) -> None:
        _check_phases(config, schedule)
        self.config, self.schedule = config, schedule
        self.lag = GeneralizationLag()
        self._new: list[tuple[nn.Parameter, dict[str, Tensor]]] = []
        self._rests = False

    def begin_step(self, optimizers: Sequence[Optimizer]) -> bool:
        """Get ready for a step; returns whether it is filtered: "auto" rests while there is no evidence.

        Args:
            optimizers: about to step. As a rest begins their averages go: they would say nothing about the
                gradients after it.
        """
        rests = self.config.filter == "auto" and self.lag.evidence == 0
        if rests and not self._rests:
            for own in (own for o in optimizers for own in o.state.values()):
                own.pop(SLOW, None)
        self._rests = rests
        return not rests

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
        """What does not live in the optimizer's state: the evidence of "auto", and what the averages are."""
        return {**self.lag.state_dict(), "average": self._average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            UsageError: the averages are those of another filter.
        """
        saved = state.get("average", self._average)
        if saved != self._average:
            raise UsageError(
                f"the checkpoint has the slow averages of {saved} and this run {self._average}; "
                "go on with the filter that it was started with"
            )
        self.lag.load_state_dict(state)
        self._rests = False

    @property
    def _average(self) -> str:
        """What the averages in the optimizer's state are, whatever is then done with them."""
        if self.config.filter == "ma":
            return f"filter='ma' with window={self.config.window}"
        return "filter='ademamix'" if self.config.filter == "ademamix" else "filter='ema'"

    def linear(self, step: int) -> LinearFilter | None:
        """The filter at a step of AdamW, counted from 0; None where one pass over memory cannot apply it.

        That is "ma", which is no such filter, and "ademamix", which also acts after the update.
        """
        if self.config.filter in ("ma", "ademamix"):
            return None
        return self._linear(self.gain(step))

    def _linear(self, gain: float, *, bounded: bool = False) -> LinearFilter:
        config = self.config
        of_gradient, of_average = (1 + gain, -gain) if config.filter == "high_pass" else (1.0, gain)
        unit = 1 + gain if config.unit_gain or bounded else 1.0
        half = config.average_dtype == "bfloat16"
        return LinearFilter(config.alpha, of_gradient / unit, of_average / unit, half)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, params: Sequence[nn.Parameter], step: int) -> None:
        """Filter ``p.grad`` of each parameter in place, and update the averages.

        Args:
            optimizer: about to step.
            params: those of its parameters that have a gradient; all others keep their average.
            step: the optimizer step, counted from 0.
        """
        self._new = []
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            return
        gain = self.gain(step)
        if self.config.filter == "ma":
            self._filter_ma_(grads, [self._state_of(optimizer, p) for p in params], gain)
            return
        if self.config.filter == "ademamix" and divides_by_second_moment(optimizer):
            gain = 0.0  # its part of the update comes after the optimizer's own
        # An optimizer that moves by the size of the gradient has a rate that was chosen without the gain.
        bounded = self.config.filter == "auto" and not ignores_scale(optimizer)
        if bounded:
            gain = min(gain, steady_gain(optimizer, self.config.alpha))
        linear = self._linear(gain, bounded=bounded)
        averages = []
        for p, grad in zip(params, grads, strict=True):
            own = self._state_of(optimizer, p)
            if own[SLOW].dtype != (wanted := linear.dtype(grad)):
                own[SLOW] = own[SLOW].to(wanted)
            averages.append(own[SLOW])
        filter_linear_(grads, averages, linear, linear.seeds(step, len(grads)))

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, params: Sequence[nn.Parameter], step: int) -> None:
        """Hand averages that are new to the optimizer's state, and take AdEMAMix's part of the update.

        ``p -= lr l mu / (sqrt(v / (1 - beta2**t)) + eps)``, with the v of this step.

        Args: as for :meth:`before_step`; the optimizer has stepped.
        """
        for p, own in self._new:
            optimizer.state[p].update(own)
        self._new = []
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

    def _state_of(self, optimizer: Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
        """The state that holds a parameter's average, or a first one that :meth:`after_step` hands over.

        Not sooner: torch's optimizers take a parameter with any state for one that they have seen.
        """
        own = optimizer.state.get(p, {})
        if (WINDOW if self.config.filter == "ma" else SLOW) not in own:
            assert p.grad is not None
            own = self._first_state(p.grad)
            self._new.append((p, own))
        return own

    def _first_state(self, grad: Tensor) -> dict[str, Tensor]:
        if self.config.filter == "ma":
            ring = grad.new_zeros((self.config.window, *grad.shape))
            return {
                SLOW: torch.zeros_like(grad),
                WINDOW: ring,
                COUNT: grad.new_zeros((), dtype=torch.float32),
            }
        first = grad.clone(memory_format=torch.contiguous_format)
        # "auto" wakes in the middle of a run: a whole gradient times the gain would be a leap.
        return {SLOW: first.zero_() if self.config.filter in ("ademamix", "auto") else first}

    def _filter_ma_(
        self, grads: Sequence[Tensor], averages: Sequence[dict[str, Tensor]], gain: float
    ) -> None:
        window = self.config.window
        for grad, own in zip(grads, averages, strict=True):
            # Counted in the state, not by the step number: a step that is skipped leaves no gap.
            own[WINDOW].index_copy_(0, (own[COUNT] % window).long()[None], grad[None])
            own[COUNT] += 1
            full = own[COUNT] >= window
            own[SLOW].copy_(torch.where(full, own[WINDOW].mean(0), 0.0))
            grad.add_(own[SLOW], alpha=gain)
            if self.config.unit_gain:
                # Before the window is full nothing is added.
                grad.div_(torch.where(full, 1 + gain, 1.0))


def _check_phases(config: GrokfastConfig, schedule: Schedule | None) -> None:
    known = {Phase.WARMUP, Phase.REFINEMENT} if isinstance(schedule, DecaySchedule) else set(Phase)
    for name in config.phase_gains:
        if schedule is None or name not in known:
            what = "there is no schedule" if schedule is None else "the schedule has no such phase"
            raise UsageError(f"phase_gains names {name}, and {what}; use schedule='phases', or leave it out")


class GrokfastTrainer:
    """Filtered training steps by hand, for a loop of one's own.

    Args:
        model: called as ``model(batch["input"])``.
        optimizer: any torch optimizer, or a :class:`BitNetOptimizer`.
        config: the filter.
        schedule: the phases, for the figures that ``train_step`` reports and for ``phase_gains``.

    Raises:
        UsageError: the filter is "auto", which goes by validation figures that this trainer does not have.

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
        if config.filter == "auto":
            raise UsageError(
                "filter='auto' goes by validation, which GrokfastTrainer does not see; use filter='ema', or "
                "create_training_pipeline"
            )
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
        if self._hosted:
            self.optimizer.step()
        else:
            params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
            self.filter.before_step(self.optimizer, params, self.step_count)
            self.optimizer.step()
            self.filter.after_step(self.optimizer, params, self.step_count)
        self.step_count += 1
        return {"loss": loss.item(), **report}
