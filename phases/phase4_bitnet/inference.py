"""Inference with packed weights: a model that holds codes and scales, and no float latents.

:func:`pack_model` makes a copy of a trained model whose ternary layers keep four codes a byte in memory, a
sixteenth of float32. :func:`load_packed_model` reads one from a session. What the packed model computes is
what the model it was made from computes in evaluation mode, bit for bit.

A packed linear layer multiplies int8 activations by the packed codes (native/packed_linear.cpp). Layers
with float activations unpack their codes in each forward: small in memory, and no faster than float.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from phase4_bitnet import native
from phase4_bitnet.int8_matmul import MAX_INNER, int8_matmul
from phase4_bitnet.layers import (
    NORM_EPS,
    BitConv1d,
    BitConv2d,
    BitEmbedding,
    BitLinear,
    TernaryWeight,
    _autocast_dtype,
    ternary_layers,
)
from phase4_bitnet.packing import decode_2bit, pack_codes, pack_tiles, unpack_tiles
from phase4_bitnet.rms_norm import rms_norm
from phase4_bitnet.store import load_compressed_model, unwrap
from phase4_bitnet.ternary import quantize_rows, quantize_weight

_FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def pack_model(model: nn.Module) -> nn.Module:
    """Copy a model with its ternary layers packed: no latents, a sixteenth of the memory.

    Float layers are copied as they are, ternary ones become :class:`PackedBitLinear` and the like with the
    codes that the model would use in evaluation mode. ``model`` is left alone.

    Args:
        model: any module with ternary layers, in training or not; a compiled or DDP wrapper is opened.

    Returns:
        The packed copy on the same device, in eval mode, with no parameter that requires a gradient.

    Raises:
        ValueError: the model has no ternary layer, or one with a forward of its own.

    Example:
        >>> from phase4_bitnet import build_model
        >>> model = build_model("mlp", in_features=64, hidden=(128, 128), num_outputs=10).eval()
        >>> packed = pack_model(model)
        >>> packed.hidden[0]
        PackedBitLinear(in_features=64, out_features=128, bias=True, weight_bits=1.58, norm=False)
        >>> torch.equal(packed(torch.ones(1, 64)), model(torch.ones(1, 64)))
        True
    """
    return _pack(unwrap(model), evaluation_codes)


def load_packed_model(
    session_id: str | Path,
    *,
    root: str | Path | None = None,
    model: nn.Module | None = None,
) -> nn.Module:
    """Read a session that :func:`save_compressed_model` wrote as a packed model.

    The session may be with or without latents; one written with ``latents=False`` holds what a packed
    model needs and is the small one. While it is being read the latents are in memory.

    Args:
        session_id: name, or Path of the folder.
        root: where sessions live; None is the environment variable FORGE_SESSIONS, else "sessions".
        model: an instance to load into first, as for :func:`load_compressed_model`; it stays unpacked.

    Returns:
        The packed model on CPU (or where ``model`` is), as :func:`pack_model` returns it, with the codes
        that the session holds.

    Raises:
        FileNotFoundError: there is no such session.
        ValueError: as for :func:`load_compressed_model` and :func:`pack_model`.

    Example:
        >>> import tempfile
        >>> from phase4_bitnet import build_model, save_compressed_model
        >>> model = build_model("mlp", in_features=4, hidden=(8,), num_outputs=2).eval()
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = save_compressed_model(model, "my_run", root=root, latents=False)
        ...     packed = load_packed_model("my_run", root=root)
        >>> torch.equal(packed(torch.ones(1, 4)), model(torch.ones(1, 4)))
        True
    """
    # The buffers and not the latents: under stochastic rounding these are other codes.
    return _pack(load_compressed_model(session_id, root=root, model=model), lambda m: (m.codes, m.scale))


class PackedLayer(nn.Module):
    """What packed layers share: the packed codes, the scale, and that no gradient passes.

    Buffers: ``packed_codes`` uint8 in the layout of the layer, ``scale`` float32 of shape ().
    """

    packed_codes: Tensor
    scale: Tensor

    def init_packed(self, layer: TernaryWeight, packed_codes: Tensor, scale: Tensor) -> None:
        """Take over from ``layer`` what all kinds have; called once, after nn.Module has been set up."""
        self.weight_bits = layer.weight_bits
        self.weight_shape = layer.weight.shape
        self.weight_dtype = layer.weight.dtype
        self.register_buffer("packed_codes", packed_codes)
        self.register_buffer("scale", scale.detach().clone())
        bias = getattr(layer, "bias", None)
        copied = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", copied)

    @property
    def codes(self) -> Tensor:
        """The codes, unpacked: int8 in the shape of the weight."""
        return self._unpack()

    def _unpack(self) -> Tensor:
        return decode_2bit(self.packed_codes, math.prod(self.weight_shape[1:])).reshape(self.weight_shape)

    def ternary_weight(self) -> Tensor:
        """``codes * scale`` in the dtype that the latent had."""
        return self._unpack().to(self.weight_dtype) * self.scale.to(self.weight_dtype)

    def refuse_gradient(self, x: Tensor) -> None:
        """Raise where a gradient would have to pass; it would stop here in silence."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                f"{type(self).__name__} got an input that requires a gradient, and packed codes pass none; "
                "call the model under torch.no_grad(), or train the one that was packed"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scale = self.scale
        module = super()._apply(fn, recurse)
        # model.half() or .bfloat16() is about the dtype of the weight; bf16 would round the scale.
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return module


