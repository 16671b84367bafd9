"""A run that is resumed says so when its data are not those that it had."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from phase5_training.errors import UsageError
from phase5_training.pipeline.formats.fingerprint import fingerprint
from phase5_training.restore import OTHER_DATA
from phase5_training.same_data import differences

pytestmark = pytest.mark.usefixtures("no_report")


def write(path, first, last):
    rows = [{"input": [i % 7 / 10, 0.5, i % 3 / 10], "target": i % 2} for i in range(first, last)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def begun(pipeline, tmp_path, monkeypatch):
    """A run of 5 steps over three shards of 70 samples, and a function that takes it on."""
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    for name, first, last in (("a", 0, 30), ("b", 30, 60), ("c", 60, 70)):
        write(Path("d") / f"{name}.jsonl", first, last)

    def take(steps, data="d", **options):
        own = {"max_steps": steps, "batch_size": 8, "auto_resume": True, "validation_split": 0.0}
        return pipeline("mlp", data, **{**own, **options})

    take(5).run()
    return take


def said(made):
    """The warnings of a resume, which the run's events have too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.run()
    found = [str(w.message) for w in caught if "data" in str(w.message)]
    noted = [e["text"] for e in made.run_directory.read_events() if "other data" in e.get("text", "")]
    assert not found or noted[-1:] == found
    return found


def grow(folder):
    with (folder / "c.jsonl").open("a") as file:
        file.write('{"input": [0.1, 0.2, 0.3], "target": 1}\n')


def shrink(folder):
    write(folder / "c.jsonl", 60, 68)


def rewrite(folder):
    file = folder / "b.jsonl"
    file.write_text(file.read_text().replace("0.5", "0.4"))


def swap(folder):
    (folder / "a.jsonl").rename(folder / "x")
    (folder / "b.jsonl").rename(folder / "a.jsonl")
    (folder / "x").rename(folder / "b.jsonl")


CHANGES = {
    grow: "train has 71 samples and had 70, reads d/c.jsonl of {c:,} bytes and not {was:,}",
    shrink: "train has 68 samples and had 70, reads d/c.jsonl of {c:,} bytes and not {was:,}",
    rewrite: "train reads d/b.jsonl of the same size with other content",
    swap: "train reads its 3 files in another order",
    lambda d: write(d / "e.jsonl", 0, 5): "train has 75 samples and had 70, has the new d/e.jsonl",
    lambda d: (d / "c.jsonl").unlink(): "train has 60 samples and had 70, has lost d/c.jsonl",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_said_once(change, begun, tmp_path):
    was = (tmp_path / "d/c.jsonl").stat().st_size
    change(tmp_path / "d")
    c = tmp_path / "d/c.jsonl"
    sentence = CHANGES[change].format(c=c.stat().st_size if c.exists() else 0, was=was)
    assert said(begun(6)) == [
        f"resumed with other data than the run had: {sentence}; from here on samples and their order are not "
        f"those that would have come: {OTHER_DATA}"
    ]
    assert not said(begun(7)), "these are the data of the run by now"


def test_files_that_were_touched_copied_or_moved_are_the_same(begun, tmp_path):
    for file in (tmp_path / "d").iterdir():
        os.utime(file, (1, 1))
    assert not said(begun(6))
    shutil.copytree(tmp_path / "d", tmp_path / "elsewhere")
    assert not said(begun(7, "elsewhere"))


def test_a_place_that_is_not_there_is_refused(begun, tmp_path):
    for name in "ab":
        (tmp_path / "d" / f"{name}.jsonl").unlink()
    made = begun(6)
    with pytest.raises(UsageError) as caught:
        made.run()
    path = made.run_directory.checkpoints / "step-00000005"
    assert str(caught.value) == (
        f"{path} cannot go on with these data: it stands after batch 5 of an epoch, which has 2 batches now "
        f"(train has 10 samples and had 70, has lost d/a.jsonl, has lost d/b.jsonl); {OTHER_DATA}"
    )
    assert path.is_dir()
    assert len(made.run_directory.read_metrics()) > 0


def test_validation_data_count_too(pipeline, tmp_path):
    train, held = write(tmp_path / "t.jsonl", 0, 40), write(tmp_path / "v.jsonl", 0, 10)
    options = {"batch_size": 8, "auto_resume": True}
    pipeline("mlp", train, held, max_steps=2, **options).run()
    write(held, 0, 12)
    (found,) = said(pipeline("mlp", train, held, max_steps=3, **options))
    assert "had: validation has 12 samples and had 10, reads " in found


def test_data_in_memory(pipeline):
    def data(n, width=3):
        return torch.utils.data.TensorDataset(torch.rand(n, width), torch.arange(n) % 2)

    options = {"batch_size": 8, "auto_resume": True, "validation_split": 0.0}
    pipeline("mlp", data(40), max_steps=2, **options).run()
    assert not said(pipeline("mlp", data(40), max_steps=3, **options))
    (found,) = said(pipeline("mlp", data(41), max_steps=4, **options))
    assert "had: train has 41 samples and had 40; from" in found


def test_shapes_and_runs_of_before():
    then = {"samples": 1234, "input_shape": [3], "num_classes": 2}
    assert differences(then, {**then, "input_shape": [4], "num_classes": 3, "content": None}) == [
        "has [4] input shape and had [3]",
        "has 3 num classes and had 2",
    ]
    assert differences(then, then | {"content": {"files": [], "count": 0, "digest": ""}}) == []


def test_many_files(tmp_path):
    for i in range(230):
        (tmp_path / f"{i:03}.bin").write_bytes(bytes([i % 7]) * 10)
    files = sorted(tmp_path.iterdir())
    then = {"content": fingerprint(files)}
    (tmp_path / "225.bin").write_bytes(b"other")
    (found,) = differences(then, {"content": fingerprint(files)})
    assert found == "reads 230 files, not all the same as the 230 it had"
    for i in range(5):
        (tmp_path / f"00{i}.bin").write_bytes(b"abc")
    (found,) = differences(then, {"content": fingerprint(files)})
    assert found.endswith("002.bin of 3 bytes and not 10, 2 more files differ")


def test_what_belongs_to_a_file_counts(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 2)))
    np.save(tmp_path / "x_targets.npy", np.arange(4) % 2)
    before = fingerprint([tmp_path / "x.npy"])
    np.save(tmp_path / "x_targets.npy", np.arange(4) % 3)
    after = fingerprint([tmp_path / "x.npy"])
    assert before["files"][0] == after["files"][0]
    assert before["digest"] != after["digest"]
