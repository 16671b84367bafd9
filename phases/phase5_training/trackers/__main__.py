"""A tracker's process: ``python -m phase5_training.trackers RUN TRACKER PROJECT PID_OF_THE_RUN``."""

import contextlib
import os
import sys
import threading

from phase5_training.records import RunDirectory
from phase5_training.trackers.mirror import mirror


def main() -> None:
    """Mirror until the run's process closes our standard input or is gone."""
    folder, name, project, parent = sys.argv[1:]
    with contextlib.suppress(AttributeError, OSError):  # not on Windows
        os.nice(10)
    ended = threading.Event()

    def wait_for_the_end() -> None:
        with contextlib.suppress(OSError):
            # Not sys.stdin, whose lock a thread that waits would hold at the end of the process.
            while os.read(0, 4096):
                pass
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()

    def run_is_over(seconds: float) -> bool:
        # A worker of the run may hold the other end of the pipe after the run was killed.
        return ended.wait(seconds) or (hasattr(os, "getppid") and os.getppid() != int(parent))

    mirror(RunDirectory(folder), name, project, run_is_over)


if __name__ == "__main__":
    main()
