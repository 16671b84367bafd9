"""``forge inspect-data``: what data files hold, what is wrong with them, what training would make of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phase5_training.errors import DataError
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.formats import open_source
from phase5_training.pipeline.formats.column_stats import is_text, label_text
from phase5_training.pipeline.formats.columns import Columns, Ragged, Texts, Values, as_rows
from phase5_training.pipeline.formats.policies import OPTIONAL
from phase5_training.pipeline.formats.scan import ScanOptions, scan
from phase5_training.pipeline.formats.source import Source
from phase5_training.pipeline.formats.spec import normalize_task
from phase5_training.pipeline.formats.text import make_tokenizer

BINS = 10  # of the quality histogram
MOST_SHAPES = 5
MOST_CLASSES = 1000  # that are counted; more are no classes
EXAMPLES = 3  # of each reason for leaving a record out
MOST_NUMBERS = 8  # of a sample record
MOST_TEXT = 80


class Figures:
    """Count, range, mean and deviation of numbers that arrive in parts.

    Example:
        >>> figures = Figures()
        >>> figures.add(np.array([1.0, 3.0, np.nan]))
        >>> figures.result()
        {'count': 3, 'not_finite': 1, 'min': 1.0, 'max': 3.0, 'mean': 2.0, 'std': 1.0}
    """

    def __init__(self) -> None:
        self._count = self._finite = 0
        self._low, self._high, self._mean, self._squares = math.inf, -math.inf, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """Take in numbers of any shape."""
        numbers = np.asarray(values, np.float64).reshape(-1)
        self._count += len(numbers)
        numbers = numbers[np.isfinite(numbers)]
        n = len(numbers)
        if not n:
            return
        self._low, self._high = min(self._low, float(numbers.min())), max(self._high, float(numbers.max()))
        # Chan, Golub and LeVeque 1979: joining means and sums of squares without cancellation.
        mean, total = float(numbers.mean()), self._finite + n
        shift = mean - self._mean
        self._squares += float(((numbers - mean) ** 2).sum()) + shift**2 * self._finite * n / total
        self._mean += shift * n / total
        self._finite = total

    def result(self) -> dict[str, Any]:
        """The figures; without finite numbers only the counts."""
        found: dict[str, Any] = {"count": self._count, "not_finite": self._count - self._finite}
        if self._finite:
            deviation = math.sqrt(self._squares / self._finite)
            found |= {"min": self._low, "max": self._high, "mean": self._mean, "std": deviation}
        return found


class Column:
    """What one column holds: kinds of values, shapes, figures, and how often each class occurs."""

    def __init__(self, classes: bool) -> None:
        self._kinds: Counter[str] = Counter()
        self._shapes: Counter[tuple[int, ...]] = Counter()
        self._numbers, self._lengths = Figures(), Figures()
        self._classes: Counter[str] | None = Counter() if classes else None

    def add(self, values: Values) -> None:
        """Take in some rows."""
        if not len(values):
            return
        if isinstance(values, Texts) or is_text(values):
            texts = [label_text(text) for text in as_rows(values)]
            self._kinds["text"] += len(texts)
            self._lengths.add(np.array([len(text) for text in texts]))
            self._count(texts)
        elif isinstance(values, Ragged):
            self._kinds[str(values.flat.dtype)] += len(values)
            for length, n in zip(*np.unique(values.lengths, return_counts=True), strict=True):
                self._shapes[(int(length),)] += int(n)
            self._lengths.add(values.lengths)
            self._numbers.add(values.flat)
            self._classes = None
        elif isinstance(values, np.ndarray):
            self._kinds[str(values.dtype)] += len(values)
            self._shapes[values.shape[1:]] += len(values)
            self._numbers.add(values)
            self._count(_labels(values))
        else:
            for row in values:
                self._kinds[str(row.dtype)] += 1
                self._shapes[row.shape] += 1
                self._numbers.add(row)
            self._classes = None

    def _count(self, labels: list[str] | None) -> None:
        if labels is None or self._classes is None:
            self._classes = None
            return
        self._classes.update(labels)
        if len(self._classes) > MOST_CLASSES:
            self._classes = None

    def result(self) -> dict[str, Any]:
        """What was seen, as JSON can hold it."""
        found: dict[str, Any] = {"kinds": dict(self._kinds.most_common())}
        if self._shapes:
            found["shapes"] = [
                {"shape": list(shape), "records": n} for shape, n in self._shapes.most_common(MOST_SHAPES)
            ]
            found["different_shapes"] = len(self._shapes)
            found["numbers"] = self._numbers.result()
        if "count" in (lengths := self._lengths.result()) and lengths["count"]:
            found["lengths"] = lengths
        if self._classes:
            found["classes"] = dict(sorted(self._classes.items(), key=lambda item: (-item[1], item[0])))
        return found


def _labels(values: np.ndarray) -> list[str] | None:
    """Whole numbers, one a record, as the names of classes; None where they are something else."""
    if values.ndim != 1 or values.dtype.kind not in "iubf":
        return None
    if values.dtype.kind == "f" and not bool((values == np.floor(values)).all()):
        return None
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in values.tolist()]


class Observed:
    """A source whose records are looked at as they pass."""

    def __init__(self, source: Source, look: Callable[[Columns], None]) -> None:
        self._source, self._look = source, look

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def iterate(self) -> Iterator[Columns]:
        """See `Source.iterate`."""
        for chunk in self._source.iterate():
            self._look(chunk)
            yield chunk


class _Report:
    """Collects what `inspect_data` returns."""

    def __init__(self, source: Source, samples: int) -> None:
        self._source, self._samples = source, samples
        self.input, self.targets = Column(classes=False), dict[str, Column]()
        self.quality, self.stated = Figures(), np.zeros(BINS, np.int64)
        self.records: list[dict[str, Any]] = []
        self.reasons: dict[str, dict[str, Any]] = {}
        self.readable = 0

    def look(self, chunk: Columns) -> None:
        self.readable += len(chunk)
        self.input.add(chunk.input)
        named = chunk.target if isinstance(chunk.target, dict) else {"": chunk.target}
        for name, values in named.items():
            if values is not None:
                self.targets.setdefault(name, Column(classes=True)).add(values)
        if chunk.quality is not None:
            stated = chunk.quality[~np.isnan(chunk.quality)]
            self.quality.add(stated)
            places = np.clip((stated * BINS).astype(np.int64), 0, BINS - 1)
            self.stated += np.bincount(places, minlength=BINS)
        for row in range(min(len(chunk), self._samples - len(self.records))):
            self.records.append(self._sample(chunk, row))

    def _sample(self, chunk: Columns, row: int) -> dict[str, Any]:
        file, index = self._source.locate(int(chunk.index[row]))
        one = chunk.take(slice(row, row + 1))
        found: dict[str, Any] = {"file": file, "index": index, "input": _shown(one.input)}
        if isinstance(one.target, dict):
            found["target"] = {name: _shown(values) for name, values in one.target.items()}
        elif one.target is not None:
            found["target"] = _shown(one.target)
        if one.quality is not None and not np.isnan(one.quality[0]):
            found["quality"] = float(one.quality[0])
        return found

    def drop(self, record: Mapping[str, Any]) -> None:
        reason = self.reasons.setdefault(record["reason"], {"records": 0, "examples": []})
        reason["records"] += 1
        if len(reason["examples"]) < EXAMPLES:
            reason["examples"].append({key: record[key] for key in ("file", "index", "detail")})

    def result(self) -> dict[str, Any]:
        dropped = sum(reason["records"] for reason in self.reasons.values())
        records = len(self._source)
        quality = self.quality.result()
        if quality["count"]:
            edges = [i / BINS for i in range(BINS + 1)]
            quality["histogram"] = [
                {"from": low, "to": high, "records": int(n)}
                for low, high, n in zip(edges, edges[1:], self.stated, strict=False)
            ]
        return {
            "records": records,
            "readable": self.readable,
            "would_be_dropped": dropped,
            "dropped_share": dropped / records if records else 0.0,
            "reasons": self.reasons,
            "input": self.input.result(),
            "targets": {name or "target": column.result() for name, column in self.targets.items()},
            "quality": {**quality, "without": self.readable - quality["count"]},
            "samples": self.records,
        }


def inspect_data(
    paths: Sequence[str | Path],
    config: DataConfig | None = None,
    *,
    samples: int = 3,
    quarantine: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    r"""Look at every record of data files.

    Args:
        paths: files, folders or patterns of one format.
        config: how the data would be read for training; bad records are counted whatever its policies.
        samples: records to show, from the beginning.
        quarantine: called with a dict for every record that training would leave out.

    Returns:
        Files, counts, columns (kinds, shapes, figures, classes), quality with a histogram, records that
        would be left out by reason with examples, sample records, and under "training" what the data are
        to a run. "problem" is why a run would refuse them, or None.

    Raises:
        DataError: the files cannot be opened at all.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "a.jsonl"
        >>> _ = path.write_text('{"input": [1, 2], "target": 0}\n{"input": [3], "target": 1}')
        >>> found = inspect_data([path])
        >>> found["records"], found["reasons"]["shape"]["records"], found["targets"]["target"]["classes"]
        (2, 1, {'0': 1, '1': 1})
    """
    config = config or DataConfig()
    source = open_source(list(paths), config.read_options())
    config.check_format(source)
    report, tokenizer = _Report(source, samples), make_tokenizer(config.tokenizer)
    policies = dict.fromkeys((*OPTIONAL,) if config.max_length else ("duplicate",), "drop")
    options = ScanOptions(
        task=normalize_task(config.task), quality_threshold=config.quality_threshold, invalid_records="drop",
        input_kind=config.input_kind, pad_id=config.pad_id, max_length=config.max_length,
        record_policies=policies, num_classes=config.num_classes,  # type: ignore[arg-type]
    )  # fmt: skip

    def drop(record: dict[str, Any]) -> None:
        report.drop(record)
        if quarantine is not None:
            quarantine(record)

    problem, training = None, None
    try:
        found = scan(Observed(source, report.look), tokenizer, options, quarantine=drop)
        training = {**found.spec.to_dict(), "truncated": found.truncated}
    except DataError as error:
        problem = str(error)
    return {
        "files": [{"path": str(p), "bytes": Path(p).stat().st_size} for p in source.paths[:20]],
        "more_files": max(0, len(source.paths) - 20),
        "format": source.format,
        "source": source.describe(),
        **report.result(),
        "training": training,
        "problem": problem,
    }


def _shown(values: Values) -> Any:
    """One row as something to read: numbers and text are cut."""
    row = values.row(0) if isinstance(values, Ragged) else values[0]
    if isinstance(row, (str, bytes)):
        text = label_text(row)
        return text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + " ..."
    flat = np.asarray(row).reshape(-1)
    numbers = [
        v if not isinstance(v, float) or math.isfinite(v) else str(v) for v in flat[:MOST_NUMBERS].tolist()
    ]
    if np.ndim(row) == 0:
        return numbers[0]
    return [*numbers, f"... {len(flat)} numbers"] if len(flat) > MOST_NUMBERS else numbers
