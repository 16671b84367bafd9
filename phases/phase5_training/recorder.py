"""Writes what the loop reports into the run's folder."""

from typing import Any

from phase5_training.events import CallbackRegistry, Event
from phase5_training.records import RunDirectory

_ROWS = {Event.LOG: "train", Event.EVAL_END: "validation", Event.EPOCH_END: "epoch"}
_NOTED = (Event.PHASE_CHANGE, Event.NONFINITE_STEP, Event.EARLY_STOP, Event.CHECKPOINT_SAVED, Event.FIT_END)


class Recorder:
    """Rows of metrics.jsonl at each log, validation and end of an epoch; the rest goes to events.jsonl.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def register(self, registry: CallbackRegistry) -> None:
        """Hook onto the loop's events."""
        for event in (*_ROWS, *_NOTED):
            registry.register(event, self._writer(event))

    def _writer(self, event: Event) -> Any:
        if event in _ROWS:
            return lambda index, metrics: self.run.append_metrics({"kind": _ROWS[event], **metrics})
        return lambda index, metrics: self.run.append_event({"event": event.value, **metrics})
