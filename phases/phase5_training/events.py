"""The training loop as a list of events, and the registry of callbacks.

This is the whole loop; :class:`phase5_training.pipeline.training_loop.TrainingLoop` fires the events
in this order, and a test reads this picture and holds the loop to it::

    fit_start                                       # once, also after a resume
    for epoch in epochs:
        epoch_start
        for batch in train_loader:                  # one batch is one optimizer step
            phase_change                            # before the first step of each phase
            for micro_batch in batch:
                forward, loss, backward             # loss over the samples of the whole batch
                out_of_memory                       # the batch again, in smaller micro-batches
            unscale, finite check, clip, filter, optimizer, re-quantize, schedule
            step_end                                # figures still on the device
            log                                     # every log_interval steps, figures as numbers
            nonfinite_step                          # found at a log: steps skipped since the last
            loss_spike                              # found at a log: losses far above those before them
            rollback                                # by policy: the loop goes on from a checkpoint
            eval_start, eval_end                    # every eval_interval steps and at the end
            early_stop                              # patience ran out: leaves both loops
            checkpoint_saved                        # whole on the disk; begun every half checkpoint_interval
        epoch_end
    fit_end                                         # once, also after an interrupt or a failure
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from phase5_training.errors import UsageError, nearest_match

Callback = Callable[[int, dict[str, Any]], None]


class Event(StrEnum):
    """A point of the loop at which callbacks run, as ``fn(index, metrics)``.

    The index is the epoch for EPOCH_START and EPOCH_END, and the number of optimizer steps taken
    for all others; at CHECKPOINT_SAVED it is the step of the checkpoint, which was written while
    later steps were taken. The metrics are numbers, strings and lists of them, except at STEP_END:
    there ``loss`` and ``grad_norm`` are tensors on the device, and reading one with ``float()``
    waits for it.
    """

    FIT_START = "fit_start"
    EPOCH_START = "epoch_start"
    PHASE_CHANGE = "phase_change"
    STEP_END = "step_end"
    LOG = "log"
    OUT_OF_MEMORY = "out_of_memory"
    NONFINITE_STEP = "nonfinite_step"
    LOSS_SPIKE = "loss_spike"
    ROLLBACK = "rollback"
    EVAL_START = "eval_start"
    EVAL_END = "eval_end"
    EARLY_STOP = "early_stop"
    CHECKPOINT_SAVED = "checkpoint_saved"
    EPOCH_END = "epoch_end"
    FIT_END = "fit_end"


class CallbackRegistry:
    """Callbacks by event, called in the order in which they were registered.

    Example:
        >>> registry = CallbackRegistry()
        >>> registry.register("epoch_end", lambda epoch, metrics: print(epoch, metrics["loss"]))
        >>> registry.fire(Event.EPOCH_END, 3, {"loss": 0.5})
        3 0.5
    """

    def __init__(self) -> None:
        self._callbacks: dict[Event, list[Callback]] = {}

    def register(self, event: str, callback: Callback) -> None:
        """Call ``callback(index, metrics)`` at each ``event``.

        Raises:
            UsageError: the event does not exist, or the callback is not callable.
        """
        names = [e.value for e in Event]
        if event not in names:
            near = nearest_match(event, names)
            hint = f"did you mean {near!r}? " if near else ""
            raise UsageError(f"event {event!r} does not exist; {hint}the events are {', '.join(names)}")
        if not callable(callback):
            raise UsageError(f"the callback for {event!r} is a {type(callback).__name__}; pass a function")
        self._callbacks.setdefault(Event(event), []).append(callback)

    def fire(self, event: Event, index: int, metrics: dict[str, Any]) -> None:
        """Call the callbacks of ``event``; an exception of one passes through to the caller."""
        for callback in self._callbacks.get(event, ()):
            callback(index, metrics)

    def wants(self, event: Event) -> bool:
        """Whether anything listens, so that figures for nobody need not be made."""
        return bool(self._callbacks.get(event))
