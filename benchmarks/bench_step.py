"""Milliseconds of a whole training step of the reference decoder: Forge, float layers, other ternary layers.

    python benchmarks/bench_step.py                                     # widths 384 and 768, 4096 tokens
    python benchmarks/bench_step.py --width 128 384 768 1536 --tokens 256 1024 4096 8192

A step is forward, loss, backward, optimizer step and zero_grad, on random bytes. Each case runs compiled in
a process of its own and they take turns (interleave.py): in a turn a case takes one step that is not timed
and then as many as fill a quarter of a second. Ratios are medians over the rounds, with quartiles, of a
case's time over a baseline's in the same round.

What a case is stands in cases.py. --output is replaced; it gets one JSON object a case and shape. A case that
cannot be compiled runs without and says why; one that cannot run is in the output with the error.

Each row also has the GFLOP/s of square products in float32, bf16 and int8: a CPU's bf16 may be faster or
slower than its float32, and which baseline is the hard one depends on that.

On CUDA times come from events, and each row also has the allocator's peak, model FLOPs over the stated
peak (--peak-tflops) and the share of a profiled step in which a kernel ran.
"""

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cases import CASES, Shape, choose, import_libraries, training_step
from interleave import (
    CaseError,
    Worker,
    circumstances,
    quartiles,
    ratio_quartiles,
    write_rows,
)

BASELINES = ("float-fp32", "float-bf16")
DEFAULT_CASES = tuple(name for name in CASES if "grokfast" not in name)
TURN_SECONDS = 0.25
RECORD = Path(__file__).parent / "records" / "step.jsonl"
# Dense bf16 tensor-core TFLOP/s by the maker's data sheet; utilization is stated against it.
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "L4": 121.0}


def prepare(
    name: str, shape: Shape, device: str, threads: int, compiled: bool
) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """Build a case, warm it up, and return the function that takes one turn."""
    torch.set_num_threads(threads)
    case = CASES[name]
    import_libraries(case)
    training = case.build(shape, device)
    step, facts = training_step(case, training, shape.batch(device), compiled)
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    for _ in range(2):
        started = time.perf_counter()
        step()
        wait()
        seconds = time.perf_counter() - started
    steps = max(1, math.ceil(TURN_SECONDS / seconds))
    facts |= {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "steps_a_turn": steps,
    }
    if torch.device(device).type == "cuda":
        facts["busy"] = kernel_share(step)
        return functools.partial(_cuda_turn, step, steps), facts
    return functools.partial(_cpu_turn, step, steps), facts


def _cpu_turn(step: Callable[[], Tensor], steps: int) -> dict[str, Any]:
    step()
    started = time.perf_counter()
    for _ in range(steps):
        loss = step()
    return {"seconds": (time.perf_counter() - started) / steps, "loss": loss.item()}


