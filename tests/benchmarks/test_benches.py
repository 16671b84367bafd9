"""The machinery of the benchmarks: turns, ratios, peaks."""

import pytest
import torch

import bench_memory
import bench_step
from cases import CASES, Shape, training_step
from interleave import CaseError, Worker, ratio_quartiles

SMALL = Shape(width=64, layers=1, tokens=16)


def test_ratios_are_taken_round_by_round():
    assert ratio_quartiles([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == [1.5, 2.0, 2.5]
    assert ratio_quartiles([3.0], [2.0]) == [1.5, 1.5, 1.5]


@pytest.mark.slow
def test_a_case_works_in_a_process_of_its_own_and_its_failure_is_told():
    worker = Worker(bench_step.prepare, "float-fp32", SMALL, "cpu", 1, False)
    turn = worker.turn()
    worker.close()
    assert turn["seconds"] > 0
    assert 0 < turn["loss"] < 7  # of 256 values, ln 256 at first
    assert worker.facts["compiled"] is False
    with pytest.raises(CaseError, match="KeyError: 'nobody'"):
        Worker(bench_step.prepare, "nobody", SMALL, "cpu", 1, False)


@pytest.mark.slow
def test_a_case_that_cannot_run_keeps_its_row(monkeypatch):
    names = ["float-fp32", "nobody"]
    monkeypatch.setitem(bench_step.CASES, "nobody", CASES["float-fp32"])  # in this process only
    options = {"device": "cpu", "threads": 1, "rounds": 2, "compiled": False, "peak": 1.0}
    good, bad = bench_step.compare(names, SMALL, **options)
    assert good["ratios"]["float-fp32"] == [1.0, 1.0, 1.0]
    assert good["utilization"] == pytest.approx(SMALL.flops / good["median_ms"] / 1e9, abs=1e-4)
    assert bad["error"] == "KeyError: 'nobody'"
    assert "KeyError" in str(bench_step.table([good, bad], SMALL).columns[-1]._cells)


def test_transient_bytes_are_those_alive_at_once():
    def step():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second + torch.ones(500)[0]

    # 1000 and 1000 floats alive together, then 1000, 500 and 1000.
    assert bench_memory._transient(step) == pytest.approx(10_000, abs=64)


def test_bytes_between_steps_are_parameters_moments_and_batch():
    training = CASES["float-fp32"].build(SMALL, "cpu")
    batch = SMALL.batch("cpu")
    training_step(CASES["float-fp32"], training, batch, compiled=False)
    parameters = sum(p.numel() for p in training.model.parameters())
    buffers = sum(b.numel() for b in training.model.buffers())
    steps = len(list(training.model.parameters()))
    found = bench_memory.bytes_between_steps(training, batch)
    assert found == 4 * (3 * parameters + buffers + steps) + 8 * 2 * SMALL.tokens
