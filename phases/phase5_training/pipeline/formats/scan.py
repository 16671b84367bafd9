"""The one pass over the data before training: what is in it, and which records are left out.

The pass reads every record once with bounded memory (a torch Dataset is sampled). It checks shapes,
finite values, labels and the kinds of values, applies the quality threshold, and infers `DataSpec`.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.column_stats import ColumnStats, Reason, every_row, is_text, label_text
from phase5_training.pipeline.formats.columns import Columns, Ragged, Targets, Values, as_rows
from phase5_training.pipeline.formats.duplicates import Duplicates
from phase5_training.pipeline.formats.infer_spec import build_spec, kind_of_input
from phase5_training.pipeline.formats.policies import CHECKS, Policy, policy_of
from phase5_training.pipeline.formats.reading import tell_read
from phase5_training.pipeline.formats.selection import Selection
from phase5_training.pipeline.formats.source import Source, Tokenizer, known_length
from phase5_training.pipeline.formats.spec import (
    IGNORED_LABEL,
    MAX_CLASSES,
    DataSpec,
    InputChoice,
    InputKind,
    check_input_kind,
)

MAX_DETAIL = 300  # characters of what is said about a record; a file may bring keys of any length


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """What the scan checks; the fields are those of `DataConfig`."""

    task: str | None = None
    quality_threshold: float = 0.0
    invalid_records: Policy = "fail"
    input_kind: InputChoice = "auto"
    pad_id: int | None = None
    max_length: int | None = None
    keep_lengths: bool = False
    record_policies: Mapping[str, Policy] = field(default_factory=dict)
    max_dropped_share: float = 1.0
    num_classes: int | None = None
    reads: InputKind | None = None


@dataclass
class Scan:
    """What the pass found.

    ``keep``: the usable records, None when all are usable. ``longest``: tokens of the longest.
    ``lengths``: (records,) tokens of each, where they were asked for and differ.
    """

    spec: DataSpec
    records: int
    keep: Selection | None
    dropped: dict[str, int]
    truncated: int
    without_quality: int
    longest: int
    lengths: np.ndarray | None
    has_targets: bool


class Scanner:
    """Runs the pass; see `scan`."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, options: ScanOptions, reference: DataSpec | None
    ) -> None:
        self.source, self.tokenizer, self.options, self.reference = source, tokenizer, options, reference
        self.input = ColumnStats("input", pad=options.pad_id is not None)
        self.target: dict[str, ColumnStats] | None = None
        self.named = False
        self.dropped: Counter[str] = Counter()
        self.lost = array("q")
        self.duplicates = Duplicates() if "duplicate" in options.record_policies else None
        self.truncated = self.without_quality = 0
        self._lengths: list[tuple[np.ndarray, np.ndarray]] = []

    def _reasons(self, chunk: Columns, text: bool) -> dict[int, Reason]:
        """What is wrong with which rows of a chunk; quality first, so that a bad record may be low too."""
        bad: dict[int, Reason] = {}
        if self.options.quality_threshold > 0 and chunk.quality is not None:
            low = np.flatnonzero(chunk.quality < self.options.quality_threshold).tolist()
            limit = self.options.quality_threshold
            bad = {i: ("quality", f"has quality {chunk.quality[i]:g}, below {limit:g}") for i in low}
        found = self.input.check(chunk.input, text) | self._too_long(chunk)
        targets = _named(chunk.target)
        if self.target is None:
            self.target = {name: ColumnStats(_target_name(name)) for name in targets}
            self.named = isinstance(chunk.target, dict)
        if set(targets) != set(self.target):
            have = sorted(targets) if targets else "no target"
            want = sorted(self.target) if self.target else "none"
            sentence = f"has {have}, the records before it have {want}".replace("['']", "a target")
            return every_row(chunk.input, "target", sentence) | bad
        for name, values in targets.items():
            found |= self._target_reasons(self.target[name], values)
        return found | bad

    def _too_long(self, chunk: Columns) -> dict[int, Reason]:
        limit, values = self.options.max_length, chunk.input
        if limit is None or "too_long" not in self.options.record_policies or not isinstance(values, Ragged):
            return {}
        lengths = values.lengths
        rows = np.flatnonzero(lengths > limit + self._next_token(chunk)).tolist()
        return {i: ("too_long", f"has {lengths[i]} tokens as input, max_length is {limit}") for i in rows}

    def _target_reasons(self, stats: ColumnStats, values: Values) -> dict[int, Reason]:
        found = stats.check(values)
        task, what = self.options.task, stats.what
        if is_text(values) and self.reference is not None and self.reference.class_names is not None:
            known = set(self.reference.class_names)
            found |= {
                i: ("label", f"has label {row!r}, which training data lack")
                for i, row in enumerate(as_rows(values))
                if label_text(row) not in known
            }
        if not isinstance(values, np.ndarray) or values.ndim != 1 or task == "regression":
            return found
        if task == "classification" and values.dtype.kind == "f":
            broken = np.flatnonzero(values != np.floor(values)).tolist()
            found |= {i: ("label", f"has {what} {values[i]:g}, not a whole-numbered class") for i in broken}
        if task == "classification" or values.dtype.kind in "iu":
            found |= self._beyond(what, values)
        if values.dtype.kind in "iu":
            negative = np.flatnonzero((values < 0) & (values != IGNORED_LABEL)).tolist()
            found |= {i: ("label", f"has {what} {values[i]}; number the classes from 0") for i in negative}
        return found

    def _beyond(self, what: str, values: np.ndarray) -> dict[int, Reason]:
        """Labels that no class has: one of 10^12 would ask for as many outputs."""
        stated = self.options.num_classes
        rows = np.flatnonzero(values >= (stated or MAX_CLASSES)).tolist()
        limit = f"num_classes is {stated}" if stated else f"more than {MAX_CLASSES} classes"
        remedy = "" if stated else "; set task='regression' where it is a quantity"
        return {i: ("label", f"has {what} {values[i]:g}, {limit}{remedy}") for i in rows}

    def run(self, quarantine: Callable[[dict[str, Any]], None] | None) -> Scan:
        """Walk through the source."""
        kept = 0
        for chunk in self.source.iterate():
            for position, sentence in chunk.bad.items():
                self._drop(position, "unreadable", sentence, quarantine)
            text = is_text(chunk.input)
            if text:
                chunk.input = self.tokenizer.encode(chunk.input)  # type: ignore[arg-type]
            bad = self._reasons(chunk, text)
            for row, (tag, sentence) in sorted(bad.items()):
                self._drop(int(chunk.index[row]), tag, sentence, quarantine)
            if bad:
                chunk = chunk.take(np.setdiff1d(np.arange(len(chunk)), list(bad)))
            nothing_yet = not kept
            kept += len(chunk)
            self._take_in(chunk, text)
            tell_read(self.source.paths[0], kept + len(self.lost), known_length(self.source), "records")
            if nothing_yet and kept:  # at once, not after gigabytes
                self._check_kind(so_far=True)
        for position, first in sorted((self.duplicates.repeated() if self.duplicates else {}).items()):
            self._drop(position, "duplicate", f"is record {self.source.locate(first)[1]} again", quarantine)
            kept -= 1
        records = len(self.source)
        if not kept:
            if not self.dropped:
                raise DataError(f"{self.source.paths[0]}: the data set is empty; wanted at least one record")
            why = ", ".join(f"{name} {count}" for name, count in self.dropped.items())
            raise DataError(f"{self.source.paths[0]}: all {records} records were dropped ({why})")
        self._check_share(records)
        self._check_kind(so_far=False)
        keep = Selection.without(records, np.frombuffer(self.lost, np.int64)) if self.lost else None
        spec = build_spec(self, kept)
        lengths = None
        if self._lengths:
            lengths = np.zeros(records, np.int32)
            for index, found in self._lengths:
                lengths[index] = found
        return Scan(
            spec, records, keep, dict(self.dropped), self.truncated, self.without_quality,
            self.input.longest, lengths, bool(self.target),
        )  # fmt: skip

    def _check_kind(self, *, so_far: bool) -> None:
        """Refuse inputs that the model does not read; whole numbers may be followed by fractions."""
        kind, text = kind_of_input(self.input, self.options.input_kind), self.input.kind == "text"
        undecided = so_far and kind == "tokens" and not text
        if self.options.reads is not None and not undecided:
            check_input_kind(self.options.reads, kind, text=text)

    def _check_share(self, records: int) -> None:
        lost, limit = len(self.lost), self.options.max_dropped_share
        if lost <= limit * records:
            return
        why = ", ".join(f"{name} {count}" for name, count in self.dropped.most_common())
        raise DataError(
            f"{self.source.paths[0]}: {lost} of {records} records ({lost / records:.0%}) would be left out "
            f"({why}), more than max_dropped_share={limit:g}; `forge inspect-data` lists them: mend them, or "
            "allow a larger share"
        )

    def _take_in(self, chunk: Columns, text: bool) -> None:
        quality = np.full(len(chunk), np.nan) if chunk.quality is None else chunk.quality
        self.without_quality += int(np.isnan(quality).sum())
        self.input.update(chunk.input, text)
        if self.options.keep_lengths and isinstance(chunk.input, Ragged):
            self._lengths.append((chunk.index, chunk.input.lengths.astype(np.int32)))
        limit = self.options.max_length
        if limit is not None and isinstance(chunk.input, Ragged):
            extra = 1 if self._next_token(chunk) else 0
            self.truncated += int((chunk.input.lengths > limit + extra).sum())
        for name, values in _named(chunk.target).items():
            assert self.target is not None
            self.target[name].update(values)
        if self.duplicates is not None:
            self.duplicates.add(chunk)

    def _next_token(self, chunk: Columns) -> bool:
        return self.options.task == "next_token" or (self.options.task is None and chunk.target is None)

    def _drop(self, position: int, tag: str, sentence: str, quarantine: Callable | None) -> None:
        assert tag in CHECKS
        file, index = self.source.locate(position)
        if len(sentence) > MAX_DETAIL:
            sentence = sentence[:MAX_DETAIL] + " ..."
        if policy_of(tag, self.options.record_policies, self.options.invalid_records) == "fail":
            raise DataError(f"{file} record {index} {sentence}")
        self.dropped[tag] += 1
        self.lost.append(position)
        if quarantine is not None:
            quarantine({"file": file, "index": index, "reason": tag, "detail": sentence})


def _named(target: Targets) -> dict[str, Values]:
    if target is None:
        return {}
    return target if isinstance(target, dict) else {"": target}


def _target_name(name: str) -> str:
    return f"target {name!r}" if name else "target"


def scan(
    source: Source,
    tokenizer: Tokenizer,
    options: ScanOptions | None = None,
    *,
    reference: DataSpec | None = None,
    quarantine: Callable[[dict[str, Any]], None] | None = None,
) -> Scan:
    """Look at every record once.

    Args:
        source: the records.
        tokenizer: for text inputs.
        options: checks and policies.
        reference: the training data's spec, when these are validation data: class names are taken
            from it, and shapes must agree.
        quarantine: called with one dict for every record left out.

    Raises:
        DataError: naming the file and the record.

    Example:
        >>> from phase5_training.pipeline.formats.source import ArraySource
        >>> from phase5_training.pipeline.formats.text import ByteTokenizer
        >>> data = ArraySource("npy", ["x.npy"], np.ones((4, 3)), np.array([0, 1, 2, 1]))
        >>> scan(data, ByteTokenizer()).spec.num_classes
        3
    """
    return Scanner(source, tokenizer, options or ScanOptions(), reference).run(quarantine)
