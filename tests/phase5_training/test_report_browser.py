"""The report in a real browser: it renders, quietly, at every width and in the dark, and asks nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import browser
from phase5_training.records import RunDirectory, machine
from phase5_training.report import write_report

pytestmark = pytest.mark.skipif(browser.COMMAND is None, reason="no chromium here; apt-get install chromium")
HOSTILE = "<img src=http://127.0.0.1:9/x onerror=console.error(1)><script>console.error(2)</script>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    opened = browser.Browser()
    yield opened
    opened.close()


def recorded(folder: Path, name: str, layers: int) -> RunDirectory:
    run = RunDirectory.create(folder, name)
    run.write_config({"experiment_name": name, "train_data_path": HOSTILE})
    names = [f"blocks.{i}{HOSTILE if i == 1 else ''}" for i in range(layers)]
    table = [
        {"name": n, "shape": [64, 64], "bits": 1.58, "scale": 0.02, "zero_share": 0.31 + i / 100}
        for i, n in enumerate(names)
    ]
    facts = {
        "machine": machine(),
        "layers": table,
        "total_steps": 400,
        "model": {"parameters": 4096 * layers},
    }
    run.append_event({"event": "session", **facts})
    for step in range(10, 401, 10):
        shares = [0.3 + 0.1 * i / layers + step / 4000 for i in range(layers)]
        row = {"kind": "train", "step": step, "loss": 40 / step, "accuracy": 1 - 4 / step, "lr": 0.01}
        phase = "warmup" if step < 50 else "refinement"
        flips = [x / 50 for x in shares]
        row |= {"phase": phase, "layer_zero_share": shares, "layer_flip_share": flips, "elapsed_s": step / 9}
        run.append_metrics(row)
        if step % 50 == 0:
            run.append_metrics({"kind": "validation", "step": step, "loss": 50 / step, "elapsed_s": step / 9})
    run.append_quarantine({"file": HOSTILE, "index": 3, "reason": HOSTILE})
    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(recorded(tmp_path_factory.mktemp("runs"), "grokking", layers=12).path)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_renders_quietly_and_asks_nobody(
    chromium: browser.Browser, report: Path, width: int, dark: bool
) -> None:
    chromium.open(report, width=width, dark=dark)
    assert chromium.console == []
    assert {url.split(":")[0] for url in chromium.requests} == {"file", "data"}
    assert sum(url.startswith("file:") for url in chromium.requests) == 1
    # Nothing sticks out at the side, and every picture has a size and words.
    assert chromium.ask("document.documentElement.scrollWidth") <= width
    drawn = chromium.ask(
        "[...document.querySelectorAll('figure svg')].map(s => [s.getBoundingClientRect().width, "
        "s.getBoundingClientRect().height, s.getAttribute('aria-label').length])"
    )
    assert len(drawn) >= 5
    assert all(w > 250 and h > 130 and words > 40 for w, h, words in drawn)
    page, ink = (
        sum(map(int, chromium.ask(f"getComputedStyle(document.body).{key}")[4:-1].split(",")))
        for key in ("backgroundColor", "color")
    )
    assert (page < 150 < 600 < ink) if dark else (ink < 150 < 600 < page)


def test_words_of_the_user_are_words(chromium: browser.Browser, report: Path) -> None:
    chromium.open(report)
    assert chromium.ask("document.querySelectorAll('script, main img').length") == 0
    shown = chromium.ask("document.body.textContent")
    assert shown.count(HOSTILE) >= 3  # the configuration, a layer, the reason for which a record was left out


@pytest.mark.parametrize(("layers", "lines", "cells"), [(3, 3, 0), (12, 0, 1)])
def test_layers_are_lines_or_cells(
    chromium: browser.Browser, tmp_path: Path, layers: int, lines: int, cells: int
) -> None:
    chromium.open(write_report(recorded(tmp_path, "deep", layers).path))
    assert chromium.ask("document.querySelectorAll('#layer-zeros .legend li').length") == lines
    assert chromium.ask("document.querySelectorAll('#layer-zeros image').length") == cells
    # The cells are a picture that the page carries, and it is loaded.
    if cells:
        size = chromium.ask("document.querySelector('#layer-zeros image').getBoundingClientRect().height")
        assert size > 100


def test_several_runs_side_by_side(chromium: browser.Browser, tmp_path: Path) -> None:
    runs = [recorded(tmp_path, name, layers=2).path for name in ("ternary", "float")]
    chromium.open(write_report(runs), width=390)
    assert chromium.console == []
    assert chromium.ask("document.documentElement.scrollWidth") <= 390
    legend = "[...document.querySelectorAll('#loss-train .legend li')].map(x => x.textContent.trim())"
    assert chromium.ask(legend) == ["ternary", "float"]
