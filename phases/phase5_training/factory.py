"""The one place where the parts of a run are put together."""

import asyncio
import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from phase4_bitnet.layers import ternary_layers
from phase5_training import hardware
from phase5_training.assembly import (
    compiles,
    cost_of_determinism,
    early_stopping_of,
    filter_notices,
    free_name,
    loop_config,
    loss_of,
    monitor_of,
    optimizer_of,
    planned_steps,
    rates_of,
    resolved_config,
    schedule_of,
    torch_optimizers,
    validator_of,
)
from phase5_training.callbacks import ReportRefresher
from phase5_training.checks import check_storable
from phase5_training.config import (
    TrainingConfig,
    check_same_run,
    full_signature,
    only_names,
    parse_config,
    record_of,
)
from phase5_training.defaults import grokfast_config
from phase5_training.distributed import join, naming_lost_ranks
from phase5_training.errors import DataError, ForgeError, RunFailed, UsageError
from phase5_training.events import Callback, CallbackRegistry
from phase5_training.feed import length
from phase5_training.loop_state import LoopState
from phase5_training.models import check_against_data, check_monitor, prepare_model
from phase5_training.open_data import open_data
from phase5_training.parallel import on_ranks, seen_by_all, spread
from phase5_training.pipeline.grokfast_trainer import GradientFilter
from phase5_training.pipeline.scheduler import GrokfastScheduler
from phase5_training.pipeline.training_loop import TrainingLoop
from phase5_training.pipeline.validation import RealTimeValidator
from phase5_training.random_state import seed_everything
from phase5_training.recorder import watch
from phase5_training.records import RunDirectory, plain
from phase5_training.restore import as_begun, restore
from phase5_training.results import (
    TrainingResult,
    check_trained,
    described,
    end_notice,
    result_metrics,
    result_record,
    session_record,
    store_best,
)
from phase5_training.shared_checkpoints import checkpoints_of
from phase5_training.signals import end_when_stuck, stop_on_signals, stop_on_sigterm, stopped_by
from phase5_training.trackers import check_trackers
from phase5_training.tune import Trial, Tuning, check_tunable, tune


