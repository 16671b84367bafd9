import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import bitnet
from phase4_bitnet import native, ternary
from phase4_bitnet.ternary import quantize_rows, quantize_weight, requantize_, storable_scale


def random_weight(rows, columns, seed, spread=0.02):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.floats(1e-3, 10))
@settings(max_examples=60, deadline=None)
def test_ternary_codes_and_scale_follow_the_formula(rows, columns, seed, spread):
    weight = random_weight(rows, columns, seed, spread)
    codes, scale = quantize_weight(weight)
    expected, mean = bitnet.ternary(weight.numpy())
    # Elements within float32 rounding of a threshold may fall on either side.
    ratio = np.abs(weight.numpy().astype(np.float64)) / mean
    decided = np.abs(ratio - 0.5) > 1e-5
    assert np.array_equal(codes.numpy()[decided], expected[decided])
    assert codes.dtype == torch.int8
    assert scale.item() == pytest.approx(mean, rel=2**-11)


def test_binary_codes_have_no_zero_and_follow_the_sign():
    weight = torch.tensor([[0.5, -0.25, 0.0, 2.0]])
    codes, scale = quantize_weight(weight, weight_bits=1)
    assert codes.tolist() == [[1, -1, 1, 1]]
    assert scale.item() == pytest.approx(0.6875, rel=2**-11)


def test_scale_survives_storage_in_float16():
    for seed in range(20):
        _, scale = quantize_weight(random_weight(16, 16, seed))
        assert scale.half().float().item() == scale.item()


def test_scale_stays_finite_and_positive_at_the_extremes():
    assert storable_scale(torch.tensor(0.0)).item() > 0
    assert torch.isfinite(storable_scale(torch.tensor(1e9)))


def test_all_zero_weight_gives_zero_codes():
    codes, scale = quantize_weight(torch.zeros(3, 4))
    assert not codes.any()
    assert torch.isfinite(scale)


@pytest.mark.parametrize("value", [0.3, -0.7, 0.5, 0.0, 1.0, -1.0])
def test_stochastic_rounding_is_unbiased(value):
    draws = 100_000
    # mean |W| is 1 by construction: half the elements carry the value, the rest the complement.
    weight = torch.cat([torch.full((draws,), value), torch.full((draws,), 2 - abs(value))])
    codes, _ = quantize_weight(weight, mode="stochastic", generator=torch.Generator().manual_seed(0))
    mean = codes[:draws].double().mean().item()
    # Four standard errors of a Bernoulli of variance at most 1/4.
    assert abs(mean - value) <= 4 * 0.5 / draws**0.5


def test_stochastic_binary_is_unbiased():
    draws = 100_000
    weight = torch.cat([torch.full((draws,), 0.4), torch.full((draws,), 1.6)])
    codes, _ = quantize_weight(weight, 1, "stochastic", torch.Generator().manual_seed(1))
    assert set(codes.unique().tolist()) == {-1, 1}
    assert abs(codes[:draws].double().mean().item() - 0.4) <= 4 / draws**0.5


@pytest.mark.parametrize("bits", [1.58, 1])
def test_one_pass_over_many_layers_equals_one_by_one(bits):
    weights = [random_weight(5, 7, 0), random_weight(9, 3, 1), torch.zeros(2, 2), random_weight(1, 1, 2)]
    codes = [torch.zeros_like(w, dtype=torch.int8) for w in weights]
    scales = [torch.zeros(()) for _ in weights]
    requantize_(weights, codes, scales, bits)
    for w, c, s in zip(weights, codes, scales, strict=True):
        expected_codes, expected_scale = quantize_weight(w, bits)
        assert torch.equal(c, expected_codes)
        assert s.item() == pytest.approx(expected_scale.item(), rel=2**-10)


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 2**31), st.floats(1e-2, 1e3))
@settings(max_examples=60, deadline=None)
def test_rows_follow_the_formula(rows, columns, seed, spread):
    x = random_weight(rows, columns, seed, spread)
    q, scale = quantize_rows(x)
    expected, expected_scale = bitnet.int8_rows(x.numpy())
    exact = x.numpy().astype(np.float64) / expected_scale
    decided = np.abs(np.abs(exact - np.floor(exact)) - 0.5) > 1e-4
    assert np.array_equal(q.numpy()[decided], expected[decided])
    np.testing.assert_allclose(scale.numpy(), expected_scale, rtol=1e-6)
    assert q.abs().max() <= 127


def test_rows_of_zero_columns_and_zero_rows():
    assert quantize_rows(torch.zeros(3, 0))[0].shape == (3, 0)
    assert quantize_rows(torch.zeros(0, 3))[0].shape == (0, 3)


