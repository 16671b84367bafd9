"""The progress of a run in another process, from the files that it writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from phase5_training.callbacks import Mode, ProgressDisplay
from phase5_training.events import CallbackRegistry, Event
from phase5_training.follow import RowFollower, is_alive
from phase5_training.records import EVENTS, METRICS, RunDirectory

POLL_S = 1.0
GRACE_S = 10.0  # for a supervisor to start the next session of a run that died
_ROWS = {"train": Event.LOG, "validation": Event.EVAL_END, "epoch": Event.EPOCH_END}
_EVENTS = (Event.PHASE_CHANGE, Event.CHECKPOINT_SAVED, Event.EARLY_STOP, Event.NONFINITE_STEP)


class RunWatcher:
    """Follows a run until it ends or dies, through resumes and rollbacks, and changes nothing of it.

    Args:
        run: the run's folder.
        mode: of the display; see :class:`ProgressDisplay`.
        console: where to draw; default standard output.
        grace_s: seconds to wait for a next session when the process of the run is gone.
        sleep: called between two looks at the files.
    """

    def __init__(
        self,
        run: RunDirectory,
        mode: Mode = "auto",
        *,
        console: Console | None = None,
        grace_s: float = GRACE_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.run, self.grace_s = run, grace_s
        self._mode, self._console, self._sleep = mode, console, sleep
        self._rows, self._events = RowFollower(run.path / METRICS), RowFollower(run.path / EVENTS)
        self._session: dict[str, Any] = {}
        self._end: dict[str, Any] | None = None
        self._begin()

    def follow(self) -> int:
        """Show the run until its end; 0 when it ended well, 1 when it failed or died."""
        gone_since: float | None = None
        try:
            self._look(catching_up=True)
            while self._end is None:
                self._sleep(POLL_S)
                if self._look():
                    gone_since = None
                elif is_alive(self._session) is False:
                    gone_since = gone_since or time.monotonic()
                    if time.monotonic() - gone_since >= self.grace_s:
                        self._display.close()
                        self._display.tell(
                            f"the process of the run, {self._session.get('pid')}, is gone; continue with: "
                            f"forge resume {self.run.path}"
                        )
                        return 1
        finally:
            self._display.close()
        reason = self._end.get("stop_reason")
        if reason == "interrupted":
            self._display.tell(f"continue with: forge resume {self.run.path}")
        return 1 if reason == "failed" else 0

    def _begin(self) -> None:
        """A display that knows nothing yet."""
        config = self.run.read_config() if (self.run.path / "config.yaml").is_file() else {}
        self._clock = _RunClock()
        self._registry = CallbackRegistry()
        self._display = ProgressDisplay(
            self._mode,
            title=self.run.name,
            max_seconds=config.get("max_seconds"),
            target=config.get("target"),
            monitor=config.get("monitor"),
            console=self._console,
            clock=self._clock,
        )
        self._endless = bool(config.get("max_seconds")) and not config.get("max_steps")
        self._display.register(self._registry)
        self._display.muted = True
        self._registry.fire(Event.FIT_START, 0, {"total_steps": self._total_steps()})
        self._display.muted = False

    def _total_steps(self) -> int | None:
        # A run that only its time ends has no length in steps worth showing.
        return None if self._endless else self._session.get("total_steps")

    def _look(self, catching_up: bool = False) -> bool:
        """Show what is new; returns whether there was something."""
        anew, rows = self._rows.read()
        _, events = self._events.read()
        if anew:
            # Rows were taken back: the run went on from an earlier step.
            self._display.close()
            self._begin()
        self._display.muted = catching_up or anew
        for event in events:
            self._take_event(event)
        for row in rows:
            self._take_row(row)
        self._display.muted = False
        self._clock.runs = self._end is None and is_alive(self._session) is not False
        if self._end is not None:
            self._registry.fire(Event.FIT_END, self._end.get("step", 0), self._end)
        elif catching_up or anew or self._display.mode == "live":
            self._display.show()
        return bool(rows or events)

    def _take_event(self, event: dict[str, Any]) -> None:
        name = event.get("event")
        if name == "session":
            self._session, self._end = event, None
        elif name == Event.FIT_END:
            self._end = event
        elif name in _EVENTS:
            self._registry.fire(Event(name), event.get("step", 0), event)

    def _take_row(self, row: dict[str, Any]) -> None:
        if row.get("elapsed_s") is not None:
            self._clock.set(row["elapsed_s"])
        event = _ROWS.get(str(row.get("kind")))
        if event is not None:
            index = row.get("epoch", 0) if event is Event.EPOCH_END else row.get("step", 0)
            self._registry.fire(event, index, {**row, "total_steps": self._total_steps()})


class _RunClock:
    """Seconds of the run: those of its newest row, and what has passed since while it runs."""

    def __init__(self) -> None:
        self._at, self._seen, self.runs = 0.0, time.monotonic(), False

    def set(self, seconds: float) -> None:
        self._at, self._seen = seconds, time.monotonic()

    def __call__(self) -> float:
        return self._at + (time.monotonic() - self._seen if self.runs else 0.0)
