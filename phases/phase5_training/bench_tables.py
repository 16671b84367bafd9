"""A comparison as people read it: tables, what has to be read beside them, and rows for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from phase5_training.bench_summary import BASELINES, HELD
from phase5_training.recipes import ATTRIBUTION, RECIPES

Row = dict[str, Any]


def result_table(rows: Sequence[Row]) -> Table:
    """Recipes side by side, one line per target."""
    first = rows[0]
    table = Table(
        title=f"{first['task']}: {first['figure']}, targets held for {HELD} evaluations; quartiles over seeds"
    )
    heads = ("recipe", "target", "reached", "steps", "seconds", "/ float", "/ float Muon", "tuning steps",
             "tuning s", f"test {first['figure']}")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head in ("recipe", "target") else "right")
    for row in rows:
        table.add_row(
            RECIPES[row["recipe"]].title,
            _target(row["target"]),
            _came(row),
            _three(row["steps"], "{:.0f}"),
            _three(row["seconds"], "{:.1f}"),
            *(_middle(row, base) for base in BASELINES),
            *_tuning(row),
            _three(row["test"], "{:.4g}", "-"),
        )
    return table


def attribution_table(rows: Sequence[Row]) -> Table | None:
    """Which part of the gain comes from what; None when fewer than two cells were run."""
    cells = [row for row in rows if row["recipe"] in ATTRIBUTION]
    if len(cells) < 2:
        return None
    table = Table(title="attribution: medians over seeds; untuned is the document's optimizer settings")
    for head in ("weights", "tuned", "int8", "filter", "target", "reached", "steps", "seconds", "test"):
        table.add_column(head)
    for row in cells:
        table.add_row(
            row["weights"],
            *("" if row[key] is None else "yes" if row[key] else "no" for key in ("tuned", "int8", "filter")),
            _target(row["target"]),
            _came(row),
            *(_one(row[key][1], form) for key, form in (("steps", "{:.0f}"), ("seconds", "{:.1f}"))),
            _one(row["test"][1], "{:.4g}", "-"),
        )
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """What has to be read beside the tables, a sentence each."""
    first = [row for row in rows if row["target"] == rows[0]["target"]]
    computed = _computed(first)
    said = [
        f"computed in {how}: {'; '.join(names) if len(computed) > 1 else 'all'}"
        for how, names in computed.items()
    ]
    said += _tuned_by(first)
    for row in first:
        if row["errors"]:
            said.append(f"{_title(row)}: {row['errors']} of {row['seeds']} runs failed ({row['error']})")
    if any(row["stopped"] for row in first):
        said.append(
            "runs were stopped once they held the targets, and the test figures are of the best weights "
            "until then; --full goes on to the end"
        )
    for row in rows:
        told = f"{_title(row)}, {_target(row['target'])}"
        if row["capped"]:
            steps, seconds = row["caps"]["cap_steps"], row["caps"]["cap_seconds"]
            cap = f"{steps} steps" + (f" or {seconds:g} s" if seconds else "")
            said.append(
                f"{told}: {row['capped']} of {row['seeds']} seeds did not hold it to the cap of {cap}"
            )
        if row["without_target"]:
            said.append(
                f"{told}: {row['without_target']} of {row['seeds']} seeds are left out, on which the recipe "
                "that sets the target held no figure"
            )
        for base in BASELINES:
            if row[f"bounds_{base}"]:
                said.append(
                    f"{told}: < is a bound, since {RECIPES[base].title} did not hold it on "
                    f"{row[f'bounds_{base}']} of {row['seeds']} seeds"
                )
    for target in dict.fromkeys(row["target"] for row in rows):
        said += _with_tuning([row for row in rows if row["target"] == target])
    return said


def _computed(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Precision and compilation -> titles of the recipes."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["precision"]:  # else no run came so far
            found.setdefault(_how(row), []).append(_title(row))
    return found


def _how(row: Row) -> str:
    compiled = " and ".join("compiled" if each else "not compiled" for each in row["compiled"])
    return ", ".join(filter(None, (" and ".join(row["precision"]), compiled)))


def _tuned_by(rows: Sequence[Row]) -> list[str]:
    """Where the figures of the tuned recipes come from: not all need have had the same search."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["tuning_source"]:
            trials = "" if row["tuning_trials"] is None else f" ({row['tuning_trials']} runs)"
            base = RECIPES[RECIPES[row["recipe"]].tuned_as].title
            found.setdefault(row["tuning_source"], {})[f"{base}{trials}"] = None
    return [f"tuned by {source}: {'; '.join(names)}" for source, names in found.items()]