def test_scale_of_a_large_matrix_is_right_and_the_same_on_both_paths():
    """torch's CPU 1-norm is 1.5% off at this size."""
    weight = random_weight(4096, 4096, 0)
    mean = weight.double().abs().mean().item()
    codes, scales = [torch.zeros_like(weight, dtype=torch.int8)], [torch.zeros(())]
    requantize_([weight], codes, scales)
    one, scale = quantize_weight(weight)
    assert scales[0].item() == scale.item() == pytest.approx(mean, rel=2**-11)
    assert torch.equal(codes[0], one)


def test_tiny_rows_keep_their_size_with_a_floor_of_their_own():
    x = torch.tensor([[1e-9, -2e-9]])
    q, scale = quantize_rows(x, floor=torch.finfo(torch.float32).tiny)
    assert q.tolist() == [[64, -127]]
    torch.testing.assert_close(q * scale, x, rtol=1e-2, atol=0)


@pytest.fixture
def torch_only(monkeypatch):
    """Return a function that runs another one with torch's operators in place of the kernels."""

    def run(function, *args):
        with monkeypatch.context() as patched:
            patched.setattr(ternary.native, "available", lambda: False)
            return function(*args)

    return run


@pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")
@pytest.mark.parametrize("bits", [1.58, 1])
@pytest.mark.parametrize("shape", [(0,), (1,), (15,), (17, 31), (129, 127), (300, 301)])
def test_the_kernel_gives_the_bits_of_torchs_operators(torch_only, bits, shape):
    for seed, spread in enumerate((0.02, 1e-7, 3e4)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
        weight.view(-1)[::3] *= -0.0  # signed zeros
        codes, scale = quantize_weight(weight, bits)
        wanted_codes, wanted_scale = torch_only(quantize_weight, weight, bits)
        assert torch.equal(codes, wanted_codes)
        assert torch.equal(scale, wanted_scale)


@pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")
def test_latents_around_the_threshold_fall_as_the_division_says(torch_only):
    """Neighbors of mean / 2 in float32, on both sides; the two large elements keep the mean at 1."""
    near = np.float32(0.5) + np.arange(-3, 4) * np.float32(2**-25)
    near = np.concatenate([near, np.nextafter(np.float32(0.5), np.float32([0, 1]))])
    for mean in np.float32([1.0, 0.7, 3e-3]):
        values = torch.tensor(np.concatenate([near, -near]) * mean)
        rest = torch.full((2,), (mean * 20 - values.abs().sum().item()) / 2)
        weight = torch.cat([values, rest])
        assert torch.equal(quantize_weight(weight)[0], torch_only(quantize_weight, weight)[0])


@pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")
@pytest.mark.parametrize("factor", [0.0, float("nan"), 0.9, 0.999, 1.0, 1.001, 1.1])
def test_the_old_scale_decides_nothing(factor):
    """It is a guess of the new one, good or bad."""
    weights = [random_weight(150, 310, 5), torch.full((70, 9), 0.5), random_weight(8, 8, 6)]
    # A block of the kernel whose latents all sit near the threshold, more than it takes notes of.
    crowd = 0.5 + torch.randn(20_000, generator=torch.Generator().manual_seed(7)) * 1e-4
    weights.append(torch.cat([crowd, torch.full((20_000,), 1.5)]))
    expected = [quantize_weight(w) for w in weights]
    codes = [torch.full_like(w, 7, dtype=torch.int8) for w in weights]
    scales = [s * factor for _, s in expected]
    requantize_(weights, codes, scales)
    for c, s, (wanted, scale) in zip(codes, scales, expected, strict=True):
        assert torch.equal(c, wanted)
        assert torch.equal(s, scale)


def test_the_mean_does_not_depend_on_the_threads():
    weight = random_weight(700, 701, 9)
    alone = quantize_weight(weight)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = quantize_weight(weight)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, several, strict=True))


def test_the_scale_is_rounded_to_float16_compiled_and_not():
    generator = torch.Generator().manual_seed(0)
    x = 10 ** (torch.rand(20000, generator=generator) * 12 - 6)
    ties = (torch.arange(1, 3000) + 0.5) * 2.0**-24
    x = torch.cat([x, ties, torch.tensor([0.0, 1e-5, 6.1e-5, 65504.0, 65519.0, 1e9])])
    want = x.clamp(1e-5, 65504).numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(storable_scale(x).numpy(), want)
    compiled = torch.compile(storable_scale, fullgraph=True)
    np.testing.assert_array_equal(compiled(x).numpy(), want)
    assert storable_scale(torch.tensor(float("nan"))).isnan()
