"""The gradient of a batch, in micro-batches that fit in memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from phase5_training.batches import count_samples, micro_batches_of, to_device
from phase5_training.errors import RunFailed
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

    Args:
        model: called as ``model(micro_batch["input"])``.
        device: where micro-batches go.
        size: samples per forward; None takes the batch whole.
        amp_dtype: autocast to it; None for no autocast.
        scaler: loss scaling for float16.
        flag: looked at between micro-batches.
        count: called with the outputs and targets of each micro-batch.
        forget: each called when the batch is given up or begun again: what was counted and added is void.
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
    ) -> None:
        self.model, self.device, self.size = model, device, size
        self._amp_dtype, self._scaler = amp_dtype, scaler
        self._flag, self._count, self._forget = flag, count, forget

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
            try:
                return self._try(batch, loss_fn)
            except StopAsked:
                self._give_up()
                raise
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if used == 1:
                    raise RunFailed(
                        f"out of memory with one sample at a time ({_first_line(error)}); use a smaller "
                        "model or shorter samples, or max_length"
                    ) from error
            # Not in the handler, whose traceback holds the tensors of the try.
            self._give_up()
            set_random_state(before)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.size = -(-used // 2)

    def _give_up(self) -> None:
        for forget in self._forget:
            forget()

    def _try(self, batch: Batch, loss_fn: Any) -> tuple[Tensor, bool | Tensor]:
        micro_batches = micro_batches_of(batch, self.size)
        units = [loss_fn.units(m) for m in micro_batches]
        total = sum(units)
        loss = torch.zeros((), device=self.device)
        for number, (micro_batch, own) in enumerate(zip(micro_batches, units, strict=True)):
            if number:
                self._flag.look()
            micro_batch = to_device(micro_batch, self.device)
            with torch.autocast(self.device.type, self._amp_dtype, enabled=self._amp_dtype is not None):
                outputs = self.model(micro_batch["input"])
                mean = loss_fn(outputs, micro_batch)
            share = _share(mean, own, total)
            (self._scaler.scale(share) if self._scaler else share).backward()
            loss += share.detach()
            self._count(outputs, micro_batch["target"])
        return loss, total > 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or of the machine ran out.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
        True
    """
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in _CPU_MEMORY)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
