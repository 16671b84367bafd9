"""How long a run is, what it does at which interval, and what follows bad numbers."""

from dataclasses import dataclass
from typing import Literal

import torch

from phase5_training.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Lengths and intervals of a run; steps are optimizer steps.

    Args:
        epochs: passes over the training data.
        max_steps: stop after this many steps, whatever the epochs; None for no limit.
        max_seconds: stop at the first step boundary after this much training time; None for no limit.
        micro_batch_size: samples per forward; None takes the batch whole. The gradient is that of
            the whole batch either way.
        eval_interval: validate every so many steps, and at the end.
        log_interval: read the figures off the device every so many steps.
        checkpoint_interval: the most steps that a kill may cost: a save begins after every half of it,
            and one is made at the end; None saves at the end only.
        use_amp: autocast the forward to ``amp_dtype``.
        amp_dtype: bfloat16 or float16.
        nonfinite: what follows ``max_nonfinite`` skipped steps in a row, as seen at the log intervals.
            "stop" fails; "rollback" goes on from the last checkpoint before them, at half the rate;
            "skip" goes on.
        max_nonfinite: see there.
        loss_spikes: "record" reports batches whose loss is far above those before; "rollback" also goes
            on from the last checkpoint before them, at half the rate.
        spike_threshold: robust z-score from which a loss is a spike.
    """

    epochs: int = 1
    max_steps: int | None = None
    max_seconds: float | None = None
    micro_batch_size: int | None = None
    eval_interval: int = 500
    log_interval: int = 10
    checkpoint_interval: int | None = None
    use_amp: bool = False
    amp_dtype: torch.dtype = torch.bfloat16
    nonfinite: Literal["stop", "rollback", "skip"] = "stop"
    max_nonfinite: int = 50
    loss_spikes: Literal["record", "rollback"] = "record"
    spike_threshold: float = 10.0

    def __post_init__(self) -> None:
        for name in ("epochs", "eval_interval", "log_interval", "max_nonfinite"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_steps", "max_seconds", "micro_batch_size", "checkpoint_interval"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name}={value} must be above 0; leave it out for no limit")
        for name, known in (
            ("nonfinite", ("stop", "rollback", "skip")),
            ("loss_spikes", ("record", "rollback")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(known)}")
        if not self.spike_threshold > 0:
            raise UsageError(f"spike_threshold={self.spike_threshold} must be above 0; 10 is the default")

    @property
    def may_roll_back(self) -> bool:
        """Whether bad numbers may send the run back to a checkpoint."""
        return "rollback" in (self.nonfinite, self.loss_spikes)
