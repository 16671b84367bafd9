"""What ``forge bench`` compares: recipes, tasks, and the figures that earlier tuning has found.

A recipe is a set of options of a run. All recipes of a comparison share the model, data, batch and
evaluations; what a recipe leaves open (rate and decay) comes from tuning, at the same budget for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from phase5_training.errors import UsageError, nearest_match

Options = dict[str, Any]

# The figures of the document that Forge was written to, and of most tutorials.
_PLAIN: Options = {
    "optimizer": "adamw", "learning_rate": 1e-4, "weight_decay": 1e-2, "schedule": "constant",
    "warmup_steps": 0,
}  # fmt: skip
# Lee et al. 2024 (arXiv:2405.20233), named, so that no evidence is asked for.
_PAPER_FILTER: Options = {"use_grokfast": True, "grokfast_alpha": 0.98, "grokfast_lambda": 2.0}
_FILTER: Options = {"use_grokfast": True}
_NO_FILTER: Options = {"use_grokfast": False}
_FLOAT: Options = {"use_bitnet": False}
_INT8: Options = {"backward": "int8"}
_NO_INT8: Options = {"backward": "float32", "activation_bits": None}
# Optimizers and rates that tuning tries; as many for each kind of recipe, so that the budgets are equal.
# Forge chooses its optimizer as well: a step of Muon costs more, in a small network many times more.
RATES: dict[str, tuple[tuple[str, float], ...]] = {
    "adamw": tuple(("adamw", rate) for rate in (3e-4, 1e-3, 3e-3, 6e-3)),
    "muon": tuple(("muon", rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2)),
    "auto": (("muon", 3e-3), ("muon", 1.5e-2), ("adamw", 1e-3), ("adamw", 4e-3)),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train.

    Args:
        title: for the table.
        options: of the run.
        tuned_as: the recipe whose tuned figures it takes; empty for one that is not tuned.
        naive: hidden layers become :class:`phase4_bitnet.naive.NaiveBitLinear`.
        factors: weights, filter, int8 and tuned, for the attribution.
    """

    title: str
    options: Options
    tuned_as: str = ""
    naive: bool = False
    factors: Mapping[str, Any] = field(default_factory=dict)


def _cell(
    title: str, options: Options, *, ternary: bool, filtered: bool, int8: bool | None, tuned_as: str = ""
) -> Recipe:
    factors = {
        "weights": "ternary" if ternary else "float",
        "filter": filtered,
        "int8": int8,
        "tuned": bool(tuned_as),
    }
    return Recipe(title=title, options=options, tuned_as=tuned_as, factors=factors)


def _attribution() -> dict[str, Recipe]:
    """Float or ternary x filter x int8 x tuned; the cells that are recipes of their own keep their names."""
    cells: dict[str, Recipe] = {}
    for ternary, int8, tuned, filtered in itertools.product(*[(False, True)] * 4):
        if int8 and not ternary:
            continue
        if ternary:
            base = ("forge" if int8 else "ternary") if tuned else "ternary_plain" + "_int8" * int8
        else:
            base = "float" if tuned else "plain"
        weights = (_INT8 if int8 else _NO_INT8) if ternary else _FLOAT
        # Without tuning the document's own settings, its optimizer and the paper's filter.
        filter_on = _FILTER if tuned else _PAPER_FILTER
        own = {} if tuned else _PLAIN
        if tuned:
            own = {"optimizer": "auto" if ternary else "adamw"}
        title = _TITLES.get(base, base.replace("_", " "))
        cells[base + "_filter" * filtered] = _cell(
            title + (", filter" if filtered else ""),
            {**weights, **own, **(filter_on if filtered else _NO_FILTER)},
            ternary=ternary,
            filtered=filtered,
            int8=int8 if ternary else None,
            tuned_as=("forge" if ternary else "float") if tuned else "",
        )
    return cells


