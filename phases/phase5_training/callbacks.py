"""What shows a run while it goes on: the progress display and the report kept fresh.

Both are driven by the loop's events and neither can stop the loop: whatever goes wrong with a
terminal or a file is noted in the run's events.jsonl and the run continues.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.live import Live

from phase5_training.errors import UsageError
from phase5_training.events import CallbackRegistry, Event
from phase5_training.progress_view import Progress, log_line, panel, validation_line
from phase5_training.records import RunDirectory
from phase5_training.report.wording import duration, is_finite, number, one_line, stop_reason

Mode = Literal["auto", "live", "lines", "quiet"]
MODES = ("auto", "live", "lines", "quiet")
FRAME_S = 0.1  # a terminal is redrawn at most this often

Metrics = dict[str, Any]


class ProgressDisplay:
    """Shows a run on a terminal, or as plain lines where there is none.

    On a terminal: a bar, the phase, loss, accuracy, validation figures, learning rate, speed, time
    left and the loss as a sparkline. Elsewhere: one line per log, at most one each ``interval_s``,
    and one per validation, without escape codes. ``NO_COLOR`` is respected.

    Keys read, all optional (missing, None and non-finite figures show as a dash):

    - ``fit_start``: ``total_steps``, ``phase``
    - ``step_end``: nothing but the index
    - ``log``: ``epoch``, ``total_steps``, ``phase``, ``loss``, ``accuracy``, ``lr``, ``grad_norm``,
      ``samples_per_s``, ``memory_mb``, ``elapsed_s``, ``eta_s``, ``nonfinite_steps``
    - ``eval_end``: ``loss``, ``accuracy``, ``perplexity``, ``bits_per_byte``
    - ``phase_change``: ``phase``; ``checkpoint_saved``: ``path``; ``early_stop``: nothing;
      ``nonfinite_step``: ``skipped``, ``total``; ``epoch_end``: nothing but the index
    - ``fit_end``: ``stop_reason``, ``elapsed_s``

    Args:
        mode: "auto" is "live" on a terminal that can show it and "lines" elsewhere; "quiet" prints
            nothing.
        title: the experiment's name.
        total_steps: length of the run in optimizer steps, for the bar and the time left.
        max_seconds: the run ends after this much time, when its steps have not ended it before.
        target: figure of the validation to head for; the display says when it may be reached.
        monitor: which figure that is; None is accuracy where there is one, else the loss.
        run: where to note that the display had to be turned off.
        first: a sentence to begin with, once.
        console: where to draw; default standard output.
        interval_s: the least time between two plain log lines, in seconds.
        clock: seconds, monotonic.

    Example:
        >>> from phase5_training.events import CallbackRegistry, Event
        >>> registry = CallbackRegistry()
        >>> ProgressDisplay("lines", total_steps=100).register(registry)
        >>> registry.fire(Event.FIT_START, 0, {})
        >>> registry.fire(Event.LOG, 10, {"phase": "warmup", "loss": 2.5, "accuracy": 0.25, "eta_s": 9})
        step 10/100  warmup  loss 2.5  accuracy 25.0%  ETA 9 s
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        title: str = "",
        total_steps: int | None = None,
        max_seconds: float | None = None,
        target: float | None = None,
        monitor: str | None = None,
        run: RunDirectory | None = None,
        first: str = "",
        console: Console | None = None,
        interval_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if mode not in MODES:
            raise UsageError(f"mode={mode!r} is no progress display; use one of {', '.join(MODES)}")
        self.run = run
        self.interval_s = interval_s
        self.muted = False
        """Take figures and show nothing, as while the past of a run is read."""
        self._clock = clock
        self._console = console
        self._first = first
        self.mode: str = fitting_mode(console) if mode == "auto" else mode
        self._progress = Progress(
            title=one_line(title, 60),
            total_steps=total_steps,
            max_seconds=max_seconds,
            target=target,
            monitor=monitor,
        )
        self._live: Live | None = None
        self._started = clock()
        self._last_line = self._last_frame = -math.inf

    def register(self, registry: CallbackRegistry) -> None:
        """Hook the display onto the loop's events."""
        if self.mode == "quiet":
            return
        handlers: dict[Event, Callable[[int, Metrics], None]] = {
            Event.FIT_START: self._fit_start,
            Event.LOG: self._log,
            Event.EVAL_END: self._eval_end,
            Event.PHASE_CHANGE: self._phase_change,
            Event.CHECKPOINT_SAVED: self._checkpoint_saved,
            Event.EARLY_STOP: self._early_stop,
            Event.NONFINITE_STEP: self._nonfinite_step,
            Event.EPOCH_END: self._epoch_end,
            Event.FIT_END: self._fit_end,
        }
        if self.mode == "live":  # lines have nothing to say at every step
            handlers[Event.STEP_END] = self._step_end
        for event, handler in handlers.items():
            registry.register(event, self._guarded(handler))

    def show(self) -> None:
        """Show the newest figures now."""
        self._guarded(lambda index, metrics: self._show())(0, {})

    def tell(self, text: str) -> None:
        """Print a line, unless the display is quiet."""
        if self.mode not in ("quiet", "off"):
            (self._console or Console()).print(
                one_line(text, 400), markup=False, highlight=False, soft_wrap=True
            )

    def _show(self) -> None:
        if self._progress.train:
            self._say(log_line(self._progress))
        self._draw(now=True)

    def close(self) -> None:
        """Give the terminal back; called at fit_end, harmless to call again."""
        live, self._live = self._live, None
        if live is not None:
            self._guarded(lambda index, metrics: live.stop())(0, {})

    def _guarded(self, handler: Callable[[int, Metrics], None]) -> Callable[[int, Metrics], None]:
        def guarded(index: int, metrics: Metrics) -> None:
            if self.mode == "off":
                return
            try:
                handler(index, metrics)
            except Exception as error:  # a display is never worth a run
                self._turn_off(error, index)

        return guarded

    def _turn_off(self, error: Exception, step: int) -> None:
        self.mode = "off"
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(Exception):
                live.stop()  # restores sys.stdout even when it can print no more
        if isinstance(error, BrokenPipeError):
            _silence_standard_output()
        if self.run is not None:
            with contextlib.suppress(Exception):
                reason = f"{type(error).__name__}: {error}"
                self.run.append_event({"event": "display_off", "step": step, "error": reason})

    def _fit_start(self, step: int, metrics: Metrics) -> None:
        progress = self._progress
        progress.step = progress.first_step = step
        progress.total_steps = metrics.get("total_steps") or progress.total_steps
        progress.phase = str(metrics.get("phase") or progress.phase)
        before = metrics.get("elapsed_s")
        progress.seconds_before = before if is_finite(before) else 0.0
        progress.ended = ""
        self._started = self._clock()
        if self._first:
            self.tell(self._first)
            self._first = ""
        if self.mode == "live":
            console = self._console or Console()
            # rich answers a broken pipe by ending the program.
            setattr(console, "on_broken_pipe", _raise_broken_pipe)  # noqa: B010 (a method, to mypy)
            # No refreshing thread: an error in it could not be caught here.
            self._live = Live(panel(progress, console.width), console=console, auto_refresh=False)
            self._live.start(refresh=True)
        elif step:
            self._say(f"resumed at step {number(step)}")

    def _step_end(self, step: int, metrics: Metrics) -> None:
        self._progress.step = step
        self._draw()

    def _log(self, step: int, metrics: Metrics) -> None:
        progress = self._progress
        progress.step, progress.train = step, metrics
        progress.phase = str(metrics.get("phase") or progress.phase)
        progress.total_steps = metrics.get("total_steps") or progress.total_steps
        progress.skipped = metrics.get("nonfinite_steps") or progress.skipped
        progress.seconds = self._clock() - self._started
        progress.take_loss(metrics.get("loss"))
        due = self._clock() - self._last_line >= self.interval_s
        if self.mode == "lines" and due and not self.muted:
            self._last_line = self._clock()
            self._say(log_line(progress))
        self._draw()

    def _eval_end(self, step: int, metrics: Metrics) -> None:
        self._progress.step = step
        best = self._progress.take_validation(step, metrics)
        self._say(validation_line(step, metrics, best))
        self._draw(now=True)

    def _phase_change(self, step: int, metrics: Metrics) -> None:
        self._progress.phase = str(metrics.get("phase") or self._progress.phase)
        self._say(f"phase {self._progress.phase} from step {number(step)}")
        self._draw(now=True)

    def _checkpoint_saved(self, step: int, metrics: Metrics) -> None:
        self._progress.checkpoint = step
        path = metrics.get("path")
        self._say(f"checkpoint of step {number(step)} saved" + (f": {path}" if path else ""))
        self._draw(now=True)

    def _early_stop(self, step: int, metrics: Metrics) -> None:
        self._say(f"stopping early at step {number(step)}: validation has stopped improving")

    def _nonfinite_step(self, step: int, metrics: Metrics) -> None:
        total, skipped = metrics.get("total"), metrics.get("skipped")
        skipped = int(skipped) if is_finite(skipped) else 1
        # The log event before this one may have brought the new total already.
        self._progress.skipped = int(total) if is_finite(total) else self._progress.skipped + skipped
        self._say(
            f"warning: {number(skipped)} of the steps up to {number(step)} skipped, "
            f"loss or gradient not finite ({number(self._progress.skipped)} in all)"
        )
        self._draw()

    def _epoch_end(self, epoch: int, metrics: Metrics) -> None:
        self._progress.train = {**self._progress.train, "epoch": epoch}
        self._draw()

    def _fit_end(self, step: int, metrics: Metrics) -> None:
        progress = self._progress
        progress.step = step
        progress.seconds = self._clock() - self._started
        elapsed = metrics.get("elapsed_s")
        total = elapsed if is_finite(elapsed) else progress.seconds_before + progress.seconds
        reason = metrics.get("stop_reason")
        words = f"ended at step {number(step)} after {duration(total)}"
        progress.ended = words + (f": {stop_reason(reason)}" if reason else "")
        best = progress.best_worded()
        self._say(progress.ended + (f"; {best}" if best else ""))
        self._draw(now=True)
        self.close()

    def _say(self, text: str) -> None:
        if self.mode != "lines" or self.muted:
            return
        stream = self._console.file if self._console else sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        # A name in a script the terminal cannot show must not end the display.
        stream.write(one_line(text, 400).encode(encoding, "replace").decode(encoding) + "\n")
        stream.flush()

    def _draw(self, now: bool = False) -> None:
        if self._live is None or self.muted:
            return
        clock = self._clock()
        if now or clock - self._last_frame >= FRAME_S:
            self._last_frame = clock
            self._progress.seconds = clock - self._started
            self._live.update(panel(self._progress, self._live.console.width), refresh=True)


