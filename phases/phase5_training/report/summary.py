"""The words and tables of a report: records in, text and rows out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phase5_training.follow import is_alive
from phase5_training.records import METRICS, RunDirectory, plain
from phase5_training.report.charts import Points, Row, points
from phase5_training.report.wording import (
    MISSING,
    compact,
    duration,
    is_finite,
    label,
    megabytes,
    number,
    one_line,
    share,
    stop_reason,
)

STALE_AFTER_S = 600


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text. ``numeric`` columns are set right; ``marked`` cells (row, column) are the best."""

    head: list[str]
    rows: list[list[str]]
    numeric: frozenset[int] = frozenset()
    marked: frozenset[tuple[int, int]] = frozenset()
    strong_row: int | None = None


@dataclass(kw_only=True)
class Loaded:
    """All records of one run, read once."""

    run: RunDirectory
    name: str
    rows: list[Row]
    events: list[Row]
    config: dict[str, Any]
    result: dict[str, Any]  # empty while there is none
    quarantine: Counter[str] = field(default_factory=Counter)
    session: Row = field(default_factory=dict)  # the newest session's event

    @classmethod
    def read(cls, path: Path) -> Loaded:
        """Read what is there; a run that has just begun may have a configuration only."""
        run = RunDirectory(path)
        try:
            config = run.read_config()
        except FileNotFoundError:
            config = {}
        dropped = Counter(one_line(row.get("reason", "no reason given")) for row in run.read_quarantine())
        rows, result = run.read_metrics(), run.read_result() or {}
        ended_at = _mapping(result.get("metrics")).get("steps")
        if is_finite(ended_at) and any(is_finite(row.get("step")) and row["step"] > ended_at for row in rows):
            result = {}  # of an earlier session: the run was resumed and has gone on
        events = run.read_events()
        return cls(
            run=run,
            name=one_line(run.name),
            rows=rows,
            events=events,
            session=next((e for e in reversed(events) if e.get("event") == "session"), {}),
            config=config,
            result=result,
            quarantine=dropped,
        )

    @property
    def metrics(self) -> dict[str, Any]:
        """The result's final figures, empty while there is no result."""
        return _mapping(self.result.get("metrics"))

    def fact(self, key: str) -> Any:
        """What the result says of data, machine, layers or model; until there is one, the session's event."""
        found = self.result.get(key)
        return found if found is not None else self.session.get(key)

    @property
    def layer_names(self) -> list[str]:
        """Names of the ternary layers, in the order of the rows' figures."""
        layers = self.fact("layers")
        known = [x for x in layers if isinstance(x, dict)] if isinstance(layers, list) else []
        return [one_line(layer.get("name", "")) for layer in known]

    def last(self, kind: str, column: str) -> Any:
        """The newest value of a column, or None."""
        for row in reversed(self.rows):
            if row.get("kind") == kind and row.get(column) is not None:
                return row[column]
        return None

    def validation(self, x: str, y: str) -> Points:
        """The validation points of a column against ``x``."""
        return points(self.rows, "validation", x, y)[0]

    @property
    def steps(self) -> Any:
        """Optimizer steps made so far."""
        given = self.metrics.get("steps")
        return (
            given
            if given is not None
            else max((r["step"] for r in self.rows if is_finite(r.get("step"))), default=None)
        )

    @property
    def seconds(self) -> Any:
        """Wall seconds of training so far."""
        if is_finite(self.metrics.get("training_time_s")):
            return self.metrics["training_time_s"]
        if is_finite(self.metrics.get("training_time_hours")):
            return self.metrics["training_time_hours"] * 3600
        return max((r["elapsed_s"] for r in self.rows if is_finite(r.get("elapsed_s"))), default=None)

    @property
    def best_accuracy(self) -> Any:
        """The best validation accuracy, from the result or the rows."""
        given = self.metrics.get("best_accuracy")
        return given if is_finite(given) else max(self.validation("step", "accuracy")[1], default=None)

    @property
    def validation_loss(self) -> Any:
        """The validation loss of the weights that were returned, else the newest one."""
        newest, returned = self.last("validation", "loss"), self.metrics.get("final_loss")
        return returned if is_finite(newest) and is_finite(returned) else newest

    @property
    def weight_bits(self) -> Any:
        """Bits of a trained weight: of the configuration, else of the first layer that has any."""
        found = self.config.get("weight_bits")
        if found is None:
            layers = self.fact("layers")
            bits = [x.get("bits") for x in layers if isinstance(x, dict)] if isinstance(layers, list) else []
            found = next((b for b in bits if b is not None), None)
        return found


