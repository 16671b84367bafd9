"""Where the loop's batches come from: sought or drawn again on resume, timed, and given up at a stop."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from phase5_training.device_feed import moved_ahead
from phase5_training.protocols import Batch
from phase5_training.random_state import random_state, set_random_state
from phase5_training.signals import StopFlag


class Feed:
    """The batches of an epoch, from any place in it.

    Args:
        flag: whether the run is to stop.
        waited: told the seconds that each batch was waited for.
        device: where the batches of a loader with ``reads_ahead`` go before they are asked for.
    """

    def __init__(
        self, flag: StopFlag, waited: Callable[[float], None], device: torch.device | str = "cpu"
    ) -> None:
        self._flag, self._waited, self._device = flag, waited, torch.device(device)
        self._waits_in: int | None = None
        self.failed = False
        """Whether the data raised while a batch was awaited: between two steps, with the state whole."""
        self.epoch_random: Mapping[str, Any] = {}
        """The generators at the beginning of the epoch, for loaders that cannot seek."""
        self.boundary_random: Mapping[str, Any] = {}
        """The generators after the last step, where one that is cut short goes back to."""

    def batches(self, loader: Any, epoch: int, used: int) -> Iterator[Batch]:
        """The batches of an epoch but the first ``used``.

        Args:
            loader: iterable; with ``set_position(epoch, batch)`` and not ``seeks = False`` it is sought, and
                ``while_waiting`` is set to a function that it is to call while it waits.
            epoch: from 0.
            used: batches that earlier sessions have taken.

        Raises:
            StopAsked: a stop came while a batch was awaited.
        """
        self.failed = False
        random = self.boundary_random = random_state()
        if not used:
            self.epoch_random = random
        looks = hasattr(loader, "while_waiting")
        if looks:
            loader.while_waiting = self._flag.look
        if hasattr(loader, "set_position"):
            seeks = getattr(loader, "seeks", True)
            loader.set_position(epoch, used if seeks else 0)
            used = 0 if seeks else used
        if used:
            # No way to seek: what was used before a resume is drawn again as it was drawn, and dropped.
            set_random_state(self.epoch_random)
        batches = iter(loader)
        if getattr(loader, "reads_ahead", False):
            batches = moved_ahead(batches, self._device)
        for _ in range(used):
            next(batches, None)
        if used:
            set_random_state(random)
        # A loader that looks for a stop by itself is not torn out of what it does.
        waits_in = None if looks else threading.get_ident()
        while True:
            self._waits_in = waits_in
            began = time.perf_counter()
            try:
                batch = next(batches, None)
                ended = time.perf_counter()
            except Exception:
                self.failed = True
                raise
            finally:
                self._waits_in = None
            self._waited(ended - began)
            if batch is None:
                return
            yield batch
            self.boundary_random = random_state()

    def until_stopped(self, loader: Any) -> Iterator[Batch]:
        """The batches of a validation.

        Raises:
            StopAsked: a stop came before the last of them.
        """
        if hasattr(loader, "while_waiting"):
            loader.while_waiting = self._flag.look
        self.boundary_random = random_state()
        for batch in loader:
            self._flag.look()
            yield batch

    def interrupt(self) -> None:
        """In the handler of a signal: leave a wait of this thread that looks for nothing by itself.

        Raises:
            StopAsked: there is one; into whatever the data are waiting for.
        """
        if self._waits_in == threading.get_ident():
            self._flag.look()


def length(loader: Any) -> int | None:
    """Batches of an epoch; None where the loader does not say."""
    try:
        return len(loader)
    except TypeError:
        return None


def no_batch(loader: Any, epoch: int, epochs: int) -> str:
    """Why a loader may have given no batch in an epoch, and what to do."""
    if isinstance(loader, Iterator) and epoch:
        return (
            f"train_loader is a {type(loader).__name__}, which gives its batches once; it was exhausted "
            f"after epoch {epoch} of {epochs}: pass a list or a DataLoader, or use epochs={epoch}"
        )
    return "the training data gave no batch; check that the data set is not empty"
