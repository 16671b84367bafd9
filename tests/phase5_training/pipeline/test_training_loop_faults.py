"""What the loop does when something goes wrong: slow disks, stops in bad moments, bad numbers, no memory."""

import math
import os
import signal
import threading
import time
import warnings

import pytest
import torch
from torch import nn

from phase5_training.checkpoint import CheckpointStore, NotSavedError, load_checkpoint
from phase5_training.errors import DataError, RunFailed
from phase5_training.events import CallbackRegistry, Event
from phase5_training.loop_config import LoopConfig
from phase5_training.optimizers import build_optimizer
from phase5_training.phases import PhaseSchedule
from phase5_training.pipeline.bitnet_optimizer import BitNetOptimizer
from phase5_training.pipeline.scheduler import GrokfastScheduler
from phase5_training.pipeline.training_loop import TrainingLoop
from phase5_training.pipeline.validation import RealTimeValidator
from phase5_training.signals import stop_on_signals

cross_entropy = nn.functional.cross_entropy


class Loader:
    """Six batches of ten samples an epoch, in an order that is a function of the epoch."""

    def __init__(self, bad=()):
        generator = torch.Generator().manual_seed(0)
        self.input = torch.randn(60, 5, generator=generator)
        self.target = torch.randint(0, 3, (60,), generator=generator)
        self.bad, self.position, self.before = set(bad), (0, 0), lambda number: None

    def __len__(self):
        return 6

    def set_position(self, epoch, batch):
        self.position = (epoch, batch)

    def __iter__(self):
        epoch, first = self.position
        order = torch.randperm(60, generator=torch.Generator().manual_seed(epoch))
        for batch in range(first, 6):
            self.before(epoch * 6 + batch + 1)
            index = order[batch * 10 : batch * 10 + 10]
            inputs = self.input[index] * (math.nan if epoch * 6 + batch + 1 in self.bad else 1)
            yield {"input": inputs, "target": self.target[index], "index": index}


def make_loop(folder=None, registry=None, dropout=0.2, **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(dropout), nn.Linear(8, 3))
    optimizer = BitNetOptimizer(build_optimizer("adamw", model, learning_rate=0.02, weight_decay=0.0), model)
    return TrainingLoop(
        model,
        optimizer,
        LoopConfig(**{"epochs": 4, "eval_interval": 5, "log_interval": 4, "micro_batch_size": 5, **config}),
        scheduler=GrokfastScheduler(optimizer, PhaseSchedule.fit(24)),
        validator=RealTimeValidator(model),
        checkpoints=CheckpointStore(folder=folder) if folder else None,
        callbacks=registry,
    )


def record(*events):
    registry, fired = CallbackRegistry(), []
    for event in events:
        registry.register(event, lambda index, metrics, event=event: fired.append((event, index, metrics)))
    return registry, fired


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


# -- saving beside the steps --------------------------------------------------------------------------


def test_steps_go_on_while_a_checkpoint_is_written_and_it_is_reported_when_it_is_whole(tmp_path, monkeypatch):
    registry, fired = record(Event.CHECKPOINT_SAVED)
    loop, write, gate = make_loop(tmp_path, registry, checkpoint_interval=12), CheckpointStore._write, []
    steps = []
    registry.register("step_end", lambda step, metrics: steps.append((step, len(fired), bool(gate))))

    def slow(store, snapshot, suspect=None):
        while snapshot.step == 6 and loop.state.step < 9:
            time.sleep(0.001)
        gate.append(snapshot.step)
        return write(store, snapshot)

    monkeypatch.setattr(CheckpointStore, "_write", slow)
    loop.train(Loader(), cross_entropy)
    assert (7, 0, False) in steps, "the step after the save did not wait for it"
    assert (8, 0, False) in steps
    assert [index for _, index, _ in fired] == [6, 12, 18, 24]
    assert loop.state.saved_step == 24
    assert load_checkpoint(tmp_path / "step-00000024")["loop"]["saved_step"] == 24


def test_a_write_that_fails_ends_the_run_and_is_never_called_saved(tmp_path, monkeypatch):
    registry, fired = record(Event.CHECKPOINT_SAVED)
    loop = make_loop(tmp_path, registry, checkpoint_interval=6)

    def fails(store, snapshot, suspect=None):
        raise NotSavedError("the checkpoint cannot be written")

    monkeypatch.setattr(CheckpointStore, "_write", fails)
    with pytest.raises(NotSavedError):
        loop.train(Loader(), cross_entropy)
    assert fired == []
    assert loop.state.saved_step == -1


def test_an_error_of_the_model_lets_the_write_in_progress_end(tmp_path, monkeypatch):
    write = CheckpointStore._write
    monkeypatch.setattr(
        CheckpointStore, "_write", lambda store, snapshot, suspect: time.sleep(0.2) or write(store, snapshot)
    )
    loop = make_loop(tmp_path, checkpoint_interval=20)
    loop.callbacks.register("step_end", lambda step, metrics: 1 / (step - 11))
    with pytest.raises(ZeroDivisionError):
        loop.train(Loader(), cross_entropy)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


