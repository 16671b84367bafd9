"""A copy of a model that computes the same with torch's own operators, for tracing.

Ternary layers lose their latents, and our attention its choice of kernels: both become modules that a graph
can be made of, for inputs of any length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase4_bitnet.attention import apply_rope
from phase4_bitnet.decoder_blocks import Attention
from phase4_bitnet.inference import evaluation_codes
from phase4_bitnet.layers import (
    NORM_EPS,
    BitConv1d,
    BitConv2d,
    BitEmbedding,
    BitLinear,
    TernaryWeight,
    ternary_layers,
)
from phase4_bitnet.packing import pack_codes
from phase4_bitnet.rms_norm import RMSNorm
from phase4_bitnet.ternary import INT8_MAX, SCALE_FLOOR

# (..., k) int8 and (n, k) int8 to their products, (..., n) float32.
Product = Callable[[Tensor, Tensor], Tensor]


def portable_model(model: nn.Module, product: Product, packed: bool) -> nn.Module:
    """Copy a model for tracing.

    Args:
        model: any module; it is left alone.
        product: of int8 rows and codes.
        packed: keep codes four a byte, and unpack them in each forward; False keeps them as int8.

    Returns:
        The copy on the CPU in float32, in evaluation mode, which returns one tensor.

    Raises:
        ValueError: a ternary layer has a forward of its own.
    """
    copies: dict[int, Any] = {}
    for name, layer in ternary_layers(model):
        kind = next((k for k in _KINDS if isinstance(layer, k) and type(layer).forward is k.forward), None)
        if kind is None:
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__} with a forward of its own, which the file would "
                f"drop; make it one of {', '.join(k.__name__ for k in _KINDS)}"
            )
        if isinstance(layer, BitLinear):
            copies[id(layer)] = _Linear(layer, packed, product)
        else:
            copies[id(layer)] = _WeightOnly(layer, packed, kind)
    for module in model.modules():
        if type(module) is RMSNorm:
            copies[id(module)] = _Norm(module)
    for module in model.modules():
        if type(module) is Attention:
            copies[id(module)] = _Attention(module, copies)
    twin = copy.deepcopy(model, copies).cpu().float().eval().requires_grad_(False)
    return _OneTensor(twin).eval()


class _OneTensor(nn.Module):
    """The model's tensor, or its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return getattr(out, "logits", out)


class _Codes(nn.Module):
    """The codes of a weight, and its scale."""

    codes: Tensor

    def __init__(self, layer: TernaryWeight, packed: bool) -> None:
        super().__init__()
        codes, scale = evaluation_codes(layer)
        self.shape, self.packed = tuple(codes.shape), packed
        rows = codes.detach().flatten(1)
        self.columns = rows.shape[1]
        self.register_buffer("codes", pack_codes(rows) if packed else rows.clone())
        self.scale = float(scale)

    def forward(self) -> Tensor:
        """The codes as (rows, columns) int8."""
        if not self.packed:
            return self.codes
        pairs = [(self.codes >> shift) & 3 for shift in (0, 2, 4, 6)]
        return (torch.stack(pairs, dim=-1).flatten(-2)[:, : self.columns]).to(torch.int8) - 1

    def weight(self) -> Tensor:
        """codes * scale in the weight's shape."""
        return self().float().reshape(self.shape) * self.scale


class _Linear(nn.Module):
    """BitLinear, with the arithmetic of `ternary.quantize_rows` written out."""

    weight: _Codes

    def __init__(self, layer: BitLinear, packed: bool, product: Product) -> None:
        super().__init__()
        self.weight = _Codes(layer, packed)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.norm, self.int8, self.product = layer.norm, layer.activation_bits == 8, product
        self.features = layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        if self.norm:
            x = F.rms_norm(x, (self.features,), eps=NORM_EPS)
        if not self.int8:
            return F.linear(x, self.weight.weight(), self.bias)
        largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=SCALE_FLOOR)
        rows = (x * (largest.reciprocal() * INT8_MAX)).round().to(torch.int8)
        # Scale by scale: onnxruntime takes the product of two scales for a scalar, and joins the bias to it
        # wrongly.
        out = self.product(rows, self.weight()) * self.weight.scale * (largest / INT8_MAX)
        return out if self.bias is None else out + self.bias


class _WeightOnly(nn.Module):
    """A convolution or embedding with ternary weights."""

    def __init__(self, layer: TernaryWeight, packed: bool, kind: type) -> None:
        super().__init__()
        self.codes = _Codes(layer, packed)
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        # The layer itself computes, from a weight that is handed in; it keeps none.
        self.layer = [copy.deepcopy(layer, {id(layer.weight): None, id(layer.codes): None})]
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer[0]
        if self.kind is BitEmbedding:
            return F.embedding(x, self.codes.weight(), layer.padding_idx)
        return layer._conv_forward(x, self.codes.weight(), self.bias)


class _Norm(nn.Module):
    """RMSNorm in torch's operators."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().clone())
        self.eps, self.squared_relu = norm.eps, norm.squared_relu

    def forward(self, x: Tensor) -> Tensor:
        if self.squared_relu:
            x = F.relu(x)
            x = x * x
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Attention(nn.Module):
    """The reference decoders' attention as one product, one softmax, one product."""

    qkv_proj: nn.Module
    attn_sub_norm: nn.Module
    o_proj: nn.Module

    def __init__(self, attention: Attention, copies: dict[int, Any]) -> None:
        super().__init__()
        self.heads = attention.heads
        for name in ("qkv_proj", "attn_sub_norm", "o_proj"):
            setattr(self, name, copy.deepcopy(getattr(attention, name) or nn.Identity(), copies))

    def forward(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv_proj(norm(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(
            apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, is_causal=True
        )
        return self.o_proj(self.attn_sub_norm(out.transpose(1, 2).reshape(batch, length, dim)))


_KINDS: tuple[type[TernaryWeight], ...] = (BitLinear, BitConv1d, BitConv2d, BitEmbedding)


def dynamic_dimensions(sample: Tensor, longest: int | None) -> tuple[dict[int, Any]]:
    """Which dimensions of the input may have any size: the rows, and the length of token ids.

    Args:
        sample: the input.
        longest: most tokens the model takes, None where there is no bound.
    """
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if not sample.is_floating_point() and sample.dim() == 2:
        free[1] = torch.export.Dim("length", min=2, max=longest)
    return (free,)
