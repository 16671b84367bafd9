"""Layers whose weight is a float latent used through its ternary codes, and the model converter.

The latent (``weight``) is the parameter that the optimizer moves. ``codes`` and ``scale`` are derived
from it and everything downstream uses them: the training forward, validation, packing and export.
Who derives them, and when:

* A layer on its own derives them in every forward, so it is right in anybody's training loop. With
  stochastic rounding it draws in training mode and rounds to nearest in evaluation and in state_dict.
* Under :class:`phase5_training.BitNetOptimizer` they are derived once per optimizer step, for all
  layers together, and the forward only reads them (``codes_are_current`` is True).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase4_bitnet.first_order import first_order_only
from phase4_bitnet.int8_linear import int8_linear, int8_linear_backward, int8_pays, quantize_input
from phase4_bitnet.rms_norm import RMSNorm, native_rms_norm, rms_norm
from phase4_bitnet.sharding import GatheredCodes, int8_codes
from phase4_bitnet.ternary import SCALE_FLOOR, QuantizationMode, quantize_weight, requantize_

Backward = Literal["auto", "float32", "bf16", "int8"]
NORM_EPS = 1e-5


class _StraightThrough(torch.autograd.Function):
    """``codes * scale`` in the forward; the latent receives the gradient unchanged (STE)."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return int8_codes(codes, latent.shape).to(latent.dtype) * scale.to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


