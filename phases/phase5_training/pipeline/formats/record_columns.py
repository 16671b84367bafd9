"""Loose records (dicts) into columns, each held to the form of the first one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phase5_training.pipeline.formats.columns import Columns, Ragged, Targets, Values

# Names under which users keep the same two things; the first is the one our messages recommend.
INPUT_KEYS = ("input", "inputs", "text", "x", "X", "input_ids")
TARGET_KEYS = ("target", "targets", "label", "labels", "y", "Y")


def narrow(array: np.ndarray) -> np.ndarray:
    """Floats as float32, integers and booleans as int64; ValueError with the reason otherwise."""
    if array.dtype.kind in "bi":
        return array.astype(np.int64, copy=False)
    if array.dtype.kind == "u":
        if array.dtype.itemsize == 8 and array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError("an integer beyond 64 signed bits")
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)
    held = {"U": "text among numbers", "S": "text among numbers", "O": "null or mixed values"}
    raise ValueError(held.get(array.dtype.kind, f"values of type {array.dtype}"))


def _maybe_rounded(array: np.ndarray) -> bool:
    """Whether numpy may have made floats of integers: it does where one is beyond 64 signed bits."""
    return array.dtype == np.float64 and bool((np.abs(array) >= 2.0**63).any())


def _holds_huge(row: Any) -> bool:
    if isinstance(row, (list, tuple)):
        return any(_holds_huge(value) for value in row)
    return isinstance(row, int) and not -(2**63) <= row < 2**63


def to_values(rows: list, *, all_bad: bool = True) -> tuple[Values, dict[int, str]]:
    """Turn Python or numpy rows of one kind into a column.

    Args:
        rows: numbers, lists of numbers, arrays or text.
        all_bad: False stops at the first row that cannot be converted.

    Returns:
        The column of the rows that could be converted, and {row: reason} for those that could not.

    Example:
        >>> to_values([[1, 2], [3, 4]])[0].tolist()
        [[1, 2], [3, 4]]
        >>> to_values([[1.0], [None]])[1]
        {1: 'null or mixed values'}
    """
    if rows and isinstance(rows[0], (str, bytes)):
        return rows, {}
    try:
        array = np.array(rows)
        if not _maybe_rounded(array):
            return narrow(array), {}
    except (ValueError, TypeError, OverflowError):
        pass  # some row is ragged or not numeric: find out which
    good: list[np.ndarray] = []
    bad: dict[int, str] = {}
    for i, row in enumerate(rows):
        try:
            array = np.array(row)
            if _maybe_rounded(array) and _holds_huge(row):
                raise ValueError("an integer beyond 64 signed bits")
            good.append(narrow(array))
        except (TypeError, OverflowError):
            bad[i] = "null or mixed values"
        except ValueError as error:
            text = str(error)
            bad[i] = "lists of different lengths inside one record" if "homogeneous" in text else text
        if bad and not all_bad:
            break
    if len({a.shape for a in good}) == 1:
        return np.stack(good), bad
    if good and all(a.ndim == 1 and (a.dtype.kind == "i" or a.size == 0) for a in good):
        return Ragged.from_rows([a.astype(np.int64, copy=False) for a in good]), bad
    return good, bad


_KINDS: dict[type, str] = {
    str: "text", bytes: "text", int: "a number", float: "a number", bool: "a number",
    list: "a list", tuple: "a list", dict: "named values", type(None): "nothing",
}  # fmt: skip


def _kind(value: Any) -> str:
    kind = _KINDS.get(type(value))
    if kind is not None:
        return kind
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind in "US":
            return "text"
        return "a list" if value.ndim else "a number"
    return f"a {type(value).__name__}"


def _plain(value: Any) -> Any:
    """Torch tensors (whatever their device) and numpy text as what the converters know."""
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    return value.item() if isinstance(value, np.generic) else value


def choose_key(keys: Sequence[str], known: tuple[str, ...]) -> str | None:
    """The one of ``known`` among ``keys``; None when absent; ValueError when two are there."""
    found = [key for key in known if key in keys]
    if len(found) > 1:
        raise ValueError(f"has both {found[0]!r} and {found[1]!r}; keep one of them")
    return found[0] if found else None


class RecordColumns:
    """Turns loose records into `Columns`, holding every record to the form of the first one.

    A record is ``{"input": ..., "target": ..., "metadata": {"quality": q}}``; the keys of
    `INPUT_KEYS` and `TARGET_KEYS` are accepted in the place of the first two.
    """

    def __init__(self) -> None:
        self.input_key: str | None = None
        self.target_key: str | None = None
        self.kinds: tuple[str, str] | None = None
        self.names: set[str] = set()

    def _learn(self, record: Mapping[str, Any]) -> None:
        self.input_key = choose_key(list(record), INPUT_KEYS)
        self.target_key = choose_key(list(record), TARGET_KEYS) or TARGET_KEYS[0]
        if self.input_key is None:
            keys = ", ".join(map(repr, list(record)[:6])) or "none"
            raise ValueError(f"has no 'input' (its keys: {keys}); name the input 'input'")

    def _split(self, record: Any) -> tuple[Any, Any, float]:
        """(input, target, quality) of one record; ValueError with the reason."""
        if not isinstance(record, Mapping):
            raise ValueError(f"is {_kind(record)}, not an object with 'input' and 'target'")
        if self.input_key is None:
            self._learn(record)
        if self.input_key not in record:
            raise ValueError(f"has no {self.input_key!r}")
        value, target = _plain(record[self.input_key]), _plain(record.get(self.target_key))
        kinds = (_kind(value), _kind(target))
        if self.kinds is None:
            if kinds[0] not in ("text", "a number", "a list"):
                raise ValueError(f"has {kinds[0]} as input; wanted text or numbers")
            self.kinds = kinds
            if kinds[1] == "named values":
                self.names = set(target)
        if kinds != self.kinds:
            what, i = ("input", 0) if kinds[0] != self.kinds[0] else ("target", 1)
            raise ValueError(f"has {kinds[i]} as {what}, the first record has {self.kinds[i]}")
        if self.names and set(target) != self.names:
            raise ValueError(f"names the targets {sorted(target)}, the first record {sorted(self.names)}")
        return value, target, self._quality(record)

    @staticmethod
    def _quality(record: Mapping[str, Any]) -> float:
        metadata = record.get("metadata")
        quality = metadata.get("quality") if isinstance(metadata, Mapping) else record.get("quality")
        if quality is None:
            return float("nan")
        if isinstance(quality, bool) or not isinstance(quality, (int, float, np.number)):
            raise ValueError(f"has quality {quality!r}, not a number")
        try:
            value = float(quality)
        except OverflowError:
            value = math.inf
        if math.isinf(value):
            raise ValueError("has a quality beyond the range of numbers")
        return value

    def __call__(self, records: Sequence[Any], index: Sequence[int]) -> Columns:
        """Convert ``records``, whose positions in the source are ``index``."""
        inputs, targets, quality, kept = [], [], [], []
        bad: dict[int, str] = {}
        said: dict[str, str] = {}
        for position, record in zip(index, records, strict=True):
            try:
                value, target, q = self._split(record)
            except ValueError as error:
                # One text for all that fail alike: a file may bring millions.
                reason = str(error)
                bad[int(position)] = said.setdefault(reason, reason)
                continue
            inputs.append(value)
            targets.append(target)
            quality.append(q)
            kept.append(int(position))
        return self._columns(inputs, targets, quality, kept, bad)

    def _columns(
        self, inputs: list, targets: list, quality: list, kept: list[int], bad: dict[int, str]
    ) -> Columns:
        while True:
            values, wrong = to_values(inputs)
            reasons = {i: f"has {reason} in its input" for i, reason in wrong.items()}
            target: Targets = None
            if self.names:
                target = {}
                for name in sorted(self.names):
                    target[name], wrong = to_values([t[name] for t in targets])
                    reasons |= {i: f"has {reason} in target {name!r}" for i, reason in wrong.items()}
            elif self.kinds is not None and self.kinds[1] != "nothing":
                if self.kinds[1] not in ("text", "a number", "a list"):
                    reasons |= dict.fromkeys(range(len(targets)), f"has {self.kinds[1]} as target")
                else:
                    target, wrong = to_values(targets)
                    reasons |= {i: f"has {reason} in its target" for i, reason in wrong.items()}
            if not reasons:
                break
            bad |= {kept[i]: reason for i, reason in reasons.items()}
            rows = [i for i in range(len(kept)) if i not in reasons]
            inputs, targets = [inputs[i] for i in rows], [targets[i] for i in rows]
            quality, kept = [quality[i] for i in rows], [kept[i] for i in rows]
        known = np.array(quality, np.float64)
        return Columns(
            np.array(kept, np.int64), values, target, None if np.isnan(known).all() else known, bad
        )
