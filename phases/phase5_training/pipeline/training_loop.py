"""The training loop: what happens in an optimizer step and between steps.

``phase5_training.events`` draws the loop; this module runs it. The parts it drives - optimizer,
scheduler, loss, validator, early stopping, checkpoint store - come in through the constructor.
Nothing in a step waits for the device: losses are summed there and read at log intervals.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phase5_training.batches import count_samples, micro_batches_of, to_device
from phase5_training.checkpoint import random_state, set_random_state
from phase5_training.errors import RunFailed, UsageError
from phase5_training.events import CallbackRegistry, Event
from phase5_training.loop_state import LoopState
from phase5_training.meter import Meter, memory_mb, number
from phase5_training.outputs import PlainLoss
from phase5_training.protocols import Batch, Optimizes, Saves, Schedules, StopsEarly, Validates


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Lengths and intervals of a run; steps are optimizer steps.

    Args:
        epochs: passes over the training data.
        max_steps: stop after this many steps, whatever the epochs; None for no limit.
        max_seconds: stop at the first step boundary after this much training time; None for no limit.
        micro_batch_size: samples per forward; None takes the batch whole. The gradient is that of
            the whole batch either way.
        eval_interval: validate every so many steps, and at the end.
        log_interval: read the figures off the device every so many steps.
        checkpoint_interval: save every so many steps, and at the end; None saves at the end only.
        use_amp: autocast the forward to ``amp_dtype``.
        amp_dtype: bfloat16 or float16.
        max_nonfinite: fail after this many skipped steps in a row, as seen at the log intervals.
    """

    epochs: int = 1
    max_steps: int | None = None
    max_seconds: float | None = None
    micro_batch_size: int | None = None
    eval_interval: int = 500
    log_interval: int = 10
    checkpoint_interval: int | None = None
    use_amp: bool = False
    amp_dtype: torch.dtype = torch.bfloat16
    max_nonfinite: int = 50

    def __post_init__(self) -> None:
        for name in ("epochs", "eval_interval", "log_interval", "max_nonfinite"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_steps", "max_seconds", "micro_batch_size", "checkpoint_interval"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name}={value} must be above 0; leave it out for no limit")


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
        named_model: the module whose state is saved, when ``model`` is a compiled wrapper of it.

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
        self._stop = False
        self._modes: dict[nn.Module, bool] = {}
        self._resumed_random: Mapping[str, Any] | None = None
        self._epoch_random: Mapping[str, Any] = {}
        self._loss: Any = None
        self._first_loss: Tensor | None = None
        self._started = time.perf_counter()
        self._meter = Meter(self.device)

    def train(
        self, train_loader: Any, loss_fn: Callable[..., Tensor], val_loader: Iterable[Batch] | None = None
    ) -> LoopState:
        """Run until the epochs, a limit, early stopping or :meth:`stop` ends it.

        Args:
            train_loader: an iterable of batches; one with ``set_position(epoch, batch)`` is sought on
                resume and reshuffled each epoch.
            loss_fn: a :class:`Loss`, or ``fn(outputs, targets)`` returning the mean over the samples.
            val_loader: batches to validate on.

        Returns:
            The final state. ``best_weights`` holds the weights of the best validation, if there was one.

        Raises:
            RunFailed: too many steps in a row were not finite, or the data gave no batch.
        """
        self._loss = loss_fn if hasattr(loss_fn, "units") else PlainLoss(loss_fn)
        rule = self.early_stopping
        if not (self.state.stop_reason == "early_stop" and rule is not None and rule.stopped):
            self.state.stop_reason = ""
        self._started = time.perf_counter() - self.state.seconds
        self._meter.resume(self._clock())
        self.callbacks.fire(
            Event.FIT_START, self.state.step, {"step": self.state.step, "elapsed_s": self._clock()}
        )
        if self._resumed_random is not None:
            set_random_state(self._resumed_random)
            self._resumed_random = None
        self._training_modes()
        try:
            self._epochs(train_loader, val_loader)
            if self.state.stop_reason != "interrupted":
                # An interrupted run goes on later: its figures must come as if it had not stopped.
                self._log_if_due(force=True)
                self._validate(val_loader)
            self.save_checkpoint()
        finally:
            # Here and not at the start: a stop that came before the first step counts.
            self._stop = False
            self.state.seconds = self._clock()
            self.callbacks.fire(
                Event.FIT_END,
                self.state.step,
                {
                    "step": self.state.step,
                    "stop_reason": self.state.stop_reason or "failed",
                    "elapsed_s": self._clock(),
                },
            )
        return self.state

    def _training_modes(self) -> None:
        """Train mode; parts that the caller put in eval mode, as a frozen BatchNorm, stay in it."""
        if not self._modes:
            if not self.module.training:
                self.module.train()
            self._modes = {m: m.training for m in self.module.modules()}
        for module, training in self._modes.items():
            module.training = training

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
        """Ask the loop to save and return at the next step boundary; safe from another thread."""
        self._stop = True

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
            "epoch_random": self._epoch_random,
            "loop": self.state.to_save(),
            "meter": self._meter.state_dict(),
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
        self._resumed_random, self._epoch_random = state["random"], state["epoch_random"]
        self._meter.load_state_dict(state["meter"])

    def _epochs(self, train_loader: Any, val_loader: Iterable[Batch] | None) -> None:
        state, config = self.state, self.config
        if state.batch and state.batch == _length(train_loader):
            # Resumed from a checkpoint of the last batch of an epoch, which comes before the epoch's end.
            self._end_epoch()
        while state.epoch < config.epochs and not self._limit_reached():
            self.callbacks.fire(Event.EPOCH_START, state.epoch, {"epoch": state.epoch})
            steps_before = state.step
            for batch in self._batches(train_loader):
                self._announce_phase()
                self._step(batch)
                self._between_steps(val_loader)
                if self._limit_reached():
                    break
            else:
                if state.batch == 0 and state.step == steps_before:
                    raise RunFailed(_no_batch(train_loader, state.epoch, config.epochs))
                self._end_epoch()
                continue
            if state.batch == _length(train_loader):
                # The limit fell on the last batch: the epoch is complete.
                self._end_epoch()
        if not state.stop_reason:
            state.stop_reason = "finished"

    def _batches(self, train_loader: Any) -> Iterator[Batch]:
        """The rest of this epoch's batches, and how long each was waited for."""
        used, random = self.state.batch, random_state()
        if not used:
            self._epoch_random = random
        if hasattr(train_loader, "set_position"):
            seeks = getattr(train_loader, "seeks", True)
            train_loader.set_position(self.state.epoch, used if seeks else 0)
            used = 0 if seeks else used
        if used:
            # No way to seek: what was used before a resume is drawn again as it was drawn, and dropped.
            set_random_state(self._epoch_random)
        batches = iter(train_loader)
        for _ in range(used):
            next(batches, None)
        if used:
            set_random_state(random)
        while True:
            waited = time.perf_counter()
            batch = next(batches, None)
            self._meter.wait_seconds += time.perf_counter() - waited
            if batch is None:
                return
            yield batch

    def _step(self, batch: Batch) -> None:
        """One optimizer step on one batch, in micro-batches."""
        state, due = self.state, (self.state.step + 1) % self.config.log_interval == 0
        micro_batches = micro_batches_of(batch, self.config.micro_batch_size)
        units = [self._loss.units(m) for m in micro_batches]
        total = sum(units)
        loss = torch.zeros((), device=self.device)
        for micro_batch, own in zip(micro_batches, units, strict=True):
            micro_batch = to_device(micro_batch, self.device)
            with torch.autocast(self.device.type, self.config.amp_dtype, enabled=self.config.use_amp):
                outputs = self.model(micro_batch["input"])
                mean = self._loss(outputs, micro_batch)
            share = _share(mean, own, total)
            (self.scaler.scale(share) if self.scaler else share).backward()
            loss += share.detach()
            self._meter.count_correct(outputs, micro_batch["target"])
        if self.scaler:
            self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        self.optimizer.measure = due
        self.optimizer.step(loss=loss)
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad()
        if self.scheduler:
            self._meter.lr = self.scheduler.get_lr()
            self.scheduler.step()
        if not state.step:
            self._first_loss = loss  # read at the first log: a step does not wait for the device
        samples = count_samples(batch)
        self._meter.add(loss, self.optimizer.report.nonfinite, samples, counts=total > 0)
        state.step, state.batch, state.samples = state.step + 1, state.batch + 1, state.samples + samples
        if self.callbacks.wants(Event.STEP_END):
            self.callbacks.fire(
                Event.STEP_END,
                state.step,
                {"step": state.step, "loss": loss, "grad_norm": self.optimizer.report.grad_norm},
            )

    def _between_steps(self, val_loader: Iterable[Batch] | None) -> None:
        config, step = self.config, self.state.step
        self._log_if_due()
        if step % config.eval_interval == 0:
            self._validate(val_loader)
        if config.checkpoint_interval and step % config.checkpoint_interval == 0:
            self.save_checkpoint()

    def _limit_reached(self) -> bool:
        state, config = self.state, self.config
        if state.stop_reason == "early_stop":
            return True  # and not interrupted: there is nothing to go on with
        if self._stop:
            state.stop_reason = "interrupted"
        elif config.max_steps is not None and state.step >= config.max_steps:
            state.stop_reason = state.stop_reason or "max_steps"
        elif config.max_seconds is not None and self._clock() >= config.max_seconds:
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
        phase = self._current_phase()
        if phase != self.state.phase:
            metrics = {"step": self.state.step, "phase": phase, "previous": self.state.phase}
            self.state.phase = phase
            self.callbacks.fire(Event.PHASE_CHANGE, self.state.step, metrics)

    def _current_phase(self) -> str:
        return str(self.scheduler.get_current_phase()) if self.scheduler else "refinement"

    def _log_if_due(self, force: bool = False) -> None:
        meter, state = self._meter, self.state
        if not meter.steps or (state.step % self.config.log_interval and not force):
            return
        report = self.optimizer.report
        figures = meter.read(self._clock())
        zero_share = self.optimizer.zero_share()
        row = {
            "step": state.step,
            "epoch": state.epoch,
            "phase": self.state.phase,
            **figures,
            "grad_norm": float(report.grad_norm),
            "slow_ratio": number(report.slow_ratio),
            "zero_share": number(zero_share),
            "flip_share": number(report.flip_share),
            "memory_mb": memory_mb(self.device),
            "elapsed_s": self._clock(),
        }
        skipped, steps = row.pop("skipped"), row.pop("steps")
        if state.first_loss is None and self._first_loss is not None:
            state.first_loss = number(self._first_loss)
        state.note_training(row, skipped, steps)
        row["nonfinite_steps"] = state.nonfinite
        self.callbacks.fire(Event.LOG, state.step, row)
        if skipped:
            self.callbacks.fire(
                Event.NONFINITE_STEP,
                state.step,
                {"step": state.step, "skipped": skipped, "total": state.nonfinite},
            )
        if state.nonfinite_in_a_row >= self.config.max_nonfinite:
            raise RunFailed(
                f"the last {state.nonfinite_in_a_row} steps up to step {state.step} were skipped: their loss "
                "or gradient was not finite; lower learning_rate, or check the data for huge values"
            )

    def _validate(self, val_loader: Iterable[Batch] | None) -> None:
        state = self.state
        if self.validator is None or val_loader is None or state.validated_step == state.step:
            return
        # Validation takes time that is not training throughput.
        self._meter.pause(self._clock())
        self.callbacks.fire(Event.EVAL_START, state.step, {"step": state.step})
        figures = self.validator.run_validation(val_loader, self._loss)
        state.note_validation(figures)
        improved, stop = False, False
        if self.early_stopping is not None:
            improved, stop = self.early_stopping.update(figures.get(self.early_stopping.monitor), state.step)
            if improved:
                self.best_weights = _copy(self.module.state_dict())
                # What a loss learned is part of its figure.
                self.best_loss_state = _copy(getattr(self._loss, "state_dict", dict)())
        metrics = {
            "step": state.step,
            "epoch": state.epoch,
            "phase": self.state.phase,
            "improved": improved,
            **figures,
            "elapsed_s": self._clock(),
        }
        self.callbacks.fire(Event.EVAL_END, state.step, metrics)
        self._meter.resume(self._clock())
        if stop and self.early_stopping is not None and not state.stop_reason:
            state.stop_reason = "early_stop"
            rule = self.early_stopping
            metrics = {"step": state.step, "monitor": rule.monitor, "best": rule.best}
            self.callbacks.fire(Event.EARLY_STOP, state.step, metrics)

    def save_checkpoint(self) -> Path | None:
        """Write a checkpoint of this step, unless it has one."""
        state = self.state
        if self.checkpoints is None or state.saved_step == state.step:
            return None
        state.seconds, state.saved_step = self._clock(), state.step
        self._meter.pause(state.seconds)
        path = self.checkpoints.save(self.state_dict(), state.step)
        self.callbacks.fire(Event.CHECKPOINT_SAVED, state.step, {"step": state.step, "path": str(path)})
        self._meter.resume(self._clock())
        return path

    def _clock(self) -> float:
        """Seconds of this run, earlier sessions included."""
        return time.perf_counter() - self._started


def _share(mean: Tensor, own: int | Tensor, total: int | Tensor) -> Tensor:
    """A micro-batch's mean loss times its share of the whole batch's samples or tokens.

    The sum of the gradients is then the gradient of the batch's mean loss however it is cut.
    """
    if not isinstance(own, Tensor):
        return mean if own == total else mean * (own / total)
    part: Tensor = to_device(own, mean.device)
    whole: Tensor = to_device(torch.as_tensor(total), mean.device)
    # Without a valid target there is no mean: what stands in its place, often nan, must not count.
    return torch.where(part > 0, mean * (part / whole.clamp(min=1)), 0.0)


def _no_batch(loader: Any, epoch: int, epochs: int) -> str:
    if isinstance(loader, Iterator) and epoch:
        return (
            f"train_loader is a {type(loader).__name__}, which gives its batches once; it was exhausted "
            f"after epoch {epoch} of {epochs}: pass a list or a DataLoader, or use epochs={epoch}"
        )
    return "the training data gave no batch; check that the data set is not empty"


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
