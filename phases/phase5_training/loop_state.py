"""Where a run stands: what the loop counts, remembers and saves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class LoopState:
    """Where a run stands.

    Args:
        step: optimizer steps taken. epoch: the epoch in progress, from 0. batch: batches of it used.
        seconds: training time, validation and saving included, over all sessions of the run.
        samples: samples seen. nonfinite: steps skipped. validation: the last validation's figures.
        stop_reason: "finished", "max_steps", "max_seconds", "early_stop" or "interrupted".
        train_loss, train_accuracy: means of the last log that had some. first_loss: of step 1.
        logged_step, validated_step: of the last log and validation.
        saved_step: of the newest checkpoint that is whole on the disk.
        gathered_bytes_per_step, reduced_bytes_per_step: of one of several ranks, at the last log; see
            :class:`phase5_training.distributed.Traffic`.
        micro_batch_size: samples per forward that fit in memory, where more did not.
        rollbacks: times that the run went back to a checkpoint because of bad numbers.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    samples: int = 0
    nonfinite: int = 0
    train_loss: float | None = None
    first_loss: float | None = None
    train_accuracy: float | None = None
    best_accuracy: float | None = None
    best_loss: float | None = None
    validation: dict[str, Any] | None = None
    logged_step: int = -1
    validated_step: int = -1
    saved_step: int = -1
    phase: str | None = None
    gathered_bytes_per_step: float | None = None
    reduced_bytes_per_step: float | None = None
    micro_batch_size: int | None = None
    rollbacks: int = 0
    stop_reason: str = ""

    def note_training(self, figures: Mapping[str, Any], skipped: int, steps: int) -> None:
        """Take the figures of a log over ``steps`` steps, of which some were skipped."""
        if skipped < steps:
            self.train_loss, self.train_accuracy = figures["loss"], figures["accuracy"]
        self.nonfinite += skipped
        self.gathered_bytes_per_step = figures.get("gathered_bytes_per_step")
        self.reduced_bytes_per_step = figures.get("reduced_bytes_per_step")

    def note_validation(self, figures: dict[str, Any]) -> None:
        """Take the figures of a validation after the current step."""
        self.validation, self.validated_step = figures, self.step
        self.best_loss = _better(self.best_loss, figures.get("loss"), min)
        self.best_accuracy = _better(self.best_accuracy, figures.get("accuracy"), max)

    def to_save(self) -> dict[str, Any]:
        """The fields as the checkpoint of this step holds them: only early stopping ends a run for good."""
        reason = self.stop_reason if self.stop_reason == "early_stop" else ""
        return {**vars(self), "stop_reason": reason, "saved_step": self.step}


def _better(best: float | None, value: float | None, choose: Callable[..., float]) -> float | None:
    if value is None or not math.isfinite(value):
        return best
    return value if best is None else choose(best, value)
