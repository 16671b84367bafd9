"""Time and steps to a held target, recipe by recipe, on the built-in tasks; JSON lines and a report for each.

    python benchmarks/bench_time_to_target.py --task modular_mul --seeds 20
    python benchmarks/bench_time_to_target.py --task digits --recipes float float_muon forge --full
    python benchmarks/bench_time_to_target.py --task s5 --recipes naive --tune

A recipe without figures in the tuned file is tuned first, by whole runs over the same number of rates and
decays for every recipe, on seeds that come after those that are reported, and its figures and their cost are
added to that file. The steps and seconds of that stand in a column of their own. With --tune the first seed
is that of the tuning: give one that will not be reported, since a seed that was tuned on is refused later.
"""

import argparse
import sys
from pathlib import Path

import torch

from phase5_training.bench import bench, figure_or_recipe
from phase5_training.bench_tuning import tune_to_target
from phase5_training.contest import built_in
from phase5_training.errors import UsageError
from phase5_training.recipes import BUILT_IN, RECIPES, TASKS, chosen_recipes, read_tuned

RECORDS = Path(__file__).resolve().parent / "records"


def main() -> None:
    """Tune what has no figures, then compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES)
    parser.add_argument("--attribution", action="store_true", help="add weights x filter x int8 x tuned")
    parser.add_argument("--seeds", "--rounds", type=int, default=5, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--target", nargs="+", type=figure_or_recipe, default=[])
    parser.add_argument("--full", action="store_true", help="go on after the target, to the end of the run")
    parser.add_argument("--cap-steps", type=int)
    parser.add_argument("--cap-seconds", type=float)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tune", action="store_true", help="tune the recipes and stop there")
    parser.add_argument("--tuned-on", choices=TASKS, help="take the figures that were tuned on this task")
    parser.add_argument("--tuned", type=Path, default=RECORDS / "tuned.jsonl")
    parser.add_argument("--record", type=Path, default=RECORDS / "time_to_target.jsonl")
    parser.add_argument("--output-dir", default="runs")
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    changes = {"max_steps": found.cap_steps, "max_seconds": found.cap_seconds}
    changes = {name: value for name, value in changes.items() if value is not None}
    after = found.first_seed + (0 if found.tune else found.seeds)
    recipes = chosen_recipes(found.recipes, found.attribution)
    for name in found.task:
        contest = built_in(name, found.output_dir, **changes)
        known = {**BUILT_IN, **(read_tuned(found.tuned) if found.tuned.exists() else {})}
        if found.tuned_on:
            known |= {(name, recipe): own for (on, recipe), own in known.items() if on == found.tuned_on}
        for base in dict.fromkeys(RECIPES[recipe].tuned_as for recipe in recipes):
            if base and (found.tune or (name, base) not in known):
                print(f"{name}: tuning {RECIPES[base].title}", flush=True)
                known[name, base] = tune_to_target(contest, base, after, found.tuned, found.target)
        if not found.tune:
            seeds = range(found.first_seed, found.first_seed + found.seeds)
            bench(
                contest,
                recipes,
                seeds,
                targets=found.target,
                tuned=known,
                full=found.full,
                record=found.record,
            )


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"bench_time_to_target.py: {error}")
