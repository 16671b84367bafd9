"""Peak memory of a training step of the reference decoder: Forge, float layers, other ternary layers.

    python benchmarks/bench_memory.py                                   # widths 384 and 768, 4096 tokens
    python benchmarks/bench_memory.py --width 384 768 --tokens 4096 8192

Each measurement is a process of its own; they take turns, round by round. Rows of --output, one a case,
shape and way (compiled or not), hold medians and raw figures in bytes of

    process   the highest resident size of the process during three steps after the warm-up (VmHWM, which
              the kernel sets back when 5 is written to /proc/self/clear_refs; "hwm_reset" is false where it
              would not, and the peak then includes the warm-up and the compiler's)
    above     that minus the resident size after all imports and a toy's compilation, before the model exists
    tensors   the most bytes of tensors alive at once in a step: parameters, buffers, optimizer state and
              batch by their sizes, the rest as torch's profiler sees the allocator. Free of the noise of the
              heap and of the code that was loaded; blind to scratch space inside libraries
    resident  the part of "tensors" that lives between steps

On CUDA "process" is the caching allocator's peak, "above" the same, and the profiler is not asked.
"""

import argparse
import ctypes
import functools
import gc
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cases import CASES, Shape, Training, choose, import_libraries, training_step
from interleave import CaseError, Worker, circumstances, write_rows

BASELINES = ("float-fp32", "float-bf16")
DEFAULT_CASES = (
    *BASELINES, "float-fp32-budget", "float-bf16-budget", "naive-fp32", "naive-bf16", "torchao-fp32",
    "torchao-bf16", "forge-int8", "forge-int8-fp32", *(name for name in CASES if "grokfast" in name),
)  # fmt: skip
FIGURES = ("process", "above", "tensors", "resident")
STEPS = 3
RECORD = Path(__file__).parent / "records" / "memory.jsonl"


def prepare(
    name: str, shape: Shape, device: str, threads: int, compiled: bool
) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """Build a case, warm it up, and return the function that measures it."""
    torch.set_num_threads(threads)
    case = CASES[name]
    import_libraries(case)
    if compiled:
        toy = torch.ones(8, device=device, requires_grad=True)
        torch.compile(torch.nn.functional.silu)(toy).sum().backward()
    trim()
    base = _status("VmRSS")
    training = case.build(shape, device)
    batch = shape.batch(device)
    step, facts = training_step(case, training, batch, compiled)
    step()
    facts["parameters"] = sum(p.numel() for p in training.model.parameters())
    resident = bytes_between_steps(training, batch)
    measure = _cuda_peak if torch.device(device).type == "cuda" else _process_peak
    return functools.partial(measure, step, base, resident), facts


def trim() -> None:
    """Give back to the system what is free in the heap."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def bytes_between_steps(training: Training, batch: tuple[Tensor, ...]) -> int:
    """Sizes of parameters, buffers, optimizer state and batch."""
    state = [v for own in training.optimizer.state.values() for v in own.values() if isinstance(v, Tensor)]
    tensors = [*training.model.parameters(), *training.model.buffers(), *state, *batch]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _process_peak(step: Callable[[], Tensor], base: int, resident: int) -> dict[str, Any]:
    trim()
    reset = True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        reset = False
    for _ in range(STEPS):
        step()
    peak = _status("VmHWM")
    return {
        "process": peak, "above": peak - base, "tensors": resident + _transient(step), "resident": resident,
        "hwm_reset": reset,
    }  # fmt: skip


def _transient(step: Callable[[], Tensor]) -> int:
    """The most bytes that one step has allocated and not yet freed, by torch's profiler."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]")


def _cuda_peak(step: Callable[[], Tensor], base: int, resident: int) -> dict[str, Any]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return {"process": peak, "above": peak, "tensors": peak, "resident": resident}


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status, which is Linux's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no line {field}")


def compare(
    names: list[str], shape: Shape, compiled: bool, *, device: str, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """One row a case, in the order given."""
    console = Console(stderr=True)
    way = "compiled" if compiled else "eager"
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    facts: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    for number, name in itertools.product(range(rounds), names):
        if name in errors:
            continue
        console.print(f"width {shape.width}, {shape.tokens} tokens, {way}, {number + 1} of {rounds}: {name}")
        try:
            worker = Worker(prepare, name, shape, device, threads, compiled)
            facts[name] = worker.facts
            try:
                found[name].append(worker.turn())
            finally:
                worker.close()
        except CaseError as error:
            errors[name] = str(error)
    medians = {
        name: {figure: statistics.median(r[figure] for r in found[name]) for figure in FIGURES}
        for name in names
        if name not in errors
    }
    rows = []
    for name in names:
        row = {
            "case": name, "title": CASES[name].title, "kind": CASES[name].kind, "way": way,
            "width": shape.width, "layers": shape.layers, "heads": shape.heads, "tokens": shape.tokens,
            "length": shape.length, "device": device, "threads": threads, "rounds": rounds,
        }  # fmt: skip
        if name in errors:
            rows.append(row | {"error": errors[name]})
            continue
        row |= facts[name]
        row["bytes"] = {figure: int(value) for figure, value in medians[name].items()}
        row["raw"] = found[name]
        row["ratios"] = {
            base: {figure: round(medians[name][figure] / medians[base][figure], 4) for figure in FIGURES}
            for base in BASELINES
            if base in medians
        }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], shape: Shape, compiled: bool) -> Table:
    """The rows of one shape for a person."""
    way = "compiled" if compiled else "eager"
    found = Table(
        title=f"peak memory, width {shape.width}, {shape.layers} layers, {shape.tokens} tokens, {way}",
        caption="MB; ratios of medians to nn.Linear with AdamW, in float32 and under bf16 autocast",
    )
    ratios_of = [f"{figure}\nx {base}" for base in ("fp32", "bf16") for figure in FIGURES[:3]]
    for name in ("case", *FIGURES, *ratios_of, "note"):
        found.add_column(name, justify="left" if name in ("case", "note") else "right")
    for row in rows:
        if "error" in row:
            found.add_row(row["case"], *["-"] * 10, row["error"])
            continue
        megabytes = [f"{row['bytes'][figure] / 1e6:.0f}" for figure in FIGURES]
        ratios = [
            f"{row['ratios'][base][figure]:.2f}" if base in row["ratios"] else "-"
            for base in BASELINES
            for figure in FIGURES[:3]
        ]
        note = row.get("compile_error", "")
        if not all(r.get("hwm_reset", True) for r in row["raw"]):
            note += " peak includes the warm-up"
        found.add_row(row["case"], *megabytes, *ratios, note)
    return found


def main() -> None:
    """Compare every width with every number of tokens, compiled and not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="+", default=[], help="names, or how they begin; see cases.py")
    parser.add_argument("--way", choices=("both", "compiled", "eager"), default="both")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RECORD)
    found = parser.parse_args()
    names = choose(found.cases, DEFAULT_CASES)
    device = found.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # A pool of helper processes would be compiling beside the measurement.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself each time
    console = Console(width=160)
    found.output.unlink(missing_ok=True)
    for width, tokens in itertools.product(found.width, found.tokens):
        shape = Shape(width=width, layers=found.layers, tokens=tokens)
        for compiled in {"both": (True, False), "compiled": (True,), "eager": (False,)}[found.way]:
            rows = compare(names, shape, compiled, device=device, threads=found.threads, rounds=found.rounds)
            write_rows(found.output, [row | circumstances() for row in rows])
            console.print(table(rows, shape, compiled))


if __name__ == "__main__":
    main()
