"""The progress displays and the report refresher, driven by recorded events; none may stop a run."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import phase5_training.report
from phase5_training import callbacks
from phase5_training.callbacks import ProgressDisplay, ReportRefresher
from phase5_training.errors import UsageError
from phase5_training.events import CallbackRegistry, Event
from phase5_training.progress_view import Progress, log_line, sparkline
from phase5_training.records import RunDirectory

SOURCE = str(Path(callbacks.__file__).parents[1])


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def play(registry: CallbackRegistry, clock: Clock, steps: int = 100, seconds: float = 1.0) -> None:
    """Fire the events of a run of ``steps`` steps, ``seconds`` apart, validated every tenth."""
    registry.fire(Event.FIT_START, 0, {"step": 0, "elapsed_s": 0.0})
    for step in range(1, steps + 1):
        clock.now += seconds
        phase = "warmup" if step <= 10 else "acceleration"
        if step in (1, 11):
            registry.fire(Event.PHASE_CHANGE, step - 1, {"phase": phase, "previous": ""})
        registry.fire(Event.STEP_END, step, {"step": step, "loss": object()})
        row: dict[str, Any] = {
            "step": step,
            "epoch": step // 50,
            "phase": phase,
            "loss": 5.0 / step,
            "accuracy": step / 200,
            "lr": 0.003,
            "grad_norm": 0.7,
            "samples_per_s": 12345.0,
            "memory_mb": 512.0,
            "elapsed_s": step * seconds,
            "nonfinite_steps": 2 if step >= 50 else 0,
        }
        registry.fire(Event.LOG, step, row)
        if step == 50:
            registry.fire(Event.NONFINITE_STEP, step, {"step": step, "skipped": 2, "total": 2})
        if step % 10 == 0:
            registry.fire(Event.EVAL_END, step, {"loss": 4.0 / step, "accuracy": step / 250})
    registry.fire(Event.CHECKPOINT_SAVED, steps, {"path": "runs/x/checkpoints/step-00000100"})
    registry.fire(Event.EARLY_STOP, steps, {"best": 0.04})
    registry.fire(Event.EPOCH_END, 1, {"loss": 0.1})
    registry.fire(Event.FIT_END, steps, {"stop_reason": "early_stop", "elapsed_s": steps * seconds})


def displayed(mode: Any, console: Console | None = None, **options: Any) -> tuple[CallbackRegistry, Clock]:
    clock = Clock()
    registry = CallbackRegistry()
    ProgressDisplay(mode, console=console, total_steps=100, clock=clock, **options).register(registry)
    return registry, clock


def terminal(width: int = 110, **options: Any) -> Console:
    settings: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor", "_environ": {}}
    return Console(file=io.StringIO(), width=width, height=30, **{**settings, **options})


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


class TestLines:
    def test_a_run_as_plain_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        play(*displayed("lines"))
        out = capsys.readouterr().out
        assert "\x1b" not in out
        lines = out.splitlines()
        assert lines[:3] == [
            "phase warmup from step 0",
            "step 1/100  epoch 0  warmup  loss 5  accuracy 0.50%  lr 0.003  12.3k samples/s  ETA 1 min 39 s",
            "step 3/100  epoch 0  warmup  loss 1.667  accuracy 1.5%  lr 0.003  12.3k samples/s  "
            "ETA 1 min 37 s",
        ]
        assert "validation at step 10:  loss 0.4  accuracy 4.0%  (best so far)" in lines
        assert sum(line.startswith("validation") for line in lines) == 10
        assert sum(line.startswith("step ") for line in lines) == 50
        assert lines[-3:] == [
            "checkpoint of step 100 saved: runs/x/checkpoints/step-00000100",
            "stopping early at step 100: validation has stopped improving",
            "ended at step 100 after 1 min 40 s: validation had stopped improving; "
            "best accuracy 40.0% at step 100",
        ]
        warning = "warning: 2 of the steps up to 50 skipped, loss or gradient not finite (2 in all)"
        assert lines.count(warning) == 1

    def test_fast_logs_are_thinned_and_validations_are_not(self, capsys: pytest.CaptureFixture[str]) -> None:
        registry, clock = displayed("lines")
        play(registry, clock, seconds=0.01)
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("step ") for line in lines) == 1
        assert sum(line.startswith("validation") for line in lines) == 10

    def test_only_a_better_validation_is_called_best(self, capsys: pytest.CaptureFixture[str]) -> None:
        registry, _ = displayed("lines")
        for step, accuracy in ((1, 0.5), (2, 0.4), (3, 0.5), (4, 0.6)):
            registry.fire(Event.EVAL_END, step, {"loss": 1.0, "accuracy": accuracy})
        assert [line.endswith("(best so far)") for line in capsys.readouterr().out.splitlines()] == [
            True,
            False,
            False,
            True,
        ]

    def test_without_an_accuracy_the_lowest_loss_is_best(self, capsys: pytest.CaptureFixture[str]) -> None:
        registry, _ = displayed("lines")
        for step, loss in ((1, 2.0), (2, 3.0), (3, 1.0)):
            registry.fire(Event.EVAL_END, step, {"loss": loss, "accuracy": None, "bits_per_byte": 1.5})
        lines = capsys.readouterr().out.splitlines()
        assert [line.endswith("(best so far)") for line in lines] == [True, False, True]
        assert "loss 3  bits per byte 1.5" in lines[1]

    def test_a_resumed_run_counts_the_time_left_from_its_own_speed(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        registry, clock = displayed("lines")
        registry.fire(Event.FIT_START, 80, {"elapsed_s": 9999.0})
        clock.now += 20
        registry.fire(Event.LOG, 90, {"loss": 1.0})
        assert capsys.readouterr().out.splitlines() == [
            "resumed at step 80",
            "step 90/100  loss 1  ETA 20 s",
        ]

    def test_missing_and_broken_figures_are_left_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        registry, _ = displayed("lines")
        registry.fire(Event.LOG, 1, {"loss": float("nan"), "accuracy": None, "lr": "high", "phase": None})
        registry.fire(Event.EVAL_END, 1, {})
        registry.fire(Event.FIT_END, 1, {})
        assert capsys.readouterr().out.splitlines() == [
            "step 1/100",
            "validation at step 1:",
            "ended at step 1 after 0 s",
        ]

    def test_control_characters_do_not_reach_the_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        registry, _ = displayed("lines")
        registry.fire(Event.CHECKPOINT_SAVED, 1, {"path": "a\x1b[2J\r\nb"})
        out = capsys.readouterr().out
        assert out == "checkpoint of step 1 saved: a[2J  b\n"

    def test_a_stream_that_knows_ascii_only(self) -> None:
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        registry, _ = displayed("lines", Console(file=stream))
        registry.fire(Event.CHECKPOINT_SAVED, 1, {"path": "läufe/x"})
        registry.fire(Event.EVAL_END, 1, {"loss": 1.0})
        stream.seek(0)
        assert stream.read().splitlines()[0] == "checkpoint of step 1 saved: l?ufe/x"


class TestLive:
    def test_a_run_on_a_terminal(self) -> None:
        console = terminal()
        play(*displayed("auto", console, title="modular"))
        shown = text_of(console)
        for words in (
            "modular",
            "warmup › acceleration › consolidation › refinement",
            "step 60/100",
            "40 s left",
            "loss 0.08333",
            "accuracy 30.0%",
            "best accuracy 24.0% at step 60",
            "lr 0.003  ·  gradient norm 0.7  ·  12.3k samples/s  ·  memory 512 MB  ·  epoch 1",
            "skipped steps: 2 (loss or gradient not finite)",
            "checkpoint at step 100",
            "ended at step 100 after 1 min 40 s: validation had stopped improving",
        ):
            assert words in shown, words
        assert re.search("[▁▂▃▄▅▆▇█]{20}", shown)
        raw = console.file.getvalue()  # type: ignore[attr-defined]
        assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h") == 1, "the cursor is given back"
        assert "validation at step" not in shown, "no plain lines in between"

    def test_the_current_phase_stands_out(self) -> None:
        console = terminal()
        registry, _ = displayed("live", console)
        registry.fire(Event.FIT_START, 0, {"phase": "consolidation"})
        registry.fire(Event.FIT_END, 0, {})
        raw = console.file.getvalue()  # type: ignore[attr-defined]
        assert re.search(r"\x1b\[1;36mconsolidation\x1b", raw)
        assert not re.search(r"\x1b\[1;36mwarmup\x1b", raw)

    def test_frames_are_limited(self) -> None:
        console = terminal()
        registry, clock = displayed("live", console)
        registry.fire(Event.FIT_START, 0, {})
        for step in range(1, 1001):
            clock.now += 0.001
            registry.fire(Event.STEP_END, step, {})
        assert text_of(console).count("step ") <= 12
        registry.fire(Event.FIT_END, 1000, {})

    @pytest.mark.parametrize("width", [20, 40, 60, 79, 200])
    def test_any_width_can_be_drawn(self, width: int) -> None:
        console = terminal(width)
        play(*displayed("live", console, title="a" * 300))
        assert max(map(len, text_of(console).splitlines())) <= max(width, 20)

    def test_no_color_is_respected(self) -> None:
        console = terminal(_environ={"NO_COLOR": "1"}, color_system="auto")
        play(*displayed("live", console))
        raw = console.file.getvalue()  # type: ignore[attr-defined]
        colors = re.findall(r"\x1b\[(?:\d+;)*(?:3[0-9]|4[0-9]|9[0-7]|10[0-7])(?:;\d+)*m", raw)
        assert colors == []

    def test_without_a_length_and_figures(self) -> None:
        console = terminal()
        registry = CallbackRegistry()
        ProgressDisplay("live", console=console).register(registry)
        registry.fire(Event.FIT_START, 0, {})
        registry.fire(Event.LOG, 5, {"loss": None})
        registry.fire(Event.FIT_END, 5, {})
        assert "ended at step 5" in text_of(console)

    def test_markup_in_a_title_is_text(self) -> None:
        console = terminal()
        play(*displayed("live", console, title="[red]x[/nothing] \x1b[31m"))
        assert "[red]x[/nothing] [31m" in text_of(console)

    def test_closing_twice_is_harmless(self) -> None:
        console = terminal()
        clock = Clock()
        registry = CallbackRegistry()
        display = ProgressDisplay("live", console=console, clock=clock)
        display.register(registry)
        before = sys.stdout
        registry.fire(Event.FIT_START, 0, {})
        assert sys.stdout is not before
        display.close()
        display.close()
        assert sys.stdout is before
        registry.fire(Event.LOG, 1, {"loss": 1.0})


class TestChoosing:
    def test_quiet_prints_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        play(*displayed("quiet"))
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("console", "mode"),
        [
            (terminal(), "live"),
            (terminal(_environ={"TERM": "dumb"}), "lines"),
            (terminal(width=40), "lines"),
            (Console(file=io.StringIO()), "lines"),
            (Console(file=io.TextIOWrapper(io.BytesIO(), "ascii"), force_terminal=True, width=99), "lines"),
        ],
        ids=["terminal", "dumb", "narrow", "file", "ascii"],
    )
    def test_what_auto_is(self, console: Console, mode: str) -> None:
        assert ProgressDisplay(console=console).mode == mode

    def test_auto_on_a_file_is_lines_even_when_color_is_forced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert ProgressDisplay().mode == "lines"

    @pytest.mark.parametrize("stream", [None, "closed"])
    def test_auto_without_an_output_is_quiet(
        self, stream: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed = io.StringIO()
        closed.close()
        monkeypatch.setattr(sys, "stdout", closed if stream else None)
        assert ProgressDisplay().mode == "quiet"

    def test_an_unknown_mode(self) -> None:
        with pytest.raises(UsageError, match="mode='loud' is no progress display"):
            ProgressDisplay("loud")  # type: ignore[arg-type]


class Broken(io.StringIO):
    """A stream that works for a while."""

    def __init__(self, error: Callable[[], BaseException], writes: int) -> None:
        super().__init__()
        self.error, self.writes = error, writes

    def write(self, text: str) -> int:
        self.writes -= 1
        if self.writes < 0:
            raise self.error()
        return super().write(text)


class TestBroken:
    @pytest.mark.parametrize("mode", ["live", "lines"])
    @pytest.mark.parametrize("writes", [0, 1, 5])
    @pytest.mark.parametrize(
        "error",
        [
            BrokenPipeError,
            lambda: OSError(errno.EIO, "Input/output error"),
            lambda: ValueError("I/O operation on closed file"),
        ],
        ids=["pipe", "eio", "closed"],
    )
    def test_a_broken_terminal_does_not_stop_a_run(
        self, runs: Path, mode: str, writes: int, error: Callable[[], BaseException]
    ) -> None:
        run = RunDirectory.create(runs, "x")
        stream = Broken(error, writes)
        console = Console(file=stream, force_terminal=mode == "live", width=100, _environ={})
        before = sys.stdout
        play(*displayed(mode, console, run=run))
        assert sys.stdout is before
        events = run.read_events()
        assert [event["event"] for event in events] == ["display_off"], "it says so, once"
        assert type(error()).__name__ in events[0]["error"]

    def test_without_a_run_to_tell(self) -> None:
        play(*displayed("lines", Console(file=Broken(BrokenPipeError, 0))))

    def test_an_interrupt_is_not_swallowed(self) -> None:
        registry, _ = displayed("lines", Console(file=Broken(KeyboardInterrupt, 0)))
        with pytest.raises(KeyboardInterrupt):
            registry.fire(Event.EVAL_END, 1, {"loss": 1.0})

    @pytest.mark.parametrize("mode", ["live", "lines"])
    def test_a_reader_that_leaves_does_not_change_the_exit_code(self, mode: str) -> None:
        code = (
            "import sys\n"
            "from phase5_training.callbacks import ProgressDisplay\n"
            "from phase5_training.events import CallbackRegistry, Event\n"
            "registry = CallbackRegistry()\n"
            f"ProgressDisplay({mode!r}, interval_s=0).register(registry)\n"
            "registry.fire(Event.FIT_START, 0, {})\n"
            "for step in range(20000): registry.fire(Event.EVAL_END, step, {'loss': 1.0})\n"
            "registry.fire(Event.FIT_END, 20000, {})\n"
            "print('the report is at ...')\n"
            "print('trained', file=sys.stderr)\n"
        )
        # Forced color makes rich take the pipe for a terminal, so that "live" draws while it runs.
        environment = {**os.environ, "PYTHONPATH": SOURCE, "FORCE_COLOR": "1"}
        with subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            errors = process.stderr.read().decode()
            assert process.wait(60) == 0, errors
        assert errors == "trained\n"


class TestReportRefresher:
    def make(self, runs: Path, **options: Any) -> tuple[RunDirectory, CallbackRegistry, Clock]:
        run = RunDirectory.create(runs, "x")
        run.append_metrics({"kind": "train", "step": 1, "loss": 2.0})
        clock = Clock()
        registry = CallbackRegistry()
        ReportRefresher(run, clock=clock, **options).register(registry)
        return run, registry, clock

    def test_it_writes_a_report(self, runs: Path) -> None:
        run, registry, clock = self.make(runs)
        clock.now += 15
        registry.fire(Event.EVAL_END, 1, {})
        assert "<h3>Loss</h3>" in run.report.read_text(encoding="utf-8")

    def test_not_more_often_than_asked(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _, registry, clock = self.make(runs)
        written: list[float] = []
        monkeypatch.setattr(phase5_training.report, "write_report", lambda paths: written.append(clock.now))
        for _ in range(100):
            registry.fire(Event.EVAL_END, 1, {})
            clock.now += 1
        assert written == [115.0, 130.0, 145.0, 160.0, 175.0, 190.0]

    def test_slow_rendering_is_done_less_often(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _, registry, clock = self.make(runs)
        written: list[float] = []

        def render(paths: list[Path]) -> None:
            written.append(clock.now)
            clock.now += 2

        monkeypatch.setattr(phase5_training.report, "write_report", render)
        for _ in range(250):
            registry.fire(Event.EVAL_END, 1, {})
            clock.now += 1
        assert written == [115.0, 217.0, 319.0]

    def test_a_failure_is_noted_each_time_and_printed_once(
        self, runs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = io.StringIO()
        run, registry, clock = self.make(runs, stream=stream)

        def fail(paths: list[Path]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(phase5_training.report, "write_report", fail)
        clock.now += 100
        registry.fire(Event.EVAL_END, 7, {})
        clock.now += 100
        registry.fire(Event.EVAL_END, 8, {})
        events = run.read_events()
        assert [(event["event"], event["step"]) for event in events] == [
            ("report_failed", 7),
            ("report_failed", 8),
        ]
        assert "No space left" in events[0]["error"]
        printed = stream.getvalue().splitlines()
        assert len(printed) == 1
        assert printed[0].startswith("the report could not be written (OSError: ")

    def test_a_run_folder_that_is_gone_does_not_stop_the_run(self, tmp_path: Path) -> None:
        in_the_way = tmp_path / "file"
        in_the_way.write_text("")
        registry = CallbackRegistry()
        stream = Broken(BrokenPipeError, 0)
        refresher = ReportRefresher(RunDirectory(in_the_way / "x"), stream=stream)
        refresher.register(registry)
        registry.fire(Event.EVAL_END, 1, {})
        assert not refresher.refresh(1)


class TestSparkline:
    @pytest.mark.parametrize(
        ("values", "width", "line"),
        [
            ([], 5, ""),
            ([1.0], 5, "▁"),
            ([2.0, 2.0], 5, "▁▁"),
            ([0.0, 7.0], 0, ""),
            ([0.0, 0.0, 7.0, 7.0], 2, "▁█"),
            ([1.0, 10.0, 100.0], 3, "▁▅█"),  # by its logarithm
            ([-1.0, 0.0, 1.0], 3, "▁▅█"),
        ],
    )
    def test_by_hand(self, values: list[float], width: int, line: str) -> None:
        assert sparkline(values, width).replace("▄", "▅") == line

    def test_a_long_history_keeps_its_shape(self) -> None:
        progress = Progress()
        for step in range(50_000):
            progress.take_loss(50_000.0 + step)
        assert len(progress.losses) <= 4096
        assert sparkline(progress.losses, 8) == "▁▂▃▄▅▆▇█"


def test_time_left_goes_by_what_ends_the_run_first() -> None:
    by_time = Progress(step=10, total_steps=1000, seconds=5.0, seconds_before=10.0, max_seconds=60.0)
    assert by_time.eta() == 45.0
    by_steps = Progress(step=10, total_steps=20, seconds=5.0, max_seconds=60.0)
    assert by_steps.eta() == 5.0
    assert Progress(step=10, seconds=5.0).eta() is None


def test_a_wait_for_data_is_shown_from_one_percent_on():
    def line(waited):
        return log_line(Progress(step=1, total_steps=2, train={"loss": 1.0, "data_wait_share": waited}))

    assert "waiting for data 25.0%" in line(0.25)
    assert "waiting" not in line(0.004)
    assert "waiting" not in line(None)
