"""Cases that take turns: each in a process of its own, one of them working at a time.

The machine's weather then falls on all cases alike, and the ratio of two cases within one round is worth
more than the ratio of two averages. Processes, not one: what torch compiled for one case stays out of the
way of the next (it checks the compiled forms of every model that ran the same code), and a case that dies
takes nothing along.
"""

import json
import multiprocessing
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from phase4_bitnet import native
from phase5_training.records import machine

PEERS = ("torchao", "transformers", "datasets")
_SPAWN = multiprocessing.get_context("spawn")


class CaseError(Exception):
    """A case could not run; says why in one line."""


class Worker:
    """One case in its own process.

    Args:
        prepare: called there with ``args``; returns the function that takes one turn, and a dict of facts
            about the case.
        args: picklable.

    Raises:
        CaseError: ``prepare`` raised, or the process died.
    """

    def __init__(self, prepare: Callable[..., tuple[Callable[[], Any], dict[str, Any]]], *args: Any) -> None:
        self._pipe, other = _SPAWN.Pipe()
        # Not daemonic: torch.compile has helper processes of its own.
        self._process = _SPAWN.Process(target=_serve, args=(other, prepare, args))
        self._process.start()
        other.close()
        try:
            self.facts: dict[str, Any] = self._receive()
        except CaseError:
            self.close()
            raise

    def turn(self) -> Any:
        """Let the case work once and wait for what it returns.

        Raises:
            CaseError: the turn raised, or the process died.
        """
        self._pipe.send(True)
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            worked, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise CaseError(f"its process ended with exit code {self._process.exitcode}") from None
        if not worked:
            raise CaseError(value)
        return value


def _serve(pipe: Connection, prepare: Callable[..., Any], args: Sequence[Any]) -> None:
    """The other end of a `Worker`: answers (True, value) or (False, reason) until the pipe is closed."""
    try:
        turn, facts = prepare(*args)
        pipe.send((True, facts))
        while True:
            pipe.recv()
            pipe.send((True, turn()))
    except EOFError:
        return
    except Exception as error:
        pipe.send((False, reason(error)))


def reason(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile; with one value that value three times."""
    if len(values) < 2:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def ratio_quartiles(own: Sequence[float], base: Sequence[float]) -> list[float]:
    """Quartiles of own / base, round by round."""
    return [round(q, 4) for q in quartiles([a / b for a, b in zip(own, base, strict=True)])]


def timing_circumstances(threads: int) -> dict[str, Any]:
    """Facts beside short timings: threads, the load of others before they begin, kernels or none."""
    return {
        "threads": threads,
        "load_at_start": round(os.getloadavg()[0], 2),
        "native": native.available(),
        **circumstances(),
    }


def circumstances() -> dict[str, Any]:
    """What every record says of where it was made: machine, versions of the peers, command."""
    found = machine()
    for package in PEERS:
        try:
            found["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found["versions"][package] = None
    return {"machine": found, "command": shlex.join(["python", *sys.argv])}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
