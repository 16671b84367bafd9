"""The training loop: what happens in an optimizer step and between steps.

``phase5_training.events`` draws the loop; this module runs it. The parts it drives - optimizer,
scheduler, loss, validator, early stopping, checkpoint store - come in through the constructor.
Nothing in a step waits for the device: losses are summed there and read at log intervals.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phase5_training.bad_batches import BatchWatch, Trouble, judge, of_all_ranks, tell
from phase5_training.distributed import Ranks
from phase5_training.errors import RunFailed, UsageError
from phase5_training.events import CallbackRegistry, Event
from phase5_training.feed import Feed, length, no_batch
from phase5_training.gradients import BatchGradient
from phase5_training.loop_config import LoopConfig
from phase5_training.loop_state import LoopState
from phase5_training.meter import Meter, gpu_share, memory_mb, number, optimizer_figures
from phase5_training.modes import training_modes
from phase5_training.outputs import PlainLoss
from phase5_training.protocols import Batch, Optimizes, Saves, Schedules, StopsEarly, Validates
from phase5_training.random_state import random_state, set_random_state
from phase5_training.saving import Saved, Saver
from phase5_training.signals import SharedStopFlag, StopAsked, StopFlag

ROLLBACK_FACTOR = 0.5  # on the rate, at each return to a checkpoint
MAX_ROLLBACKS = 3


class _RolledBack(Exception):  # noqa: N818 - not a failure
    """The state is that of an earlier step; the loop goes on from there."""


class TrainingLoop:
    """Trains a model; every argument but the first three is optional.

    Args:
        model: called as ``model(batch["input"])``; compiled or not.
        optimizer: a :class:`BitNetOptimizer` (it wraps any torch optimizer).
        config: lengths and intervals.
        scheduler: learning rate per step; None keeps the optimizer's.
        validator: runs every ``eval_interval`` steps; None for no validation.
        early_stopping: decides on the validation figures, and which weights are the best.
        checkpoints: where to save; None does not save.
        callbacks: fired at the events.
        device: where batches go.
        scaler: loss scaling for float16.
        named_model: the module whose state is saved, when ``model`` is a wrapper of it.
        ranks: the processes that train together, each on its part of every batch.

    Example:
        >>> from phase5_training.pipeline.bitnet_optimizer import BitNetOptimizer
        >>> net = nn.Linear(2, 1)
        >>> optimizer = BitNetOptimizer(torch.optim.SGD(net.parameters(), 0.1), net)
        >>> loop = TrainingLoop(net, optimizer, LoopConfig())
        >>> batch = {"input": torch.ones(4, 2), "target": torch.ones(4, 1)}
        >>> loop.train([batch] * 5, nn.functional.mse_loss).step
        5
    """

    def __init__(
        self,
        model: Callable[..., Any],
        optimizer: Optimizes,
        config: LoopConfig,
        *,
        scheduler: Schedules | None = None,
        validator: Validates | None = None,
        early_stopping: StopsEarly | None = None,
        checkpoints: Saves | None = None,
        callbacks: CallbackRegistry | None = None,
        device: torch.device | str = "cpu",
        scaler: torch.amp.GradScaler | None = None,
        named_model: nn.Module | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.scheduler, self.validator, self.early_stopping = scheduler, validator, early_stopping
        self.checkpoints, self.callbacks = checkpoints, callbacks or CallbackRegistry()
        self.device, self.scaler = torch.device(device), scaler
        module = named_model if named_model is not None else model
        if not isinstance(module, nn.Module):
            raise UsageError(f"model is a {type(module).__name__}; pass an nn.Module, or one as named_model=")
        self.module = module
        self.state = LoopState()
        self.best_weights: dict[str, Tensor] | None = None
        self.best_loss_state: dict[str, Tensor] = {}
        self._ranks = ranks or Ranks()
        # Running means, as of a BatchNorm, differ from rank to rank until they are leveled.
        self._buffers = [b for b in module.buffers() if b.is_floating_point() and b.dim()]
        self._flag = StopFlag() if self._ranks.alone else SharedStopFlag()
        self._modes: dict[nn.Module, bool] = {}
        self._resumed_random: Mapping[str, Any] | None = None
        self._loss: Any = None
        self._first_loss: Tensor | None = None
        self._started = time.perf_counter()
        self._meter = Meter(self.device)
        self._feed = Feed(self._flag, self._meter.note_wait, self.device)
        self._watch = BatchWatch(config.spike_threshold, self.device)
        self._saver = Saver(checkpoints, config.checkpoint_interval)
        self._gradient = BatchGradient(
            model,
            self.device,
            size=config.micro_batch_size,
            amp_dtype=config.amp_dtype if config.use_amp else None,
            scaler=scaler,
            flag=self._flag,
            count=self._meter.count_correct,
            forget=(self._meter.forget, optimizer.zero_grad),
            ranks=self._ranks,
            sums=(self._meter.correct,),
        )

    def train(
        self, train_loader: Any, loss_fn: Callable[..., Tensor], val_loader: Iterable[Batch] | None = None
    ) -> LoopState:
        """Run until the epochs, a limit, early stopping or :meth:`stop` ends it.

        Args:
            train_loader: an iterable of batches; one with ``set_position(epoch, batch)`` is sought on
                resume and reshuffled each epoch. One with ``while_waiting`` has it called now and then
                while a batch is awaited, and lets through what it raises.
            loss_fn: a :class:`Loss`, or ``fn(outputs, targets)`` returning the mean over the samples.
            val_loader: batches to validate on.

        Returns:
            The final state. ``best_weights`` holds the weights of the best validation, if there was one.

        Raises:
            RunFailed: too many steps in a row were not finite, or the data gave no batch.
            NotSavedError: a checkpoint could not be written; those before it are whole.
            Exception: what the data raised; the run is saved first.
        """
        self._loss = loss_fn if hasattr(loss_fn, "units") else PlainLoss(loss_fn)
        rule = self.early_stopping
        if not (self.state.stop_reason == "early_stop" and rule is not None and rule.stopped):
            self.state.stop_reason = ""
        self._started = time.perf_counter() - self.state.seconds
        self._meter.resume(self._clock())
        metrics: dict[str, Any] = {"step": self.state.step, "elapsed_s": self._clock()}
        self.callbacks.fire(Event.FIT_START, self.state.step, metrics)
        self._modes = training_modes(self.module, self._modes)
        try:
            self._until_the_end(train_loader, val_loader)
            self.save_checkpoint()
        except Exception as error:
            self._save_after(error)
            raise
        finally:
            # Here and not at the start: a stop that came before the first step counts.
            self._flag.clear()
            self.state.seconds = self._clock()
            reason = self.state.stop_reason or "failed"
            metrics = {"step": self.state.step, "stop_reason": reason, "elapsed_s": self._clock()}
            self.callbacks.fire(Event.FIT_END, self.state.step, metrics)
        return self.state

    def validate(self, val_loader: Iterable[Batch], loss_fn: Callable[..., Tensor]) -> dict[str, Any]:
        """The validator's figures of a set; model, early stopping and best weights stay as they are.

        Args:
            val_loader: batches.
            loss_fn: as for :meth:`train`.

        Returns:
            What :meth:`RealTimeValidator.run_validation` returns.

        Raises:
            UsageError: the loop has no validator.
        """
        if self.validator is None:
            raise UsageError(
                "the loop was made without a validator; make it with validator=RealTimeValidator(model)"
            )
        return self.validator.run_validation(val_loader, loss_fn)

    def stop(self) -> None:
        """Ask the loop to save and return: after this step, or before it where it can be cut short.

        Safe from another thread and from the handler of a signal. What is cut short - a batch between two
        micro-batches, a validation, a wait for data - is done again, and the same, when the run goes on.
        """
        self._flag.ask()
        self._feed.interrupt()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the run goes on: weights, optimizer, position, generators."""
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "early_stopping": self.early_stopping.state_dict() if self.early_stopping else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "loss": self._loss.state_dict() if hasattr(self._loss, "state_dict") else None,
            "best_weights": self.best_weights,
            "best_loss_state": self.best_loss_state,
            "random": random_state(),
            "epoch_random": self._feed.epoch_random,
            "loop": self.state.to_save(),
            "meter": self._meter.state_dict(),
            "watch": self._watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], loss_fn: Any = None) -> None:
        """Continue from :meth:`state_dict`; call before :meth:`train`.

        Args:
            state: as saved.
            loss_fn: the loss that :meth:`train` will be given, when it has parameters.
        """
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for part, key in (
            (self.scheduler, "scheduler"),
            (self.early_stopping, "early_stopping"),
            (self.scaler, "scaler"),
            (loss_fn, "loss"),
        ):
            if part is not None and state[key]:
                part.load_state_dict(state[key])
        self.best_weights, self.best_loss_state = state["best_weights"], state["best_loss_state"]
        self.state = LoopState(**state["loop"])
        self._resumed_random, self._feed.epoch_random = state["random"], state["epoch_random"]
        self._meter.load_state_dict(state["meter"])
        self._watch.load_state_dict(state["watch"])
        fits = [n for n in (self.config.micro_batch_size, self.state.micro_batch_size) if n is not None]
        self._gradient.size = min(fits, default=None)

    def _until_the_end(self, train_loader: Any, val_loader: Iterable[Batch] | None) -> None:
        """All epochs and the last validation, or as much of them as :meth:`stop` leaves."""
        while True:
            if self._resumed_random is not None:
                set_random_state(self._resumed_random)
                self._resumed_random = None
            try:
                self._epochs(train_loader, val_loader)
                if self.state.stop_reason != "interrupted":
                    # An interrupted run goes on later: its figures must come as if it had not stopped.
                    self._log_if_due(last=True)
                    self._validate(val_loader)
                return
            except StopAsked:
                self.state.stop_reason = "interrupted"
                set_random_state(self._feed.boundary_random)
                return
            except _RolledBack:
                continue

    def _epochs(self, train_loader: Any, val_loader: Iterable[Batch] | None) -> None:
        state, config = self.state, self.config
        if state.step and state.step % config.eval_interval == 0:
            # A stop cut the validation of this step short; one that was made is not made again.
            self._validate(val_loader)
        if state.batch and state.batch == length(train_loader):
            # Resumed from a checkpoint of the last batch of an epoch, which comes before the epoch's end.
            self._end_epoch()
        while state.epoch < config.epochs and not self._limit_reached():
            self.callbacks.fire(Event.EPOCH_START, state.epoch, {"epoch": state.epoch})
            steps_before = state.step
            for batch in self._feed.batches(train_loader, state.epoch, state.batch):
                self._announce_phase()
                self._step(batch)
                self._between_steps(val_loader)
                if self._limit_reached():
                    break
            else:
                if state.batch == 0 and state.step == steps_before:
                    raise RunFailed(no_batch(train_loader, state.epoch, config.epochs))
                self._end_epoch()
                continue
            if state.batch == length(train_loader):
                # The limit fell on the last batch: the epoch is complete.
                self._end_epoch()
        if not state.stop_reason:
            state.stop_reason = "finished"

    def _step(self, batch: Batch) -> None:
        """One optimizer step on one batch, in micro-batches."""
        state, due = self.state, (self.state.step + 1) % self.config.log_interval == 0
        size = self._gradient.size
        self._ranks.seed(state.step, self._ranks.rank)
        loss, counts = self._gradient.add(batch, self._loss)
        if self._gradient.size != size:
            self._note_smaller()
        if self.scaler:
            self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        self.optimizer.measure = due
        self._ranks.seed(state.step)
        self.optimizer.step(loss=loss)
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad()
        if self.scheduler:
            self._meter.lr = self.scheduler.get_lr()
            self.scheduler.step()
        if not state.step:
            self._first_loss = loss  # read at the first log: a step does not wait for the device
        samples, skipped = self._gradient.samples, self.optimizer.report.nonfinite
        self._meter.add(loss, skipped, samples, counts=counts)
        state.step, state.batch, state.samples = state.step + 1, state.batch + 1, state.samples + samples
        index = batch.get("index")
        self._watch.note(state.step, state.epoch, index if isinstance(index, Tensor) else None, loss, skipped)
        if self.callbacks.wants(Event.STEP_END):
            metrics = {"step": state.step, "loss": loss, "grad_norm": self.optimizer.report.grad_norm}
            self.callbacks.fire(Event.STEP_END, state.step, metrics)

    def _note_smaller(self) -> None:
        state, size = self.state, self._gradient.size
        state.micro_batch_size = size
        warnings.warn(
            f"out of memory at step {state.step + 1}: micro-batches of {size} samples from here on; the "
            "batch and its gradient stay the same",
            stacklevel=2,
        )
        metrics = {"step": state.step + 1, "micro_batch_size": size}
        self.callbacks.fire(Event.OUT_OF_MEMORY, state.step, metrics)

    def _between_steps(self, val_loader: Iterable[Batch] | None) -> None:
        config, step = self.config, self.state.step
        self._log_if_due()
        if step % config.eval_interval == 0:
            self._validate(val_loader)
        if self._saver.due(step):
            self._report_saved(self._saver.settle())
            self._begin_save()
        self._report_saved(self._saver.follow(step))

    def _limit_reached(self) -> bool:
        state, config = self.state, self.config
        if state.stop_reason == "early_stop":
            return True  # and not interrupted: there is nothing to go on with
        if self._flag.asked:
            state.stop_reason = "interrupted"
        elif config.max_steps is not None and state.step >= config.max_steps:
            state.stop_reason = state.stop_reason or "max_steps"
        elif config.max_seconds is not None and self._ranks.any(self._clock() >= config.max_seconds):
            state.stop_reason = state.stop_reason or "max_seconds"
        return bool(state.stop_reason)

    def _end_epoch(self) -> None:
        state = self.state
        metrics: dict[str, Any] = {"epoch": state.epoch, "step": state.step, **self._meter.end_epoch()}
        for key, value in (state.validation or {}).items():
            metrics[f"val_{key}"] = value
        state.epoch, state.batch = state.epoch + 1, 0
        self.callbacks.fire(Event.EPOCH_END, state.epoch - 1, metrics)

    def _announce_phase(self) -> None:
        phase = str(self.scheduler.get_current_phase()) if self.scheduler else "refinement"
        if phase != self.state.phase:
            metrics = {"step": self.state.step, "phase": phase, "previous": self.state.phase}
            self.state.phase = phase
            self.callbacks.fire(Event.PHASE_CHANGE, self.state.step, metrics)

    def _log_if_due(self, last: bool = False) -> None:
        meter, state = self._meter, self.state
        if not meter.steps or (state.step % self.config.log_interval and not last):
            return
        figures = meter.read(self._clock())
        skipped, steps = figures.pop("skipped"), figures.pop("steps")
        row = {
            "step": state.step,
            "epoch": state.epoch,
            "phase": state.phase,
            **figures,
            **optimizer_figures(self.optimizer),
            "gpu_share": gpu_share(self.device),
            "memory_mb": memory_mb(self.device),
            **self._ranks.bytes_per_step(steps),
            "elapsed_s": self._clock(),
        }
        if state.first_loss is None and self._first_loss is not None:
            state.first_loss = number(self._first_loss)
        state.note_training(row, skipped, steps)
        state.logged_step = state.step
        row["nonfinite_steps"] = state.nonfinite
        self.callbacks.fire(Event.LOG, state.step, row)
        self._report_bad(last)

    def _report_bad(self, last: bool) -> None:
        """Report the bad batches since the last log, and do what the policies say."""
        state = self.state
        bad = of_all_ranks(self._watch.look(state.rollbacks), self._ranks)
        tell(bad, self.callbacks, state.step, state.nonfinite)
        trouble = judge(bad, self._watch.in_a_row, state.step, self.config)
        if trouble is None:
            return
        if trouble.roll_back and not last:
            self._roll_back(trouble)
        if trouble.fatal:
            raise RunFailed(f"{trouble.why}; lower learning_rate, or check the data for huge values")

    def _roll_back(self, trouble: Trouble) -> None:
        """Go on from the last checkpoint before the trouble, at a lower rate.

        Returns only where that cannot be done: it was done too often, or there is no such checkpoint.
        """
        state = self.state
        self._report_saved(self._saver.settle())
        if self.checkpoints is None or state.rollbacks >= MAX_ROLLBACKS:
            return
        found = self.checkpoints.rewind(trouble.first_step)
        if found is None:
            return
        path, saved = found
        self.load_state_dict(saved, self._loss)
        self.state.rollbacks = state.rollbacks + 1
        if state.micro_batch_size is not None:
            self.state.micro_batch_size = self._gradient.size = state.micro_batch_size
        for group in self.optimizer.param_groups:
            group.update({key: group[key] * ROLLBACK_FACTOR for key in ("lr", "initial_lr") if key in group})
        where = {"step": self.state.step, "epoch": self.state.epoch, "from_step": state.step}
        where |= {"logged_step": self.state.logged_step, "validated_step": self.state.validated_step}
        metrics = {**where, "reason": trouble.why, "checkpoint": path.name, "lr_factor": ROLLBACK_FACTOR}
        self.callbacks.fire(Event.ROLLBACK, self.state.step, metrics)
        raise _RolledBack

    def _validate(self, val_loader: Iterable[Batch] | None) -> None:
        state = self.state
        if self.validator is None or val_loader is None or state.validated_step == state.step:
            return
        # Validation takes time that is not training throughput.
        self._meter.pause(self._clock())
        self._ranks.level_(self._buffers)
        self.callbacks.fire(Event.EVAL_START, state.step, {"step": state.step})
        figures = self.validator.run_validation(self._feed.until_stopped(val_loader), self._loss)
        state.note_validation(figures)
        improved, stop = False, False
        if self.early_stopping is not None:
            improved, stop = self.early_stopping.update(figures.get(self.early_stopping.monitor), state.step)
            if improved:
                self.best_weights = _copy(self.module.state_dict())
                # What a loss learned is part of its figure.
                self.best_loss_state = _copy(getattr(self._loss, "state_dict", dict)())
        where = {"step": state.step, "epoch": state.epoch, "phase": state.phase}
        metrics = {**where, "improved": improved, **figures, "elapsed_s": self._clock()}
        self.callbacks.fire(Event.EVAL_END, state.step, metrics)
        self._meter.resume(self._clock())
        if stop and self.early_stopping is not None and not state.stop_reason:
            state.stop_reason = "early_stop"
            rule = self.early_stopping
            metrics = {"step": state.step, "monitor": rule.monitor, "best": rule.best}
            self.callbacks.fire(Event.EARLY_STOP, state.step, metrics)

    def save_checkpoint(self) -> Path | None:
        """Write a checkpoint of this step, unless it has one; returns once it was read back from the disk.

        Raises:
            NotSavedError: it cannot be written; those before it are whole.
        """
        self._report_saved(self._saver.settle())
        if self.checkpoints is None or self.state.saved_step == self.state.step:
            return None
        self._begin_save()
        return self._report_saved(self._saver.settle())

    def _save_after(self, error: Exception) -> None:
        """Finish the write in progress; where the data failed, between two steps, save these too."""
        try:
            if self._feed.failed and self._ranks.alone:  # a save takes all ranks
                set_random_state(self._feed.boundary_random)
                self.save_checkpoint()
            self._report_saved(self._saver.settle())
        except Exception as second:
            error.add_note(f"and: {second}")

    def suspect(self) -> int | None:
        """The step before which the run may yet go back to; None if it never does."""
        return self._watch.suspect(self.state.step) if self.config.may_roll_back else None

    def _begin_save(self) -> None:
        state = self.state
        state.seconds = self._clock()
        self._meter.pause(state.seconds)
        self._ranks.level_(self._buffers)
        self._saver.begin(self.state_dict(), state.step, self.suspect())
        self._meter.resume(self._clock())

    def _report_saved(self, saved: Saved | None) -> Path | None:
        if saved is None:
            return None
        self.state.saved_step, path = saved
        metrics = {"step": saved[0], "path": str(path)}
        self.callbacks.fire(Event.CHECKPOINT_SAVED, saved[0], metrics)
        return path

    def _clock(self) -> float:
        """Seconds of this run, earlier sessions included."""
        return time.perf_counter() - self._started


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
