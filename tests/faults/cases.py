"""What else goes wrong with a run: signals, quotas, errors, bad numbers, memory, workers, hostile files.

Each case starts a run that meets its fault, and holds the run that goes on to what an uninterrupted one
leaves. Each is one row of the table.
"""

import hashlib
import json
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

from faults.trials import Row, Trials, left_by, resumed_at, rows_of, taken

# Two micro-batches a step, so the signal before step 8 is acted on within it; 14 is validated.
SIGNALED = {None: (8, 7), "accumulation": (8, 7), "validation": (14, 14)}


def refused(trials: Trials, case: str, code: int, said: str) -> None:
    """Note that a run did not end as it must have."""
    row = trials.rows.setdefault(case, Row(case))
    row.tried += 1
    row.outcomes[f"exit {code}: {' '.join(said.split())[-300:]}"] += 1


def signaled(trials: Trials, number: int, within: str | None) -> None:
    """A signal before a step, within its micro-batches, or within a validation: saved at once."""
    name = signal.Signals(number).name
    case = f"{name} {f'within {within}' if within else 'before a step'}"
    run = fresh(trials, "signaled")
    at, step = SIGNALED[within]
    fault = {"at": at, "signals": [number], **({"within": within} if within else {})}
    code, said = trials.train(run.name, fault=fault)
    saved = (run / "checkpoints" / f"step-{step:08d}").is_dir()
    if code != 128 + number or f"interrupted at step {step}" not in said or not saved:
        refused(trials, case, code, said)
        return
    trials.ends(case, run, step)
    if resumed_at(run) != step:
        refused(trials, case, 0, f"resumed at {resumed_at(run)}")


def signaled_twice(trials: Trials, number: int) -> None:
    """The second signal leaves at once, without a checkpoint."""
    case = f"{signal.Signals(number).name} twice"
    run = fresh(trials, "twice")
    code, said = trials.train(run.name, fault={"at": 8, "signals": [number, number]})
    wanted = 130 if number == signal.SIGINT else -signal.SIGTERM
    if code != wanted or (run / "checkpoints" / "step-00000007").exists():
        refused(trials, case, code, said)
        return
    trials.ends(case, run, taken(run))


def quota(trials: Trials) -> None:
    """No file may grow past a size: the checkpoint is not saved, and says so."""
    run = fresh(trials, "quota")
    code, said = trials.train(run.name, fault={"limit": 9000})
    left = [*(run / "checkpoints").iterdir()]
    if code != 1 or said.count("\n") != 1 or "the checkpoint of step 3 cannot be written" not in said or left:
        refused(trials, "quota", code, said)
        return
    trials.ends("quota", run, taken(run))


def raises(trials: Trials, at: int) -> None:
    """The model raises, before the first checkpoint or after it."""
    run = fresh(trials, "raises")
    code, said = trials.train(run.name, fault={"at": at, "raise": "a bad day"})
    recorded = '"RuntimeError: a bad day"' in (run / "result.json").read_text()
    if code != 1 or said.count("\n") != 1 or not recorded:
        refused(trials, "a model that raises", code, said)
        return
    trials.ends("a model that raises", run, taken(run))


def nonfinite(trials: Trials) -> None:
    """One batch of NaN: skipped and listed; a run that is stopped right after finds it once, too."""
    once = {"at": 8, "nan": "once"}
    whole = fresh(trials, "nonfinite")
    code, said = trials.train(whole.name, fault=once)
    found = [row for row in rows_of(whole / "bad_batches.jsonl") if row["kind"] == "nonfinite"]
    if code != 0 or [(row["step"], len(row["samples"])) for row in found] != [(8, 16)]:
        refused(trials, "NaN in a batch", code, said + json.dumps(found))
        return
    run = fresh(trials, "stopped")
    code, said = trials.train(run.name, fault={**once, "end": 11})
    assert code == 143, said
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    trials.ends("NaN in a batch", run, None, like=left_by(whole), fault=once)


def out_of_memory(trials: Trials) -> None:
    """Memory for half a micro-batch: the same run as one of such micro-batches; remembered on resume."""
    like = fresh(trials, "small")
    assert trials.train(like.name, options=["--micro-batch-size", "4"])[0] == 0
    run = fresh(trials, "memory")
    code, said = trials.train(run.name, fault={"at": 1, "memory": 4, "end": 9})
    if code != 143 or said.count("out of memory at step 1: micro-batches of 4 samples") != 1:
        refused(trials, "out of memory", code, said)
        return
    trials.ends("out of memory", run, 8, like=left_by(like))


def worker(trials: Trials, how: str) -> None:
    """A data worker dies or hangs: the run ends saved, and names file and records."""
    case = f"a worker that {how}s"
    run = fresh(trials, "worker")
    workers = ["--num-workers", "2", "--data-timeout", "3"]
    code, said = trials.train(run.name, fault={"worker": how}, options=workers)
    step = taken(run)
    saved = (run / "checkpoints" / f"step-{step:08d}").is_dir()
    if code != 1 or "train.npz" not in said or "record " not in said or not saved:
        refused(trials, case, code, said)
        return
    trials.ends(case, run, step, options=workers)
    if resumed_at(run) != step:
        refused(trials, case, 0, f"resumed at {resumed_at(run)}")


class _Opens:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def hostile(trials: Trials) -> None:
    """A newest checkpoint with right hashes and hostile content: refused, nothing of it is run."""
    trap = trials.folder / "broken-in"
    empty = (2).to_bytes(8, "little") + b"{}"
    contents: dict[str, tuple[bytes, bytes, dict[str, Any]]] = {
        "code in a pickle": (pickle.dumps(_Opens(str(trap))), b"{}", {}),
        "a header of 2**63 bytes": ((2**63 - 1).to_bytes(8, "little") + b"{}", b"{}", {}),
        "a state nested without end": (empty, b"[" * 10**5, {}),
        "names outside the folder": (empty, b"{}", {"files": {"../../config.yaml": {"bytes": 1}}}),
    }
    for what, (tensors, tree, more) in contents.items():
        case = f"hostile checkpoint: {what}"
        run = fresh(trials, "hostile")
        assert trials.train(run.name, fault={"at": 10, "signals": [signal.SIGTERM]})[0] == 143
        folder = run / "checkpoints" / "step-00000020"
        plant(folder, tensors, tree, more)
        code, said = trials.train(run.name, fault={"at": 12, "signals": [signal.SIGTERM]})
        aside = folder.with_name(f"damaged-{folder.name}")
        held = "resumed from step-00000009 instead" in said and aside.is_dir() and not trap.exists()
        if code != 143 or not held:
            refused(trials, case, code, said)
            continue
        shutil.rmtree(aside)
        trials.ends(case, run, 11)


def plant(folder: Path, tensors: bytes, tree: bytes, more: dict[str, Any]) -> None:
    """Write a checkpoint whose hashes are right."""
    folder.mkdir()
    files = {"tensors.safetensors": tensors, "state.json": tree}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    hashes = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 20, "files": hashes, **more}))


def fresh(trials: Trials, name: str) -> Path:
    """The folder of a run that is not there yet."""
    shutil.rmtree(trials.run(name), ignore_errors=True)
    return trials.run(name)


def every_case(trials: Trials) -> None:
    """All of them, one after the other."""
    for number in (signal.SIGTERM, signal.SIGINT):
        for within in SIGNALED:
            signaled(trials, number, within)
        signaled_twice(trials, number)
    quota(trials)
    for at in (2, 8):
        raises(trials, at)
    nonfinite(trials)
    out_of_memory(trials)
    for how in ("die", "hang"):
        worker(trials, how)
    hostile(trials)
