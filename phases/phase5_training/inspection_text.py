"""What ``inspect_data`` found, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from phase5_training.errors import printable

SHOWN_CLASSES = 20
BAR = 30


def as_text(found: Mapping[str, Any]) -> str:
    """The report of :func:`phase5_training.inspection.inspect_data` in lines; what files bring is escaped."""
    return "\n".join(printable(line) for line in _lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    for file in found["files"]:
        yield f"{file['path']}  {file['bytes']} bytes"
    if found["more_files"]:
        yield f"and {found['more_files']} files more"
    yield f"{found['format']}: {found['records']} records, {found['readable']} can be read"
    yield f"input: {_column(found['input'])}"
    for name, column in found["targets"].items():
        yield f"{name}: {_column(column)}"
        yield from _classes(column.get("classes"))
    yield from _quality(found["quality"])
    if training := found["training"]:
        shape = tuple(training["input_shape"])
        yield (
            f"training: task {training['task']}, {training['input_kind']} of shape {shape} as "
            f"{training['input_dtype']}, target {training['target_kind']}"
            + (f", {training['num_classes']} classes" if training["num_classes"] else "")
            + (f", {training['truncated']} records would be cut" if training["truncated"] else "")
        )
    for sample in found["samples"]:
        parts = [f"{key} {_value(sample[key])}" for key in ("input", "target", "quality") if key in sample]
        yield f"record {sample['index']}: {'  '.join(parts)}"
    share = f"{found['dropped_share']:.1%}"
    yield f"bad or repeated: {found['would_be_dropped']} records ({share})"
    for reason, listed in found["reasons"].items():
        yield f"  {reason}: {listed['records']}"
        for example in listed["examples"]:
            yield f"    {example['file']} record {example['index']} {example['detail']}"


def _column(column: Mapping[str, Any]) -> str:
    parts = [", ".join(f"{kind} ({n})" for kind, n in column["kinds"].items()) or "nothing"]
    if "shapes" in column:
        shapes = [f"{tuple(s['shape'])} x {s['records']}" for s in column["shapes"]]
        more = column["different_shapes"] - len(shapes)
        parts.append("shape " + ", ".join(shapes) + (f" and {more} others" if more else ""))
        parts.append(_figures(column["numbers"]))
    if "lengths" in column:
        parts.append("length " + _figures(column["lengths"]))
    return "; ".join(parts)


def _figures(figures: Mapping[str, Any]) -> str:
    if "min" not in figures:
        return "no finite numbers" if figures["count"] else "none"
    bad = f", {figures['not_finite']} not finite" if figures["not_finite"] else ""
    return (
        f"{figures['min']:g} to {figures['max']:g}, mean {figures['mean']:.4g}, std {figures['std']:.4g}{bad}"
    )


def _classes(classes: Mapping[str, int] | None) -> Iterator[str]:
    if not classes:
        return
    total, most = sum(classes.values()), max(classes.values())
    for label, n in list(classes.items())[:SHOWN_CLASSES]:
        yield f"  {printable(label)[:40]:>12}  {n:>8}  {n / total:6.1%}  {'#' * round(BAR * n / most)}"
    if len(classes) > SHOWN_CLASSES:
        yield f"  and {len(classes) - SHOWN_CLASSES} classes more"


def _quality(quality: Mapping[str, Any]) -> Iterator[str]:
    if not quality["count"]:
        yield "quality: none stated"
        return
    yield f"quality: {_figures(quality)}; {quality['without']} records state none"
    most = max(bar["records"] for bar in quality["histogram"]) or 1
    for bar in quality["histogram"]:
        n = bar["records"]
        yield f"  {bar['from']:.1f} to {bar['to']:.1f}  {n:>8}  {'#' * round(BAR * n / most)}".rstrip()


def _value(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(f"{v:g}" if isinstance(v, (int, float)) else str(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
