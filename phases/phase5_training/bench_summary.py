"""What a comparison comes to: time and steps to a target that was held, over seeds.

A target counts as reached at the first evaluation that meets it and whose next three meet it too. A seed on
which that never happens counts as infinitely long, so a median over seeds says what a user can expect and not
what the lucky seeds did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from phase5_training.recipes import ATTRIBUTION, RECIPES

HELD = 4  # the evaluation that meets the target, and the next three
BASELINES = ("float", "float_muon")

Row = dict[str, Any]
Curve = Sequence[Sequence[float]]  # rows of (step, seconds, figure)


def time_to(curve: Curve, target: float, *, higher: bool) -> tuple[int, float] | None:
    """(step, seconds) at which a target was reached and held; None for never.

    Args:
        curve: (step, seconds, figure) of each evaluation, in order.
        target: the figure to reach.
        higher: whether more is better.

    Example:
        >>> curve = [(1, 0.5, 0.9), *((i, i / 2, 0.97) for i in (2, 3, 4, 5))]
        >>> time_to(curve, 0.95, higher=True)
        (2, 1.0)
    """
    met = [(figure >= target) if higher else (figure <= target) for _, _, figure in curve]
    for index in range(len(curve) - HELD + 1):
        if all(met[index : index + HELD]):
            return int(curve[index][0]), float(curve[index][1])
    return None


def held_level(curve: Curve, *, higher: bool) -> float | None:
    """The best figure that four evaluations in a row met; None for a shorter curve.

    Example:
        >>> held_level([(1, 1, 0.5), (2, 2, 0.9), (3, 3, 0.8), (4, 4, 0.7), (5, 5, 0.9)], higher=True)
        0.7
    """
    figures = [figure for _, _, figure in curve]
    windows = [figures[i : i + HELD] for i in range(len(figures) - HELD + 1)]
    if not windows:
        return None
    return max(map(min, windows)) if higher else min(map(max, windows))


def quartiles(values: Iterable[float | None]) -> list[float | None]:
    """First quartile, median and third quartile; None stands for never, which is longer than anything.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, None])
        [1.75, 2.5, None]
    """
    ordered = sorted(math.inf if v is None else v for v in values)
    found: list[float | None] = []
    for q in (0.25, 0.5, 0.75):
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        part = place - low
        value = (
            ordered[low] + (part * (ordered[low + 1] - ordered[low]) if part else 0.0)
            if ordered
            else math.inf
        )
        found.append(value if math.isfinite(value) else None)
    return found


def figure_quartiles(values: Iterable[float | None], *, higher: bool) -> list[float | None]:
    """:func:`quartiles` of a figure; a run without one (None) is worse than any other.

    Example:
        >>> figure_quartiles([0.9, 0.8, None], higher=True)
        [None, 0.8, 0.8500000000000001]
    """
    if not higher:
        return quartiles(values)
    found = quartiles(None if v is None else -v for v in values)
    return [None if v is None else -v for v in reversed(found)]


def summaries(runs: Sequence[Row], targets: Sequence[float | str]) -> list[Row]:
    """One row per target and recipe.

    Args:
        runs: rows of :func:`phase5_training.bench.run_once`, of one task.
        targets: figures, or names of recipes whose held figure on the same seed is the target.
    """
    names = list(dict.fromkeys(run["recipe"] for run in runs))
    rows = []
    for target in targets:
        reached = {(run["recipe"], run["seed"]): _reached(run, target, runs) for run in runs}
        for name in names:
            own = [run for run in runs if run["recipe"] == name]
            # A run that failed before its data were known does not say what it is judged by.
            judged = next((run for run in runs if run["figure"]), own[0])
            times = [reached[name, run["seed"]] for run in own]
            rows.append(
                {
                    "kind": "summary",
                    "task": own[0]["task"],
                    "target": target,
                    "figure": judged["figure"],
                    "recipe": name,
                    **RECIPES[name].factors,
                    "seeds": len(own),
                    "failures": times.count(None),
                    "capped": sum(r["stop_reason"] in ("max_steps", "max_seconds") for r in own),
                    "caps": {key: own[0][key] for key in ("cap_steps", "cap_seconds")},
                    "steps": quartiles(t and t[0] for t in times),
                    "seconds": quartiles(t and t[1] for t in times),
                    "whole_seconds": quartiles(run["seconds"] for run in own),
                    "tuning_steps": own[0]["tuning_steps"],
                    "tuning_seconds": own[0]["tuning_seconds"],
                    "test": figure_quartiles((run["test"] for run in own), higher=judged["higher"]),
                    "watched": figure_quartiles((run["best"] for run in own), higher=judged["higher"]),
                    **{f"ratio_{base}": _ratios(reached, name, base, own) for base in BASELINES},
                }
            )
    return rows


def _reached(run: Row, target: float | str, runs: Sequence[Row]) -> tuple[int, float] | None:
    if isinstance(target, str):
        other = next((r for r in runs if (r["recipe"], r["seed"]) == (target, run["seed"])), None)
        level = held_level(other["curve"], higher=other["higher"]) if other else None
    else:
        level = target
    return None if level is None else time_to(run["curve"], level, higher=run["higher"])


def _ratios(
    reached: Mapping[tuple[str, int], tuple[int, float] | None], name: str, base: str, own: Sequence[Row]
) -> list[float | None] | None:
    """Quartiles over the seeds of seconds / those of a baseline; None without the baseline."""
    pairs = [(reached[name, r["seed"]], reached.get((base, r["seed"]))) for r in own]
    # Where the baseline never came there is no ratio; where only this one did not, it is infinite.
    found = [mine[1] / theirs[1] if mine else None for mine, theirs in pairs if theirs]
    return quartiles(found) if found else None


def result_table(rows: Sequence[Row]) -> Table:
    """Recipes side by side, one line per target."""
    first = rows[0]
    table = Table(
        title=f"{first['task']}: {first['figure']}, targets held for {HELD} evaluations; quartiles over seeds"
    )
    heads = ("recipe", "target", "reached", "steps", "seconds", "/ float", "/ float Muon", "tuning steps",
             "tuning s", f"test {first['figure']}")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head in ("recipe", "target") else "right")
    for row in rows:
        table.add_row(
            RECIPES[row["recipe"]].title,
            _target(row["target"]),
            f"{row['seeds'] - row['failures']} of {row['seeds']}",
            _three(row["steps"], "{:.0f}"),
            _three(row["seconds"], "{:.1f}"),
            *(_middle(row[f"ratio_{base}"]) for base in BASELINES),
            *_tuning(row),
            _three(row["test"], "{:.4g}"),
        )
    return table


def attribution_table(rows: Sequence[Row]) -> Table | None:
    """Which part of the gain comes from what; None when fewer than two cells were run."""
    cells = [row for row in rows if row["recipe"] in ATTRIBUTION]
    if len(cells) < 2:
        return None
    table = Table(title="attribution: medians over seeds; untuned is the document's optimizer settings")
    for head in ("weights", "tuned", "int8", "filter", "target", "reached", "steps", "seconds", "test"):
        table.add_column(head)
    for row in cells:
        table.add_row(
            row["weights"],
            *("" if row[key] is None else "yes" if row[key] else "no" for key in ("tuned", "int8", "filter")),
            _target(row["target"]),
            f"{row['seeds'] - row['failures']} of {row['seeds']}",
            *(_one(row[key][1], form) for key, form in (("steps", "{:.0f}"), ("seconds", "{:.1f}"))),
            _one(row["test"][1], "{:.4g}"),
        )
    return table


def cap_notes(rows: Sequence[Row]) -> list[str]:
    """One sentence for each recipe that was stopped by a cap before it reached a target."""
    notes = []
    for row in rows:
        if row["failures"] and row["capped"]:
            steps, seconds = row["caps"]["cap_steps"], row["caps"]["cap_seconds"]
            cap = f"{steps} steps" + (f" or {seconds:g} s" if seconds else "")
            notes.append(
                f"{RECIPES[row['recipe']].title}: {row['failures']} of {row['seeds']} seeds did not hold "
                f"{_target(row['target'])} and were stopped at the cap of {cap}"
            )
    return notes


def comparison_rows(runs: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The report's comparison: a line per recipe for the first target, with the curve of its middle seed."""
    first = rows[0]["target"]
    found = []
    for row in (r for r in rows if r["target"] == first):
        own = [run for run in runs if run["recipe"] == row["recipe"]]
        order = sorted(own, key=lambda run: run["seconds"])
        shown = order[len(order) // 2]
        found.append(
            {
                "name": RECIPES[row["recipe"]].title,
                "weight_bits": 1.58 if shown["ternary"] else 32,
                "optimizer": shown["options"].get("optimizer"),
                "learning_rate": shown["options"].get("learning_rate"),
                "weight_decay": shown["options"].get("weight_decay"),
                "steps": shown["steps"],
                "wall_seconds": row["whole_seconds"][1],
                "target": first if isinstance(first, float) else None,
                "steps_to_target": row["steps"][1],
                "seconds_to_target": row["seconds"][1],
                "seconds_quartiles": _three(row["seconds"], "{:.1f}"),
                "reached": f"{row['seeds'] - row['failures']} of {row['seeds']}",
                "tuning_steps": row["tuning_steps"],
                "tuning_seconds": row["tuning_seconds"],
                "test": row["test"][1],
                "figure": row["figure"],
                "curve": [[seconds, figure] for _, seconds, figure in shown["curve"]],
            }
        )
    return found


def _target(target: float | str) -> str:
    return f"held by {target}" if isinstance(target, str) else f"{target:g}"


def _tuning(row: Row) -> tuple[str, str]:
    if not RECIPES[row["recipe"]].tuned_as:
        return "0", "0"
    return _one(row["tuning_steps"], "{}", "?"), _one(row["tuning_seconds"], "{:.0f}", "?")


def _three(values: Sequence[float | None], form: str) -> str:
    return " / ".join(_one(v, form) for v in values)


def _middle(values: Sequence[float | None] | None) -> str:
    return "" if values is None else _one(values[1], "{:.2f}")


def _one(value: float | None, form: str, missing: str = "never") -> str:
    return missing if value is None else form.format(value)
