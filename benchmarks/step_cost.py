"""Milliseconds of one optimizer step of the demo's model, ternary and float; one JSON line per case.

    python benchmarks/step_cost.py > benchmarks/records/step_cost.jsonl

The cases take turns, so that the machine's weather falls on all of them; the first rounds warm up.
Nothing is compiled.
"""

import argparse
import json
import statistics
import time

import torch
from torch.nn import functional as F

from phase4_bitnet import build_model
from phase5_training import BitNetOptimizer
from phase5_training.bench_run import circumstances
from phase5_training.optimizers import build_optimizer

CASES = {
    "float, AdamW": ("adamw", {"ternary": False}),
    "ternary, AdamW": ("adamw", {}),
    "ternary, AdamW, int8 gradient products": ("adamw", {"backward": "int8"}),
    "ternary, Muon": ("muon", {}),
}


def main() -> None:
    """Time the cases in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--dim", type=int, default=128)
    found = parser.parse_args()
    torch.manual_seed(0)
    x, y = torch.randint(0, 97, (512, 4)), torch.randint(0, 97, (512,))
    runs = {}
    for name, (optimizer, options) in CASES.items():
        model = build_model(
            "decoder", vocab_size=99, num_classes=97, max_length=8, dim=found.dim, heads=4, **options
        )
        inner = build_optimizer(optimizer, model, learning_rate=1e-3, weight_decay=1.0)
        runs[name] = (model, BitNetOptimizer(inner, model, max_grad_norm=1.0))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(found.warmup + found.rounds):
        for name, (model, wrapper) in runs.items():
            started = time.perf_counter()
            F.cross_entropy(model(x), y).backward()
            wrapper.step()
            wrapper.zero_grad()
            times[name].append((time.perf_counter() - started) * 1e3)
    base = times["float, AdamW"][found.warmup :]
    for name, all_ms in times.items():
        ms = all_ms[found.warmup :]
        ratios = [a / b for a, b in zip(ms, base, strict=True)]
        quartiles = [round(q, 3) for q in statistics.quantiles(ratios, n=4)]
        print(
            json.dumps(
                {
                    "case": name, "dim": found.dim, "tokens": x.numel(), "median_ms": statistics.median(ms),
                    "min_ms": min(ms), "rounds": found.rounds, "ratio_to_float_quartiles": quartiles,
                    **circumstances(),
                }
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
