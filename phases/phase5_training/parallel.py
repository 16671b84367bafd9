"""How a model is spread over the ranks: copies whose gradients are added up (DDP), or parts of it (FSDP2)."""

import copy
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from phase4_bitnet.layers import ternary_layers
from phase5_training.batches import rows_of, to_device
from phase5_training.config import TrainingConfig
from phase5_training.distributed import Ranks, Traffic, may_restart, restarts
from phase5_training.errors import UsageError
from phase5_training.loss_registry import Loss
from phase5_training.memory import usable_memory
from phase5_training.modes import eval_mode
from phase5_training.pipeline.bitnet_optimizer import BitNetOptimizer
from phase5_training.random_state import random_state, set_random_state
from phase5_training.recorder import SilentRun
from phase5_training.records import RunDirectory
from phase5_training.sharded import BYTES_A_WEIGHT, ShardedOptimizer, codes_travel, shard, whole_state
from phase5_training.shared_memory import HOW_SHARED, Posted, SharedMemory, add_up_, memory_for

# Codes are derived on each rank from latents that are the same, and the loop levels the other buffers. The
# option has another name from torch 2.13 on.
_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"
_LEAVE_BUFFERS: dict[str, Any] = {_SYNC_BUFFERS: False}


def on_ranks(config: TrainingConfig, ranks: Ranks) -> TrainingConfig:
    """The options as they are for several processes.

    Args:
        config: as given.
        ranks: this process among the others; alone, the options stay as they are.

    Raises:
        UsageError: what cannot be done by several processes.
    """
    if restarts():
        # torchrun began again after a rank died: nothing may be deleted, and nothing gone back to.
        config = config.model_copy(update={"auto_resume": True, "overwrite": False, "resume_from": None})
    if may_restart() and config.experiment_name is None:
        raise UsageError(
            "torchrun may restart this run and would not find it again without a name; give experiment_name"
        )
    if ranks.alone:
        return config
    if config.learning_rate == "auto":
        raise UsageError(
            "learning_rate='auto' tries rates in one process; run `forge tune CONFIG.yaml` first, and train "
            "with the file that it writes"
        )
    if config.device.startswith("cuda:"):
        raise UsageError(
            f"device={config.device!r} is one GPU for {ranks.world_size} ranks; use device='cuda', each rank "
            "then takes its own"
        )
    return config


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A model among the ranks of a run.

    Args:
        called: what to call in training.
        optimizer: what makes a BitNetOptimizer that trains it.
        notices: sentences about it.
        parts: each rank has rows of the weights, and not all of them.
        whole: on the first rank, a copy to be filled with the whole weights, where there are ``parts``.
    """

    called: Callable[..., Any]
    optimizer: Callable[..., BitNetOptimizer] = BitNetOptimizer
    notices: tuple[str, ...] = ()
    parts: bool = False
    whole: nn.Module | None = None

    def settle(self, optimizer: BitNetOptimizer) -> None:
        """After the last step: layers derive their codes by themselves, or all ranks do once more."""
        if self.parts:
            optimizer.requantize()
        else:
            optimizer.release()

    def finished(self, model: nn.Module) -> nn.Module:
        """The model to hand on: ``model``, or on the first rank the whole of its parts; all ranks call."""
        if not self.parts:
            return model
        state = whole_state(model, keep=self.whole is not None)
        if self.whole is None:
            return model
        self.whole.load_state_dict(state)
        return self.whole


def spread(
    model: nn.Module,
    called: Callable[..., Any],
    loss: Loss,
    batch: Mapping[str, Any],
    config: TrainingConfig,
    ranks: Ranks,
    device: torch.device,
) -> Spread:
    """Spread a model over the ranks, starting from the weights of the first.

    Args:
        model: on its device, not yet in an optimizer.
        called: the model, or what compiles it.
        loss: its parameters, if any, are the same on all ranks afterwards.
        batch: one of this rank's.
        config: ``parallel`` and ``gradient_compression``.
        ranks: those to spread over; one that is alone keeps the model as it is.
        device: where the model is.
    """
    if ranks.alone:
        return Spread(called=called)
    ranks.level_([p.detach() for p in loss.parameters()])
    parts = ranks.chosen(in_parts(config.parallel, model, device, ranks))
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in trained)
    width, word = (2, "bfloat16") if config.gradient_compression == "bf16" else (4, "float32")
    sent = f"{size * width / 1e6:.3g} MB of {word} gradients a step are added up"
    if parts:
        whole = copy.deepcopy(model).cpu() if ranks.first else None
        exchange = shard(model, config, ranks, device)
        sent += HOW_SHARED if exchange.memory is not None else ""
        coded = sum(codes_travel(layer) for _, layer in ternary_layers(model))
        notice = (
            f"{ranks.world_size} ranks, each with a part of every weight (fsdp); {coded} layers travel as "
            f"2-bit codes; {sent}"
        )
        made = functools.partial(ShardedOptimizer, exchange=exchange)
        return Spread(called=model, optimizer=made, notices=(notice,), parts=True, whole=whole)
    unused = ranks.any(bool(unused_parameters(model, loss, batch, device)))
    copies = DistributedDataParallel(
        called,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=_bucket_mb(4 * size),
        find_unused_parameters=unused,
        **_LEAVE_BUFFERS,
    )
    dtype = torch.bfloat16 if width == 2 else None
    memory = memory_for([p.numel() * (dtype or p.dtype).itemsize for p in trained], ranks, device)
    if memory is None:
        copies.register_comm_hook((ranks.traffic, dtype), _added_up)
    else:
        copies.register_comm_hook(_SharedSums(memory, ranks.traffic, dtype), _SharedSums.add_up)
        sent += HOW_SHARED
    notice = f"{ranks.world_size} ranks, each with the whole model (ddp); {sent}"
    return Spread(called=copies, notices=(notice,))


def in_parts(wanted: str, model: nn.Module, device: torch.device, ranks: Ranks) -> bool:
    """Whether each rank gets a part of the model, and not a copy.

    Args:
        wanted: "ddp", "fsdp", or "auto": parts where the state of training takes more than half of the memory
            that a rank has.
        model: with ``requires_grad`` set.
        device: its memory counts; on a CPU the machine's or the container's, shared by its ranks.
        ranks: those of a machine are told by LOCAL_WORLD_SIZE.
    """
    if wanted != "auto":
        return wanted == "fsdp"
    size = sum(p.numel() for p in model.parameters())
    if device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
        memory = usable_memory() / here
    return size * BYTES_A_WEIGHT > memory / 2


def _bucket_mb(gradients: int) -> float:
    """Size of what DDP sends at a time, in MB.

    Torch's 25 are all of a small model, which then travels when the backward is over and nothing is left to
    do meanwhile.

    Args:
        gradients: bytes.

    Example:
        >>> _bucket_mb(10_000), _bucket_mb(16_000_000), _bucket_mb(4_000_000_000)
        (1.0, 2.0, 25.0)
    """
    return min(25.0, max(1.0, gradients / 8e6))


def _added_up(
    how: tuple[Traffic, torch.dtype | None],
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Add up a bucket of gradients, in its own type or another, and count the bytes.

    Each rank's loss is its share of the batch's, so that nothing is to be divided, as torch's hooks do.
    """
    traffic, dtype = how
    whole = bucket.buffer()
    sent = whole if dtype is None else whole.to(dtype)
    traffic.reduced += sent.nbytes
    done = dist.all_reduce(sent, async_op=True).get_future()
    return done.then(lambda summed: whole if dtype is None else whole.copy_(summed.value()[0]))


