"""What a person sees while data are read for the first time."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from phase5_training.errors import printable
from phase5_training.pipeline.formats.reading import Reading
from phase5_training.report.wording import compact, duration, megabytes

QUIET_S = 2.0  # a shorter pass is not worth a line
FRAME_S = 0.2  # a line on a terminal is written anew at most this often
LINE_S = 10.0  # elsewhere a new line comes at most this often


class ReadingProgress:
    """A listener for :func:`phase5_training.pipeline.formats.reading.listening`, which shows a long pass.

    Args:
        live: write one line over and over, as on a terminal; else new lines.
        sizes: bytes of each file that is going to be read, by its path as the readers name it.
        stream: where to write; default standard output.
        clock: seconds, monotonic.

    Example:
        >>> seconds = iter([0.0, 1.0, 3.0])
        >>> show = ReadingProgress(False, {"a.jsonl": 400_000_000}, clock=lambda: next(seconds))
        >>> show(Reading("a.jsonl", 50_000_000, None, "bytes"))
        >>> show(Reading("a.jsonl", 150_000_000, None, "bytes"))
        reading a.jsonl: 150 MB of 400 MB, 50 MB/s, 5 s left
    """

    def __init__(
        self,
        live: bool,
        sizes: Mapping[str, int],
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live, self._sizes, self._stream, self._clock = live, sizes, stream, clock
        self._began = clock()
        self._next = self._began + QUIET_S
        self._bytes: dict[str, int] = {}
        self._width = 0

    def __call__(self, found: Reading) -> None:
        """Take how far a pass is, and show it if it is time."""
        if found.unit == "bytes":
            self._bytes[found.what] = found.done
        now = self._clock()
        if now < self._next or (found.unit == "records" and self._bytes and not self._all_read()):
            return
        self._next = now + (FRAME_S if self._live else LINE_S)
        self._write(self._sentence(found, now - self._began))

    def _all_read(self) -> bool:
        return sum(self._bytes.values()) >= sum(self._sizes.values())

    def _sentence(self, found: Reading, seconds: float) -> str:
        if found.unit == "bytes":
            done, total = sum(self._bytes.values()), sum(self._sizes.values())
            amount, speed = megabytes(done / 1e6), f"{megabytes(done / 1e6 / seconds)}/s"
            whole = f" of {megabytes(total / 1e6)}" if total >= done else ""
        else:
            done, total = found.done, found.total or 0
            amount, speed = compact(done), f"{compact(done / seconds)} records/s"
            whole = f" of {compact(total)} records" if total else " records"
        left = f", {duration((total - done) * seconds / done)} left" if total > done > 0 else ""
        return f"reading {printable(Path(found.what).name)}: {amount}{whole}, {speed}{left}"

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stdout
        # Whoever reads the output may have gone; that is for the run to notice.
        with contextlib.suppress(OSError, ValueError, UnicodeEncodeError):
            if self._live:
                text = text[: min(shutil.get_terminal_size().columns, 80) - 1]
                stream.write(f"\r{text:<{self._width}}")
                self._width = len(text)
            else:
                stream.write(f"{text}\n")
            stream.flush()

    def close(self) -> None:
        """Take the line on a terminal away."""
        if self._live and self._width:
            self._write("")
            self._write("")
