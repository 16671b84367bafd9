"""What a comparison comes to: time and steps to a target that was held, over seeds.

A target counts as reached at the first evaluation that meets it and whose next three meet it too. A seed on
which that never happens counts as infinitely long, so a median over seeds says what a user can expect and not
what the lucky seeds did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phase5_training.recipes import RECIPES

HELD = 4  # the evaluation that meets the target, and the next three
BASELINES = ("float", "float_muon")
_CAPS = ("max_steps", "max_seconds")

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
        runs: rows of :func:`phase5_training.bench_run.run_once`, of one task.
        targets: figures, or names of recipes whose held figure on the same seed is the target. A seed on
            which that recipe held nothing has no target and counts for nobody ("without_target").
    """
    names = list(dict.fromkeys(run["recipe"] for run in runs))
    rows = []
    for target in targets:
        levels = _levels(runs, target)
        reached = {
            (run["recipe"], run["seed"]): (run, time_to(run["curve"], level, higher=run["higher"]))
            for run in runs
            if (level := levels.get(run["seed"])) is not None
        }
        for name in names:
            own = [run for run in runs if run["recipe"] == name]
            # A run that failed before its data were known does not say what it is judged by.
            judged = next((run for run in runs if run["figure"]), own[0])
            held = [reached[name, run["seed"]] for run in own if (name, run["seed"]) in reached]
            seconds = quartiles(time and time[1] for _, time in held)
            tuning = own[0]["tuning_seconds"]
            errors = [run["error"] for run in own if run["error"]]
            rows.append(
                {
                    "kind": "summary",
                    "task": own[0]["task"],
                    "target": target,
                    "figure": judged["figure"],
                    "recipe": name,
                    **RECIPES[name].factors,
                    "seeds": len(own),
                    "without_target": len(own) - len(held),
                    "failures": sum(time is None for _, time in held),
                    "capped": sum(time is None and run["stop_reason"] in _CAPS for run, time in held),
                    "caps": {key: own[0][key] for key in ("cap_steps", "cap_seconds")},
                    "errors": len(errors),
                    "error": errors[0] if errors else "",
                    "stopped": sum(run["stop_reason"] == "interrupted" for run in own),
                    "precision": sorted({run["precision"] for run in own} - {None}),
                    "compiled": sorted({run["compiled"] for run in own} - {None}),
                    "steps": quartiles(time and time[0] for _, time in held),
                    "seconds": seconds,
                    "seconds_with_tuning": None if None in (seconds[1], tuning) else seconds[1] + tuning,
                    "whole_seconds": quartiles(run["seconds"] for run in own),
                    "tuning_steps": own[0]["tuning_steps"],
                    "tuning_seconds": tuning,
                    "tuning_trials": own[0].get("tuning_trials"),
                    "tuning_source": own[0].get("tuning_source", ""),
                    "test": figure_quartiles((run["test"] for run in own), higher=judged["higher"]),
                    "watched": figure_quartiles((run["best"] for run in own), higher=judged["higher"]),
                    **_ratios(reached, name),
                }
            )
    return rows


def _levels(runs: Sequence[Row], target: float | str) -> dict[int, float]:
    """Seed -> the figure to reach there."""
    if not isinstance(target, str):
        return {run["seed"]: target for run in runs}
    found = {r["seed"]: held_level(r["curve"], higher=r["higher"]) for r in runs if r["recipe"] == target}
    return {seed: level for seed, level in found.items() if level is not None and math.isfinite(level)}


def _ratios(reached: Mapping[tuple[str, int], tuple[Row, tuple[int, float] | None]], name: str) -> Row:
    """For each baseline: quartiles over the seeds of seconds / its seconds, and how many are bounds.

    Where a baseline never came, its time is more than what it was watched for, and the ratio less than the
    one with that: a bound. Where only this recipe did not come the ratio is infinite, and where neither did
    there is none.
    """
    found: Row = {}
    for base in BASELINES:
        ratios: list[float | None] = []
        bounds = 0
        for (recipe, seed), (_, mine) in reached.items():
            if recipe != name or (base, seed) not in reached:
                continue
            run, theirs = reached[base, seed]
            if theirs:
                ratios.append(mine[1] / theirs[1] if mine else None)
            elif mine and len(run["curve"]) >= HELD:
                # What its last evaluations met, it might have gone on to hold.
                ratios.append(mine[1] / run["curve"][1 - HELD][1])
                bounds += 1
        found |= {f"ratio_{base}": quartiles(ratios) if ratios else None, f"bounds_{base}": bounds}
    return found
