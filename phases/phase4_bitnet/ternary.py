"""The arithmetic of 1.58-bit networks as pure functions of tensors.

A ternary weight is ``scale * codes`` with one float scale for the whole matrix and codes in
{-1, 0, +1}. The rule is BitNet b1.58's (Ma et al. 2024, arXiv:2402.17764, equations 1-3)::

    scale = mean |W|          codes = round(clip(W / scale, -1, 1))

and BitNet's for one bit (Wang et al. 2023, arXiv:2310.11453): ``codes = sign(W)``, without the
mean subtraction, so that both widths share one scale rule. Activations are quantized per row
(token) to int8 by their largest magnitude.

The mean is the sum in float64, rounded to float32: the order of the summands then does not matter, so that
threads, devices and kernels agree on every code. (Two orders differ by some 1e-16 of the sum; that moves the
rounded mean in one of 10^8 cases, by its last bit, and a code only where |W| lies between the two halves.)
On a CPU a native kernel does it all in one pass (native/optimizer_step.cpp), to the same bits.

The scale that multiplies is rounded to a number that float16 holds exactly. Export formats store
scales in float16 or float32; training with the value that will be stored keeps the deployed network
equal to the one that was validated. The codes are decided with the unrounded mean.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, library

from phase4_bitnet import native

QuantizationMode = Literal["deterministic", "stochastic"]

# The reference implementation of BitNet clamps both kinds of scale here; it only acts on all-zero input.
SCALE_FLOOR = 1e-5
INT8_MAX = 127


def storable_scale(mean_abs: Tensor) -> Tensor:
    """Round a scale to the nearest number that float16 represents, keeping float32.

    Args:
        mean_abs: any shape, float32, the mean magnitude of a weight.

    Returns:
        Same shape, float32, at least ``SCALE_FLOOR`` as float16 rounds it.
    """
    x = mean_abs.clamp(SCALE_FLOOR, torch.finfo(torch.float16).max)
    # Not half().float(): torch.compile takes the pair for nothing to do. The power of two at or below x
    # gives float16's step there, 2**-24 below its smallest normal number.
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = (power * 2**-10).clamp(min=2**-24)
    return (x / step).round() * step


def _codes_from_ratio(ratio: Tensor, weight_bits: float, noise: Tensor | None) -> Tensor:
    """Map ``W / mean|W|`` (float32) to codes, still as floats; `noise` is uniform in [0, 1)."""
    if weight_bits == 1:
        if noise is None:
            return torch.where(ratio < 0, -1.0, 1.0)
        return torch.where(noise < (ratio.clamp(-1, 1) + 1) / 2, 1.0, -1.0)
    clipped = ratio.clamp(-1, 1)
    # floor(x + u) rounds up with a probability equal to the fraction: unbiased inside [-1, 1].
    return clipped.round() if noise is None else (clipped + noise).floor()


def quantize_weight(
    weight: Tensor,
    weight_bits: float = 1.58,
    mode: QuantizationMode = "deterministic",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Derive the codes and the scale of one weight tensor.

    Args:
        weight: any shape, floating point.
        weight_bits: 1.58 for {-1, 0, 1}, 1 for {-1, 1} (zero maps to +1).
        mode: "deterministic" rounds to nearest, ties to even; "stochastic" rounds up with a
            probability equal to the fraction, so the expected code is ``clip(W / scale, -1, 1)``.
        generator: source of the random draws in stochastic mode; torch's default when None.

    Returns:
        ``codes`` int8 of the weight's shape, and ``scale`` float32 of shape ().

    Example:
        >>> codes, scale = quantize_weight(torch.tensor([[0.9, -0.1], [-0.5, 0.5]]))
        >>> codes.tolist(), scale.item()
        ([[1, 0], [-1, 1]], 0.5)
    """
    latent = weight.detach().float()
    if mode == "deterministic" and not torch.compiler.is_compiling() and _native_takes(latent):
        return torch.ops.forge.ternary_codes(latent, 1 if weight_bits == 1 else 2)
    mean_abs = _mean_magnitude(latent)
    noise = None
    if mode == "stochastic":
        noise = torch.rand(latent.shape, generator=generator, device=latent.device)
    codes = _codes_from_ratio(latent / mean_abs.clamp(min=SCALE_FLOOR), weight_bits, noise)
    return codes.to(torch.int8), storable_scale(mean_abs)


