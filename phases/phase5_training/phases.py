"""The phases of a run and the learning-rate multiplier of every step: pure functions of the step number.

A schedule never sees an optimizer. It answers four questions about an optimizer step counted from 0
(``phase``, ``multiplier``, ``lr_multiplier``, ``boundaries``), so a run resumed at step n gets
the rates an uninterrupted run would have had.

Every decay here reaches ``final_multiplier`` exactly at the last step of the run and stays there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import StrEnum
from fractions import Fraction
from typing import Literal, Protocol, runtime_checkable

from phase5_training.errors import UsageError, nearest_match

WARMUP_STEPS = 1000
ACCELERATION_STEPS = 5000
CONSOLIDATION_STEPS = 2000
REFINEMENT_STEPS = 10_000  # the length of the cosine when the three phases have their default lengths

# Low enough to end the decay, and not zero: at zero the last step of the run would change nothing.
FINAL_MULTIPLIER = 0.01

REFINEMENT_SHARE = Fraction(
    REFINEMENT_STEPS, WARMUP_STEPS + ACCELERATION_STEPS + CONSOLIDATION_STEPS + REFINEMENT_STEPS
)


class Phase(StrEnum):
    """A stretch of a run; compares equal to its name, as in ``Phase.WARMUP == "warmup"``."""

    WARMUP = "warmup"
    ACCELERATION = "acceleration"
    CONSOLIDATION = "consolidation"
    REFINEMENT = "refinement"


@runtime_checkable
class Schedule(Protocol):
    """What the training loop and the scheduler ask of any schedule; steps count from 0."""

    @property
    def total_steps(self) -> int:
        """Length of the run in optimizer steps."""

    def phase(self, step: int) -> Phase:
        """The phase that ``step`` belongs to."""

    def multiplier(self, step: int) -> float:
        """The constant factor of that phase."""

    def lr_multiplier(self, step: int) -> float:
        """The factor on the base learning rate at ``step``."""

    def boundaries(self) -> list[tuple[Phase, int, int]]:
        """(phase, start, end) of every phase that has a step; end is exclusive."""


@dataclass(frozen=True, kw_only=True)
class PhaseSchedule:
    """Warmup, acceleration, consolidation, refinement: the four Grokfast phases.

    The multiplier on the base rate at optimizer step t is

    - warmup: ``(t + 1) / warmup_steps``, so the first step already moves;
    - acceleration: ``acceleration_multiplier``;
    - consolidation: ``consolidation_multiplier``;
    - refinement: a half cosine from 1 to ``final_multiplier`` at step ``total_steps - 1``,
      and ``final_multiplier`` after that. A refinement of a single step is taken at 1.

    Args:
        total_steps: length of the run, in optimizer steps; at least 1.
        warmup_steps, acceleration_steps, consolidation_steps: lengths, in optimizer steps;
            what they leave of the run is refinement. Lengths that do not fit are refused;
            :meth:`fit` scales them.
        acceleration_multiplier, consolidation_multiplier, final_multiplier: factors, 0 or more.

    Raises:
        UsageError: a negative or non-integer length, lengths longer than the run, a bad multiplier.

    Example:
        >>> plan = PhaseSchedule(total_steps=18_000)
        >>> plan.phase(1000).value, plan.multiplier(1000), plan.lr_multiplier(0)
        ('acceleration', 5.0, 0.001)
        >>> plan.boundaries()[-1][1:]
        (8000, 18000)

    Source: cosine without restarts, Loshchilov and Hutter 2017 (arXiv:1608.03983), equation 5.
    """

    total_steps: int
    warmup_steps: int = WARMUP_STEPS
    acceleration_steps: int = ACCELERATION_STEPS
    consolidation_steps: int = CONSOLIDATION_STEPS
    acceleration_multiplier: float = 5.0
    consolidation_multiplier: float = 0.2
    final_multiplier: float = FINAL_MULTIPLIER

    def __post_init__(self) -> None:
        _check_fields(self)
        used = self.warmup_steps + self.acceleration_steps + self.consolidation_steps
        if used > self.total_steps:
            raise UsageError(
                f"warmup_steps={self.warmup_steps} + acceleration_steps={self.acceleration_steps} + "
                f"consolidation_steps={self.consolidation_steps} = {used} is more than "
                f"total_steps={self.total_steps}; lower them, or leave them out to have them scaled"
            )

    @classmethod
    def fit(
        cls,
        total_steps: int,
        *,
        warmup_steps: int = WARMUP_STEPS,
        acceleration_steps: int = ACCELERATION_STEPS,
        consolidation_steps: int = CONSOLIDATION_STEPS,
        acceleration_multiplier: float = 5.0,
        consolidation_multiplier: float = 0.2,
        final_multiplier: float = FINAL_MULTIPLIER,
    ) -> PhaseSchedule:
        """The schedule for a run of any length, with the three lengths scaled down where they must be.

        Refinement keeps at least 5/9 of the run (to the nearest step), its share when the phases
        have their default lengths and the cosine takes 10,000 steps. When the three lengths exceed
        the other 4/9 they shrink in proportion (1 : 5 : 2 by default), in exact integer arithmetic
        by largest remainders.
        A run of 4 steps or more has a step of every phase whose length is not 0; a shorter one
        fills them in the order refinement, warmup, acceleration.

        Example:
            >>> [end - start for _, start, end in PhaseSchedule.fit(1800).boundaries()]
            [100, 500, 200, 1000]
            >>> [phase.value for phase, _, _ in PhaseSchedule.fit(2).boundaries()]
            ['warmup', 'refinement']
        """
        _check_length("total_steps", total_steps, at_least=1)
        wanted = (warmup_steps, acceleration_steps, consolidation_steps)
        for name, value in zip(_LENGTHS, wanted, strict=True):
            _check_length(name, value)
        return cls(
            **dict(zip(_LENGTHS, _fit_lengths(total_steps, wanted), strict=True)),
            total_steps=total_steps,
            acceleration_multiplier=acceleration_multiplier,
            consolidation_multiplier=consolidation_multiplier,
            final_multiplier=final_multiplier,
        )

    def phase(self, step: int) -> Phase:
        """The phase of optimizer step ``step``, counted from 0; refinement past the end of the run."""
        _check_step(step)
        if step < self.warmup_steps:
            return Phase.WARMUP
        if step < self.warmup_steps + self.acceleration_steps:
            return Phase.ACCELERATION
        if step < self._refinement_start:
            return Phase.CONSOLIDATION
        return Phase.REFINEMENT

    def multiplier(self, step: int) -> float:
        """The phase's own factor: 1 in warmup and refinement, 5 and 0.2 between them by default."""
        phase = self.phase(step)
        if phase is Phase.ACCELERATION:
            return self.acceleration_multiplier
        if phase is Phase.CONSOLIDATION:
            return self.consolidation_multiplier
        return 1.0

    def lr_multiplier(self, step: int) -> float:
        """The factor on the base learning rate at optimizer step ``step``, counted from 0."""
        phase = self.phase(step)
        if phase is Phase.WARMUP:
            return (step + 1) / self.warmup_steps
        if phase is Phase.REFINEMENT:
            done = _progress(step, self._refinement_start, self.total_steps)
            return _cosine(done, self.final_multiplier)
        return self.multiplier(step)

    def boundaries(self) -> list[tuple[Phase, int, int]]:
        """(phase, first step, step after the last) of every phase that has a step, in order."""
        ends = (
            self.warmup_steps,
            self.warmup_steps + self.acceleration_steps,
            self._refinement_start,
            self.total_steps,
        )
        starts = (0, *ends[:-1])
        return [(p, s, e) for p, s, e in zip(Phase, starts, ends, strict=True) if e > s]

    @property
    def _refinement_start(self) -> int:
        return self.warmup_steps + self.acceleration_steps + self.consolidation_steps


