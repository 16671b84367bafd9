"""The suite's script: tunes what has no figures, once, then compares."""

import json
import sys

import pytest

import bench_time_to_target
from phase5_training import bench_tuning
from phase5_training.recipes import read_tuned


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Call the script on the wines with a short grid; gives its record's rows."""
    tried = [{"learning_rate": r, "weight_decay": 0.1, "schedule": "constant"} for r in (1e-6, 0.02)]
    monkeypatch.setattr(bench_tuning, "grid", lambda recipe, task: tried)
    monkeypatch.setattr("phase5_training.report.write_report", lambda runs, output=None: tmp_path)
    names = {"tuned": "tuned.jsonl", "record": "r.jsonl", "output-dir": "runs"}
    places = {flag: tmp_path / name for flag, name in names.items()}
    flags = [word for name, path in places.items() for word in (f"--{name}", str(path))]

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["bench_time_to_target.py", "--task", "wine", *words, *flags])
        bench_time_to_target.main()
        record = places["record"]
        return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []

    call.tuned = places["tuned"]
    return call


def test_figures_are_found_once_and_used(script):
    words = ["--recipes", "float", "--target", "0.9", "--cap-steps", "60", "--seeds", "1", "--threads", "1"]
    assert script(*words, "--tune", "--first-seed", "100") == []
    found = read_tuned(script.tuned)["wine", "float"]
    assert found.options["learning_rate"] == 0.02
    assert found.seeds == (100,)
    size = script.tuned.stat().st_size
    rows = script(*words)
    assert script.tuned.stat().st_size == size
    (run,) = [row for row in rows if row["kind"] == "run"]
    assert (run["options"]["learning_rate"], run["tuning_steps"]) == (0.02, found.steps)
    assert run["command"].startswith("python bench_time_to_target.py --task wine")