_TITLES = {
    "plain": "float, plain settings",
    "float": "float AdamW, tuned",
    "ternary_plain": "ternary, plain settings",
    "ternary_plain_int8": "ternary int8, plain settings",
    "ternary": "ternary, tuned, no int8",
    "forge": "Forge",
}
RECIPES: dict[str, Recipe] = {
    **_attribution(),
    "float_muon": Recipe(
        title="float Muon, tuned",
        options={**_FLOAT, **_NO_FILTER, "optimizer": "muon"},
        tuned_as="float_muon",
    ),
    "float_bf16": Recipe(
        title="float AdamW, tuned, bf16",
        options={**_FLOAT, **_NO_FILTER, "optimizer": "adamw", "use_amp": True},
        tuned_as="float",
    ),
    "naive": Recipe(
        title="fake-quant ternary AdamW, tuned",
        options={**_FLOAT, **_NO_FILTER, "optimizer": "adamw"},
        tuned_as="naive",
        naive=True,
    ),
}
# (a), (b), (b2), (c), (d): what stands side by side unless others are named.
SIDE_BY_SIDE = ("plain", "float", "float_muon", "naive", "forge")
ATTRIBUTION = tuple(name for name, recipe in RECIPES.items() if recipe.factors)


@dataclass(frozen=True, kw_only=True)
class BenchTask:
    """A built-in comparison: a task of ``tasks.py`` with batch, evaluations and cap.

    Args:
        task: name in ``tasks.TASKS``. task_options: of its function.
        options: of every run, whatever the recipe.
        rates: optimizers and rates that tuning tries; see RATES.
        decays: of weights that tuning tries.
        schedules: shapes of the rate that tuning tries, each with its length as a share of max_steps. A rate
            falls to the end of its length, so a run cut short is no substitute.
        averages: betas, momentum and iterations that tuning tries with each optimizer; empty for the default.
        targets: figures to reach, or the name of a recipe whose held figure is the target.
        delayed: generalization comes long after the fit, so short trials show nothing.
    """

    task: str
    task_options: Options = field(default_factory=dict)
    options: Options
    rates: Mapping[str, tuple[tuple[str, float], ...]] = field(default_factory=lambda: RATES)
    decays: tuple[float, ...] = (0.1,)
    schedules: tuple[tuple[str, float], ...] = (("linear", 1.0),)
    averages: Mapping[str, tuple[Options, ...]] = field(default_factory=dict)
    targets: tuple[float | str, ...] = (0.95, 0.99)
    delayed: bool = False


# Around the best rates of benchmarks/records/sweep_modular.jsonl.
_MODULAR_RATES: dict[str, tuple[tuple[str, float], ...]] = {
    "adamw": tuple(("adamw", rate) for rate in (5e-4, 1e-3, 1.5e-3, 2e-3)),
    "muon": tuple(("muon", rate) for rate in (1e-3, 3e-3, 6e-3, 1.2e-2)),
    "auto": (("adamw", 1e-3), ("muon", 2e-3), ("muon", 3e-3), ("muon", 4e-3)),
}
# A run of a hundred steps has little use for averages over twenty.
_SHORT_AVERAGES: dict[str, tuple[Options, ...]] = {
    "adamw": ({}, {"betas": [0.8, 0.98]}),
    "muon": (
        {},
        {"betas": [0.8, 0.98], "momentum": 0.9, "ns_steps": 2, "ns_coefficients": "polar_express"},
    ),
}


def _modular(operation: str, cap: int = 450) -> BenchTask:
    return BenchTask(
        task="modular_arithmetic",
        task_options={"operation": operation},
        options={"model": "decoder", "batch_size": 512, "max_steps": cap, "eval_interval": 15},
        rates=_MODULAR_RATES,
        decays=(1.0, 3.0, 6.0),
        schedules=(("constant", 1.0),),
        averages=_SHORT_AVERAGES,
        delayed=True,
    )


def _table(task: str, targets: tuple[float | str, ...]) -> BenchTask:
    return BenchTask(
        task=task,
        # Half of what is held out is watched, half is reported.
        task_options={"validation_share": 0.4},
        options={"model": "mlp", "model_options": {"hidden": [128, 128]}, "batch_size": 32, "max_steps": 600,
                 "eval_interval": 10},
        decays=(0.01, 0.1, 1.0),
        targets=targets,
    )  # fmt: skip


