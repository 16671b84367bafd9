"""Starts torchrun for a test, and gives what the ranks found."""

import json
import os
import subprocess
import sys
from pathlib import Path

JOBS = Path(__file__).with_name("jobs.py")


def torchrun(
    n: int, *words: object, restarts: int = 0, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """Run ``torchrun --nproc-per-node n ...`` to its end; an address of its own, so that several may run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def run_jobs(folder: Path, n: int, *jobs: str, restarts: int = 0) -> list[dict]:
    """What each rank's jobs, as "MODE.NAME", returned, by rank; FOLDER/N.out, N.err: what they said."""
    done = torchrun(n, JOBS, folder, *jobs, restarts=restarts)
    for said, kind in ((done.stdout, "out"), (done.stderr, "err")):
        (folder / f"{n}.{kind}").write_text(said)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{n}-rank-{rank}.json").read_text()) for rank in range(n)]
