"""Ctrl-C and SIGTERM as a request to save and stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[list[int]]:
    """While inside, the first SIGINT or SIGTERM calls ``stop``; a second one acts as it did before.

    Does nothing outside the main thread, where Python allows no handlers.

    Yields:
        A list that receives the number of the signal that came.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {
        number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)
    }

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stop()
        for own, handler in before.items():
            signal.signal(own, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
