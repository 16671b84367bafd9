"""What saving beside the steps costs a run.

    python benchmarks/bench_saving.py                       # decoder of width 384, 4096 tokens a step
    python benchmarks/bench_saving.py --width 128 --tokens 512 --steps 200

The loop trains with a checkpoint begun every --spacing steps. A row of --output holds

    copy_s         seconds of each copy of the state, which is all that a step waits for
    write_s        seconds of each write, hash, sync and reading back included, beside the steps
    step_s         median seconds of a step while nothing is written
    during_s       median seconds of a step while something is
    share          part of a run that saving takes at the default checkpoint_interval: the copy, and what the
                   steps during a write take longer, over the seconds between two writes begun
    bytes          of a checkpoint
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from interleave import circumstances, write_rows
from phase4_bitnet import build_model
from phase5_training import BitNetOptimizer, LoopConfig, TrainingLoop
from phase5_training.checkpoint import CheckpointStore
from phase5_training.config import TrainingConfig
from phase5_training.optimizers import build_optimizer
from phase5_training.saving import Saver


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, in sequences of 128")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--spacing", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", help="where to save; default a temporary folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "records" / "saving.jsonl")
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    with tempfile.TemporaryDirectory(dir=found.folder) as folder:
        row = measure(Path(folder), found.width, found.tokens, found.steps, found.spacing)
    write_rows(found.output, [{**row, "threads": found.threads, **circumstances()}])
    print({name: value for name, value in row.items() if not isinstance(value, list)})


def measure(folder: Path, width: int, tokens: int, steps: int, spacing: int) -> dict[str, Any]:
    """Train, and time copies, writes and steps."""
    torch.manual_seed(0)
    model = build_model("decoder", vocab_size=256, dim=width, layers=6, heads=width // 64, max_length=128)
    optimizer = BitNetOptimizer(
        build_optimizer("adamw", model, learning_rate=1e-3, weight_decay=0.1), model, max_grad_norm=1.0
    )
    text = torch.randint(0, 256, (tokens // 128, 129))
    batches = [{"input": text[:, :-1], "target": text[:, 1:]}] * steps
    copies, writes, quiet, busy = [], [], [], []
    store = CheckpointStore(folder=folder)
    begin, write = store.begin, store._write

    def timed_begin(state: Any, step: int, suspect: Any = None) -> Any:
        began = time.perf_counter()
        task = begin(state, step, suspect)
        copies.append(time.perf_counter() - began)
        return task

    def timed_write(snapshot: Any, suspect: Any = None) -> Path:
        began = time.perf_counter()
        path = write(snapshot, suspect)
        writes.append(time.perf_counter() - began)
        return path

    object.__setattr__(store, "begin", timed_begin)
    object.__setattr__(store, "_write", timed_write)
    loop = TrainingLoop(
        model, optimizer, LoopConfig(checkpoint_interval=2 * spacing, log_interval=steps), checkpoints=store
    )
    step = loop._step

    def timed_step(batch: Any) -> None:
        writing = loop._saver._writing is not None and not loop._saver._writing[1].done
        began = time.perf_counter()
        step(batch)
        seconds = time.perf_counter() - began
        still = loop._saver._writing is not None and not loop._saver._writing[1].done
        if writing == still and loop.state.step > 3:  # all of the step, or nothing of it
            (busy if writing else quiet).append(seconds)

    loop._step = timed_step  # type: ignore[method-assign]
    loop.train(batches, lambda outputs, target: cross_entropy(outputs.flatten(0, 1), target.flatten()))
    usual = statistics.median(quiet)
    during = statistics.median(busy) if busy else usual
    written, copied = statistics.median(writes), statistics.median(copies)
    slower = written * max(0.0, 1 - usual / during)
    between = Saver(None, TrainingConfig().checkpoint_interval).spacing * usual
    newest = store.paths()[-1]
    return {
        "width": width,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.stat().st_size for p in newest.iterdir()),
        "copy_s": copies,
        "write_s": writes,
        "step_s": usual,
        "during_s": during,
        "steps_during_writes": len(busy),
        "share": (copied + slower) / between,
    }


if __name__ == "__main__":
    main()
