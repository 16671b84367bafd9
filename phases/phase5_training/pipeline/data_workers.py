"""Worker processes that prepare batches: one that dies or hangs is named, with what it was reading."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from phase5_training.errors import DataError

POLL_SECONDS = 0.5  # between two looks at the workers, and at whether the run is to stop
DEATH_SECONDS = 2.0  # from a broken connection until a worker counts as alive after all
SHOWN = 5  # records named in a message


class WorkerBoard:
    """What each worker is reading, in memory that all processes see.

    Args:
        workers: how many there are.
        batch_size: records a worker reads at a time, at most.
    """

    def __init__(self, workers: int, batch_size: int) -> None:
        self._rows = torch.full((workers, batch_size), -1, dtype=torch.int64).share_memory_()

    def begin(self, indices: np.ndarray) -> None:
        """Write down, in a worker, that it reads these records; nothing in any other process."""
        worker = get_worker_info()
        if worker is not None:
            row = self._rows[worker.id]
            row.fill_(-1)
            row[: len(indices)] = torch.as_tensor(indices)

    def end(self) -> None:
        """Write down that it has read them."""
        self.begin(np.empty(0, np.int64))

    def reading(self, worker: int) -> list[int]:
        """The records that a worker has begun to read and not finished."""
        row = self._rows[worker].tolist()
        return [index for index in row if index >= 0]


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Without torch's warnings of too many workers: the loader says once what would be faster."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


def start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Begin an epoch; a worker that dies is found by :func:`watched`, not in the middle of a step.

    Torch has the main thread raise at any moment when a worker dies; its handler is taken back.
    """
    with unwarned():
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
            return iter(loader)
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
    with contextlib.suppress(TypeError):  # None: a handler that Python did not set
        signal.signal(signal.SIGCHLD, before)
    return batches


def watched(
    batches: Any,
    board: WorkerBoard,
    *,
    timeout: float,
    locate: Callable[[int], tuple[str, int]],
    while_waiting: Callable[[], None],
) -> Iterator[Any]:
    """What the workers make, as long as they live and do not hang.

    Args:
        batches: an iterator over a DataLoader whose own timeout is ``POLL_SECONDS``.
        board: that its workers write to.
        timeout: seconds to wait for one batch.
        locate: the file of a record, and its place there.
        while_waiting: called at each look; what it raises passes through.

    Raises:
        DataError: a worker died, or none delivered in time; names the file and the records.
    """
    while True:
        began = time.monotonic()
        while True:
            try:
                item = next(batches)
                break
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # also of memory shared by one that died
                waited = str(error).startswith("DataLoader timed out after")
                if not waited:
                    _wait_for_a_death(batches._workers)
                dead = [w for w in enumerate(batches._workers) if not w[1].is_alive()]
                if dead:
                    raise DataError(_death(*dead[0], board, locate)) from error
                if not waited:
                    raise
                while_waiting()
                if time.monotonic() - began >= timeout:
                    raise DataError(_hang(batches, board, timeout, locate)) from error
        yield item


def _wait_for_a_death(workers: Any) -> None:
    """A connection breaks, and a sentinel closes, a moment before the system says who died."""
    until = time.monotonic() + DEATH_SECONDS
    while all(worker.is_alive() for worker in workers) and time.monotonic() < until:
        time.sleep(0.01)


def _death(number: int, worker: Any, board: WorkerBoard, locate: Callable[[int], tuple[str, int]]) -> str:
    code = worker.exitcode
    how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    return (
        f"data worker {number} died ({how}) while it read {_records(board.reading(number), locate)}; a lack "
        "of memory kills so: use fewer workers or a smaller batch_size, or num_workers=0 to see an error"
    )


def _hang(batches: Any, board: WorkerBoard, timeout: float, locate: Callable[[int], tuple[str, int]]) -> str:
    found = [(number, board.reading(number)) for number in range(len(batches._workers))]
    hanging = [(number, records) for number, records in found if records] or found[:1]
    for number, _ in hanging:
        batches._workers[number].kill()  # it would hold up the end of the program
    number, records = hanging[0]
    return (
        f"data worker {number} has not read {_records(records, locate)} within data_timeout={timeout:g} "
        "seconds; look at these, or give a longer data_timeout"
    )


def _records(records: list[int], locate: Callable[[int], tuple[str, int]]) -> str:
    if not records:
        return "nothing yet"
    path = locate(records[0])[0]
    places = [place for found, place in map(locate, records) if found == path]
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return f"record {', '.join(map(str, places[:SHOWN]))}{more} of {path}"
