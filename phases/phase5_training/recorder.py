"""Writes what the loop reports into the run's folder."""

from typing import Any

from phase5_training.callbacks import ProgressDisplay, ReportRefresher
from phase5_training.config import TrainingConfig
from phase5_training.events import CallbackRegistry, Event
from phase5_training.records import RunDirectory
from phase5_training.trackers import TrackerProcesses

_ROWS = {Event.LOG: "train", Event.EVAL_END: "validation", Event.EPOCH_END: "epoch"}
_BAD = (Event.NONFINITE_STEP, Event.LOSS_SPIKE)
_NOTED = (
    Event.PHASE_CHANGE,
    Event.OUT_OF_MEMORY,
    Event.EARLY_STOP,
    Event.CHECKPOINT_SAVED,
    Event.FIT_END,
)


class SilentRun(RunDirectory):
    """The folder of a run as all ranks but the first have it: read, never written."""

    def _leave_out(self, *args: Any, **options: Any) -> Any:
        """Nothing: the first rank writes it."""

    append_metrics = append_event = append_quarantine = append_bad_batch = _leave_out
    write_config = write_result = truncate_metrics = truncate_bad_batches = _leave_out


class Recorder:
    """Rows of metrics.jsonl at each log, validation and end of an epoch; the rest goes to events.jsonl.

    Batches with bad numbers go to bad_batches.jsonl, one a row. When the loop goes back to a checkpoint, the
    rows of the steps that it takes again are dropped.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def register(self, registry: CallbackRegistry) -> None:
        """Hook onto the loop's events."""
        for event in (*_ROWS, *_NOTED):
            registry.register(event, self._writer(event))
        for event in _BAD:
            registry.register(event, self._bad_batches(event))
        registry.register(Event.ROLLBACK, self._rollback)

    def _writer(self, event: Event) -> Any:
        if event in _ROWS:
            return lambda index, metrics: self.run.append_metrics({"kind": _ROWS[event], **metrics})
        return lambda index, metrics: self.run.append_event({"event": event.value, **metrics})

    def _bad_batches(self, event: Event) -> Any:
        def write(index: int, metrics: dict[str, Any]) -> None:
            for batch in metrics["batches"]:
                self.run.append_bad_batch(batch)
            rest = {key: value for key, value in metrics.items() if key != "batches"}
            self.run.append_event({"event": event.value, **rest})

        return write

    def _rollback(self, index: int, metrics: dict[str, Any]) -> None:
        metrics = dict(metrics)
        logged, validated = metrics.pop("logged_step"), metrics.pop("validated_step")
        self.run.truncate_metrics(metrics["step"], metrics["epoch"], logged=logged, validated=validated)
        self.run.append_event({"event": Event.ROLLBACK.value, **metrics})


def watch(
    registry: CallbackRegistry,
    run: RunDirectory,
    config: TrainingConfig,
    total_steps: int,
    monitor: str,
    first: str = "",
) -> None:
    """Have a run recorded, shown while it goes on, and its report refreshed.

    Args:
        registry: of the loop.
        run: the run's folder.
        config: its options.
        total_steps: its length in optimizer steps.
        monitor: the figure that decides which weights are best, to which the target belongs.
        first: a sentence that the display begins with.
    """
    Recorder(run).register(registry)
    mode = {"auto": "auto", "plain": "lines", "quiet": "quiet"}[config.progress]
    ProgressDisplay(
        mode,  # type: ignore[arg-type]
        title=run.path.name,
        # A run that only its time ends has no length in steps worth showing.
        total_steps=None if config.max_seconds and not config.max_steps else total_steps,
        max_seconds=config.max_seconds,
        target=config.target,
        monitor=monitor,
        run=run,
        first=first,
    ).register(registry)
    ReportRefresher(run).register(registry)
    if config.trackers:
        TrackerProcesses(config.trackers, run, config.tracker_project).register(registry)
