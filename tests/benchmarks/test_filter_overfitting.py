"""The script that holds the adaptive filter to a task on which a network merely overfits: a short run."""

import json
import sys

import numpy as np

import filter_overfitting


def test_labels_are_drawn_in_both_files(tmp_path):
    clean, noisy = (filter_overfitting.noisy_digits(tmp_path / str(share), share) for share in (0.0, 0.4))
    for before, after in zip(clean, noisy, strict=True):
        with np.load(before) as old, np.load(after) as new:
            assert (old["inputs"] == new["inputs"]).all()
            # One label in ten comes out as it was.
            assert abs((old["targets"] != new["targets"]).mean() - 0.36) < 0.05


def test_each_network_runs_without_the_filter_and_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("phase5_training.report.write_report", lambda runs, output=None: tmp_path)
    record = tmp_path / "record.jsonl"
    words = ["--steps", "20", "--seeds", "1", "--record", str(record)]
    monkeypatch.setattr(sys, "argv", ["filter_overfitting.py", *words])
    filter_overfitting.main()
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    expected = [(name, filtered) for name in filter_overfitting.NETWORKS for filtered in (None, "auto")]
    assert [(row["network"], row["filter"]) for row in rows] == expected
    assert all(row["steps"] == 20 and 0 < row["last_accuracy"] <= row["best_accuracy"] for row in rows)
    # Nothing is learned by heart in 20 steps: the filter has not acted.
    assert all(row["mean_evidence"] == 0.0 for row in rows)
