"""Some of the records of a source, one bit each: as many as a file holds, in hardly any memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
_WORD = 64  # records that are counted together


class Selection:
    """Chosen positions in ascending order. An array takes 8 bytes for each, this two bits for each record.

    Args:
        bits: (ceil(records / 8),) uint8, the bit of position p at ``bits[p // 8] >> p % 8``. Bits beyond the
            last record are 0.

    Example:
        >>> chosen = Selection.without(5, [1])
        >>> len(chosen), chosen[np.array([3, 0])].tolist(), chosen.positions().tolist()
        (4, [4, 0], [0, 2, 3, 4])
    """

    def __init__(self, bits: np.ndarray) -> None:
        # One word more than is needed: a rank may be asked for at the end.
        self._bytes = np.zeros((len(bits) // 8 + 1, 8), np.uint8)
        self._bytes.reshape(-1)[: len(bits)] = bits
        self._before = np.zeros(len(self._bytes) + 1, np.int64)
        np.cumsum(_ONES[self._bytes].sum(1, dtype=np.int64), out=self._before[1:])

    @classmethod
    def without(cls, records: int, left_out: Sequence[int] | np.ndarray) -> Selection:
        """All of so many records but some."""
        bits = np.full(-(-records // 8), 255, np.uint8)
        for gone in (np.asarray(left_out, np.int64), np.arange(records, 8 * len(bits))):
            np.bitwise_and.at(bits, gone // 8, ~(np.uint8(1) << (gone % 8).astype(np.uint8)))
        return cls(bits)

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """(n,) int64: the positions that are chosen as number ``places``, counted from 0."""
        words = np.searchsorted(self._before, places, side="right") - 1
        counts = np.cumsum(
            np.unpackbits(self._bytes[words], axis=1, bitorder="little"), axis=1, dtype=np.uint8
        )
        within = counts > (places - self._before[words])[:, None]
        return _WORD * words + within.argmax(1)

    def rank(self, positions: np.ndarray) -> np.ndarray:
        """(n,) int64: how many are chosen below each of ``positions``, the number of records at most."""
        words, rest = np.divmod(positions, _WORD)
        bits = np.unpackbits(self._bytes[words], axis=1, bitorder="little")
        return self._before[words] + (bits * (np.arange(_WORD) < rest[:, None])).sum(1, dtype=np.int64)

    def bits(self, records: int) -> np.ndarray:
        """The argument it was made from, for so many records."""
        return self._bytes.reshape(-1)[: -(-records // 8)]

    def mask(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) bool: whether each is chosen; ``start`` is a multiple of 8."""
        return np.unpackbits(self.bits(stop)[start // 8 :], count=stop - start, bitorder="little").astype(
            bool
        )

    def positions(self) -> np.ndarray:
        """(n,) int64: all of them."""
        return np.flatnonzero(np.unpackbits(self._bytes, bitorder="little"))
