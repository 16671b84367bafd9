"""Steps to 95% validation accuracy on a*b mod 97 for a grid of recipes; one JSON line per run.

    python benchmarks/sweep_modular.py --grid float
    python benchmarks/sweep_modular.py --recipe '{"optimizer": "muon", "learning_rate": 3e-3}'

Each run is the demo's model (decoder, 2 layers of width 128) and data (half the table, batch 512), stopped
when three validations in a row reach 95%, or at the cap. Steps do not depend on the machine's load;
seconds do.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence

import torch

from phase5_training import create_training_pipeline
from phase5_training.bench_run import circumstances
from phase5_training.tasks import load_task

TARGET, HELD, EVERY = 0.95, 3, 15


def run(
    folder: str, name: str, seed: int, cap: int, backward: str = "auto", **recipe: object
) -> dict[str, object]:
    """Train one recipe; returns the recipe with the step at which the target was reached and held."""
    train, validation = load_task("modular_arithmetic", seed=0).write(f"{folder}/data", "npz")
    pipeline = create_training_pipeline(
        "decoder", train, validation, experiment_name=name, output_dir=folder, overwrite=True, batch_size=512,
        epochs=100_000, max_steps=cap, eval_interval=EVERY, early_stopping=False, progress="quiet",
        model_options={"dim": 128, "layers": 2, "heads": 4, "backward": backward}, compile=False,
        use_amp=False, seed=seed, checkpoint_interval=100_000, log_interval=EVERY, **recipe,
    )  # fmt: skip
    seen: list[tuple[int, float, float]] = []

    def after(step: int, metrics: dict[str, object]) -> None:
        seen.append((step, metrics["accuracy"], metrics["elapsed_s"]))
        if len(seen) >= HELD and all(a >= TARGET for _, a, _ in seen[-HELD:]):
            pipeline.loop.stop()

    pipeline.register_callback("eval_end", after)
    pipeline.setup()
    result = pipeline.run()
    held = len(seen) >= HELD and all(a >= TARGET for _, a, _ in seen[-HELD:])
    first = seen[-HELD] if held else None
    return {
        **recipe, "backward": backward, "seed": seed, "cap": cap,
        "steps_to_target": first[0] if first else None,
        "seconds_to_target": first[2] if first else None, "best_accuracy": max(a for _, a, _ in seen),
        "steps": result.metrics["steps"], "seconds": result.metrics["training_time_seconds"],
        **circumstances(),
    }  # fmt: skip


def grids() -> dict[str, list[dict[str, object]]]:
    """The grids by name."""
    plain = {"use_grokfast": False, "schedule": "constant", "warmup_steps": 10}

    def grid(optimizer: str, rates: Sequence[float], decays: Sequence[float]) -> list[dict[str, object]]:
        return [
            {**plain, "optimizer": optimizer, "learning_rate": lr, "weight_decay": wd}
            for lr, wd in itertools.product(rates, decays)
        ]

    adamw = grid("adamw", (1e-3, 2e-3, 3e-3), (0.3, 1.0, 3.0)) + grid("adamw", (5e-4, 1e-3, 2e-3), (6.0,))
    muon = grid("muon", (1e-3, 3e-3, 1e-2), (0.3, 1.0, 3.0))
    filters = [
        {
            **plain, "use_grokfast": True, "grokfast_alpha": a, "grokfast_lambda": g, "optimizer": "adamw",
            "learning_rate": 1e-3, "weight_decay": 3.0,
        }
        for a, g in ((0.98, 2.0), (0.9, 1.0), (0.9, 0.5), (0.8, 2.0), (0.5, 1.0))
    ]  # fmt: skip
    in_float = {"use_bitnet": False}
    return {
        "float": [{**r, **in_float} for r in adamw],
        "float_muon": [{**r, **in_float} for r in muon],
        "ternary": adamw,
        "ternary_muon": muon,
        "filters": filters,
    }


def main() -> None:
    """Run the grid that was asked for."""
    parser = argparse.ArgumentParser()
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--grid", choices=grids())
    which.add_argument("--recipe", type=json.loads, help="options of the pipeline and backward, as JSON")
    parser.add_argument("--cap", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    with tempfile.TemporaryDirectory() as folder:
        recipes = grids()[found.grid] if found.grid else [found.recipe]
        for recipe, seed in itertools.product(recipes, found.seeds):
            print(json.dumps(run(folder, "sweep", seed, found.cap, **recipe)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
