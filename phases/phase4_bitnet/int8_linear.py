"""The products of a ternary linear layer on int8: forward, input gradient and weight gradient.

One signature, two implementations. The native one (native/int8_linear.cpp) quantizes, multiplies and
scales in one pass over memory; the one of torch operators is the reference, the CUDA path, and what runs
where there is no compiler. On a CPU both give the same bits.
"""

from typing import Any

import torch
from torch import Tensor, library

from phase4_bitnet import native
from phase4_bitnet.int8_matmul import MAX_INNER, int8_matmul
from phase4_bitnet.ternary import SCALE_FLOOR, quantize_rows

# Gradients are far smaller than activations: BitNet's floor would set them to zero.
GRADIENT_FLOOR = torch.finfo(torch.float32).tiny * 128
# Rows of the batch that share one scale a column when the gradient is quantized for the weight gradient.
# Fewer are more exact, more are faster: the sums in float between blocks cost the product 10% at 256.
GRADIENT_BLOCK = 512


# From this many rows on, "auto" takes int8 for the gradients; see int8_pays.
AUTO_INT8_ROWS = 1024
# Element types that the native kernels read and write; they compute in int32 and float32.
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def _use_native(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the native kernels run here and take tensors of this dtype."""
    return device.type == "cpu" and dtype in NATIVE_DTYPES and native.available()


def int8_pays(x: Tensor) -> bool:
    """Whether gradient products on int8 are faster for this input and were shown to cost no quality.

    Byte text, 2048 rows: 0.7 of the time of bf16 and within 0.5% of its loss for each of three seeds. Digits,
    64 rows: no faster, and one seed says nothing. Both are on a CPU with the native kernels
    (benchmarks/records/backward_quality.jsonl); elsewhere nothing was measured and int8 is to be asked for.

    Args:
        x: (rows, columns).
    """
    return x.shape[0] >= AUTO_INT8_ROWS and _use_native(x.device, x.dtype)


def quantize_input(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_rows`, in one pass where nothing else would be fused with it.

    Args:
        x: (rows, columns) floating point.

    Returns:
        int8 (rows, columns), and float32 (rows, 1).
    """
    # torch.compile joins torch's operators with what made x, so x itself is never written.
    if torch.compiler.is_compiling() or not _use_native(x.device, x.dtype):
        return quantize_rows(x)
    return torch.ops.forge.quantize_rows(x, SCALE_FLOOR)


def int8_linear(
    rows: Tensor, row_scale: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``(rows @ codes.T) * (row_scale * scale)`` with int32 sums, scaled in float32.

    Args:
        rows: (m, k) int8, the quantized input.
        row_scale: (m, 1) float32.
        codes: (n, k) int8 in {-1, 0, 1}.
        scale: () float32.
        dtype: of the result, which is rounded to it once.

    Returns:
        (m, n) of that dtype.

    Raises:
        ValueError: k is so large that int32 could overflow.

    Example:
        >>> one = torch.ones(1, 2, dtype=torch.int8)
        >>> int8_linear(one, torch.ones(1, 1), one, torch.tensor(0.5))
        tensor([[1.]])
    """
    if _use_native(rows.device, dtype) and rows.shape[1] <= MAX_INNER:
        return torch.ops.forge.int8_linear(rows, row_scale, codes, scale, dtype)
    # Converted first: torch multiplies int32 by float element by element, 50 times slower.
    return int8_matmul(rows, codes.t()).float().mul_(row_scale * scale).to(dtype)


def int8_linear_backward(
    grad: Tensor,
    rows: Tensor,
    row_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    want_input: bool = True,
    want_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """The straight-through gradients of :func:`int8_linear`, both products on int8.

    With q the gradient rounded to int8 by its largest magnitude a row, and f the gradient times the
    input's row scale rounded by its largest magnitude a column and block of ``GRADIENT_BLOCK`` rows::

        d input  = (q @ codes) * (q_scale * scale)
        d weight = sum over blocks of (f.T @ rows) * f_scale

    The row scale of the input varies along the summed axis of the second product, so it is folded into the
    gradient before that is rounded. Each rounding is off by at most half a step: 1/254 of the largest
    magnitude of its row, or of its column and block.

    Args:
        grad: (m, n) float32 or bfloat16, gradient of the output.
        rows, row_scale, codes, scale: as for :func:`int8_linear`.
        want_input, want_weight: which of the two to compute.

    Returns:
        (m, k) in the dtype of ``grad`` and (n, k) float32, None for one that is not wanted.
    """
    if _use_native(grad.device, grad.dtype) and grad.shape[1] <= MAX_INNER and grad.numel():
        grad_input, grad_weight = torch.ops.forge.int8_linear_backward(
            grad, rows, row_scale, codes, scale, GRADIENT_FLOOR, GRADIENT_BLOCK, want_input, want_weight
        )
        return grad_input if want_input else None, grad_weight if want_weight else None
    grad_input = grad_weight = None
    if want_input:
        q, q_scale = quantize_rows(grad, GRADIENT_FLOOR)
        grad_input = int8_matmul(q, codes).float().mul_(q_scale * scale).to(grad.dtype)
    if want_weight:
        grad_weight = row_scale.new_zeros((grad.shape[1], rows.shape[1]))
        # A device with tensor cores is better off with few large products.
        block = GRADIENT_BLOCK if grad.device.type == "cpu" else MAX_INNER
        folded = grad * row_scale
        for columns, own in zip(folded.split(block), rows.split(block), strict=True):
            f, f_scale = quantize_rows(columns.t(), GRADIENT_FLOOR)
            grad_weight += int8_matmul(f, own).float().mul_(f_scale)
    return grad_input, grad_weight


# What the kernels take and, for torch.compile, the shapes that they return. native/int8_linear.cpp has the
# bodies.
library.define("forge::quantize_rows", "(Tensor x, float floor) -> (Tensor, Tensor)")
library.define(
    "forge::int8_linear",
    "(Tensor rows, Tensor row_scale, Tensor codes, Tensor scale, ScalarType dtype) -> Tensor",
)
library.define(
    "forge::int8_linear_backward",
    "(Tensor grad, Tensor rows, Tensor row_scale, Tensor codes, Tensor scale, float floor, int block, "
    "bool want_input, bool want_weight) -> (Tensor, Tensor)",
)


@library.register_fake("forge::quantize_rows")
def _(x: Tensor, floor: float) -> Any:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@library.register_fake("forge::int8_linear")
def _(rows: Tensor, row_scale: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Any:
    return row_scale.new_empty((rows.shape[0], codes.shape[0]), dtype=dtype)


@library.register_fake("forge::int8_linear_backward")
def _(
    grad: Tensor, rows: Tensor, row_scale: Tensor, codes: Tensor, scale: Tensor,
    floor: float, block: int, want_input: bool, want_weight: bool,
) -> Any:  # fmt: skip
    return (
        grad.new_empty((rows.shape[0], codes.shape[1]) if want_input else (0,)),
        row_scale.new_empty(codes.shape if want_weight else (0,)),
    )
