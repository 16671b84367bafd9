"""Going on with a run from one of its checkpoints."""

import warnings
from pathlib import Path
from typing import Any

from phase5_training.errors import UsageError
from phase5_training.loss_registry import Loss
from phase5_training.pipeline.training_loop import TrainingLoop
from phase5_training.records import RunDirectory


def restore(loop: TrainingLoop, loss: Loss, run: RunDirectory, chosen: str | None) -> list[str]:
    """Load a checkpoint into a loop, and drop the records of the steps that it will take again.

    Args:
        loop: made for the run that is resumed.
        loss: that it will train with.
        run: the run's folder.
        chosen: one checkpoint; None takes the newest that verifies.

    Returns:
        What is to be said: from where the run goes on, and which checkpoints were refused and why.

    Raises:
        CheckpointError: the one that was chosen does not verify, or none does.
        UsageError: it belongs to another model, loss or optimizer.
    """
    store: Any = loop.checkpoints
    refused: list[str] = []
    if chosen is not None:
        path, state = Path(chosen), store.load(Path(chosen))
    else:
        path, state = store.load_newest(refused.append)
    try:
        loop.load_state_dict(state, loss)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} does not fit this run ({str(error).splitlines()[0]}); resume with the model, loss and "
            "optimizer that it was started with"
        ) from error
    if chosen is not None:
        refused += store.set_aside(after=path)
    # What a killed save did not come to.
    store.prune(loop.suspect())
    notices = []
    for reason in refused:
        what, *_, now = reason.split("; ")
        notices.append(f"{what}; resumed from {path.name} instead; {now}")
        warnings.warn(notices[-1], stacklevel=2)
    at = loop.state
    run.truncate_metrics(at.step, at.epoch, logged=at.logged_step, validated=at.validated_step)
    run.truncate_bad_batches(at.logged_step, at.rollbacks)
    run.append_event({"event": "resumed", "step": at.step, "checkpoint": path.name})
    return [*notices, f"resumed from {path.name}"]
