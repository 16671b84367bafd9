"""Whether a float teacher closes the gap of a ternary student; one JSON line a run.

    python benchmarks/distillation.py --task digits --seeds 5 --record benchmarks/records/distillation.jsonl

For each seed a float model is trained with the figures tuned for "float_muon" (or those named in --teacher),
then ternary students with the figures tuned for "forge": alone, and with the teacher at each share of its
loss. All runs go their whole length on the same data; the figure reported is that of the best weights on a
half of the validation data that chose nothing. The teacher's own training is in no student's seconds.
"""

import argparse
import copy
import time
from pathlib import Path

from torch import nn

from phase5_training import create_training_pipeline
from phase5_training.bench_run import (
    append,
    circumstances,
    figure_of,
    halves_of,
    precision_of,
    quality,
    warm_up,
)
from phase5_training.contest import Contest, built_in, options_of
from phase5_training.recipes import RECIPES, TASKS, read_tuned

RECORDS = Path(__file__).resolve().parent / "records"


def train(
    contest: Contest, options: dict[str, object], seed: int, name: str, teacher: nn.Module | None = None
) -> tuple[dict[str, object], nn.Module]:
    """One run to its end; (its figures, the model with its best weights)."""
    values = {**options, "seed": seed, "experiment_name": name, "output_dir": str(contest.folder)}
    model, data, held_out = (values.pop(key) for key in ("model", "train_data_path", "val_data_path"))
    pipeline = create_training_pipeline(model, data, held_out, teacher=teacher, **values).setup()
    pipeline.val_loader, reported = halves_of(pipeline)
    started = time.perf_counter()
    result = pipeline.run()
    seconds = time.perf_counter() - started
    figure, _ = figure_of(pipeline)
    return (
        {"figure": figure, "reported": quality(pipeline, reported)[figure], "steps": result.metrics["steps"],
         "seconds": seconds, "precision": precision_of(pipeline), "compiled": pipeline.resolved.compile},
        pipeline.model,
    )  # fmt: skip


def main() -> None:
    """Teacher, student alone and taught students, seed by seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["digits", "python_text"])
    parser.add_argument("--teacher", choices=RECIPES, default="float_muon", help="recipe of the teacher")
    parser.add_argument(
        "--alpha", nargs="+", type=float, default=[0.5, 0.9], help="shares of the teacher's loss"
    )
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--tuned", type=Path, default=RECORDS / "tuned.jsonl")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--output-dir", default="runs")
    found = parser.parse_args()
    tuned = read_tuned(found.tuned)
    about = circumstances()
    for name in found.task:
        contest = built_in(name, found.output_dir)
        for recipe in (found.teacher, "forge"):
            if (name, recipe) not in tuned:
                parser.error(f"no figures for {recipe!r} on {name!r} in {found.tuned}; tune it first")
        recipes = [(RECIPES[recipe], tuned[name, recipe]) for recipe in (found.teacher, "forge")]
        of_teacher, of_student = (options_of(contest, recipe, figures) for recipe, figures in recipes)
        warm_up(contest, recipes)
        for seed in range(found.seeds):
            row, teacher = train(contest, of_teacher, seed, f"teacher-{seed}")
            rows = [{"who": found.teacher, "alpha": None, **row}]
            for alpha in [None, *found.alpha]:
                taught = {} if alpha is None else {
                    "distillation_alpha": alpha, "distillation_temperature": found.temperature,
                }  # fmt: skip
                own = None if alpha is None else copy.deepcopy(teacher)
                row, _ = train(contest, {**of_student, **taught}, seed, f"student-{seed}", own)
                rows.append({"who": "ternary", "alpha": alpha, **row})
            for row in rows:
                whole = {"task": name, "seed": seed, "temperature": found.temperature, **row, **about}
                print({key: whole[key] for key in ("task", "seed", "who", "alpha", "reported", "seconds")})
                append(found.record, whole)


if __name__ == "__main__":
    main()