@dataclass(frozen=True, kw_only=True)
class DecaySchedule:
    """Warmup, then one plain shape to the end of the run: constant, cosine or linear.

    The same interface as :class:`PhaseSchedule`, with two phases: warmup ``(t + 1) / warmup_steps``
    and refinement. Refinement runs from 1 to ``final_multiplier`` at step ``total_steps - 1``, along a
    half cosine or a straight line; "constant" stays at 1 and refuses any other ``final_multiplier``.

    Args:
        shape: "constant", "cosine" or "linear".
        total_steps: length of the run, in optimizer steps; at least 1.
        warmup_steps: length of the warmup, in optimizer steps; at most ``total_steps``.
        final_multiplier: factor at the last step; None means 1 for "constant" and 0.01 for the others.
            0 gives the textbook decay to zero, at the price of a last step that changes nothing.

    Raises:
        UsageError: an unknown shape, a bad length or multiplier.

    Example:
        >>> line = DecaySchedule(shape="linear", total_steps=5, final_multiplier=0.0)
        >>> [line.lr_multiplier(step) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    shape: Literal["constant", "cosine", "linear"]
    total_steps: int
    warmup_steps: int = 0
    final_multiplier: float | None = None

    def __post_init__(self) -> None:
        if self.shape not in _SHAPES:
            raise UsageError(_unknown("shape", self.shape, _SHAPES))
        if self.final_multiplier is None:
            default = 1.0 if self.shape == "constant" else FINAL_MULTIPLIER
            object.__setattr__(self, "final_multiplier", default)
        _check_fields(self)
        if self.shape == "constant" and self.final_multiplier != 1:
            raise UsageError(
                f"final_multiplier={self.final_multiplier} has no meaning for a constant schedule; "
                "leave it out, or use cosine or linear"
            )
        if self.warmup_steps > self.total_steps:
            raise UsageError(
                f"warmup_steps={self.warmup_steps} is more than total_steps={self.total_steps}; lower it, "
                "or leave it out to have 5% of the run"
            )

    def phase(self, step: int) -> Phase:
        """Warmup before step ``warmup_steps``, refinement from there on."""
        _check_step(step)
        return Phase.WARMUP if step < self.warmup_steps else Phase.REFINEMENT

    def multiplier(self, step: int) -> float:
        """The phase's own factor: always 1."""
        _check_step(step)
        return 1.0

    def lr_multiplier(self, step: int) -> float:
        """The factor on the base learning rate at optimizer step ``step``, counted from 0."""
        if self.phase(step) is Phase.WARMUP:
            return (step + 1) / self.warmup_steps
        assert self.final_multiplier is not None
        done = _progress(step, self.warmup_steps, self.total_steps)
        if self.shape == "cosine":
            return _cosine(done, self.final_multiplier)
        return 1.0 - (1.0 - self.final_multiplier) * done

    def boundaries(self) -> list[tuple[Phase, int, int]]:
        """(phase, first step, step after the last) of every phase that has a step, in order."""
        start = self.warmup_steps
        spans = [(Phase.WARMUP, 0, start), (Phase.REFINEMENT, start, self.total_steps)]
        return [span for span in spans if span[2] > span[1]]