class _SharedSums:
    """The same through memory that the ranks share: posted as buckets are ready, added up with the last.

    Args:
        memory: with room for all buckets.
        traffic: counts the bytes.
        dtype: in which gradients travel; None is their own. They are added up in their own.
    """

    def __init__(self, memory: SharedMemory, traffic: Traffic, dtype: torch.dtype | None) -> None:
        self._memory, self._traffic, self._dtype = memory, traffic, dtype
        self._arriving: list[tuple[Tensor, Posted]] = []

    def add_up(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        """See :func:`_added_up`."""
        whole = bucket.buffer()
        sent = whole if self._dtype is None else whole.to(self._dtype)
        self._traffic.reduced += sent.nbytes
        self._arriving.append((whole, self._memory.post(sent)))
        # DDP reads the buckets after the last one, in whose turn no backward is left to do meanwhile.
        if bucket.is_last():
            for own, posted in self._arriving:
                add_up_(own, self._memory.parts(posted))
            self._arriving.clear()
            self._memory.release()
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(whole)
        return done


def unused_parameters(
    model: nn.Module, loss: Loss, batch: Mapping[str, Any], device: torch.device
) -> list[str]:
    """Names of the trained parameters that one sample gives no gradient.

    Weights, gradients and generators stay as they are.
    """
    before = random_state()
    own = to_device({key: rows_of(part, slice(0, 1)) for key, part in batch.items()}, device)
    with eval_mode(model), torch.enable_grad():
        loss(model(own["input"]), own).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    for p in [*model.parameters(), *loss.parameters()]:
        p.grad = None
    set_random_state(before)
    return without


def seen_by_all(path: Path, ranks: Ranks) -> RunDirectory:
    """The run's folder, to write to on the first rank and to read from on the others.

    Raises:
        UsageError: a rank does not see it.
    """
    if ranks.alone:
        return RunDirectory(path)
    blind = [rank for rank, seen in enumerate(ranks.gathered(path.is_dir())) if not seen]
    if blind:
        raise UsageError(
            f"rank {blind[0]} does not see {path}, which the first rank made; output_dir has to be in a file "
            "system that all machines share"
        )
    return RunDirectory(path) if ranks.first else SilentRun(path)