def weights_worded(bits: Any) -> str:
    """What weights of so many bits are called.

    Example:
        >>> weights_worded(1.58), weights_worded(1), weights_worded(32), weights_worded(None)
        ('ternary (1.58-bit)', 'binary (1-bit)', 'float (32-bit)', '')
    """
    if bits is None:
        return ""
    names = {1.58: "ternary (1.58-bit)", 1: "binary (1-bit)"}
    if is_finite(bits):
        return names.get(bits) or (f"float ({number(bits)}-bit)" if bits >= 16 else f"{number(bits)}-bit")
    return one_line(bits, 40)


def headline(run: Loaded) -> str:
    """One paragraph that says what was trained, how it ended and why it stopped."""
    model = _mapping(run.fact("model"))
    kind = weights_worded(run.weight_bits)
    article = "An" if kind[:1] in ("8", "a", "e", "i", "o", "u") else "A"
    subject = f"{article} {kind} network" if kind else "A network"
    if is_finite(model.get("parameters")):
        subject += f" of {compact(model['parameters'])} parameters"
    verb = "was trained" if run.result else "is being trained" if is_live(run) else "was being trained"
    sentence = f"{subject} {verb}"
    if is_finite(run.steps):
        sentence += f" for {number(run.steps)} steps"
    if is_finite(run.seconds):
        sentence += f" in {duration(run.seconds)}" if run.result else f", {duration(run.seconds)} so far"
    sentences = [sentence]
    figures = []
    if is_finite(run.best_accuracy):
        figures.append(f"best validation accuracy {share(run.best_accuracy)}")
    loss = run.validation_loss
    if is_finite(loss):
        figures.append(f"{'final' if run.result else 'last'} validation loss {number(loss)}")
    bits = run.last("validation", "bits_per_byte")
    if is_finite(bits):
        figures.append(f"{number(bits)} bits per byte")
    if not figures:
        loss = run.last("train", "loss")
        if is_finite(loss):
            figures.append(f"last training loss {number(loss)}")
        figures.append("no validation was recorded")
    figures[0] = figures[0][0].upper() + figures[0][1:]
    sentences.append(", ".join(figures))
    if run.result.get("stop_reason"):
        sentences.append(f"It ended because {stop_reason(run.result['stop_reason'])}")
    return ". ".join(sentences) + "."


def status(run: Loaded) -> tuple[str, str]:
    """(one of "failed", "running", "stopped", "done", a sentence on it; empty when done)."""
    if run.result:
        if run.result.get("stop_reason") == "interrupted":
            return "stopped", f"This run was interrupted. Continue it with: forge resume {run.run.path}"
        if run.result.get("success") is False:
            error = run.result.get("error")
            return "failed", "This run failed" + (f": {one_line(error, 600)}" if error else ".")
        return "done", ""
    if is_live(run):
        return (
            "running",
            "This run has no result yet: it is still going. The figures are those written so far.",
        )
    why = "has written nothing for ten minutes: it was stopped or is held up"
    if is_alive(run.session) is False:
        why = "its process is gone"
    return "stopped", f"This run has no result and {why}. Continue it with: forge resume {run.run.path}"


def is_live(run: Loaded) -> bool:
    """Whether the process of a run without a result is there; if that is unknown, whether it wrote lately."""
    if run.result:
        return False
    alive = is_alive(run.session)
    if alive is not None:
        return alive
    try:
        age = time.time() - (run.run.path / METRICS).stat().st_mtime
    except OSError:
        return True  # nothing written yet: it is being set up
    return age < STALE_AFTER_S