def build_schedule(
    name: str,
    total_steps: int,
    *,
    warmup_steps: int | None = None,
    acceleration_steps: int | None = None,
    consolidation_steps: int | None = None,
    acceleration_multiplier: float | None = None,
    consolidation_multiplier: float | None = None,
    final_multiplier: float | None = None,
) -> PhaseSchedule | DecaySchedule:
    """The schedule of a given name for a run of a given length.

    A length the caller gives is kept exactly or refused; a length left at None takes its default,
    scaled to the steps that the given ones leave (see :meth:`PhaseSchedule.fit`). For the plain
    schedules the default warmup is 5% of the run, at most 1000 steps.

    Args:
        name: "phases", "constant", "cosine" or "linear".
        total_steps: length of the run, in optimizer steps.
        warmup_steps: length of the warmup, in optimizer steps.
        acceleration_steps: length of the acceleration, in optimizer steps; "phases" only.
        consolidation_steps: length of the consolidation, in optimizer steps; "phases" only.
        acceleration_multiplier: factor of the acceleration, default 5; "phases" only.
        consolidation_multiplier: factor of the consolidation, default 0.2; "phases" only.
        final_multiplier: factor at the last step, default 0.01 (1 for "constant").

    Returns:
        An object with the :class:`Schedule` interface.

    Raises:
        UsageError: an unknown name, an argument that the named schedule does not have, lengths
            that do not fit the run.

    Example:
        >>> plan = build_schedule("phases", 1000, warmup_steps=100)
        >>> [(phase.value, end - start) for phase, start, end in plan.boundaries()]
        [('warmup', 100), ('acceleration', 286), ('consolidation', 114), ('refinement', 500)]
    """
    if name not in SCHEDULES:
        raise UsageError(_unknown("schedule", name, SCHEDULES))
    _check_length("total_steps", total_steps, at_least=1)
    lengths = (warmup_steps, acceleration_steps, consolidation_steps)
    multipliers = {
        "acceleration_multiplier": acceleration_multiplier,
        "consolidation_multiplier": consolidation_multiplier,
        "final_multiplier": final_multiplier,
    }
    given = {key: value for key, value in multipliers.items() if value is not None}
    for key, value in zip(_LENGTHS, lengths, strict=True):
        if value is not None:
            _check_length(key, value)
            given[key] = value
    if name == "phases":
        fixed = sum(length or 0 for length in lengths)
        if None in lengths and fixed < total_steps:
            free = tuple(d if given_ is None else 0 for d, given_ in zip(_DEFAULTS, lengths, strict=True))
            scaled = _fit_lengths(total_steps - fixed, free)
        else:
            scaled = (0, 0, 0)
        for key, value in zip(_LENGTHS, scaled, strict=True):
            given.setdefault(key, value)
        return PhaseSchedule(total_steps=total_steps, **given)  # type: ignore[arg-type]
    alien = sorted(given.keys() - {"warmup_steps", "final_multiplier"})
    if alien:
        raise UsageError(f"{alien[0]} has no meaning for schedule={name!r}; leave it out")
    given.setdefault("warmup_steps", min(WARMUP_STEPS, total_steps // 20))
    return DecaySchedule(shape=name, total_steps=total_steps, **given)  # type: ignore[arg-type]


_LENGTHS = ("warmup_steps", "acceleration_steps", "consolidation_steps")
_DEFAULTS = (WARMUP_STEPS, ACCELERATION_STEPS, CONSOLIDATION_STEPS)
_SHAPES = ("constant", "cosine", "linear")
SCHEDULES = ("phases", *_SHAPES)


def _fit_lengths(total: int, wanted: tuple[int, ...]) -> tuple[int, int, int]:
    """Warmup, acceleration and consolidation lengths for ``total`` steps; see PhaseSchedule.fit."""
    asked = sum(wanted)
    share = REFINEMENT_SHARE
    if asked <= total * (1 - share):
        return wanted[0], wanted[1], wanted[2]
    # Four integer weights whose last one is exactly `share` of their sum.
    parts = share.denominator - share.numerator
    weights = [length * parts for length in wanted] + [asked * share.numerator]
    scale = sum(weights)
    lengths = [total * weight // scale for weight in weights]
    remainders = [total * weight % scale for weight in weights]
    short = total - sum(lengths)
    for index in sorted(range(4), key=lambda i: (-remainders[i], i))[:short]:
        lengths[index] += 1
    present = [i for i in (3, 0, 1, 2) if weights[i]]  # refinement first: a run of one step is taken at 1x
    if total < len(present):
        lengths = [0, 0, 0, 0]
        for index in present[:total]:
            lengths[index] = 1
    for index in present[:total]:
        if not lengths[index]:
            lengths[lengths.index(max(lengths))] -= 1
            lengths[index] = 1
    return lengths[0], lengths[1], lengths[2]


def _progress(step: int, start: int, end: int) -> float:
    """0 at ``start``, 1 at the last step before ``end`` and after it."""
    if step >= end:
        return 1.0
    return (step - start) / (end - 1 - start) if end - 1 > start else 0.0


def _cosine(progress: float, final: float) -> float:
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _check_fields(schedule: PhaseSchedule | DecaySchedule) -> None:
    for field in fields(schedule):
        value = getattr(schedule, field.name)
        if field.name.endswith("_steps"):
            _check_length(field.name, value, at_least=1 if field.name == "total_steps" else 0)
        elif field.name.endswith("_multiplier"):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                what = f"{field.name}={value!r}"
                raise UsageError(f"{what} is not a finite number of 0 or more; use for example 1")


def _check_length(name: str, value: int, at_least: int = 0) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise UsageError(f"{name}={value!r} is not a whole number of steps, {at_least} or more")


def _check_step(step: int) -> None:
    if step < 0:
        raise UsageError(f"step={step} is negative; optimizer steps count from 0")


def _unknown(what: str, name: object, choices: tuple[str, ...]) -> str:
    near = nearest_match(str(name), choices)
    hint = f"did you mean {near!r}? " if near else ""
    return f"{what}={name!r} is unknown; {hint}choose one of {', '.join(choices)}"
