"""Validation loss after training with each arithmetic of the gradient products; one JSON line a run.

    python benchmarks/backward_quality.py > benchmarks/records/backward_quality.jsonl

The digits and the byte text of the examples, ternary, Muon. Runs of one seed differ in nothing but
``backward``: "float32" against "bf16" shows how much two roundings part anyway.
"""

import argparse
import json
import sys
import tempfile

import torch

from phase5_training import create_training_pipeline
from phase5_training.records import machine
from phase5_training.tasks import load_task

TASKS = {
    "digits": {
        "model": "mlp", "model_options": {"hidden": [512, 512]}, "batch_size": 64, "epochs": 40,
        "eval_interval": 100,
    },
    "python_text": {
        "model": "decoder", "model_options": {"dim": 128, "layers": 4, "heads": 4}, "max_length": 128,
        "batch_size": 16, "epochs": 10_000, "eval_interval": 100, "learning_rate": 1e-2, "weight_decay": 0.1,
        "schedule": "linear",
    },
}  # fmt: skip


def main() -> None:
    """Run every task with every arithmetic and seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--backwards", nargs="+", default=["float32", "bf16", "int8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="of the byte text")
    parser.add_argument("--threads", type=int, default=1)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    for name in found.tasks:
        task = load_task(name, **({"max_bytes": 4_000_000} if name == "python_text" else {}))
        for seed in found.seeds:
            for backward in found.backwards:
                options = {**TASKS[name]}
                options["model_options"] = {**options["model_options"], "backward": backward}
                if name == "python_text":
                    options["max_steps"] = found.steps
                with tempfile.TemporaryDirectory() as folder:
                    train, validation = task.write(folder, "bin" if name == "python_text" else "json")
                    pipeline = create_training_pipeline(
                        train_data_path=train, val_data_path=validation, output_dir=folder,
                        experiment_name="run", early_stopping=False, use_amp=False, compile=False,
                        progress="quiet", seed=seed, use_grokfast=False, checkpoint_interval=100_000,
                        **options,
                    )  # fmt: skip
                    result = pipeline.run()
                    rows = [r for r in pipeline.run_directory.read_metrics() if r["kind"] == "validation"]
                print(
                    json.dumps(
                        {
                            "task": name, "backward": backward, "seed": seed,
                            "steps": result.metrics["steps"],
                            "final_loss": rows[-1]["loss"], "best_loss": min(r["loss"] for r in rows),
                            "seconds": result.metrics["training_time_seconds"],
                            "command": " ".join(["python", *sys.argv]), "machine": machine(),
                        }
                    ),
                    flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
