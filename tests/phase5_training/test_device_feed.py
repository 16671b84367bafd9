"""Batches that move ahead of the step."""

import pytest
import torch

from phase5_training.device_feed import moved_ahead
from phase5_training.feed import Feed
from phase5_training.signals import StopFlag


def batches(n, fails_at=None):
    for i in range(n):
        if i == fails_at:
            raise ValueError("broken")
        yield {
            "input": torch.full((2,), float(i)),
            "target": {"a": torch.tensor([i, i])},
            "index": torch.tensor([i]),
        }


class Loader:
    """Counts what is drawn from it."""

    def __init__(self, reads_ahead=True):
        self.reads_ahead, self.drawn = reads_ahead, 0

    def __iter__(self):
        for batch in batches(3):
            self.drawn += 1
            yield batch


def test_on_a_cpu_batches_pass_as_they_are():
    given = list(batches(3))
    passed = list(moved_ahead(iter(given), torch.device("cpu")))
    assert all(a is b for a, b in zip(passed, given, strict=True))
    loader = Loader()
    feed = Feed(StopFlag(), lambda _: None, "cpu").batches(loader, 0, 0)
    next(feed)
    assert loader.drawn == 1


@pytest.mark.cuda
def test_on_cuda_one_batch_is_copied_ahead_and_an_error_waits_its_turn():
    device = torch.device("cuda")
    moved = moved_ahead(batches(4, fails_at=2), device)
    for i in range(2):
        batch = next(moved)
        assert batch["input"].device.type == batch["target"]["a"].device.type == "cuda"
        assert batch["index"].device.type == "cpu"
        assert batch["input"].tolist() == [i, i]
    with pytest.raises(ValueError, match="broken"):
        next(moved)
    loader = Loader()
    feed = Feed(StopFlag(), lambda _: None, device).batches(loader, 0, 0)
    next(feed)
    assert loader.drawn == 2
    loader = Loader(reads_ahead=False)
    next(Feed(StopFlag(), lambda _: None, device).batches(loader, 0, 0))
    assert loader.drawn == 1