def _cuda_turn(step: Callable[[], Tensor], steps: int) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step()
    start.record()
    for _ in range(steps):
        loss = step()
    end.record()
    torch.cuda.synchronize()
    turn = {
        "seconds": start.elapsed_time(end) / 1e3 / steps,
        "loss": loss.item(),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
    torch.cuda.empty_cache()  # the other cases are on the same device
    return turn


def kernel_share(step: Callable[[], Tensor], steps: int = 5) -> float:
    """Share of the time of some steps in which the device ran kernels (they run one after another)."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    return round(busy / seconds, 3)


def _nothing() -> None:
    """The CPU has nothing to wait for."""


def product_gflops(device: str, size: int = 2048) -> dict[str, int]:
    """What the machine makes of square products, best of ten: what bounds each kind of layer."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        a = torch.randn(size, size, device=device).mul_(20).to(dtype)
        multiply = torch._int_mm if dtype == torch.int8 else torch.mm
        best = math.inf
        for _ in range(10):
            started = time.perf_counter()
            multiply(a, a)
            wait()
            best = min(best, time.perf_counter() - started)
        found[str(dtype).removeprefix("torch.")] = round(2 * size**3 / best / 1e9)
    return found


def compare(
    names: list[str],
    shape: Shape,
    *,
    device: str,
    threads: int,
    rounds: int,
    compiled: bool,
    peak: float | None,
) -> list[dict[str, Any]]:
    """One row a case, in the order given."""
    workers: dict[str, Worker] = {}
    errors: dict[str, str] = {}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    console = Console(stderr=True)
    for name in names:
        console.print(f"width {shape.width}, {shape.tokens} tokens: preparing {name}")
        try:
            workers[name] = Worker(prepare, name, shape, device, threads, compiled)
        except CaseError as error:
            errors[name] = str(error)
    for number in range(rounds):
        # Every other round backwards, so that no case always follows the same one.
        for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
            if name in errors:
                continue
            try:
                turns[name].append(workers[name].turn())
            except CaseError as error:
                errors[name] = str(error)
    for worker in workers.values():
        worker.close()
    for name in names:
        if name not in errors and not math.isfinite(turns[name][-1]["loss"]):
            errors[name] = f"the loss is {turns[name][-1]['loss']} after {rounds} rounds"
    ms = {name: [t["seconds"] * 1e3 for t in turns[name]] for name in names if name not in errors}
    peers = [n for n in ms if CASES[n].kind == "ternary peer"]
    best = min(peers, key=lambda n: statistics.median(ms[n]), default=None)
    shared = {
        "width": shape.width, "layers": shape.layers, "heads": shape.heads, "tokens": shape.tokens,
        "length": shape.length, "device": device, "threads": threads, "rounds": rounds,
    }  # fmt: skip
    rows = []
    for name in names:
        row = {"case": name, "title": CASES[name].title, "kind": CASES[name].kind, **shared}
        if name in errors:
            rows.append(row | {"error": errors[name]})
            continue
        median = statistics.median(ms[name])
        row |= {
            **workers[name].facts,
            "median_ms": round(median, 3),
            "quartiles_ms": [round(q, 3) for q in quartiles(ms[name])],
            "ms": [round(m, 3) for m in ms[name]],
            "tokens_per_second": round(shape.tokens / median * 1e3),
            "model_tflops": round(shape.flops / median / 1e9, 3),
            "loss": round(turns[name][-1]["loss"], 4),
            "ratios": {b: ratio_quartiles(ms[name], ms[b]) for b in BASELINES if b in ms},
        }
        if best is not None:
            row["best_ternary_peer"] = best
            row["ratios"]["best ternary peer"] = ratio_quartiles(ms[name], ms[best])
        if peak is not None:
            row |= {"peak_tflops": peak, "utilization": round(shape.flops / median / 1e9 / peak, 4)}
        if device != "cpu":
            row["peak_bytes"] = max(t["peak_bytes"] for t in turns[name])
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], shape: Shape) -> Table:
    """The rows of one shape for a person."""
    best = next((r["best_ternary_peer"] for r in rows if "best_ternary_peer" in r), "none ran")
    found = Table(
        title=f"width {shape.width}, {shape.layers} layers, {shape.tokens} tokens a step; "
        f"best ternary peer: {best}",
        caption="ratios: median of the rounds (quartiles)",
    )
    for name in ("case", "ms", "tokens/s", "x float32", "x bf16", "x best peer", "note"):
        found.add_column(name, justify="left" if name in ("case", "note") else "right")
    for row in rows:
        if "error" in row:
            found.add_row(row["case"], *["-"] * 5, row["error"])
            continue
        ratios = [row["ratios"].get(b) for b in (*BASELINES, "best ternary peer")]
        cells = ["-" if r is None else f"{r[1]:.2f} ({r[0]:.2f}-{r[2]:.2f})" for r in ratios]
        found.add_row(
            row["case"], f"{row['median_ms']:.1f}", str(row["tokens_per_second"]), *cells, _note(row)
        )
    return found


def _note(row: dict[str, Any]) -> str:
    parts = [row.get("compile_error", "" if row["compiled"] else "not compiled")]
    if row.get("graph_breaks"):
        parts.append(f"{sum(row['graph_breaks'].values())} graph breaks")
    if "utilization" in row:
        parts.append(f"{row['utilization']:.1%} of peak")
    if "busy" in row:
        parts.append(f"busy {row['busy']:.0%}")
    return ", ".join(p for p in parts if p)


def main() -> None:
    """Compare every width with every number of tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--layers", type=int, help="blocks; 6, and 2 from width 1536 on")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="+", default=[], help="names, or how they begin; see cases.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the utilization")
    parser.add_argument("--output", type=Path, default=RECORD)
    found = parser.parse_args()
    names = choose(found.cases, DEFAULT_CASES)
    device = found.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = found.peak_tflops
    if peak is None and device != "cpu":
        name = torch.cuda.get_device_name(device)
        peak = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
    # Compiling must not leave a pool of helper processes behind in each case's process.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    console = Console(width=160)
    torch.set_num_threads(found.threads)
    gflops = product_gflops(device)
    console.print(f"GFLOP/s of a product of two 2048 x 2048 matrices: {gflops}")
    found.output.unlink(missing_ok=True)
    for width in found.width:
        for tokens in found.tokens:
            shape = Shape(width=width, layers=found.layers or (2 if width >= 1536 else 6), tokens=tokens)
            rows = compare(
                names, shape, device=device, threads=found.threads, rounds=found.rounds,
                compiled=not found.eager, peak=peak,
            )  # fmt: skip
            write_rows(found.output, [row | {"product_gflops": gflops} | circumstances() for row in rows])
            console.print(table(rows, shape))


if __name__ == "__main__":
    main()
