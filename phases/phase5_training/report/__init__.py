"""The report of a run: one HTML file that opens offline, made from the run's records.

``charts`` and ``summary`` turn records into plain numbers and words, ``comparison`` sets runs side
by side, ``svg`` draws, ``template.html.j2`` is the page. matplotlib and jinja2 are imported when a
report is written, not before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phase5_training.errors import UsageError
from phase5_training.records import REPORT, RunDirectory, now, write_atomic
from phase5_training.report import comparison, summary
from phase5_training.report.charts import Chart, accuracy_against_time, against_time, charts_of, layer_charts
from phase5_training.report.summary import Loaded

__all__ = ["write_report"]

REFRESH_S = 30
EVENTS_SHOWN = 200


def write_report(run_dirs: Sequence[str | os.PathLike[str]] | Path | str, out: Path | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        run_dirs: folders of runs. A run that is still going is reported as far as it has come.
        out: the file to write; default ``report.html`` in the run's folder, or in the folder above
            the first of several.

    Returns:
        The path of the file written.

    Raises:
        UsageError: no folder was given, or one holds no run.
        DataError: a record in it cannot be read.

    Example:
        >>> import tempfile
        >>> run = RunDirectory.create(tempfile.mkdtemp(), "digits")
        >>> run.append_metrics({"kind": "train", "step": 1, "loss": 2.3})
        >>> write_report([run.path]).name
        'report.html'
    """
    if isinstance(run_dirs, (str, os.PathLike)):
        run_dirs = [run_dirs]
    paths = [Path(path) for path in run_dirs]
    if not paths:
        raise UsageError("no run was given to report on; give the folder of a run, such as runs/<experiment>")
    for path in paths:
        if not RunDirectory(path).exists():
            found = "holds no run" if path.is_dir() else "is not a folder"
            raise UsageError(f"{path} {found}; give the folder of a run, such as runs/<experiment>")
    runs = [Loaded.read(path) for path in paths]
    _tell_apart(runs)
    if out is None:
        out = paths[0] / REPORT if len(paths) == 1 else paths[0].resolve().parent / REPORT
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, render(runs).encode("utf-8", "replace"))
    return out


def render(runs: Sequence[Loaded]) -> str:
    """The page, as text.

    Args:
        runs: the records of at least one run.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from phase5_training.report.svg import PALETTE_SIZE, PHASES, draw

    def figure(chart: Chart, prefix: str, wide: bool = False) -> dict[str, Any]:
        legend = {}
        for line in chart.series:
            dashed = line.color >= PALETTE_SIZE
            legend[line.color] = {"label": line.label, "color": line.color % PALETTE_SIZE, "dashed": dashed}
        spent = {name for name, _, _ in chart.phases}
        # The SVG is ours and escapes the words it carries; everything else is escaped by the template.
        return {
            "chart": chart,
            "svg": Markup(draw(chart, prefix, wide=wide)),
            "wide": wide,
            "legend": list(legend.values()) if len(legend) > 1 else [],
            "phases": [(name, index) for index, name in enumerate(PHASES) if name in spent],
        }

    charts, absent = charts_of([(run.name, run.rows) for run in runs])
    if len(runs) == 1:
        charts += layer_charts(runs[0].rows, runs[0].layer_names)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    compared = _comparison(runs)
    if compared and compared["chart"] is not None:
        compared["figure"] = figure(compared["chart"], "compare", wide=True)
    live = any(summary.is_live(run) for run in runs)
    return environment.get_template("template.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs: " + ", ".join(r.name for r in runs),
        runs=[_sections(run) for run in runs],
        tiles=summary.tiles(runs[0]) if len(runs) == 1 else [],
        comparison=compared,
        figures=[figure(chart, f"c{index}") for index, chart in enumerate(charts)],
        absent=[title[:1].lower() + title[1:] for title in absent],
        refresh_s=REFRESH_S if live else 0,
        written=now(),
    )


def _comparison(runs: Sequence[Loaded]) -> dict[str, Any] | None:
    if len(runs) > 1:
        rows: list[dict[str, Any]] = comparison.comparison_of(runs)
        curves = [(run.name, run.validation("elapsed_s", "accuracy")) for run in runs]
        chart = accuracy_against_time(curves)
        if chart is None:
            curves = [(run.name, run.validation("elapsed_s", "loss")) for run in runs]
            chart = against_time(curves, key="loss-time", title="Validation loss against wall time")
    else:
        given = runs[0].result.get("comparison")
        rows = [row for row in given if isinstance(row, dict)] if isinstance(given, list) else []
        if not rows:
            return None
        figure = str(rows[0].get("figure") or "accuracy")
        chart = comparison.comparison_chart(comparison.comparison_curves(runs[0], rows), figure)
    return {
        "sentence": comparison.comparison_sentence(rows),
        "table": comparison.comparison_table(rows, own_first=len(runs) == 1),
        "settings": comparison.settings_that_differ(runs) if len(runs) > 1 else None,
        "chart": chart,
        "figure": None,
    }


def _sections(run: Loaded) -> dict[str, Any]:
    state, text = summary.status(run)
    data, dropped = summary.data_tables(run)
    return {
        "name": run.name,
        "path": str(run.run.path),
        "headline": summary.headline(run),
        "status": state,
        "status_text": text,
        "final": summary.final_table(run),
        "data": data,
        "dropped": dropped,
        "nothing_left_out": summary.nothing_left_out(run),
        "size": summary.model_size(run),
        "machine": summary.machine_table(run),
        "layers": summary.layer_rows(run),
        "config": summary.config_table(run),
        "events": summary.event_table(run, EVENTS_SHOWN),
        "more_events": len(run.events) > EVENTS_SHOWN,
    }


def _tell_apart(runs: Sequence[Loaded]) -> None:
    """Runs of the same name in different folders are shown with the folder above."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.run.path.resolve().parent.name}/{run.name}"
