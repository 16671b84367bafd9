"""Ternary codes packed four or five to a byte.

Two encodings, both exact and both row by row (the last dimension is a row):

    "2bit"   byte = sum over i < 4 of (code_i + 1) * 4**i      2 bits a weight
    "base3"  byte = sum over i < 5 of (code_i + 1) * 3**i      1.6 bits a weight

Code + 1 lies in {0, 1, 2}, so a field is never negative and the offset is the one that Hugging Face's BitNet
and GGUF's TQ2_0 and TQ1_0 use: an exporter only has to reorder. The first code sits in the lowest digit
("little end first"): in "2bit" the codes of byte `b` are `b >> 0, 2, 4, 6` in reading order, on every
machine, because a byte has no endianness. A row that does not fill its last byte is padded with code 0,
which adds nothing to a dot product, so a kernel may read whole bytes. One-bit weights {-1, 1} use the same
encodings.

A third layout, "tiles", is for the memory of the matrix kernel only and is not stored. A tile of 64 bytes
holds 16 rows by 16 columns: byte `4 * r + c` holds in its bit pair f the code of row r, column `4 * f + c`.

Source: Ma et al. 2024, "The Era of 1-bit LLMs" (arXiv:2402.17764) for the three levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

# encoding -> (base of the digits, codes a byte)
_ENCODINGS = {"2bit": (4, 4), "base3": (3, 5)}
TILE = 16  # rows and columns of a tile
_INVALID = -2  # marks in the table a byte that no codes make


def packed_shape(shape: Sequence[int], encoding: str = "2bit") -> tuple[int, ...]:
    """Shape of the packed tensor for codes of `shape`.

    Args:
        shape: shape of the codes; () counts as one row of one code.
        encoding: "2bit" (4 codes a byte) or "base3" (5 codes a byte).

    Returns:
        The same shape with the last dimension divided by the codes a byte, rounded up.

    Raises:
        ValueError: the encoding is unknown.

    >>> packed_shape((3, 10)), packed_shape((3, 10), "base3")
    ((3, 3), (3, 2))
    """
    _, per_byte = _encoding(encoding)
    rows = tuple(shape) or (1,)
    return (*rows[:-1], -(-rows[-1] // per_byte))


def packed_bytes(shape: Sequence[int], encoding: str = "2bit") -> int:
    """Bytes that codes of `shape` take when packed, row padding included.

    Args:
        shape: shape of the codes.
        encoding: "2bit" or "base3".

    Returns:
        The number of bytes; the scale is not counted.

    Raises:
        ValueError: the encoding is unknown.

    >>> packed_bytes((128, 512)), packed_bytes((128, 512), "base3"), 128 * 512 * 4
    (16384, 13184, 262144)
    """
    return math.prod(packed_shape(shape, encoding))


def pack_codes(codes: Tensor, encoding: str = "2bit") -> Tensor:
    """Pack int8 codes into bytes, the first code of each row in the lowest digit.

    Args:
        codes: (..., n) int8 with values -1, 0, 1, on any device.
        encoding: "2bit" (4 codes a byte) or "base3" (5 codes a byte).

    Returns:
        (..., ceil(n / 4 or 5)) uint8 on the same device.

    Raises:
        TypeError: `codes` is not int8.
        ValueError: a code is outside {-1, 0, 1}, or the encoding is unknown.

    >>> pack_codes(torch.tensor([[1, 0, -1, 1, -1]], dtype=torch.int8)).tolist()
    [[134, 84]]
    >>> pack_codes(torch.tensor([[1, 0, -1, 1, -1]], dtype=torch.int8), "base3").tolist()
    [[59]]
    """
    base, per_byte = _encoding(encoding)
    if codes.dtype != torch.int8:
        raise TypeError(
            f"codes are {codes.dtype}, wanted torch.int8; pass layer.codes, not the latent weight"
        )
    if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) > 1):
        raise ValueError(
            f"codes range from {int(codes.min())} to {int(codes.max())}, wanted -1, 0 or 1; "
            "ternarize the weight first"
        )
    rows = codes.reshape(tuple(codes.shape) or (1,))
    out_shape = packed_shape(rows.shape, encoding)
    rows = torch.nn.functional.pad(rows, (0, out_shape[-1] * per_byte - rows.shape[-1]))
    digits = (rows + 1).to(torch.uint8).reshape(*out_shape, per_byte)
    powers = torch.tensor([base**i for i in range(per_byte)], dtype=torch.uint8, device=codes.device)
    # The largest sums are 2 * 85 = 170 and 2 * 121 = 242, so uint8 never wraps.
    return (digits * powers).sum(dim=-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, shape: Sequence[int], encoding: str = "2bit") -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed: uint8 of shape `packed_shape(shape, encoding)`.
        shape: shape of the codes to give back.
        encoding: the encoding they were packed with.

    Returns:
        `shape` int8 with values -1, 0, 1 on the device of `packed`.

    Raises:
        TypeError: `packed` is not uint8.
        ValueError: the shape does not fit, a byte is not one that `pack_codes` makes, the padding is not zero
            codes, or the encoding is unknown.

    >>> unpack_codes(torch.tensor([[134, 84]], dtype=torch.uint8), (1, 5)).tolist()
    [[1, 0, -1, 1, -1]]
    """
    _, per_byte = _encoding(encoding)
    shape = tuple(shape)
    wanted = packed_shape(shape, encoding)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes are {packed.dtype}, wanted torch.uint8; pass what pack_codes returned")
    if tuple(packed.shape) != wanted:
        raise ValueError(
            f"packed codes have shape {tuple(packed.shape)}, wanted {wanted} for {encoding} codes of "
            f"shape {shape}; pass the shape and encoding they were packed with"
        )
    table = _table(encoding).to(packed.device)
    digits = table.index_select(0, packed.reshape(-1).int())
    if digits.numel() and int(digits.min()) == _INVALID:
        bad = packed.reshape(-1)[digits[:, 0] == _INVALID][0]
        raise ValueError(f"byte {int(bad)} is not a {encoding} byte of ternary codes; the file is damaged")
    rows = tuple(shape) or (1,)
    codes = digits.reshape(*wanted[:-1], wanted[-1] * per_byte)
    if bool(codes[..., rows[-1] :].any()):
        raise ValueError(
            f"padding after {rows[-1]} codes a row is not zero; the shape {shape} is wrong or the file "
            "damaged"
        )
    return codes[..., : rows[-1]].reshape(shape).contiguous()


