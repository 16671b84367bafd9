"""From what a scan saw to a `DataSpec`: kinds of input and target, classes, vocabulary, shapes."""

from __future__ import annotations

from typing import Any, Protocol

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.column_stats import ColumnStats
from phase5_training.pipeline.formats.source import Source, Tokenizer
from phase5_training.pipeline.formats.spec import (
    MAX_VOCABULARY,
    DataSpec,
    InputChoice,
    InputKind,
    TargetSpec,
)

# More distinct labels than this, in more than half of the records, are free text.
MAX_LABELS = 1000


class Seen(Protocol):
    """What the pass over the data hands on; `scan.Scanner` is one."""

    source: Source
    tokenizer: Tokenizer
    options: Any
    reference: DataSpec | None
    input: ColumnStats
    target: dict[str, ColumnStats] | None
    named: bool


def build_spec(seen: Seen, kept: int) -> DataSpec:
    """The spec of ``kept`` records that passed the scan.

    Raises:
        DataError: the task and the data, or these data and the training data, do not go together.
    """
    return _Builder(seen).build(kept)


def kind_of_input(column: ColumnStats, wanted: InputChoice) -> InputKind:
    """Whether the inputs, as far as they were seen, are features or token ids."""
    if column.kind == "text":
        return "tokens"
    if wanted != "auto":
        return wanted
    # Images and negative numbers cannot be token ids.
    ids = column.kind == "int" and len(column.shape or ()) <= 1 and column.low >= 0
    return "tokens" if ids else "features"


class _Builder:
    def __init__(self, seen: Seen) -> None:
        self.seen, self.options, self.path = seen, seen.options, seen.source.paths[0]

    def _input_kind(self) -> InputKind:
        column, wanted = self.seen.input, self.options.input_kind
        if wanted == "tokens" and column.kind == "float":
            raise DataError(f"{self.path}: input_kind='tokens', but the inputs are not whole numbers")
        return kind_of_input(column, wanted)

    def _target(self, name: str, column: ColumnStats, kept: int, tokens: bool) -> TargetSpec:
        task = self.options.task
        if column.kind == "text":
            names = self._class_names(name, column, kept)
            top = len(names) - 1
            return TargetSpec(kind="class", num_classes=len(names), class_names=names, label_range=(0, top))
        shape: tuple[int | None, ...] = (None,) if column.ragged else tuple(column.shape or ())
        whole = column.kind == "int" and task != "regression"
        if shape == () and (whole or task == "classification"):
            high = max(column.high, 0)
            return TargetSpec(kind="class", num_classes=high + 1, label_range=(column.low, high))
        source = self.seen.input
        if whole and tokens and len(shape) == 1 and (source.ragged or shape == source.shape):
            span = (column.low, column.high)
            return TargetSpec(kind="tokens", shape=shape, num_classes=column.high + 1, label_range=span)
        if task == "classification":
            raise DataError(
                f"{self.path}: task='classification', but targets have shape {shape}; one label each"
            )
        return TargetSpec(kind="float", shape=shape)

    def _class_names(self, name: str, column: ColumnStats, kept: int) -> tuple[str, ...]:
        reference = self.seen.reference
        known = None
        if reference is not None:
            known = reference.targets[name].class_names if name else reference.class_names
        if known is not None:
            return known
        if self.options.task == "regression":
            raise DataError(f"{self.path}: task='regression', but the targets are text; wanted numbers")
        if len(column.names) > MAX_LABELS and len(column.names) > kept / 2:
            raise DataError(
                f"{self.path}: {len(column.names)} different target texts in {kept} records look like "
                "text to write, not like labels; set task='next_token'"
            )
        return tuple(sorted(column.names))

    def build(self, kept: int) -> DataSpec:
        column, task = self.seen.input, self.options.task
        kind, targets = self._input_kind(), self.seen.target or {}
        if not targets and task not in (None, "next_token"):
            raise DataError(f"{self.path}: task={task!r} needs targets, and the records have none")
        shape: tuple[int | None, ...] = (None,) if column.ragged else tuple(column.shape or ())
        limit = self.options.max_length
        common: dict[str, Any] = {
            "input_kind": kind,
            "input_dtype": "int64" if kind == "tokens" else "float32",
            "ragged": column.ragged,
            "pad_id": self.options.pad_id or 0 if column.kind != "text" else 0,
            "max_length": limit,
            "tokenizer": self.seen.tokenizer.name if column.kind == "text" else None,
        }
        if kind == "tokens":
            vocab = self.seen.tokenizer.vocab_size if column.kind == "text" else self.seen.source.vocab_size
            if vocab is None and column.high >= MAX_VOCABULARY:
                raise DataError(
                    f"{self.path}: holds {column.high} among whole numbers, more than any vocabulary "
                    f"({MAX_VOCABULARY}); set input_kind='features' if they are quantities"
                )
            if vocab is not None and column.high >= vocab:
                raise DataError(
                    f"{self.path}: holds token {column.high}, but the vocabulary has {vocab} tokens"
                )
            common |= {"vocab_size": vocab or column.high + 1, "max_token": column.high}
            if limit is not None and shape and shape[0] is not None:
                shape = (min(shape[0], limit),)
        if task == "next_token" or not targets:
            return self._next_token(kind, shape, targets, common)
        if self.seen.named:
            specs = {
                name: self._target(name, stats, kept, kind == "tokens") for name, stats in targets.items()
            }
            self._same_as_reference(kind, shape)
            return DataSpec(
                task="multi_task", input_shape=shape, target_kind="multi", targets=specs, **common
            )
        target = self._target("", targets[""], kept, kind == "tokens")
        self._same_as_reference(kind, shape)
        inferred = {"class": "classification", "float": "regression", "tokens": "classification"}[target.kind]
        return DataSpec(
            task=task or inferred, input_shape=shape, target_kind=target.kind, target_shape=target.shape,
            num_classes=target.num_classes, class_names=target.class_names,
            label_range=target.label_range, **common,
        )  # fmt: skip

    def _next_token(
        self,
        kind: str,
        shape: tuple[int | None, ...],
        targets: dict[str, ColumnStats],
        common: dict[str, Any],
    ) -> DataSpec:
        if kind != "tokens" or len(shape) != 1:
            raise DataError(
                f"{self.path}: the records have no targets and their inputs are not sequences of tokens; "
                "add a 'target' to each record"
            )
        if targets and (self.seen.named or targets[""].kind != "text" or self.seen.input.kind != "text"):
            raise DataError(
                f"{self.path}: next-token training takes no targets, or text to follow a text input"
            )
        column, limit = self.seen.input, common["max_length"]
        if not column.ragged:
            length = (column.shape or (0,))[0] - 1
            if length < 1:
                raise DataError(f"{self.path}: sequences of one token leave nothing to predict")
            shape = (min(length, limit) if limit else length,)
        self._same_as_reference(kind, shape)
        return DataSpec(
            task="next_token", input_shape=shape, target_kind="tokens", target_shape=shape,
            num_classes=common["vocab_size"], **common,
        )  # fmt: skip

    def _same_as_reference(self, kind: str, shape: tuple[int | None, ...]) -> None:
        other = self.seen.reference
        if other is None:
            return
        if kind != other.input_kind or (
            shape != other.input_shape and not (self.seen.input.ragged or other.ragged)
        ):
            raise DataError(
                f"{self.path}: inputs are {kind} of shape {shape}, the training data's are "
                f"{other.input_kind} of shape {other.input_shape}"
            )
