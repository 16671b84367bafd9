"""Ctrl-C, SIGTERM and a lost terminal: requests to save and stop, and what is raised once that is done."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

# What a terminal or a connection that goes away sends, by the shell and by the system: a second one says
# nothing new. Windows has none.
_HANGUP: int | None = getattr(signal, "SIGHUP", None)
GRACE_SECONDS = 10.0  # that a rank may wait inside torch after SIGTERM, of torchrun's 30
_ENDING = tuple(number for number in (signal.SIGTERM, _HANGUP) if number is not None)


class StopFlag:
    """Whether the run is to save and stop, for the parts that look at it.

    Example:
        >>> flag = StopFlag()
        >>> flag.look()
        >>> flag.asked = True
    """

    def __init__(self) -> None:
        self.asked = False

    @property
    def wished(self) -> bool:
        """What this process knows of a stop."""
        return self.asked

    def ask(self) -> None:
        """Ask for a stop."""
        self.asked = True

    def clear(self) -> None:
        """The stop is done."""
        self.asked = False

    def look(self) -> None:
        """Leave what is being done, if the run is to stop.

        Raises:
            StopAsked: it is.
        """
        if self.asked:
            raise StopAsked


class SharedStopFlag(StopFlag):
    """The flag of one rank among several, who stop together: after the step in which they agreed to.

    Nothing is cut short, since the others would wait for what this rank leaves out.

    Example:
        >>> flag = SharedStopFlag()
        >>> flag.ask()
        >>> flag.look(), flag.asked, flag.wished
        (None, False, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self._wished = False

    @property
    def wished(self) -> bool:
        """What this process knows of a stop; the others learn of it at the next batch."""
        return self._wished

    def ask(self) -> None:
        """Wish for a stop."""
        self._wished = True

    def clear(self) -> None:
        """The stop is done."""
        self.asked = self._wished = False

    def look(self) -> None:
        """Go on; see the class."""


class StopAsked(BaseException):
    """The run is to save and stop; raised where a step, a validation or a wait for data is cut short.

    No Exception: what reads the data may handle those.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came during a run, which has been saved; ``result`` is what it gave until then."""

    exit_code = 128 + signal.SIGINT

    def __init__(self, result: Any) -> None:
        super().__init__(_what_is_saved(result))
        self.result = result


class Terminated(SystemExit):
    """SIGTERM or SIGHUP came during a run, which has been saved; ``result`` is what it gave until then."""

    def __init__(self, result: Any, number: int = signal.SIGTERM) -> None:
        self.exit_code = 128 + number
        super().__init__(self.exit_code)
        self.result = result

    def __str__(self) -> str:
        return _what_is_saved(self.result)


def stopped_by(number: int, result: Any) -> Interrupted | Terminated:
    """What to raise after the signal ``number``, now that the run is saved."""
    return Interrupted(result) if number == signal.SIGINT else Terminated(result, number)


def _what_is_saved(result: Any) -> str:
    if result.success:
        return f"interrupted, and the run in {result.run_dir} is complete"
    return f"interrupted and saved in {result.run_dir}; continue with `forge resume {result.run_dir}`"


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[list[int]]:
    """While inside, the first SIGINT, SIGTERM or SIGHUP calls ``stop``; a second one acts as it did before.

    But for SIGHUP, which may come twice and is then ignored. One that is ignored already stays so: the
    program was started to outlive its terminal (nohup). Does nothing outside the main thread, where Python
    allows no handlers.

    Yields:
        A list that receives the number of the signal that came.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {
        number: signal.getsignal(number) or signal.SIG_DFL
        for number in (signal.SIGINT, *_ENDING)
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN
    }

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stop()
        for own, handler in before.items():
            signal.signal(own, signal.SIG_IGN if own == _HANGUP else handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def end_when_stuck(handled: Sequence[int], grace: float = GRACE_SECONDS) -> Iterator[None]:
    """While inside, a SIGTERM that is not handled within ``grace`` seconds ends the process.

    A rank that waits inside torch for one that has died handles no signal; torchrun ends it by force after 30
    seconds, and only then starts the ranks again. Does nothing outside the main thread.

    Args:
        handled: what :func:`stop_on_signals` yields.
        grace: seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python writes the number of a signal there at once, and calls its handler when the main thread is back.
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        number = b" "
        while number and number[0] != signal.SIGTERM:
            number = os.read(reader, 1)
        since = time.monotonic()
        while number and not over.wait(0.05) and signal.SIGTERM not in handled:
            if time.monotonic() - since > grace:
                os._exit(128 + signal.SIGTERM)
        os.close(reader)

    over = threading.Event()
    threading.Thread(target=watch, name="forge-stuck", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        os.close(writer)


@contextlib.contextmanager
def stop_on_sigterm(stop: Callable[[], None]) -> Iterator[list[int]]:
    """The same for SIGTERM and SIGHUP inside a running event loop, which has its own way with Ctrl-C.

    Leaves alone a signal that something handles already or that is ignored; does nothing where the loop
    cannot handle signals.

    Yields:
        A list that receives the number of the signal that came.
    """
    received: list[int] = []
    loop = asyncio.get_running_loop()

    installed: list[int] = []

    def remove() -> None:
        while installed:
            loop.remove_signal_handler(installed.pop())

    def handle(number: int) -> None:
        received.append(number)
        remove()
        if _HANGUP is not None and _HANGUP in before:
            loop.add_signal_handler(_HANGUP, lambda: None)
            installed.append(_HANGUP)
        stop()

    before = [number for number in _ENDING if signal.getsignal(number) == signal.SIG_DFL]
    for number in before:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, handle, number)
            installed.append(number)
    try:
        yield received
    finally:
        remove()
