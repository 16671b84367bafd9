"""Mirrors of a run in W&B, TensorBoard and trackio.

metrics.jsonl is the truth; a tracker is a process of its own that reads it and writes what it finds into the
tracker's files (:mod:`phase5_training.trackers.mirror`). So the run never waits for one: the file is the
queue, a library that hangs, crashes or catches signals does so elsewhere, and what a tracker could not
write in time is written by ``forge track RUN``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from phase5_training.errors import UsageError, nearest_match
from phase5_training.events import CallbackRegistry, Event
from phase5_training.records import TRACKERS as TRACKERS_FOLDER
from phase5_training.records import RunDirectory

TRACKERS = ("wandb", "tensorboard", "trackio")
CLOSE_S = 30.0  # at the end of a run, for a tracker to write what is left
_PACKAGES = str(Path(__file__).resolve().parents[2])


def check_trackers(names: Sequence[str]) -> None:
    """Whether the trackers of these names can be used here.

    Raises:
        UsageError: an unknown name, or a package that is not installed.

    Example:
        >>> check_trackers(["tensorbord"])
        Traceback (most recent call last):
        ...
        phase5_training.errors.UsageError: tracker 'tensorbord' is unknown; did you mean 'tensorboard'?
    """
    for name in names:
        if name not in TRACKERS:
            near = nearest_match(name, TRACKERS)
            hint = f"did you mean {near!r}?" if near else f"use one of {', '.join(TRACKERS)}"
            raise UsageError(f"tracker {name!r} is unknown; {hint}")
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no package
            extra = "trackio" if name == "trackio" else "trackers"
            raise UsageError(
                f"tracker {name!r} needs the package {name}, which is not installed; "
                f"pip install 'forge-training[{extra}]', or leave it out of trackers"
            )


class TrackerProcesses:
    """Starts a process for each tracker with the run and lets it end after the run.

    Args:
        names: of the trackers.
        run: the run's folder.
        project: under which the trackers list the run.
        close_s: seconds that a tracker has to write what is left when the run has ended; the run does not
            wait for it, only the end of the program does.
        stream: where a failure is told, once for each tracker; default standard error.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: RunDirectory,
        project: str = "forge",
        *,
        close_s: float = CLOSE_S,
        stream: TextIO | None = None,
    ) -> None:
        check_trackers(names)
        self.names, self.run, self.project, self.close_s = tuple(names), run, project, close_s
        self._stream = stream
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._closing: threading.Thread | None = None

    def register(self, registry: CallbackRegistry) -> None:
        """Hook onto ``fit_start``, ``log`` and ``fit_end``; no key of their metrics is read."""
        registry.register(Event.FIT_START, lambda step, metrics: self.start())
        registry.register(Event.LOG, lambda step, metrics: self.look())
        registry.register(Event.FIT_END, lambda step, metrics: self.close())

    def start(self) -> None:
        """Start the processes; returns at once."""
        self.wait()
        folder = self.run.path / TRACKERS_FOLDER
        for name in self.names:
            try:
                folder.mkdir(exist_ok=True)
                with open(folder / f"{name}.log", "wb") as log:
                    self._processes[name] = subprocess.Popen(
                        [
                            sys.executable,
                            "-m",
                            "phase5_training.trackers",
                            str(self.run.path),
                            name,
                            self.project,
                            str(os.getpid()),
                        ],
                        stdin=subprocess.PIPE,  # its end tells the process that the run has ended
                        stdout=log,
                        stderr=log,
                        env=_environment(),
                        start_new_session=True,  # Ctrl-C is for the run
                    )
            except OSError as error:
                self._tell(name, str(error))

    def look(self) -> None:
        """Tell of trackers that have failed; waits for none."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                del self._processes[name]
                self._tell(name, self._last_words(name))

    def close(self) -> None:
        """Let the trackers finish in the background, within the time limit."""
        self.look()
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended meanwhile
                process.stdin.close()
        # Not a daemon: the program stays until the limit, and only if a tracker needs that long.
        self._closing = threading.Thread(target=self._finish, args=(self._processes,), name="forge trackers")
        self._processes = {}
        self._closing.start()

    def wait(self) -> None:
        """Wait for the end of what :meth:`close` has begun, ``close_s`` at the most."""
        if self._closing is not None:
            self._closing.join()
            self._closing = None

    def _finish(self, processes: dict[str, subprocess.Popen[bytes]]) -> None:
        until = time.monotonic() + self.close_s
        for name, process in processes.items():
            try:
                if process.wait(max(0.0, until - time.monotonic())) != 0:
                    self._tell(name, self._last_words(name))
            except subprocess.TimeoutExpired:
                _kill(process)
                self._tell(name, f"not done {self.close_s:g} s after the run had ended")

    def _last_words(self, name: str) -> str:
        with contextlib.suppress(OSError):
            lines = (self.run.path / TRACKERS_FOLDER / f"{name}.log").read_text(errors="replace").splitlines()
            return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return "it left no log"

    def _tell(self, name: str, reason: str) -> None:
        with contextlib.suppress(Exception):
            self.run.append_event({"event": "tracker_failed", "tracker": name, "error": reason})
        with contextlib.suppress(Exception):
            print(
                f"warning: tracker {name} failed ({reason[:300]}); the run goes on: all figures are in "
                f"metrics.jsonl, and `forge track {self.run.path} {name}` mirrors them",
                file=self._stream or sys.stderr,
            )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and what its library has started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()


def _environment() -> dict[str, str]:
    path = [_PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
