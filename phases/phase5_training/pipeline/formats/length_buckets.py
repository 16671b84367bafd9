"""Batches of samples of like length, so that little of them is padding."""

from __future__ import annotations

import numpy as np

from phase5_training.pipeline.formats.order import EpochOrder, draw, sorted_places

STRETCH_BATCHES = 64  # batches whose samples are sorted by length together
_BUCKETS = 5  # keeps these draws apart from those of the order itself


class LengthBuckets:
    """Another order, in stretches that are sorted by length and cut into batches in a random order.

    Within a stretch of 64 batches a sample meets those of about its length; which samples make a stretch, and
    in which order its batches come, is drawn anew each epoch. A function of (seed, epoch), as the order is.

    Args:
        order: of the samples.
        lengths: (records,) tokens of each record of the source.
        size: samples of a batch, all ranks together.
        seed: fixes the order of the batches.

    Example:
        >>> order = EpochOrder(6, None, seed=0)
        >>> buckets = LengthBuckets(order, np.array([9, 1, 9, 1, 9, 1]), size=3, seed=0)
        >>> sorted(sorted(buckets.slice(0, start, start + 3).tolist()) for start in (0, 3))
        [[0, 2, 4], [1, 3, 5]]
    """

    by_blocks = False

    def __init__(self, order: EpochOrder, lengths: np.ndarray, size: int, seed: int) -> None:
        self._order, self._lengths, self._size, self._seed = order, lengths, size, seed
        self.n, self.window, self.indices = order.n, order.window, order.indices
        self._kept: tuple[tuple[int, int], np.ndarray] | None = None

    def slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64 positions of the samples ``start`` to ``stop`` of an epoch."""
        span, parts = STRETCH_BATCHES * self._size, []
        while start < stop:
            first = start // span * span
            stretch = self._stretch(epoch, first, min(first + span, self.n))
            parts.append(stretch[start - first : stop - first])
            start = first + len(stretch)
        return np.concatenate(parts)

    def _stretch(self, epoch: int, first: int, last: int) -> np.ndarray:
        if self._kept is None or self._kept[0] != (epoch, first):
            samples = self._order.slice(epoch, first, last)
            samples = samples[np.argsort(self._lengths[samples], kind="stable")]
            # A batch that is not full stays at the end, where the epoch has its short one.
            full = len(samples) // self._size
            batches = sorted_places(draw(full, _BUCKETS, self._seed, epoch, first))
            mixed = samples[: full * self._size].reshape(full, self._size)[batches].reshape(-1)
            self._kept = ((epoch, first), np.concatenate([mixed, samples[full * self._size :]]))
        return self._kept[1]