def tiles(run: Loaded) -> list[tuple[str, str]]:
    """The handful of figures to see first: (label, figure)."""
    model = _mapping(run.fact("model"))
    speeds = sorted(points(run.rows, "train", "step", "samples_per_s")[0][1])
    found = [
        ("Best validation accuracy", share(run.best_accuracy)),
        ("Validation loss", number(run.validation_loss)),
        ("Bits per byte", number(run.last("validation", "bits_per_byte"))),
        ("Training loss", number(run.last("train", "loss"))),
        ("Steps", _of_all(run)),
        ("Wall time", duration(run.seconds)),
        ("Samples per second", compact(speeds[len(speeds) // 2]) if speeds else MISSING),
        ("Packed model", megabytes(model.get("packed_mb"))),
    ]
    return [(name, figure) for name, figure in found if figure != MISSING]


def _of_all(run: Loaded) -> str:
    total = run.session.get("total_steps")
    made = number(run.steps)
    return made if run.result or not is_finite(total) or made == MISSING else f"{made} of {number(total)}"


def final_table(run: Loaded) -> Table | None:
    """Every figure of the result; one that is given in two units stands once."""
    rows = [(label(_without_unit(key)), _worded(key, value)) for key, value in _flat(run.metrics)]
    return _pairs([list(row) for row in dict.fromkeys(rows)], "Figure")


def config_table(run: Loaded) -> Table | None:
    """Every setting."""
    return _pairs([list(pair) for pair in settings_of(run)], "Setting")


def settings_of(run: Loaded) -> list[tuple[str, str]]:
    """Every setting and its value as text, nested keys joined by dots."""
    # As written, not rounded: someone may type these figures in again.
    return [(key, _exact(value)) for key, value in _flat(run.config)]


_MACHINE = {
    "cpu": "Processor",
    "cores": "Cores",
    "memory_gb": "Memory",
    "platform": "Platform",
    "python": "Python",
    "device": "Device",
}


def machine_table(run: Loaded) -> Table | None:
    """The machine and the versions of what ran on it."""
    rows = []
    for key, value in _flat(_mapping(run.fact("machine"))):
        shown = f"{number(value)} GiB" if key == "memory_gb" else text(value)
        # Packages are spelled as they are installed.
        package = key.removeprefix("versions.")
        rows.append([_MACHINE.get(key, package), shown])
    return _pairs(rows, "Machine")


def data_tables(run: Loaded) -> tuple[Table | None, Table | None]:
    """What the data was, and what of it was left out for which reason."""
    data = _mapping(run.fact("data"))
    parts = {name: part for name, part in data.items() if isinstance(part, dict) and _is_part(name)}
    shared = {key: value for key, value in data.items() if key not in parts}
    reasons: list[list[str]] = []
    for where, part in [("", shared), *parts.items()]:
        for key in list(part):
            if _is_reasons(key, part[key]):
                part = {k: v for k, v in part.items() if k != key}
                for reason, count in _mapping(data[where] if where else data)[key].items():
                    kind = label(key).replace(" by reason", "").removesuffix(" reasons")
                    reasons.append([one_line(reason), kind + (f", {where}" if where else ""), text(count)])
        if where:
            parts[where] = part
        else:
            shared = part
    if not reasons:
        reasons = [[reason, "Quarantined", number(n)] for reason, n in run.quarantine.most_common()]
    dropped = (
        Table(head=["Reason", "What happened", "Records"], rows=reasons, numeric=frozenset({2}))
        if reasons
        else None
    )
    flat = {name: dict(_flat(part)) for name, part in parts.items()} or {"": {}}
    keys = dict.fromkeys(key for part in flat.values() for key in part)
    rows = [[_data_label(key), *(text(part.get(key)) for part in flat.values())] for key in keys]
    rows += [[_data_label(key), text(value), *[""] * (len(flat) - 1)] for key, value in _flat(shared)]
    rows = [row for row in rows if any(cell not in ("", MISSING) for cell in row[1:])]
    heads = [label(name) for name in parts] or ["Value"]
    return Table(head=["Data", *heads], rows=rows) if rows else None, dropped


def _data_label(key: str) -> str:
    """A key of the data's description in words; what a part of it says is said of that part."""
    return label(key.replace("num_", "").replace("vocab_", "vocabulary_").replace(".", "_"))


def nothing_left_out(run: Loaded) -> bool:
    """Whether the result counts what was dropped and all counts are zero."""
    data = _mapping(run.fact("data"))
    parts = [data, *(part for name, part in data.items() if isinstance(part, dict) and _is_part(name))]
    counts = [part[key] for part in parts for key in part if "dropped" in key or "quarantine" in key]
    return bool(counts) and not run.quarantine and not any(counts)


def layer_rows(run: Loaded) -> list[dict[str, Any]]:
    """The layer table: name, shape, bits, scale as text, and the share of zeros as text and figure."""
    layers = run.fact("layers")
    rows = []
    for layer in layers if isinstance(layers, list) else []:
        if not isinstance(layer, dict):
            continue
        shape = layer.get("shape")
        zeros = layer.get("zero_share")
        rows.append(
            {
                "name": one_line(layer.get("name", "")),
                "shape": " × ".join(map(str, shape)) if isinstance(shape, list) else text(shape),
                "bits": number(layer.get("bits")),
                "scale": number(layer.get("scale")),
                "zeros": share(zeros),
                "percent": round(min(max(zeros, 0.0), 1.0) * 100, 1) if is_finite(zeros) else None,
            }
        )
    return rows


def model_size(run: Loaded) -> dict[str, Any] | None:
    """The model before and after packing: words, and the share of the size that is left."""
    model = _mapping(run.fact("model"))
    before, after = model.get("float_mb"), model.get("packed_mb")
    total, ternary = model.get("parameters"), model.get("ternary_parameters")
    if not (is_finite(before) or is_finite(total)):
        return None
    percent = ratio = None
    if is_finite(before) and is_finite(after) and before > 0 and after > 0:
        percent, ratio = round(100 * after / before, 1), f"{before / after:.1f}"
    return {
        "parameters": number(total),
        "ternary": number(ternary),
        "ternary_share": share(ternary / total)
        if is_finite(ternary) and is_finite(total) and total
        else MISSING,
        "before": megabytes(before),
        "after": megabytes(after),
        "percent": percent,
        "ratio": ratio,
    }


def event_table(run: Loaded, limit: int = 200) -> Table | None:
    """The newest events."""
    rows = []
    for event in run.events[-limit:]:
        left_out = {"time", "event", "step"}
        if event.get("event") == "session":  # the rest has tables of its own
            left_out |= {"data", "machine", "layers", "model"}
        rest = {key: value for key, value in event.items() if key not in left_out}
        details = ", ".join(f"{key} {text(value)}" for key, value in _flat(rest))
        name = label(one_line(event.get("event", "")))
        rows.append([one_line(event.get("time", "")), number(event.get("step")), name, details])
    return (
        Table(head=["Time", "Step", "Event", "Details"], rows=rows, numeric=frozenset({1})) if rows else None
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found += _flat(value, f"{path}.")
        else:
            found.append((path, value))
    return found


def text(value: Any) -> str:
    """Any recorded value as text."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value) if is_finite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return one_line(", ".join(text(item) for item in value), 600)
    return one_line(plain(value), 600)


def _exact(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return ", ".join(map(_exact, value)) if isinstance(value, list) else text(value)


def _without_unit(key: str) -> str:
    """The unit goes where the figure carries its own."""
    for unit in ("_hours", "_seconds", "_mb", "_s"):
        if key.endswith(unit) and not key.endswith("per_s"):
            return key.removesuffix(unit)
    return key


def _worded(key: str, value: Any) -> str:
    if is_finite(value):
        if key.endswith(("accuracy", "_share")):
            return share(value)
        if key.endswith("_hours"):
            return duration(value * 3600)
        if key.endswith(("_s", "_seconds")) and not key.endswith("per_s"):
            return duration(value)
        if key.endswith("_mb"):
            return megabytes(value)
    return text(value)


def _is_part(name: str) -> bool:
    return name in ("train", "validation", "val", "test")


def _is_reasons(key: str, value: Any) -> bool:
    return isinstance(value, dict) and any(word in key for word in ("dropped", "quarantine", "reasons"))


def _pairs(rows: list[list[str]], head: str) -> Table | None:
    return Table(head=[head, "Value"], rows=rows) if rows else None
