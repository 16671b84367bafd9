"""Rotary positions and attention against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles.attention import causal_attention, rope
from phase4_bitnet import native
from phase4_bitnet.attention import (
    PLAIN_ATTENTION_LENGTH,
    apply_rope,
    attention,
    plain_attention,
    rope_table,
    rotary_attention,
)


def qkv(length: int, *, batch: int = 2, heads: int = 3, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(batch, heads, length, width, generator=generator) * 2 for _ in range(3)]


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> np.ndarray:
    batch, heads = v.shape[:2]
    out = np.empty(tuple(v.shape))
    for b in range(batch):
        for h in range(heads):
            out[b, h] = causal_attention(*(a[b, h].double().detach().numpy() for a in (q, k, v)))
    return out


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_rope_matches_the_oracle(base: float) -> None:
    x = torch.randn(2, 3, 11, 8, generator=torch.Generator().manual_seed(0))
    ours = apply_rope(x, *rope_table(11, 8, base))
    np.testing.assert_allclose(ours.numpy(), rope(x.numpy(), base), atol=1e-5)


def test_rope_is_the_rotate_half_of_llama() -> None:
    """With the angles of transformers' LlamaRotaryEmbedding, written as it writes them."""
    x = torch.randn(1, 2, 9, 6, generator=torch.Generator().manual_seed(1))
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, 6, 2, dtype=torch.float) / 6))
    freqs = torch.outer(torch.arange(9).float(), inv_freq)
    emb = torch.cat((freqs, freqs), dim=-1)
    rotated = torch.cat((-x[..., 3:], x[..., :3]), dim=-1)
    llama = x * emb.cos() + rotated * emb.sin()
    torch.testing.assert_close(apply_rope(x, *rope_table(9, 6)), llama, atol=1e-5, rtol=1e-5)


def test_rope_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(2)).unbind(0)
    table = rope_table(20, 8)
    at = lambda x, p: apply_rope(x, table[0][p : p + 1], table[1][p : p + 1])  # noqa: E731
    near = (at(q, 5) * at(k, 2)).sum()
    far = (at(q, 17) * at(k, 14)).sum()
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 4, PLAIN_ATTENTION_LENGTH, PLAIN_ATTENTION_LENGTH + 1, 40])
@pytest.mark.parametrize("way", [attention, plain_attention])
def test_attention_matches_the_oracle(way: object, length: int) -> None:
    q, k, v = qkv(length)
    np.testing.assert_allclose(way(q, k, v).numpy(), expected(q, k, v), atol=1e-5)  # type: ignore[operator]


@pytest.mark.parametrize("length", [4, 40])
def test_both_ways_have_the_same_gradients(length: int) -> None:
    gradients = []
    for way in (attention, plain_attention):
        parts = [x.requires_grad_() for x in qkv(length)]
        way(*parts).square().sum().backward()
        gradients.append([x.grad for x in parts])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [4, 40])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_values_come_back_in_bf16(length: int, autocast: bool) -> None:
    q, k, v = qkv(length)
    half = v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(q, k, half)
    assert out.dtype == torch.bfloat16
    np.testing.assert_allclose(out.float().numpy(), expected(q, k, half), atol=0.06)


needs_native = pytest.mark.skipif(not native.available(), reason="no native kernels on this machine")


def fused(length: int, width: int, *, batch: int = 2, heads: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length + width)
    return torch.randn(batch, length, 3, heads, width, generator=generator) * 2


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """Rotary attention of a fused projection by the formula, in float64 and with torch's own gradient."""
    x = x.double()
    batch, length, _, heads, width = x.shape
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(
        torch.ones(()).double(), torch.outer(torch.arange(length).double(), frequencies)[:, None]
    )
    pairs = torch.complex(x[..., : width // 2], x[..., width // 2 :])
    q, k = (pairs[:, :, i] * turn for i in range(2))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.conj()).real / width**0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, x[:, :, 2]).reshape(batch, length, heads * width)


@pytest.fixture(params=["native", "torch"])
def implementation(request, monkeypatch):
    if request.param == "native" and not native.available():
        pytest.skip("no native kernels on this machine")
    if request.param == "torch":
        monkeypatch.setattr("phase4_bitnet.attention.native.available", lambda: False)
    return request.param


@pytest.mark.parametrize(
    ("length", "width"),
    [
        (1, 16),
        (2, 48),
        (4, 8),
        (4, 32),
        (15, 16),
        (16, 64),
        (17, 16),
        (33, 48),
        (100, 64),
        (257, 80),
        (40, 24),
    ],
)
def test_rotary_attention_and_its_gradient_match_float64(implementation, length: int, width: int) -> None:
    x = fused(length, width)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    grad = torch.randn(2, length, 3 * width, generator=torch.Generator().manual_seed(1))
    out, want = rotary_attention(ours, *rope_table(length, width)), in_float64(theirs)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=1e-5)
    out.backward(grad)
    want.backward(grad.double())
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)


