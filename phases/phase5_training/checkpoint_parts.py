"""Tensors of which each process has rows, written and read through torch.distributed.checkpoint (DCP).

DCP plans who writes and who reads what. The files are safetensors with DCP's own note of the place of each
part, as torch's HuggingFaceStorageWriter leaves them and its HuggingFaceStorageReader reads them; that reader
unpickles nothing (DCP's FileSystemReader does: its ``.metadata`` is a pickle). Our writer differs from
torch's in that it makes no second copy in memory and hashes what it writes.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, empty
from torch.futures import Future

Entry = dict[str, int | str]  # of a manifest: size and hash of a file
Write = Callable[[str, Mapping[str, Tensor], Mapping[str, str]], Entry]


def save_parts(
    tensors: Mapping[str, Tensor],
    wholes: Mapping[str, Sequence[int]],
    mesh: DeviceMesh,
    group: Any,
    *,
    room: Callable[[int], None],
    write: Write,
    finish: Callable[[dict[str, Entry]], None],
) -> None:
    """Write the tensors of all processes, each its own, or fail on all of them.

    Args:
        tensors: on the CPU; other processes than the first give only those of which they have rows.
        wholes: whole shapes of the tensors of which this process has rows.
        mesh: of CPUs, one for each process.
        group: what the processes agree in.
        room: called on the first process before anything is written, with the bytes of all; raises where they
            are too many.
        write: called on each process with the name of its file, its tensors and the file's metadata.
        finish: called on the first process after all have written, with the files.

    Raises:
        Exception: what one of the three raised, on whichever process.
    """
    state: dict[str, Any] = {}
    for name, own in tensors.items():
        if name not in wholes:
            state[name] = own
        elif own.shape[0]:  # a process without rows writes nothing
            state[name] = _part(own, wholes[name], mesh)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = _Writer(room, write, finish)
    try:
        save(state, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        raise cause from error


def load_parts(folder: Path, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """Read what any number of processes wrote to a folder.

    Args:
        folder: its safetensors files are read, all of them.
        mesh: of CPUs, one for each process; what was written in parts is read in as many; else whole.

    Returns:
        Tensors by name, those in parts as DTensors.

    Raises:
        ValueError: rows of a tensor are missing.
        Exception: what torch's reader raises on files that are none of its own.
    """
    reader = HuggingFaceStorageReader(str(folder))
    state: dict[str, Any] = {}
    for name, found in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata)
        _check_rows(name, found)
        dtype = found.properties.dtype
        if mesh is None or len(found.chunks) == 1:
            state[name] = torch.empty(found.size, dtype=dtype)
        else:
            state[name] = empty(found.size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        # Each process reads by itself, which DCP takes for being alone.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(state, storage_reader=reader, planner=planner, no_dist=True)
    return state


def _check_rows(name: str, found: TensorStorageMetadata) -> None:
    """Raise a ValueError unless the parts of a tensor are all of its rows, each once: torch does not look."""
    end = 0
    for chunk in sorted(found.chunks, key=lambda chunk: chunk.offsets) if found.size else ():
        if tuple(chunk.offsets) != (end, *[0] * (len(found.size) - 1)):
            raise ValueError(f"row {end} of {name} is missing, or there twice")
        end += chunk.sizes[0]


def _part(own: Tensor, whole: Sequence[int], mesh: DeviceMesh) -> DTensor:
    shape = torch.Size(whole)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


class _Writer(StorageWriter):
    """What DCP calls, in this order; see :class:`torch.distributed.checkpoint.StorageWriter`."""

    def __init__(
        self, room: Callable[[int], None], write: Write, finish: Callable[[dict[str, Entry]], None]
    ) -> None:
        self._room, self._write, self._finish = room, write, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from save to save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """There is nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Numbers the files, on the first process, if there is room for them."""
        chunks = [
            (item.tensor_data.chunk.sizes.numel(), item.tensor_data.properties.dtype)
            for plan in plans
            for item in plan.items
            if item.tensor_data is not None
        ]
        self._room(sum(count * dtype.itemsize for count, dtype in chunks))
        return [dataclasses.replace(plan, storage_data=number) for number, plan in enumerate(plans, 1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """The file of this process."""
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        name = f"shard-{plan.storage_data:05d}-model-00001-of-00001.safetensors"
        tensors: dict[str, Tensor] = {}
        places: dict[str, Any] = {}
        for item in plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, Tensor)
            assert item.tensor_data is not None
            tensors[item.index.fqn] = data
            places[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        about = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
        entry = self._write(name, tensors, about)
        done.set_result([WriteResult(plan.items[0].index, int(entry["bytes"]), (name, entry))])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Hands on what all processes wrote, on the first."""
        self._finish(dict(result.storage_data for each in results for result in each))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """A writer is always given."""
        return False
