"""Brings what metrics.jsonl holds into a tracker, and keeps it so while the file grows or is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from phase5_training.follow import RowFollower
from phase5_training.records import EVENTS, METRICS, RunDirectory
from phase5_training.trackers.backends import BACKENDS

POLL_S = 1.0

Figures = dict[str, float | int | str]


class Tracker(Protocol):
    """What a tracker's library is asked; see :mod:`phase5_training.trackers.backends`."""

    def begin(self) -> None:
        """Start the mirror anew: what an earlier session wrote of this run goes."""

    def add(self, step: int, figures: Figures, seconds: float) -> None:
        """Take the figures of a row; steps never go back. ``seconds`` are those of the run so far."""

    def end(self) -> None:
        """Write what is left."""


def mirror(
    run: RunDirectory, name: str, project: str, run_is_over: Callable[[float], bool] = lambda seconds: True
) -> int:
    """Mirror a run into a tracker until the run is over and everything is written.

    The mirror begins with the first row of metrics.jsonl, also when the run goes on after an
    interruption, and begins anew when rows are taken back (a rollback, or a resume from a checkpoint
    before them). So it holds each row once, and none that the run has taken back.

    Args:
        run: the run's folder.
        name: of the tracker.
        project: under which it lists the run.
        run_is_over: waits at most so many seconds, and says whether no more rows will come.

    Returns:
        How many rows the mirror holds.
    """
    rows_of, events_of = RowFollower(run.path / METRICS), RowFollower(run.path / EVENTS)
    layers: list[str] = []
    tracker: Tracker = BACKENDS[name](run, project)
    begun, held, seconds = False, 0, 0.0
    over = False
    while True:
        anew, rows = rows_of.read()
        if anew and begun:
            tracker.end()
            tracker, begun, held, seconds = BACKENDS[name](run, project), False, 0, 0.0
        for event in events_of.read()[1]:
            if event.get("event") == "session":
                layers = [layer["name"] for layer in event["layers"]]
        if not begun and (rows or over):
            tracker.begin()
            begun = True
        # Of one reading: a row of an epoch's end may stand behind one of a later step.
        for row in sorted(rows, key=lambda row: row.get("step", 0)):
            seconds = row.get("elapsed_s") or seconds
            tracker.add(row.get("step", 0), figures_of(row, layers), seconds)
        held += len(rows)
        if over:
            break
        over = run_is_over(POLL_S)
    tracker.end()
    return held


def figures_of(row: Mapping[str, Any], layers: Sequence[str] = ()) -> Figures:
    """A row as a tracker takes it: names with the row's kind before them, lists spread over the layers.

    Example:
        >>> figures_of({"kind": "train", "step": 10, "loss": 0.5, "accuracy": None, "phase": "warmup"})
        {'train/loss': 0.5, 'train/phase': 'warmup'}
        >>> figures_of({"kind": "train", "step": 10, "layer_zero_share": [0.25, 0.5]}, ["up", "down"])
        {'train/layer_zero_share/up': 0.25, 'train/layer_zero_share/down': 0.5}
    """
    kind = row.get("kind", "train")
    rest = {key: value for key, value in row.items() if key not in ("kind", "step")}
    return _flat(f"{kind}/", rest, layers)


def _flat(prefix: str, values: Mapping[str, Any], layers: Sequence[str]) -> Figures:
    figures: Figures = {}
    for key, value in values.items():
        if isinstance(value, list):
            named = {layers[i] if i < len(layers) else str(i): item for i, item in enumerate(value)}
            figures |= _flat(f"{prefix}{key}/", named, ())
        elif isinstance(value, Mapping):
            figures |= _flat(f"{prefix}{key}/", value, layers)
        elif value is not None:
            figures[prefix + key] = int(value) if isinstance(value, bool) else value
    return figures
