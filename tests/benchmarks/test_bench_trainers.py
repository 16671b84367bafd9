"""What bench_trainers times is training: the same network learns in each loop."""

import pytest
import torch

import bench_trainers
from phase5_training import report


@pytest.mark.parametrize("name", bench_trainers.LOOPS)
def test_each_loop_trains_the_network(name, tmp_path, monkeypatch):
    made = []

    class Kept(bench_trainers.Network):
        def __init__(self):
            super().__init__()
            made.append(self)

    def loss(network):
        data = bench_trainers.Digits(("x", "labels"))
        with torch.no_grad():
            return float(network.eval()(data.x, data.y)["loss"])

    written = report.write_report
    before = loss(bench_trainers.Network())
    monkeypatch.setattr(bench_trainers, "Network", Kept)
    bench_trainers.LOOPS[name](30, str(tmp_path))
    assert loss(made[-1]) < before - 0.05
    assert report.write_report is written
