"""The report: offline, escaped, complete, and honest about what is missing."""

from __future__ import annotations

import html.parser
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import phase5_training.report as report
from phase5_training.errors import DataError, UsageError
from phase5_training.records import RunDirectory, machine
from phase5_training.report import charts, write_report
from phase5_training.report.summary import Loaded

PHASES = (("warmup", 0.1), ("acceleration", 0.5), ("consolidation", 0.7), ("refinement", 1.01))
RATES = {"warmup": 1.0, "acceleration": 5.0, "consolidation": 0.2, "refinement": 1.0}
VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;{{ 7*7 }}$\\frac{"


def record_run(
    folder: Path,
    name: str = "modular-arithmetic",
    *,
    steps: int = 1200,
    every: int = 10,
    speed: float = 1.0,
    seed: int = 0,
    text: bool = False,
    validation: bool = True,
) -> RunDirectory:
    """Write a run that groks: rows, events, configuration, no result."""
    run = RunDirectory.create(folder, name)
    rng = random.Random(seed)
    run.write_config(
        {
            "experiment_name": name,
            "train_data_path": "data/train.json",
            "weight_bits": 1.58,
            "optimizer": "muon",
            "learning_rate": 0.0123456,
            "weight_decay": 0.1,
            "batch_size": 2048,
            "grokfast": {"filter": "ema", "lambda": 2.0},
            "seed": seed,
        }
    )
    run.append_event({"event": "fit_start", "steps": steps})
    last = ""
    for step in range(every, steps + 1, every):
        at = step / steps
        phase = next(phase for phase, end in PHASES if at < end)
        if phase != last:
            run.append_event({"event": "phase_change", "step": step, "phase": phase})
            last = phase
        known = 1 / (1 + math.exp(-(at - 0.35) * speed * 30))
        elapsed = step * 0.05
        run.append_metrics(
            {
                "kind": "train",
                "step": step,
                "epoch": step // 100,
                "phase": phase,
                "loss": 4.6 * math.exp(-8 * at * speed) + 0.01 * rng.uniform(0.7, 1.3),
                "accuracy": None if text else min(1.0, known + rng.uniform(0, 0.2)),
                "lr": 0.003 * RATES[phase] * (min(1, at / 0.1) if phase == "warmup" else 1),
                "grad_norm": 2 * math.exp(-3 * at) * rng.uniform(0.6, 1.6),
                "slow_ratio": 0.4 + 0.2 * rng.random(),
                "zero_share": 0.31 + 0.05 * at,
                "flip_share": 0.02 * math.exp(-4 * at) * rng.uniform(0.8, 1.2),
                "samples_per_s": 12000 * rng.uniform(0.85, 1.05),
                "data_wait_share": 0.01 * rng.random(),
                "memory_mb": 480 + 20 * min(1, at * 4),
                "elapsed_s": elapsed,
                "nonfinite_steps": 0,
            }
        )
        if validation and step % (every * 5) == 0:
            loss = 5.0 * (1 - known) + 0.03 * rng.uniform(0.9, 1.1)
            run.append_metrics(
                {
                    "kind": "validation",
                    "step": step,
                    "epoch": step // 100,
                    "phase": phase,
                    "loss": loss,
                    "accuracy": None if text else known * 0.995,
                    "perplexity": math.exp(loss) if text else None,
                    "bits_per_byte": loss / math.log(2) if text else None,
                    "elapsed_s": elapsed,
                }
            )
    run.append_event({"event": "checkpoint_saved", "step": steps, "path": "checkpoints/step-00001200"})
    return run


def result_of(run: RunDirectory, **more: Any) -> dict[str, Any]:
    """A result such as the pipeline writes."""
    rows = run.read_metrics()
    return {
        "success": True,
        "stop_reason": "max_steps",
        "metrics": {
            "final_loss": rows[-1]["loss"],
            "final_accuracy": 0.9921,
            "best_val_loss": 0.0291,
            "best_accuracy": 0.9934,
            "epochs_completed": 12,
            "steps": 1200,
            "training_time_hours": 60 / 3600,
        },
        "data": {
            "train": {
                "format": "json",
                "mode": "map",
                "samples": 4700,
                "input_shape": [4],
                "dropped_by_reason": {"quality below 0.5": 31, "label missing": 2},
            },
            "validation": {"format": "json", "mode": "map", "samples": 4700, "input_shape": [4]},
        },
        "machine": machine(),
        "layers": [
            {
                "name": f"blocks.{i // 3}.{('qkv', 'up', 'down')[i % 3]}",
                "shape": [384, 128],
                "bits": 1.58,
                "scale": 0.0123 + i / 1000,
                "zero_share": 0.3 + i / 100,
            }
            for i in range(6)
        ],
        "model": {
            "parameters": 421_632,
            "ternary_parameters": 393_216,
            "float_mb": 1.687,
            "packed_mb": 0.213,
        },
        **more,
    }


def comparison_rows() -> list[dict[str, Any]]:
    def curve(middle: float) -> list[list[float]]:
        return [[t, 1 / (1 + math.exp(-(t - middle) / 3))] for t in range(2, 61, 2)]

    return [
        {
            "name": "Forge, ternary",
            "weight_bits": 1.58,
            "optimizer": "muon + adamw",
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "steps": 1200,
            "wall_seconds": 60.0,
            "steps_to_target": 560,
            "seconds_to_target": 28.0,
            "best_accuracy": 0.9934,
            "final_val_loss": 0.0312,
            "target": 0.95,
            "run": ".",
        },
        {
            "name": "float, tuned AdamW",
            "weight_bits": 32,
            "optimizer": "adamw",
            "learning_rate": 0.003,
            "weight_decay": 1.0,
            "steps": 1010,
            "wall_seconds": 60.0,
            "steps_to_target": 700,
            "seconds_to_target": 42.0,
            "best_accuracy": 0.9991,
            "final_val_loss": 0.021,
            "note": "rate and decay chosen out of 12 by a sweep",
            "curve": curve(36),
        },
        {
            "name": "float, plain defaults",
            "weight_bits": 32,
            "optimizer": "adamw",
            "learning_rate": 0.001,
            "weight_decay": 0.01,
            "steps": 990,
            "wall_seconds": 60.0,
            "steps_to_target": None,
            "seconds_to_target": None,
            "best_accuracy": 0.11,
            "final_val_loss": 9.4,
            "note": "the document's defaults",
            "curve": [[t, 0.002 * t] for t in range(2, 61, 2)],
        },
    ]


class Page(html.parser.HTMLParser):
    """A strict reading of the page: every element closed, text and attributes collected."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def charts(self) -> list[str]:
        return [str(attributes["id"]) for attributes in self.named("figure")]


def page_of(*runs: RunDirectory) -> Page:
    return Page(write_report([run.path for run in runs]).read_text(encoding="utf-8"))


@pytest.fixture
def finished(runs: Path) -> RunDirectory:
    run = record_run(runs)
    run.write_result(result_of(run, comparison=comparison_rows()))
    return run


def test_nothing_comes_from_outside_and_nothing_runs(finished: RunDirectory) -> None:
    page = page_of(finished)
    assert page.named("script") == []
    assert page.named("iframe") == []
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page.source)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    policy = [a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_every_section_and_chart_is_there(finished: RunDirectory) -> None:
    page = page_of(finished)
    assert page.charts == [
        "accuracy-time",
        "loss",
        "accuracy",
        "learning-rate",
        "gradient-norm",
        "slow-ratio",
        "zero-codes",
        "flips",
        "throughput",
        "data-wait",
        "memory",
    ]
    for words in (
        "A ternary (1.58-bit) network of 422k parameters was trained for 1,200 steps in 1 min 00 s.",
        "Best validation accuracy 99.34%",
        "It ended because all steps were done.",
        "Final figures",
        "Best validation loss 0.0291",
        "quality below 0.5 Dropped, train 31",
        "Training time 1 min 00 s",
        "learning_rate 0.0123456",
        "grokfast.lambda 2.0",
        "blocks.1.down 384 × 128 1.58",
        "7.9 times smaller",
        "421,632 parameters, 393,216 of them quantized (93.3%)",
        machine()["torch"],
        "Phase change",
        "Not recorded: perplexity, bits per byte, use of the processor's cores, use of the GPU.",
    ):
        assert words in page.text, words
    assert "is still going" not in page.text
    assert not [a for a in page.named("meta") if a.get("http-equiv") == "refresh"]


def test_the_comparison_says_who_was_first(finished: RunDirectory) -> None:
    page = page_of(finished)
    assert (
        "Forge, ternary reached 95.0% validation accuracy first, after 28 s and 560 steps; "
        "float, tuned AdamW after 42 s (1.50 times as long); float, plain defaults did not reach it."
    ) in page.text
    assert "rate and decay chosen out of 12 by a sweep" in page.text
    best = list(re.findall(r'class="num best">([^<]*)<', page.source))
    assert best == ["560", "28 s", "99.91%", "0.021"]


def test_a_target_that_is_no_accuracy_is_named_as_it_is(runs: Path) -> None:
    run = record_run(runs, text=True)
    rows = [{**row, "target": 2.1, "figure": "bits_per_byte"} for row in comparison_rows()]
    run.write_result(result_of(run, comparison=rows))
    assert "reached 2.1 validation bits per byte first" in page_of(run).text


def test_the_comparison_can_name_another_run_folder(runs: Path) -> None:
    run = record_run(runs)
    record_run(runs, "baseline", speed=0.5)
    rows = [{"name": "ours"}, {"name": "theirs", "run": "../baseline"}]
    run.write_result(result_of(run, comparison=rows))
    label = next(a["aria-label"] for a in page_of(run).named("svg") if "wall time" in str(a["aria-label"]))
    assert label is not None
    assert "ours: highest 99.50% after 1 min 00 s" in label
    assert "theirs: highest 99.49% after" in label


def test_text_runs_show_perplexity_and_bits_per_byte(runs: Path) -> None:
    page = page_of(record_run(runs, text=True))
    assert {"perplexity", "bits-per-byte"} < set(page.charts)
    assert "accuracy" not in page.charts
    assert "bits per byte" in page.text


def test_pictures_have_words_and_take_the_colors_of_the_page(finished: RunDirectory) -> None:
    page = page_of(finished)
    pictures = page.named("svg")
    assert len(pictures) == 11
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(str(picture["aria-label"])) > 40
        assert picture["viewbox"]
        assert "width" not in picture
    assert page.source.count("<title>") == 12  # the page's and one in each picture
    drawn = "".join(re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", drawn.replace("url(#", "").replace('href="#', "")), (
        "a fixed color"
    )
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", page.source))
    light, dark = page.source.split("prefers-color-scheme: dark", 1)
    for variable in used:
        assert f"{variable}:" in light
        assert f"{variable}:" in dark.split("* { box-sizing")[0], f"{variable} has no dark value"


def test_ids_are_unique_and_references_resolve(finished: RunDirectory) -> None:
    page = page_of(finished)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", page.source)) <= set(ids)
    assert set(re.findall(r'href="#([^"]*)"', page.source)) <= set(ids)


def test_tick_labels_keep_their_decimals(runs: Path) -> None:
    run = RunDirectory.create(runs, "small")
    for step in range(1, 6):
        run.append_metrics({"kind": "train", "step": step, "lr": 0.001 * step})
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", page_of(run).source)
    assert {"0.0015", "0.003", "0.0045"} <= set(labels)


def test_hostile_words_are_escaped_everywhere(runs: Path) -> None:
    run = record_run(runs, "<img onerror=alert(1)> & 'co'".replace("<", "(").replace(">", ")"), steps=100)
    run.write_config({HOSTILE: {HOSTILE: HOSTILE}})
    run.append_event({"event": HOSTILE, "detail": HOSTILE})
    rows = [{"name": HOSTILE, "optimizer": HOSTILE, "note": HOSTILE, "curve": [[1, 0.5], [2, 0.6]]}] * 2
    result = result_of(run, comparison=rows, stop_reason=HOSTILE, error=HOSTILE, success=False)
    result["data"] = {"format": HOSTILE, "dropped": {HOSTILE: 3}}
    result["layers"] = [{"name": HOSTILE, "shape": HOSTILE, "bits": HOSTILE, "scale": HOSTILE}]
    result["machine"] = {HOSTILE: HOSTILE}
    result["metrics"][HOSTILE] = HOSTILE
    run.write_result(result)
    page = page_of(run)
    assert page.named("script") == []
    assert page.named("img") == []
    assert "<script" not in page.source
    assert "{{ 7*7 }}" in page.text
    assert page.text.count("<script>alert('x')</script>") > 12


def test_a_hostile_run_name_is_escaped(runs: Path) -> None:
    folder = runs / "<b onload=x>&\"'{{ 1 }}$x^"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system cannot hold the name")
    run = RunDirectory(folder)
    run.append_metrics({"kind": "train", "step": 1, "loss": 1.0})
    other = record_run(runs, "plain", steps=100)
    page = page_of(run, other)
    assert page.named("b") == []
    assert "<b onload=x>&\"'{{ 1 }}$x^" in page.text


def test_a_run_that_is_still_going(runs: Path) -> None:
    page = page_of(record_run(runs, steps=300))
    assert "is being trained for 300 steps, 15 s so far" in page.text
    assert "is still going" in page.text
    assert "None yet: they are written when the run ends." in page.text
    assert [a["content"] for a in page.named("meta") if a.get("http-equiv") == "refresh"] == ["30"]
    assert "learning_rate" in page.text


def test_a_run_that_went_silent(runs: Path) -> None:
    run = record_run(runs, steps=100)
    old = time.time() - 3600
    os.utime(run.path / "metrics.jsonl", (old, old))
    page = page_of(run)
    assert f"forge resume {run.path}" in page.text
    assert not [a for a in page.named("meta") if a.get("http-equiv") == "refresh"]


def test_a_run_that_has_only_begun(runs: Path) -> None:
    run = RunDirectory.create(runs, "begun")
    run.write_config({"seed": 1})
    page = page_of(run)
    assert page.charts == []
    assert "No figures have been written yet." in page.text


def test_a_run_that_failed_says_why(runs: Path) -> None:
    run = record_run(runs, steps=100)
    run.write_result({"success": False, "error": "loss was not finite for 100 steps"})
    assert "This run failed: loss was not finite for 100 steps" in page_of(run).text


def test_an_interrupted_run_says_how_to_go_on(runs: Path) -> None:
    run = record_run(runs, steps=100)
    run.write_result({"success": False, "stop_reason": "interrupted", "metrics": {"steps": 100}})
    page = page_of(run)
    assert f"This run was interrupted. Continue it with: forge resume {run.path}" in page.text
    assert "failed" not in page.text


def test_a_result_of_an_earlier_session_is_not_taken_for_the_end(runs: Path) -> None:
    run = record_run(runs, steps=100)
    run.write_result(result_of(run, metrics={"steps": 100}))
    assert "is still going" not in page_of(run).text
    run.append_metrics({"kind": "train", "step": 110, "loss": 1.0})
    assert "is still going" in page_of(run).text


def test_no_validation_is_stated(runs: Path) -> None:
    page = page_of(record_run(runs, validation=False))
    assert "no validation was recorded" in page.text
    assert "loss" in page.charts


def test_nulls_are_left_out_and_counted(runs: Path) -> None:
    run = RunDirectory.create(runs, "nan")
    for step in range(1, 20):
        run.append_metrics(
            {"kind": "train", "step": step, "loss": float("nan") if step % 5 == 0 else 1 / step}
        )
    assert "3 rows have no loss because it was not finite" in page_of(run).text
    silent = RunDirectory.create(runs, "all-nan")
    silent.append_metrics({"kind": "train", "step": 1, "loss": float("inf")})
    assert page_of(silent).charts == []


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0], [5.0, 5.0, 5.0], [1e-30, 1e30], [-1e300, 1e300], [-3.0, -2.0], [5e-324, 1.0]],
)
def test_any_finite_curve_can_be_drawn(runs: Path, values: list[float]) -> None:
    run = RunDirectory.create(runs, "odd")
    for step, value in enumerate(values):
        row = dict.fromkeys(("loss", "accuracy", "lr", "grad_norm", "zero_share", "memory_mb"), value)
        run.append_metrics({"kind": "train", "step": step, **row})
    assert len(page_of(run).charts) == 6


@pytest.mark.parametrize(
    "result",
    [
        {"metrics": None, "data": [], "machine": "x", "layers": {"a": 1}, "model": 3, "comparison": "none"},
        {"metrics": {"a": [1, {"b": None}]}, "layers": [None, 3, {}], "comparison": [1, {}], "model": {}},
        {"data": {"train": None, "dropped": 3}, "comparison": [{"curve": [[1], "x", [None, 2]]}]},
    ],
)
def test_results_of_another_shape_do_not_stop_the_report(runs: Path, result: dict[str, Any]) -> None:
    run = record_run(runs, steps=100)
    run.write_result(result)
    assert "loss" in page_of(run).charts


def test_quarantine_is_counted_when_the_result_says_nothing(runs: Path) -> None:
    run = record_run(runs, steps=100)
    for reason in ("label missing", "label missing", "not UTF-8"):
        run.append_quarantine({"reason": reason})
    assert "label missing Quarantined 2 not UTF-8 Quarantined 1" in page_of(run).text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"format": "json", "dropped": {}}, True),
        ({"train": {"dropped": {}}, "validation": {"dropped": 0}}, True),
        ({"format": "json"}, False),
        ({"format": "json", "dropped": 3}, False),
        ({"train": {"dropped": {}}, "validation": {"dropped": {"label missing": 1}}}, False),
    ],
)
def test_nothing_left_out_is_said_only_when_it_is_known(runs: Path, data: dict[str, Any], said: bool) -> None:
    run = record_run(runs, steps=100)
    run.write_result({"data": data})
    assert ("No record was left out." in page_of(run).text) is said


def test_several_runs_are_overlaid_with_a_legend(runs: Path) -> None:
    names = [f"run-{i}" for i in range(10)]
    many = [record_run(runs, name, steps=200, seed=i) for i, name in enumerate(names)]
    for run in many[:5]:
        run.write_result(result_of(run))
    path = write_report([run.path for run in many])
    assert path == runs / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert {"accuracy-time", "loss-train", "loss-validation", "learning-rate"} < set(page.charts)
    for chart in ("loss-train", "accuracy-time"):
        figure = page.source.split(f'<figure id="{chart}"')[1].split("</figure>")[0]
        legend = re.findall(r"</span>(run-\d)</li>", figure)
        assert legend == names
    assert page.text.count("has no result yet: it is still going") == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"target": 0.9},
            "fast reached 90.0% validation accuracy first, after 28 s and 550 steps",
        ),
        ({"target": 0.9, "monitor": "accuracy"}, "fast reached 90.0% validation accuracy first"),
        ({"target": 0.6, "monitor": "loss"}, "fast reached 0.6 validation loss first, after 28 s"),
        ({"target": 2.0}, ""),
        ({}, ""),
    ],
)
def test_several_runs_are_held_to_the_target_of_one(runs: Path, options: dict[str, Any], said: str) -> None:
    slow, fast = record_run(runs, "slow", speed=0.5), record_run(runs, "fast")
    fast.write_config({**fast.read_config(), **options})
    text = page_of(slow, fast).text
    assert said in text if said else "first, after" not in text


def test_settings_that_differ_stand_side_by_side(runs: Path) -> None:
    one, two = record_run(runs, "one"), record_run(runs, "two")
    two.write_config({**two.read_config(), "learning_rate": 0.5, "extra": "<b>"})
    source = page_of(one, two).source
    table = source.split("Settings that differ</h3>")[1].split("</table>")[0]
    cells = re.findall(r"<t[hd](?: [^>]*)?>([^<]*)<", table)
    rate = str(one.read_config()["learning_rate"])
    assert cells == ["Setting", "one", "two", "learning_rate", rate, "0.5", "extra", "–", "&lt;b&gt;"]
    two.write_config(one.read_config())
    assert "Settings that differ" not in page_of(one, two).source


def test_the_loss_is_that_of_the_weights_returned_wherever_it_stands(runs: Path) -> None:
    run, other = record_run(runs), record_run(runs, "other")
    result = result_of(run)
    result["metrics"] |= {"final_loss": 0.0777, "training_time_seconds": 60.0}
    run.write_result(result)
    page = page_of(run)
    assert "final validation loss 0.0777" in page.text
    assert "<dt>Validation loss</dt><dd>0.0777</dd>" in page.source
    assert "0.0777" in page_of(run, other).source.split('id="comparison"')[1].split("</table>")[0]
    # Seconds and hours are one figure to a reader.
    assert page.source.count('<tr><th scope="row">Training time</th><td class="">1 min 00 s</td>') == 1


def test_rows_of_the_data_that_say_nothing_are_left_out(runs: Path) -> None:
    run = record_run(runs)
    part = {"num_classes": 10, "tokenizer": None, "target_shape": [], "source": {"access": "memory"}}
    run.write_result(result_of(run, data={"train": part, "validation": part, "seed": 0, "note": None}))
    table = page_of(run).source.split("<h2>Data</h2>")[1].split("</table>")[0]
    assert re.findall(r"<t[hd](?: [^>]*)?>([^<]*)<", table) == [
        *("Data", "Train", "Validation"),
        *("Classes", "10", "10", "Source access", "memory", "memory", "Seed", "0", ""),
    ]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = page_of(*(record_run(tmp_path / part, "same", steps=100) for part in ("a", "b")))
    assert "a/same" in page.text
    assert "b/same" in page.text


def test_out_and_its_folders_are_made(finished: RunDirectory, tmp_path: Path) -> None:
    out = write_report(finished.path, tmp_path / "new" / "page.html")
    assert out == tmp_path / "new" / "page.html"
    assert out.exists()
    assert not finished.report.exists()


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run was given"):
        write_report([])
    with pytest.raises(UsageError, match="is not a folder"):
        write_report([tmp_path / "absent"])
    with pytest.raises(UsageError, match="holds no run"):
        write_report([tmp_path])


def test_a_broken_record_is_named(finished: RunDirectory) -> None:
    (finished.path / "metrics.jsonl").write_bytes(b"{}\nbroken\n{}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2"):
        write_report([finished.path])


def test_a_long_run_stays_small_and_quick(runs: Path) -> None:
    run = record_run(runs, steps=20_000, every=1)
    run.write_result(result_of(run, comparison=comparison_rows()))
    write_report([run.path])
    start = time.process_time()
    path = write_report([run.path])
    spent = time.process_time() - start
    assert path.stat().st_size < 600_000
    assert spent < 4.0, f"{spent:.2f} s of processor time"  # 2 s on a machine that does nothing else


def test_the_users_matplotlib_is_left_alone(finished: RunDirectory) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 33.0, "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        write_report([finished.path])
        assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_not_loaded_before_a_report_is_written() -> None:
    code = (
        "import sys, phase5_training.report; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(report.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


class TestDecimate:
    @pytest.mark.parametrize("limit", [4, 5, 40, 1000])
    @pytest.mark.parametrize("total", [1, 4, 6, 999, 5000])
    def test_bounds_ends_and_peaks(self, total: int, limit: int) -> None:
        rng = random.Random(total)
        x = [float(i) for i in range(total)]
        y = [rng.gauss(0, 1) for _ in x]
        y[total // 3] = 99.0
        kept_x, kept_y = charts.decimate(x, y, limit)
        assert len(kept_x) == len(kept_y) == min(total, len(kept_y)) <= max(limit, 4)
        assert kept_x == sorted(set(kept_x))
        assert (kept_x[0], kept_x[-1]) == (x[0], x[-1])
        assert max(kept_y) == max(y)
        assert min(kept_y) == min(y)
        assert all(y[int(a)] == b for a, b in zip(kept_x, kept_y, strict=True))


def test_charts_hold_no_more_points_than_said(runs: Path) -> None:
    run = record_run(runs, steps=5000, every=1)
    rows = Loaded.read(run.path).rows
    for chart in charts.charts_of([("a", rows), ("b", rows), ("c", rows)])[0]:
        assert sum(len(line.y) for line in chart.series) <= 2000


def test_phases_are_drawn_where_the_rows_say(runs: Path) -> None:
    spans = charts.phase_spans(record_run(runs, steps=1000).read_metrics())
    assert [(name, start, end) for name, start, end in spans] == [
        ("warmup", 0.0, 90.0),
        ("acceleration", 90.0, 490.0),
        ("consolidation", 490.0, 690.0),
        ("refinement", 690.0, 1000.0),
    ]