# -- a stop that comes at a bad moment ----------------------------------------------------------------


def whole_run(folder):
    loop = make_loop(folder)
    loop.train(Loader(), cross_entropy, Loader())
    return loop.state_dict()


def resumed(folder, loader=None):
    loop = make_loop(folder)
    loop.load_state_dict(load_checkpoint(max(folder.iterdir())))
    loop.train(loader or Loader(), cross_entropy, Loader())
    return loop.state_dict()


@pytest.mark.parametrize("where", ["accumulation", "validation", "last validation", "wait"])
def test_a_stop_is_acted_on_at_once_and_the_run_goes_on_bit_for_bit(tmp_path, where):
    expected = whole_run(tmp_path / "whole")
    loop, train, validation = make_loop(tmp_path / "part"), Loader(), Loader()
    count = loop._gradient._count
    seen = []

    def stop_in_the_first_micro_batch(outputs, target):
        count(outputs, target)
        if loop.state.step == 8:
            loop.stop()

    def stop_in_the_second_batch(number):
        seen.append(number)
        if number == 2 and loop.state.step == {"validation": 10, "last validation": 24}[where]:
            loop.stop()

    def signal_while_waiting(number):
        if number == 9:
            torch.rand(3)  # what a data set may draw; it is drawn again
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    if where == "accumulation":
        loop._gradient._count = stop_in_the_first_micro_batch
    elif where == "wait":
        train.before = signal_while_waiting
    else:
        validation.before = stop_in_the_second_batch
    began = time.monotonic()
    with stop_on_signals(loop.stop):
        state = loop.train(train, cross_entropy, validation)
    assert time.monotonic() - began < 20
    assert state.stop_reason == "interrupted"
    assert state.step == {"accumulation": 8, "validation": 10, "last validation": 24, "wait": 8}[where]
    if where == "wait":
        drawing = Loader()
        drawing.before = lambda number: torch.rand(3) if number == 9 else None
        whole = make_loop(tmp_path / "drawing")
        again = Loader()
        again.before = drawing.before
        whole.train(drawing, cross_entropy, Loader())
        expected, found = whole.state_dict(), resumed(tmp_path / "part", again)
    else:
        found = resumed(tmp_path / "part")
    assert same(expected["model"], found["model"])
    assert torch.equal(expected["random"]["torch"], found["random"]["torch"])
    assert found["loop"]["validation"] == expected["loop"]["validation"]


def test_a_stop_from_another_thread_does_not_tear_out_of_the_data(tmp_path):
    loop, loader = make_loop(tmp_path), Loader()

    def stop_from_elsewhere(number):
        if number == 5:
            thread = threading.Thread(target=loop.stop)
            thread.start()
            thread.join()

    loader.before = stop_from_elsewhere
    state = loop.train(loader, cross_entropy)
    assert (state.step, state.stop_reason) == (4, "interrupted")


def test_data_that_fail_leave_a_checkpoint_of_the_last_step(tmp_path):
    expected = whole_run(tmp_path / "whole")
    loop, loader = make_loop(tmp_path / "part"), Loader()

    def fails(number):
        if number == 9:
            raise DataError("record 3 of data.json cannot be read")

    loader.before = fails
    with pytest.raises(DataError, match="record 3"):
        loop.train(loader, cross_entropy, Loader())
    assert [p.name for p in (tmp_path / "part").iterdir()] == ["step-00000008"]
    assert same(expected["model"], resumed(tmp_path / "part")["model"])


# -- bad numbers --------------------------------------------------------------------------------------


def test_a_bad_batch_is_reported_with_its_samples():
    registry, fired = record(Event.NONFINITE_STEP)
    loader = Loader(bad={2, 9})
    make_loop(registry=registry).train(loader, cross_entropy)
    batches = [batch for _, _, metrics in fired for batch in metrics["batches"]]
    assert [(b["step"], b["epoch"], b["kind"]) for b in batches] == [(2, 0, "nonfinite"), (9, 1, "nonfinite")]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert batches[1]["samples"] == order[20:30].tolist()


def test_skip_goes_on_whatever_comes():
    state = make_loop(nonfinite="skip", max_nonfinite=2).train(Loader(bad=range(3, 20)), cross_entropy)
    assert (state.step, state.nonfinite) == (24, 17)


def test_in_a_row_means_in_a_row():
    state = make_loop(max_nonfinite=2).train(Loader(bad={2, 4, 6, 8}), cross_entropy)
    assert state.nonfinite == 4
    with pytest.raises(RunFailed, match=r"last 2 steps up to step 8 were skipped.*lower learning_rate"):
        make_loop(max_nonfinite=2).train(Loader(bad={7, 8}), cross_entropy)


