"""What is shown while data are read for the first time, and how they are read from then on."""

import gzip
import io
import json

import numpy as np
import pytest

from phase5_training import reading_view
from phase5_training.cli import main
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.pipeline.formats import open_source
from phase5_training.pipeline.formats.reading import Reading, listening
from phase5_training.pipeline.formats.source import ReadOptions, known_length
from phase5_training.reading_view import ReadingProgress
from phase5_training.records import RunDirectory

SENTENCE = "train data: jsonl, 1,800 samples in batches of 32, in memory"


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"input": [i % 7 / 7, 0.5, 0.25], "target": i % 2} for i in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "a.jsonl"


@pytest.fixture
def progress():
    """A display whose time is told by hand, and what it wrote."""
    time, stream = [0.0], io.StringIO()

    def made(live, sizes):
        return ReadingProgress(live, sizes, stream=stream, clock=lambda: time[0]), time, stream

    return made


def test_lines(progress):
    show, time, stream = progress(False, {"d/a.jsonl": 600_000_000, "d/b.jsonl": 400_000_000})
    for second in range(1, 33):
        time[0] = second
        at = second * 30_000_000
        name, done = ("a", at) if at <= 600_000_000 else ("b", at - 600_000_000)
        show(Reading(f"d/{name}.jsonl", done, None, "bytes"))
        show(Reading("d/a.jsonl", 7 * second, None, "records"))
    show.close()
    assert stream.getvalue().splitlines() == [
        "reading a.jsonl: 60 MB of 1 GB, 30 MB/s, 31 s left",
        "reading a.jsonl: 360 MB of 1 GB, 30 MB/s, 21 s left",
        "reading b.jsonl: 660 MB of 1 GB, 30 MB/s, 11 s left",
        "reading b.jsonl: 960 MB of 1 GB, 30 MB/s, 1.3 s left",
    ]


def test_a_line_of_a_terminal_is_written_anew_and_taken_away(progress):
    show, time, stream = progress(True, {})
    for step in range(1, 22):
        time[0] = step / 8
        show(Reading("x\x1b[2J.h5", 100_000 * step, 4_000_000, "records"))
    show.close()
    lines = stream.getvalue().split("\r")
    assert lines[1] == r"reading x\x1b[2J.h5: 1.6M of 4M records, 800k records/s, 3 s left"
    assert len(lines) == 6  # 2 and 2.25 s, 2.5 s, and twice to take it away
    assert lines[-1] == ""
    assert lines[-2] == " " * len(lines[-3].rstrip())


def test_a_short_pass_and_a_stream_that_has_gone(progress):
    show, time, stream = progress(True, {"a": 10})
    time[0] = 1.9
    show(Reading("a", 10, 10, "bytes"))
    show.close()
    assert stream.getvalue() == ""
    stream.close()
    time[0] = 3.0
    show(Reading("a", 10, 10, "bytes"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.npz"])
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_readers_tell_how_far_they_are(name, limit, file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    path = file.with_name(name)
    if name == "a.json":
        path.write_text(json.dumps({"samples": rows}))
    elif name == "a.csv":
        path.write_text("input,target\n" + "\n".join(f"{r['input'][0]},{r['target']}" for r in rows))
    elif name == "a.jsonl.gz":
        path.write_bytes(gzip.compress(file.read_bytes()))
    elif name == "a.npz":
        np.savez(path, inputs=[r["input"] for r in rows], targets=[r["target"] for r in rows])
    heard = []
    with listening(heard.append):
        DataLoaderFactory.create_loader(path, DataConfig(memory_limit_mb=limit >> 20))
    before = len(heard)
    DataLoaderFactory.create_loader(path)
    assert len(heard) == before, "nobody listens any more"
    assert heard[-1].done == 2000
    assert heard[-1].unit == "records"
    sizes = [found.done for found in heard if found.unit == "bytes"]
    assert sizes == sorted(sizes)
    assert not sizes or sizes[-1] == path.stat().st_size
    assert bool(sizes) == (name == "a.jsonl" or (name == "a.json" and not limit))


def test_a_length_that_takes_a_walk_is_not_asked_for(file):
    options = ReadOptions(memory_limit=0)
    source = open_source([file, file], options)
    assert known_length(source) is None
    assert len(source) == known_length(source) == 4000
    assert known_length(open_source(file)) == 2000


def test_who_opens_data_by_hand_sees_nothing(file, monkeypatch, capsys):
    monkeypatch.setattr(reading_view, "QUIET_S", -1.0)
    DataLoaderFactory.create_loader(file)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("progress", "lines"), [("auto", True), ("plain", True), ("quiet", False)])
def test_a_run_says_how_its_data_are_read(progress, lines, file, monkeypatch, capsys):
    words = ["train", "--train-data-path", "a.jsonl", "--max-steps", "2", "--progress", progress]
    monkeypatch.setattr(reading_view, "QUIET_S", -1.0)
    assert main([*words, "--experiment-name", "a"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out.count(SENTENCE) == int(lines)
    assert sum(line.startswith("reading a.jsonl: ") for line in out) == int(lines)
    if lines:
        assert out.index(SENTENCE) == 1, "before the first step"
    noted = [event.get("text") for event in RunDirectory("runs/a").read_events()]
    assert noted.count(SENTENCE) == 1


def test_a_short_file_is_read_without_a_word(file, capsys):
    assert main(["train", "--train-data-path", "a.jsonl", "--max-steps", "2"]) == 0
    assert "reading" not in capsys.readouterr().out
