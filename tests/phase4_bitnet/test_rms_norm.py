"""RMSNorm and what it is joined with, against float64 and against torch's own operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oracles.attention import rms_norm as exact_rms_norm
from phase4_bitnet import BitLinear, native
from phase4_bitnet import rms_norm as module
from phase4_bitnet.layers import normed_linear
from phase4_bitnet.rms_norm import RMSNorm, rms_norm

EPS = 1e-5
needs_native = pytest.mark.skipif(not native.available(), reason="no native kernels here")


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(module, "native_rms_norm", lambda *_: False)
    elif not native.available():
        pytest.skip("no native kernels here")
    return str(request.param)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(
    x: torch.Tensor, gain: torch.Tensor | None, slope: torch.Tensor, squared_relu: bool
) -> tuple[torch.Tensor, ...]:
    """Output and gradients of the formula in float64, by torch's elementary operators."""
    x = x.double().detach().requires_grad_()
    wide = None if gain is None else gain.double().detach().requires_grad_()
    value = x.clamp(min=0) ** 2 if squared_relu else x
    out = value / (value.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    out = out if wide is None else out * wide
    out.backward(slope.double())
    return (out.detach(), x.grad) if wide is None else (out.detach(), x.grad, wide.grad)  # type: ignore[return-value]


@pytest.mark.parametrize("width", [1, 7, 16, 100, 512])
@pytest.mark.parametrize("squared_relu", [False, True])
@pytest.mark.parametrize("with_gain", [False, True])
def test_value_and_gradients_are_those_of_float64(
    way: str, width: int, squared_relu: bool, with_gain: bool
) -> None:
    x, slope = draw(3, 71, width).requires_grad_(), draw(3, 71, width, seed=1)
    gain = draw(width, seed=2).requires_grad_() if with_gain else None
    out = rms_norm(x, gain, EPS, squared_relu=squared_relu)
    out.backward(slope)
    ours = (out, x.grad, *(() if gain is None else (gain.grad,)))
    for own, exact in zip(ours, gradients(x, gain, slope, squared_relu), strict=True):
        torch.testing.assert_close(own.double(), exact, atol=2e-5, rtol=2e-5)


def test_value_is_that_of_the_numpy_oracle(way: str) -> None:
    x, gain = draw(5, 40), draw(40, seed=1)
    np.testing.assert_allclose(
        rms_norm(x, gain, EPS), exact_rms_norm(x.double().numpy(), gain.double().numpy(), EPS), atol=1e-5
    )


def test_bf16_is_normalized_in_float32(way: str) -> None:
    x, gain = draw(9, 33).bfloat16().requires_grad_(), draw(33, seed=1).requires_grad_()
    out = rms_norm(x, gain, EPS)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    exact, slope, _ = gradients(x, gain, torch.ones(9, 33), False)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), slope, atol=1e-3, rtol=2**-8)


def test_nan_and_infinity_are_not_hidden(way: str) -> None:
    x = torch.ones(3, 20)
    x[0, 3], x[1, 3] = float("nan"), float("-inf")
    for squared_relu in (False, True):
        out = rms_norm(x, torch.ones(20), EPS, squared_relu=squared_relu)
        assert out[0].isnan().all()
        assert not out[2].isnan().any()
    assert rms_norm(x, None, EPS)[1].isnan().any()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_give_no_rows(way: str, shape: tuple[int, ...]) -> None:
    assert rms_norm(torch.ones(shape), torch.ones(8), EPS).shape == shape


@needs_native
def test_the_gain_s_gradient_does_not_depend_on_the_threads() -> None:
    x, gain = draw(1000, 48), draw(48, seed=1).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(rms_norm(x, gain, EPS).sin().sum(), gain)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@needs_native