class ReportRefresher:
    """Keeps report.html fresh while the run goes on.

    It is written at ``eval_end``, at most every ``interval_s`` seconds, and less often where rendering would
    take more than ``share`` of the run's time. Who ends the run calls :meth:`refresh` once its result is
    there. A failure is appended to events.jsonl as "report_failed" and printed once; the run goes on.

    Args:
        run: the run whose report it is.
        interval_s: the least time between two reports, in seconds.
        share: the largest share of the run's time that rendering may take.
        stream: where a failure is printed; default standard error.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        run: RunDirectory,
        interval_s: float = 15.0,
        *,
        share: float = 0.02,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run = run
        self.interval_s = interval_s
        self.share = share
        self._stream = stream
        self._clock = clock
        # Drawing takes as long as 20 steps of a small model, and a run of seconds is drawn when it ends.
        self._next = clock() + interval_s
        self._told = False

    def register(self, registry: CallbackRegistry) -> None:
        """Hook onto ``eval_end``; no key of its metrics is read."""
        registry.register(Event.EVAL_END, self._eval_end)

    def _eval_end(self, step: int, metrics: Metrics) -> None:
        if self._clock() >= self._next:
            self.refresh(step)

    def refresh(self, step: int | None = None) -> bool:
        """Write the report now; returns whether it could be written, and never raises.

        Args:
            step: the optimizer step noted with a failure.
        """
        start = self._clock()
        try:
            from phase5_training.report import write_report

            write_report([self.run.path])
        except Exception as error:  # whatever it is, the run is worth more
            self._failed(error, step)
            return False
        finally:
            spent = self._clock() - start
            self._next = self._clock() + max(self.interval_s, spent / self.share)
        return True

    def _failed(self, error: Exception, step: int | None) -> None:
        reason = f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            self.run.append_event({"event": "report_failed", "step": step, "error": reason})
        if not self._told:
            self._told = True
            with contextlib.suppress(Exception):
                words = f"the report could not be written ({one_line(reason)}); the run goes on"
                print(words, file=self._stream or sys.stderr)


def fitting_mode(console: Console | None = None) -> str:
    """What "auto" is: "live" on a terminal that can show it, else "lines"."""
    if console is None:
        stream = sys.stdout
        try:
            # Not rich's own test: it also says yes when FORCE_COLOR is set and the output is a file.
            if stream is None or not stream.isatty():
                return "quiet" if stream is None else "lines"
        except ValueError:  # closed
            return "quiet"
        console = Console()
    able = console.is_terminal and not console.is_dumb_terminal and console.width >= 60
    return "live" if able and console.encoding.lower().startswith("utf") else "lines"


def _raise_broken_pipe() -> None:
    raise BrokenPipeError("the reader of the output has gone")


def _silence_standard_output() -> None:
    """Point standard output at nothing, or Python complains again when it flushes at exit."""
    with contextlib.suppress(Exception):
        stream = sys.__stdout__
        if stream is not None and sys.stdout is stream:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
