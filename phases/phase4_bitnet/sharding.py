"""A ternary weight in parts: each process keeps some rows of the latent, and the codes travel in 2 bits.

PyTorch's FSDP2 asks a tensor that has ``fsdp_pre_all_gather`` what to send and ``fsdp_post_all_gather`` what
to make of what arrived; torchao does the same for its float8 and BitNet weights. What is sent here are the
codes that the optimizer has derived, four in a byte, a sixteenth of the float32 latent; what arrives stands
in for the whole weight as long as the layer needs it. The scale is one for the whole tensor: whoever
derives the codes has to know the mean magnitude over all parts (:func:`magnitudes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from phase4_bitnet.packing import decode_2bit

_aten = torch.ops.aten
# Operators that hand the same tensor on.
_SAME = frozenset({_aten.detach.default, _aten.alias.default, _aten.as_strided.default})
# Operators of FSDP and of loading whose result is rows of a latent again.
_ROWS = _SAME | {
    _aten.clone.default,
    _aten.copy_.default,
    _aten.empty_like.default,
    _aten.new_zeros.default,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.view.default,
    _aten._to_copy.default,
}


class ShardedLatent(Tensor):
    """Rows of a ternary layer's latent, of which FSDP2 gathers the codes.

    The layer holds ``packed_codes``: (rows, ceil(n / 4)) uint8, the codes of these rows.

    Args:
        rows: a plain tensor, whose memory this shares; operators act on it.
    """

    rows: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, rows: Tensor) -> Any:
        """Around ``rows``."""
        return torch.Tensor._make_wrapper_subclass(
            cls, rows.shape, strides=rows.stride(), storage_offset=rows.storage_offset(), dtype=rows.dtype,
            device=rows.device, requires_grad=rows.requires_grad,
        )  # fmt: skip

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedLatent({self.rows})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The operator on the rows."""
        plain = torch.utils._pytree.tree_map_only(cls, lambda t: t.rows, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        if func is _aten.copy_.default:
            return args[0]
        return torch.utils._pytree.tree_map_only(Tensor, cls, result) if func in _ROWS else result

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """What this process sends, and what it remembers until the rest has arrived."""
        return (module.packed_codes,), (module.scale, outer_size, self.dtype)

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], remembered: Any, param_dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        """The whole weight, from the codes of all parts."""
        (packed,), (scale, size, dtype) = gathered, remembered
        if out is not None:
            out.scale = scale  # the packed codes lie where they lay before
            return None
        return GatheredCodes(packed, scale, size, dtype), (packed,)


class GatheredCodes(Tensor):
    """A whole ternary weight as the codes that came over the wire; read as a tensor it is codes * scale.

    Args:
        packed: (rows, ceil(n / 4)) uint8, n the elements of a row.
        scale: () float32.
        size: shape of the weight.
        dtype: of the latent that it stands for.
    """

    packed: Tensor
    scale: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor, size: torch.Size, dtype: torch.dtype) -> Any:
        """Without memory of its own."""
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=packed.device)

    def __init__(self, packed: Tensor, scale: Tensor, size: torch.Size, dtype: torch.dtype) -> None:
        self.packed, self.scale = packed, scale

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GatheredCodes({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The same tensor, or the operator on what it reads as."""
        if func in _SAME:
            return cls(args[0].packed, args[0].scale, args[0].shape, args[0].dtype)
        dense = torch.utils._pytree.tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*dense[0], **dense[1])

    def dense(self) -> Tensor:
        """Codes times scale, in the latent's dtype."""
        return int8_codes(self.packed, self.shape).to(self.dtype) * self.scale.to(self.dtype)


def plain_rows(value: Tensor) -> Tensor:
    """The rows of a sharded latent as the plain tensor whose memory it shares; any other tensor itself."""
    return value.rows if isinstance(value, ShardedLatent) else value


def int8_codes(codes: Tensor, shape: Sequence[int]) -> Tensor:
    """Codes as int8: as they are, or unpacked where they are uint8.

    Example:
        >>> int8_codes(pack_rows(torch.tensor([[1, 0, -1, 1, -1]], dtype=torch.int8)), (1, 5)).tolist()
        [[1, 0, -1, 1, -1]]
    """
    if codes.dtype != torch.uint8:
        return codes
    columns = 1
    for n in shape[1:]:
        columns *= n
    return decode_2bit(codes, columns).reshape(tuple(shape))


def pack_rows(codes: Tensor) -> Tensor:
    """Codes in 2 bits, row by row, the layout of :func:`phase4_bitnet.packing.pack_codes`.

    Without its checks, which wait for the device.

    Args:
        codes: (rows, ...) int8 with values -1, 0, 1.

    Returns:
        (rows, ceil(n / 4)) uint8, n being the elements of a row.
    """
    columns = codes[:1].numel() if codes.shape[0] else codes.new_empty(1, *codes.shape[1:]).numel()
    rows = codes.reshape(codes.shape[0], columns)
    digits = (torch.nn.functional.pad(rows, (0, -columns % 4)) + 1).contiguous()
    # Four codes, the first one lowest, as every machine that torch runs on has its bytes.
    four = digits.view(torch.int32)
    return (four | four >> 6 | four >> 12 | four >> 18).to(torch.uint8)


def magnitudes(latents: Sequence[Tensor]) -> Tensor:
    """Sums of the magnitudes of parts, (n,) float64: to be added over the processes, all layers at once."""
    return torch.stack([torch.linalg.vector_norm(w, 1, dtype=torch.float64) for w in latents])
