"""int8 matrix product with int32 accumulation: one signature, a reference and a fast path.

The fast path is ``torch._int_mm``: VNNI instructions on CPU, tensor cores on CUDA. The CUDA kernel
takes only some shapes; those it refuses are padded with zeros, which changes no result.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "int_mm", "reference"]

# The longest sum of products of int8 that int32 holds: 128 * 128 * k stays below 2**31.
MAX_INNER = 2**31 // (128 * 128) - 1
# cuBLASLt's int8 product: more than 16 rows, inner and outer sizes in multiples of 8.
_CUDA_MIN_ROWS = 17
_CUDA_MULTIPLE = 8


def int8_matmul(a: Tensor, b: Tensor, backend: Backend = "auto") -> Tensor:
    """Multiply int8 matrices exactly.

    Args:
        a: (m, k) int8.
        b: (k, n) int8; a transposed view is fine.
        backend: "reference" accumulates in float64 (exact below 2**53), "int_mm" uses torch's
            kernel, "auto" is "int_mm".

    Returns:
        (m, n) int32.

    Raises:
        ValueError: shapes or dtypes do not fit, or k is so large that int32 could overflow.

    Example:
        >>> a = torch.tensor([[1, 2]], dtype=torch.int8)
        >>> int8_matmul(a, a.t()).tolist()
        [[5]]
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise ValueError(f"int8_matmul got {a.dtype} and {b.dtype}; both operands must be torch.int8")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"int8_matmul got shapes {tuple(a.shape)} and {tuple(b.shape)}; want (m, k) and (k, n)"
        )
    if a.shape[1] > MAX_INNER:
        raise ValueError(f"int8_matmul got k={a.shape[1]}; int32 may overflow above {MAX_INNER}")
    if backend == "reference":
        return (a.double() @ b.double()).to(torch.int32)
    if a.shape[0] == 0 or a.shape[1] == 0 or b.shape[1] == 0:
        return a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.int32)
    if a.is_cuda:
        return _int_mm_padded(a, b)
    if 1 in a.shape or 1 in b.shape:
        # The strides of an axis of length one are anything, and torch's CPU kernel believes them.
        a, b = (t.clone(memory_format=torch.contiguous_format) for t in (a, b))
    return torch._int_mm(a, b)


def _int_mm_padded(a: Tensor, b: Tensor) -> Tensor:
    """Pad to the shapes the CUDA kernel takes and cut the result."""
    rows, columns = a.shape[0], b.shape[1]
    pad_rows = max(0, _CUDA_MIN_ROWS - rows)
    pad_inner = -a.shape[1] % _CUDA_MULTIPLE
    pad_columns = -columns % _CUDA_MULTIPLE
    if pad_rows or pad_inner:
        a = F.pad(a, (0, pad_inner, 0, pad_rows))
    if pad_inner or pad_columns:
        b = F.pad(b, (0, pad_columns, 0, pad_inner))
    return torch._int_mm(a, b)[:rows, :columns]
