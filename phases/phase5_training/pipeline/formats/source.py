"""What a reader is: `Source`, and the sources that several formats share.

Two ways of reading: `gather` fetches any records by position (one call per column), `iterate` walks
the file in order with bounded memory. A source that cannot seek gathers through `SequentialWindow`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.columns import (
    Columns,
    Ragged,
    Targets,
    Texts,
    Values,
    concat,
    gather_parts,
    take_target,
    take_values,
)
from phase5_training.pipeline.formats.mapped_pages import TouchedPages

CHUNK_BYTES = 8 << 20  # what one chunk of a walk through a file may hold
CHUNK_ROWS = 4096

Access = Literal["memory", "mapped", "parsed"]


class Tokenizer(Protocol):
    """Turns text into token ids; see formats/text.py for the two that exist."""

    vocab_size: int
    name: str
    separator: int | None

    def encode(self, texts: Sequence[str | bytes] | Texts) -> Ragged:
        """One row of token ids per text."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a file is to be opened.

    ``streaming``: keep no whole file in memory. ``window`` (records): how far apart the records of
    neighboring batches may lie. ``block_length`` (tokens): inputs cut from token streams.
    ``memory_limit`` (bytes): larger files are mapped or indexed instead of loaded. ``inputs_path`` and
    ``targets_path`` name arrays in an HDF5 file.
    """

    streaming: bool = False
    window: int = 4096
    block_length: int = 256
    memory_limit: int = 1 << 30
    inputs_path: str | None = None
    targets_path: str | None = None
    tokenizer: Tokenizer | None = None

    def loads(self, size: int) -> bool:
        """Whether something of ``size`` bytes is to be held in memory."""
        return not self.streaming and size <= self.memory_limit


class Source(Protocol):
    """Records of one or several files, by position.

    ``access`` says what a gather costs: "memory" and "mapped" are array indexing, "parsed" decodes
    text and is worth caching. ``vocab_size`` is set where the file declares one.
    """

    format: str
    vocab_size: int | None
    paths: list[str]

    @property
    def access(self) -> Access:
        """What a gather costs."""
        ...

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> Columns:
        """The records at ``indices`` (any order, repeats allowed), in that order."""
        ...

    def iterate(self) -> Iterator[Columns]:
        """Every record in file order, in chunks of bounded size."""
        ...

    def locate(self, index: int) -> tuple[str, int]:
        """The file a record is in and its position there."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the run's record says about these files."""
        ...


@runtime_checkable
class Blocked(Protocol):
    """A source whose files are read in blocks: one record costs what all of its block cost."""

    def blocks(self) -> np.ndarray | None:
        """Positions at which blocks begin, ascending from 0; None where there are none after all."""
        ...


@runtime_checkable
class MayBeForwardOnly(Protocol):
    """A source that perhaps cannot seek."""

    @property
    def forward_only(self) -> bool:
        """Whether its records must be asked for nearly in the order of the file."""
        ...


@runtime_checkable
class CountedLater(Protocol):
    """A source whose length takes a walk through it, until that was made."""

    @property
    def known_length(self) -> int | None:
        """Its records; None before the walk."""
        ...


def known_length(source: Source) -> int | None:
    """How many records a source has, where that takes no walk."""
    return source.known_length if isinstance(source, CountedLater) else len(source)


def is_forward_only(source: Source) -> bool:
    """Whether the records of a source must be asked for nearly in the order of the file."""
    return isinstance(source, MayBeForwardOnly) and source.forward_only


def blocks_of(source: Source) -> np.ndarray | None:
    """Where the blocks of a source begin, if it is read in blocks."""
    return source.blocks() if isinstance(source, Blocked) else None


