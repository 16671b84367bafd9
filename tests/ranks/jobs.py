"""What the tests of several processes have them do; torchrun calls this file, once for many jobs.

    torchrun --nproc-per-node N jobs.py FOLDER MODE.JOB ...

The runs of a job lie in FOLDER/N/MODE.JOB; each rank writes what its jobs returned to FOLDER/N-rank-R.json.
MODE is ddp or fsdp. Ranks that torchrun starts again go on with the job in which one of them died.
"""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phase4_bitnet.decoder_blocks import Block
from phase5_training import (
    checkpoint,
    cli,
    create_training_pipeline,
    report,
    sharded,
    shared_checkpoints,
    shared_memory,
)
from phase5_training.checkpoint import CheckpointStore
from phase5_training.distributed import join
from phase5_training.errors import ForgeError
from phase5_training.signals import Interrupted, Terminated

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEPS, SHORT = 50, 16


class Rows(torch.utils.data.TensorDataset):
    """Rows of numbers whose targets a linear rule gives."""


def rows(kind: str, n: int, seed: int) -> Rows:
    """Features, with classes or numbers that a linear rule gives."""
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))
    rule = torch.randn(12, 3, generator=torch.Generator().manual_seed(7))
    return Rows(x, (x @ rule).argmax(1) if kind == "classes" else (x @ rule)[:, :2] + 50)


