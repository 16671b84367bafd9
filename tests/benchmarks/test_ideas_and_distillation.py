"""The scripts that change one thing at a time, and that train with a teacher: a short run of each."""

import json
import sys

import pytest

import distillation
import ideas
from phase5_training.bench_tuning import tuned_row
from phase5_training.recipes import RECIPES, Tuned


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call a script with figures for a few steps of a task; gives the rows of its record."""
    monkeypatch.setattr("phase5_training.report.write_report", lambda runs, output=None: tmp_path)
    tuned, record = tmp_path / "tuned.jsonl", tmp_path / "record.jsonl"

    def run(script, task, steps, *words):
        rows = [
            {"kind": "tuned", **tuned_row(task, recipe, Tuned(options={
                "optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "schedule": "constant",
                "warmup_steps": 2, "max_steps": steps,
            }))}
            for recipe in ("forge", "float")
        ]  # fmt: skip
        tuned.write_text("".join(json.dumps(row) + "\n" for row in rows))
        places = {"--tuned": tuned, "--record": record, "--output-dir": tmp_path / "runs"}
        places = [word for flag, path in places.items() for word in (flag, str(path))]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--task", task, *words, *places])
        script.main()
        return [json.loads(line) for line in record.read_text().splitlines()]

    return run


def test_an_idea_changes_what_it_names_and_no_recipe(call):
    before = dict(RECIPES)
    plain, wider, slow = call(ideas, "digits", 20, "--seeds", "1", "--ideas", "forge", "wider", "cosine")
    assert before == RECIPES
    assert [row["idea"] for row in (plain, wider, slow)] == ["forge", "wider", "cosine"]
    assert (plain["changes"], slow["changes"]) == ({}, {"schedule": "cosine"})
    assert [row["options"]["model_options"]["hidden"] for row in (plain, wider)] == [[512, 512], [1024, 1024]]
    assert [row["options"]["schedule"] for row in (plain, slow)] == ["constant", "cosine"]
    for row in (plain, wider, slow):
        assert (row["kind"], row["steps"], row["ternary"], row["error"]) == ("idea", 20, True, "")
        assert row["test"] > 0.5  # of ten classes
        assert row["command"].startswith("python ideas.py --task digits")


def test_an_unknown_idea_is_named(call, capsys):
    with pytest.raises(SystemExit):
        call(ideas, "digits", 20, "--ideas", "widr")
    assert "unknown idea 'widr'; use some of forge" in capsys.readouterr().err


def test_a_teacher_a_student_alone_and_a_taught_one(call):
    words = ["--teacher", "float", "--alpha", "0.5", "--seeds", "1"]
    teacher, alone, taught = call(distillation, "wine", 40, *words)
    assert [row["who"] for row in (teacher, alone, taught)] == ["float", "ternary", "ternary"]
    assert [row["alpha"] for row in (teacher, alone, taught)] == [None, None, 0.5]
    for row in (teacher, alone, taught):
        assert (row["figure"], row["steps"], row["compiled"]) == ("accuracy", 40, False)
        assert row["reported"] > 0.6  # of three classes
        assert row["command"].startswith("python distillation.py --task wine")


def test_a_teacher_without_figures_is_one_line(call, capsys):
    with pytest.raises(SystemExit):
        call(distillation, "wine", 40, "--teacher", "naive")
    assert "no figures for 'naive' on 'wine' in" in capsys.readouterr().err
