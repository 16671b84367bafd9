"""What bench_optimizer compares with is what it is said to be."""

import numpy as np
import pytest
import torch
from torch import nn

import bench_optimizer
from oracles import grokfast


def test_the_published_loop_is_the_papers_algorithm():
    series = np.random.default_rng(0).normal(size=(6, 3, 4))
    layer = nn.Linear(4, 3, bias=False)
    averages = None
    expected = grokfast.ema(series, bench_optimizer.ALPHA, bench_optimizer.LAMBDA)
    for g, wanted in zip(series, expected, strict=True):
        layer.weight.grad = torch.tensor(g, dtype=torch.float32)
        averages = bench_optimizer.published_filter_(layer.named_parameters(), averages)
        np.testing.assert_allclose(layer.weight.grad.numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", bench_optimizer.COMPARISONS)
def test_cases_take_the_same_steps(monkeypatch, name):
    """Those with clip and filter end at the same weights, whatever way they take; so do those without."""
    ends = {}
    for case, make in bench_optimizer.COMPARISONS[name].items():
        model = bench_optimizer.decoder(64, 1)
        turn = make(model)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            turn()
        ends[case] = torch.cat([p.detach().flatten() for p in model.parameters()])
    if name == "AdamW":
        for case in ("general path", "published loop", "one pass, bfloat16 average"):
            tolerance = 1e-3 if "bfloat16" in case else 1e-5
            torch.testing.assert_close(ends[case], ends["one pass"], rtol=0, atol=tolerance)
    else:
        torch.testing.assert_close(ends["torch Muon alone"], ends["Muon alone"], rtol=0, atol=5e-4)
    rows = bench_optimizer.compare(name, 64, rounds=2, warmup=1)
    assert [row["case"] for row in rows] == list(bench_optimizer.COMPARISONS[name])
    assert rows[0]["ratio_quartiles"] == [1.0, 1.0, 1.0]