def _native_takes(latent: Tensor) -> bool:
    """Whether the native kernel derives the codes of this latent."""
    return (
        latent.device.type == "cpu"
        and latent.dtype == torch.float32
        and latent.is_contiguous()
        and native.available()
    )


def _mean_magnitude(latent: Tensor) -> Tensor:
    """mean |W| as a () float32 tensor; the kernels compute the same number.

    Accumulated in float64: in float32 torch's CPU norm is 29% off at 8192 x 8192.
    """
    if not latent.numel():
        return latent.new_zeros(())
    if latent.device.type == "mps":  # has no float64
        return latent.abs().mean()
    return (torch.linalg.vector_norm(latent, 1, dtype=torch.float64) / latent.numel()).float()


@torch.no_grad()
def requantize_(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    weight_bits: float = 1.58,
    mode: QuantizationMode = "deterministic",
    means: Tensor | None = None,
) -> None:
    """Refresh the codes and scales of many layers in place, in one multi-tensor pass.

    Args:
        weights: the latents, float, any shapes.
        codes: int8 tensors of the same shapes, overwritten.
        scales: float32 tensors of shape (), overwritten. The native kernel takes the present value for
            a guess of the new one, which spares it a second pass; it decides nothing.
        weight_bits, mode: as for :func:`quantize_weight`, the same for all.
        means: (n,) float32, the mean magnitudes of the tensors that these are parts of; None where they are
            whole.
    """
    if not weights:
        return
    latents = [w.detach().float() for w in weights]
    if (
        means is None
        and mode == "deterministic"
        and all(map(_native_takes, latents))
        and all(c.is_contiguous() for c in codes)
    ):
        torch.ops.forge.requantize_(latents, list(codes), list(scales), 1 if weight_bits == 1 else 2)
        torch.autograd.graph.increment_version([*codes, *scales])
        return
    mean_abs = torch.stack([_mean_magnitude(w) for w in latents]) if means is None else means
    ratios = torch._foreach_div(latents, list(mean_abs.clamp(min=SCALE_FLOOR).unbind()))
    if weight_bits == 1.58 and mode == "deterministic":
        torch._foreach_clamp_min_(ratios, -1.0)
        torch._foreach_clamp_max_(ratios, 1.0)
        torch._foreach_round_(ratios)
    else:
        ratios = tuple(
            _codes_from_ratio(r, weight_bits, torch.rand_like(r) if mode == "stochastic" else None)
            for r in ratios
        )
    torch._foreach_copy_(list(codes), ratios)
    torch._foreach_copy_(list(scales), list(storable_scale(mean_abs).unbind()))


def quantize_rows(x: Tensor, floor: float = SCALE_FLOOR) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8 by its largest magnitude (BitNet's per-token absmax).

    Args:
        x: (rows, columns) floating point; computed in float32.
        floor: rows whose largest magnitude is below this are scaled by it. The default is BitNet's for
            activations; gradients are far smaller and need a floor near zero.

    Returns:
        int8 (rows, columns), and float32 (rows, 1) such that ``x ~ int8 * scale``.

    Example:
        >>> q, s = quantize_rows(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
        >>> q.tolist()
        [[64, -127], [0, 0]]
    """
    x = x.float()
    if x.shape[-1] == 0:
        return x.to(torch.int8), x.new_full((x.shape[0], 1), floor / INT8_MAX, dtype=torch.float32)
    # Two reductions without the copy that abs() would write.
    largest = torch.maximum(x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True))
    largest = largest.clamp(min=floor)
    # Spelled out because torch computes 127 / x this way, and torch.compile's code does not.
    quantized = (x * (largest.reciprocal() * INT8_MAX)).round_().to(torch.int8)
    return quantized, largest / INT8_MAX


# What the kernel returns, for tracing; native/optimizer_step.cpp has the body.
library.define("forge::ternary_codes", "(Tensor weight, int bits) -> (Tensor, Tensor)")


@library.register_fake("forge::ternary_codes")
def _ternary_codes_fake(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(())
