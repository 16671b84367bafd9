"""How a model is spread over the ranks of a run: copies with averaged gradients (DDP), or parts (FSDP2)."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from phase5_training.background import BackgroundTask
from phase5_training.batches import rows_of, to_device
from phase5_training.checkpoint import CheckpointStore, load_checkpoint
from phase5_training.config import TrainingConfig
from phase5_training.distributed import Ranks, may_restart, restarts
from phase5_training.errors import UsageError
from phase5_training.loss_registry import Loss
from phase5_training.modes import eval_mode
from phase5_training.random_state import random_state, set_random_state
from phase5_training.recorder import SilentRun
from phase5_training.records import RunDirectory

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


def spread(
    model: nn.Module,
    called: Callable[..., Any],
    loss: Loss,
    batch: Mapping[str, Any],
    config: TrainingConfig,
    ranks: Ranks,
    device: torch.device,
) -> tuple[Callable[..., Any], str]:
    """Spread a model over several ranks, starting from the weights of the first.

    Args:
        model: on its device, not yet in an optimizer.
        called: the model, or what compiles it.
        loss: its parameters, if any, are the same on all ranks afterwards.
        batch: one of this rank's.
        config: ``parallel`` and ``gradient_compression``.
        ranks: those to spread over.
        device: where the model is.

    Returns:
        What to call in training, and a sentence about it.
    """
    ranks.level_([p.detach() for p in loss.parameters()])
    unused = ranks.any(bool(unused_parameters(model, loss, batch, device)))
    spread_model = DistributedDataParallel(
        called,
        device_ids=[device.index] if device.type == "cuda" else None,
        **_LEAVE_BUFFERS,
        gradient_as_bucket_view=True,
        find_unused_parameters=unused,
    )
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = 4
    if config.gradient_compression == "bf16":
        spread_model.register_comm_hook(None, _in_bfloat16)
        width = 2
    return spread_model, (
        f"{ranks.world_size} ranks, each with the whole model (ddp); {size * width / 1e6:.3g} MB of "
        f"{'bfloat16' if width == 2 else 'float32'} gradients a step are added up"
    )


def _in_bfloat16(
    group: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients in bfloat16; torch's own hook does so with NCCL only."""
    whole = bucket.buffer()
    sent = whole.to(torch.bfloat16).div_(dist.get_world_size())
    done = dist.all_reduce(sent, async_op=True).get_future()
    return done.then(lambda summed: whole.copy_(summed.value()[0]))


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


def checkpoints_of(folder: Path, keep: int, ranks: Ranks) -> Any:
    """The checkpoints of a run: written by the first rank, read by all."""
    store = CheckpointStore(folder=folder, keep=keep)
    return store if ranks.alone else SharedCheckpoints(store, ranks)


class SharedCheckpoints:
    """Checkpoints that the first of several ranks writes, and all read; the methods of CheckpointStore.

    Each is called by all ranks. The state is the same on all of them, but for what only the first keeps.

    Args:
        store: of the run's folder.
        ranks: who shares it.
    """

    def __init__(self, store: CheckpointStore, ranks: Ranks) -> None:
        self.store, self.ranks = store, ranks

    def paths(self) -> list[Path]:
        """See CheckpointStore."""
        return self.ranks.by_first(self.store.paths)

    def begin(self, state: Mapping[str, Any], step: int, suspect: int | None = None) -> BackgroundTask[Path]:
        """See CheckpointStore; on other ranks than the first there is nothing to wait for."""
        if self.ranks.first:
            return self.store.begin(state, step, suspect)
        return BackgroundTask(lambda: self.store.path(step))

    def load(self, path: Path) -> dict[str, Any]:
        """See CheckpointStore."""
        self.ranks.by_first(lambda: self.store.load(path) and None)
        return load_checkpoint(path)

    def load_newest(
        self, refused: Callable[[str], None] = lambda message: None
    ) -> tuple[Path, dict[str, Any]]:
        """See CheckpointStore; the first rank says which one it is."""
        why: list[str] = []
        path, reasons = self.ranks.by_first(lambda: (self.store.load_newest(why.append)[0], why))
        for reason in reasons:
            refused(reason)
        return path, load_checkpoint(path)

    def set_aside(self, after: Path) -> list[str]:
        """See CheckpointStore."""
        return self.ranks.by_first(lambda: self.store.set_aside(after))

    def rewind(self, before: int) -> tuple[Path, dict[str, Any]] | None:
        """See CheckpointStore."""

        def path_of() -> Path | None:
            found = self.store.rewind(before)
            return None if found is None else found[0]

        path = self.ranks.by_first(path_of)
        return None if path is None else (path, load_checkpoint(path))

    def prune(self, suspect: int | None = None) -> None:
        """See CheckpointStore."""
        self.ranks.by_first(lambda: self.store.prune(suspect))