def test_rollback_goes_on_from_the_checkpoint_before_at_half_the_rate(tmp_path):
    """Weights that blow up: at half the rate they do not."""
    registry, fired = record(Event.ROLLBACK, Event.STEP_END)
    loop = make_loop(tmp_path, registry, nonfinite="rollback", max_nonfinite=3, checkpoint_interval=4)
    rates, before = [], loop._meter.add

    def blow_up(loss, skipped, samples, **rest):
        before(loss, skipped, samples, **rest)
        rates.append((loop.state.step + 1, loop.scheduler.get_lr()))

    loop._meter.add = blow_up
    loader = Loader(bad={6, 7, 8})
    loader.before = lambda number: loader.bad.clear() if loop.state.rollbacks else None
    state = loop.train(loader, cross_entropy, Loader())
    (rollback,) = [metrics for event, _, metrics in fired if event == Event.ROLLBACK]
    assert (rollback["step"], rollback["from_step"], rollback["lr_factor"]) == (4, 8, 0.5)
    assert rollback["checkpoint"] == "step-00000004"
    assert (state.step, state.rollbacks, state.nonfinite) == (24, 1, 0)
    first, second = [rate for step, rate in rates if step == 6]
    assert second == pytest.approx(first / 2)
    steps = [index for event, index, _ in fired if event == Event.STEP_END]
    assert steps == [*range(1, 9), *range(5, 25)]
    # The rate stays low over a resume.
    again = make_loop(tmp_path)
    again.load_state_dict(load_checkpoint(tmp_path / "step-00000022"))
    assert (again.state.rollbacks, again.optimizer.param_groups[0]["initial_lr"]) == (1, 0.01)


def test_a_killed_rollback_is_repeated_bit_for_bit(tmp_path):
    """Resumed from before or after it, the run ends as if it had not stopped."""

    def run(folder, stop_at=None, source=None):
        registry = CallbackRegistry()
        loop = make_loop(folder, registry, nonfinite="rollback", max_nonfinite=3, checkpoint_interval=4)
        loader = Loader(bad={6, 7, 8})
        loader.before = lambda number: loader.bad.clear() if loop.state.rollbacks else None
        registry.register(
            "step_end", lambda step, m: loop.stop() if (loop.state.rollbacks, step) == stop_at else None
        )
        if source:
            loop.load_state_dict(load_checkpoint(source))
        loop.train(loader, cross_entropy, Loader())
        return loop.state_dict()

    expected = run(tmp_path / "whole")
    for name, stop_at in (("before", (0, 7)), ("after", (1, 7))):
        folder = tmp_path / name
        run(folder, stop_at)
        assert same(expected["model"], run(folder, source=max(folder.iterdir()))["model"])


def test_rollback_without_an_end_or_a_checkpoint_fails(tmp_path):
    bad = Loader(bad=range(6, 100))
    registry, fired = record(Event.ROLLBACK)
    loop = make_loop(tmp_path, registry, nonfinite="rollback", max_nonfinite=3, checkpoint_interval=4)
    with pytest.raises(RunFailed, match=r"last 3 steps up to step 8 were skipped"):
        loop.train(bad, cross_entropy)
    assert len(fired) == 3
    with pytest.raises(RunFailed, match="were skipped"):
        make_loop(nonfinite="rollback", max_nonfinite=3).train(bad, cross_entropy)


@pytest.mark.parametrize("policy", ["record", "rollback"])
def test_a_loss_spike_is_reported_and_may_roll_back(tmp_path, policy):
    registry, fired = record(Event.LOSS_SPIKE, Event.ROLLBACK)
    loop = make_loop(tmp_path, registry, epochs=8, loss_spikes=policy, checkpoint_interval=4, dropout=0.0)
    loader = Loader()
    spiked = []

    def spike(outputs, target):
        now = loop.state.step == 40 and not loop.state.rollbacks
        spiked.extend([1] if now else [])
        return cross_entropy(outputs, target) * (1000.0 if now else 1.0)

    state = loop.train(loader, spike)
    found = [metrics for event, _, metrics in fired if event == Event.LOSS_SPIKE]
    assert [b["step"] for metrics in found for b in metrics["batches"]] == [41]
    rollbacks = [(m["step"], m["from_step"]) for event, _, m in fired if event == Event.ROLLBACK]
    assert rollbacks == ([(40, 44)] if policy == "rollback" else [])
    assert state.step == 48


# -- no memory ----------------------------------------------------------------------------------------


def test_smaller_micro_batches_are_said_and_remembered(tmp_path):
    def limited(loop, fits):
        model = loop._gradient.model

        def run(inputs):
            if len(inputs) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return model(inputs)

        loop._gradient.model = run

    small = make_loop(tmp_path / "small", micro_batch_size=3)
    small.train(Loader(), cross_entropy, Loader())
    registry, fired = record(Event.OUT_OF_MEMORY)
    loop = make_loop(tmp_path / "part", registry)
    limited(loop, 3)
    registry.register("step_end", lambda step, metrics: loop.stop() if step == 7 else None)
    with pytest.warns(UserWarning, match=r"out of memory at step 1: micro-batches of 3 samples from here on"):
        loop.train(Loader(), cross_entropy, Loader())
    assert [metrics for _, _, metrics in fired] == [{"step": 1, "micro_batch_size": 3}]
    again = make_loop(tmp_path / "part")
    again.load_state_dict(load_checkpoint(max((tmp_path / "part").iterdir())))
    limited(again, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.train(Loader(), cross_entropy, Loader())
    assert same(small.state_dict()["model"], again.state_dict()["model"])
