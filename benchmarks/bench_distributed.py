"""Throughput of one process and of two, one thread each, and the bytes that a step sends.

    python benchmarks/bench_distributed.py               # decoder of width 256, 4096 tokens a rank and step
    python benchmarks/bench_distributed.py --rounds 3 --output benchmarks/records/distributed.jsonl

Each round runs every case once, in turn, each under a torchrun of its own, so that the machine's weather
falls on all alike. A rank has the same tokens a step in all cases (weak scaling). A row of --output holds

    case           processes and mode; fsdp_float gathers float32 latents, fsdp the codes in 2 bits
    tokens_per_s   one figure a round, over the steps after the first five
    efficiency     tokens_per_s over processes times those of one process, of the same round
    gathered       bytes that a rank hands to all-gather in a step, as the run counts them
    reduced        the same of gradients, to all-reduce or reduce-scatter
    loopback       bytes a step on the machine's loopback device, which is all that its ranks send

The loopback counts what anybody on the machine sends, in packets with their heads.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from interleave import circumstances, write_rows

CASES = ("1", "2 ddp", "2 ddp_bf16", "2 fsdp", "2 fsdp_float")
WARMUP = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank and step")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        work(options)
        return
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in options.cases}
    for turn in range(options.rounds):
        for case in options.cases:
            found[case].append(one_turn(case, options))
            print(f"round {turn + 1}: {case}: {found[case][-1]['tokens_per_s']:.0f} tokens/s", flush=True)
    rows = []
    for case, turns in found.items():
        speeds = [turn["tokens_per_s"] for turn in turns]
        row = {"case": case, "tokens_per_s": speeds, **{k: turns[-1][k] for k in ("gathered", "reduced")}}
        row["loopback"] = statistics.median(turn["loopback"] for turn in turns)
        if "1" in found and case != "1":
            pairs = zip(turns, found["1"], strict=True)
            row["efficiency"] = [a["tokens_per_s"] / b["tokens_per_s"] / int(case[0]) for a, b in pairs]
            low, middle, high = quartiles(row["efficiency"])
            print(f"{case}: efficiency {middle:.0%} ({low:.0%} to {high:.0%})")
        print(f"{case}: gathered {row['gathered']:.4g}, reduced {row['reduced']:.4g} bytes a step")
        rows.append(row)
    if options.output:
        sizes = {key: getattr(options, key) for key in ("width", "layers", "tokens", "steps")}
        write_rows(options.output, [{**sizes, **row, **circumstances()} for row in rows])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def one_turn(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the first rank of a case measured."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case[0]}"]
        words += [__file__, "--rank-of", f"{case}|{folder}", f"--width={options.width}"]
        words += [f"--layers={options.layers}", f"--tokens={options.tokens}", f"--steps={options.steps}"]
        subprocess.run(words, check=True, capture_output=True)
        return json.loads((Path(folder) / "found.json").read_text())


def work(options: argparse.Namespace) -> None:
    """One rank of a case."""
    from phase5_training import create_training_pipeline, report, sharded

    report.write_report = lambda runs, output=None: Path()
    torch.set_num_threads(1)
    case, folder = options.rank_of.split("|")
    ranks, _, mode = case.partition(" ")
    if mode == "fsdp_float":
        sharded._mark_latents = lambda model, parts: None
    length = 128
    batch = options.tokens // length * int(ranks)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (batch * 8 * (length + 1),), generator=draw)
    data = Path(folder) / f"tokens-{os.environ['RANK']}.bin"
    data.write_bytes(tokens.to(torch.uint8).numpy().tobytes())
    data.with_suffix(".bin.json").write_text('{"dtype": "uint8", "vocab_size": 256}')
    made = create_training_pipeline(
        "decoder", str(data), batch_size=batch, max_steps=options.steps, epochs=9999,
        model_options={"dim": options.width, "layers": options.layers, "heads": options.width // 64},
        optimizer="adamw", learning_rate=1e-3, grokfast_alpha=0.98, grokfast_lambda=0.5,
        experiment_name="run", output_dir=f"{folder}/runs", use_amp=False, compile=False, device="cpu",
        parallel=mode.partition("_")[0] or "auto", progress="quiet", validation_split=0.0, max_length=length,
        gradient_compression="bf16" if mode.endswith("bf16") else "none", log_interval=10**6, drop_last=True,
    )  # fmt: skip
    marks: list[tuple[float, int, int, int]] = []

    def mark(step: int, metrics: dict[str, Any]) -> None:
        traffic = made.ranks.traffic
        marks.append((time.perf_counter(), loopback(), traffic.gathered, traffic.reduced))

    made.register_callback("step_end", mark)
    made.run()
    if not made.ranks.first:
        return
    first, last, steps = marks[WARMUP - 1], marks[-1], len(marks) - WARMUP
    seconds, sent, gathered, reduced = (b - a for a, b in zip(first, last, strict=True))
    found = {"tokens_per_s": steps * batch * length / seconds, "loopback": sent / steps}
    found |= {"gathered": gathered / steps, "reduced": reduced / steps}
    (Path(folder) / "found.json").write_text(json.dumps(found))


def loopback() -> int:
    """Bytes that the machine's loopback device has received so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


if __name__ == "__main__":
    main()
