"""What a run gives back, and the record of it in result.json."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from phase4_bitnet.store import save_compressed_model
from phase5_training.errors import RunFailed
from phase5_training.follow import this_process
from phase5_training.loop_state import LoopState
from phase5_training.loss_registry import Loss
from phase5_training.models import describe_layers, describe_size
from phase5_training.phases import Phase
from phase5_training.records import RunDirectory, machine

# A loss of so many times the first one is no bad luck of a batch.
BLOWN_UP = 10


@dataclass(frozen=True)
class TrainingResult:
    """What a run gives back.

    Args:
        success: the run came to its end; False when it was interrupted.
        model: the trained model, in eval mode, with the best weights where validation chose some.
        metrics: final_loss, final_accuracy, best_val_loss, best_accuracy, epochs_completed, steps,
            training_time_hours, and the other figures of the last validation; with several processes
            gathered_bytes_per_step and reduced_bytes_per_step, what this one sent.
        run_dir: the run's folder.
        stop_reason: why it ended: "finished", "early_stop", "max_steps", "max_seconds", "interrupted".
        notice: what the way it ended calls for, in one line; empty for nothing.
    """

    success: bool
    model: nn.Module
    metrics: dict[str, Any] = field(default_factory=dict)
    run_dir: Path = Path()
    stop_reason: str = ""
    notice: str = ""

    def to_phase6(self) -> dict[str, Any]:
        """The dictionary that the next phase takes: success, model and metrics."""
        return {"success": self.success, "model": self.model, "metrics": dict(self.metrics)}


def result_metrics(state: LoopState) -> dict[str, Any]:
    """The figures of a run that ended in ``state``; see :class:`TrainingResult`."""
    validation = state.validation or {}
    metrics: dict[str, Any] = {
        "final_loss": validation.get("loss", state.train_loss),
        "final_accuracy": validation.get("accuracy", state.train_accuracy),
        "final_train_loss": state.train_loss,
        "best_val_loss": state.best_loss,
        "best_accuracy": state.best_accuracy,
        "epochs_completed": state.epoch,
        "steps": state.step,
        "samples": state.samples,
        "nonfinite_steps": state.nonfinite,
        "training_time_seconds": state.seconds,
        "training_time_hours": state.seconds / 3600,
    }
    if state.reduced_bytes_per_step is not None:
        metrics["gathered_bytes_per_step"] = state.gathered_bytes_per_step
        metrics["reduced_bytes_per_step"] = state.reduced_bytes_per_step
    for key in ("perplexity", "bits_per_byte", "mse", "mae", "r2"):
        if validation.get(key) is not None:
            metrics[key] = validation[key]
    return metrics


def end_notice(state: LoopState, total_steps: int) -> str:
    """What the way a run ended calls for, in one line; empty for nothing."""
    if state.stop_reason != "max_seconds" or state.phase in (None, Phase.REFINEMENT):
        return ""
    return (
        f"max_seconds ended the run in the {state.phase} phase of its schedule, at step {state.step} of "
        f"{total_steps}; give the max_steps that fit in the time, or schedule='constant'"
    )


def has_failed(run: RunDirectory | None) -> bool:
    """Whether a run has ended by a failure."""
    record = run.read_result() if run is not None else None
    return record is not None and record.get("stop_reason") == "failed"


def check_trained(state: LoopState) -> None:
    """Whether a run that came to its end has anything to show.

    Raises:
        RunFailed: no step was taken or most were skipped, no finite figure came out, or the loss blew up.
    """
    remedy = "lower learning_rate, or check the data for huge values"
    if not state.step:
        raise RunFailed(f"the run ended by {state.stop_reason} before its first step; give it more")
    if state.nonfinite >= state.step:
        raise RunFailed(
            f"all {state.step} steps were skipped: their loss or gradient was not finite; {remedy}"
        )
    if state.validation is not None and state.best_loss is None:
        raise RunFailed(f"no validation up to step {state.step} gave a finite loss; {remedy}")
    if 2 * state.nonfinite > state.step:
        raise RunFailed(
            f"{state.nonfinite} of {state.step} steps were skipped: their loss or gradient was not finite; "
            f"{remedy}"
        )
    final = (state.validation or {}).get("loss", state.train_loss)
    if final is None or not math.isfinite(final):
        raise RunFailed(f"the final loss, at step {state.step}, is {final} and not a finite number; {remedy}")
    last, first = state.train_loss, state.first_loss
    # Overfitting raises the validation loss alone, and where the best weights are returned theirs is low.
    if first is not None and last is not None and min(final, last) > BLOWN_UP * first > 0:
        raise RunFailed(
            f"the loss blew up from {first:.4g} at step 1 to {last:.4g} at step {state.step}; {remedy}"
        )


def store_best(model: nn.Module, run: RunDirectory) -> None:
    """Write a finished model into the run's folder.

    Raises:
        RunFailed: the disk does not take it; the last checkpoint holds it.
    """
    try:
        save_compressed_model(model, run.best, overwrite=True)
    except OSError as error:
        raise RunFailed(
            f"the model cannot be written to {run.best} ({error.strerror or error}), but the last "
            f"checkpoint holds it; make room there, then `forge resume {run.path}`"
        ) from error


def described(train_loader: Any, val_loader: Any) -> dict[str, Any]:
    """What the data of a run are, as its loaders say."""
    loaders = {"train": train_loader, "validation": val_loader}
    return {name: loader.description() for name, loader in loaders.items() if loader is not None}


def session_record(model: nn.Module, data: dict[str, Any], total_steps: int) -> dict[str, Any]:
    """The event of a session's begin: the process, and what is known before the result."""
    return {
        "event": "session",
        **this_process(),
        "total_steps": total_steps,
        "data": data,
        "machine": machine(),
        "layers": describe_layers(model),
        "model": describe_size(model),
    }


def result_record(
    result: TrainingResult, *, data: dict[str, Any], notices: list[str], loss: Loss
) -> dict[str, Any]:
    """What result.json holds: the result, the data, the machine and the model, without the weights."""
    learned = loss.state_dict() if loss.kind == "multi_task" else {}
    return {
        "success": result.success,
        "stop_reason": result.stop_reason,
        "metrics": result.metrics,
        "loss": {"name": loss.name, "learned": {k: v.tolist() for k, v in learned.items()}},
        "data": data,
        "machine": machine(),
        "layers": describe_layers(result.model),
        "model": describe_size(result.model),
        "notices": notices,
    }
