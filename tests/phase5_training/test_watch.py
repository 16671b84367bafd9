"""forge watch: a run of another process, followed through rollbacks and resumes to its end or its death."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phase5_training import cli
from phase5_training.follow import RowFollower, is_alive, this_process
from phase5_training.forecast import seconds_to_target
from phase5_training.records import RunDirectory
from phase5_training.watch import RunWatcher


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.create(tmp_path / "runs", "digits")
    run.write_config({"target": 0.9, "monitor": "accuracy"})
    return run


def begin(run: RunDirectory, **process: Any) -> None:
    run.append_event({"event": "session", "total_steps": 100, **this_process(), **process})


def log(run: RunDirectory, step: int, **more: Any) -> None:
    row = {"kind": "train", "step": step, "phase": "warmup", "loss": 50 / step, "elapsed_s": step / 2}
    run.append_metrics({**row, **more})


def validate(run: RunDirectory, step: int, accuracy: float) -> None:
    run.append_metrics({"kind": "validation", "step": step, "accuracy": accuracy, "elapsed_s": step / 2})


def end(run: RunDirectory, step: int, reason: str = "finished") -> None:
    run.append_event({"event": "fit_end", "step": step, "stop_reason": reason, "elapsed_s": step / 2})


def watched(run: RunDirectory, *then: Callable[[], None], mode: Any = "lines") -> tuple[int, str]:
    """Watch, with things that happen one after the other between two looks; the exit code and the words."""
    left = list(then)
    console = Console(file=io.StringIO(), width=100, force_terminal=mode == "live", color_system=None)
    watcher = RunWatcher(
        run, mode, console=console, grace_s=0.0, sleep=lambda seconds: left.pop(0)() if left else None
    )
    return watcher.follow(), console.file.getvalue()  # type: ignore[attr-defined]


def test_it_begins_where_the_run_is_and_ends_with_it(run: RunDirectory) -> None:
    begin(run)
    log(run, 10)
    log(run, 20)
    code, shown = watched(
        run,
        lambda: log(run, 30),
        lambda: validate(run, 30, 0.5),
        lambda: run.append_event({"event": "checkpoint_saved", "step": 30, "path": "step-00000030"}),
        lambda: end(run, 30),
    )
    assert code == 0
    lines = shown.splitlines()
    assert lines[0].startswith("step 20/100  warmup  loss 2.5")  # one line for what was before
    assert "ETA 40 s" in lines[0]
    assert lines[1].startswith("step 30/100")
    assert lines[2] == "validation at step 30:  accuracy 50.0%  (best so far)"
    assert lines[3] == "checkpoint of step 30 saved: step-00000030"
    assert lines[4].startswith("ended at step 30 after 15 s: all epochs were done")


def test_a_run_that_has_ended_is_told_of_at_once(run: RunDirectory) -> None:
    begin(run)
    log(run, 100)
    end(run, 100, "failed")
    code, shown = watched(run)
    assert code == 1
    assert "ended at step 100" in shown


def test_rows_that_are_taken_back_are_forgotten(run: RunDirectory) -> None:
    begin(run)
    for step in (10, 20, 30):
        log(run, step)
    validate(run, 30, 0.8)

    def roll_back() -> None:
        run.truncate_metrics(10)
        log(run, 20, loss=7.0)

    code, shown = watched(run, roll_back, lambda: end(run, 20))
    assert code == 0
    assert "step 20/100  warmup  loss 7" in shown
    assert "best" not in shown.split("step 20/100")[-1]  # of the validation that was taken back


def test_a_resume_goes_on_in_the_same_view(run: RunDirectory) -> None:
    begin(run)
    log(run, 10)
    end(run, 10, "interrupted")

    def resume() -> None:
        begin(run)
        log(run, 20)

    code, shown = watched(run)
    assert code == 0
    assert f"forge resume {run.path}" in shown
    begin(run)
    code, shown = watched(run, resume, lambda: end(run, 20))
    assert code == 0
    assert "step 20/100" in shown


def test_a_run_that_died_is_told_of(run: RunDirectory) -> None:
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
    begin(run, pid=int(process.stdout), process_started=1)
    log(run, 10)
    code, shown = watched(run, lambda: None)
    assert code == 1
    assert f"is gone; continue with: forge resume {run.path}" in shown


def test_the_live_view_has_curves_and_goals(run: RunDirectory) -> None:
    begin(run)
    for step in range(10, 80, 10):
        log(run, step, cpu_share=0.93, memory_mb=512)
        validate(run, step, step / 100)
    code, shown = watched(run, lambda: end(run, 70), mode="live")
    assert code == 0
    for words in (
        "warmup › acceleration › consolidation › refinement",
        "training    loss 0.7143",
        "validation  accuracy 70.0%",
        "▁",
        "accuracy 90.0% in about 10 s",
        "memory 512 MB  ·  CPU 93.0%",
        "ended at step 70",
    ):
        assert words in shown, words


def test_a_target_is_reached_or_is_not_in_sight(run: RunDirectory) -> None:
    begin(run)
    for step, accuracy in ((10, 0.5), (20, 0.95), (30, 0.7)):
        log(run, step)
        validate(run, step, accuracy)
    assert "accuracy 90.0% reached at step 20" in watched(run, lambda: end(run, 30), mode="live")[1]
    run.write_config({"target": 0.99, "monitor": "accuracy"})
    assert "accuracy 99.0% was not reached" in watched(run, mode="live")[1]
    run.write_config({"target": 0.9, "monitor": "parity_accuracy"})  # of one task of several
    for step, accuracy in ((40, 0.5), (50, 0.6), (60, 0.7)):
        run.append_metrics(
            {"kind": "validation", "step": step, "parity_accuracy": accuracy, "elapsed_s": step}
        )
    assert "parity_accuracy 90.0% was not reached" in watched(run, mode="live")[1]
    # By hand: least squares through (0, 4), (1, 2), (2, 1) is 3.8333 - 1.5 x, which is 0.5 at 2.2222.
    found = seconds_to_target([(0.0, 4.0), (1.0, 2.0), (2.0, 1.0)], 0.5, rising=False)
    assert found == pytest.approx(0.222, abs=1e-3)
    assert seconds_to_target([(0.0, 4.0), (1.0, 2.0), (2.0, 1.0)], 8.0, rising=True) is None
    assert seconds_to_target([(0.0, 4.0), (1.0, 2.0)], 0.5, rising=False) is None


def test_a_pid_that_is_used_again_is_another_process() -> None:
    own = this_process()
    assert is_alive(own) is True
    assert is_alive({**own, "process_started": 1}) is False
    assert is_alive({**own, "host": "elsewhere"}) is None
    assert is_alive({}) is None


def test_a_line_in_the_making_is_left_for_later(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    follower = RowFollower(file)
    assert follower.read() == (False, [])
    file.write_bytes(b'{"step": 1}\n{"st')
    assert follower.read() == (False, [{"step": 1}])
    with open(file, "ab") as out:
        out.write(b'ep": 2}\n')
    assert follower.read() == (False, [{"step": 2}])
    # Written anew, and at once longer than it was.
    file.write_bytes(b'{"step": 1}\n{"step": 3}\n{"step": 4}\n')
    assert follower.read() == (True, [{"step": 1}, {"step": 3}, {"step": 4}])
    file.write_bytes(b"")
    assert follower.read() == (True, [])
    file.unlink()
    assert follower.read() == (False, [])


def test_the_command_line_follows_and_refuses(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    begin(run)
    log(run, 10)
    end(run, 10)
    assert cli.main(["watch", str(run.path), "--plain"]) == 0
    assert "ended at step 10" in capsys.readouterr().out
    assert cli.main(["watch", str(run.path.with_name("digit"))]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_watching_does_not_load_torch(run: RunDirectory) -> None:
    code = "import sys; from phase5_training.watch import RunWatcher; sys.exit('torch' in sys.modules)"
    source = str(Path(cli.__file__).parents[1])
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}).returncode == 0
    )
