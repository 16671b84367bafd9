"""Sets the learning rates of an optimizer from a schedule, step by step, and resumes exactly.

The rates are a function of the step count alone (see ``phase5_training.phases``): this class owns the
count and the optimizer's parameter groups, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from phase5_training.errors import UsageError
from phase5_training.phases import (
    ACCELERATION_STEPS,
    CONSOLIDATION_STEPS,
    REFINEMENT_STEPS,
    WARMUP_STEPS,
    Phase,
    Schedule,
    build_schedule,
)


class HasParamGroups(Protocol):
    """A torch optimizer, or anything with ``param_groups``."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Dicts with at least "lr"."""


@dataclass(frozen=True, kw_only=True)
class GrokfastSchedulerConfig:
    """The base rate and the phases of a :class:`GrokfastScheduler`.

    Args:
        base_lr: learning rate that the multipliers apply to; above 0.
        total_steps: length of the run in optimizer steps; the default is the phases at their default
            lengths with the 10,000-step cosine.
        schedule: "phases", "constant", "cosine" or "linear".
        warmup_steps: length in optimizer steps, kept exactly or refused; None scales the default.
        acceleration_steps: the same; "phases" only.
        consolidation_steps: the same; "phases" only.
        acceleration_multiplier: None for 5; "phases" only.
        consolidation_multiplier: None for 0.2; "phases" only.
        final_multiplier: None for 0.01.

    Raises:
        UsageError: a rate, length or multiplier out of its range.

    Example:
        >>> GrokfastSchedulerConfig(base_lr=1e-4).build().boundaries()[1][1:]
        (1000, 6000)
    """

    base_lr: float
    total_steps: int = WARMUP_STEPS + ACCELERATION_STEPS + CONSOLIDATION_STEPS + REFINEMENT_STEPS
    schedule: str = "phases"
    warmup_steps: int | None = None
    acceleration_steps: int | None = None
    consolidation_steps: int | None = None
    acceleration_multiplier: float | None = None
    consolidation_multiplier: float | None = None
    final_multiplier: float | None = None

    def __post_init__(self) -> None:
        _check_rate("base_lr", self.base_lr)
        self.build()

    def build(self) -> Schedule:
        """The schedule these settings describe."""
        return build_schedule(
            self.schedule,
            self.total_steps,
            warmup_steps=self.warmup_steps,
            acceleration_steps=self.acceleration_steps,
            consolidation_steps=self.consolidation_steps,
            acceleration_multiplier=self.acceleration_multiplier,
            consolidation_multiplier=self.consolidation_multiplier,
            final_multiplier=self.final_multiplier,
        )


class GrokfastScheduler:
    """Phase-aware learning rates: each group gets its own base rate times the schedule's multiplier.

    A group's base rate is its "initial_lr" if it has one, else its "lr". With a ``base_lr`` the
    groups without an "initial_lr" are scaled together so that the first of them starts from ``base_lr``:
    rates that differ keep their ratio. The rates for step 0 are set when the scheduler is made.

    Args:
        optimizer: a torch optimizer, or any object with ``param_groups``.
        config: a :class:`GrokfastSchedulerConfig`, or a schedule (``phase5_training.phases``).
        base_lr: overrides the config's; None with a schedule keeps the optimizer's own rates.

    Raises:
        UsageError: no parameter groups, a rate that is not above 0, a config of another type.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> config = GrokfastSchedulerConfig(base_lr=0.1, total_steps=1800)
        >>> scheduler = GrokfastScheduler(optimizer, config)
        >>> for _ in range(100):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> scheduler.get_current_phase().value, scheduler.get_lr()
        ('acceleration', 0.5)
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        config: GrokfastSchedulerConfig | Schedule,
        *,
        base_lr: float | None = None,
    ) -> None:
        if isinstance(config, GrokfastSchedulerConfig):
            schedule = config.build()
            base_lr = config.base_lr if base_lr is None else base_lr
        elif isinstance(config, Schedule):
            schedule = config
        else:
            raise UsageError(
                f"config is {type(config).__name__}; wanted a GrokfastSchedulerConfig or a PhaseSchedule"
            )
        if not optimizer.param_groups:
            raise UsageError("the optimizer has no parameter groups; give it the model's parameters")
        if base_lr is not None:
            _check_rate("base_lr", base_lr)
        self.optimizer = optimizer
        self.schedule: Schedule = schedule
        self.step_count = 0
        new = [group for group in optimizer.param_groups if "initial_lr" not in group]
        if new:
            first = float(new[0]["lr"])
            if base_lr is not None:
                _check_rate("the first parameter group's lr", first)
            for group in new:
                # Equal rates land on base_lr itself, not on a product rounded twice.
                own = float(group["lr"])
                group["initial_lr"] = (
                    own if base_lr is None else base_lr if own == first else base_lr * own / first
                )
        self._apply()

    def step(self) -> None:
        """Count one optimizer step and set the rates for the next; call it after ``optimizer.step()``."""
        self.step_count += 1
        self._apply()

    def get_lr(self) -> float:
        """The rate in force for the first parameter group."""
        return self.get_last_lr()[0]

    def get_last_lr(self) -> list[float]:
        """The rates in force, one for each parameter group."""
        factor = self.schedule.lr_multiplier(self.step_count)
        return [float(group["initial_lr"]) * factor for group in self.optimizer.param_groups]

    def get_current_phase(self) -> Phase:
        """The phase of the step about to be taken."""
        return self.schedule.phase(self.step_count)

    def get_phase_multiplier(self) -> float:
        """That phase's constant factor: 1, 5, 0.2 or 1 by default."""
        return self.schedule.multiplier(self.step_count)

    def state_dict(self) -> dict[str, Any]:
        """The step count and each group's base rate; plain Python numbers."""
        rates = [float(group["initial_lr"]) for group in self.optimizer.param_groups]
        return {"step_count": self.step_count, "base_lrs": rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` and set the rates for the step it was taken at.

        The schedule is not part of the state: a run resumed with the settings it was started with
        continues bit for bit, and a longer one follows the longer schedule from there.

        Raises:
            UsageError: a state for another number of parameter groups.
        """
        rates, groups = state["base_lrs"], self.optimizer.param_groups
        if len(rates) != len(groups):
            raise UsageError(
                f"the scheduler state has {len(rates)} parameter groups and the optimizer {len(groups)}; "
                "resume with the model and optimizer the run was started with"
            )
        for group, rate in zip(groups, rates, strict=True):
            group["initial_lr"] = rate
        self.step_count = int(state["step_count"])
        self._apply()

    def _apply(self) -> None:
        for group in self.optimizer.param_groups:
            # A group added since the last step joins with the rate it came with.
            group.setdefault("initial_lr", float(group["lr"]))
        for group, lr in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
            if isinstance(group["lr"], Tensor):  # capturable optimizers keep the rate in a tensor
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def _check_rate(name: str, value: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise UsageError(f"{name}={value!r} is not a number above 0; use for example 1e-3")
