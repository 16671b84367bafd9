"""Out of memory halves the micro-batch and changes neither the samples nor the random numbers."""

import pytest
import torch
from torch import nn

from phase5_training.errors import RunFailed
from phase5_training.gradients import BatchGradient, is_out_of_memory
from phase5_training.outputs import PlainLoss
from phase5_training.signals import StopAsked, StopFlag

BATCH = {
    "input": torch.randn(12, 4, generator=torch.Generator().manual_seed(0)),
    "target": torch.arange(12) % 3,
}
LOSS = PlainLoss(nn.functional.cross_entropy)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 400 bytes. Error code 12 (Cannot allocate memory)"
    ),
]


def gradient_of(model, fits, error, size=None, flag=None):
    """A model with memory for ``fits`` samples, and what adds its gradient."""
    seen, counted = [], []

    def run(inputs):
        if len(inputs) > fits and seen:
            raise error  # after the first micro-batch: there is something to forget
        seen.append(len(inputs))
        return model(inputs)

    def forget():
        counted.clear()
        for p in model.parameters():
            p.grad = None

    own = BatchGradient(
        run, torch.device("cpu"), size=size, amp_dtype=None, scaler=None, flag=flag or StopFlag(),
        count=lambda outputs, target: counted.append(len(target)), forget=[forget],
    )  # fmt: skip
    return own, seen, counted


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_the_gradient_is_that_of_a_run_with_small_micro_batches_dropout_included(error):
    grads = []
    for fits, size in ((3, 3), (3, 12)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        torch.manual_seed(1)
        own, seen, counted = gradient_of(model, fits, error, size)
        seen.append(0)
        loss, counts = own.add(BATCH, LOSS)
        assert (own.size, counts) == (3, True)
        assert sum(counted) == 12
        grads.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_later_batches_keep_to_the_smaller_size():
    own, seen, _ = gradient_of(nn.Linear(4, 3), 6, ERRORS[1])
    seen.append(0)
    own.add(BATCH, LOSS)
    del seen[:]
    own.add(BATCH, LOSS)
    assert (own.size, seen) == (6, [6, 6])


def test_one_sample_that_does_not_fit_ends_the_run_with_the_remedy():
    own, seen, _ = gradient_of(nn.Linear(4, 3), 0, ERRORS[1])
    seen.append(0)
    with pytest.raises(RunFailed, match=r"one sample at a time .*can't allocate.*use a smaller model"):
        own.add(BATCH, LOSS)


def test_other_errors_pass():
    own, seen, _ = gradient_of(nn.Linear(4, 3), 0, RuntimeError("shapes do not fit"))
    seen.append(0)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        own.add(BATCH, LOSS)
    assert not is_out_of_memory(MemoryError())


def test_a_real_refusal_of_the_allocator_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_stop_between_micro_batches_leaves_nothing_of_the_batch():
    flag, model = StopFlag(), nn.Linear(4, 3)
    own, _, counted = gradient_of(model, 12, ERRORS[0], 4, flag)
    flag.asked = True
    with pytest.raises(StopAsked):
        own.add(BATCH, LOSS)
    assert counted == []
    assert model.weight.grad is None
