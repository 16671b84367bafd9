"""Root mean square normalization, with a squared ReLU before it where asked for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from phase4_bitnet import native
from phase4_bitnet.first_order import first_order_only
from phase4_bitnet.int8_linear import NATIVE_DTYPES


def rms_norm(x: Tensor, gain: Tensor | None, eps: float, *, squared_relu: bool = False) -> Tensor:
    """``u / sqrt(mean(u**2) + eps) * gain`` along the last dimension, u being x or relu(x)**2.

    On a CPU with native kernels one pass forward and one backward, compiled or not; elsewhere torch's
    operators, which differ by the rounding of the mean.

    Args:
        x: (..., width) floating point.
        gain: (width,), or None for 1. The result has its dtype: what follows is a rounding to int8, better
            made from float32 where x is bf16.
        eps: added to the mean square.
        squared_relu: normalize relu(x)**2.

    Returns:
        The shape of ``x``, in the dtype of ``gain``, of ``x`` where there is none.

    Raises:
        ValueError: a gain of another width than ``x``.

    >>> rms_norm(torch.tensor([3.0, 4.0, 0.0, 0.0]), None, 0.0)
    tensor([1.2000, 1.6000, 0.0000, 0.0000])
    >>> rms_norm(torch.tensor([-3.0, 2.0]), torch.ones(2), 0.0, squared_relu=True)
    tensor([0.0000, 1.4142])

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4; So et al. 2021, "Primer"
    (arXiv:2109.08668) for the squared ReLU.
    """
    if gain is not None and gain.shape != x.shape[-1:]:
        raise ValueError(
            f"the gain has shape {tuple(gain.shape)} and the input {tuple(x.shape)}; "
            f"make the norm for a width of {x.shape[-1]}"
        )
    if native_rms_norm(x, gain):
        return _NativeRMSNorm.apply(x, gain, eps, squared_relu)
    if squared_relu:
        positive = F.relu(x)
        # A product, not square(): torch's backward of a power computes the power again.
        x = positive * positive
    # torch leaves its fused kernel, with a warning, when the two dtypes differ.
    return F.rms_norm(x if gain is None else x.to(gain.dtype), x.shape[-1:], gain, eps)


def native_rms_norm(x: Tensor, gain: Tensor | None) -> bool:
    """Whether the native kernels take this input and gain."""
    return (
        x.device.type == "cpu"
        and x.dtype in NATIVE_DTYPES
        and (gain is None or gain.dtype == torch.float32)
        and x.numel() > 0
        and native.available()
    )


class _NativeRMSNorm(torch.autograd.Function):
    """native/rms_norm.cpp with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, eps: float, squared_relu: bool) -> Tensor:
        dtype = x.dtype if gain is None else gain.dtype
        out, inverse = torch.ops.forge.rms_norm(x.reshape(-1, x.shape[-1]), gain, eps, squared_relu, dtype)
        ctx.save_for_backward(x, gain, inverse)
        ctx.squared_relu = squared_relu
        return out.view(x.shape)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gain, inverse = ctx.saved_tensors
        grad_x, grad_gain = torch.ops.forge.rms_norm_backward(
            grads[0].reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]), gain, inverse, ctx.squared_relu
        )
        return grad_x.view(x.shape), None if gain is None else grad_gain, None, None


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` over the last dimension, by :func:`rms_norm`.

    Args:
        width: of the last dimension.
        eps: added to the mean square.
        squared_relu: normalize relu(x)**2.

    Shape:
        input (..., width) of any float dtype, output the same in the dtype of the gain.

    >>> RMSNorm(4, eps=1e-5, squared_relu=True)(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, width: int, eps: float, *, squared_relu: bool = False) -> None:
        super().__init__(width, eps=eps)
        self.squared_relu = squared_relu

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of `x`."""
        return rms_norm(x, self.weight, self.eps or 0.0, squared_relu=self.squared_relu)


# What the native kernels take and, for torch.compile, the shapes that they return.
library.define(
    "forge::rms_norm",
    "(Tensor x, Tensor? gain, float eps, bool squared, ScalarType dtype) -> (Tensor, Tensor)",
)
library.define(
    "forge::rms_norm_quantize",
    "(Tensor x, Tensor? gain, float eps, bool squared, float floor) -> (Tensor, Tensor, Tensor)",
)
library.define(
    "forge::rms_norm_backward",
    "(Tensor grad, Tensor x, Tensor? gain, Tensor inverse, bool squared) -> (Tensor, Tensor)",
)


@library.register_fake("forge::rms_norm")
def _(x: Tensor, gain: Tensor | None, eps: float, squared: bool, dtype: torch.dtype) -> Any:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


@library.register_fake("forge::rms_norm_quantize")
def _(x: Tensor, gain: Tensor | None, eps: float, squared: bool, floor: float) -> Any:
    floats = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), floats[:, None].clone(), floats


@library.register_fake("forge::rms_norm_backward")
def _(grad: Tensor, x: Tensor, gain: Tensor | None, inverse: Tensor, squared: bool) -> Any:
    return x.new_empty(x.shape), inverse.new_empty(0 if gain is None else x.shape[-1])
