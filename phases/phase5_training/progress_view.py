"""What the progress display says: a run's newest figures in, a line or a terminal panel out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from phase5_training.forecast import seconds_to_target
from phase5_training.phases import Phase
from phase5_training.report.wording import (
    MISSING,
    compact,
    duration,
    figure_value,
    is_finite,
    megabytes,
    number,
    one_line,
    rises,
    share,
)

WIDEST = 100  # columns; a wider terminal stays empty at the right
HISTORY = 4096  # values kept for the sparkline; even
_BLOCKS = "▁▂▃▄▅▆▇█"
_QUIET = "bright_black"

Metrics = dict[str, Any]


@dataclass
class Progress:
    """What is known of a run so far; ``train`` and ``validation`` hold the newest event's metrics.

    ``seconds`` is the time since ``first_step`` on the display's clock, ``seconds_before`` the time
    of the sessions before this one.
    """

    title: str = ""
    step: int = 0
    first_step: int = 0
    total_steps: int | None = None
    max_seconds: float | None = None
    target: float | None = None
    monitor: str | None = None
    phase: str = ""
    train: Metrics = field(default_factory=dict)
    validation: Metrics = field(default_factory=dict)
    best: tuple[str, float, int] | None = None  # column, figure, step
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[float, float]] = field(default_factory=list)  # seconds, monitored figure
    reached: int | None = None  # step at which the target was
    skipped: int = 0
    checkpoint: int | None = None
    ended: str = ""
    seconds: float = 0.0
    seconds_before: float = 0.0
    _pending: list[float] = field(default_factory=list)
    _stride: int = 1  # losses behind one kept value

    def take_loss(self, loss: Any) -> None:
        """Keep a loss for the sparkline; a long history is thinned evenly, to means of neighbors."""
        if not is_finite(loss):
            return
        self._pending.append(float(loss))
        if len(self._pending) < self._stride:
            return
        self.losses.append(sum(self._pending) / self._stride)
        self._pending.clear()
        if len(self.losses) == HISTORY:
            self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2], strict=True)]
            self._stride *= 2

    def take_validation(self, step: int, metrics: Metrics) -> bool:
        """Keep the figures of a validation; returns whether they are the best so far."""
        self.validation = {**metrics, "step": step}
        self._follow(step, metrics)
        column = "accuracy" if is_finite(metrics.get("accuracy")) else "loss"
        figure = metrics.get(column)
        if not is_finite(figure):
            return False
        kept = metrics.get("improved")
        if kept is False:  # the run goes by another figure, and these weights are not kept
            return False
        if kept is None and self.best is not None and self.best[0] == column:
            so_far = self.best[1]
            if figure <= so_far if column == "accuracy" else figure >= so_far:
                return False
        self.best = (column, float(figure), step)
        return True

    def _follow(self, step: int, metrics: Metrics) -> None:
        if self.monitor is None:
            self.monitor = "accuracy" if is_finite(metrics.get("accuracy")) else "loss"
        figure, seconds = metrics.get(self.monitor), metrics.get("elapsed_s")
        if not is_finite(figure):
            return
        at = seconds if is_finite(seconds) else self.seconds_before + self.seconds
        self.validations = [*self.validations[-HISTORY:], (at, float(figure))]
        better = self.target is not None and (
            figure >= self.target if self._rising else figure <= self.target
        )
        if better and self.reached is None:
            self.reached = step

    @property
    def _rising(self) -> bool:
        return rises(self.monitor or "")

    def target_worded(self) -> str:
        """When the target may be reached, or was; nothing without one."""
        if self.target is None:
            return ""
        name = f"{self.monitor or 'target'} {figure_value(self.target, self.monitor or '')}"
        if self.reached is not None:
            return f"{name} reached at step {number(self.reached)}"
        if self.ended:
            return f"{name} was not reached"
        seconds = seconds_to_target(self.validations, self.target, rising=self._rising)
        if seconds is None:
            return f"{name}: no trend towards it yet"
        end = self.eta()
        if end is not None and seconds > end:
            return f"{name}: not before the end, at this pace"
        return f"{name} in about {duration(seconds)}"

    def eta(self) -> float | None:
        """Seconds to the end of the run, or None where they cannot be told."""
        given = self.train.get("eta_s")
        if is_finite(given):
            return given
        made = self.step - self.first_step
        if made <= 0 or self.seconds <= 0 or self.ended:
            return None
        ends = []
        if self.total_steps:
            ends.append(self.seconds / made * max(0, self.total_steps - self.step))
        if self.max_seconds:
            ends.append(max(0.0, self.max_seconds - self.seconds_before - self.seconds))
        return min(ends, default=None)

    def steps_worded(self) -> str:
        """The step, out of how many."""
        return number(self.step) + (f"/{number(self.total_steps)}" if self.total_steps else "")

    def best_worded(self) -> str:
        """The best validation so far, or nothing."""
        if self.best is None:
            return ""
        column, figure, step = self.best
        worded = share(figure) if column == "accuracy" else number(figure)
        return f"best {column} {worded} at step {number(step)}"


NOTABLE_WAIT = 0.01  # share of the time waiting for data from which a plain line says so


def log_line(progress: Progress) -> str:
    """The newest training figures as one plain line.

    Example:
        >>> log_line(Progress(step=20, total_steps=100, train={"loss": 1.5}, seconds=4.0))
        'step 20/100  loss 1.5  ETA 16 s'
    """
    train = progress.train
    return _joined(
        [
            f"step {progress.steps_worded()}",
            _named("epoch", number(train.get("epoch"))),
            one_line(progress.phase, 30),
            _named("loss", number(train.get("loss"))),
            _named("accuracy", share(train.get("accuracy"))),
            _named("lr", number(train.get("lr"))),
            _unit(compact(train.get("samples_per_s")), "samples/s"),
            _data_wait(train, NOTABLE_WAIT),
            _named("ETA", duration(progress.eta())),
            progress.target_worded(),
        ]
    )


def validation_line(step: int, metrics: Metrics, best: bool) -> str:
    """The figures of a validation as one plain line.

    Example:
        >>> validation_line(500, {"loss": 0.25, "accuracy": 0.5}, best=True)
        'validation at step 500:  loss 0.25  accuracy 50.0%  (best so far)'
    """
    figures = _validation_figures(metrics)
    parts = [f"validation at step {number(step)}:", *(f"{name} {figure}" for name, figure in figures)]
    return _joined([*parts, "(best so far)" if best else ""])


def panel(progress: Progress, width: int) -> RenderableType:
    """The live view.

    Args:
        progress: what to show.
        width: of the terminal, in columns.
    """
    rows: list[RenderableType] = [
        _phase_strip(progress.phase),
        _progress_row(progress),
        _figures(progress, sparkline_width=max(8, min(width, WIDEST) - 64)),
        Text(_rates(progress.train), style=_QUIET),
    ]
    goals = _joined([progress.best_worded(), progress.target_worded()], "  ·  ")
    if goals:
        rows.append(Text(goals, style="green"))
    if progress.skipped:
        rows.append(
            Text(f"skipped steps: {number(progress.skipped)} (loss or gradient not finite)", style="yellow")
        )
    if progress.ended:
        rows.append(Text(progress.ended, style="bold"))
    elif progress.checkpoint is not None:
        rows.append(Text(f"checkpoint at step {number(progress.checkpoint)}", style=_QUIET))
    return Panel(
        Group(*rows),
        title=Text(progress.title or "training", style="bold"),
        title_align="left",
        border_style=_QUIET,
        padding=(0, 1),
        width=min(WIDEST, width),
    )


def sparkline(values: list[float], width: int) -> str:
    """Values as a row of block characters, the mean of each stretch one character.

    Positive values that span more than a factor of 30 are shown by their logarithm, as in the report.

    Args:
        values: finite figures, oldest first.
        width: the most characters to use.

    Example:
        >>> sparkline([1, 2, 3, 4], 8)
        '▁▃▆█'
    """
    if not values or width < 1:
        return ""
    if min(values) > 0 and max(values) / min(values) > 30:
        values = [math.log(value) for value in values]
    columns = min(width, len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high <= low:
        return _BLOCKS[0] * columns
    return "".join(_BLOCKS[round((mean - low) / (high - low) * 7)] for mean in means)


def _phase_strip(phase: str) -> Text:
    strip = Text()
    names = [str(member) for member in Phase]
    if phase and phase not in names:
        names.append(one_line(phase, 30))
    for index, name in enumerate(names):
        strip.append(" › " if index else "", style=_QUIET)
        strip.append(name, style="bold cyan" if name == phase else _QUIET)
    return strip


def _progress_row(progress: Progress) -> Table:
    total = progress.total_steps
    bar = ProgressBar(total=total or 1, completed=min(progress.step, total) if total else 0, style=_QUIET)
    eta = progress.eta()
    times = [f"step {progress.steps_worded()}", duration(progress.seconds_before + progress.seconds)]
    times += [f"{duration(eta)} left"] if eta is not None and not progress.ended else []
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_row(bar, Text("  ".join(times)))
    return row


def _figures(progress: Progress, sparkline_width: int) -> Table:
    train = progress.train
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style=_QUIET, no_wrap=True)
    for _ in range(3):
        figures.add_column(no_wrap=True)
    figures.add_row(
        "training",
        _figure("loss", number(train.get("loss"))),
        _figure("accuracy", share(train.get("accuracy"))) if is_finite(train.get("accuracy")) else "",
        Text(sparkline(progress.losses, sparkline_width), style="cyan"),
    )
    cells = [_figure(name, figure) for name, figure in _validation_figures(progress.validation)[:2]]
    cells = cells or [Text("none yet", style=_QUIET)]
    cells += [Text()] * (2 - len(cells))
    line = sparkline([figure for _, figure in progress.validations], sparkline_width)
    figures.add_row("validation", *cells, Text(line, style="magenta"))
    return figures


def _rates(train: Metrics) -> str:
    parts = [
        _named("lr", number(train.get("lr"))),
        _named("gradient norm", number(train.get("grad_norm"))),
        _unit(compact(train.get("samples_per_s")), "samples/s"),
        _data_wait(train, 0.0),
        _named("memory", megabytes(train.get("memory_mb"))),
        _named("CPU", share(train.get("cpu_share"))),
        _named("GPU", share(train.get("gpu_share"))),
        _named("epoch", number(train.get("epoch"))),
    ]
    return _joined([part for part in parts if part != MISSING], "  ·  ")


def _data_wait(train: Metrics, least: float) -> str:
    """The share of the time in which steps waited for data, where it is known and at least so much."""
    waited = train.get("data_wait_share")
    return _named("waiting for data", share(waited)) if is_finite(waited) and waited >= least else ""


def _validation_figures(metrics: Metrics) -> list[tuple[str, str]]:
    shown = [
        ("loss", number(metrics.get("loss"))),
        ("accuracy", share(metrics.get("accuracy"))),
        ("bits per byte", number(metrics.get("bits_per_byte"))),
        ("perplexity", number(metrics.get("perplexity"))),
    ]
    return [(name, figure) for name, figure in shown if figure != MISSING]


def _figure(name: str, worded: str) -> Text:
    return Text.assemble((f"{name} ", _QUIET), (worded, "bold"))


def _joined(parts: list[str], between: str = "  ") -> str:
    return between.join(part for part in parts if part)


def _named(name: str, worded: str) -> str:
    return "" if worded == MISSING else f"{name} {worded}"


def _unit(worded: str, unit: str) -> str:
    return "" if worded == MISSING else f"{worded} {unit}"
