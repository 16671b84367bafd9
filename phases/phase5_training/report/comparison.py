"""Runs side by side: who reached the target first, in words, in a table and as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phase5_training.records import RunDirectory
from phase5_training.report.charts import Chart, Points, Row, accuracy_against_time, against_time, points
from phase5_training.report.summary import Loaded, Table, settings_of, text
from phase5_training.report.wording import (
    MISSING,
    duration,
    figure_value,
    is_finite,
    number,
    one_line,
    rises,
    share,
    stop_reason,
)


def comparison_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who reached the target first, or best, in words; the first row is the run's own."""
    reached = [row for row in rows if is_finite(row.get("seconds_to_target"))]
    if len(rows) < 2 or not reached:
        return ""
    aim = next((row for row in rows if is_finite(row.get("target"))), None)
    goal = "the target"
    if aim is not None:
        figure = str(aim.get("figure") or "accuracy")
        goal = f"{figure_value(aim['target'], figure)} validation {figure.replace('_', ' ')}"
    order = sorted(reached, key=lambda row: row["seconds_to_target"])
    first = order[0]
    said = f"{_row_name(first)} reached {goal} first, after {duration(first['seconds_to_target'])}"
    if is_finite(first.get("steps_to_target")):
        said += f" and {number(first['steps_to_target'])} steps"
    for row in order[1:]:
        ratio = row["seconds_to_target"] / max(first["seconds_to_target"], 1e-9)
        said += f"; {_row_name(row)} after {duration(row['seconds_to_target'])} ({ratio:.2f} times as long)"
    never = [_row_name(row) for row in rows if not is_finite(row.get("seconds_to_target"))]
    if never:
        said += f"; {' and '.join(never)} did not reach it"
    return said + "."


_COMPARISON = (
    ("name", "Run", one_line),
    ("weight_bits", "Weight bits", number),
    ("optimizer", "Optimizer", one_line),
    ("learning_rate", "Learning rate", number),
    ("weight_decay", "Weight decay", number),
    ("steps", "Steps", number),
    ("wall_seconds", "Wall time", duration),
    ("steps_to_target", "Steps to target", number),
    ("seconds_to_target", "Time to target", duration),
    ("seconds_quartiles", "Quartiles over seeds, s", one_line),
    ("reached", "Seeds that held it", one_line),
    ("tuning_steps", "Tuning, steps", number),
    ("tuning_seconds", "Tuning, time", duration),
    ("test", "Figure on unseen data", number),
    ("best_accuracy", "Best validation accuracy", share),
    ("final_val_loss", "Final validation loss", number),
    ("note", "Note", one_line),
)
# What a run is called differs always, and stands above each column.
_NAMES = ("experiment_name", "output_dir")
_BEST_IS = {"steps_to_target": min, "seconds_to_target": min, "best_accuracy": max, "final_val_loss": min}


def comparison_table(rows: Sequence[Mapping[str, Any]], *, own_first: bool) -> Table:
    """Compared runs side by side; columns nobody has figures for are left out."""
    columns = [
        (key, head, show)
        for key, head, show in _COMPARISON
        if any(row.get(key) not in (None, "") for row in rows)
    ]
    marked = set()
    for index, (key, _, _) in enumerate(columns):
        values = [row.get(key) for row in rows]
        finite: list[float] = [value for value in values if is_finite(value)]
        if key in _BEST_IS and len(finite) > 1:
            best = _BEST_IS[key](finite)
            marked |= {(i, index) for i, value in enumerate(values) if value == best}
    words = ("name", "optimizer", "note", "seconds_quartiles", "reached")
    return Table(
        head=[head for _, head, _ in columns],
        rows=[[_cell(row.get(key), show) for key, _, show in columns] for row in rows],
        numeric=frozenset(i for i, (key, _, _) in enumerate(columns) if key not in words),
        marked=frozenset(marked),
        strong_row=0 if own_first else None,
    )


def comparison_of(runs: Sequence[Loaded]) -> list[dict[str, Any]]:
    """The comparison's rows for runs given side by side, out of their own records.

    The first run that was given a target is the one whose target all are held to.
    """
    aimed = next((run for run in runs if is_finite(run.config.get("target"))), None)
    target = aimed.config["target"] if aimed else None
    figure = (aimed.config.get("monitor") if aimed else None) or (
        "accuracy" if any(is_finite(run.best_accuracy) for run in runs) else "loss"
    )
    rows = []
    for run in runs:
        reached = _reached(run, figure, target) if is_finite(target) else None
        rows.append(
            {
                "name": run.name,
                "weight_bits": run.weight_bits,
                "optimizer": run.config.get("optimizer"),
                "learning_rate": run.config.get("learning_rate"),
                "weight_decay": run.config.get("weight_decay"),
                "steps": run.steps,
                "wall_seconds": run.seconds,
                "target": target,
                "figure": figure,
                "steps_to_target": (reached or {}).get("step"),
                "seconds_to_target": (reached or {}).get("elapsed_s"),
                "best_accuracy": run.best_accuracy,
                "final_val_loss": run.validation_loss,
                "note": stop_reason(run.result["stop_reason"])
                if run.result.get("stop_reason")
                else "no result yet",
            }
        )
    return rows


def _reached(run: Loaded, figure: str, target: float) -> Row | None:
    """The first validation at which a run's figure was the target or better."""
    for row in run.rows:
        value = row.get(figure)
        if row.get("kind") != "validation" or not is_finite(value):
            continue
        if value >= target if rises(figure) else value <= target:
            return row
    return None


def settings_that_differ(runs: Sequence[Loaded]) -> Table | None:
    """The settings that are not the same in all runs, one column a run; None where there are none."""
    settings = [dict(settings_of(run)) for run in runs]
    keys = dict.fromkeys(key for own in settings for key in own if key not in _NAMES)
    rows = [[key, *(own.get(key, MISSING) for own in settings)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return Table(head=["Setting", *(run.name for run in runs)], rows=rows) if rows else None


def comparison_curves(own: Loaded, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Points]]:
    """Validation accuracy against seconds of each compared run.

    A row's curve is its ``curve`` (pairs of seconds and accuracy), else the metrics of the run in
    the folder ``run`` (relative to the own run's folder), else, for the first row, the own metrics.
    """
    curves: list[tuple[str, Points]] = []
    for index, row in enumerate(rows):
        found: Points = ([], [])
        pairs, folder = row.get("curve"), row.get("run")
        if isinstance(pairs, list):
            kept = [p for p in pairs if isinstance(p, list) and len(p) == 2 and all(map(is_finite, p))]
            found = ([float(p[0]) for p in kept], [float(p[1]) for p in kept])
        elif isinstance(folder, str):
            found = points(
                RunDirectory(own.run.path / folder).read_metrics(), "validation", "elapsed_s", "accuracy"
            )[0]
        elif index == 0:
            found = own.validation("elapsed_s", "accuracy")
        curves.append((_row_name(row), found))
    return curves


def comparison_chart(curves: Sequence[tuple[str, Points]], figure: str = "accuracy") -> Chart | None:
    """The curves of a comparison as a chart of ``figure`` against seconds; None when no row has any."""
    if figure == "accuracy":
        return accuracy_against_time(curves)
    title = f"Validation {figure.replace('_', ' ')} against wall time"
    return against_time(curves, key="figure-time", title=title)


def _row_name(row: Mapping[str, Any]) -> str:
    return one_line(row.get("name") or "unnamed")


def _cell(value: Any, show: Any) -> str:
    if value in (None, ""):
        return MISSING
    return show(value) if is_finite(value) or show is one_line else text(value)
