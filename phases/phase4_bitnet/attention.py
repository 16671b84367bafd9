"""Rotary positions and causal attention, as functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from phase4_bitnet import native
from phase4_bitnet.first_order import first_order_only
from phase4_bitnet.int8_linear import NATIVE_DTYPES

# Widest head that the native kernel takes; it works in vectors of 16.
NATIVE_HEAD_DIM = 256
# On CPU at most this many positions are attended by plain matmul and softmax; see `attention`.
PLAIN_ATTENTION_LENGTH = 16


def rope_table(length: int, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary position embedding.

    Computed in float64 and rounded once. Both halves of a head hold the same angles: the "rotate half"
    layout of Hugging Face's Llama, not the interleaved pairs of the paper.

    Args:
        length: number of positions.
        head_dim: width of one head, even.
        base: base of the frequencies, position * base**(-2i / head_dim).

    Returns:
        cos and sin, each (length, head_dim) float32.

    >>> [t.shape for t in rope_table(3, 4)]
    [torch.Size([3, 4]), torch.Size([3, 4])]

    Source: Su et al. 2021 (arXiv:2104.09864), equation 34.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by their position.

    Args:
        x: (batch, heads, length, head_dim) of any float dtype.
        cos: (length, head_dim) float32 from `rope_table`.
        sin: the same shape and dtype.

    Returns:
        The shape of `x`, float32: `attention` decides what precision to go on in.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first, second), dim=-1) * cos + torch.cat((-second, first), dim=-1) * sin


class _NativeAttention(torch.autograd.Function):
    """native/attention.cpp with its gradient."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out, log_sums = torch.ops.forge.causal_attention(qkv, cos, sin)
        ctx.save_for_backward(qkv, cos, sin, log_sums)
        return out

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Any) -> Any:
        return torch.ops.forge.causal_attention_backward(grads[0], *ctx.saved_tensors), None, None


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal self-attention with rotary positions, from the fused projection.

    On a CPU with native kernels one pass does the rotation, the attention and the change of layout, in
    float32; elsewhere :func:`apply_rope` and :func:`attention` do.

    Args:
        qkv: (batch, length, 3, heads, head_dim): queries, keys and values.
        cos: (length, head_dim) float32 from `rope_table`.
        sin: the same shape and dtype.

    Returns:
        (batch, length, heads * head_dim) in the dtype of `qkv`.

    Raises:
        ValueError: a projection of another shape, tables of another length or width.

    >>> cos, sin = rope_table(5, 4)
    >>> rotary_attention(torch.ones(2, 5, 3, 1, 4), cos, sin).shape
    torch.Size([2, 5, 4])
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"the projection has shape {tuple(qkv.shape)}; it takes (batch, length, 3, heads, head_dim), "
            "queries, keys and values: view the fused projection so"
        )
    batch, length, _, heads, head_dim = qkv.shape
    if cos.shape != (length, head_dim) or sin.shape != (length, head_dim):
        raise ValueError(
            f"the rotary tables have shapes {tuple(cos.shape)} and {tuple(sin.shape)}, the projection has "
            f"{length} positions of width {head_dim}; take rope_table({length}, {head_dim})"
        )
    if _use_native(qkv):
        return _NativeAttention.apply(qkv, cos.float(), sin.float())
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
    return out.transpose(1, 2).reshape(batch, length, heads * head_dim)


def _use_native(qkv: Tensor) -> bool:
    """Whether the native kernel takes this projection, and is worth it."""
    head_dim = qkv.shape[-1]
    return (
        qkv.device.type == "cpu"
        and qkv.dtype in NATIVE_DTYPES
        and head_dim % 16 == 0
        and head_dim <= NATIVE_HEAD_DIM
        and native.available()
    )


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention by whichever of torch's ways is faster.

    softmax(q k^T / sqrt(head_dim), keys after the query masked) v. On an accelerator it is
    F.scaled_dot_product_attention (SDPA). On CPU:

    * up to 16 positions, plain matmul and softmax;
    * longer, SDPA in float32 even under bf16 autocast, because its bf16 backward is slow.

    Forward and backward in ms, torch 2.13, 2 cores of an AVX-512 BF16 Xeon, compiled, medians of 11 taken in
    turn; last column: SDPA in the input's own precision over what the rule picks.

        (B, H, T, D)        float32: SDPA  plain   bf16: SDPA  plain  SDPA in float32   SDPA/rule f32, bf16
        (512, 4, 4, 32)              3.31   2.33         4.33   2.89             4.15   1.4   1.5
        (128, 4, 16, 32)             1.98   1.87         21.8   2.48             2.93   1.1   8.8
        (64, 4, 32, 32)              2.15   2.40         12.6   2.70             3.71   1.0   3.4
        (16, 4, 128, 32)             3.86   5.98         15.7   6.43             4.17   1.0   3.8
        (16, 6, 256, 64)             31.3   40.3         65.1   52.7             34.9   1.0   1.9
        (8, 6, 512, 64)              55.5    111          106    112             56.7   1.0   1.9

    Args:
        q: (batch, heads, length, head_dim); may be float32 while `v` is bf16.
        k: as q.
        v: the same shape, in the dtype wanted back.

    Returns:
        (batch, heads, length, head_dim) in the dtype of `v`.

    >>> attention(*torch.ones(3, 1, 1, 4, 2)).shape
    torch.Size([1, 1, 4, 2])
    """
    if v.device.type != "cpu":
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
    if v.shape[-2] <= PLAIN_ATTENTION_LENGTH:
        return plain_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    return out.to(v.dtype)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as two matrix products and a float32 softmax; shapes as for `attention`."""
    length = v.shape[-2]
    scores = (q * q.shape[-1] ** -0.5).to(v.dtype) @ k.to(v.dtype).transpose(-2, -1)
    later = torch.ones(length, length, dtype=torch.bool, device=v.device).triu(1)
    weights = scores.float().masked_fill(later, float("-inf")).softmax(dim=-1)
    return (weights.to(v.dtype) @ v).to(v.dtype)


# What the native kernel takes and, for torch.compile, the shapes that it returns.
library.define("forge::causal_attention", "(Tensor qkv, Tensor cos, Tensor sin) -> (Tensor, Tensor)")
library.define(
    "forge::causal_attention_backward",
    "(Tensor grad, Tensor qkv, Tensor cos, Tensor sin, Tensor log_sums) -> Tensor",
)


@library.register_fake("forge::causal_attention")
def _(qkv: Tensor, cos: Tensor, sin: Tensor) -> Any:
    batch, length, _, heads, head_dim = qkv.shape
    return qkv.new_empty((batch, length, heads * head_dim)), cos.new_empty((batch, heads, length))


@library.register_fake("forge::causal_attention_backward")
def _(grad: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, log_sums: Tensor) -> Any:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)
