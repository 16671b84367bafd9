import numpy as np
import pytest
import torch
from torch import nn

from phase4_bitnet import native
from phase5_training.pipeline.grokfast_trainer import GradientFilter, GrokfastConfig, filter_linear_
from phase5_training.slow_average import LinearFilter, hash_bits, mix, round_to_bfloat16


def test_the_hash_is_the_published_one():
    """lowbias32 of the hash prospector: values computed with plain 32-bit arithmetic of numpy."""
    x = np.array([0, 1, 2, 12345, 2**31, 2**32 - 1], dtype=np.uint32)
    y = x.copy()
    with np.errstate(over="ignore"):
        y ^= y >> np.uint32(16)
        y *= np.uint32(0x7FEB352D)
        y ^= y >> np.uint32(15)
        y *= np.uint32(0x846CA68B)
        y ^= y >> np.uint32(16)
    assert [mix(int(v)) for v in x] == y.tolist()
    assert hash_bits(torch.tensor(x.astype(np.int64))).tolist() == y.tolist()


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0, 1 + 2**-9, -3.14159, 1e-30, 1e-39, -1e-41, 3e38])
def test_rounding_is_to_a_neighbor_and_unbiased(value):
    draws = 100_000
    x = torch.full((draws,), value)
    rounded = round_to_bfloat16(x, 123).double()
    low, high = rounded.min().item(), rounded.max().item()
    exact = x[0].double().item()
    assert low <= exact <= high
    neighbors = {low, high}
    assert len(rounded.unique()) <= 2
    step = high - low
    share = (rounded == high).double().mean().item() if step else 1.0
    wanted = (exact - low) / step if step else 1.0
    assert abs(share - wanted) <= 4 * 0.5 / draws**0.5, neighbors


def test_draws_differ_by_step_and_parameter_and_repeat_by_seed():
    linear = LinearFilter(0.9, 1.0, 1.0, half=True)
    seeds = [seed for step in range(50) for seed in linear.seeds(step, 20)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)
    x = torch.full((1000,), 1 + 2**-9)
    assert torch.equal(round_to_bfloat16(x, seeds[0]), round_to_bfloat16(x, seeds[0]))
    assert not torch.equal(round_to_bfloat16(x, seeds[0]), round_to_bfloat16(x, seeds[1]))


def follow(config, gradients):
    parameter = nn.Parameter(torch.zeros(gradients[0].shape, dtype=gradients[0].dtype))
    optimizer, subject = torch.optim.SGD([parameter], 0.1), GradientFilter(config)
    for step, g in enumerate(gradients):
        parameter.grad = g.clone()
        subject.before_step(optimizer, [parameter], step)
        subject.after_step(optimizer, [parameter], step)
    return optimizer.state[parameter]["slow_gradient"], parameter.grad


@pytest.mark.parametrize("kernels", [True, False])
def test_a_bfloat16_average_follows_where_rounding_to_nearest_stalls(monkeypatch, kernels):
    """The gradient rises by 5%: with a decay of 0.98 each step moves the average by less than half a unit."""
    if not kernels:
        monkeypatch.setattr(native, "available", lambda: False)
    gradients = [torch.full((4000,), 1.0)] + [torch.full((4000,), 1.05)] * 300
    found, _ = follow(GrokfastConfig(average_dtype="bfloat16"), gradients)
    nearest = torch.ones(4000, dtype=torch.bfloat16)
    for g in gradients:
        nearest = nearest.float().lerp(g, 0.02).bfloat16()
    assert found.dtype == torch.bfloat16
    assert nearest.double().mean().item() == 1.0
    assert found.double().mean().item() == pytest.approx(1.05 - 0.05 * 0.98**300, abs=1e-3)


@pytest.mark.parametrize("kernels", [True, False])
def test_averages_of_short_gradients_are_float32(monkeypatch, kernels):
    if not kernels:
        monkeypatch.setattr(native, "available", lambda: False)
    gradients = [
        torch.ones(50, dtype=torch.bfloat16),
        *[torch.full((50,), 1.0625, dtype=torch.bfloat16)] * 100,
    ]
    average, grad = follow(GrokfastConfig(), gradients)
    assert average.dtype == torch.float32
    assert average[0].item() == pytest.approx(1.0625 - 0.0625 * 0.98**100, rel=1e-5)
    assert grad[0].item() == pytest.approx(1.0625 + 2 * average[0].item(), rel=2**-8)


@pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("size", [1, 16, 1000, 40_000])
def test_the_kernel_filters_as_torchs_operators_do(monkeypatch, half, size):
    linear = LinearFilter(0.9, 1.5, -0.5, half)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=generator), torch.randn(3, 5, generator=generator)]
    slow = [torch.randn(g.shape, generator=generator).to(linear.dtype(g)) for g in grads]
    results = []
    for kernels in (True, False):
        own = [g.clone() for g in grads], [s.clone() for s in slow]
        with monkeypatch.context() as patched:
            if not kernels:
                patched.setattr(native, "available", lambda: False)
            filter_linear_(*own, linear, linear.seeds(3, 2))
        results.append(own)
    for mine, theirs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(results[0][1], results[1][1], strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).abs().max() <= (2**-7 if half else 1e-6)
        assert not half or (mine == theirs).double().mean() > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_dtype": "int8"}, "use one of float32, bfloat16"),
        ({"average_dtype": "bfloat16", "filter": "ma"}, "use average_dtype='float32'"),
    ],
)
def test_bad_types_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GrokfastConfig(**options)
