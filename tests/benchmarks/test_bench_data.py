"""The files, cases and summaries of the benchmark of reading."""

import json
import time

import numpy as np
import pytest

import bench_data
import data_stall
from phase5_training.pipeline.data_loader import ForgeDataLoader


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_data, "BLOCK", 40)


def test_the_json_file_is_what_the_part_says(tmp_path):
    count = bench_data.write_json(tmp_path / "a.json", 1)
    samples = json.loads((tmp_path / "a.json").read_text())["samples"]
    assert len(samples) == count
    assert {len(record["input"]) for record in samples} == {128}
    assert all(record["target"] in range(10) for record in samples)


@pytest.mark.parametrize("name", ["forge", "json.load"])
def test_a_case_reads_every_sample(tmp_path, name):
    count = bench_data.write_json(tmp_path / "a.json", 1)
    turn, _ = bench_data.prepare_json(name, tmp_path / "a.json", tmp_path, 1, 2)
    row = turn()
    assert row["samples"] == count
    assert row["later_samples"] == 2 * bench_data.BATCH
    assert row["peak_mb"] >= row["imported_mb"] > 0


@pytest.mark.parametrize("suffix", ["json", "jsonl", "npy", "bin", "h5"])
def test_streams_of_every_format_are_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    bench_data.write_stream(path, 4)
    turn, _ = bench_data.prepare_stream(path, 1)
    assert turn()["samples"] > 1000
    with open(path, "rb") as file:  # training and validation data are all of the file
        assert suffix != "jsonl" or turn()["samples"] == sum(1 for _ in file)


def test_the_share_of_waiting_is_of_the_time_of_all_steps():
    rows = [
        {"step": 10, "samples_per_s": 20.0, "data_wait_share": 0.5},  # 10 steps of 4 in 2 s
        {"step": 10, "loss": 1.0},
        {"step": 20, "samples_per_s": 5.0, "data_wait_share": 0.0},  # in 8 s
    ]
    found = data_stall.stalls(rows, batch_size=4)
    assert (found["seconds"], found["waited_s"], found["wait_share"]) == (10.0, 1.0, 0.1)
    assert found["shares"] == [0.5, 0.0]


def test_a_task_in_training_says_how_long_it_waited(tmp_path):
    plain = ForgeDataLoader.__iter__
    turn, _ = data_stall.prepare_stall("breast_cancer", 20, tmp_path, 1)
    row = turn()
    assert len(row["shares"]) >= 2
    assert 0 <= row["waited_s"] < row["seconds"]
    assert 0 < row["cpu_share"] < 0.5
    assert ForgeDataLoader.__iter__ is plain


def test_processor_time_tells_making_from_steps():
    class Loader:
        split = "train"

        def __iter__(self):
            for _ in range(3):
                burn(0.05)
                yield {}

    def burn(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    clock = data_stall.ProcessorTime()
    with clock.watch(Loader):
        for number, _ in enumerate(Loader()):
            burn(1.0 if number == 1 else 0.1)  # one with a validation in it
    assert len(clock.steps) == 3
    assert clock.making == pytest.approx(0.15, abs=0.03)
    assert clock.share() == pytest.approx(0.15 / 0.45, abs=0.04)


def test_both_ways_to_read_tokens_give_blocks_of_the_stream(tmp_path):
    tokens = np.arange(10_000).astype(np.uint16)
    tokens.tofile(tmp_path / "a.bin")
    for batch in bench_data.by_hand(tmp_path / "a.bin", 50):
        assert (batch["target"] - batch["input"] == 1).all()


def test_the_summary_keeps_to_its_cases():
    rows = [{"case": "forge", "samples": 10, "seconds": s, "cpu_s": 1.0} for s in (1.0, 2.0, 4.0)] + [
        {"case": "peer", "error": "KeyError: 'x'"}
    ]
    lines = list(bench_data.summary("tokens", rows))
    assert lines[0] == "tokens forge: samples/s [3.75, 5.0, 7.5] (quartiles of 3)"
    assert lines[-1] == "tokens peer: KeyError: 'x'"


def test_the_summary_takes_ratios_round_by_round():
    rows = [
        {"case": case, "round": i, "samples": 12, "seconds": seconds, "cpu_s": 1.0}
        for i, pair in enumerate(((1.0, 3.0), (4.0, 8.0)))
        for case, seconds in zip(("forge", "h5py"), pair, strict=True)
    ]
    lines = list(bench_data.summary("hdf5", rows))
    assert "hdf5  forge / h5py: samples/s [2.25, 2.5, 2.75] (quartiles of 2 rounds)" in lines
