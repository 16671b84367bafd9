"""Python objects that hold a data set (parsed JSON, an unpickled file, arrays by name) as a source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.columns import Targets, Values
from phase5_training.pipeline.formats.limits import check_width
from phase5_training.pipeline.formats.record_columns import (
    INPUT_KEYS,
    TARGET_KEYS,
    RecordColumns,
    choose_key,
    narrow,
    to_values,
)
from phase5_training.pipeline.formats.source import Access, ArraySource

QUALITY_KEYS = ("quality", "qualities")


def source_from_object(data: Any, format: str, path: str) -> ArraySource:
    """``{"samples": [...]}``, a list of records, or a mapping with inputs and targets.

    Args:
        data: the loaded object.
        format: its format's name, for the description.
        path: its file, for messages.

    Raises:
        DataError: the object has none of the three forms, or holds no records.

    Example:
        >>> source_from_object([{"input": [1, 2], "target": 0}], "json", "a.json").gather(np.array([0])).input
        array([[1, 2]])
    """
    metadata = {}
    if isinstance(data, Mapping):
        if "samples" in data:
            metadata = {str(k): v for k, v in data.items() if k != "samples"}
            data = data["samples"]
        elif any(key in data for key in INPUT_KEYS):
            return source_from_arrays(dict(data), format, path)
        else:
            keys = ", ".join(repr(str(key)) for key in list(data)[:6]) or "none"
            raise DataError(
                f"{path}: has no 'samples' list and no 'inputs' (its keys: {keys}); put the records there"
            )
    if not isinstance(data, (list, tuple)):
        raise DataError(f"{path}: holds {type(data).__name__}; wanted a list of records under 'samples'")
    if not data:
        raise DataError(f"{path}: the data set is empty; wanted at least one record in 'samples'")
    columns = RecordColumns()(data, range(len(data)))
    details = {"metadata": metadata} if metadata else {}
    return ArraySource.from_columns(format, [path], columns, **details)


def source_from_arrays(
    arrays: Mapping[str, Any],
    format: str,
    path: str,
    *,
    access: Access = "memory",
    details: dict[str, Any] | None = None,
) -> ArraySource:
    """Arrays by name: inputs, and perhaps targets and quality.

    Several targets are a mapping under ``targets``, or keys ``targets.NAME`` or ``targets/NAME``.

    Raises:
        DataError: no inputs, rows that do not match, or values that are neither numbers nor text.
    """
    try:
        input_key, target_key = choose_key(list(arrays), INPUT_KEYS), choose_key(list(arrays), TARGET_KEYS)
        quality_key = choose_key(list(arrays), QUALITY_KEYS)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if input_key is None:
        raise DataError(f"{path}: holds {sorted(map(str, arrays))[:8]}; wanted an array named 'inputs'")
    named = {k[8:]: v for k, v in arrays.items() if k.startswith(("targets.", "targets/"))}
    target: Targets = None
    if target_key is not None and isinstance(arrays[target_key], Mapping):
        named = dict(arrays[target_key])
    if named:
        target = {name: _column(value, f"targets.{name}", path) for name, value in sorted(named.items())}
    elif target_key is not None:
        target = _column(arrays[target_key], target_key, path)
    quality = None
    if quality_key is not None:
        found = _column(arrays[quality_key], quality_key, path)
        if not isinstance(found, np.ndarray):
            raise DataError(f"{path}: {quality_key} holds no plain numbers; wanted one number per record")
        quality = found.astype(np.float64)
        if quality.ndim != 1:
            raise DataError(f"{path}: {quality_key} has shape {quality.shape}; wanted one number per record")
    inputs = _column(arrays[input_key], input_key, path)
    if not len(inputs):
        raise DataError(f"{path}: {input_key} is empty; wanted at least one record")
    return ArraySource(format, [path], inputs, target, quality, access=access, details=details)


def _column(value: Any, name: str, path: str) -> Values:
    if hasattr(value, "detach"):
        # A view may say that its numbers are to be negated when they are read; numpy knows no such thing.
        value = value.detach().cpu().resolve_conj().resolve_neg()
        value = (value.float() if value.dtype.is_floating_point else value).numpy()
    if isinstance(value, (list, tuple)):
        values, bad = to_values(list(value), all_bad=False)
        if bad:
            row, reason = next(iter(bad.items()))
            raise DataError(f"{path}: {name} row {row} has {reason}")
        return values
    if not isinstance(value, np.ndarray):
        raise DataError(f"{path}: {name} is {type(value).__name__}; wanted an array or a list")
    value = np.asarray(value)
    if value.ndim == 0:
        raise DataError(f"{path}: {name} is a single number; wanted one row per record")
    check_width(f"{path}: {name}", value.shape, value.dtype)
    if value.dtype.kind in "US":
        return value.astype(str).tolist()
    if value.dtype.kind == "O":
        return _column(value.tolist(), name, path)
    try:
        narrow(value[:0])
    except ValueError as error:
        raise DataError(f"{path}: {name} has {error} (dtype {value.dtype}); wanted numbers") from error
    return value
