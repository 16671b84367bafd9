"""Throughput of one process and of two, one thread each, and the bytes that a step sends.

    python benchmarks/bench_distributed.py               # decoder of width 256, 4096 tokens a rank and step
    python benchmarks/bench_distributed.py --rounds 9 --output benchmarks/records/distributed.jsonl

Every case has a torchrun of its own, and they take turns of a few steps, so that the machine's weather falls
on all alike. A rank has the same tokens a step in all cases: weak scaling, the batch of two processes is
twice that of one. Two processes wait for the slower one, so that a third program costs them more than it
costs one alone: a round in which others took more than --others of a core during any turn is taken again.

"2 apart" are two processes that train alone, at one time and without knowing of each other: what they lose
the machine takes, as cores share bandwidth, cache and clock. What two ranks have less than those is what
training together costs.

With --core all share that core, and --others counts what else runs there. What is left of the efficiency is
what sending costs in processor time, as nobody waits while there is something to compute. With --pin each
rank has a core of its own, those of "2 apart" too; else the system moves them as it likes.

A row of --output holds, with one figure a round where it is a list,

    case           processes and mode; fsdp_float gathers float32 latents, fsdp the codes in 2 bits; in
                   ddp_gloo gradients go by gloo, as between machines, and else through shared memory
    tokens_per_s   over the steps of a turn but its first
    efficiency     tokens_per_s of a core over that of one process, of the same round
    of_apart       tokens_per_s over that of "2 apart", of the same round
    cpu_ms         processor time of a rank and step, all of its threads
    others         share of a core that other programs took during the turn
    given_up       rounds that were taken again
    gathered       bytes that a rank hands to all-gather in a step, as the run counts them
    reduced        the same of gradients, to all-reduce or reduce-scatter
    loopback       bytes a step on the machine's loopback device: what its ranks send, with the packets' heads
"""

import argparse
import contextlib
import errno
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from interleave import circumstances, quartiles, write_rows

