"""The run folder: what is refused, what survives a killed process, what is written whole."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
import torch

from phase5_training import records
from phase5_training.errors import DataError, UsageError
from phase5_training.records import RunDirectory, machine, plain


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs", "modular")


def test_metrics_come_back_as_written(run: RunDirectory) -> None:
    rows = [
        {"kind": "train", "step": 1, "epoch": 0, "phase": "warmup", "loss": 4.5, "accuracy": None},
        {"kind": "validation", "step": 1, "loss": 0.1 + 0.2, "name": 'é \u2028 \n\t "quoted"'},
    ]
    for row in rows:
        run.append_metrics(row)
    assert run.read_metrics() == rows
    # Another reader, line by line, agrees.
    text = (run.path / "metrics.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.rstrip("\n").split("\n")] == rows


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (float("nan"), None),
        (float("inf"), None),
        (-float("inf"), None),
        (np.float32("nan"), None),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (torch.tensor(0.25), 0.25),
        (torch.tensor(float("nan")), None),
        (torch.tensor(float("inf"), dtype=torch.bfloat16), None),
        (Path("a") / "b", "a/b"),
        (np.array([1.0, np.nan]), [1.0, None]),
    ],
)
def test_values_json_has_no_word_for(run: RunDirectory, value: object, read: object) -> None:
    run.append_metrics({"value": value})
    run.write_result({"value": value})
    assert run.read_metrics() == [{"value": read}]
    assert run.read_result() == {"value": read}


def test_text_that_is_not_utf8_is_still_written(run: RunDirectory) -> None:
    run.append_event({"event": "x", "path": os.fsdecode(b"data-\xff.json")})
    assert run.read_events()[0]["path"].startswith("data-")


def test_an_event_gets_a_time_and_keeps_its_own(run: RunDirectory) -> None:
    run.append_event({"event": "fit_start"})
    run.append_event({"event": "fit_end", "time": "2001-01-01T00:00:00Z"})
    first, second = run.read_events()
    assert first["time"].endswith("Z")
    assert len(first["time"]) == 20
    assert second["time"] == "2001-01-01T00:00:00Z"


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b"{", b"\x00\x00\x00", b'"text"', b"12"])
def test_an_unfinished_last_line_is_ignored_then_removed(run: RunDirectory, tail: bytes) -> None:
    run.append_metrics({"step": 1})
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert run.read_metrics() == [{"step": 1}]
    run.append_metrics({"step": 3})
    assert run.read_metrics() == [{"step": 1}, {"step": 3}]
    assert tail not in (run.path / "metrics.jsonl").read_bytes()[:-1].split(b"\n")


def test_a_whole_last_line_without_its_newline_is_kept(run: RunDirectory) -> None:
    (run.path / "metrics.jsonl").write_bytes(b'{"step":1}\n{"step":2}')
    assert run.read_metrics() == [{"step": 1}, {"step": 2}]
    run.append_metrics({"step": 3})
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(run: RunDirectory) -> None:
    (run.path / "metrics.jsonl").write_bytes(b'{"step":1}\n{"st\n{"step":3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2 is not a JSON object"):
        run.read_metrics()


def test_a_process_killed_while_it_appends_loses_no_finished_row(run: RunDirectory) -> None:
    code = (
        "import os, signal, sys\n"
        "from phase5_training.records import RunDirectory\n"
        "run = RunDirectory(sys.argv[1])\n"
        "for step in range(50): run.append_metrics({'step': step})\n"
        "print('written', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    source = str(Path(records.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -9
    assert done.stdout == "written\n"
    assert [row["step"] for row in run.read_metrics()] == list(range(50))


def test_truncating_drops_what_lies_past_the_step(run: RunDirectory) -> None:
    for step in (1, 2, 3, 4):
        run.append_metrics({"kind": "train", "step": step})
    run.append_metrics({"kind": "note"})
    assert run.truncate_metrics(2) == 2
    assert run.read_metrics() == [
        {"kind": "train", "step": 1},
        {"kind": "train", "step": 2},
        {"kind": "note"},
    ]
    run.append_metrics({"kind": "train", "step": 3})
    assert run.read_metrics()[-1] == {"kind": "train", "step": 3}
    assert run.truncate_metrics(10) == 0


def test_records_that_are_not_there_yet(run: RunDirectory) -> None:
    assert run.read_metrics() == []
    assert run.read_events() == []
    assert run.read_quarantine() == []
    assert run.read_result() is None
    assert not run.exists()
    with pytest.raises(FileNotFoundError):
        run.read_config()


def test_config_round_trip_keeps_order_types_and_infinity(run: RunDirectory) -> None:
    class Kind(StrEnum):
        EMA = "ema"

    config = {
        "z_first": "1e-5",
        "learning_rate": 1e-5,
        "max_grad_norm": math.inf,
        "filter": Kind.EMA,
        "betas": (0.9, 0.999),
        "path": Path("data/train.json"),
        "text": "yes",
        "none": None,
        "flag": True,
    }
    run.write_config(config)
    read = run.read_config()
    assert list(read) == list(config)
    assert read == {**config, "filter": "ema", "betas": [0.9, 0.999], "path": "data/train.json"}
    assert isinstance(read["z_first"], str)
    assert isinstance(read["learning_rate"], float)
    assert run.exists()


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n", b""])
def test_a_broken_config_is_named(run: RunDirectory, content: bytes) -> None:
    (run.path / "config.yaml").write_bytes(content)
    with pytest.raises(DataError, match=r"config\.yaml"):
        run.read_config()


@pytest.mark.parametrize("content", [b'{"success": tr', b"[1]"])
def test_a_broken_result_is_named(run: RunDirectory, content: bytes) -> None:
    (run.path / "result.json").write_bytes(content)
    with pytest.raises(DataError, match=r"result\.json"):
        run.read_result()


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_result({"success": True})

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        run.write_result({"success": False})
    assert run.read_result() == {"success": True}
    assert [entry.name for entry in run.path.iterdir()] == ["result.json"]


def test_replaced_files_are_synced_before_they_are_renamed(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    run.write_config({"a": 1})
    assert order[:2] == ["fsync", "replace"]


class TestCreate:
    def test_a_taken_folder_is_refused_with_all_three_remedies(self, tmp_path: Path) -> None:
        run = RunDirectory.create(tmp_path, "a")
        run.append_metrics({"step": 1})
        with pytest.raises(UsageError) as caught:
            RunDirectory.create(tmp_path, "a")
        message = str(caught.value)
        assert f"forge resume {tmp_path / 'a'}" in message
        assert "experiment_name" in message
        assert "overwrite=True" in message
        assert run.read_metrics() == [{"step": 1}]

    def test_an_empty_folder_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        assert RunDirectory.create(tmp_path, "a").path == tmp_path / "a"

    def test_resume_opens_and_keeps(self, tmp_path: Path) -> None:
        RunDirectory.create(tmp_path, "a").write_config({"seed": 1})
        assert RunDirectory.create(tmp_path, "a", resume=True).read_config() == {"seed": 1}

    def test_resume_without_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no run to resume"):
            RunDirectory.create(tmp_path, "a", resume=True)

    def test_overwrite_deletes_the_run(self, tmp_path: Path) -> None:
        run = RunDirectory.create(tmp_path, "a")
        run.append_metrics({"step": 1})
        (run.checkpoints / "step-00000001").mkdir(parents=True)
        (run.checkpoints / "step-00000001" / "state.pt").write_bytes(b"x")
        (run.path / "export").mkdir()  # of `forge export`
        (run.path / ".result.json.123.tmp").write_bytes(b"left by a killed process")
        assert list(RunDirectory.create(tmp_path, "a", overwrite=True).path.iterdir()) == []

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_with_anything_else_is_left_alone(self, tmp_path: Path, overwrite: bool) -> None:
        run = RunDirectory.create(tmp_path, "a")
        run.append_metrics({"step": 1})
        (run.path / "thesis.tex").write_text("years of work")
        with pytest.raises(UsageError, match=r"thesis\.tex"):
            RunDirectory.create(tmp_path, "a", overwrite=overwrite)
        assert (run.path / "thesis.tex").exists()
        assert run.read_metrics() == [{"step": 1}]

    def test_overwriting_does_not_follow_a_link(self, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "kept").write_text("kept")
        run = RunDirectory.create(tmp_path, "a")
        run.checkpoints.symlink_to(elsewhere)
        RunDirectory.create(tmp_path, "a", overwrite=True)
        assert (elsewhere / "kept").exists()

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("")
        with pytest.raises(UsageError, match="a file is in the way"):
            RunDirectory.create(tmp_path, "a")
        with pytest.raises(UsageError, match="a file is in the way"):
            RunDirectory.create(tmp_path / "a", "b")

    @pytest.mark.parametrize(
        "name", ["", " ", ".", "..", "a/b", "../a", "a\\b", "a\nb", "a\x1b[31m", "x" * 201]
    )
    def test_names_that_are_no_folder(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match="experiment_name"):
            RunDirectory.create(tmp_path, name)
        assert list(tmp_path.iterdir()) == []

    def test_resume_and_overwrite_exclude_each_other(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="choose one"):
            RunDirectory.create(tmp_path, "a", resume=True, overwrite=True)


def test_the_machine_is_described() -> None:
    described = machine()
    assert described["torch"] == torch.__version__
    assert 1 <= described["cores"] <= (os.cpu_count() or 1)
    assert described["cpu"]
    assert described["versions"]["numpy"] == np.__version__
    assert json.loads(json.dumps(described)) == described


def test_plain_makes_sets_and_dataclasses_readable() -> None:
    assert plain({(1, 2): {3}}) == {"(1, 2)": [3]}


def test_reading_records_does_not_load_torch() -> None:
    code = "import sys, phase5_training.records; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(records.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_resuming_removes_what_a_killed_replacement_left(runs: Path) -> None:
    run = RunDirectory.create(runs, "a")
    run.write_config({})
    (run.path / ".result.json.12.tmp").write_text("half")
    (run.path / ".best.12.old.tmp").mkdir()
    RunDirectory.create(runs, "a", resume=True)
    assert sorted(p.name for p in run.path.iterdir()) == [".best.12.old.tmp", "config.yaml"]
