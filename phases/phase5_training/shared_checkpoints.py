"""The checkpoints of a run of several processes, who write them together and agree on which one they read."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from phase4_bitnet.durable_folder import begin_folder, finish_folder, write_file
from phase5_training.background import BackgroundTask
from phase5_training.checkpoint import (
    FORMAT_OF_PARTS,
    CheckpointStore,
    Snapshot,
    check_room,
    load_checkpoint,
    not_saved,
    read_back,
    take_snapshot,
    write_rest,
)
from phase5_training.config import TrainingConfig
from phase5_training.distributed import Ranks
from phase5_training.records import RunDirectory
from phase5_training.tensor_files import tensor_file

T = TypeVar("T")


def checkpoints_of(run: RunDirectory, config: TrainingConfig, ranks: Ranks, parts: bool) -> CheckpointStore:
    """The checkpoints of a run.

    Args:
        run: its folder.
        config: ``keep_checkpoints``.
        ranks: who takes part; all call.
        parts: each rank has rows of the weights, and writes and reads what it has.
    """
    keep = config.keep_checkpoints
    if ranks.alone:
        return CheckpointStore(folder=run.checkpoints, keep=keep)
    mesh = init_device_mesh("cpu", (ranks.world_size,)) if parts else None
    return SharedCheckpoints(folder=run.checkpoints, keep=keep, ranks=ranks, mesh=mesh)


class _Write(BackgroundTask[Path]):
    """A write that all ranks wait for at the same step, so that they learn of its end together."""

    done = False


@dataclass(frozen=True, kw_only=True)
class SharedCheckpoints(CheckpointStore):
    """A :class:`CheckpointStore` whose methods are called by all of several ranks.

    Where each has the whole state the first one writes it. Where each has rows of it, each writes these, and
    the checkpoint appears once all have. Either way all ranks end a save, or a search, with one outcome.

    Args:
        ranks: who shares it.
        mesh: of CPUs, one for each rank, where they have rows; None where each has the whole.
    """

    ranks: Ranks
    mesh: Any = None
    _saving: Ranks = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Writes go on beside the steps, and what they agree on must not meet what the steps do.
        object.__setattr__(self, "_saving", self.ranks.apart())

    def begin(self, state: Mapping[str, Any], step: int, suspect: int | None = None) -> BackgroundTask[Path]:
        """See :class:`CheckpointStore`."""
        writes = self.ranks.first or self.mesh is not None
        snapshot = take_snapshot(state if writes else {}, step=step)
        return _Write(lambda: self._save(snapshot, suspect))

    def _save(self, snapshot: Snapshot, suspect: int | None) -> Path:
        """In the background, on all ranks."""
        own = CheckpointStore(folder=self.folder, keep=self.keep)
        step, path = snapshot.step, self.path(snapshot.step)
        if self.mesh is None:
            return self._saving.by_first(lambda: own._write(snapshot, suspect))
        temporary = self._saving.by_first(lambda: _at_once(path, step, lambda: begin_folder(path)))
        try:
            self._write_parts(snapshot, temporary)
            self._saving.by_first(lambda: _at_once(path, step, lambda: finish_folder(temporary, path)))
        except BaseException:
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._saving.by_all(lambda: read_back(path, step, (self.ranks.rank, self.ranks.world_size)))
        self._saving.by_first(lambda: own.prune(suspect))
        return path

    def _write_parts(self, snapshot: Snapshot, temporary: Path) -> None:
        from phase5_training.checkpoint_parts import Entry, save_parts

        def write(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Entry:
            return write_file(temporary / name, tensor_file(tensors, metadata))

        def finish(files: dict[str, Entry]) -> None:
            write_rest(temporary, snapshot, files, FORMAT_OF_PARTS)

        tensors = {n: t for n, t in snapshot.tensors.items() if self.ranks.first or n in snapshot.wholes}
        with not_saved(self.path(snapshot.step), snapshot.step):
            save_parts(
                tensors,
                snapshot.wholes,
                self.mesh,
                self._saving.group,  # type: ignore[attr-defined]
                room=lambda needed: check_room(self.folder, needed + len(snapshot.tree)),
                write=write,
                finish=finish,
            )

    def paths(self) -> list[Path]:
        """See :class:`CheckpointStore`."""
        return self.ranks.by_first(super().paths)

    def _read(self, path: Path) -> dict[str, Any]:
        share = (self.ranks.rank, self.ranks.world_size) if self.mesh is not None else (0, 1)
        return self.ranks.by_all(lambda: load_checkpoint(path, mesh=self.mesh, share=share))

    def _sweep(self) -> None:
        self.ranks.by_first(super()._sweep)

    def _put_aside(self, path: Path, mark: str) -> Path:
        return self.ranks.by_first(lambda: CheckpointStore._put_aside(self, path, mark))

    def _remove(self, path: Path) -> None:
        self.ranks.by_first(lambda: CheckpointStore._remove(self, path))


def _at_once(path: Path, step: int, work: Callable[[], T]) -> T:
    with not_saved(path, step):
        return work()