_DIGITS: Options = {"model": "mlp", "model_options": {"hidden": [512, 512]}, "batch_size": 64}
TASKS: dict[str, BenchTask] = {
    "modular_mul": _modular("*"),
    "modular_add": _modular("+"),
    "modular_div": _modular("/"),
    "s5": _modular("S5", 4000),
    "digits": BenchTask(
        task="digits",
        task_options={"validation_share": 0.4},
        options={**_DIGITS, "max_steps": 510, "eval_interval": 17},
        decays=(0.01, 0.1, 1.0),
        schedules=(("linear", 1.0), ("linear", 0.5)),
    ),
    "digits_small": BenchTask(
        task="digits",
        task_options={"validation_share": 0.4, "train_size": 100},
        options={**_DIGITS, "max_steps": 2000, "eval_interval": 20},
        decays=(0.01, 0.1, 1.0),
        targets=("float",),
        delayed=True,
    ),
    "python_text": BenchTask(
        task="python_text",
        task_options={"max_bytes": 4_000_000, "validation_share": 0.05},
        options={
            "model": "decoder",
            "model_options": {"dim": 128, "layers": 4, "heads": 4},
            "batch_size": 16,
            "max_length": 128,
            "max_steps": 400,
            "eval_interval": 20,
        },
        schedules=(("linear", 1.0), ("linear", 0.5)),
        targets=("float", "float_muon"),
    ),
    "breast_cancer": _table("breast_cancer", (0.95, "float")),
    "wine": _table("wine", (0.95, "float")),
    "diabetes": _table("diabetes", ("float",)),
}


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The options that tuning has found for a recipe, and what it cost to find them.

    Args:
        options: for the run. steps, seconds: of all trials together; None where no record says.
        trials: how many there were. source: what tuned it, or the record of that.
        seeds: of the trials; none of them may be reported.
    """

    options: Options
    steps: int | None = None
    seconds: float | None = None
    trials: int | None = None
    source: str = ""
    seeds: tuple[int, ...] = ()


_TUNED = "benchmarks/records/tuned.jsonl"


def _found(
    optimizer: str,
    rate: float,
    decay: float,
    steps: int,
    seconds: float,
    trials: int,
    *,
    seeds: tuple[int, ...] = (100,),
    **more: Any,
) -> Tuned:
    options = {
        "optimizer": optimizer, "learning_rate": rate, "weight_decay": decay, "schedule": "linear",
        "warmup_steps": 10, **more,
    }  # fmt: skip
    return Tuned(options=options, steps=steps, seconds=seconds, trials=trials, source=_TUNED, seeds=seeds)


_ON_PRODUCTS: dict[str, Any] = {"schedule": "constant", "seeds": (100, 101, 102)}
_SHORT = _SHORT_AVERAGES["muon"][1]
# What tuning chose in the committed record, so that a first comparison need not repeat it.
BUILT_IN: dict[tuple[str, str], Tuned] = {
    ("modular_mul", "forge"): _found("muon", 3e-3, 1.0, 8070, 338.0, 30, **_ON_PRODUCTS, **_SHORT),
    ("modular_mul", "float"): _found("adamw", 1e-3, 6.0, 6105, 221.9, 22, **_ON_PRODUCTS),
    ("modular_mul", "float_muon"): _found("muon", 3e-3, 1.0, 7710, 510.4, 30, **_ON_PRODUCTS, **_SHORT),
    ("modular_mul", "naive"): _found("adamw", 1.5e-3, 3.0, 4725, 236.0, 16, **_ON_PRODUCTS),
    ("digits", "forge"): _found("adamw", 4e-3, 1.0, 2601, 81.5, 24),
    ("digits", "float"): _found("adamw", 3e-3, 1.0, 2584, 28.2, 24, max_steps=255),
    ("digits", "float_muon"): _found("muon", 3e-3, 0.01, 3043, 120.9, 24, max_steps=255),
    ("python_text", "forge"): _found("muon", 1.5e-2, 0.1, 2400, 284.6, 8, seeds=(0,)),
    ("python_text", "float"): _found("adamw", 1e-3, 0.1, 2400, 421.7, 8, seeds=(0,)),
    ("python_text", "float_muon"): _found("muon", 1e-2, 0.1, 2400, 441.9, 8, seeds=(0,)),
    ("breast_cancer", "forge"): _found("adamw", 4e-3, 0.1, 1010, 14.1, 12),
    ("breast_cancer", "float"): _found("adamw", 3e-3, 1.0, 840, 11.9, 12),
    ("breast_cancer", "float_muon"): _found("muon", 1e-2, 0.1, 2830, 17.4, 12),
    ("wine", "forge"): _found("adamw", 4e-3, 1.0, 630, 14.3, 12),
    ("wine", "float"): _found("adamw", 6e-3, 0.1, 660, 9.9, 12),
    ("wine", "float_muon"): _found("muon", 3e-2, 1.0, 720, 11.8, 12),
    ("diabetes", "forge"): _found("adamw", 1e-3, 0.1, 7200, 27.9, 12),
    ("diabetes", "float"): _found("adamw", 6e-3, 1.0, 7200, 20.0, 12),
    ("diabetes", "float_muon"): _found("muon", 1e-3, 1.0, 7200, 26.3, 12),
}
# Generalization comes late on these as well, so that short trials show nothing.
BUILT_IN |= {
    (task, recipe): replace(found, source=f"{_TUNED}, on {on}")
    for (on, recipe), found in BUILT_IN.items()
    if on == "modular_mul"
    for task in ("modular_add", "modular_div", "s5")
}


def grid(recipe: Recipe, task: BenchTask) -> list[Options]:
    """What tuning tries for a recipe on a built-in task: each rate, decay, schedule and set of averages."""
    kind = recipe.options["optimizer"]
    found = []
    for (optimizer, rate), decay, (schedule, length) in itertools.product(
        task.rates[kind], task.decays, task.schedules
    ):
        for averages in task.averages.get(optimizer, ({},)):
            found.append(
                {
                    "optimizer": optimizer,
                    "learning_rate": rate,
                    "weight_decay": decay,
                    "schedule": schedule,
                    "warmup_steps": 10,
                    **averages,
                    **({} if length == 1 else {"max_steps": round(length * task.options["max_steps"])}),
                }
            )
    return found


def read_tuned(path: str | Path) -> dict[tuple[str, str], Tuned]:
    """(task, recipe) -> what tuning has found, from the "tuned" rows of a file of JSON lines.

    Raises:
        UsageError: the file is missing or not such a file.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
        rows = [orjson.loads(line) for line in lines if line.strip()]
        tried = {(row["task"], row["recipe"], row["seed"]) for row in rows if row.get("kind") == "candidate"}
        rows = [row for row in rows if row.get("kind") == "tuned"]
        return {
            (row["task"], row["recipe"]): Tuned(
                options=row["options"],
                steps=row["tuning_steps"],
                seconds=row["tuning_seconds"],
                trials=row["tuning_trials"],
                source=Path(path).name,  # a record says nothing about the machine's folders
                # Older rows leave it to their candidates to say on which seeds they were tried.
                seeds=tuple(
                    row.get("tuning_seeds")
                    or sorted(seed for *of, seed in tried if of == [row["task"], row["recipe"]])
                ),
            )
            for row in rows
        }
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist; leave --tuned out, or give the JSON lines of a bench"
        ) from None
    except (orjson.JSONDecodeError, AttributeError, KeyError, OSError) as error:
        raise UsageError(f"{path} is no record of tuning ({type(error).__name__}: {error})") from None


def chosen_recipes(names: Iterable[str] | None, attribution: bool) -> list[str]:
    """The recipes to run.

    Args:
        names: as given; None for those that stand side by side.
        attribution: add the cells of the attribution table.

    Raises:
        UsageError: a name is unknown; names the nearest.
    """
    wanted = list(names if names is not None else SIDE_BY_SIDE)
    for name in wanted:
        if name not in RECIPES:
            near = nearest_match(name, RECIPES)
            hint = f"did you mean {near!r}?" if near else f"use some of {', '.join(RECIPES)}"
            raise UsageError(f"recipe {name!r} is unknown; {hint}")
    return list(dict.fromkeys([*wanted, *(ATTRIBUTION if attribution else ())]))
