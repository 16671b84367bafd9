"""Packed ternary codes with plain loops over python integers."""

from __future__ import annotations


def pack_row_2bit(codes: list[int]) -> list[int]:
    """Bytes of one row, code i of a byte at bits 2i and 2i + 1: -1 -> 00, 0 -> 01, 1 -> 10."""
    field = {-1: 0b00, 0: 0b01, 1: 0b10}
    out = []
    for start in range(0, len(codes), 4):
        byte = 0
        for i in range(4):
            code = codes[start + i] if start + i < len(codes) else 0
            byte |= field[code] << (2 * i)
        out.append(byte)
    return out


def unpack_row_2bit(data: list[int], length: int) -> list[int]:
    """The first `length` codes of one row of bytes."""
    codes = []
    for byte in data:
        for i in range(4):
            codes.append(((byte >> (2 * i)) & 0b11) - 1)
    return codes[:length]


def pack_row_base3(codes: list[int]) -> list[int]:
    """Bytes of one row, five base-3 digits a byte, the first code the least significant digit."""
    out = []
    for start in range(0, len(codes), 5):
        group = [codes[start + i] if start + i < len(codes) else 0 for i in range(5)]
        byte = 0
        for code in reversed(group):  # Horner's rule, from the most significant digit down
            byte = byte * 3 + (code + 1)
        out.append(byte)
    return out


def unpack_row_base3(data: list[int], length: int) -> list[int]:
    """The first `length` codes of one row of bytes."""
    codes = []
    for byte in data:
        for _ in range(5):
            byte, digit = divmod(byte, 3)
            codes.append(digit - 1)
    return codes[:length]


def unpack_tile(data: list[int]) -> list[list[int]]:
    """The 16 x 16 codes of a tile of 64 bytes: byte 4r + c, bits 2f and 2f + 1 hold row r, column 4f + c."""
    return [
        [((data[4 * row + column % 4] >> (2 * (column // 4))) & 0b11) - 1 for column in range(16)]
        for row in range(16)
    ]
