"""Text: the two tokenizers, plain .txt files, and token streams cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phase5_training.errors import DataError, UsageError
from phase5_training.pipeline.formats.columns import Columns, Ragged, Texts
from phase5_training.pipeline.formats.limits import check_memory
from phase5_training.pipeline.formats.mapped_pages import TouchedPages
from phase5_training.pipeline.formats.source import CHUNK_BYTES, Access, ReadOptions, Tokenizer


class ByteTokenizer:
    """UTF-8 bytes as tokens: vocabulary 256, and 0 (NUL) is the padding.

    Example:
        >>> ByteTokenizer().encode(["ab", "c"]).flat.tolist()
        [97, 98, 99]
    """

    vocab_size = 256
    name = "bytes"
    separator: int | None = 0

    def encode(self, texts: Sequence[str | bytes] | Texts) -> Ragged:
        """One row of byte values per text; those of `Texts` are shared."""
        return (texts if isinstance(texts, Texts) else Texts.of(texts)).encoded


# How tokenizers name the token after a text.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class FileTokenizer:
    """A ``tokenizer.json`` of the tokenizers library; special tokens are added as the file says."""

    def __init__(self, path: str | Path) -> None:
        import tokenizers

        self.name = str(path)
        if not Path(path).is_file():
            raise UsageError(f"tokenizer={self.name!r} is not a file; use 'bytes' or the path of one")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UsageError(f"tokenizer={self.name!r} is no tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = self._tokenizer.get_vocab_size()
        known = (self._tokenizer.token_to_id(name) for name in _ENDS)
        self.separator: int | None = next((token for token in known if token is not None), None)

    def encode(self, texts: Sequence[str | bytes] | Texts) -> Ragged:
        """One row of token ids per text."""
        plain = [t.decode("utf-8", "replace") if isinstance(t, bytes) else t for t in texts]
        encoded = self._tokenizer.encode_batch_fast(plain)
        return Ragged.from_rows([np.array(e.ids, np.int32) for e in encoded])


def make_tokenizer(name: str | Path) -> Tokenizer:
    """``"bytes"``, or the tokenizer stored at a path."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)


class TokenBlocks:
    """Token streams cut into blocks of ``block_length`` + 1 tokens; neighbors share one token.

    The shared token lets each token be predicted exactly once: block i predicts tokens
    ``i * block_length + 1`` to ``(i + 1) * block_length``. What is left at the end of the stream is
    not used, and `describe` says how much that is.

    Args:
        streams: 1-D integer arrays, in memory or mapped; read as one stream, files joined end to end.

    Example:
        >>> blocks = TokenBlocks("bin", ["t.bin"], [np.arange(10)], block_length=3, vocab_size=10)
        >>> blocks.gather(np.array([2])).input.tolist()
        [[6, 7, 8, 9]]
    """

    def __init__(
        self,
        format: str,
        paths: list[str],
        streams: Sequence[np.ndarray],
        *,
        block_length: int,
        vocab_size: int | None,
        access: Access = "mapped",
        details: dict[str, Any] | None = None,
    ) -> None:
        self.format, self.paths, self.access, self.vocab_size = format, paths, access, vocab_size
        self._streams, self._block = list(streams), block_length
        self._starts = np.cumsum([0, *(len(s) for s in streams)])
        self._details = details or {}
        self._pages: TouchedPages | None = None
        self.tokens = int(self._starts[-1])
        if self.tokens < block_length + 1:
            raise DataError(
                f"{paths[0]}: {self.tokens} tokens are fewer than one block of {block_length + 1}; "
                f"set max_length to {max(self.tokens - 1, 1)} or less"
            )

    def __len__(self) -> int:
        return (self.tokens - 1) // self._block

    def _read(self, start: int, stop: int) -> np.ndarray:
        parts = []
        stream = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            offset = int(self._starts[stream])
            parts.append(self._streams[stream][start - offset : stop - offset])
            start, stream = max(start, int(self._starts[stream + 1])), stream + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def spare_memory(self) -> None:
        """Give mapped pages back as they were read."""
        self._pages = TouchedPages(self._streams)

    def gather(self, indices: np.ndarray) -> Columns:
        """See `Source.gather`."""
        indices = np.asarray(indices, np.int64)
        if self._pages is not None:
            blocks = int(indices.max()) + 1 - int(indices.min())
            self._pages.touch(blocks * self._block * self._streams[0].itemsize)
        if len(self._streams) == 1:
            # Overlapping rows of the stream: one copy each, without an index for every token.
            stream, step = self._streams[0], self._streams[0].strides[0]
            shape, strides = (len(self), self._block + 1), (self._block * step, step)
            rows = np.lib.stride_tricks.as_strided(stream, shape, strides, writeable=False)[indices]
        else:
            starts = (indices * self._block).tolist()
            rows = np.stack([self._read(start, start + self._block + 1) for start in starts])
        return Columns(indices, np.asarray(rows))

    def iterate(self) -> Iterator[Columns]:
        """See `Source.iterate`."""
        step = max(1, CHUNK_BYTES // (8 * (self._block + 1)))
        for start in range(0, len(self), step):
            yield self.gather(np.arange(start, min(start + step, len(self))))

    def locate(self, index: int) -> tuple[str, int]:
        """See `Source.locate`; the position is the block's number in the joined stream."""
        stream = int(np.searchsorted(self._starts, index * self._block, side="right")) - 1
        return self.paths[stream], index

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {
            "format": self.format,
            "access": self.access,
            "records": len(self),
            "tokens": self.tokens,
            "tokens_unused": self.tokens - 1 - len(self) * self._block,
            "block_length": self._block,
            **self._details,
        }


def open_text(paths: list[Path], options: ReadOptions) -> TokenBlocks:
    """Text files as one stream of bytes (mapped) or of tokens (held in memory).

    Raises:
        DataError: every file is empty, or together they are shorter than one block.
    """
    files = [path for path in paths if path.stat().st_size]
    if not files:
        raise DataError(f"{paths[0]}: the file is empty; a text needs at least two bytes")
    names, tokenizer = [str(path) for path in files], options.tokenizer or ByteTokenizer()
    details = {"files": len(paths), "tokenizer": tokenizer.name}
    if isinstance(tokenizer, ByteTokenizer):
        size = sum(path.stat().st_size for path in files)
        if options.loads(size):
            joined = b"".join(path.read_bytes() for path in files)
            streams, access = [np.frombuffer(joined, np.uint8)], "memory"
        else:
            streams, access = [np.memmap(path, np.uint8, mode="r") for path in files], "mapped"
        # Positions in a joined stream belong to no file; name them all in one when reporting.
        names = names if len(streams) == len(names) else [f"{names[0]} and {len(names) - 1} more"]
        return TokenBlocks(
            "text", names, streams, block_length=options.block_length,
            vocab_size=256, access=access, details=details,  # type: ignore[arg-type]
        )  # fmt: skip
    streams = []
    for path in files:
        check_memory(path, 8 * path.stat().st_size, "tokenizing the text")
        try:
            streams.append(tokenizer.encode([path.read_text("utf-8")]).flat)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start} is not UTF-8; use tokenizer='bytes'") from error
    return TokenBlocks(
        "text", names, streams, block_length=options.block_length,
        vocab_size=tokenizer.vocab_size, access="memory", details=details,
    )  # fmt: skip
