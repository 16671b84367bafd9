"""Blocks of the reference decoders: attention, two kinds of MLP, norms, and the residual block.

A configuration chooses between BitNet's, with extra norms before `o_proj` and `down_proj` and a squared ReLU,
and, if `gated`, Llama's, with SwiGLU and no norm but the two in front.
"""

from __future__ import annotations

from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from phase4_bitnet.architecture_config import DecoderConfig, TernaryConfig
from phase4_bitnet.attention import rotary_attention
from phase4_bitnet.layers import BitLinear, normed_linear
from phase4_bitnet.rms_norm import RMSNorm


def hidden_linear(config: TernaryConfig, in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    """The hidden linear layer that a configuration asks for: a BitLinear, or its float twin."""
    if not config.ternary:
        return nn.Linear(in_features, out_features, bias)
    return BitLinear(
        in_features,
        out_features,
        bias,
        weight_bits=config.weight_bits,
        quantization_mode=config.quantization_mode,
        activation_bits=config.activation_bits,
        backward=cast(Literal["auto", "float32", "bf16", "int8"], config.backward),
    )


class Attention(nn.Module):
    """Rotary causal self-attention with a fused projection and, unless `gated`, a norm before `o_proj`.

    `qkv_proj.weight` is (3 * dim, dim): rows [0, dim) are q, [dim, 2 dim) k, [2 dim, 3 dim) v, each
    grouped by head as Hugging Face's q_proj, k_proj and v_proj are. To split it, chunk the weight (or the
    codes) in three along dim 0; the one scale belongs to each part.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv_proj = hidden_linear(config, config.dim, 3 * config.dim, bias=False)
        self.attn_sub_norm = None if config.gated else RMSNorm(config.dim, eps=config.norm_eps)
        self.o_proj = hidden_linear(config, config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend within norm(`x`) (batch, length, dim)."""
        batch, length, dim = x.shape
        qkv = normed_linear(x, norm, self.qkv_proj).view(batch, length, 3, self.heads, dim // self.heads)
        mixed = rotary_attention(qkv, cos, sin)
        if self.attn_sub_norm is None:
            return self.o_proj(mixed)
        return normed_linear(mixed, self.attn_sub_norm, self.o_proj)


class SquaredReluMLP(nn.Module):
    """Up, squared ReLU and BitNet's extra norm in one, down.

    Source: So et al. 2021, "Primer" (arXiv:2109.08668) for the activation; BitNet b1.58 2B4T
    (arXiv:2504.12285) for the activation and the norm's place. Ungated, unlike the latter.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.up_proj = hidden_linear(config, config.dim, config.mlp_width, bias=False)
        self.ffn_sub_norm = RMSNorm(config.mlp_width, eps=config.norm_eps, squared_relu=True)
        self.down_proj = hidden_linear(config, config.mlp_width, config.dim, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Apply the MLP to norm(`x`) (batch, length, dim)."""
        return normed_linear(normed_linear(x, norm, self.up_proj), self.ffn_sub_norm, self.down_proj)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate) * up).

    `gate_up_proj.weight` is (2 * mlp_width, dim): rows [0, mlp_width) are Hugging Face's gate_proj, the rest
    up_proj; the one scale belongs to both.

    Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202), equation 6.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = hidden_linear(config, config.dim, 2 * config.mlp_width, bias=False)
        self.down_proj = hidden_linear(config, config.mlp_width, config.dim, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Apply the MLP to norm(`x`) (batch, length, dim)."""
        gate, up = normed_linear(x, norm, self.gate_up_proj).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = GatedMLP(config) if config.gated else SquaredReluMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the block to `x` (batch, length, dim)."""
        x = x + self.self_attn(x, self.input_layernorm, cos, sin)
        return x + self.mlp(x, self.post_attention_layernorm)
