"""Trackers: their libraries' own files, read back, equal metrics.jsonl; none can stop or slow a run."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracles import tracker_files
from phase5_training.cli import main
from phase5_training.errors import UsageError
from phase5_training.events import CallbackRegistry, Event
from phase5_training.records import RunDirectory
from phase5_training.trackers import TRACKERS, TrackerProcesses, check_trackers
from phase5_training.trackers.mirror import mirror

SOURCE = Path(__file__).resolve().parents[2] / "phases"
LAYERS = ["blocks.0.up", "blocks.0.down"]
# trackio 0.43 wants a pillow older than the one that is pinned here.
needs_trackio = pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
EACH = ["wandb", "tensorboard", pytest.param("trackio", marks=needs_trackio)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of the developer's
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = RunDirectory.create(tmp_path / "runs", "digits")
    run.write_config({"learning_rate": 0.01, "hidden": [64, 64], "trackers": ["wandb"]})
    run.append_event({"event": "session", "layers": [{"name": name} for name in LAYERS]})
    return run


def train(run: RunDirectory, first: int, last: int) -> None:
    """Write the rows of some steps: a log each 10, a validation each 20, an epoch each 25."""
    rng = np.random.default_rng(first)
    for step in range(first, last + 1, 5):
        row: dict[str, Any] = {"step": step, "epoch": step // 25, "loss": float(rng.random())}
        if step % 10 == 0:
            more = {"accuracy": None, "layer_zero_share": rng.random(2).tolist(), "elapsed_s": step / 10}
            run.append_metrics({"kind": "train", "phase": f"phase {step // 40}", **row, **more})
        if step % 20 == 0:
            run.append_metrics({"kind": "validation", **row, "improved": step % 40 == 0})
        if step % 25 == 0:
            run.append_metrics({"kind": "epoch", **row})


def session(
    run: RunDirectory, name: str, **options: Any
) -> tuple[CallbackRegistry, TrackerProcesses, io.StringIO]:
    told = io.StringIO()
    registry = CallbackRegistry()
    processes = TrackerProcesses([name], run, "tests", stream=told, **options)
    processes.register(registry)
    return registry, processes, told


def read_back(run: RunDirectory, name: str) -> tracker_files.History:
    if name == "trackio":
        return tracker_files.of_trackio(Path(os.environ["TRACKIO_DIR"]) / "tests.db")
    return getattr(tracker_files, f"of_{name}")(run.path / "trackers")


def wanted(run: RunDirectory, name: str) -> tracker_files.History:
    """The figures of metrics.jsonl, as far as the tracker's own types can hold them."""
    history = tracker_files.of_metrics(run.path / "metrics.jsonl", LAYERS)
    if name != "tensorboard":
        return history
    phase = ""
    for step in sorted(history):
        for key, value in list(history[step].items()):
            if not isinstance(value, str):
                history[step][key] = float(np.float32(value))
            elif value == phase:
                del history[step][key]
            else:
                phase = value
    return history


@pytest.mark.parametrize("name", EACH)
def test_files_hold_what_metrics_jsonl_holds_after_a_resume_too(run: RunDirectory, name: str) -> None:
    registry, processes, told = session(run, name, close_s=120.0)
    registry.fire(Event.FIT_START, 0, {})
    train(run, 5, 100)
    registry.fire(Event.LOG, 100, {})
    registry.fire(Event.FIT_END, 100, {})
    processes.wait()
    assert read_back(run, name) == wanted(run, name)
    # The next session goes on from a checkpoint of step 60, and within it the run goes back to step 80.
    run.truncate_metrics(60, 2)
    registry.fire(Event.FIT_START, 60, {})
    train(run, 65, 120)
    time.sleep(2.5)  # the tracker has read that
    run.truncate_metrics(80, 3)
    train(run, 85, 140)
    registry.fire(Event.FIT_END, 140, {})
    processes.wait()
    history = wanted(run, name)
    assert max(history) == 140
    assert read_back(run, name) == history
    assert told.getvalue() == ""


def test_a_killed_run_is_mirrored_to_its_last_row(run: RunDirectory) -> None:
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_trackers import RunDirectory, session, train, Event
run = RunDirectory({str(run.path)!r})
registry, processes, told = session(run, "tensorboard")
registry.fire(Event.FIT_START, 0, {{}})
train(run, 5, 50)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = os.pathsep.join([str(SOURCE), str(SOURCE.parent / "tests")])
    ended = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, timeout=60
    )
    assert ended.returncode == -signal.SIGKILL
    until = time.monotonic() + 30
    found: Any = None
    while found != wanted(run, "tensorboard") and time.monotonic() < until:
        time.sleep(0.3)
        with contextlib.suppress(AssertionError):  # no file yet
            found = read_back(run, "tensorboard")
    assert found == wanted(run, "tensorboard")


def stand_in(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library named wandb that does something bad."""
    (folder / "wandb.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_tracker_that_hangs_holds_up_nothing(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
    stand_in(tmp_path, hang, monkeypatch)
    registry, processes, told = session(run, "wandb", close_s=2.0)
    spent = time.perf_counter()
    registry.fire(Event.FIT_START, 0, {})
    train(run, 5, 50)
    registry.fire(Event.LOG, 50, {})
    (process,) = processes._processes.values()
    registry.fire(Event.FIT_END, 50, {})
    assert time.perf_counter() - spent < 1.0
    processes.wait()
    assert process.poll() is not None
    assert told.getvalue().count("warning") == 1
    assert "not done 2 s after the run had ended" in told.getvalue()
    assert f"forge track {run.path} wandb" in told.getvalue()
    assert [e["tracker"] for e in run.read_events() if e["event"] == "tracker_failed"] == ["wandb"]


def test_a_tracker_that_fails_is_told_of_once(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "raise RuntimeError('no disk left for it')", monkeypatch)
    registry, processes, told = session(run, "wandb")
    registry.fire(Event.FIT_START, 0, {})
    train(run, 5, 50)
    until = time.monotonic() + 30
    while not told.getvalue() and time.monotonic() < until:
        registry.fire(Event.LOG, 50, {})
        time.sleep(0.1)
    registry.fire(Event.LOG, 50, {})
    registry.fire(Event.FIT_END, 50, {})
    processes.wait()
    assert told.getvalue().count("warning") == 1
    assert "RuntimeError: no disk left for it" in told.getvalue()


def test_a_run_is_mirrored_afterwards(run: RunDirectory) -> None:
    train(run, 5, 50)
    assert main(["track", str(run.path), "tensorboard"]) == 0
    assert read_back(run, "tensorboard") == wanted(run, "tensorboard")


def test_trackio_that_cannot_write_is_a_failure(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage

    def full(*args: Any, **options: Any) -> None:
        raise OSError("database or disk is full")

    monkeypatch.setattr(storage, "bulk_log", full)
    train(run, 5, 20)
    with pytest.raises(RuntimeError, match=r"failed to flush metric logs .* disk is full"):
        mirror(run, "trackio", "tests")


def test_names_and_packages_are_checked_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="did you mean 'wandb'"):
        check_trackers(["wandbb"])
    for name in TRACKERS:
        (tmp_path / name).mkdir()  # a folder in the way, as trackio's own data
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr("sys.modules", {k: v for k, v in sys.modules.items() if k not in TRACKERS})
    for name in TRACKERS:
        with pytest.raises(UsageError, match="pip install 'forge-training"):
            check_trackers([name])
