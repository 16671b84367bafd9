"""The order of samples: a pure function of (seed, epoch), with no state to save.

The keys come from numpy's Philox bit generator, whose raw output is fixed by its specification;
`Generator.permutation` is not used, as its result may change between numpy versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.selection import Selection

_SPLIT, _EPOCH, _WINDOW, _BLOCKS = 1, 2, 3, 4  # keep the draws for different purposes apart
_PIECE = 1 << 18  # records whose keys are held at a time; a multiple of 8


def draw(n: int, *seed: int) -> np.ndarray:
    """(n,) random uint64, fixed by a purpose, a seed and an epoch."""
    return np.random.Philox(np.random.SeedSequence(seed)).random_raw(n)


def sorted_places(keys: np.ndarray) -> np.ndarray:
    """(n,) int64 places that sort (n,) uint64 keys; equal ones keep their order.

    Example:
        >>> sorted_places(np.array([7, 3, 7, 0], np.uint64)).tolist()
        [3, 1, 0, 2]
    """
    # A stable sort takes 3 times as long or more, and random keys of 64 bits are hardly ever equal.
    places = np.argsort(keys)
    ascending = keys[places]
    return np.argsort(keys, kind="stable") if (ascending[1:] == ascending[:-1]).any() else places


def split_indices(
    records: int, keep: Selection | None, held_out: int, seed: int
) -> tuple[Selection, Selection]:
    """Divide records into (train, validation), in memory that grows by bits.

    A record's side hangs on (seed, its position) only, apart from the few at the border: each position draws
    a key, and the ``held_out`` smallest are for validation.

    Args:
        records: how many the source has.
        keep: the usable ones; None: all.
        held_out: how many go to validation.
        seed: fixes the choice.

    Example:
        >>> train, validation = split_indices(10, None, 3, seed=0)
        >>> len(train), len(validation), len(np.intersect1d(train.positions(), validation.positions()))
        (7, 3, 0)
    """
    keep = keep or Selection.without(records, ())
    counts = np.zeros(1 << 16, np.int64)
    for _, keys, usable in _keys(records, keep, seed):
        counts += np.bincount((keys[usable] >> 48).astype(np.int64), minlength=len(counts))
    # Keys whose first 16 bits are below the border are held out; of those at it the smallest.
    border = int(np.searchsorted(np.cumsum(counts), held_out))
    bits, places, at_border = [], list[np.ndarray](), list[np.ndarray]()
    for start, keys, usable in _keys(records, keep, seed):
        bits.append(np.packbits(usable & (keys >> 48 < border), bitorder="little"))
        near = np.flatnonzero(usable & (keys >> 48 == border))
        places.append(start + near)
        at_border.append(keys[near])
    chosen, few = np.concatenate(bits), np.concatenate(places)
    few = few[sorted_places(np.concatenate(at_border))][: held_out - int(counts[:border].sum())]
    np.bitwise_or.at(chosen, few // 8, np.uint8(1) << (few % 8).astype(np.uint8))
    return Selection(keep.bits(records) & ~chosen), Selection(chosen)


def _keys(records: int, keep: Selection, seed: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The key of each record and whether it is usable, in pieces: (where one begins, keys, mask)."""
    generator = np.random.Philox(np.random.SeedSequence((_SPLIT, seed)))
    for start in range(0, records, _PIECE):
        stop = min(start + _PIECE, records)
        yield start, generator.random_raw(stop - start), keep.mask(start, stop)