class PackedBitLinear(PackedLayer):
    """A :class:`BitLinear` for inference that keeps four codes a byte.

    ``packed_codes`` is (ceil(out / 16), ceil(in / 16), 64) uint8, the tiles of
    :func:`phase4_bitnet.packing.pack_tiles`; with ``activation_bits=None`` it is (out, ceil(in / 4)) and the
    weight is unpacked in each forward.

    Args:
        layer: the trained layer; it is not changed.
        codes: int8 (out_features, in_features) to pack; None are those it uses in evaluation mode.
        scale: float32 of shape (), given together with ``codes``.

    Shape:
        input (..., in_features), output (..., out_features); any leading shape, empty too.

    Raises:
        ValueError: in the forward, an input of other features.
        RuntimeError: in the forward, an input that requires a gradient while gradients are on.

    Example:
        >>> layer = BitLinear(100, 3, bias=False)
        >>> packed = PackedBitLinear(layer)
        >>> packed.packed_codes.shape, torch.equal(packed.codes, layer.codes)
        (torch.Size([1, 7, 64]), True)
    """

    bias: nn.Parameter | None

    def __init__(self, layer: BitLinear, codes: Tensor | None = None, scale: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.norm, self.activation_bits = layer.norm, layer.activation_bits
        if codes is None or scale is None:
            codes, scale = evaluation_codes(layer)
        self.init_packed(
            layer, pack_codes(codes) if self.activation_bits is None else pack_tiles(codes), scale
        )

    def _unpack(self) -> Tensor:
        if self.activation_bits is None:
            return super()._unpack()
        return unpack_tiles(self.packed_codes, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (..., in_features)."""
        self.refuse_gradient(x)
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"input of shape {tuple(x.shape)} has {x.shape[-1]} features, the layer "
                f"in_features={self.in_features}; pass (..., {self.in_features})"
            )
        if self.norm:
            x = rms_norm(x, None, NORM_EPS)
        if self.activation_bits is None:
            return F.linear(x, self.ternary_weight(), self.bias)
        # The name of a device and nn.Module's search for a buffer take a microsecond each, and a row of
        # this layer a few.
        on_cpu = x.is_cpu
        out_dtype = _autocast_dtype("cpu" if on_cpu else x.device.type) or x.dtype
        buffers, bias = self._buffers, self._parameters["bias"]
        if on_cpu and self.in_features <= MAX_INNER and native.available():
            wide = x if x.dtype is torch.float32 else x.float()
            fused = out_dtype is torch.float32 and (bias is None or bias.dtype is torch.float32)
            out = torch.ops.forge.packed_linear(
                wide, buffers["packed_codes"], buffers["scale"], bias if fused else None, self.out_features
            )
            if fused:
                return out
        else:
            rows, row_scale = quantize_rows(x.reshape(-1, self.in_features))
            out = int8_matmul(rows, self._unpack().t()).float().mul_(row_scale * self.scale)
            out = out.reshape(*x.shape[:-1], self.out_features)
        out = out.to(out_dtype)
        return out if bias is None else out + bias.to(out_dtype)

    def extra_repr(self) -> str:
        """The part of ``repr`` between the brackets."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight_bits={self.weight_bits}, norm={self.norm}"
        )


class _PackedWeightOnly(PackedLayer):
    """The part of a packed layer with float activations that follows the torch layer's constructor."""

    def take_over(self, layer: TernaryWeight, codes: Tensor | None, scale: Tensor | None) -> None:
        del self.weight
        if codes is None or scale is None:
            codes, scale = evaluation_codes(layer)
        # A row is all of an output channel: kernels of 1 or 3 weights would not fill their bytes.
        self.init_packed(layer, pack_codes(codes.flatten(1)), scale)


class PackedBitConv1d(_PackedWeightOnly, nn.Conv1d):
    """A :class:`BitConv1d` for inference: ``packed_codes`` (out, ceil(in / groups * kernel / 4)) uint8.

    Args:
        layer, codes, scale: as for :class:`PackedBitLinear`.
    """

    def __init__(self, layer: BitConv1d, codes: Tensor | None = None, scale: Tensor | None = None) -> None:
        super().__init__(**_convolution_options(layer))
        self.take_over(layer, codes, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (batch, channels, length)."""
        self.refuse_gradient(x)
        return self._conv_forward(x, self.ternary_weight(), self.bias)


class PackedBitConv2d(_PackedWeightOnly, nn.Conv2d):
    """A :class:`BitConv2d` for inference: ``packed_codes`` (out, ceil(in / groups * kernel / 4)) uint8.

    Args:
        layer, codes, scale: as for :class:`PackedBitLinear`.
    """

    def __init__(self, layer: BitConv2d, codes: Tensor | None = None, scale: Tensor | None = None) -> None:
        super().__init__(**_convolution_options(layer))
        self.take_over(layer, codes, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (batch, channels, height, width)."""
        self.refuse_gradient(x)
        return self._conv_forward(x, self.ternary_weight(), self.bias)


class PackedBitEmbedding(_PackedWeightOnly, nn.Embedding):
    """A :class:`BitEmbedding` for inference: ``packed_codes`` (entries, ceil(dim / 4)) uint8.

    Args:
        layer, codes, scale: as for :class:`PackedBitLinear`.
    """

    def __init__(self, layer: BitEmbedding, codes: Tensor | None = None, scale: Tensor | None = None) -> None:
        super().__init__(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        self.take_over(layer, codes, scale)

    def forward(self, index: Tensor) -> Tensor:
        """Look up ``index`` (integers of any shape)."""
        # Only the rows that are asked for are unpacked.
        codes = decode_2bit(F.embedding(index, self.packed_codes), self.embedding_dim)
        return codes.to(self.weight_dtype) * self.scale.to(self.weight_dtype)


# Which packed layer stands in for which ternary one.
_PACKED: dict[type[TernaryWeight], Callable[..., PackedLayer]] = {
    BitLinear: PackedBitLinear,
    BitConv1d: PackedBitConv1d,
    BitConv2d: PackedBitConv2d,
    BitEmbedding: PackedBitEmbedding,
}


def _pack(model: nn.Module, codes_of: Callable[[TernaryWeight], tuple[Tensor, Tensor]]) -> nn.Module:
    """Copy a model with packed layers in the place of ternary ones."""
    # What deepcopy finds here it takes for the copy, so the latents are never copied, and a layer that
    # occurs twice becomes one.
    copies: dict[int, Any] = {}
    layers = list(ternary_layers(model))
    for name, layer in layers:
        kind = next((k for k in _PACKED if isinstance(layer, k) and type(layer).forward is k.forward), None)
        if kind is None:
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__} with a forward of its own, which packing would "
                f"drop; make it one of {', '.join(k.__name__ for k in _PACKED)}"
            )
        copies[id(layer)] = _PACKED[kind](layer, *codes_of(layer))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no ternary layer to pack; convert it with convert_model_to_bitnet "
            "and train it"
        )
    for _, layer in layers:
        for hooks in _FORWARD_HOOKS:
            setattr(copies[id(layer)], hooks, copy.deepcopy(getattr(layer, hooks), copies))
    return copy.deepcopy(model, copies).eval().requires_grad_(False)


def evaluation_codes(layer: TernaryWeight) -> tuple[Tensor, Tensor]:
    """The codes and scale that the layer's forward uses in evaluation mode, whatever mode it is in."""
    if layer.codes_are_current:
        return layer.codes, layer.scale
    return quantize_weight(layer.weight, layer.weight_bits)


def _convolution_options(layer: nn.Conv1d | nn.Conv2d) -> dict[str, Any]:
    """Arguments that build a convolution like this one, on meta: its weight is not wanted."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(layer, name) for name in (*names, "padding_mode")} | {
        "bias": False,
        "device": "meta",
    }


# native/packed_linear.cpp has the body.
library.define(
    "forge::packed_linear",
    "(Tensor x, Tensor packed_codes, Tensor scale, Tensor? bias, int out_features) -> Tensor",
)


@library.register_fake("forge::packed_linear")
def _(x: Tensor, packed_codes: Tensor, scale: Tensor, bias: Tensor | None, out_features: int) -> Any:
    return x.new_empty((*x.shape[:-1], out_features))
