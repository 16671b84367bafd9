"""What all recipes of a comparison share, and the options that each run comes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phase5_training.config import TrainingConfig, load_yaml, parse_config
from phase5_training.errors import UsageError, nearest_match
from phase5_training.hardware import resolve_amp, resolve_device
from phase5_training.optimizers import AVERAGES
from phase5_training.recipes import TASKS, BenchTask, Recipe, Tuned
from phase5_training.tasks import load_task

Options = dict[str, Any]

_FILTER_OPTIONS = (
    "use_grokfast", "filter", *(n for n in TrainingConfig.model_fields if n.startswith("grokfast_")),
)  # fmt: skip
# What recipes decide, whatever a configuration says.
_OF_RECIPES = (
    *_FILTER_OPTIONS, *AVERAGES, "use_bitnet", "optimizer", "learning_rate", "weight_decay", "backward",
    "activation_bits",
)  # fmt: skip
# Of a run that is there to be compared: to its end, with all its evaluations.
_COMMON: Options = {"early_stopping": False, "overwrite": True, "auto_resume": False, "progress": "quiet"}
_PHASES = (
    "schedule", "warmup_steps", "acceleration_steps", "consolidation_steps", "acceleration_multiplier",
    "consolidation_multiplier",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What all recipes of a comparison share.

    Args:
        name: of the task or configuration.
        options: of every run: model, data, batch, length, evaluations, precision.
        targets: see :class:`phase5_training.recipes.BenchTask`.
        folder: holds the data, the runs and the report.
        task: the built-in task, None for a configuration of the user's.
    """

    name: str
    options: Options
    targets: tuple[float | str, ...]
    folder: Path
    task: BenchTask | None = None


def built_in(name: str, output_dir: str = "runs", **changes: Any) -> Contest:
    """A built-in comparison; its data are written to files first.

    Args:
        name: a key of ``recipes.TASKS``.
        output_dir: gets a folder ``bench-<name>``.
        changes: options of every run that replace the task's, such as max_steps.

    Raises:
        UsageError: there is no such comparison; names the nearest.
    """
    if name not in TASKS:
        near = nearest_match(name, TASKS)
        hint = f"did you mean {near!r}?" if near else f"use one of {', '.join(TASKS)}"
        raise UsageError(f"task {name!r} is unknown; {hint}")
    task, folder = TASKS[name], Path(output_dir) / f"bench-{name}"
    form = "bin" if task.task == "python_text" else "npz"
    train, validation = load_task(task.task, **task.task_options).write(folder / "data", form)
    data = {"train_data_path": str(train), "val_data_path": str(validation)}
    # max_steps ends a run; the pipeline takes whichever comes first.
    options = in_one_precision({**task.options, **data, "epochs": 1_000_000, **changes})
    return Contest(name=name, options=options, targets=task.targets, folder=folder, task=task)


def from_config(path: str, output_dir: str = "runs", **changes: Any) -> Contest:
    """A comparison on the user's own configuration; what recipes decide is taken out of it.

    Raises:
        UsageError: the file names no training and validation data.
    """
    values = load_yaml(path)
    config = parse_config({**values, **changes}, where=path)
    for key in ("train_data_path", "val_data_path"):
        if not values.get(key):
            raise UsageError(
                f"{path} has no {key}, and all recipes and seeds are to share their data; name the file"
            )
    if config.max_seconds is not None and config.max_steps is None:
        raise UsageError(
            f"{path} has max_seconds and no max_steps; tuning takes a tenth of max_steps, give it"
        )
    options = {key: value for key, value in {**values, **changes}.items() if key not in _OF_RECIPES}
    options = in_one_precision(options)
    name = Path(path).stem
    return Contest(name=name, options=options, targets=("float",), folder=Path(output_dir) / f"bench-{name}")


def in_one_precision(options: Options) -> Options:
    """The options with ``use_amp`` settled: bf16 where it is the faster one here, else float32.

    "auto" is a measurement, which would be made again by every run: two runs of one comparison might train in
    different precisions. A recipe that names its own (``float_bf16``) keeps it.
    """
    device = resolve_device(options.get("device", "auto"))
    use_amp, _ = resolve_amp(options.get("use_amp", "auto"), options.get("amp_dtype", "auto"), device)
    return {**options, "use_amp": use_amp}


def options_of(contest: Contest, recipe: Recipe, tuned: Tuned | None) -> Options:
    """The options of a run: the contest's, the recipe's, and what tuning found for it."""
    # Whether the filter is on is the recipe's own affair.
    found = {k: v for k, v in (tuned.options if tuned else {}).items() if k not in _FILTER_OPTIONS}
    cap = contest.options.get("max_steps")
    if cap and found.get("max_steps", cap) > cap:
        raise UsageError(
            f"{recipe.title!r} was tuned for {found['max_steps']} steps and the cap is {cap}; raise the cap"
        )
    own = {**_COMMON, **recipe.options, **found}
    # A schedule comes with its lengths, or with none.
    left_out = _PHASES if "schedule" in own else ()
    return {**{k: v for k, v in contest.options.items() if k not in left_out}, **own}
