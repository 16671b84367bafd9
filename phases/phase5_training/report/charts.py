"""Which curves a report shows: metrics rows in, charts of plain numbers out; nothing is drawn here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from phase5_training.report.wording import compact, duration, is_finite, megabytes, number, share

POINTS_PER_CHART = 1600
SMOOTH_FROM = 60  # rows; a shorter curve shows its own trend

Row = dict[str, Any]
Points = tuple[list[float], list[float]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart. ``color`` counts from 0 through the palette; NaN never occurs in ``y``."""

    label: str
    x: list[float]
    y: list[float]
    color: int
    faint: bool = False  # the raw rows behind a running mean


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart, ready to draw and to put into words."""

    key: str
    title: str
    series: list[Series]
    x_label: str = "optimizer step"
    show: Callable[[Any], str] = number  # words a value of y
    log: bool = False
    phases: list[tuple[str, float, float]] = field(default_factory=list)  # name, first and last x
    phase_legend: bool = False
    notes: list[str] = field(default_factory=list)
    alternative: str = ""  # what the picture shows, in words
    cells: list[list[float]] = field(default_factory=list)  # a picture of rows and columns, not of lines
    cells_end: float = 0.0  # x at the right edge of the cells


@dataclass(frozen=True, kw_only=True)
class _Panel:
    key: str
    title: str
    column: str
    kinds: tuple[str, ...] = ("train",)
    show: Callable[[Any], str] = number
    may_log: bool = False
    best: str = ""  # "lowest" or "highest": what to point out


PANELS = (
    _Panel(
        key="loss", title="Loss", column="loss", kinds=("train", "validation"), may_log=True, best="lowest"
    ),
    _Panel(
        key="accuracy",
        title="Accuracy",
        column="accuracy",
        kinds=("train", "validation"),
        show=share,
        best="highest",
    ),
    _Panel(
        key="perplexity",
        title="Perplexity",
        column="perplexity",
        kinds=("validation",),
        may_log=True,
        best="lowest",
    ),
    _Panel(
        key="bits-per-byte",
        title="Bits per byte",
        column="bits_per_byte",
        kinds=("validation",),
        best="lowest",
    ),
    _Panel(key="learning-rate", title="Learning rate", column="lr"),
    _Panel(key="gradient-norm", title="Gradient norm", column="grad_norm", may_log=True),
    _Panel(
        key="slow-ratio",
        title="Slow average over raw gradient",
        column="slow_ratio",
        may_log=True,
    ),
    _Panel(key="zero-codes", title="Zero codes", column="zero_share", show=share),
    _Panel(key="flips", title="Codes changed by one step", column="flip_share", show=share),
    _Panel(key="throughput", title="Samples per second", column="samples_per_s", show=compact),
    _Panel(key="data-wait", title="Time spent waiting for data", column="data_wait_share", show=share),
    _Panel(key="cpu", title="Use of the processor's cores", column="cpu_share", show=share),
    _Panel(key="gpu", title="Use of the GPU", column="gpu_share", show=share),
    _Panel(key="memory", title="Peak memory in MB", column="memory_mb", show=megabytes),
)
LAYER_PANELS = (
    _Panel(key="layer-zeros", title="Zero codes by layer", column="layer_zero_share", show=share),
    _Panel(
        key="layer-flips", title="Codes changed by one step, by layer", column="layer_flip_share", show=share
    ),
)
LAYERS_AS_LINES = 6  # more lines than that cannot be told apart
CELLS_ACROSS = 120


def charts_of(runs: Sequence[tuple[str, list[Row]]]) -> tuple[list[Chart], list[str]]:
    """The charts of one run, or of several overlaid.

    Args:
        runs: (name, rows of metrics.jsonl) of each run.

    Returns:
        The charts, and the titles of those left out because no run recorded their figures.
    """
    charts: list[Chart] = []
    absent: list[str] = []
    phases = phase_spans(runs[0][1]) if len(runs) == 1 else []
    for panel in PANELS:
        if len(runs) > 1 and len(panel.kinds) > 1:
            # Overlaid, train and validation of every run in one picture cannot be told apart.
            split = [
                (kind, f"{panel.title}, {'training' if kind == 'train' else kind}") for kind in panel.kinds
            ]
        else:
            split = [("", panel.title)]
        for kind, title in split:
            kinds = (kind,) if kind else panel.kinds
            chart = _chart(panel, kinds, title, f"{panel.key}-{kind}".strip("-"), runs, phases)
            if chart is None:
                absent.append(title)
            else:
                charts.append(chart)
    return charts, absent


def layer_charts(rows: Sequence[Row], names: Sequence[str]) -> list[Chart]:
    """Charts of the figures that rows have for each layer, one line a layer or, of many, one row of cells.

    Args:
        rows: of metrics.jsonl of one run.
        names: of the layers, in the order of the rows' lists.
    """
    charts = []
    for panel in LAYER_PANELS:
        known = [
            (float(row["step"]), row[panel.column])
            for row in rows
            if row.get("kind") == "train"
            and is_finite(row.get("step"))
            and _all_finite(row.get(panel.column))
        ]
        # A run that was resumed with another model would be another run: all rows have the same layers.
        known = [(x, y) for x, y in known if len(y) == len(known[-1][1])]
        if known:
            charts.append(_layer_chart(panel, known, names, phase_spans(rows)))
    return charts


def _layer_chart(
    panel: _Panel,
    known: list[tuple[float, list[float]]],
    names: Sequence[str],
    phases: list[tuple[str, float, float]],
) -> Chart:
    x, layers = [x for x, _ in known], list(zip(*(y for _, y in known), strict=True))
    labels = [names[i] if i < len(names) else f"layer {i + 1}" for i in range(len(layers))]
    last = sorted((layer[-1], label) for layer, label in zip(layers, labels, strict=True))
    notes = [f"lowest at the end: {panel.show(last[0][0])}, {last[0][1]}"]
    if len(last) > 1:
        notes.append(f"highest at the end: {panel.show(last[-1][0])}, {last[-1][1]}")
    few = len(layers) <= LAYERS_AS_LINES
    cells: list[list[float]] = []
    series: list[Series] = []
    if few:
        for i, layer in enumerate(layers):
            kept = decimate(x, list(layer), max(40, POINTS_PER_CHART // len(layers)))
            series.append(Series(label=labels[i], x=kept[0], y=kept[1], color=i))
    else:
        columns = min(CELLS_ACROSS, len(x))
        edges = [len(x) * i // columns for i in range(columns + 1)]
        cells = [[sum(layer[a:b]) / (b - a) for a, b in pairwise(edges)] for layer in layers]
        low, high = min(map(min, cells)), max(map(max, cells))
        notes.append("a row is a layer, the first on top")
        notes.append(f"from dark, {panel.show(low)}, to bright, {panel.show(high)}")
    what = "one line a layer" if few else "one row of cells a layer"
    return Chart(
        key=panel.key,
        title=panel.title,
        series=series,
        show=panel.show,
        phases=phases if few else [],  # cells cover what is behind them
        notes=notes,
        alternative=f"{panel.title} against optimizer step, {what}. " + ". ".join(notes) + ".",
        cells=cells,
        cells_end=x[-1],
    )


def _all_finite(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(is_finite, values))


def _chart(
    panel: _Panel,
    kinds: tuple[str, ...],
    title: str,
    key: str,
    runs: Sequence[tuple[str, list[Row]]],
    phases: list[tuple[str, float, float]],
) -> Chart | None:
    found: list[tuple[str, Points, int]] = []  # label, points, color
    notes: list[str] = []
    lost = 0
    for index, (name, rows) in enumerate(runs):
        for kind in kinds:
            (x, y), missing = points(rows, kind, "step", panel.column)
            lost += missing if panel.column == "loss" else 0
            if not y:
                continue
            if len(runs) > 1:
                found.append((name, (x, y), index))
            else:
                label = "training" if kind == "train" else kind
                found.append((label, (x, y), kinds.index(kind)))
            notes.append(_note(found[-1][0], x, y, panel))
    if not found:
        return None
    if lost:
        notes.append(f"{lost} rows have no loss because it was not finite")
    if len(found) == 1:
        notes[0] = notes[0].removeprefix(f"{found[0][0]}: ")
    values = [value for _, (_, y), _ in found for value in y]
    log = panel.may_log and min(values) > 0 and max(values) / min(values) > 30
    budget = max(40, POINTS_PER_CHART // len(found))
    series: list[Series] = []
    smoothed = 0
    for label, (x, y), color in found:
        window = max(5, len(y) // 25)
        smooth = len(y) >= SMOOTH_FROM and panel.column not in ("lr", "memory_mb")
        raw = decimate(x, y, budget * 3 // 4 if smooth else budget)
        series.append(
            Series(
                label=label,
                x=raw[0],
                y=raw[1],
                color=color,
                faint=smooth,
            )
        )
        if smooth:
            smoothed = max(smoothed, window)
            mean = decimate(x, running_mean(y, window), budget // 4)
            series.append(Series(label=label, x=mean[0], y=mean[1], color=color))
    if smoothed:
        notes.append(f"bold: running mean over {smoothed} rows")
    return Chart(
        key=key,
        title=title + (" (log scale)" if log else ""),
        series=series,
        show=panel.show,
        log=log,
        phases=phases,
        phase_legend=bool(phases) and panel.key == "learning-rate",
        notes=notes,
        alternative=f"{title} against optimizer step. " + ". ".join(notes) + ".",
    )


def accuracy_against_time(curves: Sequence[tuple[str, Points]]) -> Chart | None:
    """The chart a comparison turns on: what each run had reached after the same seconds."""
    title = "Validation accuracy against wall time"
    return against_time(curves, key="accuracy-time", title=title, show=share, best="highest")


def against_time(
    curves: Sequence[tuple[str, Points]],
    *,
    key: str,
    title: str,
    show: Callable[[Any], str] = number,
    best: str = "lowest",
) -> Chart | None:
    """A chart of validation figures against seconds, one line a run; None when no run has any."""
    series: list[Series] = []
    notes: list[str] = []
    budget = max(40, POINTS_PER_CHART // max(1, len(curves)))
    for index, (label, (x, y)) in enumerate(curves):
        if not y:
            continue
        kept = decimate(x, y, budget)
        series.append(Series(label=label, x=kept[0], y=kept[1], color=index))
        at = _extreme(y, best)
        notes.append(f"{label}: {best} {show(y[at])} after {duration(x[at])}")
    if not series:
        return None
    return Chart(
        key=key,
        title=title,
        series=series,
        x_label="seconds",
        show=show,
        notes=notes,
        alternative=f"{title}. " + ". ".join(notes) + ".",
    )


def points(rows: Iterable[Row], kind: str, x: str, y: str) -> tuple[Points, int]:
    """The finite points of one column.

    Returns:
        ((x values, y values), the number of rows whose y is there but null).
    """
    xs: list[float] = []
    ys: list[float] = []
    missing = 0
    for row in rows:
        if row.get("kind") != kind or y not in row:
            continue
        if is_finite(row[y]) and is_finite(row.get(x)):
            xs.append(float(row[x]))
            ys.append(float(row[y]))
        else:
            missing += 1
    return (xs, ys), missing


def phase_spans(rows: Iterable[Row]) -> list[tuple[str, float, float]]:
    """The stretches of steps spent in each phase: (phase, first step, last step), in order.

    Example:
        >>> phase_spans([{"step": s, "phase": "warmup" if s < 3 else "refinement"} for s in range(5)])
        [('warmup', 0.0, 2.0), ('refinement', 2.0, 4.0)]
    """
    spans: list[tuple[str, float, float]] = []
    for row in rows:
        step, phase = row.get("step"), row.get("phase")
        if row.get("kind", "train") != "train" or not is_finite(step) or not isinstance(phase, str):
            continue
        if spans and spans[-1][0] == phase:
            spans[-1] = (phase, spans[-1][1], max(spans[-1][2], float(step)))
        else:
            # A row shows the steps since the row before it, so that is where its phase is drawn from.
            spans.append((phase, spans[-1][2] if spans else 0.0, float(step)))
    return spans


def decimate(x: list[float], y: list[float], limit: int) -> Points:
    """At most ``limit`` points that keep every peak: the lowest and highest of each stretch.

    Args:
        x: where the points lie, not decreasing.
        y: their values.
        limit: at least 4.

    Returns:
        The points kept, in order, the first and last among them.

    Example:
        >>> decimate([0, 1, 2, 3, 4, 5], [0, 0, 9, 0, 0, 1], 4)
        ([0, 1, 2, 5], [0, 0, 9, 1])
    """
    total = len(y)
    if total <= limit:
        return x, y
    buckets = max(1, (limit - 2) // 2)
    kept = {0, total - 1}
    for bucket in range(buckets):
        inner = range(1 + bucket * (total - 2) // buckets, 1 + (bucket + 1) * (total - 2) // buckets)
        kept.add(min(inner, key=y.__getitem__))
        kept.add(max(inner, key=y.__getitem__))
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def running_mean(y: list[float], window: int) -> list[float]:
    """The mean of the ``window`` values around each one, fewer at the ends.

    Example:
        >>> running_mean([0.0, 3.0, 6.0, 9.0], 3)
        [1.5, 3.0, 6.0, 7.5]
    """
    half = max(0, window // 2)
    sums = [0.0]
    for value in y:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(y)):
        start, end = max(0, i - half), min(len(y), i + half + 1)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def _extreme(y: list[float], best: str) -> int:
    choose = min if best == "lowest" else max
    return choose(range(len(y)), key=y.__getitem__)


def _note(label: str, x: list[float], y: list[float], panel: _Panel) -> str:
    text = f"{label}: last {panel.show(y[-1])}"
    if panel.best:
        at = _extreme(y, panel.best)
        text += f", {panel.best} {panel.show(y[at])} at step {number(x[at])}"
    return text
