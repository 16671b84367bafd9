"""Texts joined end to end and cut into blocks of one length, for next-token training without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.columns import Columns, Ragged
from phase5_training.pipeline.formats.source import Access, Source


class PackedText:
    """Blocks of ``block_length`` + 1 tokens of joined texts; neighbors share one, as in `TokenBlocks`.

    Only where the texts begin is held: a block reads the records that it is cut from.

    Args:
        source: of the texts.
        tokens: turns the records at some positions into tokens, one row each.
        records: positions of the texts that are used, in order.
        lengths: tokens of each of these.
        separator: token put after each text; None for none.
        block_length: tokens that a block teaches.
        vocab_size: of the tokens.

    Raises:
        DataError: all texts together are shorter than one block.
    """

    access: Access = "parsed"

    def __init__(
        self,
        source: Source,
        tokens: Callable[[np.ndarray], Ragged],
        records: np.ndarray,
        lengths: np.ndarray,
        *,
        separator: int | None,
        block_length: int,
        vocab_size: int | None,
    ) -> None:
        self._source, self._tokens, self._records = source, tokens, records
        self._separator, self._block, self.vocab_size = separator, block_length, vocab_size
        self.format, self.paths = source.format, source.paths
        self._ends = np.cumsum(lengths.astype(np.int64) + (separator is not None))
        self.tokens = int(self._ends[-1]) if len(records) else 0
        if self.tokens < block_length + 1:
            raise DataError(
                f"{self.paths[0]}: the texts have {self.tokens} tokens together, fewer than one block of "
                f"{block_length + 1}; set max_length to {max(self.tokens - 1, 1)} or less"
            )

    def __len__(self) -> int:
        return (self.tokens - 1) // self._block

    def gather(self, indices: np.ndarray) -> Columns:
        """See `Source.gather`."""
        places = np.asarray(indices, np.int64)[:, None] * self._block + np.arange(self._block + 1)
        texts = np.searchsorted(self._ends, places, side="right")
        wanted, which = np.unique(texts, return_inverse=True)
        rows = self._tokens(self._records[wanted])
        if self._separator is not None:
            rows = rows.followed_by(self._separator)
        begins = np.concatenate([[0], self._ends])[texts]
        flat = rows.flat[rows.offsets[which.reshape(texts.shape)] + places - begins]
        return Columns(np.asarray(indices, np.int64), flat)

    def iterate(self) -> Any:
        """See `Source.iterate`."""
        for start in range(0, len(self), 1024):
            yield self.gather(np.arange(start, min(start + 1024, len(self))))

    def locate(self, index: int) -> tuple[str, int]:
        """See `Source.locate`: the record in which a block begins."""
        text = int(np.searchsorted(self._ends, index * self._block, side="right"))
        return self._source.locate(int(self._records[text]))

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {
            **self._source.describe(),
            "records": len(self),
            "texts": len(self._records),
            "tokens": self.tokens,
            "tokens_unused": self.tokens - 1 - len(self) * self._block,
            "block_length": self._block,
        }
