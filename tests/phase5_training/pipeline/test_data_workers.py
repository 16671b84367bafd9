"""Data workers that die or hang: the file and the records are named, and the run that waits can leave."""

import multiprocessing
import os
import re
import signal
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from phase5_training.errors import DataError, UsageError
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.pipeline.data_workers import watched


class Broken(Dataset):
    """Item 13 kills the worker that reads it, or keeps it for an hour."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 13 and get_worker_info() is not None:
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "raise":
                raise RuntimeError("DataLoader timed out after all")
            time.sleep(3600)
        return torch.ones(3), index % 2


def loader(how, **options):
    config = DataConfig(batch_size=5, num_workers=2, shuffle=False, timeout=1.2, **options)
    return DataLoaderFactory.create_loader(Broken(how), config)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "die",
            r"data worker 0 died \(killed by SIGKILL\) while it read record 10, 11, 12, 13, 14 of Broken",
        ),
        (
            "hang",
            r"worker 0 has not read record 10, 11, 12, 13, 14 of Broken within data_timeout=1\.2 seconds",
        ),
    ],
)
def test_a_worker_that_fails_is_named_with_its_records(how, said):
    began = time.monotonic()
    with pytest.raises(DataError, match=said):
        list(loader(how))  # what a dead one had made before may be lost with it
    assert time.monotonic() - began < 15


def test_an_error_of_the_data_set_is_its_own():
    batches = iter(loader("raise"))
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker"):
        list(batches)


def test_the_next_epoch_has_new_workers():
    data = loader("die")
    with pytest.raises(DataError):
        list(data)
    data._prepared.source.dataset.how = "die"
    data.set_position(0, 3)
    assert next(iter(data))["index"][0].item() == 15


def test_a_connection_that_breaks_before_the_worker_is_known_to_be_dead():
    """A tensor travels by a socket, and that is reset a moment before the process is gone."""
    worker = multiprocessing.get_context("fork").Process(target=lambda: (time.sleep(0.3), os._exit(9)))
    worker.start()

    class Broken:
        _workers = (worker,)

        def __next__(self):
            raise ConnectionResetError(104, "Connection reset by peer")

    board = SimpleNamespace(reading=lambda number: [7])
    batches = watched(
        Broken(), board, timeout=5, locate=lambda record: ("a.json", record), while_waiting=lambda: None
    )
    with pytest.raises(
        DataError, match=r"data worker 0 died \(exit code 9\) while it read record 7 of a\.json"
    ):
        next(batches)
    worker.join()


def test_who_waits_can_leave():
    class LeaveError(Exception):
        pass

    def leave():
        raise LeaveError

    data = loader("hang", drop_last=False)
    data.while_waiting = leave
    began = time.monotonic()
    with pytest.raises(LeaveError):
        list(data)
    assert time.monotonic() - began < 1.2


def test_what_the_workers_make_is_what_one_process_makes():
    x = np.arange(60, dtype=np.float32).reshape(20, 3)
    data = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.arange(20) % 3)
    made = [
        DataLoaderFactory.create_loader(data, DataConfig(batch_size=4, num_workers=n, seed=3)) for n in (0, 2)
    ]
    for _ in range(2):
        for one, other in zip(*made, strict=True):
            assert torch.equal(one["input"], other["input"])
            assert torch.equal(one["index"], other["index"])


def test_a_time_of_nothing_is_refused():
    with pytest.raises(UsageError, match=r"timeout=0 is not above 0"):
        DataConfig(timeout=0)


@pytest.mark.parametrize(
    ("available", "options", "said"),
    [
        (8, {}, ["num_workers=2: the data are in memory, .*; use num_workers=0"]),
        (2, {"memory_limit_mb": 0}, []),
        (1, {"memory_limit_mb": 0}, ["num_workers=2: cores available: 1; more workers help only where .*"]),
    ],
)
def test_workers_that_help_nobody_are_told_of_once(tmp_path, monkeypatch, available, options, said):
    from phase5_training.pipeline import data_loader

    monkeypatch.setattr(data_loader, "cores", lambda: available)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # that torch looks at
    np.save(tmp_path / "a.npy", np.ones((9, 2), np.float32))
    np.save(tmp_path / "a_targets.npy", np.arange(9))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        config = DataConfig(batch_size=4, num_workers=2, **options)
        assert len(list(DataLoaderFactory.create_loader(tmp_path / "a.npy", config))) == 3
    assert len(found) == len(said)
    for one, wanted in zip(found, said, strict=True):
        assert re.fullmatch(wanted, str(one.message))
