"""One piece of work beside the training, in a thread of its own."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """Begins a piece of work at once; what it returns or raises is had from :meth:`result`.

    The thread is a daemon: a program that ends without asking for the result leaves the work unfinished,
    as a kill would.

    Args:
        work: called once, in the thread.

    Example:
        >>> task = BackgroundTask(lambda: 2 + 2)
        >>> task.result(), task.done
        (4, True)
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="forge-background", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value.append(self._work())
        except BaseException as error:  # it is the caller's, who gets it from result()
            self._error = error
        finally:
            del self._work  # and the memory that it holds

    @property
    def done(self) -> bool:
        """Whether the work has ended, well or not."""
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the end of the work; returns what it returned, or raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value[0]
