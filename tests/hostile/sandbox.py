"""Runs a reader in a forked child that may neither open foreign files nor start programs, within limits.

The limits are the kernel's (address space, processor time), so they hold inside C libraries too. Time is
the processor's: another program on the machine cannot make a case fail.
"""

import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phase5_training.pipeline.formats import native

FORBIDDEN = (
    "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "ftplib.", "urllib.", "webbrowser.", "pty.",
)  # fmt: skip
HARMLESS = {"os.listdir", "os.scandir", "os.putenv", "os.walk", "os.fwalk"}
# What the index of a data file does, in the folder of the case.
WRITES = {"os.mkdir": 1, "os.chmod": 1, "os.remove": 1, "os.rename": 2, "os.truncate": 0}
PATIENCE = 300  # seconds of wall clock: the machine may be busy, the processor limit is the real one


@dataclass
class Outcome:
    """How the child ended: ``ended`` is "returned", "raised", "out of time" or how it died."""

    ended: str
    value: Any = None
    error: str = ""
    message: str = ""
    trace: str = ""
    peak: int = 0  # bytes beyond what the process had before
    forbidden: list[str] = field(default_factory=list)


def run(work: Callable[[], Any], folder: Path, *, memory: int = 3 << 30, seconds: int = 10) -> Outcome:
    """Run ``work`` in a child that may read ``folder`` and Python's own files, and nothing else.

    Args:
        work: returns something that pickles.
        folder: where the data lie.
        memory: bytes of address space beyond what the process has now.
        seconds: processor seconds.
    """
    native.reader()  # compiled on first use, by a program
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read_end)
            outcome = _inside(work, folder, memory, seconds)
            with os.fdopen(write_end, "wb") as pipe:
                pickle.dump(outcome, pipe)
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        raw, late = _read_patiently(pipe.fileno())
    if late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if raw:
        return pickle.loads(raw)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if late or number == signal.SIGXCPU:
        return Outcome("out of time")
    return Outcome(f"died of {signal.Signals(number).name}" if number else "died without a word")


def _read_patiently(pipe: int) -> tuple[bytes, bool]:
    raw, end = b"", time.monotonic() + PATIENCE
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return b"", True
        block = os.read(pipe, 1 << 20)
        if not block:
            return raw, False
        raw += block


def _inside(work: Callable[[], Any], folder: Path, memory: int, seconds: int) -> Outcome:
    outcome = Outcome("returned")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    size = _status("VmSize") + memory
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    before = _status("VmRSS")
    os.environ["XDG_CACHE_HOME"] = str(folder / ".cache")  # of indexes that cannot lie beside their data
    sys.addaudithook(_guard(folder, outcome.forbidden))
    try:
        outcome.value = work()
    except BaseException as error:
        outcome.ended, outcome.error, outcome.message = "raised", type(error).__name__, str(error)
        outcome.trace = traceback.format_exc()
    outcome.peak = max(0, _status("VmHWM") - before)
    return outcome


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) << 10
    raise KeyError(key)


def _guard(folder: Path, forbidden: list[str]) -> Callable[[str, tuple], None]:
    """An audit hook that notes and refuses what no reader of data has to do."""
    mine = str(folder.resolve())
    python = (
        *{str(Path(p).resolve()) for p in sys.path if p},
        sys.prefix,
        sys.base_prefix,
        "/proc/",
        "/sys/",
    )

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path = arguments[0]
            if not isinstance(path, (str, bytes, os.PathLike)):
                return
            real = os.path.realpath(os.fsdecode(path))
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if len(arguments) > 2 else 0
            if (real + os.sep).startswith(mine + os.sep) or (not writes and real.startswith(python)):
                return
            event = f"open {real}"
        elif event in WRITES:
            paths = [os.path.realpath(os.fsdecode(path)) for path in arguments[: WRITES[event]]]
            if all((path + os.sep).startswith(mine + os.sep) for path in paths):
                return
        elif event in HARMLESS or not event.startswith(FORBIDDEN):
            return
        forbidden.append(event)
        raise PermissionError(f"the sandbox refuses {event}")

    return hook
