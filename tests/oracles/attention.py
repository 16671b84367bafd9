"""Rotary positions, causal attention and the decoder, written out in float64 numpy."""

from __future__ import annotations

import numpy as np


def rope(x: np.ndarray, base: float = 10000.0) -> np.ndarray:
    """Rotate each pair (i, i + d/2) of x (..., length, d) by position * base**(-2i/d), one pair at a time."""
    x = np.asarray(x, dtype=np.float64)
    length, d = x.shape[-2:]
    out = np.empty_like(x)
    for position in range(length):
        for i in range(d // 2):
            angle = position * base ** (-2.0 * i / d)
            a, b = x[..., position, i], x[..., position, i + d // 2]
            out[..., position, i] = a * np.cos(angle) - b * np.sin(angle)
            out[..., position, i + d // 2] = a * np.sin(angle) + b * np.cos(angle)
    return out


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Softmax attention of q, k, v (length, d), each query over the keys up to its own position."""
    q, k, v = (np.asarray(a, dtype=np.float64) for a in (q, k, v))
    out = np.empty_like(v)
    for t in range(len(q)):
        scores = k[: t + 1] @ q[t] / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[t] = (weights / weights.sum()) @ v[: t + 1]
    return out


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def decoder(
    weights: dict[str, np.ndarray], tokens: np.ndarray, *, layers: int, heads: int, eps: float, base: float
) -> np.ndarray:
    """Next-token logits (length, vocabulary) of the float decoder for one sequence of token ids."""
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    x = w["embed_tokens.weight"][tokens]
    length, dim = x.shape
    d = dim // heads
    for n in range(layers):
        p = f"layers.{n}."
        h = rms_norm(x, w[p + "input_layernorm.weight"], eps)
        fused = w[p + "self_attn.qkv_proj.weight"]
        q, k, v = (h @ fused[i * dim : (i + 1) * dim].T for i in range(3))
        mixed = np.empty((length, dim))
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            mixed[:, part] = causal_attention(rope(q[:, part], base), rope(k[:, part], base), v[:, part])
        mixed = rms_norm(mixed, w[p + "self_attn.attn_sub_norm.weight"], eps)
        x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
        h = np.maximum(h @ w[p + "mlp.up_proj.weight"].T, 0.0) ** 2
        h = rms_norm(h, w[p + "mlp.ffn_sub_norm.weight"], eps)
        x = x + h @ w[p + "mlp.down_proj.weight"].T
    return rms_norm(x, w["norm.weight"], eps) @ w["head.weight"].T