class _Int8Linear(torch.autograd.Function):
    """``y = int8(norm(x)) @ codes.T`` with int32 accumulation; straight-through gradients.

    Bengio et al. 2013 (arXiv:1308.3432): both roundings count as identity, so with x̂ the
    dequantized input and Ŵ = codes * scale, ``dx = dy @ Ŵ`` and ``dW = dy.T @ x̂``. The int8 input is
    kept for backward, a quarter of the float one. A norm before it, where there is one, is joined with the
    rounding (native/rms_norm.cpp): what it gives is never written in float.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        latent: Tensor,
        codes: Tensor,
        scale: Tensor,
        out_dtype: torch.dtype,
        backward: str,
        norm: RMSNorm | None,
        gain: Tensor | None,
    ) -> Tensor:
        if norm is None:
            rows, row_scale = quantize_input(x)
            ctx.save_for_backward(rows, row_scale, codes, scale)
        else:
            rows, row_scale, inverse = torch.ops.forge.rms_norm_quantize(
                x, gain, norm.eps, norm.squared_relu, SCALE_FLOOR
            )
            ctx.save_for_backward(rows, row_scale, codes, scale, x, gain, inverse)
        ctx.norm = norm
        ctx.x_dtype, ctx.latent_dtype = x.dtype, latent.dtype
        ctx.how = "int8" if backward == "auto" and int8_pays(x) else backward
        return int8_linear(rows, row_scale, int8_codes(codes, latent.shape), scale, out_dtype)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        rows, row_scale, codes, scale, *of_norm = ctx.saved_tensors
        codes = int8_codes(codes, (grad.shape[1], rows.shape[1]))
        grad_x = grad_latent = grad_gain = None
        want_input, want_weight = ctx.needs_input_grad[0] or ctx.needs_input_grad[7], ctx.needs_input_grad[1]
        if ctx.how == "int8":
            grad_x, grad_latent = int8_linear_backward(
                grad, rows, row_scale, codes, scale, want_input, want_weight
            )
        else:
            # "auto" that is not int8 follows the dtype of the forward: bf16 under autocast, else float32.
            dtype = {"bf16": torch.bfloat16, "float32": torch.float32}.get(ctx.how, grad.dtype)
            grad = grad.to(dtype)
            # torch.compile runs backward under the autocast of the forward, which would choose for us.
            with torch.autocast(grad.device.type, enabled=False):
                if want_input:
                    # The scale is applied in float32: in bf16 it would be off by up to 0.4% each time.
                    grad_x = (grad @ codes.to(dtype)).float().mul_(scale)
                if want_weight:
                    grad_latent = grad.t() @ rows.float().mul_(row_scale).to(dtype)
        if grad_x is not None and ctx.norm is not None:
            grad_x, grad_gain = torch.ops.forge.rms_norm_backward(grad_x, *of_norm, ctx.norm.squared_relu)
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype)
        if grad_latent is not None:
            grad_latent = grad_latent.to(ctx.latent_dtype)
        return grad_x, grad_latent, None, None, None, None, None, grad_gain


class TernaryWeight(nn.Module):
    """Mixed into a torch layer with a ``weight``: owns the codes, the scale and how they are saved."""

    weight: Tensor
    codes: Tensor
    scale: Tensor
    codes_are_current: bool
    codes_owner: object = None  # the latest of the optimizers that have kept them
    sharded: bool = False  # this process has some rows of the latent; codes are not part of a state then

    def init_codes(self, weight_bits: float, quantization_mode: str) -> None:
        """Register the buffers; called once, after the torch layer has made its weight."""
        if weight_bits not in (1.58, 1):
            raise ValueError(f"weight_bits={weight_bits!r} is not supported; use 1.58 (ternary) or 1 (sign)")
        if quantization_mode not in ("deterministic", "stochastic"):
            raise ValueError(
                f"quantization_mode={quantization_mode!r} is not known; use 'deterministic' or 'stochastic'"
            )
        self.weight_bits: float = 1 if weight_bits == 1 else 1.58
        self.quantization_mode: QuantizationMode = (
            "stochastic" if quantization_mode == "stochastic" else "deterministic"
        )
        self.codes_are_current = False
        codes, scale = quantize_weight(self.weight, self.weight_bits)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @torch.no_grad()
    def requantize_(self) -> None:
        """Derive ``codes`` and ``scale`` from the latent, in place."""
        requantize_([self.weight], [self.codes], [self.scale], self.weight_bits, self.quantization_mode)

    def current_codes(self) -> tuple[Tensor, Tensor]:
        """The codes (int8, the weight's shape) and scale (float32, shape ()) for this forward.

        Of a weight that was gathered from its parts the codes are packed, as they came.
        """
        if isinstance(self.weight, GatheredCodes):
            return self.weight.packed, self.weight.scale
        if self.codes_are_current:
            return self.codes, self.scale
        # A stochastic draw belongs to training; without an owner that keeps the codes, evaluation
        # and storage use the nearest ones.
        mode = self.quantization_mode if self.training else "deterministic"
        return quantize_weight(self.weight, self.weight_bits, mode)

    def ternary_weight(self) -> Tensor:
        """``codes * scale`` in the latent's shape and dtype, differentiable straight through."""
        codes, scale = self.current_codes()
        return _StraightThrough.apply(self.weight, codes, scale)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not (self.codes_are_current or self.sharded or self.weight.is_meta):
            self._store(*quantize_weight(self.weight, self.weight_bits))
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A float checkpoint has no codes: they follow from the weight.
        from_float = prefix + "weight" in state_dict and prefix + "codes" not in state_dict
        missing_keys = args[2]
        super()._load_from_state_dict(state_dict, prefix, *args)
        if from_float:
            for name in ("codes", "scale"):
                if prefix + name in missing_keys:
                    missing_keys.remove(prefix + name)
            if not (self.weight.is_meta or self.sharded):
                self._store(*quantize_weight(self.weight, self.weight_bits))

    def _store(self, codes: Tensor, scale: Tensor) -> None:
        """Write the buffers; new ones where they are on another device, as after building on meta."""
        if self.codes.device == codes.device:
            self.codes.copy_(codes)
            self.scale.copy_(scale)
        else:
            self.codes, self.scale = codes, scale

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle has no optimizer that would keep its codes current.
        return {**self.__dict__, "codes_are_current": False, "codes_owner": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scale = self.scale
        module = super()._apply(fn, recurse)
        # model.half() or .bfloat16() must not touch the scale, not even to round it and convert it back.
        if scale.is_meta or self.scale.is_meta:
            self.scale = self.scale.float()
        else:
            self.scale = scale.to(self.scale.device)
        return module


class BitLinear(TernaryWeight, nn.Linear):
    """A linear layer with 1.58-bit (or 1-bit) weights and int8 activations, BitNet b1.58's W1.58A8.

    ``y = scale_w * scale_x * (int8(x) @ codes.T) + bias``, where int8(x) is quantized per row
    (token). A drop-in replacement for :class:`torch.nn.Linear`.

    Args:
        in_features, out_features, bias, device, dtype: as for :class:`torch.nn.Linear`.
        weight_bits: 1.58 for codes {-1, 0, 1}; 1 for {-1, 1}.
        quantization_mode: "deterministic" or "stochastic" rounding of the latent.
        norm: divide the input by its root mean square first (RMSNorm without a learned gain), as
            BitNet b1.58 does before each linear. It changes the function: keep it on for training
            from scratch, and expect to fine-tune a converted model.
        activation_bits: 8, or None to leave the input in float (weight-only).
        backward: arithmetic of the two gradient products: "float32", "bf16", "int8", or "auto":
            int8 where it is known to pay (:func:`phase4_bitnet.int8_linear.int8_pays`), else the dtype
            of the forward's output.

    Shape:
        input (..., in_features), output (..., out_features); any leading shape, empty too.

    Example:
        >>> layer = BitLinear(4, 2, bias=False)
        >>> layer(torch.ones(3, 4)).shape
        torch.Size([3, 2])
        >>> sorted(set(layer.codes.flatten().tolist()) - {-1, 0, 1})
        []
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_bits: float = 1.58,
        quantization_mode: str = "deterministic",
        norm: bool = False,
        activation_bits: int | None = 8,
        backward: Backward = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation_bits not in (8, None):
            raise ValueError(
                f"activation_bits={activation_bits!r} is not supported; use 8, or None for float"
            )
        if backward not in ("auto", "float32", "bf16", "int8"):
            raise ValueError(f"backward={backward!r} is not known; use 'auto', 'float32', 'bf16' or 'int8'")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.norm, self.activation_bits, self.backward = norm, activation_bits, backward
        self.init_codes(weight_bits, quantization_mode)

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """Apply the layer to ``x`` (..., in_features), or to ``norm(x)``; see :func:`normed_linear`."""
        if not x.is_floating_point() or x.shape[-1] != self.in_features:
            raise ValueError(
                f"BitLinear got {x.dtype} input of shape {tuple(x.shape)}; it takes floating point "
                f"(..., {self.in_features}): convert or reshape the input"
            )
        if self.norm:
            x = rms_norm(x, None, NORM_EPS)
        if self.activation_bits is None:
            return F.linear(x, self.ternary_weight(), self.bias)
        out_dtype = _autocast_dtype(x.device.type) or x.dtype
        codes, scale = self.current_codes()
        out = _Int8Linear.apply(
            x.reshape(-1, self.in_features), self.weight, codes, scale, out_dtype, self.backward,
            norm, None if norm is None else norm.weight,
        )  # fmt: skip
        out = out.reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        """The part of ``repr`` between the brackets."""
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, norm={self.norm}"


def normed_linear(x: Tensor, norm: RMSNorm, linear: nn.Module) -> Tensor:
    """``linear(norm(x))``; where the native kernels run, the norm and the rounding to int8 are one pass.

    The bits are those of the two modules one after the other in float32. Under bf16 the gradient between
    them stays bf16. Where either has hooks, or ``linear`` a forward of its own, the two are called in turn:
    a hook is to see what goes into its module, and may replace it.

    Args:
        x: (..., width) floating point.
        norm: over the last dimension.
        linear: any module that takes (..., width).
    """
    if (
        isinstance(linear, BitLinear)
        and type(linear).forward is BitLinear.forward
        and linear.activation_bits is not None
        and not linear.norm
        and norm.weight.shape == x.shape[-1:]
        and native_rms_norm(x, norm.weight)
        and not (_has_hooks(norm) or _has_hooks(linear))
    ):
        return linear(x, norm)
    return linear(norm(x))


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module calls something else as well."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def _autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast is set to on a kind of device, None where it is off or does not exist."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class _WeightOnly(TernaryWeight):
    """The constructor of layers that are a torch layer with ternary weights and nothing more."""

    def __init__(
        self, *args: Any, weight_bits: float = 1.58, quantization_mode: str = "deterministic", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.init_codes(weight_bits, quantization_mode)


class BitConv1d(_WeightOnly, nn.Conv1d):
    """A 1-d convolution with 1.58-bit weights and float activations (weight-only)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (batch, channels, length)."""
        return self._conv_forward(x, self.ternary_weight(), self.bias)


class BitConv2d(_WeightOnly, nn.Conv2d):
    """A 2-d convolution with 1.58-bit weights and float activations (weight-only)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (batch, channels, height, width)."""
        return self._conv_forward(x, self.ternary_weight(), self.bias)


class BitEmbedding(_WeightOnly, nn.Embedding):
    """An embedding table with 1.58-bit weights; off by default in the converter."""

    def forward(self, index: Tensor) -> Tensor:
        """Look up ``index`` (integers of any shape)."""
        return F.embedding(index, self.ternary_weight(), self.padding_idx)


def ternary_layers(model: nn.Module) -> Iterator[tuple[str, TernaryWeight]]:
    """Yield (name, layer) for each layer with ternary codes, shared layers once."""
    for name, module in model.named_modules():
        if isinstance(module, TernaryWeight):
            yield name, module


def requantize_layers(layers: Sequence[TernaryWeight]) -> None:
    """Refresh the codes of many layers at once, in as few multi-tensor passes as they allow."""
    groups: dict[tuple[Any, ...], list[TernaryWeight]] = {}
    for layer in layers:
        key = (layer.weight_bits, layer.quantization_mode, layer.weight.device)
        groups.setdefault(key, []).append(layer)
    for (bits, mode, _), members in groups.items():
        requantize_(
            [m.weight for m in members], [m.codes for m in members], [m.scale for m in members], bits, mode
        )
