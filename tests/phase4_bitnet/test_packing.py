"""Packed codes against plain loops, hand-made bytes and round trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.packing import pack_row_2bit, pack_row_base3, unpack_row_2bit, unpack_row_base3
from phase4_bitnet.packing import pack_codes, packed_bytes, packed_shape, unpack_codes

ORACLES = {"2bit": (pack_row_2bit, unpack_row_2bit), "base3": (pack_row_base3, unpack_row_base3)}
encodings = pytest.mark.parametrize("encoding", list(ORACLES))


def int8(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


@pytest.mark.parametrize(
    ("encoding", "codes", "golden"),
    [
        # 2bit, written by hand as bits, the first code rightmost: -1 = 00, 0 = 01, 1 = 10.
        ("2bit", [-1, -1, -1, -1], [0b00_00_00_00]),
        ("2bit", [0, 0, 0, 0], [0b01_01_01_01]),
        ("2bit", [1, 1, 1, 1], [0b10_10_10_10]),
        ("2bit", [1, 0, -1, 1], [0b10_00_01_10]),
        ("2bit", [1, -1, -1, -1, 1], [0b00_00_00_10, 0b01_01_01_10]),
        # base 3: 1, 3, 9, 27, 81 times 0, 1 or 2.
        ("base3", [-1, -1, -1, -1, -1], [0]),
        ("base3", [1, 1, 1, 1, 1], [242]),
        ("base3", [1, -1, -1, -1, -1], [2]),
        ("base3", [-1, -1, -1, -1, 1], [162]),
        ("base3", [0], [121]),
        ("base3", [1, 0, -1, 1, -1, -1], [2 + 3 + 54, 120]),
    ],
)
def test_golden_bytes(encoding: str, codes: list[int], golden: list[int]) -> None:
    packed = pack_codes(int8(codes), encoding)
    assert packed.tolist() == golden
    assert unpack_codes(packed, (len(codes),), encoding).tolist() == codes


@encodings
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_match_the_plain_loops(encoding: str, data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 23))
    row = st.lists(st.sampled_from([-1, 0, 1]), min_size=length, max_size=length)
    codes = data.draw(st.lists(row, min_size=rows, max_size=rows))
    pack, unpack = ORACLES[encoding]
    tensor = int8(codes).reshape(rows, length)
    packed = pack_codes(tensor, encoding)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [pack(r) for r in codes]
    assert [unpack(r, length) for r in packed.tolist()] == codes
    assert torch.equal(unpack_codes(packed, (rows, length), encoding), tensor)


@encodings
@given(shape=st.lists(st.integers(0, 7), max_size=4), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_round_trip_of_any_shape(encoding: str, shape: list[int], seed: int) -> None:
    codes = torch.randint(-1, 2, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, encoding)
    assert tuple(packed.shape) == packed_shape(shape, encoding)
    assert packed.numel() == packed_bytes(shape, encoding)
    back = unpack_codes(packed, shape, encoding)
    assert back.dtype == torch.int8
    assert back.shape == codes.shape
    assert torch.equal(back, codes)


@encodings
def test_views_pack_like_their_copies(encoding: str) -> None:
    codes = torch.randint(-1, 2, (9, 7), dtype=torch.int8)
    assert torch.equal(pack_codes(codes.t(), encoding), pack_codes(codes.t().contiguous(), encoding))


@encodings
def test_one_bit_codes_round_trip(encoding: str) -> None:
    codes = torch.randint(0, 2, (5, 33), dtype=torch.int8) * 2 - 1
    assert torch.equal(unpack_codes(pack_codes(codes, encoding), (5, 33), encoding), codes)


def test_sizes() -> None:
    assert packed_bytes((4, 8)) == 8
    assert packed_bytes((4, 9)) == 12
    assert packed_bytes((4, 10), "base3") == 8
    assert packed_bytes((4, 11), "base3") == 12
    assert packed_bytes(()) == 1
    assert packed_bytes((0, 8)) == 0


@encodings
@pytest.mark.parametrize("bad", [2, -2, 127, -128])
def test_codes_outside_the_three_levels_are_refused(encoding: str, bad: int) -> None:
    with pytest.raises(ValueError, match="wanted -1, 0 or 1"):
        pack_codes(int8([[0, 1, bad]]), encoding)


def test_wrong_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"wanted torch\.int8"):
        pack_codes(torch.zeros(4))
    with pytest.raises(TypeError, match=r"wanted torch\.uint8"):
        unpack_codes(torch.zeros(1, dtype=torch.int8), (4,))


def test_every_byte_is_either_codes_or_refused() -> None:
    expected = {
        "2bit": {b for b in range(256) if all(b >> shift & 3 != 3 for shift in (0, 2, 4, 6))},
        "base3": set(range(3**5)),
    }
    assert len(expected["2bit"]) == 3**4
    for encoding, length in (("2bit", 4), ("base3", 5)):
        for byte in range(256):
            packed = torch.tensor([byte], dtype=torch.uint8)
            if byte in expected[encoding]:
                assert pack_codes(unpack_codes(packed, (length,), encoding), encoding).tolist() == [byte]
            else:
                with pytest.raises(ValueError, match=f"byte {byte} is not a {encoding} byte"):
                    unpack_codes(packed, (length,), encoding)


def test_wrong_shape_padding_and_encoding_are_refused() -> None:
    packed = pack_codes(torch.ones(2, 8, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"wanted \(2, 3\)"):
        unpack_codes(packed, (2, 9))
    with pytest.raises(ValueError, match="padding after 7 codes"):
        unpack_codes(packed, (2, 7))
    with pytest.raises(ValueError, match="unknown; use one of '2bit', 'base3'"):
        pack_codes(torch.zeros(4, dtype=torch.int8), "4bit")
