import asyncio
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from phase5_training.signals import stop_on_signals, stop_on_sigterm, stopped_by


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_and_the_second_acts_as_before(number):
    seen, calls = [], []
    before = signal.signal(number, lambda *_: seen.append("before"))
    try:
        with stop_on_signals(lambda: calls.append("stop")) as received:
            assert received == []
            os.kill(os.getpid(), number)
            assert (calls, received, seen) == (["stop"], [number], [])
            os.kill(os.getpid(), number)
            assert (calls, seen) == (["stop"], ["before"])
        os.kill(os.getpid(), number)
        assert (calls, seen) == (["stop"], ["before", "before"])
    finally:
        signal.signal(number, before)


def test_a_terminal_that_goes_away_stops_once_and_may_say_so_twice():
    calls, before = [], signal.getsignal(signal.SIGHUP)
    with stop_on_signals(lambda: calls.append("stop")) as received:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert (calls, received) == (["stop"], [signal.SIGHUP])
    assert signal.getsignal(signal.SIGHUP) is before


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(lambda: None) as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_event_loop_stops_once(number):
    calls = []

    async def work():
        with stop_on_sigterm(lambda: calls.append("stop")) as received:
            for _ in range(1 if number == signal.SIGTERM else 2):
                os.kill(os.getpid(), number)
                await asyncio.sleep(0.01)
            return received

    assert asyncio.run(work()) == [number]
    assert calls == ["stop"]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_handlers_are_given_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def fail():
        with stop_on_signals(lambda: None):
            inside.append(signal.getsignal(signal.SIGTERM))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert inside[0] is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_that_python_did_not_set_is_no_obstacle(monkeypatch):
    """``signal.getsignal`` gives None for those, and ``signal.signal`` refuses None."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr("phase5_training.signals.signal.getsignal", lambda number: None)
    try:
        with stop_on_signals(lambda: None):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_does_nothing_outside_the_main_thread():
    before, inside = signal.getsignal(signal.SIGINT), []

    def work():
        with stop_on_signals(lambda: None) as received:
            inside.extend([signal.getsignal(signal.SIGINT), received])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before, []]


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (signal.SIGINT, KeyboardInterrupt, 130),
        (signal.SIGTERM, SystemExit, 143),
        (signal.SIGHUP, SystemExit, 129),
    ],
)
def test_what_is_raised_once_the_run_is_saved(number, kind, code):
    for success, words in (
        (False, "interrupted and saved in runs/a; continue with `forge resume runs/a`"),
        (True, "interrupted, and the run in runs/a is complete"),
    ):
        result = SimpleNamespace(success=success, run_dir="runs/a")
        error = stopped_by(number, result)
        assert isinstance(error, kind)
        assert (str(error), error.exit_code, error.result) == (words, code, result)
    assert getattr(error, "code", code) == code


STUCK = """
import ctypes, os, signal, sys, threading, time
from phase5_training.signals import end_when_stuck, stop_on_signals
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
with stop_on_signals(lambda: None) as handled, end_when_stuck(handled, grace=0.5):
    end = time.monotonic() + 2
    while time.monotonic() < end:
        BODY
print("went on")
"""


@pytest.mark.parametrize(("body", "code"), [("lock(mutex)", 143), ("time.sleep(0.1)", 0)])
def test_a_process_that_is_stuck_outside_python_ends_at_sigterm_and_one_that_moves_goes_on(body, code):
    done = subprocess.run(
        [sys.executable, "-c", STUCK.replace("BODY", body)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr.decode()
    assert (b"went on" in done.stdout) == (code == 0)