class ArraySource:
    """Records held as arrays, in memory or mapped from a file; a gather is one index per column.

    Example:
        >>> source = ArraySource("npy", ["x.npy"], np.eye(3), np.array([5, 6, 7]))
        >>> source.gather(np.array([2, 0])).target.tolist()
        [7, 5]
    """

    def __init__(
        self,
        format: str,
        paths: list[str],
        input: Values,
        target: Targets = None,
        quality: np.ndarray | None = None,
        *,
        access: Access = "memory",
        details: dict[str, Any] | None = None,
        bad: dict[int, str] | None = None,
        index: np.ndarray | None = None,
    ) -> None:
        self.format, self.paths, self.access = format, paths, access
        self.vocab_size: int | None = None
        self._bad = bad or {}
        # Without unreadable records a position is a row: no array of them is held.
        self._index = index if self._bad else None
        self._columns = Columns(np.empty(0, np.int64), input, target, quality, self._bad)
        self._details = details or {}
        self._pages: TouchedPages | None = None
        self._check()

    @classmethod
    def from_columns(cls, format: str, paths: list[str], columns: Columns, **details: Any) -> ArraySource:
        """Hold columns that a record reader made."""
        return cls(
            format, paths, columns.input, columns.target, columns.quality,
            bad=columns.bad, index=columns.index, details=details,
        )  # fmt: skip

    def _check(self) -> None:
        columns = self._columns
        n = len(columns.input)
        named = columns.target if isinstance(columns.target, dict) else {"targets": columns.target}
        for name, values in {**named, "quality": columns.quality}.items():
            if values is not None and len(values) != n:
                raise DataError(
                    f"{self.paths[0]}: inputs has {n} rows and {name} has {len(values)}; "
                    "they need one row each per record"
                )

    def __len__(self) -> int:
        return len(self._columns.input) + len(self._bad)

    def _take(self, rows: np.ndarray | slice, index: np.ndarray) -> Columns:
        columns = self._columns
        quality = None if columns.quality is None else columns.quality[rows]
        return Columns(index, take_values(columns.input, rows), take_target(columns.target, rows), quality)

    def spare_memory(self) -> None:
        """Give mapped pages back as they were read."""
        target = self._columns.target
        named = list(target.values()) if isinstance(target, dict) else [target]
        self._pages = TouchedPages([self._columns.input, self._columns.quality, *named])

    def gather(self, indices: np.ndarray) -> Columns:
        """See `Source.gather`."""
        if self._pages is not None:
            self._pages.touch((int(indices.max()) + 1 - int(indices.min())) * self._row_bytes)
        index = np.asarray(indices, np.int64)
        return self._take(index if self._index is None else np.searchsorted(self._index, index), index)

    @property
    def _row_bytes(self) -> int:
        values = self._columns.input
        return max(values[:1].nbytes, 1) if isinstance(values, np.ndarray) else 1024

    def iterate(self) -> Iterator[Columns]:
        """See `Source.iterate`."""
        step = max(1, min(CHUNK_BYTES // self._row_bytes, 1 << 16))
        n = len(self._columns.input)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            chunk = self._take(
                rows, np.arange(start, rows.stop) if self._index is None else self._index[rows]
            )
            if self._pages is not None:
                self._pages.touch(step * self._row_bytes)
            if start == 0:
                chunk.bad = self._bad
            yield chunk
        if not n and self._bad:
            yield self._columns

    def locate(self, index: int) -> tuple[str, int]:
        """See `Source.locate`."""
        return self.paths[0], index

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {"format": self.format, "access": self.access, "records": len(self), **self._details}


class ShardedSource:
    """Several files of one format, one after another, as one source."""

    def __init__(self, shards: Sequence[Source]) -> None:
        self._shards = list(shards)
        self.format = shards[0].format
        sizes = {s.vocab_size for s in shards}
        if len(sizes) > 1:
            raise DataError(
                f"{shards[0].paths[0]}: the files state different vocabularies {sorted(map(str, sizes))}"
            )
        self.vocab_size = sizes.pop()
        self.paths = [path for s in shards for path in s.paths]

    @property
    def access(self) -> Access:
        """See `Source`: the dearest of any shard, which decides whether caching pays."""
        return max((s.access for s in self._shards), key=("memory", "mapped", "parsed").index)

    @cached_property
    def _starts(self) -> np.ndarray:
        # Not before it is needed: a file that is not indexed yet is read for its length.
        return np.cumsum([0, *(len(s) for s in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def known_length(self) -> int | None:
        """See `CountedLater`."""
        lengths = [known_length(shard) for shard in self._shards]
        return None if None in lengths else sum(n for n in lengths if n is not None)

    def _shift(self, columns: Columns, start: int) -> Columns:
        columns.index = columns.index + start
        columns.bad = {position + start: reason for position, reason in columns.bad.items()}
        return columns

    def gather(self, indices: np.ndarray) -> Columns:
        """See `Source.gather`."""
        return gather_parts(self._starts, indices, self._gather_of)

    def _gather_of(self, number: int, indices: np.ndarray) -> Columns:
        start = int(self._starts[number])
        return self._shift(self._shards[number].gather(indices - start), start)

    def iterate(self) -> Iterator[Columns]:
        """See `Source.iterate`."""
        start = 0
        for shard in self._shards:
            for chunk in shard.iterate():
                yield self._shift(chunk, start)
            start += len(shard)

    @property
    def forward_only(self) -> bool:
        """See `MayBeForwardOnly`."""
        return any(is_forward_only(shard) for shard in self._shards)

    def blocks(self) -> np.ndarray | None:
        """See `Blocked`."""
        found = [blocks_of(shard) for shard in self._shards]
        known = [
            part + start for part, start in zip(found, self._starts[:-1], strict=True) if part is not None
        ]
        return np.concatenate(known) if len(known) == len(found) else None

    def locate(self, index: int) -> tuple[str, int]:
        """See `Source.locate`."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[shard].locate(index - int(self._starts[shard]))

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {
            "format": self.format,
            "access": self.access,
            "records": len(self),
            "files": len(self._shards),
        }


class SequentialWindow:
    """Gathers from a file that can only be read forward.

    Keeps the chunks around the last request. It works because streaming asks for records in nearly
    file order: a request may reach back at most ``window`` records. A request before that (a new
    epoch, a seek) starts reading the file again.

    Args:
        open_chunks: starts a walk through the file in order.
        window: records a later request may lie behind an earlier one.
    """

    def __init__(self, open_chunks: Callable[[], Iterator[Columns]], window: int) -> None:
        self._open, self._window = open_chunks, window
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._walk: Iterator[Columns] | None = None
        self._chunks: list[Columns] = []
        self._floor = 0  # records before this one are gone

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": self._open, "_window": self._window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open, self._window = state["_open"], state["_window"]
        self._reset()

    def gather(self, indices: np.ndarray) -> Columns:
        """See `Source.gather`."""
        low, high = int(indices.min()), int(indices.max())
        # A walk begun before a fork shares its file offset with the parent process.
        if low < self._floor or self._pid != os.getpid():
            self._reset()
        self._walk = self._walk or self._open()
        while not self._chunks or self._chunks[-1].index[-1] < high:
            chunk = next(self._walk, None)
            if chunk is None:
                raise DataError(f"record {high} is missing: the file became shorter during the run")
            if len(chunk):
                self._chunks.append(chunk)
            while len(self._chunks) > 1 and self._chunks[0].index[-1] < low - self._window:
                self._floor = int(self._chunks.pop(0).index[-1]) + 1
        near = [c for c in self._chunks if c.index[-1] >= low and c.index[0] <= high]
        held = concat(near)
        return held.take(np.searchsorted(held.index, indices))
