"""``forge bench``: recipes side by side, by the time they take to a target that they hold.

Every run goes through the pipeline that ``forge train`` uses, on the same model, data, batch and evaluations,
one seed of every recipe after the other. A clock runs from before the pipeline is made, so opening the data,
compiling, validating, saving and drawing the report all count; only tuning has a column of its own.

The validation data are halved. Targets and best weights are watched on one half; the quality that is reported
is measured on the other, on which nothing was selected.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from rich.console import Console

from phase4_bitnet.naive import convert_model_to_naive
from phase5_training import bench_summary
from phase5_training.assembly import data_config
from phase5_training.batches import rows_of
from phase5_training.commands import pipeline_from
from phase5_training.config import parse_config
from phase5_training.contest import Contest, built_in, from_config, options_of
from phase5_training.errors import RunFailed, UsageError
from phase5_training.factory import TrainingPipeline, create_training_pipeline
from phase5_training.models import prepare_model
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.random_state import seed_everything
from phase5_training.recipes import BUILT_IN, RECIPES, TASKS, Tuned, chosen_recipes, grid, read_tuned
from phase5_training.records import RunDirectory, machine, plain
from phase5_training.report import write_report

Options = dict[str, Any]
Row = dict[str, Any]

# Candidates of a grid that are run on more seeds.
FINALISTS = 3
# What a kind of task is judged by, and whether more of it is better.
FIGURES = {
    "classification": ("accuracy", True),
    "next_token": ("bits_per_byte", False),
    "regression": ("mse", False),
}


def run_bench(
    config: str | None,
    task: str | None,
    *,
    recipes: Sequence[str] | None = None,
    attribution: bool = False,
    seeds: int = 5,
    first_seed: int = 0,
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
    return bench(
        contest,
        chosen_recipes(recipes, attribution),
        range(first_seed, first_seed + seeds),
        targets=[figure_or_recipe(word) for word in target or ()],
        tuned=read_tuned(tuned) if tuned else None,
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
        tuned: what earlier tuning found; a recipe without figures is tuned first, for a tenth of the run.
        full: go on after the targets are held, to the end of the schedule.
        record: file of JSON lines that every row is appended to as it comes.
        quiet: print the tables only.

    Returns:
        "runs", "summaries" and the path of the "report".

    Raises:
        UsageError: a target names a recipe that is not run.
    """
    targets = tuple(targets) or contest.targets
    for target in targets:
        if isinstance(target, str) and target not in recipes:
            raise UsageError(
                f"target {target!r} is the figure of a recipe that is not run; add it to --recipes"
            )
    # A file or pipe has no width; folded into 80 columns the table cannot be read.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    known = {**BUILT_IN, **(tuned or {})}
    figures_to_hold = [target for target in targets if not isinstance(target, str)]
    # What another run will have held is not known before it has run.
    stop_at = figures_to_hold if not full and len(figures_to_hold) == len(targets) else []
    runs: list[Row] = []
    about = _circumstances()
    figures: dict[str, Tuned] = {}
    for name in recipes:
        base = RECIPES[name].tuned_as
        if base and base not in figures:
            # Not on a seed that is reported, which would be the one that was tuned for.
            figures[base] = known.get((contest.name, base)) or tune_once(contest, base, max(seeds) + 1)
            _append(record, {"kind": "tuned", **tuned_row(contest.name, base, figures[base]), **about})
    for turn, seed in enumerate(seeds):
        start = turn % len(recipes)
        for name in [*recipes[start:], *recipes[:start]]:
            row = run_once(contest, name, figures.get(RECIPES[name].tuned_as), seed, stop_at)
            runs.append(row)
            _append(record, {**row, **about})
            if not quiet:
                console.print(_told(row, targets))
    rows = bench_summary.summaries(runs, targets)
    for row in rows:
        _append(record, {**row, **about})
    console.print(bench_summary.result_table(rows))
    attribution = bench_summary.attribution_table(rows)
    if attribution is not None:
        console.print(attribution)
    for note in bench_summary.cap_notes(rows):
        console.print(f"cap: {note}")
    report = write_bench_report(contest, runs, rows)
    console.print(f"report: {report}", soft_wrap=True)
    return {"runs": runs, "summaries": rows, "report": report}


