"""Columns into batches: labels to class numbers, text to tokens, padding, next-token shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.column_stats import is_text, label_text
from phase5_training.pipeline.formats.columns import Columns, Ragged, Targets, Values, as_ragged, as_rows
from phase5_training.pipeline.formats.record_columns import narrow
from phase5_training.pipeline.formats.source import Source, Tokenizer
from phase5_training.pipeline.formats.spec import IGNORED_LABEL, DataSpec, TargetSpec

PAD_MULTIPLE = 8  # widths the matrix units like; also fewer distinct shapes to compile for


class Collator:
    """Makes batches of one data set.

    Args:
        spec: what the data are.
        tokenizer: for text inputs.

    Example:
        >>> from phase5_training.pipeline.formats.text import ByteTokenizer
        >>> spec = DataSpec(task="classification", input_kind="tokens", input_shape=(None,),
        ...                 input_dtype="int64", target_kind="class", class_names=("no", "yes"), ragged=True)
        >>> batch = Collator(spec, ByteTokenizer())(Columns(np.arange(2), ["a", "bcd"], ["yes", "no"]))
        >>> batch["input"].shape, batch["target"].tolist()
        (torch.Size([2, 8]), [1, 0])
    """

    def __init__(self, spec: DataSpec, tokenizer: Tokenizer) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        if spec.target_kind == "multi":
            self._targets = spec.targets
        else:
            self._targets = {"": TargetSpec(kind=spec.target_kind, class_names=spec.class_names)}
        self._codes = {
            name: {label: i for i, label in enumerate(target.class_names)}
            for name, target in self._targets.items()
            if target.class_names is not None
        }

    def encode(self, columns: Columns) -> Columns:
        """Text to tokens and labels to numbers: the part worth doing once and keeping."""
        if columns.bad:
            position, reason = next(iter(columns.bad.items()))
            raise DataError(f"record {position} {reason}; the data changed after they were checked")
        inputs, target = self._numbers(columns.input, self.spec.ragged), columns.target
        encoded: Targets
        if self.spec.task == "next_token":
            encoded = None
            if target is not None:  # a text to follow a text: only the second is learned
                answers = as_rows(self._numbers(target, True))  # type: ignore[arg-type]
                prompts = as_rows(inputs)
                inputs = Ragged.from_rows([np.concatenate(p) for p in zip(prompts, answers, strict=True)])
                ignored = [np.full(len(p), IGNORED_LABEL, np.int64) for p in prompts]
                encoded = Ragged.from_rows([np.concatenate(p) for p in zip(ignored, answers, strict=True)])
        elif isinstance(target, dict):
            encoded = {name: self._label(name, target[name]) for name in self._targets}
        else:
            encoded = None if target is None else self._label("", target)
        return Columns(columns.index, inputs, encoded, columns.quality)

    def _numbers(self, values: Values, ragged: bool) -> Values:
        if is_text(values):
            return self.tokenizer.encode(values)  # type: ignore[arg-type]
        if isinstance(values, list):
            return as_ragged(values) if ragged else self._stacked(values)
        return as_ragged(values) if ragged else values

    def _stacked(self, values: list) -> np.ndarray:
        try:
            return np.stack(values)
        except ValueError as error:
            shapes = sorted({np.shape(v) for v in values})[:4]
            raise DataError(
                f"inputs of shapes {shapes} in one batch; wanted {self.spec.input_shape}"
            ) from error

    def _label(self, name: str, values: Values) -> Values:
        if name in self._codes and isinstance(values, list):
            codes = self._codes[name]
            try:
                return np.array([codes[label_text(label)] for label in values], np.int64)
            except KeyError as error:
                raise DataError(
                    f"label {error} is none of the {len(codes)} classes found before training"
                ) from None
        if isinstance(values, list):
            return np.stack(values)
        return as_ragged(values) if self.spec.ragged and self.spec.target_kind == "tokens" else values

    def __call__(self, columns: Columns) -> dict[str, Any]:
        """A batch: ``input`` (n, ...), ``target`` (n, ...) or a dict of them, ``index`` (n,) int64."""
        return self.collate(self.encode(columns))

    def collate(self, columns: Columns) -> dict[str, Any]:
        """Encoded columns as tensors."""
        spec = self.spec
        inputs: Any
        target: Any
        if spec.task == "next_token":
            inputs, target = self._next_token(columns.input, columns.target)
        else:
            inputs = self._input(columns.input)
            if spec.target_kind == "multi":
                assert isinstance(columns.target, dict)
                target = {
                    name: torch.from_numpy(_cast(columns.target[name], self._targets[name].kind))
                    for name in self._targets
                }
            elif spec.target_kind == "tokens":
                target = torch.from_numpy(self._positions(columns.target, inputs.shape[1]))
            else:
                target = torch.from_numpy(_cast(columns.target, spec.target_kind))
            inputs = torch.from_numpy(inputs)
        return {"input": inputs, "target": target, "index": torch.from_numpy(columns.index)}

    def collate_parts(self, columns: Columns, sizes: list[int]) -> list[dict[str, Any]]:
        """Encoded columns of several batches as those; without padding they share memory."""
        if not self.spec.ragged or len(sizes) == 1:
            return split_batch(self.collate(columns), sizes)
        # Each batch is as wide as its own longest sequence.
        ends = np.cumsum(sizes).tolist()
        rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        return [self.collate(columns.take(part)) for part in rows]

    def _width(self, longest: int) -> int:
        """Columns for sequences up to ``longest``: a multiple of 8, never more than max_length."""
        width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
        return width if self.spec.max_length is None else min(width, self.spec.max_length)

    def _input(self, values: Values) -> np.ndarray:
        if isinstance(values, Ragged):
            return values.padded(self._width(int(values.lengths.max())), self.spec.pad_id)
        if self.spec.input_kind == "features":
            return _owned(np.asarray(values), np.float32)
        array = np.asarray(values)
        if self.spec.max_length is not None and array.ndim > 1:
            array = array[:, : self.spec.max_length]
        return _owned(array, np.int64)

    def _positions(self, values: Any, width: int) -> np.ndarray:
        """Per-position labels, cut and padded as the inputs are."""
        if isinstance(values, Ragged):
            return values.padded(width, IGNORED_LABEL)
        array = _owned(values[:, :width], np.int64)
        short = width - array.shape[1]
        return np.pad(array, ((0, 0), (0, short)), constant_values=IGNORED_LABEL) if short else array

    def _next_token(self, values: Values, target: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(values, Ragged):
            width = self._width(max(int(values.lengths.max()) - 1, 1)) + 1
            tokens = values.padded(width, self.spec.pad_id)
            wanted = (values if target is None else target).padded(width, IGNORED_LABEL)
        else:
            limit = None if self.spec.max_length is None else self.spec.max_length + 1
            tokens = wanted = _owned(np.asarray(values)[:, :limit], np.int64)
        inputs = torch.from_numpy(tokens)[:, :-1].contiguous()
        return inputs, torch.from_numpy(wanted)[:, 1:].contiguous()


class HeldSamples:
    """All samples of data as one batch, from which others are taken: nothing is cast or encoded again.

    Args:
        whole: the batch.
        positions: (n,) int64, ascending: those of its samples in the source; None for 0 to n - 1.

    Example:
        >>> whole = {"input": torch.eye(2), "target": torch.tensor([5, 6]), "index": torch.tensor([3, 8])}
        >>> HeldSamples(whole, np.array([3, 8])).take(np.array([8, 3, 8]))["target"].tolist()
        [6, 5, 6]
    """

    def __init__(self, whole: Mapping[str, Any], positions: np.ndarray | None) -> None:
        self._input, self._target, self._positions = whole["input"], whole["target"], positions

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        """The samples at the (n,) int64 positions ``indices`` as a batch."""
        places = indices if self._positions is None else np.searchsorted(self._positions, indices)
        rows, target = torch.from_numpy(places), self._target
        if isinstance(target, dict):
            target = {name: values.index_select(0, rows) for name, values in target.items()}
        else:
            target = target.index_select(0, rows)
        index = torch.from_numpy(indices)
        return {"input": self._input.index_select(0, rows), "target": target, "index": index}


def split_batch(batch: Mapping[str, Any], sizes: list[int]) -> list[dict[str, Any]]:
    """A batch in pieces of so many samples, which share its memory.

    Example:
        >>> whole = {"input": torch.arange(3), "target": torch.ones(3), "index": torch.arange(3)}
        >>> [piece["input"].tolist() for piece in split_batch(whole, [2, 1])]
        [[0, 1], [2]]
    """
    target: Any = batch["target"]
    pieces: Sequence[Any]
    if isinstance(target, dict):
        columns = zip(*(values.split(sizes) for values in target.values()), strict=True)
        pieces = [dict(zip(target, part, strict=True)) for part in columns]
    else:
        pieces = target.split(sizes)
    parts = zip(batch["input"].split(sizes), pieces, batch["index"].split(sizes), strict=True)
    return [{"input": x, "target": y, "index": index} for x, y, index in parts]


def _owned(array: np.ndarray, dtype: type) -> np.ndarray:
    """Of the wanted type, in one piece, and writable: torch shares the memory."""
    if array.dtype.kind == "f" and dtype is np.float32:
        array = narrow(array)
    array = np.ascontiguousarray(array, dtype)
    return array if array.flags.writeable else array.copy()


def _cast(values: Any, kind: str) -> np.ndarray:
    return _owned(np.asarray(values), np.float32 if kind == "float" else np.int64)


class SampleCache:
    """Encoded samples of a source that has to parse text for each, the latest used kept.

    Args:
        capacity: samples kept, at most.
        limit: bytes that they take, at most.
    """

    def __init__(self, source: Source, collator: Collator, capacity: int, limit: int) -> None:
        self._source, self._collator, self._capacity = source, collator, capacity
        self._kept: LRUCache[int, tuple] = LRUCache(limit, getsizeof=_row_bytes)
        self.hits = self.lookups = 0

    def fetch(self, indices: np.ndarray) -> Columns:
        """Encoded columns of the samples at ``indices``, reading only those not kept."""
        wanted = indices.tolist()
        rows = {i: self._kept[i] for i in wanted if i in self._kept}
        missing = [i for i in dict.fromkeys(wanted) if i not in rows]
        self.lookups += len(wanted)
        self.hits += len(wanted) - len(missing)
        if missing:
            columns = self._collator.encode(self._source.gather(np.array(missing, np.int64)))
            for i, row in zip(missing, _split(columns), strict=True):
                rows[i] = row
                while len(self._kept) >= self._capacity:
                    self._kept.popitem()
                if _row_bytes(row) <= self._kept.maxsize:
                    self._kept[i] = row
        return _join(np.asarray(indices, np.int64), [rows[i] for i in wanted], self._collator.spec.ragged)


def _row_bytes(row: tuple) -> int:
    value, target = row
    parts = [value, *(target.values() if isinstance(target, dict) else [target])]
    return sum(128 + part.nbytes for part in parts if part is not None)  # 128: of the array itself


def _split(columns: Columns) -> list[tuple]:
    # Copies, so that a kept row does not hold the whole batch it came with.
    inputs = [np.array(row) for row in as_rows(columns.input)]
    target = columns.target
    if target is None:
        return [(row, None) for row in inputs]
    if isinstance(target, dict):
        names = list(target)
        parts = zip(*(as_rows(target[name]) for name in names), strict=True)
        return [(row, dict(zip(names, part, strict=True))) for row, part in zip(inputs, parts, strict=True)]
    return [(row, np.array(t)) for row, t in zip(inputs, as_rows(target), strict=True)]


def _join(index: np.ndarray, rows: list[tuple], ragged: bool) -> Columns:
    inputs, first = _stack([row[0] for row in rows], ragged), rows[0][1]
    target: Targets
    if first is None:
        target = None
    elif isinstance(first, dict):
        target = {name: _stack([row[1][name] for row in rows], False) for name in first}
    else:
        target = _stack([row[1] for row in rows], ragged and first.ndim == 1 and first.dtype.kind == "i")
    return Columns(index, inputs, target)


def _stack(rows: list, ragged: bool) -> Values:
    return Ragged.from_rows(rows) if ragged else np.stack(rows)