def _with_tuning(rows: Sequence[Row]) -> list[str]:
    """The ratios to float for one target with the tuning of both counted; nothing without float."""
    known = [row for row in rows if row["seconds_with_tuning"] is not None]
    base = next((row for row in known if row["recipe"] == BASELINES[0]), None)
    if base is None or len(known) < 2:
        return []
    whole = base["seconds_with_tuning"]
    each = "; ".join(
        f"{_title(row)} {row['seconds_with_tuning'] / whole:.2f} ({row['seconds_with_tuning']:.3g} s)"
        for row in known
        if row is not base
    )
    return [f"{_target(base['target'])}, / {_title(base)} ({whole:.3g} s) with all tuning counted: {each}"]


def comparison_rows(runs: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The report's comparison: a line per recipe for the first target, with the curve of its middle seed."""
    first = rows[0]["target"]
    found = []
    for row in (r for r in rows if r["target"] == first):
        own = [run for run in runs if run["recipe"] == row["recipe"]]
        order = sorted(own, key=lambda run: run["seconds"])
        shown = order[len(order) // 2]
        found.append(
            {
                "name": RECIPES[row["recipe"]].title,
                "weight_bits": 1.58 if shown["ternary"] else 32,
                "optimizer": shown["options"].get("optimizer"),
                "learning_rate": shown["options"].get("learning_rate"),
                "weight_decay": shown["options"].get("weight_decay"),
                "steps": shown["steps"],
                "wall_seconds": row["whole_seconds"][1],
                "target": first if isinstance(first, float) else None,
                "steps_to_target": row["steps"][1],
                "seconds_to_target": row["seconds"][1],
                "seconds_quartiles": _three(row["seconds"], "{:.1f}"),
                "reached": _came(row),
                "tuning_steps": row["tuning_steps"],
                "tuning_seconds": row["tuning_seconds"],
                "test": row["test"][1],
                "figure": row["figure"],
                "note": _how(row),
                "curve": [[seconds, figure] for _, seconds, figure in shown["curve"]],
            }
        )
    return found


def _target(target: float | str) -> str:
    return f"held by {target}" if isinstance(target, str) else f"{target:g}"


def _tuning(row: Row) -> tuple[str, str]:
    if not RECIPES[row["recipe"]].tuned_as:
        return "0", "0"
    return _one(row["tuning_steps"], "{}", "?"), _one(row["tuning_seconds"], "{:.0f}", "?")


def _three(values: Sequence[float | None], form: str, missing: str = "never") -> str:
    said = [_one(v, form, missing) for v in values]
    return said[0] if len(set(said)) == 1 else " / ".join(said)


def _came(row: Row) -> str:
    seeds = row["seeds"] - row["without_target"]
    return f"{seeds - row['failures']} of {seeds}"


def _title(row: Row) -> str:
    return RECIPES[row["recipe"]].title


def _middle(row: Row, base: str) -> str:
    values = row[f"ratio_{base}"]
    if values is None:
        return ""
    bound = "<" if row[f"bounds_{base}"] and values[1] is not None else ""
    return bound + _one(values[1], "{:.2f}")


def _one(value: float | None, form: str, missing: str = "never") -> str:
    return missing if value is None else form.format(value)