def run_once(
    contest: Contest, name: str, tuned: Tuned | None, seed: int, stop_at: Sequence[float] = ()
) -> Row:
    """One recipe on one seed.

    Args:
        contest: what is shared.
        name: of the recipe.
        tuned: its figures; None for a recipe that is not tuned.
        seed: of weights and data order.
        stop_at: stop once all of these are held; empty goes to the end.

    Returns:
        A row of the record: "curve" has (step, seconds, figure on the watched half) of each evaluation,
        "test" the figure of the best weights on the other half, "seconds" the whole run.
    """
    options = options_of(contest, name, tuned)
    curve: list[list[float]] = []
    row: Row = {
        "kind": "run", "task": contest.name, "recipe": name, "seed": seed,
        "options": {k: v for k, v in options.items() if k not in ("train_data_path", "val_data_path")},
        "ternary": RECIPES[name].naive or options.get("use_bitnet", True), "figure": None, "higher": True,
        "curve": curve, "best": None, "test": None, "steps": 0, "stop_reason": "failed", "error": "",
        "tuning_steps": tuned.steps if tuned else 0, "tuning_seconds": tuned.seconds if tuned else 0.0,
        "cap_steps": options.get("max_steps"), "cap_seconds": options.get("max_seconds"),
    }  # fmt: skip
    with _cold_compiler():
        started = time.perf_counter()
        pipeline = make_pipeline(contest, name, options, seed, f"{name}-seed{seed}")

        def after(step: int, metrics: dict[str, Any]) -> None:
            figure = metrics[row["figure"]]
            # A figure that is not finite meets no target.
            bad = float("-inf") if row["higher"] else float("inf")
            curve.append([step, time.perf_counter() - started, bad if figure is None else figure])
            held = [bench_summary.time_to(curve, target, higher=row["higher"]) for target in stop_at]
            if held and all(held):
                pipeline.stop()

        pipeline.register_callback("eval_end", after)
        try:
            pipeline.setup()
            pipeline.val_loader, test = halves_of(pipeline)
            row["figure"], row["higher"] = figure_of(pipeline)
            result = pipeline.run()
            row |= {"steps": result.metrics["steps"], "stop_reason": result.stop_reason}
        except RunFailed as error:
            row["error"] = str(error)
            row["steps"] = pipeline.loop.state.step
        row["seconds"] = time.perf_counter() - started
    if pipeline.loop.best_weights is not None:
        row["test"] = quality(pipeline, test)[row["figure"]]
        finite = [figure for _, _, figure in curve]
        row["best"] = max(finite) if row["higher"] else min(finite)
    row["run"] = str(pipeline.run_directory.path) if pipeline.run_directory else None
    return plain(row)


def tune_once(contest: Contest, name: str, seed: int) -> Tuned:
    """Figures for a recipe, by the search that ``learning_rate="auto"`` does: a tenth of the run's steps."""
    started = time.perf_counter()
    pipeline = make_pipeline(contest, name, options_of(contest, name, None), seed, f"{name}-tuning").setup()
    # The reported half must not choose.
    pipeline.val_loader, _ = halves_of(pipeline)
    tuning = pipeline.tune()
    return Tuned(
        options=tuning.options,
        steps=tuning.steps,
        seconds=time.perf_counter() - started,
        trials=len(tuning.trials),
        source="learning_rate=auto",
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
    started, tried = time.perf_counter(), grid(RECIPES[name], contest.task)
    rows: list[list[Row]] = [[] for _ in tried]

    def run(index: int, seed: int) -> None:
        row = run_once(contest, name, Tuned(options=tried[index]), seed, numeric)
        rows[index].append({**row, "kind": "candidate", "tried": tried[index]})
        _append(record, rows[index][-1])

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
    )
    _append(record, {"kind": "tuned", **tuned_row(contest.name, name, found), **_circumstances()})
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


def figure_of(pipeline: TrainingPipeline) -> tuple[str, bool]:
    """(name of the figure that a run is judged by, whether more is better)."""
    name, higher = FIGURES.get(pipeline.spec.task, ("loss", False))
    if name == "bits_per_byte" and pipeline.spec.tokenizer not in (None, "bytes"):
        return "loss", False
    return name, higher


def quality(pipeline: TrainingPipeline, loader: Any) -> dict[str, Any]:
    """The figures of the weights that validated best, on data that chose nothing."""
    loop = pipeline.loop
    pipeline.optimizer.release()
    if loop.best_weights is not None:
        pipeline.model.load_state_dict(loop.best_weights)
    return loop.validate(loader, pipeline.loss)