class TrainingPipeline:
    """A run, from its configuration to its result. Made by :func:`create_training_pipeline`.

    Args:
        config: the options.
        model, train_data, val_data, loss, optimizer, teacher: objects given in place of the names
            in the configuration.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        model: Any,
        train_data: Any,
        val_data: Any = None,
        loss: Any = None,
        optimizer: Any = "auto",
        teacher: nn.Module | None = None,
    ) -> None:
        self.config = config
        self._given = {"model": model, "train": train_data, "val": val_data, "loss": loss}
        self._given_optimizer, self._teacher = optimizer, teacher
        self.callbacks = CallbackRegistry()
        self.ready = self._stopping = False
        self.run_directory: RunDirectory | None = None
        self.notices: list[str] = []
        self.tuning: Tuning | None = None
        self._trial_of: Any = None  # the pipeline that this one is a trial of
        self._running = threading.Lock()
        self._result: TrainingResult | None = None

    def register_callback(self, event: str, callback: Callback) -> None:
        """Call ``callback(index, metrics)`` at an event of the loop; see :mod:`phase5_training.events`."""
        self.callbacks.register(event, callback)

    @naming_lost_ranks()
    def setup(self) -> "TrainingPipeline":
        """Open data and model and check everything; trains nothing. Called by the run when left out.

        Returns:
            The pipeline itself.

        Raises:
            UsageError: options, model and data that do not go together.
            DataError: files that cannot be read.
        """
        if self.ready:
            return self
        self.ranks = ranks = join(self.config.device)
        config = self.config = self._begin()
        self.device = hardware.resolve_device(config.device, None if ranks.alone else ranks.local_rank)
        use_amp, amp_dtype = ranks.chosen(hardware.resolve_amp(config.use_amp, config.amp_dtype, self.device))
        hardware.prepare_determinism(config.deterministic)
        hardware.keep_freed_memory(self.device)
        seed_everything(config.seed)
        self._open_data()
        if config.learning_rate == "auto":
            self.tuning = self.tune()
            self._given_optimizer = self.tuning.options["optimizer"]
            config = self.config = config.model_copy(update=self.tuning.options)
            self.notices.append(self.tuning.sentence())
            seed_everything(config.seed)
        self.model = prepare_model(self._given["model"], config, self.spec).to(self.device)
        first = self.train_loader.first()
        self.loss = loss_of(
            config, self._given["loss"], model=self.model, spec=self.spec, batch=first, teacher=self._teacher
        ).to(self.device)
        check_against_data(self.model, self.loss, first, self.spec, self.device)
        check_storable(self.model, self.loss)
        if config.deterministic:
            self.notices.append(cost_of_determinism(self.model, self.loss, first, self.device))
        validator = self._checked_validator(use_amp, amp_dtype) if self.val_loader is not None else None
        total_steps = planned_steps(config, self.train_loader)
        plan = schedule_of(config, total_steps)
        self._given_optimizer, said = optimizer_of(
            self._given_optimizer, self.model, first, self.device, ranks, config.ns_steps
        )
        learning_rate, weight_decay = rates = rates_of(config, self._given_optimizer)
        grokfast = grokfast_config(config)
        compiled, why = ranks.chosen(compiles(config, self.model, first, total_steps, self.device))
        run_model = hardware.compile_model(self.model, config.memory_budget) if compiled else self.model
        self._spread = spread(self.model, run_model, self.loss, first, config, ranks, self.device)
        self.notices += self._spread.notices
        if self._spread.parts:
            compiled, why = False, "each rank has parts of its weights"
        inner = torch_optimizers(self._given_optimizer, self.model, self.loss, config, *rates)
        gradient_filter = GradientFilter(grokfast, plan) if grokfast else None
        self.optimizer = self._spread.optimizer(
            inner,
            self.model,
            gradient_filter=gradient_filter,
            max_grad_norm=config.max_grad_norm if config.gradient_clipping else None,
        )
        made = f"model {'' if compiled else 'not '}compiled: {why}"
        self.notices += [*said, self.train_loader.sentence(), made]
        self.notices += filter_notices(grokfast, config, total_steps, validated=validator is not None)
        monitor = monitor_of(config, self.spec.task, self.loss)
        self.run_directory = self._open_run()
        self.resolved = resolved_config(
            config,
            grokfast,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            use_amp=use_amp,
            compile=compiled,
            device=self.device.type if not ranks.alone else str(self.device),
            monitor=monitor,
            experiment_name=self.run_directory.path.name,
        )
        self.loop = TrainingLoop(
            self._spread.called,
            self.optimizer,
            loop_config(config, use_amp, amp_dtype),
            scheduler=GrokfastScheduler(self.optimizer, plan),
            validator=validator,
            early_stopping=early_stopping_of(config, monitor) if validator is not None else None,
            checkpoints=checkpoints_of(self.run_directory, config, ranks, self._spread.parts),
            callbacks=self.callbacks,
            device=self.device,
            scaler=torch.amp.GradScaler("cuda") if use_amp and amp_dtype == torch.float16 else None,
            named_model=self.model,
            ranks=ranks,
        )
        self.total_steps = total_steps
        self._resume_or_begin()
        for event in self.tuning.events() if self.tuning else ():
            self.run_directory.append_event(event)
        if gradient_filter is not None:
            gradient_filter.watch(self.callbacks)
        if self._trial_of is None and ranks.first:
            sentence = self.train_loader.sentence()
            watch(self.callbacks, self.run_directory, config, total_steps, monitor, sentence)
            data = described(self.train_loader, self.val_loader)
            self.run_directory.append_event(session_record(self.model, data, total_steps))
        self.ready = True
        return self

    def tune(self, tell: Callable[[Trial], None] | None = None) -> Tuning:
        """Find rate, decay, optimizer and filter by short trials: what learning_rate="auto" begins with.

        Args:
            tell: called with each trial when it is over.

        Raises:
            UsageError: the run is too short for trials, or its optimizer is an object.
        """
        check_tunable(self.config, self._given_optimizer)
        if not hasattr(self, "train_loader"):
            self.ranks = join(self.config.device)
            on_ranks(self.config.model_copy(update={"learning_rate": "auto"}), self.ranks)
            self._open_data()
        return tune(self.config, planned_steps(self.config, self.train_loader), self._trial, tell)

    def _trial(self, config: TrainingConfig) -> "TrainingPipeline":
        model, loss = copy.deepcopy(self._given["model"]), copy.deepcopy(self._given["loss"])
        trial = TrainingPipeline(
            config, model=model, train_data=None, loss=loss, optimizer=config.optimizer, teacher=self._teacher
        )
        trial._trial_of = self
        return trial

    def run(self) -> TrainingResult:
        """Train, and return the result; for programs without an event loop.

        Called again, it returns the first result, or continues a run that was stopped.

        Raises:
            RunFailed: the run could not be finished, or nothing was learned.
            UsageError: it is running already.
            Interrupted, Terminated: Ctrl-C or SIGTERM came; the run has been saved, and the
                exception holds the result. A second signal leaves at once.
        """
        if not self._running.acquire(blocking=False):
            raise UsageError("this pipeline is running already; wait for it, or make another one")
        try:
            self.setup()
            if self._result is not None:
                return self._result
            if self._stopping:
                self.loop.stop()
            deterministic = hardware.deterministic_kernels(self.config.deterministic)
            with contextlib.ExitStack() as inside:
                inside.enter_context(deterministic)
                signals = inside.enter_context(stop_on_signals(self.loop.stop))
                if not self.ranks.alone:
                    inside.enter_context(end_when_stuck(signals))
                result = self._run()
        finally:
            self._stopping = False
            self._running.release()
        if signals:
            raise stopped_by(signals[0], result)
        return result

    async def train(self) -> TrainingResult:
        """Set up and train in a thread, so that the event loop goes on.

        Raises:
            asyncio.CancelledError: the task was cancelled, as Ctrl-C does; the run has been saved first.
            RunFailed: the run could not be finished, or not be saved.
            Terminated: SIGTERM came; the run has been saved. Only where the program has no handler
                of its own for it.
        """
        with stop_on_sigterm(self.stop) as signals:
            running = asyncio.create_task(asyncio.to_thread(self.run))
            try:
                result = await asyncio.shield(running)
            except asyncio.CancelledError:
                self.stop()
                await asyncio.wait({running})
                running.result()
                raise
        if signals:
            raise stopped_by(signals[0], result)
        return result

    def stop(self) -> None:
        """Ask the run to save and return at its next step; safe from another thread."""
        self._stopping = True
        if self.ready:
            self.loop.stop()

    # -- parts of setup ------------------------------------------------------------------------

    def _open_data(self) -> None:
        config, parent = self.config, self._trial_of
        if parent is not None:
            self.train_loader, self.val_loader = parent.train_loader, parent.val_loader
            self.spec, self._dropped = parent.spec, parent._dropped
            return
        found = open_data(config, self._given["train"], self._given["val"], self.ranks)
        self.train_loader, self.val_loader, self._dropped = found.train, found.validation, found.dropped
        self.spec = self.train_loader.spec

    def _checked_validator(self, use_amp: bool, amp_dtype: torch.dtype) -> RealTimeValidator:
        config, loader = self.config, self.val_loader
        assert loader is not None
        validator = validator_of(self.model, self.spec, self.device, use_amp, amp_dtype, self.ranks)
        if self._given["val"] is not None:
            try:
                check_against_data(self.model, self.loss, loader.first(), loader.spec, self.device)
            except UsageError as error:
                raise UsageError(f"validation data: {error}") from error
        if config.monitor not in (None, "loss"):
            check_monitor(str(config.monitor), validator.validate_step(loader.first(), self.loss))
        return validator

    def _begin(self) -> TrainingConfig:
        """The configuration, as an earlier session of the same run has settled it."""
        named = isinstance(self._given_optimizer, str)
        config = on_ranks(self.config, self.ranks)
        begun = self.ranks.by_first(lambda: as_begun(config, named_optimizer=named))
        self._resuming, self._afresh = begun.resuming, begun.afresh
        if begun.optimizer is not None:
            self._given_optimizer = begun.optimizer
        return begun.config

    def _open_run(self) -> RunDirectory:
        config = self.config
        path = self.ranks.by_first(
            lambda: (
                RunDirectory.create(
                    config.output_dir,
                    config.experiment_name or free_name(config.output_dir, self.model),
                    resume=self._resuming,
                    overwrite=(config.overwrite or self._afresh) and not self._resuming,
                ).path
            )
        )
        return seen_by_all(path, self.ranks)

    def _resume_or_begin(self) -> None:
        run = self.run_directory
        assert run is not None
        given = {**self._given, "optimizer": self._given_optimizer, "teacher": self._teacher}
        config = record_of(self.resolved, given)
        if self._resuming:
            check_same_run(str(run.path), run.read_config(), plain(config))
            data = described(self.train_loader, self.val_loader) if self.ranks.first else None
            batches = length(self.train_loader)
            self.notices += restore(
                self.loop, self.loss, run, self.config.resume_from, batches=batches, data=data
            )
        run.write_config(config)
        for record in self._dropped if not self._resuming else ():
            run.append_quarantine(record)
        for notice in self.notices:
            run.append_event({"event": "notice", "text": notice})

    # -- a run and its end -----------------------------------------------------------------------

    def _run(self) -> TrainingResult:
        run = self.run_directory
        assert run is not None
        try:
            with naming_lost_ranks():
                state = self.loop.train(self.train_loader, self.loss, self.val_loader)
                if state.stop_reason != "interrupted":
                    self._finish(state)
                model = self._spread.finished(self.model).eval()
            if state.stop_reason == "interrupted":
                return self._write_result(state, model, success=False)
            self.ranks.by_first(lambda: store_best(model, run))
        except Exception as error:
            self._record_failure(error)
            if isinstance(error, DataError):  # the data changed since they were checked
                raise RunFailed(str(error)) from error
            raise
        self._result = self._write_result(state, model, success=True)
        return self._result

    def _record_failure(self, error: Exception) -> None:
        self.loop.state.stop_reason = "failed"
        said = str(error) if isinstance(error, ForgeError) else f"{type(error).__name__}: {error}"
        try:
            self._write_result(self.loop.state, self._spread.whole or self.model, success=False, error=said)
        except OSError as second:
            error.add_note(f"result.json could not be written either: {second}")

    def _write_result(
        self, state: LoopState, model: nn.Module, *, success: bool, error: str | None = None
    ) -> TrainingResult:
        run = self.run_directory
        assert run is not None
        result = TrainingResult(
            success,
            model,
            metrics=result_metrics(state),
            run_dir=run.path,
            stop_reason=state.stop_reason,
            notice=end_notice(state, self.total_steps),
        )
        if result.notice:
            self.notices.append(result.notice)
            run.append_event({"event": "notice", "text": result.notice})
        if self.ranks.first:
            data = described(self.train_loader, self.val_loader)
            record = result_record(result, data=data, notices=self.notices, loss=self.loss)
            run.write_result({**record, "error": error} if error else record)
            ReportRefresher(run).refresh(state.step)
        return result

    def _finish(self, state: LoopState) -> None:
        """Return to the best weights and measure them."""
        # Stochastic layers were validated with drawn codes and are handed on with the nearest ones.
        measure = any(m.quantization_mode == "stochastic" for _, m in ternary_layers(self.model))
        if self.config.early_stopping and self.loop.best_weights is not None:
            self.model.load_state_dict(self.loop.best_weights)
            if self.loop.best_loss_state:
                self.loss.load_state_dict(self.loop.best_loss_state)
            measure |= state.validated_step != self.loop.early_stopping.best_step  # type: ignore[union-attr]
        self._spread.settle(self.optimizer)
        if measure and self.loop.validator is not None and self.val_loader is not None:
            state.validation = self.loop.validator.run_validation(self.val_loader, self.loss)
        check_trained(state)


def create_training_pipeline(
    model: Any = "auto",
    train_data_path: Any = None,
    val_data_path: Any = None,
    *,
    loss: Any = None,
    optimizer: str | Optimizer = "auto",
    teacher: nn.Module | None = None,
    **options: Any,
) -> TrainingPipeline:
    """A training run, checked and ready to set up.

    Args:
        model: any nn.Module, the output of phase 4, or a name (see :class:`TrainingConfig`).
        train_data_path: a path, a list of paths, a folder, a torch Dataset, or an iterable of batches.
        val_data_path: the same; None holds out ``validation_split`` of the training data.
        loss: a name, a callable ``fn(outputs, targets)`` or a module; None takes the task's own.
        optimizer: "auto", "muon", "adamw", "sgd", or an optimizer instance over the model's parameters.
        teacher: a float model whose outputs are distilled into the ternary one.
        options: every field of :class:`phase5_training.config.TrainingConfig`.

    Returns:
        The pipeline: ``setup()``, then ``run()`` or ``await train()``.

    Raises:
        UsageError: an unknown option, with the nearest that exists, or a value that does not fit.

    Example:
        >>> pipeline = create_training_pipeline(train_data_path="train.json", epochs=3, use_grokfast=False)
        >>> pipeline.config.epochs
        3
    """
    if not isinstance(optimizer, (str, Optimizer)):
        raise UsageError(
            f"optimizer is a {type(optimizer).__name__}; pass a name, or a torch.optim.Optimizer instance"
        )
    data = {"train_data_path": train_data_path, "val_data_path": val_data_path}
    names = only_names({**data, "model": model, "optimizer": optimizer, "loss": loss})
    config = parse_config({**options, **names})
    check_trackers(config.trackers)
    if train_data_path is None:
        raise UsageError("train_data_path is missing; give a data file, a Dataset or batches")
    if teacher is not None and loss not in (None, "distillation"):
        raise UsageError("teacher= works with the distillation loss; leave loss out, or loss='distillation'")
    return TrainingPipeline(
        config,
        model=model,
        train_data=names.get("train_data_path", train_data_path),
        val_data=names.get("val_data_path", val_data_path),
        loss=loss,
        optimizer=optimizer,
        teacher=teacher,
    )


create_training_pipeline.__signature__ = full_signature(create_training_pipeline)  # type: ignore[attr-defined]