class EpochOrder:
    """The samples of an epoch in order, any stretch of it at once.

    Args:
        n: samples in an epoch.
        kept: their positions in the source; None: 0 to n - 1.
        seed: with the epoch's number it fixes the order.
        shuffle: False keeps the order of the source.
        window: None shuffles the whole epoch. A number shuffles only within windows of so many
            neighbors (their borders move from epoch to epoch), for data read forward.
        blocks: positions in the source at which blocks begin that are read as a whole, ascending from 0.
            With them the blocks are put in a random order, and the samples of each window of that
            order are shuffled.
        frugal: look positions up in bits and not in an array of them, which is faster and grows with n.

    Example:
        >>> order = EpochOrder(5, None, seed=0)
        >>> sorted(order.slice(epoch=3, start=0, stop=5).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        n: int,
        kept: Selection | None,
        *,
        seed: int,
        shuffle: bool = True,
        window: int | None = None,
        blocks: np.ndarray | None = None,
        frugal: bool = False,
    ) -> None:
        self.n, self._seed, self._shuffle = n, seed, shuffle
        self.indices = kept if kept is None or frugal else kept.positions()
        self.window = window if shuffle else None
        self._bounds: np.ndarray | None = None
        if blocks is not None and window is not None:
            starts = blocks if kept is None else kept.rank(blocks)
            self._bounds = np.unique(np.append(starts, n))
        # The permutations last used: of an epoch, or of a window of it, and of the blocks.
        self._kept: tuple[tuple[int, int], np.ndarray] | None = None
        self._kept_blocks: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def by_blocks(self) -> bool:
        """Whether windows are fixed stretches of an epoch, and made of whole blocks."""
        return self._bounds is not None and self._shuffle

    def _permutation(self, epoch: int, part: int, start: int, stop: int) -> np.ndarray:
        if self._kept is None or self._kept[0] != (epoch, part):
            keys = draw(stop - start, _EPOCH, self._seed, epoch, part)
            places = sorted_places(keys)
            self._kept = ((epoch, part), places + start if start else places)
        return self._kept[1]

    def slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64 positions of the samples ``start`` to ``stop`` of an epoch."""
        if not self._shuffle:
            places = np.arange(start, stop)
        elif self.window is None:
            places = self._permutation(epoch, 0, 0, self.n)[start:stop]
        elif self._bounds is not None:
            places = self._blockwise(epoch, start, stop, self.window)
        else:
            places = self._windowed(epoch, start, stop, self.window)
        return places.astype(np.int64) if self.indices is None else self.indices[places].astype(np.int64)

    def _windowed(self, epoch: int, start: int, stop: int, window: int) -> np.ndarray:
        shift = int(draw(1, _WINDOW, self._seed, epoch)[0] % window)
        parts = []
        while start < stop:
            part = (start + shift) // window
            first, last = max(part * window - shift, 0), min((part + 1) * window - shift, self.n)
            places = self._permutation(epoch, part, first, last)
            parts.append(places[start - first : stop - first])
            start = last
        return np.concatenate(parts)

    def _blockwise(self, epoch: int, start: int, stop: int, window: int) -> np.ndarray:
        parts = []
        while start < stop:
            part = start // window
            first, last = part * window, min((part + 1) * window, self.n)
            mixed = self._permutation(epoch, part + 1, 0, last - first)
            parts.append(self._in_block_order(epoch, first, last)[mixed[start - first : stop - first]])
            start = last
        return np.concatenate(parts)

    def _in_block_order(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The samples ``start`` to ``stop`` where the blocks of the epoch follow each other unshuffled."""
        assert self._bounds is not None
        if self._kept_blocks is None or self._kept_blocks[0] != epoch:
            order = sorted_places(draw(len(self._bounds) - 1, _BLOCKS, self._seed, epoch))
            ends = np.cumsum(np.diff(self._bounds)[order])
            self._kept_blocks = (epoch, order, ends)
        _, order, ends = self._kept_blocks
        first, last = np.searchsorted(ends, (start, stop - 1), side="right")
        near = order[first : last + 1]
        ranges = [np.arange(self._bounds[b], self._bounds[b + 1]) for b in near.tolist()]
        begin = int(ends[first]) - len(ranges[0])
        return np.concatenate(ranges)[start - begin : stop - begin]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which stretch of an epoch's order each batch takes, and which part of it a rank.

    A batch is divided among ``world_size`` ranks in order, into parts that differ by one sample at most.
    Neither its samples nor the number of batches depend on how many ranks there are.

    Args:
        samples: of an epoch.
        size: samples of a batch, all ranks together.
        drop_last: leave out the last batch when it is smaller.
        whole_tail: a last batch with fewer samples than ranks is joined to the one before it, as it may
            be where the bounds of batches do not matter: in validation.
        rank: from 0.
        world_size: number of ranks.

    Example:
        >>> [BatchPlan(samples=10, size=6, rank=r, world_size=2).share(1) for r in (0, 1)]
        [(6, 8), (8, 10)]
    """

    samples: int
    size: int
    drop_last: bool = False
    whole_tail: bool = False
    rank: int = 0
    world_size: int = 1

    @property
    def _tail(self) -> int:
        """Samples of the last batch where that is not a full one."""
        return self.samples % self.size

    @property
    def _joined(self) -> bool:
        return self.whole_tail and 0 < self._tail < self.world_size and self.samples >= self.size

    @cached_property
    def _batches(self) -> int:
        drops = self.drop_last or self._joined
        return self.samples // self.size if drops else -(-self.samples // self.size)

    def __len__(self) -> int:
        return self._batches

    def bounds(self, batch: int) -> tuple[int, int]:
        """Where a batch begins and ends in the order of the epoch."""
        last = batch == self._batches - 1 and not self.drop_last
        return batch * self.size, self.samples if last else (batch + 1) * self.size

    def share(self, batch: int) -> tuple[int, int]:
        """Where this rank's part of a batch begins and ends in the order of the epoch."""
        start, stop = self.bounds(batch)
        n = stop - start
        return start + n * self.rank // self.world_size, start + n * (self.rank + 1) // self.world_size

    def check(self, name: str) -> None:
        """Refuse a last batch that leaves a rank without a sample.

        Raises:
            DataError: names ``name``, the file.
        """
        start, stop = self.bounds(len(self) - 1)
        if stop - start < self.world_size:
            raise DataError(
                f"{name}: the last batch of an epoch has {stop - start} of {self.samples} samples, fewer "
                f"than one for each of {self.world_size} ranks; set drop_last=True, use another "
                "batch_size, or fewer ranks"
            )
