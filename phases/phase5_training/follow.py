"""Reading a run's files while another process writes them."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from phase5_training.errors import DataError


class RowFollower:
    r"""The rows of a JSON-lines file, as another process appends them or takes some back.

    Args:
        path: the file; it need not be there yet.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> follower = RowFollower(file)
        >>> _ = file.write_text('{"step": 10}\n{"step": 2')
        >>> follower.read()
        (False, [{'step': 10}])
        >>> _ = file.write_text('{"step": 5}\n')
        >>> follower.read()
        (True, [{'step': 5}])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0  # bytes of whole lines read
        self._last = b""  # the last of them, by which a file that was written anew is known

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether rows that were read before are no longer so, rows since the last call).

        After a True the rows are those of the whole file. A line that is not finished is left for later.

        Raises:
            DataError: a line is not a JSON object.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset - len(self._last))
                content = file.read()
                anew = not content.startswith(self._last)
                if anew:
                    file.seek(0)
                    content = file.read()
        except FileNotFoundError:
            anew, content = self._offset > 0, b""
        if anew:
            self._offset = 0
        else:
            content = content[len(self._last) :]
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        if anew or lines:
            self._last = lines[-1] if lines else b""
        self._offset += sum(map(len, lines))
        return anew, [self._parsed(line) for line in lines]

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{self.path} has a line that is not a JSON object; delete it: {line[:60]!r}")
        return row


def this_process() -> dict[str, Any]:
    """What tells this process from all others: ``host``, ``pid`` and ``process_started`` (clock ticks)."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "process_started": _started(os.getpid())}


def is_alive(process: Mapping[str, Any]) -> bool | None:
    """Whether a process noted by :func:`this_process` still runs; None where that cannot be known from here.

    Example:
        >>> is_alive(this_process()), is_alive({"host": "another machine", "pid": 1})
        (True, None)
    """
    pid = process.get("pid")
    if process.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, so it is there
    # A pid is used again; the time of the start is not.
    return process.get("process_started") == _started(pid)


def _started(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # not Linux, or it has just ended
        return None
    # Fields are counted from behind the command, which may hold spaces and brackets.
    return int(text.rpartition(")")[2].split()[19])
