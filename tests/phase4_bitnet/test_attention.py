"""Rotary positions and attention against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles.attention import causal_attention, rope
from phase4_bitnet.attention import PLAIN_ATTENTION_LENGTH, apply_rope, attention, plain_attention, rope_table


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
