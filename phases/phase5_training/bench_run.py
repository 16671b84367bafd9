"""One run of a comparison: the pipeline of ``forge train``, with a clock and the data halved.

The validation data are halved. Targets and best weights are watched on one half; the quality that is reported
is measured on the other, on which nothing was selected.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import torch

from phase4_bitnet.naive import convert_model_to_naive
from phase5_training import bench_summary
from phase5_training.assembly import data_config
from phase5_training.batches import rows_of
from phase5_training.commands import pipeline_from
from phase5_training.config import parse_config
from phase5_training.contest import Contest, options_of
from phase5_training.errors import RunFailed, UsageError
from phase5_training.factory import TrainingPipeline, create_training_pipeline
from phase5_training.models import prepare_model
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.random_state import seed_everything
from phase5_training.recipes import Recipe, Tuned
from phase5_training.records import machine, plain

Options = dict[str, Any]
Row = dict[str, Any]

# What a kind of task is judged by, and whether more of it is better.
FIGURES = {
    "classification": ("accuracy", True),
    "next_token": ("bits_per_byte", False),
    "regression": ("mse", False),
}


def run_once(
    contest: Contest,
    name: str,
    recipe: Recipe,
    tuned: Tuned | None,
    seed: int,
    stop_at: Sequence[float] = (),
) -> Row:
    """One recipe on one seed.

    Args:
        contest: what is shared.
        name: of the recipe, for the row and the run's folder.
        recipe: the recipe itself.
        tuned: its figures; None for a recipe that is not tuned.
        seed: of weights and data order.
        stop_at: stop once all of these are held; empty goes to the end.

    Returns:
        A row of the record: "curve" has (step, seconds, figure on the watched half) of each evaluation,
        "test" the figure of the best weights on the other half, "seconds" the whole run. "precision" and
        "compiled" say how it was computed; None where it failed before that was settled.
    """
    options = options_of(contest, recipe, tuned)
    curve: list[list[float]] = []
    row: Row = {
        "kind": "run", "task": contest.name, "recipe": name, "seed": seed,
        "options": {k: v for k, v in options.items() if k not in ("train_data_path", "val_data_path")},
        "ternary": recipe.naive or options.get("use_bitnet", True), "precision": None, "compiled": None,
        "figure": None, "higher": True,
        "curve": curve, "best": None, "test": None, "steps": 0, "stop_reason": "failed", "error": "",
        "tuning_steps": tuned.steps if tuned else 0, "tuning_seconds": tuned.seconds if tuned else 0.0,
        "tuning_trials": tuned.trials if tuned else 0, "tuning_source": tuned.source if tuned else "",
        "cap_steps": options.get("max_steps"), "cap_seconds": options.get("max_seconds"),
    }  # fmt: skip
    with _cold_compiler():
        started = time.perf_counter()
        pipeline = make_pipeline(contest, recipe, options, seed, f"{name}-seed{seed}")

        def after(step: int, metrics: dict[str, Any]) -> None:
            figure = metrics[row["figure"]]
            # A figure that is not finite meets no target.
            if figure is None or not math.isfinite(figure):
                figure = -math.inf if row["higher"] else math.inf
            curve.append([step, time.perf_counter() - started, figure])
            held = [bench_summary.time_to(curve, target, higher=row["higher"]) for target in stop_at]
            if held and all(held):
                pipeline.stop()

        pipeline.register_callback("eval_end", after)
        try:
            pipeline.setup()
            row |= {"precision": precision_of(pipeline), "compiled": pipeline.resolved.compile}
            pipeline.val_loader, test = halves_of(pipeline)
            row["figure"], row["higher"] = figure_of(pipeline)
            result = pipeline.run()
            row |= {"steps": result.metrics["steps"], "stop_reason": result.stop_reason}
        except RunFailed as error:
            row["error"] = str(error)
            row["steps"] = pipeline.loop.state.step if pipeline.ready else 0
        row["seconds"] = time.perf_counter() - started
    if pipeline.ready and pipeline.loop.best_weights is not None:
        row["test"] = quality(pipeline, test)[row["figure"]]
        figures = [figure for _, _, figure in curve]
        row["best"] = max(figures) if row["higher"] else min(figures)
    row["run"] = str(pipeline.run_directory.path) if pipeline.run_directory else None
    return plain(row)


def warm_up(contest: Contest, recipes: Iterable[tuple[Recipe, Tuned | None]], steps: int = 3) -> None:
    """A few steps and a validation of each recipe that nobody times and no record holds.

    The first run of a process pays for imports that wait until they are needed, and on a fresh machine for
    compiling the native kernels; which recipe that is must not matter. A recipe that fails here fails again
    in its own run, which says so.

    Args:
        contest: what is shared; its folder stays as it is.
        recipes: with their tuned figures, None where they are not known yet.
        steps: before the validation and the end.
    """
    with tempfile.TemporaryDirectory() as folder, _cold_compiler():
        aside = replace(contest, folder=Path(folder))
        for recipe, tuned in recipes:
            options = {**options_of(contest, recipe, tuned), "eval_interval": steps, "trackers": []}
            pipeline = make_pipeline(aside, recipe, options, 0, "warm-up")
            pipeline.register_callback("eval_end", lambda *_, pipeline=pipeline: pipeline.stop())
            with contextlib.suppress(RunFailed):
                pipeline.run()


def precision_of(pipeline: TrainingPipeline) -> str:
    """What a pipeline that is set up computes in outside its ternary products: float32, bf16 or fp16."""
    config = pipeline.loop.config
    if not config.use_amp:
        return "float32"
    return "fp16" if config.amp_dtype == torch.float16 else "bf16"


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


def make_pipeline(
    contest: Contest, recipe: Recipe, options: Options, seed: int, run: str
) -> TrainingPipeline:
    """The pipeline of one run of a contest; ``run`` names its folder."""
    values = {**options, "seed": seed, "experiment_name": run, "output_dir": str(contest.folder)}
    if not recipe.naive:
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
    with inductor.patch(force_disable_caches=True), warnings.catch_warnings():
        # Torch warns that its caches are off, which is what was asked for.
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield


def circumstances() -> Row:
    """Machine, threads and command of this process, for each row of a record."""
    script = Path(sys.argv[0]).name
    called = ["forge"] if script in ("forge", "__main__.py") else ["python", sys.argv[0]]
    command = shlex.join([*called, *sys.argv[1:]])
    return {"machine": machine(), "threads": torch.get_num_threads(), "command": command}


def append(record: Path | None, row: Row) -> None:
    """Add a row to a record; where the run's folder lies is nobody else's business."""
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("ab") as file:
            file.write(orjson.dumps({k: v for k, v in plain(row).items() if k != "run"}) + b"\n")
