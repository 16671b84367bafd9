"""What the adaptive filter does to a network that merely overfits; one JSON line a run.

    python benchmarks/filter_overfitting.py --record benchmarks/records/filter_overfitting.jsonl

500 handwritten digits of which a share has labels drawn at random, in training and in validation alike: a
network fits all of them and gets worse on the validation set the longer it trains. Each seed is trained
without a filter and with the adaptive one, in turn. A line has the best accuracy on the validation set, the
mean of the last five evaluations, and the greatest and mean evidence that the filter went by.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phase5_training import create_training_pipeline
from phase5_training.bench_run import append, circumstances
from phase5_training.tasks import load_task

CLASSES, TRAINED = 10, 500
NETWORKS: dict[str, dict[str, Any]] = {
    "float, AdamW": {"use_bitnet": False, "optimizer": "adamw", "learning_rate": 1e-3},
    "ternary, AdamW": {"optimizer": "adamw", "learning_rate": 4e-3},
    "float, SGD": {"use_bitnet": False, "optimizer": "sgd", "learning_rate": 0.1},
}


def noisy_digits(folder: Path, share: float) -> tuple[Path, Path]:
    """Training and validation files in which a share of the labels is drawn at random."""
    paths = load_task("digits", validation_share=0.4, train_size=TRAINED).write(folder, "npz")
    generator = np.random.default_rng(0)
    for path in paths:
        with np.load(path) as file:
            arrays = dict(file)
        drawn = generator.random(len(arrays["targets"])) < share
        arrays["targets"][drawn] = generator.integers(0, CLASSES, drawn.sum())
        np.savez(path, **arrays)
    return paths


def run(
    folder: Path, data: tuple[Path, Path], *, seed: int, filtered: bool, steps: int, **options: Any
) -> dict:
    """One run to its end, and what came of it."""
    pipeline = create_training_pipeline(
        "mlp", *data, model_options={"hidden": [256, 256]}, batch_size=64, epochs=steps, max_steps=steps,
        eval_interval=10, schedule="constant", early_stopping=False, seed=seed, use_grokfast=filtered,
        use_amp=False, compile=False, progress="quiet", experiment_name="run", overwrite=True,
        output_dir=str(folder), **options,
    )  # fmt: skip
    accuracy: list[float] = []
    evidence: list[float] = []

    def after(step: int, metrics: dict[str, Any]) -> None:
        accuracy.append(metrics["accuracy"])
        own = pipeline.optimizer.gradient_filter
        evidence.append(own.lag.evidence if own is not None else 0.0)

    pipeline.register_callback("eval_end", after)
    pipeline.run()
    return {
        "seed": seed, "filter": "auto" if filtered else None, "steps": steps, **options,
        "best_accuracy": max(accuracy), "last_accuracy": float(np.mean(accuracy[-5:])),
        "most_evidence": max(evidence), "mean_evidence": float(np.mean(evidence)),
    }  # fmt: skip


def main() -> None:
    """Every network on every seed, without the filter and with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--noise", type=float, default=0.4, help="share of labels drawn at random")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", type=Path, required=True)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    about = circumstances()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = noisy_digits(folder / "data", found.noise)
        for seed, (name, options), filtered in itertools.product(
            range(found.seeds), NETWORKS.items(), (False, True)
        ):
            row = run(folder, data, seed=seed, filtered=filtered, steps=found.steps, **options)
            row = {"network": name, "noise": found.noise, **row}
            print(row, flush=True)
            append(found.record, {**row, **about})


if __name__ == "__main__":
    main()
