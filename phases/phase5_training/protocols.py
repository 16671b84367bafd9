"""What the training loop asks of the parts it is given; any object with these methods will do."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Batch = Mapping[str, Any]


class Optimizes(Protocol):
    """What the loop asks of the optimizer; see :class:`BitNetOptimizer`."""

    param_groups: list[dict[str, Any]]
    measure: bool

    @property
    def report(self) -> Any:
        """Figures of the last step: grad_norm, nonfinite, slow_ratio, flip_share, layer_flip_share."""

    def step(self, *, loss: Tensor | None = None) -> Any:
        """Finite check of gradients and loss, clip, filter, update, re-quantize."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""

    def layer_zero_share(self) -> Tensor | None:
        """Share of zero codes of each ternary layer."""

    def overall(self, shares: Tensor) -> Tensor:
        """The share among all codes that shares of each layer's codes make."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore it."""


class Schedules(Protocol):
    """What the loop asks of the learning-rate scheduler; see :class:`GrokfastScheduler`."""

    def step(self) -> None:
        """Set the rate of the next step."""

    def get_lr(self) -> float:
        """The rate in force."""

    def get_current_phase(self) -> Any:
        """The phase of the next step."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""


class Validates(Protocol):
    """What the loop asks of the validator; see :class:`RealTimeValidator`."""

    def run_validation(self, val_loader: Iterable[Batch], loss_fn: Callable[..., Tensor]) -> dict[str, Any]:
        """Figures of the validation set."""


class StopsEarly(Protocol):
    """What the loop asks of early stopping; see :class:`EarlyStopping`."""

    monitor: str
    best: float | None

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""

    def update(self, value: float | None, step: int) -> tuple[bool, bool]:
        """(improved, should stop)."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""


class Task(Protocol):
    """Work in progress; see :class:`phase5_training.background.BackgroundTask`."""

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""

    def result(self) -> Any:
        """Wait for it; returns or raises what it did."""


class Saves(Protocol):
    """What the loop asks of the checkpoint store; see :class:`CheckpointStore`."""

    def begin(self, state: Mapping[str, Any], step: int, suspect: int | None = None) -> Task:
        """Copy a state and begin to write the checkpoint of ``step``; the task's result is its folder.

        A checkpoint of fewer than ``suspect`` steps is to be left, to go back to.
        """

    def rewind(self, before: int) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint of fewer steps than ``before``, as the newest from now on."""