@needs_native
@pytest.mark.parametrize(("batch", "heads"), [(7, 3), (1, 1), (16, 1), (5, 16)])
def test_few_positions_of_any_number_of_heads(batch: int, heads: int) -> None:
    """16 (sample, head) pairs share a vector: less than one vector, whole ones, and some left over."""
    x = fused(4, 16, batch=batch, heads=heads)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    out, want = rotary_attention(ours, *rope_table(4, 16)), in_float64(theirs)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=1e-5)
    (out**2).sum().backward()
    (want**2).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)


def test_large_scores_do_not_overflow(implementation) -> None:
    x = fused(40, 16) * 100
    want = in_float64(x)
    torch.testing.assert_close(rotary_attention(x, *rope_table(40, 16)).double(), want, atol=0.05, rtol=1e-3)


@pytest.mark.parametrize("length", [40, 14])
def test_a_bad_number_reaches_those_who_see_it_and_no_others(implementation, length: int) -> None:
    x, first = fused(length, 16), length // 2
    x[0, first, 1, 1, 3] = float("nan")
    out = rotary_attention(x, *rope_table(length, 16)).view(2, length, 3, 16)
    assert out[0, first:, 1].isnan().all()
    assert not out[0, :first].isnan().any()
    assert not out[0, :, [0, 2]].isnan().any()
    assert not out[1].isnan().any()


def test_tables_of_another_length_are_refused(implementation) -> None:
    for tables in (rope_table(39, 16), rope_table(41, 16), rope_table(40, 32)):
        with pytest.raises(ValueError, match=r"take rope_table\(40, 16\)"):
            rotary_attention(fused(40, 16), *tables)


@pytest.mark.parametrize("shape", [(2, 40, 2, 1, 16), (2, 40, 4, 1, 16), (2, 40, 48)])
def test_a_projection_of_another_shape_is_refused(implementation, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(batch, length, 3, heads, head_dim\)"):
        rotary_attention(torch.ones(shape), *rope_table(40, 16))


@pytest.mark.parametrize("length", [4, 40])
@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0)])
def test_nothing_to_attend_gives_nothing(implementation, length: int, batch: int, heads: int) -> None:
    x = torch.ones(batch, length, 3, heads, 16, requires_grad=True)
    out = rotary_attention(x, *rope_table(length, 16))
    out.sum().backward()
    assert out.shape == (batch, length, heads * 16)
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("length", [4, 40])
def test_a_projection_may_lie_in_memory_in_any_order(implementation, length: int) -> None:
    x = fused(length, 32, batch=4)[::2, ..., ::2].transpose(1, 3).clone().transpose(1, 3)
    ours, theirs = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    slope = torch.arange(1.0, 3.0)[:, None, None].expand(2, length, 48)
    out, want = rotary_attention(ours, *rope_table(length, 16)), in_float64(theirs)
    out.backward(slope)
    want.backward(slope.double())
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)


def test_rotary_attention_of_bf16_comes_back_in_bf16(implementation) -> None:
    x = fused(40, 16).bfloat16()
    out = rotary_attention(x, *rope_table(40, 16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), in_float64(x.float()), atol=0.06, rtol=0.02)


@pytest.mark.parametrize(("length", "width"), [(4, 32), (17, 16), (33, 48), (100, 64)])
def test_the_gradient_of_bf16_is_within_its_rounding(implementation, length: int, width: int) -> None:
    x = fused(length, width).bfloat16()
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    grad = torch.randn(2, length, 3 * width, generator=torch.Generator().manual_seed(1)).bfloat16()
    rotary_attention(ours, *rope_table(length, width)).backward(grad)
    in_float64(theirs).backward(grad.double())
    assert ours.grad.dtype == torch.bfloat16
    # Rounding the result: 2**-9 of each value. The output is kept in bf16 for backward: 2**-9 of a sum.
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=2e-2, rtol=2e-2)


@needs_native
@pytest.mark.parametrize("length", [5, 100])
def test_native_bf16_is_the_float32_result_rounded_once(length: int) -> None:
    x, tables = fused(length, 48).bfloat16(), rope_table(length, 48)
    assert torch.equal(rotary_attention(x, *tables), rotary_attention(x.float(), *tables).bfloat16())


def test_the_native_kernel_is_used_and_compiles_without_a_break() -> None:
    if not native.available():
        pytest.skip("no native kernels on this machine")
    x, tables = fused(40, 16).requires_grad_(), rope_table(40, 16)
    out = rotary_attention(x, *tables)
    assert "NativeAttention" in type(out.grad_fn.next_functions[0][0] or out.grad_fn).__name__ + repr(
        out.grad_fn
    )
    out.square().sum().backward()
    grad, x.grad = x.grad, None
    compiled = torch.compile(rotary_attention, fullgraph=True)(x, *tables)
    assert torch.equal(compiled, out)
    compiled.square().sum().backward()
    assert torch.equal(x.grad, grad)
