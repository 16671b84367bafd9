"""The gradient of a batch, in micro-batches that fit in memory."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from phase5_training.batches import count_samples, micro_batches_of, rows_of, to_device
from phase5_training.distributed import Ranks
from phase5_training.errors import RunFailed, first_line
from phase5_training.protocols import Batch
from phase5_training.random_state import random_state, set_random_state
from phase5_training.signals import StopAsked, StopFlag

# How torch's allocator on a CPU says it, which has no exception of its own.
_CPU_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


class BatchGradient:
    """Adds the gradient of a batch's mean loss to the parameters, one micro-batch after the other.

    When memory runs out, the batch is begun again in micro-batches of half the size, with the same samples
    and the same random numbers: the gradient stays that of the whole batch, and later batches keep to the
    smaller size. What a model counts in buffers (the running means of a BatchNorm) keeps the trace of the
    first try.

    Among several ranks each has a part of the batch, and the loss is the mean over all of it. What the ranks
    tell each other travels beside the forward and the backward, so that they wait for the slowest once a
    step, for its gradients. One whose memory ran out before the last backward exchanges zeros, and all of
    them give the batch up.

    Args:
        model: called as ``model(micro_batch["input"])``; one with ``no_sync`` exchanges its gradients in
            backward.
        device: where micro-batches go.
        size: samples per forward; None takes the batch whole.
        amp_dtype: autocast to it; None for no autocast.
        scaler: loss scaling for float16.
        flag: looked at between micro-batches.
        count: called with the outputs and targets of each micro-batch.
        forget: each called when the batch is given up or begun again: what was counted and added is void.
        ranks: those that share the batch.
        sums: what ``count`` adds to, (n,) float64; added up over the ranks once for each batch.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        device: torch.device,
        *,
        size: int | None,
        amp_dtype: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
        flag: StopFlag,
        count: Callable[[Any, Any], None],
        forget: Sequence[Callable[[], None]],
        ranks: Ranks | None = None,
        sums: Sequence[Tensor] = (),
    ) -> None:
        self.model, self.device, self.size = model, device, size
        self.samples = 0
        """Samples of the last batch, those of all ranks."""
        self._amp_dtype, self._scaler = amp_dtype, scaler
        self._flag, self._count, self._forget = flag, count, forget
        self._ranks, self._sums, self._exchanging = ranks or Ranks(), sums, False

    def add(self, batch: Batch, loss_fn: Any) -> tuple[Tensor, bool | Tensor]:
        """Add the gradient of a batch.

        Args:
            batch: {"input", "target"}.
            loss_fn: a :class:`Loss`.

        Returns:
            The batch's mean loss, () on the device, and whether it has a valid target at all.

        Raises:
            StopAsked: between two micro-batches; nothing of this batch is left.
            RunFailed: one sample is too much for the memory.
        """
        before = random_state()
        while True:
            used = min(self.size or count_samples(batch), count_samples(batch))
            self._exchanging = mine = False
            try:
                return self._try(batch, loss_fn)
            except StopAsked:
                self._give_up()
                raise
            except _OtherOutOfMemory:
                pass
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._tell_the_others(error, used)
                if used == 1:
                    raise RunFailed(
                        f"out of memory with one sample at a time ({first_line(error)}); use a smaller "
                        "model or shorter samples, or max_length"
                    ) from error
                mine = True
            # Not in the handler, whose traceback holds the tensors of the try.
            if mine and not self._ranks.alone:
                self._end_exchange(batch, loss_fn)
            self._give_up()
            set_random_state(before)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.size = max(self._ranks.gathered(-(-used // 2)))

    def _give_up(self) -> None:
        for forget in self._forget:
            forget()

    def _tell_the_others(self, error: RuntimeError, used: int) -> None:
        """Let the other ranks know before their last backward, where they would wait for this one.

        Raises:
            RunFailed: they are in it already.
        """
        if self._ranks.alone:
            return
        if self._exchanging or not hasattr(self.model, "no_sync"):
            raise RunFailed(
                f"out of memory on rank {self._ranks.rank} while the ranks exchange tensors "
                f"({first_line(error)}); go on with micro_batch_size={max(1, used // 2)}"
            ) from error
        self._ranks.add_up_([torch.zeros((), device=self.device), *self._sums], failed=True)

    def _end_exchange(self, batch: Batch, loss_fn: Any) -> None:
        """Take part in the exchange of gradients that the others have begun, with zeros."""
        one = to_device({key: rows_of(part, slice(0, 1)) for key, part in batch.items()}, self.device)
        (loss_fn(self.model(one["input"]), one) * 0).backward()

    def _try(self, batch: Batch, loss_fn: Any) -> tuple[Tensor, bool | Tensor]:
        micro_batches = micro_batches_of(batch, self.size)
        units = [loss_fn.units(m) for m in micro_batches]
        totals = self._ranks.totals(sum(units), count_samples(batch), self._flag.wished)
        loss = torch.zeros((), device=self.device)
        for number, (micro_batch, own) in enumerate(zip(micro_batches, units, strict=True)):
            if number:
                self._flag.look()
            last = number == len(micro_batches) - 1
            micro_batch = to_device(micro_batch, self.device)
            with contextlib.nullcontext() if last else self._apart():
                with torch.autocast(self.device.type, self._amp_dtype, enabled=self._amp_dtype is not None):
                    outputs = self.model(micro_batch["input"])
                    mean = loss_fn(outputs, micro_batch)
                if not number:
                    total, self.samples, asked = totals()
                    if asked:
                        self._flag.asked = True
                share = _share(mean, own, total)
                loss += share.detach()
                self._count(outputs, micro_batch["target"])
                if last:
                    self._exchanging = True
                    others = self._ranks.add_up_([loss, *self._sums])
                (self._scaler.scale(share) if self._scaler else share).backward()
        if others():
            raise _OtherOutOfMemory
        if hasattr(loss_fn, "parameters"):
            grads = [p.grad for p in loss_fn.parameters() if p.grad is not None]
            if grads:
                self._ranks.add_up_(grads)()
        return loss, total > 0

    def _apart(self) -> contextlib.AbstractContextManager[None]:
        """A forward and backward without the other ranks."""
        own: Any = getattr(self.model, "no_sync", contextlib.nullcontext)
        return own()


class _OtherOutOfMemory(Exception):  # noqa: N818 - not of this rank
    """Another rank has no memory for its part of the batch."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or of the machine ran out.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
        True
    """
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in _CPU_MEMORY)


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
