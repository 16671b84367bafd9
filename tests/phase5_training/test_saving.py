"""At most an interval is lost, whatever a write takes, and a step waits for the copy only."""

import threading
import time
from pathlib import Path

import pytest
import torch

from phase5_training.background import BackgroundTask
from phase5_training.checkpoint import CheckpointStore, NotSavedError, load_checkpoint
from phase5_training.saving import Saver


class SlowStore:
    """Writes that last until they are let go, as many steps as a test says."""

    def __init__(self):
        self.gates, self.begun = [], []

    def begin(self, state, step, suspect=None):
        assert all(gate.is_set() for gate in self.gates), "two writes at a time"
        gate = threading.Event()
        self.gates.append(gate)
        self.begun.append(step)
        return BackgroundTask(lambda: gate.wait(10) and Path(f"step-{step}"))


@pytest.mark.parametrize("interval", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("duration", [0, 1, 3, 100])
def test_at_most_an_interval_is_lost_however_long_a_write_takes(interval, duration):
    """The steps taken since the newest checkpoint that is whole, at every moment between two steps."""
    store, whole, lost = SlowStore(), 0, 0
    saver = Saver(store, interval)

    def settled(saved):
        nonlocal whole
        whole = saved[0] if saved else whole

    for step in range(1, 60):
        lost = max(lost, step - whole)  # a kill here, after the step and before what follows it
        waits = store.begun and step - store.begun[-1] >= interval - saver.spacing
        if store.begun and (waits or step - store.begun[-1] >= duration):
            store.gates[-1].set()  # a write that is waited for ends while it is waited for
        if saver.due(step):
            store.gates and store.gates[-1].set()
            settled(saver.settle())
            saver.begin({}, step)
            if interval == saver.spacing or duration == 0:
                store.gates[-1].set()
        settled(saver.follow(step))
    assert lost <= interval
    assert len(store.begun) == 59 // saver.spacing


def test_a_write_is_reported_once_and_only_when_it_has_ended():
    store = SlowStore()
    saver = Saver(store, 10)
    saver.begin({}, 5)
    assert saver.follow(6) is None
    store.gates[0].set()
    while saver._writing[1].done is False:
        time.sleep(0.001)
    assert saver.follow(7) == (5, Path("step-5"))
    assert saver.follow(8) is None
    assert saver.settle() is None


def test_an_error_of_the_writer_is_raised_where_the_write_is_followed(tmp_path, monkeypatch):
    store = CheckpointStore(folder=tmp_path)

    def full(path, parts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phase5_training.checkpoint.write_file", full)
    saver = Saver(store, 2)
    saver.begin({"v": 1}, 1)
    with pytest.raises(NotSavedError, match=r"step 1 cannot be written .*No space"):
        saver.follow(2)
    assert saver.settle() is None


def test_the_state_is_that_of_the_moment_at_which_saving_began(tmp_path):
    store, weight = CheckpointStore(folder=tmp_path), torch.ones(100_000)
    task = store.begin({"w": weight}, 1)
    weight.zero_()
    assert torch.equal(load_checkpoint(task.result())["w"], torch.ones(100_000))


def test_a_task_ends_with_what_the_work_raised():
    def fails():
        raise ValueError("bad")

    task = BackgroundTask(fails)
    with pytest.raises(ValueError, match="bad"):
        task.result()
    assert task.done