class Half:
    """A part of a validation set, batch by batch."""

    def __init__(self, loader: Any, batches: list[dict[str, Any]]) -> None:
        self._loader, self._batches = loader, batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def first(self) -> dict[str, Any]:
        """The first batch."""
        return self._batches[0]

    def description(self) -> dict[str, Any]:
        """Of the whole set, with the samples of this part."""
        samples = sum(len(batch["index"]) for batch in self._batches)
        return {**self._loader.description(), "samples": samples, "batches": len(self._batches)}


def halves_of(pipeline: TrainingPipeline) -> tuple[Half, Half]:
    """(watched, reported) parts of the validation data of a pipeline that is set up; see :func:`halves`."""
    return halves(pipeline.val_loader, in_order=pipeline.spec.task == "next_token")


def halves(loader: Any, *, in_order: bool) -> tuple[Half, Half]:
    """(watched, reported) parts of a validation set, without a sample in common.

    Args:
        loader: of the whole set.
        in_order: the first and the second half of the batches, for text, whose neighbors belong together;
            else every other sample, so that a file sorted by class is halved class by class.

    Raises:
        UsageError: there is no validation data, or too little for two parts.
    """
    batches = list(loader) if loader is not None else []
    parts: tuple[list[Any], list[Any]] = ([], [])
    if in_order and len(batches) > 1:
        middle = len(batches) // 2
        parts = (batches[:middle], batches[middle:])
    else:
        for batch in batches:
            for part, start in zip(parts, (0, 1), strict=True):
                own = rows_of(batch, slice(start, None, 2))
                if len(own["index"]):
                    part.append(own)
    if not all(parts):
        raise UsageError(
            f"{sum(len(b['index']) for b in batches)} validation samples cannot be halved, one half to watch "
            "and one to report; give more validation data"
        )
    return Half(loader, parts[0]), Half(loader, parts[1])


def tuned_row(task: str, recipe: str, tuned: Tuned) -> Row:
    """What ``recipes.read_tuned`` reads."""
    return {
        "task": task,
        "recipe": recipe,
        "options": tuned.options,
        "tuning_steps": tuned.steps,
        "tuning_seconds": tuned.seconds,
        "tuning_trials": tuned.trials,
        "source": tuned.source,
    }


def write_bench_report(contest: Contest, runs: Sequence[Row], rows: Sequence[Row]) -> Path:
    """The report of the last run of Forge, or else of the last recipe, with the comparison in it."""
    of_forge = [run for run in runs if run["recipe"] == "forge" and run["run"]]
    own = (of_forge or [run for run in runs if run["run"]])[-1]
    directory = RunDirectory(own["run"])
    compared = bench_summary.comparison_rows(runs, rows)
    title = RECIPES[own["recipe"]].title
    # The report's own run comes first.
    compared.sort(key=lambda row: row["name"] != title)
    directory.write_result({**(directory.read_result() or {}), "comparison": compared})
    return write_report([directory.path], contest.folder / "report.html")


def make_pipeline(contest: Contest, name: str, options: Options, seed: int, run: str) -> TrainingPipeline:
    """The pipeline of one run of a contest; ``run`` names its folder."""
    values = {**options, "seed": seed, "experiment_name": run, "output_dir": str(contest.folder)}
    if not RECIPES[name].naive:
        return pipeline_from(values)
    config = parse_config(values)
    training, _ = DataLoaderFactory.create_loaders(config.train_data_path, data_config(config, split=False))
    seed_everything(seed)  # the weights that the other recipes begin with
    model = convert_model_to_naive(prepare_model(config.model, config, training.spec))
    rest = {k: v for k, v in values.items() if k not in ("model", "model_options")}
    data = (rest.pop("train_data_path"), rest.pop("val_data_path"))
    return create_training_pipeline(model, *data, **rest)


@contextlib.contextmanager
def _cold_compiler() -> Iterator[None]:
    """What torch compiled for one run is not there for the next: each pays what its user would pay."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch(force_disable_caches=True):
        yield


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


def _circumstances() -> Row:
    script = Path(sys.argv[0]).name
    called = ["forge"] if script in ("forge", "__main__.py") else ["python", sys.argv[0]]
    command = shlex.join([*called, *sys.argv[1:]])
    return {"machine": machine(), "threads": torch.get_num_threads(), "command": command}


def _append(record: Path | None, row: Row) -> None:
    """Add a row to a record; where the run's folder lies is nobody else's business."""
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("ab") as file:
            file.write(orjson.dumps({k: v for k, v in plain(row).items() if k != "run"}) + b"\n")