def sentences(folder: Path, n: int, seed: int) -> str:
    """A file of token lists of 2 to 9 tokens; each rank writes its own copy."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (n,), generator=draw).tolist()
    samples = [{"input": torch.randint(1, 16, (m,), generator=draw).tolist()} for m in lengths]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"tokens-{seed}-{RANK}.json"
    path.write_text(json.dumps({"samples": [{"input": [15, 15]}, *samples]}))
    return str(path)


def answers(folder: Path, n: int, seed: int) -> str:
    """A file of numbers with a class and a number each; each rank writes its own copy."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    targets = [{"sign": int(row[0] > 0), "sum": float(row.sum())} for row in x]
    samples = [{"input": row.tolist(), "target": t} for row, t in zip(x, targets, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"tasks-{seed}-{RANK}.json"
    path.write_text(json.dumps({"samples": samples}))
    return str(path)


def pipeline(folder: Path, mode: str, kind: str = "classes", **options):
    """A run whose 1, 2 and 4 ranks see the same batches of 24, the last of an epoch with 14 samples."""
    settings = {
        "experiment_name": "run", "output_dir": str(folder), "max_steps": STEPS, "epochs": 100,
        "batch_size": 24, "learning_rate": 0.01, "optimizer": "adamw", "grokfast_alpha": 0.9,
        "grokfast_lambda": 0.5, "log_interval": 1, "eval_interval": 8, "checkpoint_interval": 20,
        "backward": "float32", "use_amp": False, "compile": False, "device": "cpu", "progress": "quiet",
        "parallel": mode, "overwrite": True, "early_stopping": False,
    }  # fmt: skip
    if kind == "tasks":
        data = [answers(folder, 110, 0), answers(folder, 50, 1)]
    elif kind == "tokens":
        settings |= {"model_options": {"dim": 16, "layers": 2, "heads": 2}, "pad_id": 0}
        data = [sentences(folder, 109, 0), sentences(folder, 49, 1)]
    else:
        data = [rows(kind, 110, 0), rows(kind, 50, 1)]
        if "model" not in options:
            settings["model_options"] = {"hidden": [32, 32]}
    return create_training_pipeline(options.pop("model", "auto"), *data, **{**settings, **options})


def figures(made) -> dict:
    """What a run of ``made`` gave: losses of every step, validation figures, and a sum over its weights."""
    losses, validation, norms, gathered, reduced = [], [], [], [], []

    def log(step, metrics):
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
        gathered.append(metrics.get("gathered_bytes_per_step"))
        reduced.append(metrics.get("reduced_bytes_per_step"))

    def validated(step, metrics):
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        validation.append({k: v for k, v in numbers.items() if k not in ("elapsed_s", "improved")})

    made.register_callback("log", log)
    made.register_callback("eval_end", validated)
    raised = None
    try:
        result = made.run()
    except (Interrupted, Terminated) as stopped:
        result, raised = stopped.result, type(stopped).__name__
    weights = {k: v.double() for k, v in result.model.state_dict().items()} if RANK == 0 else {}
    weights |= {k: v.double() for k, v in made.loss.state_dict().items()}
    return {
        "bytes": [sent[-1] for sent in (gathered, reduced)] if WORLD > 1 else [],
        "losses": losses,
        "norms": norms,
        "validation": validation,
        "weights": {k: v.sum().item() for k, v in weights.items()},
        "steps": result.metrics["steps"],
        "stop_reason": result.stop_reason,
        "raised": raised,
        "samples": result.metrics["samples"],
    }


def equal(folder: Path, mode: str) -> dict:
    return figures(pipeline(folder, mode))


def over_gloo(folder: Path, mode: str) -> dict:
    """As ranks on several machines do."""
    among, shared_memory.SharedMemory.among = shared_memory.SharedMemory.among, lambda ranks, size: None
    try:
        return figures(pipeline(folder, mode))
    finally:
        shared_memory.SharedMemory.among = among


def again(folder: Path, mode: str) -> dict:
    return figures(pipeline(folder, mode))


def numbers(folder: Path, mode: str) -> dict:
    return figures(pipeline(folder, mode, "numbers", max_steps=SHORT))


def tokens(folder: Path, mode: str) -> dict:
    # At the rate of the others a code tips on how the sums are rounded, which goes by the number of ranks.
    return figures(pipeline(folder, mode, "tokens", max_steps=SHORT, learning_rate=0.001))


def micro(folder: Path, mode: str) -> dict:
    return figures(pipeline(folder, mode, micro_batch_size=4, max_steps=SHORT))


def muon(folder: Path, mode: str) -> dict:
    return figures(pipeline(folder, mode, optimizer="muon", max_steps=SHORT))


def bf16(folder: Path, mode: str) -> dict:
    return figures(pipeline(folder, mode, gradient_compression="bf16"))


def short(folder: Path, mode: str) -> dict:
    return figures(pipeline(folder, mode, max_steps=SHORT))


def floats(folder: Path, mode: str) -> dict:
    """Ternary weights are gathered as latents, in float32."""
    mark, sharded._mark_latents = sharded._mark_latents, lambda model, parts: None
    try:
        return figures(pipeline(folder, mode, max_steps=SHORT))
    finally:
        sharded._mark_latents = mark


def ahead(folder: Path, mode: str) -> dict:
    """What a forward gathers, and the ends of its blocks, in their order: with codes, and with floats."""
    order: list[str] = []

    class Told(sharded._Gather):
        def __call__(self, *arguments, **options):
            order.append("gather")
            return super().__call__(*arguments, **options)

    gather, mark = sharded._Gather, sharded._mark_latents
    ends = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, outputs: order.append("block") if isinstance(module, Block) else None
    )
    found = {}
    sharded._Gather = Told
    try:
        for name in ("codes", "floats"):
            sharded._mark_latents = mark if name == "codes" else lambda model, parts: None
            three = {"dim": 16, "layers": 3, "heads": 2}
            made = pipeline(folder / name, mode, "tokens", max_steps=2, model_options=three)

            def told(step, metrics, name=name):
                found[name] = order[:7]
                order.clear()

            made.register_callback("step_end", told)
            made.run()
    finally:
        sharded._Gather, sharded._mark_latents = gather, mark
        ends.remove()
    return found


def stopped(folder: Path, mode: str) -> dict:
    """The last rank alone gets a signal after step 7; the run then goes on to its end."""
    made, number = pipeline(folder, mode), signal.SIGTERM if mode == "ddp" else signal.SIGINT
    if RANK == WORLD - 1:
        made.register_callback(
            "step_end", lambda step, m: os.kill(os.getpid(), number) if step == 7 else None
        )
    first = figures(made)
    rest = figures(pipeline(folder, mode, overwrite=False, auto_resume=True))
    return {"first": first, "rest": rest}


def half(folder: Path, mode: str) -> dict:
    """Half a run, for other numbers of ranks to go on with."""
    made = pipeline(folder, mode)
    made.register_callback("step_end", lambda step, m: made.stop() if step == 24 + (WORLD == 1) else None)
    return figures(made)


def rest(folder: Path, mode: str, of: str = "", damage: str = "") -> dict:
    """The other half of a run that 4 ranks began, in their ``of`` mode.

    Where ``damage`` is given, it is the start of the name of a file of the newest checkpoint that is damaged.
    """
    if RANK == 0:
        shutil.copytree(folder.parents[1] / "4" / f"{of or mode}.half", folder, dirs_exist_ok=True)
        newest = CheckpointStore(folder=folder / "run" / "checkpoints").paths()[-1]
        for path in newest.glob(damage + "*") if damage else ():
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
    join().by_first(lambda: None)
    return figures(pipeline(folder, mode, overwrite=False, auto_resume=True))


def rest_in_the_other_mode(folder: Path, mode: str) -> dict:
    return rest(folder, mode, of="ddp" if mode == "fsdp" else "fsdp")


def rest_of_damaged(folder: Path, mode: str) -> dict:
    return rest(folder, mode, damage="shard-00003" if mode == "fsdp" else "tensors")


def failed_save(folder: Path, mode: str) -> dict:
    """The disk of one rank that writes is full at the second save; then the run goes on from the first."""
    module, rank = (checkpoint, 0) if mode == "ddp" else (shared_checkpoints, WORLD - 1)
    write_file = module.write_file

    def full(path, parts):
        if "step-00000020" in str(path) and rank == RANK:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_file(path, parts)

    module.write_file = full
    made, error = pipeline(folder, mode), ""
    try:
        made.run()
    except ForgeError as found:
        error = f"{type(found).__name__}: {found}"
    module.write_file = write_file
    left = join().by_first(lambda: sorted(p.name for p in (folder / "run" / "checkpoints").iterdir()))
    after = figures(pipeline(folder, mode, overwrite=False, auto_resume=True))
    return {"error": error, "stopped_at": made.loop.state.step, "left": left, "after": after}


def three_lives(folder: Path, mode: str) -> dict:
    """The data of the last rank fail; in the next life it is killed while it writes its part of step 30.

    :func:`killed` comes before, and has taken the first life.
    """
    write_file, life = shared_checkpoints.write_file, os.environ["TORCHELASTIC_RESTART_COUNT"]
    made = pipeline(folder, mode, overwrite=False, auto_resume=True).setup()
    loader: Any = type(made.train_loader)
    batches = loader.__iter__

    def failing(self):
        for number, batch in enumerate(batches(self)):
            if made.loop.state.step == 17 and number:
                raise OSError("the disk with the data is gone")
            yield batch

    def killed(path, parts):
        if "step-00000030" in str(path):
            path.write_bytes(b"".join(parts)[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
        return write_file(path, parts)

    if RANK == WORLD - 1 and life == "1":
        loader.__iter__ = failing
    if RANK == WORLD - 1 and life == "2":
        shared_checkpoints.write_file = killed
    return figures(made)


def command(folder: Path, mode: str) -> dict:
    """What the command line does with the words of FOLDER/words.json."""
    sys.path.insert(0, str(folder.parents[1]))
    words = json.loads((folder.parents[1] / "words.json").read_text())
    return {"code": cli.main([*words, "--output-dir", str(folder), "--experiment-name", "run"])}


def killed(folder: Path, mode: str) -> dict:
    """The same, and the last rank is killed in its first life."""
    os.environ["DIES_AT"] = "28 of first life"
    found = command(folder, mode)
    return found if found["code"] == 0 else sys.exit(found["code"])


class TwoHeads(nn.Module):
    """Answers with a class and a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.sign, self.total = nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, x):
        x = self.body(x)
        return {"sign": self.sign(x), "sum": self.total(x)}


def tasks(folder: Path, mode: str) -> dict:
    """Two tasks, whose weights in the loss are learned."""
    settings = {"model": TwoHeads(), "max_steps": SHORT, "float_layers": ["sign", "total"]}
    return figures(pipeline(folder, mode, "tasks", **settings))


class Noisy(nn.Module):
    """Draws a mask, keeps running means, and has a parameter that no sample uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Dropout(0.5)
        self.second, self.head, self.unused = nn.Linear(32, 32), nn.Linear(32, 3), nn.Linear(32, 3)
        self.dropped: list[list[int]] = []

    def forward(self, x):
        x = self.drop(self.norm(self.first(x)).relu())
        if self.training:
            # Of ones: what is zero in x depends on the data, which differ between ranks in any case.
            self.dropped.append((self.drop(torch.ones(32)) == 0).nonzero().flatten().tolist())
        return self.head(self.second(x).relu())


def noisy(folder: Path, mode: str) -> dict:
    """A run, and the same one stopped and gone on with."""
    made = pipeline(folder / "whole", mode, model=Noisy(), max_steps=SHORT)
    whole = figures(made)
    found = {"whole": whole, "means": made.model.norm.running_mean.tolist(), "dropped": made.model.dropped}
    first = pipeline(folder / "cut", mode, model=Noisy(), max_steps=SHORT)
    first.register_callback("step_end", lambda step, m: first.stop() if step == 6 else None)
    found["first"] = figures(first)
    rest = pipeline(folder / "cut", mode, model=Noisy(), max_steps=SHORT, overwrite=False, auto_resume=True)
    return {**found, "rest": figures(rest)}


def best(folder: Path, mode: str) -> dict:
    """The best of several validations, which is not the last, is what the run gives; it stops early."""
    options = {"early_stopping": True, "monitor": "accuracy", "eval_interval": 4, "learning_rate": 0.05}
    made = pipeline(folder, mode, max_steps=60, patience=2, **options)
    found = figures(made)
    return {**found, "best_step": made.loop.early_stopping.best_step}


class Troubled(nn.Module):
    """A network with trouble on the last rank from its ``at``-th step on.

    It has no memory for more than ``fits`` samples, or ``gives`` nan at that step alone.
    """

    def __init__(self, at: int = 10**6, fits: int = 10**6, gives: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 3))
        self.at, self.fits, self.gives, self.seen = at, fits, gives, 0

    def forward(self, x):
        if not self.training or RANK < WORLD - 1:
            return self.net(x)
        self.seen += 1
        if self.seen >= self.at and len(x) > self.fits:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return self.net(x) * (self.gives if self.seen == self.at else 1.0)


def memory(folder: Path, mode: str) -> dict:
    plain = figures(pipeline(folder / "plain", mode, model=Troubled(), max_steps=SHORT))
    sizes = []
    made = pipeline(folder / "short", mode, model=Troubled(at=5, fits=2), max_steps=SHORT)
    made.register_callback("out_of_memory", lambda step, m: sizes.append([step, m["micro_batch_size"]]))
    return {"plain": plain, "short": figures(made), "sizes": sizes}


def nonfinite(folder: Path, mode: str) -> dict:
    made = pipeline(folder, mode, model=Troubled(at=3, gives=float("nan")), shuffle=False, max_steps=SHORT)
    told = []
    made.register_callback("nonfinite_step", lambda step, m: told.extend(m["batches"]))
    return {**figures(made), "told": told}


def main() -> None:
    folder, *names = sys.argv[1:]
    report.write_report = lambda runs, output=None: Path()  # most of the time of a tiny run
    results = Path(folder) / f"{WORLD}-rank-{RANK}.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    done = set.intersection(*map(set, join().gathered(list(found))))
    for name in names:
        if name in done:
            continue
        place = Path(folder) / str(WORLD) / name
        if RANK == 0:
            place.mkdir(parents=True, exist_ok=True)
        mode, _, job = name.partition(".")
        found[name] = globals()[job](place, mode)
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
