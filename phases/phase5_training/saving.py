"""When a run is saved: in the background, one write at a time, and early enough for the promise.

The promise is that a kill costs at most ``interval`` steps. What is lost is what was taken since the newest
checkpoint that was written to its end, so the steps between two checkpoints and those taken during a write
must not be more than the interval together. A write is therefore begun after every half of it, and is
waited for once it has lasted the other half, which takes a disk that is slower than half an interval.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phase5_training.protocols import Saves, Task

Saved = tuple[int, Path]  # a checkpoint that is whole on the disk: its step and folder


class Saver:
    """Writes checkpoints beside the steps; a step waits for the copy of the state only.

    Args:
        store: where to save; None does not save.
        interval: the most steps that a kill may cost; None saves when told to only.

    Example:
        >>> Saver(None, 1000).spacing, Saver(None, 5).spacing, Saver(None, 1).spacing
        (500, 3, 1)
    """

    def __init__(self, store: Saves | None, interval: int | None) -> None:
        self._store, self._interval = store, interval
        self._writing: tuple[int, Task] | None = None

    @property
    def spacing(self) -> int:
        """Steps between the beginnings of two writes; 0 for none."""
        return -(-self._interval // 2) if self._interval else 0

    def due(self, step: int) -> bool:
        """Whether a write begins after ``step``."""
        return self._store is not None and bool(self.spacing) and step % self.spacing == 0

    def begin(self, state: Mapping[str, Any], step: int, suspect: int | None = None) -> None:
        """Copy the state and begin to write it; the write before has been settled.

        The newest checkpoint of fewer than ``suspect`` steps stays.
        """
        assert self._store is not None
        assert self._writing is None
        self._writing = (step, self._store.begin(state, step, suspect))

    def follow(self, step: int) -> Saved | None:
        """Between two steps: a write that has ended, or has lasted so long that it is waited for.

        Raises:
            NotSavedError: what it was writing is not saved.
        """
        if self._writing is None:
            return None
        begun, task = self._writing
        late = self._interval is not None and step - begun >= self._interval - self.spacing
        return self.settle() if late or task.done else None

    def settle(self) -> Saved | None:
        """Wait for the write in progress; None where there is none.

        Raises:
            NotSavedError: what it was writing is not saved.
        """
        if self._writing is None:
            return None
        (step, task), self._writing = self._writing, None
        return step, task.result()
