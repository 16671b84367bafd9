"""One timed training run on byte text (Python's standard library); one JSON line with the result.

    python benchmarks/text_run.py ternary --seconds 600 --threads 1

Validation is on files that no training byte comes from. Start two recipes at the same time with one thread
each, and they share the machine's weather.
"""

import argparse
import json
import sys
import tempfile

import torch

from phase5_training import create_training_pipeline
from phase5_training.records import machine
from phase5_training.tasks import load_task

RECIPES: dict[str, dict[str, object]] = {
    "ternary": {"optimizer": "muon", "weight_decay": 0.1},
    "ternary_adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "float_muon": {"optimizer": "muon", "weight_decay": 0.1, "use_bitnet": False},
    "float_adamw": {"optimizer": "adamw", "weight_decay": 0.1, "use_bitnet": False},
}


def main() -> None:
    """Run the recipe that was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True, help="length of the schedule")
    parser.add_argument("--seconds", type=float, help="stop after this much time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--grokfast", type=float, nargs=2, metavar=("ALPHA", "LAMBDA"))
    parser.add_argument("--eval-interval", type=int, default=100)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    task = load_task("python_text", max_bytes=4_000_000)
    recipe = {**RECIPES[found.recipe], "learning_rate": found.rate}
    if found.grokfast:
        recipe |= {"grokfast_alpha": found.grokfast[0], "grokfast_lambda": found.grokfast[1]}
    else:
        recipe["use_grokfast"] = False
    with tempfile.TemporaryDirectory() as folder:
        train, validation = task.write(folder, "bin")
        pipeline = create_training_pipeline(
            "decoder", train, validation, output_dir=folder, experiment_name="text", batch_size=16,
            epochs=10_000, max_steps=found.steps, max_seconds=found.seconds, max_length=128,
            model_options={"dim": 128, "layers": 4, "heads": 4}, schedule=found.schedule,
            eval_interval=found.eval_interval, early_stopping=False, compile=False, use_amp=False,
            progress="quiet", seed=found.seed, checkpoint_interval=100_000, **recipe,
        )  # fmt: skip
        result = pipeline.run()
        rows = [r for r in pipeline.run_directory.read_metrics() if r["kind"] == "validation"]
    print(
        json.dumps(
            {
                "recipe": found.recipe, **recipe, "schedule": found.schedule, "seed": found.seed,
                "threads": found.threads, "steps": result.metrics["steps"],
                "seconds": result.metrics["training_time_seconds"],
                "bits_per_byte": result.metrics["bits_per_byte"],
                "curve": [[r["step"], round(r["elapsed_s"], 1), round(r["bits_per_byte"], 4)] for r in rows],
                "command": " ".join(["python", *sys.argv]), "machine": machine(),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
