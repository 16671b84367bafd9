"""``forge bench``: recipes side by side, by the time they take to a target that they hold.

Every run goes through the pipeline that ``forge train`` uses, on the same model, data, batch and evaluations,
one seed of every recipe after the other. A clock runs from before the pipeline is made, so opening the data,
compiling, validating, saving and drawing the report all count; only tuning has a column of its own. Before
the first clock every recipe takes three steps that nobody times, so that no run pays for what is imported or
compiled once for all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from phase5_training import bench_summary, bench_tables
from phase5_training.bench_run import append, circumstances, run_once, warm_up
from phase5_training.bench_tuning import tune_once, tune_to_target, tuned_row
from phase5_training.contest import Contest, built_in, from_config
from phase5_training.errors import UsageError
from phase5_training.recipes import BUILT_IN, RECIPES, TASKS, Tuned, chosen_recipes, grid, read_tuned
from phase5_training.records import RunDirectory
from phase5_training.report import write_report

Options = dict[str, Any]
Row = dict[str, Any]


def run_bench(
    config: str | None,
    task: str | None,
    *,
    recipes: Sequence[str] | None = None,
    attribution: bool = False,
    seeds: int = 5,
    first_seed: int | None = None,
    target: Sequence[str] | None = None,
    full: bool = False,
    tuned: str | None = None,
    cap_steps: int | None = None,
    cap_seconds: float | None = None,
    output_dir: str = "runs",
    record: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """What ``forge bench`` does with its flags; see :func:`bench`.

    Raises:
        UsageError: a flag that does not fit, an unknown task or recipe.
    """
    if (config is None) == (task is None):
        given = "both were given" if config else "neither was given"
        raise UsageError(
            f"forge bench takes a CONFIG.yaml or --task NAME, and {given}; tasks: {', '.join(TASKS)}"
        )
    for name, value in (("--seeds", seeds), ("--cap-steps", cap_steps), ("--cap-seconds", cap_seconds)):
        if value is not None and value <= 0:
            raise UsageError(f"{name} {value} is not above 0; give 1 or more")
    changes: Options = {"max_steps": cap_steps, "max_seconds": cap_seconds}
    changes = {name: value for name, value in changes.items() if value is not None}
    if task is not None:
        contest = built_in(task, output_dir, **changes)
    else:
        assert config is not None
        contest = from_config(config, output_dir, **changes)
    wanted = chosen_recipes(recipes, attribution)
    found = read_tuned(tuned) if tuned else {}
    if first_seed is None:
        first_seed = _first_free_seed(_known_figures(contest, wanted, found), seeds)
    return bench(
        contest,
        wanted,
        range(first_seed, first_seed + seeds),
        targets=[figure_or_recipe(word) for word in target or ()],
        tuned=found,
        full=full,
        record=record or contest.folder / "bench.jsonl",
        quiet=quiet,
    )


def figure_or_recipe(word: str) -> float | str:
    """A target as it is written: a figure, or the name of a recipe.

    Raises:
        UsageError: neither of them.

    Example:
        >>> figure_or_recipe("0.95"), figure_or_recipe("float")
        (0.95, 'float')
    """
    try:
        return float(word)
    except ValueError:
        chosen_recipes([word], attribution=False)
        return word


def bench(
    contest: Contest,
    recipes: Sequence[str],
    seeds: Sequence[int],
    *,
    targets: Sequence[float | str] = (),
    tuned: Mapping[tuple[str, str], Tuned] | None = None,
    full: bool = False,
    record: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run recipes on seeds, and say what came of it.

    Args:
        contest: what they share.
        recipes: names in ``recipes.RECIPES``.
        seeds: of weights and data order; the recipes take turns within each.
        targets: figures to hold, or recipes whose held figure is the target; empty takes the contest's.
        tuned: what earlier tuning found; a recipe without figures is tuned first: for a tenth of the run, or,
            on a built-in task whose other recipes have theirs, by the search that these had.
        full: go on after the targets are held, to the end of the schedule.
        record: file of JSON lines that every row is appended to as it comes.
        quiet: print the tables only.

    Returns:
        "runs", "summaries" and the path of the "report", None where every run failed before it had a folder.

    Raises:
        UsageError: a target names a recipe that is not run, or a recipe was tuned on one of the seeds.
    """
    if not targets:
        # Of the contest's own, those that can be had from the recipes that are run.
        known_here = [
            target for target in contest.targets if not isinstance(target, str) or target in recipes
        ]
        targets = known_here or contest.targets
    for target in targets:
        if isinstance(target, str) and target not in recipes:
            raise UsageError(
                f"target {target!r} is the figure of a recipe that is not run; add it to --recipes"
            )
    # A file or pipe has no width; folded into 80 columns the table cannot be read.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    known = _known_figures(contest, recipes, tuned or {})
    for name, own in known.items():
        _refuse_tuning_seeds(name, own, seeds)
    figures_to_hold = [target for target in targets if not isinstance(target, str)]
    # What another run will have held is not known before it has run.
    stop_at = figures_to_hold if not full and len(figures_to_hold) == len(targets) else []
    about = circumstances()

    def say(line: str) -> None:
        if not quiet:
            console.print(line)

    def keep(row: Row) -> Row:
        append(record, {**row, **about})
        return row

    say("warming up: a few steps of each recipe, which nobody times")
    warm_up(contest, [(RECIPES[name], known.get(RECIPES[name].tuned_as)) for name in recipes])
    figures: dict[str, Tuned] = {}
    for base in filter(None, dict.fromkeys(RECIPES[name].tuned_as for name in recipes)):
        # Not on a seed that is reported, which would be the one that was tuned for.
        seed = max(seeds) + 1
        if base in known:
            figures[base] = known[base]
        elif known and contest.task is not None:
            runs_of_grid = len(grid(RECIPES[base], contest.task))
            say(f"tuning {RECIPES[base].title} by {runs_of_grid} whole runs, as the others were")
            figures[base] = tune_to_target(contest, base, seed, record, targets)
            continue  # which has recorded it
        else:
            say(f"tuning {RECIPES[base].title} by short trials")
            figures[base] = tune_once(contest, base, seed)
        keep({"kind": "tuned", **tuned_row(contest.name, base, figures[base])})
    runs: list[Row] = []
    for turn, seed in enumerate(seeds):
        start = turn % len(recipes)
        for name in [*recipes[start:], *recipes[:start]]:
            tuned_figures = figures.get(RECIPES[name].tuned_as)
            runs.append(keep(run_once(contest, name, RECIPES[name], tuned_figures, seed, stop_at)))
            say(_told(runs[-1], targets))
    rows = [keep(row) for row in bench_summary.summaries(runs, targets)]
    _print_tables(console, rows)
    report = write_bench_report(contest, runs, rows)
    if report is None:
        console.print(
            f"no report: each of the {len(runs)} runs failed before its first step ({runs[-1]['error']}); "
            f"mend that and run again{f', the rows are in {record}' if record else ''}",
            soft_wrap=True,
        )
    else:
        console.print(f"report: {report}", soft_wrap=True)
    return {"runs": runs, "summaries": rows, "report": report}


