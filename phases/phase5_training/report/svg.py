"""Charts as SVG that sits inside an HTML page and takes its colors from the page's style sheet.

matplotlib draws with marker colors that are then replaced by CSS variables, so that one picture
reads well on a light and on a dark page. Text stays text: it is small, scales and can be selected.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phase5_training.report.charts import Chart
from phase5_training.report.wording import compact, megabytes, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE_SIZE = 8
PHASES = ("warmup", "acceleration", "consolidation", "refinement")

_INK, _MUTED, _GRID = "#fe1001", "#fe1002", "#fe1003"
_SERIES = tuple(f"#fe20{i:02x}" for i in range(PALETTE_SIZE))
_PHASE = tuple(f"#fe30{i:02x}" for i in range(len(PHASES)))
_VARIABLES = (
    {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid"}
    | {marker: f"--series-{i}" for i, marker in enumerate(_SERIES)}
    | {marker: f"--phase-{i}" for i, marker in enumerate(_PHASE)}
)
_MARKER = re.compile(r"#fe(?:10|20|30)[0-9a-f]{2}")
_COORDINATES = re.compile(r' (?:d|x|y)="[^"]*"')
_LONG = re.compile(r"-?\d+\.\d{2,}")


def draw(chart: Chart, prefix: str, *, wide: bool = False) -> str:
    """A chart as an inline ``<svg>`` element.

    Args:
        chart: what to draw.
        prefix: put before every id, so that several pictures can share a page.
        wide: somewhat larger, for the one chart that a page turns on.

    Returns:
        The element: no XML header, no address of anything outside the page, a text alternative.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    width, height = (4.6, 2.6) if wide else (4.2, 2.35)
    # A Figure of our own, not pyplot's: the user's figures and backend are not touched.
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": prefix,
        "path.simplify": True,
        "font.size": 8.5,
        "text.parse_math": False,  # a "$" in a name is a "$"
        "axes.formatter.use_mathtext": False,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the user's program has set
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.52 / width, 0.36 / height, 1 - 0.64 / width, 1 - 0.44 / height))
        _plot(chart, axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), chart, prefix)


def _plot(chart: Chart, axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if chart.cells:
        _plot_cells(chart, axes)
    for name, start, end in chart.phases:
        if name in PHASES:
            axes.axvspan(start, end, color=_PHASE[PHASES.index(name)], alpha=0.16, linewidth=0)
    for line in chart.series:
        color = _SERIES[line.color % PALETTE_SIZE]
        dashed = line.color >= PALETTE_SIZE  # the palette starts again
        axes.plot(
            line.x,
            line.y,
            color=color,
            linewidth=0.9 if line.faint else 1.6,
            alpha=0.35 if line.faint else 1.0,
            linestyle="--" if dashed else "-",
            dashes=(4, 2) if dashed else (None, None),
            marker="o" if len(line.y) <= 30 else "",
            markersize=2.6,
            solid_joinstyle="round",
        )
    if chart.cells:
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    elif chart.log:
        axes.set_yscale("log")
        values = [value for line in chart.series for value in line.y]
        decades = math.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _pad_flat(chart, axes)
    show = chart.show if chart.show not in (number, megabytes) else compact
    if not chart.cells:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(show, value)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=chart.x_label != "seconds"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlabel(chart.x_label, color=_MUTED, labelpad=2)
    axes.margins(x=0.01)
    axes.set_axisbelow(True)
    if not chart.cells:
        axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.tick_params(colors=_MUTED, length=0, pad=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def _plot_cells(chart: Chart, axes: Axes) -> None:
    """A row of cells for each layer, the first on top; the colors read on a light and on a dark page."""
    extent = (0.0, chart.cells_end, len(chart.cells) + 0.5, 0.5)
    axes.imshow(chart.cells, aspect="auto", interpolation="nearest", cmap="viridis", extent=extent)


def _pad_flat(chart: Chart, axes: Axes) -> None:
    """A constant gets room around it; a share stays between 0 and 1."""
    values = [value for line in chart.series for value in line.y]
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        room = abs(high) * 0.1 or 0.1
        axes.set_ylim(low - (room if low else 0.0), high + room)
        return
    bottom, top = axes.get_ylim()
    if low >= 0 and low < 0.35 * high:
        bottom = 0.0
    if chart.show.__name__ == "share" and high <= 1 < top:
        top = 1.0 + 0.02 * (1.0 - bottom)
    axes.set_ylim(bottom, top)


def _tick(show: Callable[[Any], str], value: float) -> str:
    if show.__name__ == "share":
        text = f"{value * 100:.4g}%"
        return text if text != "-0%" else "0%"
    if abs(value) < 1e-12:
        return "0"
    return show(value)


def _inline(svg: str, chart: Chart, prefix: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page's font
    svg = _MARKER.sub(lambda match: f"var({_VARIABLES[match.group()]})", svg)
    # A tenth of a point is finer than a screen; this halves the file.
    svg = _COORDINATES.sub(lambda part: _LONG.sub(lambda n: f"{float(n.group()):.1f}", part.group()), svg)
    svg = re.sub(r' transform="rotate\(-0[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\b(id="|href="#)', rf"\1{prefix}-", svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"\s*\n\s*", " ", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    head = (
        f'<svg {view.group() if view else ""} role="img" aria-label="{html.escape(chart.alternative)}">'
        f"<title>{html.escape(chart.title)}</title>"
    )
    return head + svg[svg.index(">") + 1 :].strip()
