"""Figures for the recipes of a comparison: by short trials, or by whole runs over a grid."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phase5_training import bench_summary
from phase5_training.bench_run import append, circumstances, halves_of, make_pipeline, run_once, warm_up
from phase5_training.contest import Contest, options_of
from phase5_training.errors import UsageError
from phase5_training.recipes import RECIPES, Tuned, grid

Row = dict[str, Any]

# Candidates of a grid that are run on more seeds.
FINALISTS = 3


def tune_once(contest: Contest, name: str, seed: int) -> Tuned:
    """Figures for a recipe, by the search that ``learning_rate="auto"`` does: a tenth of the run's steps."""
    started = time.perf_counter()
    recipe = RECIPES[name]
    options = options_of(contest, recipe, None)
    pipeline = make_pipeline(contest, recipe, options, seed, f"{name}-tuning").setup()
    # The reported half must not choose.
    pipeline.val_loader, _ = halves_of(pipeline)
    tuning = pipeline.tune()
    return Tuned(
        options=tuning.options,
        steps=tuning.steps,
        seconds=time.perf_counter() - started,
        trials=len(tuning.trials),
        source="learning_rate=auto",
        seeds=(seed,),
    )


def tune_to_target(
    contest: Contest, name: str, seed: int, record: Path | None = None, targets: Sequence[float | str] = ()
) -> Tuned:
    """Figures for a recipe of a built-in task by whole runs over its grid.

    For tasks that generalize late, where a short trial shows nothing. All candidates run on one seed, and
    where generalization is delayed the best few on two more. The best holds the first numeric target on most
    seeds, then soonest in seconds; where there is none, or none holds it, it has the best held figure.

    Raises:
        UsageError: the contest is not a built-in one, or no run gave a figure.
    """
    if contest.task is None:
        raise UsageError("a grid of whole runs is for built-in tasks; `forge tune CONFIG.yaml` is for others")
    targets = tuple(targets) or contest.targets
    numeric = [target for target in targets if not isinstance(target, str)][:1]
    recipe, about = RECIPES[name], circumstances()
    tried = grid(recipe, contest.task)
    warm_up(contest, [(recipe, Tuned(options=tried[0]))])
    started = time.perf_counter()
    rows: list[list[Row]] = [[] for _ in tried]

    def run(index: int, seed: int) -> None:
        row = run_once(contest, name, recipe, Tuned(options=tried[index]), seed, numeric)
        rows[index].append({**row, "kind": "candidate", "tried": tried[index]})
        append(record, {**rows[index][-1], **about})

    for index in range(len(tried)):
        run(index, seed)
    finalists = sorted(range(len(tried)), key=lambda index: merit(rows[index], numeric))[:FINALISTS]
    # Where generalization comes late, when it comes is half luck: the first few run on two more seeds.
    for index in finalists if contest.task.delayed else ():
        run(index, seed + 1)
        run(index, seed + 2)
    best = min(finalists, key=lambda index: merit(rows[index], numeric))
    levels = [bench_summary.held_level(row["curve"], higher=row["higher"]) for row in rows[best]]
    if not any(level is not None and math.isfinite(level) for level in levels):
        raise UsageError(
            "no run of the grid has four evaluations with a finite figure; "
            "lower eval_interval, or raise the cap"
        )
    every = list(itertools.chain.from_iterable(rows))
    found = Tuned(
        options=tried[best],
        steps=sum(row["steps"] for row in every),
        seconds=time.perf_counter() - started,
        trials=len(every),
        source="a grid of whole runs",
        seeds=tuple(sorted({row["seed"] for row in every})),
    )
    append(record, {"kind": "tuned", **tuned_row(contest.name, name, found), **about})
    return found


def merit(rows: Sequence[Row], targets: Sequence[float]) -> tuple[float, ...]:
    """What the runs of one candidate are ordered by, less is better.

    For each target the number of seeds that did not hold it, then the mean seconds it took the others; last
    comes the mean held figure, infinite where a run has fewer than four evaluations.
    """
    order: list[float] = []
    for target in targets:
        times = [bench_summary.time_to(row["curve"], target, higher=row["higher"]) for row in rows]
        reached = [found[1] for found in times if found]
        order += [len(rows) - len(reached), sum(reached) / max(len(reached), 1)]
    levels = [bench_summary.held_level(row["curve"], higher=row["higher"]) for row in rows]
    signed = [
        math.inf if x is None else -x if row["higher"] else x for x, row in zip(levels, rows, strict=True)
    ]
    return (*order, sum(signed) / len(signed))


def tuned_row(task: str, recipe: str, tuned: Tuned) -> Row:
    """What ``recipes.read_tuned`` reads."""
    return {
        "task": task,
        "recipe": recipe,
        "options": tuned.options,
        "tuning_steps": tuned.steps,
        "tuning_seconds": tuned.seconds,
        "tuning_trials": tuned.trials,
        "tuning_seeds": list(tuned.seeds),
        "source": tuned.source,
    }