def decode_2bit(packed: Tensor, columns: int) -> Tensor:
    """`unpack_codes` of "2bit" bytes that are known to be sound: no check, so it never waits for the device.

    Args:
        packed: (..., ceil(columns / 4)) uint8.
        columns: codes a row.

    Returns:
        (..., columns) int8.

    >>> decode_2bit(torch.tensor([[134, 84]], dtype=torch.uint8), 5).tolist()
    [[1, 0, -1, 1, -1]]
    """
    return _bit_pairs(packed).flatten(-2)[..., :columns].contiguous()


def pack_tiles(codes: Tensor) -> Tensor:
    """Pack a matrix of codes into tiles, the layout that the packed linear layer multiplies from.

    Args:
        codes: (rows, columns) int8 with values -1, 0, 1.

    Returns:
        (ceil(rows / 16), ceil(columns / 16), 64) uint8 on the same device; what lies outside the matrix is
        code 0.

    Raises:
        TypeError, ValueError: as for `pack_codes`.

    >>> pack_tiles(torch.tensor([[1, 0, 0, 0, -1]], dtype=torch.int8))[0, 0, :4].tolist()
    [82, 85, 85, 85]
    """
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % TILE, 0, -rows % TILE))
    down, across = padded.shape[0] // TILE, padded.shape[1] // TILE
    # (down, row, across, bit pair, byte) -> (down, across, row, byte, bit pair)
    ordered = padded.reshape(down, TILE, across, 4, 4).permute(0, 2, 1, 4, 3)
    return pack_codes(ordered.contiguous()).reshape(down, across, TILE * 4)


def unpack_tiles(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `pack_tiles`; like `decode_2bit` it trusts the bytes.

    Args:
        packed: what `pack_tiles` returned.
        rows, columns: shape of the codes.

    Returns:
        (rows, columns) int8 on the device of `packed`.

    >>> unpack_tiles(pack_tiles(torch.tensor([[1, 0, 0, 0, -1]], dtype=torch.int8)), 1, 5).tolist()
    [[1, 0, 0, 0, -1]]
    """
    down, across, _ = packed.shape
    tiles = _bit_pairs(packed.reshape(down, across, TILE, 4)).permute(0, 2, 1, 4, 3)
    return tiles.reshape(down * TILE, across * TILE)[:rows, :columns].contiguous()


def _bit_pairs(packed: Tensor) -> Tensor:
    """(...) uint8 -> (..., 4) int8: the four codes of each byte, the lowest bits first."""
    if packed.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass that reads four codes at once: a sixth of the time of the operators below.
        return _four_codes().index_select(0, packed.reshape(-1).int()).view(torch.int8).view(*packed.shape, 4)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 3).to(torch.int8) - 1


@cache
def _four_codes() -> Tensor:
    """(256,) int32: the bytes of each are the four codes of a "2bit" byte."""
    with torch.inference_mode(False):
        digits = [[(byte >> shift & 3) - 1 for shift in (0, 2, 4, 6)] for byte in range(256)]
        return torch.tensor(digits, dtype=torch.int8).view(torch.int32).flatten()


def _encoding(encoding: str) -> tuple[int, int]:
    if encoding not in _ENCODINGS:
        raise ValueError(f"encoding={encoding!r} is unknown; use one of {', '.join(map(repr, _ENCODINGS))}")
    return _ENCODINGS[encoding]


@cache
def _table(encoding: str) -> Tensor:
    """(256, codes a byte) int8: the codes of each byte; rows of bytes no codes make hold _INVALID."""
    base, per_byte = _encoding(encoding)
    table = torch.full((256, per_byte), _INVALID, dtype=torch.int8)
    for byte in range(min(256, base**per_byte)):
        digits = [byte // base**i % base for i in range(per_byte)]
        if max(digits) <= 2:
            table[byte] = torch.tensor(digits, dtype=torch.int8) - 1
    return table
