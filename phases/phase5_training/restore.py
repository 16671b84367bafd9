"""Going on with a run from one of its checkpoints."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phase5_training.checkpoint import CheckpointStore
from phase5_training.config import TrainingConfig
from phase5_training.errors import UsageError
from phase5_training.loss_registry import Loss
from phase5_training.pipeline.training_loop import TrainingLoop
from phase5_training.records import RunDirectory
from phase5_training.results import has_failed
from phase5_training.same_data import changed_data

OTHER_DATA = "bring the data back, or begin another run with another experiment_name"


@dataclass(frozen=True)
class Beginning:
    """How a run begins.

    Args:
        config: the options, with what an earlier session of the same run chose where they leave a choice.
        resuming: it goes on from a checkpoint.
        afresh: what is in its folder may be replaced.
        optimizer: the name of the optimizer that the earlier session was tuned to; None for no such.
    """

    config: TrainingConfig
    resuming: bool = False
    afresh: bool = False
    optimizer: str | None = None


def as_begun(config: TrainingConfig, *, named_optimizer: bool) -> Beginning:
    """Look at what an earlier session of the run left.

    Args:
        config: the options as given.
        named_optimizer: the optimizer is given by name, and its rates by the options.

    Raises:
        UsageError: ``resume_from`` is of no run that ``experiment_name`` names.
    """
    name = config.experiment_name
    run = RunDirectory(Path(config.output_dir) / name) if name else None
    saved = run is not None and bool(CheckpointStore(folder=run.checkpoints).paths())
    wanted = config.auto_resume or config.resume_from is not None
    resuming = wanted and saved and run is not None and run.exists()
    if config.resume_from is not None and not resuming:
        raise UsageError(
            f"resume_from={config.resume_from!r} is of no run that experiment_name names; give both"
        )
    # Before its first checkpoint a run has nothing to lose; that it has ended is known if it failed.
    empty = run is not None and not saved and not run.best.is_dir()
    afresh = empty and (config.auto_resume or has_failed(run))
    if not resuming:
        return Beginning(config, afresh=afresh)
    assert run is not None
    recorded = run.read_config()
    names = [n for n in ("use_amp", "compile") if getattr(config, n) == "auto"]
    names += [n for n in ("grokfast_alpha", "grokfast_lambda", "filter") if getattr(config, n) is None]
    tuned_to = None
    if named_optimizer:
        names += [n for n in ("learning_rate", "weight_decay") if getattr(config, n) in (None, "auto")]
        if config.learning_rate == "auto":
            names += ["optimizer", "use_grokfast"]
            tuned_to = recorded["optimizer"]
    known = config.model_copy(update={n: recorded[n] for n in names if n in recorded})
    return Beginning(known, resuming=True, optimizer=tuned_to)


def restore(
    loop: TrainingLoop,
    loss: Loss,
    run: RunDirectory,
    chosen: str | None,
    *,
    batches: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> list[str]:
    """Load a checkpoint into a loop, and drop the records of the steps that it will take again.

    Args:
        loop: made for the run that is resumed.
        loss: that it will train with.
        run: the run's folder.
        chosen: one checkpoint; None takes the newest that verifies.
        batches: of an epoch of the training data; None where they do not say.
        data: of each split, as its loader describes them, to hold against those of the last session; None on
            all ranks but the first.

    Returns:
        What is to be said: from where the run goes on, which checkpoints were refused and why, and what is
        different about the data.

    Raises:
        CheckpointError: the one that was chosen does not verify, or none does.
        UsageError: it belongs to another model, loss or optimizer, or stands at a place that the data have
            not.
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
    changed = changed_data(run.read_events(), data) if data is not None else ""
    if batches is not None and loop.state.batch > batches:
        raise UsageError(
            f"{path} cannot go on with these data: it stands after batch {loop.state.batch} of an epoch, "
            f"which has {batches} batches now{changed and f' ({changed})'}; {OTHER_DATA}"
        )
    if chosen is not None:
        refused += store.set_aside(after=path)
    # What a killed save did not come to.
    store.prune(loop.suspect())
    notices = []
    for reason in refused:
        what, *_, now = reason.split("; ")
        notices.append(f"{what}; resumed from {path.name} instead; {now}")
        warnings.warn(notices[-1], stacklevel=2)
    if changed:
        notices.append(
            f"resumed with other data than the run had: {changed}; from here on samples and their order are "
            f"not those that would have come: {OTHER_DATA}"
        )
        warnings.warn(notices[-1], stacklevel=2)
    at = loop.state
    run.truncate_metrics(at.step, at.epoch, logged=at.logged_step, validated=at.validated_step)
    run.truncate_bad_batches(at.logged_step, at.rollbacks)
    run.append_event({"event": "resumed", "step": at.step, "checkpoint": path.name})
    return [*notices, f"resumed from {path.name}"]