@pytest.mark.parametrize("squared_relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 130])
def test_joined_with_the_linear_it_has_the_bits_of_the_two(
    squared_relu: bool, dtype: torch.dtype, width: int
) -> None:
    norm, linear = RMSNorm(width, eps=EPS, squared_relu=squared_relu), BitLinear(width, 40)
    with torch.no_grad():
        norm.weight.copy_(draw(width, seed=3))
    found = []
    for apart in (False, True):
        x = draw(6, 11, width).to(dtype).requires_grad_()
        out = linear(norm(x)) if apart else normed_linear(x, norm, linear).float()
        out.backward(draw(6, 11, 40, seed=4))
        assert x.grad is not None
        assert norm.weight.grad is not None
        found.append((out.detach(), x.grad, norm.weight.grad, linear.weight.grad))
        for parameter in (*norm.parameters(), *linear.parameters()):
            parameter.grad = None
    if dtype == torch.float32:
        for own, other in zip(*found, strict=True):
            assert torch.equal(own, other)
    else:  # the output is rounded to bf16, and so is the gradient between the two
        torch.testing.assert_close(found[0][0], found[1][0], atol=2**-8 * 20, rtol=2**-8)
        torch.testing.assert_close(found[0][1].float(), found[1][1].float(), atol=0.05, rtol=0.05)


@needs_native
def test_only_the_gain_is_trained() -> None:
    norm, linear = RMSNorm(16, eps=EPS), BitLinear(16, 8).requires_grad_(False)
    x = draw(4, 16)
    normed_linear(x, norm, linear).sum().backward()
    joined = norm.weight.grad
    norm.weight.grad = None
    linear(norm(x)).sum().backward()
    assert joined is not None
    assert norm.weight.grad is not None
    assert torch.equal(joined, norm.weight.grad)


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward pre"])
def test_hooks_on_the_norm_are_called(kind: str) -> None:
    norm, called = RMSNorm(16, eps=EPS), []
    add = {
        "forward": norm.register_forward_hook,
        "pre": norm.register_forward_pre_hook,
        "backward": norm.register_full_backward_hook,
        "backward pre": norm.register_full_backward_pre_hook,
    }[kind]
    add(lambda *_: called.append(kind))
    normed_linear(draw(4, 16).requires_grad_(), norm, BitLinear(16, 8)).sum().backward()
    assert called == [kind]


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_on_the_linear_see_its_input_and_may_replace_it(kind: str) -> None:
    norm, linear, x = RMSNorm(16, eps=EPS), BitLinear(16, 8), 100 * draw(4, 16)
    want, seen = linear(norm(x)), []
    if kind == "pre":  # what it returns stands for all of the arguments
        linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]) or (args[0],))
    else:
        linear.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    assert torch.equal(normed_linear(x, norm, linear), want)
    assert len(seen) == 1
    assert torch.equal(seen[0], norm(x))


def test_a_backward_hook_on_the_linear_sees_the_gradient_of_its_input() -> None:
    norm, linear, x, seen = RMSNorm(16, eps=EPS), BitLinear(16, 8), 100 * draw(4, 16), []
    normed = norm(x).detach().requires_grad_()
    linear(normed).sum().backward()
    linear.register_full_backward_hook(lambda module, given, _: seen.append(given[0]))
    normed_linear(x.requires_grad_(), norm, linear).sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], normed.grad)


def test_a_layer_with_a_forward_of_its_own_gets_what_it_takes() -> None:
    class Doubled(BitLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return 2 * super().forward(x)

    norm, linear, x = RMSNorm(16, eps=EPS), Doubled(16, 8), draw(4, 16)
    assert torch.equal(normed_linear(x, norm, linear), linear(norm(x)))


@pytest.mark.parametrize("gain", [draw(40, seed=1)[::2], draw(1, seed=1).expand(20)])
def test_a_gain_and_an_input_may_lie_in_memory_in_any_order(way: str, gain: torch.Tensor) -> None:
    x, slope = draw(20, 6).t().requires_grad_(), draw(1, seed=3).expand(6, 20)
    gain = gain.detach().requires_grad_()
    out = rms_norm(x, gain, EPS)
    found = torch.autograd.grad(out, (x, gain), slope)
    for own, exact in zip((out, *found), gradients(x, gain, slope, False), strict=True):
        torch.testing.assert_close(own.double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("width", [4, 16])
def test_a_gain_of_another_width_is_refused(way: str, width: int) -> None:
    with pytest.raises(ValueError, match="make the norm for a width of 8"):
        rms_norm(draw(3, 8), torch.ones(width), EPS)
    with pytest.raises(ValueError, match="make the norm for a width of 8"):
        normed_linear(draw(3, 8), RMSNorm(width, eps=EPS), BitLinear(8, 4))


@needs_native
def test_the_kernels_read_no_further_than_the_gain() -> None:
    x, inverse, short = draw(3, 8), torch.ones(3), torch.ones(4)
    kernels = torch.ops.forge
    for call in (
        lambda: kernels.rms_norm(x, short, EPS, False, torch.float32),
        lambda: kernels.rms_norm_quantize(x, short, EPS, False, EPS),
        lambda: kernels.rms_norm_backward(x, x, short, inverse, False),
    ):
        with pytest.raises(RuntimeError, match="the gain has 4 elements and a row 8"):
            call()


def test_another_linear_is_called_as_it_is() -> None:
    norm, linear, x = RMSNorm(16, eps=EPS), torch.nn.Linear(16, 8), draw(4, 16)
    assert torch.equal(normed_linear(x, norm, linear), F.linear(norm(x), linear.weight, linear.bias))


@needs_native
def test_compiled_has_the_eager_bits() -> None:
    norm, linear, x = RMSNorm(32, eps=EPS, squared_relu=True), BitLinear(32, 16), draw(64, 32)
    compiled = torch.compile(lambda value: normed_linear(value, norm, linear), fullgraph=True)
    assert torch.equal(compiled(x), normed_linear(x, norm, linear))