def write_bench_report(contest: Contest, runs: Sequence[Row], rows: Sequence[Row]) -> Path | None:
    """The report of the last run of Forge, or else of the last recipe, with the comparison in it.

    None where every run failed before it had a folder; the rows of the record say why.
    """
    begun = [run for run in runs if run["run"]]
    if not begun:
        return None
    own = ([run for run in begun if run["recipe"] == "forge"] or begun)[-1]
    directory = RunDirectory(own["run"])
    compared = bench_tables.comparison_rows(runs, rows)
    title = RECIPES[own["recipe"]].title
    # The report's own run comes first.
    compared.sort(key=lambda row: row["name"] != title)
    directory.write_result({**(directory.read_result() or {}), "comparison": compared})
    return write_report([directory.path], contest.folder / "report.html")


def _known_figures(
    contest: Contest, recipes: Sequence[str], tuned: Mapping[tuple[str, str], Tuned]
) -> dict[str, Tuned]:
    """What earlier tuning found for the recipes of a contest, by the recipe that was tuned."""
    # A configuration of the user's may be called as a task of ours is.
    every = {**(BUILT_IN if contest.task else {}), **tuned}
    bases = dict.fromkeys(RECIPES[name].tuned_as for name in recipes)
    return {base: every[contest.name, base] for base in bases if (contest.name, base) in every}


def _first_free_seed(known: Mapping[str, Tuned], count: int) -> int:
    """The first of ``count`` seeds in a row on none of which a recipe was tuned."""
    taken = {seed for tuned in known.values() for seed in tuned.seeds}
    first = 0
    while both := taken & {*range(first, first + count)}:
        first = max(both) + 1
    return first


def _refuse_tuning_seeds(name: str, tuned: Tuned, seeds: Sequence[int]) -> None:
    both = sorted({*seeds} & {*tuned.seeds})
    if both:
        raise UsageError(
            f"{RECIPES[name].title} was tuned on seed {both[0]} ({tuned.source}), which is to be reported; "
            f"take seeds that chose nothing, --first-seed {max(*seeds, *tuned.seeds) + 1}"
        )


def _print_tables(console: Console, rows: Sequence[Row]) -> None:
    console.print(bench_tables.result_table(rows))
    attribution = bench_tables.attribution_table(rows)
    if attribution is not None:
        console.print(attribution)
    for note in bench_tables.notes(rows):
        console.print(f"  {note}", soft_wrap=True)


def _told(row: Row, targets: Sequence[float | str]) -> str:
    said = [
        f"{RECIPES[row['recipe']].title}, seed {row['seed']}: {row['steps']} steps, {row['seconds']:.1f} s"
    ]
    for target in targets:
        if not isinstance(target, str):
            found = bench_summary.time_to(row["curve"], target, higher=row["higher"])
            said.append(
                f"{target:g} held from step {found[0]}, {found[1]:.1f} s" if found else f"{target:g} never"
            )
    if row["best"] is not None:
        said.append(f"best {row['figure']} {row['best']:.4g}, test {row['test']:.4g}")
    return "; ".join([*said, *([f"failed: {row['error']}"] if row["error"] else [])])
