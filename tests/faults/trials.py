"""Kills training at every phase of a save and at random times, and holds what comes after to the promise.

    PYTHONPATH=tests python -m faults.trials --kills 100

A run is trained without interruption once. Then the same command is started again and again, killed, and
given a second time, as a supervisor would. What is left in the run's folder must equal, bit for bit, what
the uninterrupted run left: weights, last checkpoint, figures, and the names of all files.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import math
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from faults.nursery import Nursery, small_disk

INTERVAL, STEPS = 5, 24
NOT_REPEATABLE = re.compile(r".*(seconds|_s|per_s|time|memory_mb|wait).*")
OPTIONS = [
    *("--model", "mlp", "--model-options", "hidden=[16,16]", "--quantization-mode", "stochastic"),
    *("--epochs", "4", "--batch-size", "16", "--micro-batch-size", "8", "--learning-rate", "0.01"),
    *("--eval-interval", "7"),
    *("--log-interval", "1", "--checkpoint-interval", str(INTERVAL), "--auto-resume"),
    *("--no-use-amp", "--no-compile", "--device", "cpu", "--progress", "quiet"),
]


@dataclass
class Row:
    """What one case gave: outcomes counted, and the most steps that were lost."""

    case: str
    tried: int = 0
    lost: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def good(self) -> bool:
        """Whether every trial ended as it must."""
        return set(self.outcomes) == {"as uninterrupted"} and self.lost <= INTERVAL


class Trials:
    """Runs in one folder, and what an uninterrupted one leaves.

    Args:
        folder: empty; holds data and runs.
        nursery: where runs are started.
    """

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self.folder, self.nursery, self.rows = folder, nursery, dict[str, Row]()
        generator = np.random.default_rng(0)
        x = generator.normal(size=(128, 6)).astype(np.float32)
        y = (x @ generator.normal(size=(6, 3))).argmax(1)
        for name, part in (("train", slice(0, 96)), ("val", slice(96, 128))):
            np.savez(folder / f"{name}.npz", input=x[part], target=y[part])
        self.seconds = math.inf
        for name in ("whole", "again"):  # the machine may be busy with something else the first time
            started = time.monotonic()
            code, said = self.train(name)
            assert code == 0, said
            self.seconds = min(self.seconds, time.monotonic() - started)
        self.whole = left_by(self.run("whole"))
        assert self.whole == left_by(self.run("again"))

    def run(self, name: str, disk: str = "runs") -> Path:
        """The folder of a run."""
        return self.folder / disk / name

    def train(
        self, name: str, disk: str = "runs", options: Sequence[str] = (), **how: Any
    ) -> tuple[int, str]:
        """Start a run, or go on with it; later options win."""
        data = ["--train-data-path", str(self.folder / "train.npz")]
        data += ["--val-data-path", str(self.folder / "val.npz")]
        place = ["--output-dir", str(self.folder / disk), "--experiment-name", name]
        return self.nursery.run(["train", *data, *place, *OPTIONS, *options], **how)

    def points(self) -> list[tuple[str, int]]:
        """The changes of files that a run makes, each with its number among those of its name.

        Of more than two of a name, the first and the last.
        """
        listing = self.folder / "points.txt"
        code, said = self.train("points", fault={"folder": str(self.run("points")), "points": str(listing)})
        assert code == 0, said
        counts = collections.Counter(listing.read_text().splitlines())
        return [(name, n) for name, count in counts.items() for n in sorted({1, count})]

    def killed(
        self, case: str, *, kill_at: tuple[str, int] | None = None, after: float | None = None
    ) -> bool:
        """Kill a run, once, and let it come to its end; returns whether the kill came before the end."""
        run = self.run("killed")
        shutil.rmtree(run, ignore_errors=True)
        fault = {"folder": str(run), "kill_at": kill_at} if kill_at else None
        code, said = self.train("killed", fault=fault, kill_after=after)
        if code != -signal.SIGKILL:
            assert code == 0, said
            return False
        self.ends(case, run, taken(run))
        return True

    def killed_often(self, case: str, generator: random.Random, times: int) -> None:
        """Kill a run again and again, each time from a later moment, before it may come to its end."""
        run = self.run("killed")
        shutil.rmtree(run, ignore_errors=True)
        for _ in range(times):
            self.train("killed", kill_after=generator.uniform(0.3, 1.0) * self.seconds)
        self.ends(case, run, None)

    def ends(
        self,
        case: str,
        run: Path,
        steps: int | None,
        disk: str = "runs",
        *,
        like: dict[str, str] | None = None,
        **how: Any,
    ) -> None:
        """Go on with a run, and note how it ended and how many steps it took twice.

        Args:
            case: the row.
            run: its folder.
            steps: it had taken before; None if that is not known.
            disk: the folder of the run's folder.
            like: what it has to leave, if not what the uninterrupted run left.
            how: it is gone on with.
        """
        whole = like or self.whole
        row = self.rows.setdefault(case, Row(case))
        row.tried += 1
        code, said = self.train(run.name, disk, **how)
        if code != 0:
            row.outcomes[f"exit {code}: {' '.join(said.split())[-300:]}"] += 1
            return
        if steps is not None:
            row.lost = max(row.lost, steps - resumed_at(run))
        found = left_by(run)
        differ = sorted(k for k in whole.keys() | found.keys() if whole.get(k) != found.get(k))
        row.outcomes[f"differ: {', '.join(differ)}" if differ else "as uninterrupted"] += 1

    def table(self) -> str:
        """The rows, one a line."""
        width = max(len(row.case) for row in self.rows.values())
        lines = [f"{'case':{width}}  tried  steps lost  outcome"]
        for row in self.rows.values():
            outcomes = "; ".join(f"{what} {count}" for what, count in row.outcomes.items())
            lines.append(f"{row.case:{width}}  {row.tried:5}  {row.lost:10}  {outcomes}")
        return "\n".join(lines)


def left_by(run: Path) -> dict[str, str]:
    """What a finished run left: the names of its files, and what must be the same each time."""
    left = {str(p.relative_to(run)): "there" for p in run.rglob("*")}
    newest = max(p for p in left if p.startswith("checkpoints/step-") and p.endswith("tensors.safetensors"))
    for name in (newest, "best/weights.safetensors"):
        left[name] = hashlib.sha256((run / name).read_bytes()).hexdigest()
    rows = rows_of(run / "metrics.jsonl")
    kept = [{k: v for k, v in row.items() if not NOT_REPEATABLE.fullmatch(k)} for row in rows]
    left["metrics.jsonl"] = json.dumps(kept)
    left["bad_batches.jsonl"] = json.dumps([*rows_of(run / "bad_batches.jsonl")])
    return left


def taken(run: Path) -> int:
    """The steps that a killed run had taken, as its rows tell."""
    steps = [row["step"] for row in rows_of(run / "metrics.jsonl") if row.get("kind") == "train"]
    return max(steps, default=0)


def resumed_at(run: Path) -> int:
    """The step from which a run last went on; 0 for one that started over."""
    steps = [row["step"] for row in rows_of(run / "events.jsonl") if row.get("event") == "resumed"]
    return steps[-1] if steps else 0


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file, if there is one."""
    content = path.read_text() if path.exists() else ""
    for line in content.split("\n")[:-1]:
        yield json.loads(line)