CASES = ("1", "2 apart", *(f"2 {mode}" for mode in ("ddp", "ddp_gloo", "ddp_bf16", "fsdp", "fsdp_float")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank and step")
    parser.add_argument("--steps", type=int, default=6, help="of a turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--others", type=float, default=0.05, help="share of a core that others may take")
    parser.add_argument("--tries", type=int, default=60, help="rounds at most, those taken again too")
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--core", type=int, help="the one that all processes share")
    parser.add_argument("--pin", action="store_true", help="each rank to a core of its own")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        work(options)
        return
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    with contextlib.ExitStack() as stack:
        cases = {name: stack.enter_context(Case(name, options)) for name in options.cases}
        rounds, given_up = take_turns(cases, options)
    rows = []
    for name in cases:
        turns = [taken[name] for taken in rounds]
        row: dict[str, Any] = {key: [turn[key] for turn in turns] for key in turns[0]}
        row["loopback"] = statistics.median(row["loopback"])
        row |= {key: row[key][-1] for key in ("gathered", "reduced")}
        cores = int(name[0]) if options.core is None else 1
        for key, base, times in (("efficiency", "1", cores), ("of_apart", "2 apart", 1)):
            if base in cases and name not in ("1", base):
                pairs = ((taken[name]["tokens_per_s"], taken[base]["tokens_per_s"]) for taken in rounds)
                row[key] = [round(own / other / times, 4) for own, other in pairs]
                low, middle, high = quartiles(row[key])
                print(f"{name}: {key} {middle:.1%} ({low:.1%} to {high:.1%}) of {len(rounds)} rounds")
        print(
            f"{name}: {statistics.median(row['cpu_ms']):.0f} ms of processor time a step and rank; ", end=""
        )
        print(f"gathered {row['gathered']:.4g}, reduced {row['reduced']:.4g} bytes a step")
        rows.append({"case": name, **row, "given_up": given_up})
    if options.output:
        sizes = {
            key: getattr(options, key)
            for key in ("width", "layers", "tokens", "steps", "others", "core", "pin")
        }
        write_rows(options.output, [{**sizes, **row, **circumstances()} for row in rows])


def take_turns(cases: dict[str, "Case"], options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Rounds in which other programs were quiet, and how many others there were."""
    for case in cases.values():
        case.turn()  # allocations, and buffers of the collectives
    kept: list[dict[str, Any]] = []
    for tried in range(options.tries):
        taken = {name: case.turn() for name, case in cases.items()}
        loud = max(turn["others"] for turn in taken.values())
        said = ", ".join(f"{name}: {turn['tokens_per_s']:.0f}" for name, turn in taken.items())
        print(f"tokens/s {said}; others took {loud:.0%} of a core", flush=True)
        if loud <= options.others:
            kept.append(taken)
        if len(kept) == options.rounds:
            return kept, tried + 1 - len(kept)
    sys.exit(f"{len(kept)} of {options.tries} rounds were quiet; give --others more, or stop other programs")


class Case:
    """The ranks of a case under a torchrun of their own, which wait for their turns.

    Args:
        name: of a case.
        options: of the command line.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.ranks = int(name[0])

    def __enter__(self) -> "Case":
        self._folder = tempfile.TemporaryDirectory()
        self.folder, own = Path(self._folder.name), self.options
        places = [(self.folder / f"go-{rank}", self.folder / f"done-{rank}") for rank in range(self.ranks)]
        for place in places:
            for pipe in place:
                os.mkfifo(pipe)
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval=5"]
        words += [f"--nproc-per-node={self.ranks}", __file__, "--rank-of", f"{self.name}|{self.folder}"]
        words += [f"--{key}={getattr(own, key)}" for key in ("width", "layers", "tokens", "steps", "tries")]
        words += ["--pin"] * own.pin
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        self._pipes = [(self._opened(go), done.open()) for go, done in places]
        return self

    def _opened(self, pipe: Path) -> TextIO:
        """To write to; a rank reads it once it is there."""
        while self._process.poll() is None:
            try:
                return os.fdopen(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "w")
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                time.sleep(0.1)
        sys.exit(f"{self.name} ended before its first turn")

    def __exit__(self, *error: object) -> None:
        for go, done in self._pipes:
            go.close()
            done.close()
        self._process.wait()
        self._folder.cleanup()

    def turn(self) -> dict[str, Any]:
        """Let all ranks take their steps; figures of the first one, tokens and processor time of all."""
        began, busy = time.perf_counter(), busy_seconds(self.options.core)
        for go, _ in self._pipes:
            go.write("go\n")
            go.flush()
        lines = [done.readline() for _, done in self._pipes]
        if not all(lines):
            sys.exit(f"{self.name} ended during a turn")
        found = [json.loads(line) for line in lines]
        seconds, busy = time.perf_counter() - began, busy_seconds(self.options.core) - busy
        own = sum(rank.pop("processor_seconds") for rank in found)
        tokens = round(sum(rank["tokens_per_s"] for rank in found), 1)
        cpu = statistics.mean(rank["cpu_ms"] for rank in found)
        return {
            **found[0],
            "tokens_per_s": tokens,
            "cpu_ms": round(cpu, 1),
            "others": round(max(0.0, busy - own) / seconds, 3),
        }


def work(options: argparse.Namespace) -> None:
    """One rank of a case."""
    from phase5_training import create_training_pipeline, report, sharded, shared_memory

    report.write_report = lambda runs, output=None: Path()
    torch.set_num_threads(1)
    case, folder = options.rank_of.split("|")
    _, _, mode = case.partition(" ")
    if "float" in mode:
        sharded._mark_latents = lambda model, parts: None
    if "gloo" in mode:
        shared_memory.SharedMemory.among = lambda ranks, size: None
    length, rank = 128, os.environ["RANK"]
    name = "run"
    if mode == "apart":
        os.environ["WORLD_SIZE"], name = "1", f"run-{rank}"
    if options.pin:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(rank) % len(cores)]})
    batch = options.tokens // length * int(os.environ["WORLD_SIZE"])
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (batch * 8 * (length + 1),), generator=draw)
    data = Path(folder) / f"tokens-{rank}.bin"
    data.write_bytes(tokens.to(torch.uint8).numpy().tobytes())
    data.with_suffix(".bin.json").write_text('{"dtype": "uint8", "vocab_size": 256}')
    made = create_training_pipeline(
        "decoder", str(data), batch_size=batch, max_steps=options.steps * (options.tries + 2), epochs=9999,
        model_options={"dim": options.width, "layers": options.layers, "heads": options.width // 64},
        optimizer="adamw", learning_rate=1e-3, grokfast_alpha=0.98, grokfast_lambda=0.5,
        experiment_name=name, output_dir=f"{folder}/runs", use_amp=False, compile=False, device="cpu",
        parallel="fsdp" if mode.startswith("fsdp") else "ddp", progress="quiet", validation_split=0.0,
        gradient_compression="bf16" if mode.endswith("bf16") else "none", log_interval=10**6, drop_last=True,
        checkpoint_interval=10**6, max_length=length,
    )  # fmt: skip
    turns = take_steps(options.steps, options.tokens, made, Path(folder), rank)
    next(turns)
    made.register_callback("step_end", lambda step, metrics: next(turns))
    made.run()


def take_steps(steps: int, tokens: int, made: Any, folder: Path, rank: str) -> Iterator[None]:
    """Between any two turns of ``steps`` steps each, wait until the next one is asked for."""
    with open(folder / f"go-{rank}") as go, open(folder / f"done-{rank}", "w") as done:
        while go.readline():
            begun = time.process_time()
            yield  # the first step: ranks do not begin in one moment
            first = marks(made)
            for _ in range(steps - 1):
                yield
            last = marks(made)
            seconds, cpu, sent, gathered, reduced = (
                (b - a) / (steps - 1) for a, b in zip(first, last, strict=True)
            )
            found = {"tokens_per_s": round(tokens / seconds, 1), "cpu_ms": 1e3 * cpu, "loopback": sent}
            found |= {"gathered": gathered, "reduced": reduced}
            done.write(json.dumps({**found, "processor_seconds": time.process_time() - begun}) + "\n")
            done.flush()
    made.stop()
    while True:
        yield


def marks(made: Any) -> tuple[float, float, int, int, int]:
    """Clocks and counters: seconds, seconds of the processor, bytes on loopback, gathered and reduced."""
    traffic = made.ranks.traffic
    return time.perf_counter(), time.process_time(), loopback(), traffic.gathered, traffic.reduced


def busy_seconds(core: int | None) -> float:
    """Time that a core, or all together, have worked so far, for whomever."""
    line = Path("/proc/stat").read_text().splitlines()[0 if core is None else 1 + core]
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def loopback() -> int:
    """Bytes that the machine's loopback device has received so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


if __name__ == "__main__":
    main()
