"""What else could bring Forge to a quality sooner: one change at a time, one JSON line a run.

    python benchmarks/ideas.py --task digits --seeds 3 --record benchmarks/records/ideas.jsonl

Seed by seed every idea runs its whole length on the same data, with the figures tuned for "forge" except for
what the idea names. A line has the curve on the watched half of the validation data, the figure of the best
weights on the reported half, and the seconds of the whole run. Teachers are in benchmarks/distillation.py.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from phase5_training.bench_run import append, circumstances, run_once, warm_up
from phase5_training.contest import Contest, built_in
from phase5_training.phases import PhaseSchedule
from phase5_training.recipes import RECIPES, Tuned, read_tuned

RECORDS = Path(__file__).resolve().parent / "records"
# Packed at 2 bits a weight these are smaller than the float network of the task's width; a step is longer.
WIDTHS: dict[str, dict[str, Any]] = {
    "digits": {"hidden": [1024, 1024]},
    "digits_small": {"hidden": [1024, 1024]},
    "python_text": {"dim": 192, "layers": 4, "heads": 6},
}
PHASES: dict[str, Any] = {"schedule": "phases", "warmup_steps": 10}


def ideas(contest: Contest, tuned: Tuned) -> dict[str, dict[str, Any]]:
    """Name of an idea -> options that it changes."""
    rate, steps = tuned.options["learning_rate"], tuned.options.get("max_steps", contest.options["max_steps"])
    peak = PhaseSchedule.acceleration_multiplier
    other = "adamw" if tuned.options["optimizer"] == "muon" else "muon"
    return {
        "forge": {},
        f"{other} at 4e-3": {"optimizer": other, "learning_rate": 4e-3},
        "twice the rate": {"learning_rate": 2 * rate},
        "four times the rate": {"learning_rate": 4 * rate},
        "two thirds of the steps": {"max_steps": 2 * steps // 3},
        "cosine": {"schedule": "cosine"},
        "phases, peak at the rate": {**PHASES, "learning_rate": rate / peak},
        "phases, peak at twice the rate": {**PHASES, "learning_rate": 2 * rate / peak},
        "filter ademamix": {"use_grokfast": True, "filter": "ademamix"},
        "filter ema 0.9, 0.5": {"use_grokfast": True, "grokfast_alpha": 0.9, "grokfast_lambda": 0.5},
        "wider": {"model_options": {**contest.options["model_options"], **WIDTHS[contest.name]}},
        "bf16 between the layers": {"use_amp": True},
        "label smoothing 0.1": {"label_smoothing": 0.1},
        "no int8 gradients": {"backward": "float32"},
        "beta1 of 0.8": {"betas": [0.8, 0.98]},
        **(
            {
                "three iterations of Muon": {"ns_steps": 3},
                "two iterations, Polar Express": {"ns_steps": 2, "ns_coefficients": "polar_express"},
                "three iterations, momentum 0.9, beta1 of 0.8": {
                    "ns_steps": 3,
                    "momentum": 0.9,
                    "betas": [0.8, 0.98],
                },
            }
            if tuned.options["optimizer"] == "muon"
            else {}
        ),
    }


def main() -> None:
    """Every idea on every seed, in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=WIDTHS, required=True)
    parser.add_argument("--ideas", nargs="+", help="names of some of them; default all")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--tuned", type=Path, default=RECORDS / "tuned.jsonl")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--output-dir", default="runs")
    found = parser.parse_args()
    contest = built_in(found.task, found.output_dir)
    tuned = read_tuned(found.tuned)[found.task, "forge"]
    about = circumstances()
    changes = ideas(contest, tuned)
    unknown = [name for name in found.ideas or () if name not in changes]
    if unknown:
        parser.error(f"unknown idea {unknown[0]!r}; use some of {', '.join(changes)}")
    warm_up(contest, [(RECIPES["forge"], tuned)])
    for seed in range(found.seeds):
        for name in found.ideas or changes:
            own = changes[name]
            # What tuning found goes before the options of a recipe, so a change is put into both.
            base = RECIPES["forge"]
            recipe = replace(base, title=name, options={**base.options, **own})
            known = {*tuned.options, "max_steps"}
            options = {k: v for k, v in {**tuned.options, **own}.items() if k in known}
            row = run_once(contest, name, recipe, replace(tuned, options=options), seed)
            row |= {"kind": "idea", "idea": name, "changes": own, **about}
            print(f"seed {seed}, {name}: {row['test']}, {row['seconds']:.1f} s {row['error']}", flush=True)
            append(found.record, {k: v for k, v in row.items() if k != "recipe"})


if __name__ == "__main__":
    main()