def phase(point: str) -> str:
    """The case that a change of a file belongs to, without the number of the step."""
    words = re.sub(r"step-\d+", "step-N", point)
    if "checkpoints" in words or "best" in words:
        return words
    return "records: " + words.split()[0]


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
}


def damaged(trials: Trials, how: str, name: str) -> None:
    """Damage a file of the newest checkpoint of a stopped run: it must go on from the one before."""
    run = trials.run("damaged")
    shutil.rmtree(run, ignore_errors=True)
    code, said = trials.train("damaged", fault={"at": 14, "signals": [signal.SIGTERM]})
    assert code == 143, said
    newest = max((run / "checkpoints").iterdir())
    DAMAGE[how](newest / name)
    code, said = trials.train("damaged")
    row = trials.rows.setdefault(f"{name} {how}", Row(f"{name} {how}"))
    row.tried += 1
    row.lost = max(row.lost, taken_before(newest) - resumed_at(run))
    aside = newest.with_name(f"damaged-{newest.name}")
    if code or "resumed from step-00000012 instead" not in said or not aside.is_dir():
        row.outcomes[f"exit {code}: {said[-300:]}"] += 1
        return
    shutil.rmtree(aside)
    same = left_by(run) == trials.whole
    row.outcomes["as uninterrupted" if same else "differs"] += 1


def taken_before(checkpoint: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def full_disk(trials: Trials, kilobytes: int) -> None:
    """Train on a disk that is too small, make room, and go on."""
    disk = f"disk{kilobytes}"
    with small_disk(trials.folder / disk, kilobytes * 1024) as remount:
        code, said = trials.train("full", disk)
        run = trials.run("full", disk)
        row = trials.rows.setdefault("full disk", Row("full disk"))
        if code != 1 or said.count("\n") != 1 or "unexpected" in said:
            row.outcomes[f"exit {code}: {said[-300:]}"] += 1
            return
        steps = taken(run)
        remount("size=64m")
        trials.ends("full disk", run, steps, disk)


def read_only(trials: Trials) -> None:
    """Go on where nothing can be written, which must change nothing, and then where it can."""
    with small_disk(trials.folder / "locked", 2**26) as remount:
        run = trials.run("locked", "locked")
        code, said = trials.train("locked", "locked", fault={"at": 14, "signals": [signal.SIGTERM]})
        assert code == 143, said
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
        remount("ro")
        code, said = trials.train("locked", "locked")
        remount("rw")
        row = trials.rows.setdefault("read-only folder", Row("read-only folder"))
        if code != 1 or said.count("\n") != 1 or before != {p: p.stat().st_mtime_ns for p in run.rglob("*")}:
            row.outcomes[f"exit {code}: {said[-300:]}"] += 1
            return
        trials.ends("read-only folder", run, 13, "locked")


def main() -> int:
    """Every case, and a table; the exit code tells whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="kills at random times")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    found = parser.parse_args()
    from faults.cases import every_case  # which is built on this module

    generator = random.Random(found.seed)
    with tempfile.TemporaryDirectory() as folder, Nursery(Path(folder)) as nursery:
        trials = Trials(Path(folder), nursery)
        kills = 0
        while kills < found.kills:
            kills += trials.killed("at a random time", after=generator.uniform(0, trials.seconds))
        for _ in range(max(1, found.kills // 20)):
            trials.killed_often("at random times, five times over", generator, 5)
        for name, number in trials.points():
            trials.killed(f"before {phase(name)}", kill_at=(name, number))
        for how in DAMAGE:
            for name in ("tensors.safetensors", "state.json", "manifest.json"):
                damaged(trials, how, name)
        try:
            for kilobytes in (24, 64, 512, 1060, 1080, 1100, 1120):
                full_disk(trials, kilobytes)
            read_only(trials)
        except PermissionError as error:
            print(f"left out: full disk, read-only folder ({error})")
        every_case(trials)
        print(trials.table())
        return 0 if all(row.good for row in trials.rows.values()) else 1


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
