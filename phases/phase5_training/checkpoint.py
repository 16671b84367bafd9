"""Checkpoints: tensors in safetensors, the rest in JSON, nothing that can run code.

    checkpoints/step-00001000/
        tensors.safetensors     every tensor of the state, flat
        state.json              the state's structure, with references to the tensors
        manifest.json           versions, step, size and SHA-256 of the two files; written last

Where each of several processes has rows of the weights (``parallel="fsdp"``), each writes what it has, and in
place of the first file there are ``shard-00001-model-00001-of-00001.safetensors`` and so on
(:mod:`phase5_training.checkpoint_parts`). Any number of processes reads either kind.

A checkpoint appears by one rename of a finished, synced folder (:mod:`phase4_bitnet.durable_folder`), so
a folder with that name is whole unless the disk failed it; the hashes, which are of what was in memory,
tell. It counts as saved once it was read back from the disk, and only then are older ones removed. What
killed saves leave behind is swept by the next save or resume. A checkpoint that does not verify becomes
``damaged-step-...`` once an older one has taken its place.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from phase4_bitnet.durable_folder import recover, remove_folder, sweep, write_file, write_folder
from phase4_bitnet.sharding import plain_rows
from phase5_training.background import BackgroundTask
from phase5_training.errors import ForgeError, first_line
from phase5_training.tensor_files import DTYPES, tensor_file

FORMAT, FORMAT_OF_PARTS = 1, 2
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_PREFIX, _DAMAGED, _SUPERSEDED = "step-", "damaged-", "superseded-"
_SHARD = re.compile(r"shard-\d{5}-model-00001-of-00001\.safetensors")
_LARGEST_MANIFEST = 2**20  # bytes; ours have a few hundred, and 150 more for each process
_SPARE = 2**20  # bytes that must stay free, for folders, records and the report
# The keys that mark what JSON has no word for.
_TENSOR, _ARRAY, _TUPLE, _ITEMS = "__tensor__", "__array__", "__tuple__", "__items__"
# What a hostile file makes torch and safetensors raise, a process that runs out of memory included.
_UNREADABLE = (
    SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError,
    RuntimeError, RecursionError, MemoryError,
)  # fmt: skip


class CheckpointError(ForgeError, ValueError):
    """A checkpoint that is incomplete, damaged or of another format."""


class NotSavedError(ForgeError, OSError):
    """A checkpoint that could not be written, or not be read back; those before it are as they were."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state as it was at one moment; training may go on while it is written.

    Args:
        step: the optimizer step.
        tree: the state's structure, JSON.
        tensors: copies on the CPU, contiguous.
        wholes: whole shapes of those of which this process has rows.
    """

    step: int
    tree: bytes
    tensors: Mapping[str, Tensor]
    wholes: Mapping[str, Sequence[int]] = field(default_factory=dict)


def take_snapshot(state: Mapping[str, Any], *, step: int) -> Snapshot:
    """Copy a state.

    Args:
        state: nested dicts, lists and tuples of tensors, arrays, numbers, strings, booleans, None.
        step: recorded in the manifest.

    Raises:
        TypeError: the state holds something else.
    """
    tensors: dict[str, Tensor] = {}
    wholes: dict[str, Sequence[int]] = {}
    tree = json.dumps(_encode(state, tensors, wholes, {}, "state"), allow_nan=True).encode()
    return Snapshot(step=step, tree=tree, tensors=tensors, wholes=wholes)


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot to a folder, whole or not at all, and make it durable.

    Raises:
        NotSavedError: there is not enough space, or the disk is failing or not writable; what was in
            ``folder`` before stays.
    """

    def write(temporary: Path) -> None:
        tensors = write_file(temporary / TENSORS, tensor_file(snapshot.tensors))
        write_rest(temporary, snapshot, {TENSORS: tensors}, FORMAT)

    with not_saved(folder, snapshot.step):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        check_room(folder.parent, len(snapshot.tree) + sum(t.nbytes for t in snapshot.tensors.values()))
        write_folder(folder, write)


def write_rest(
    temporary: Path, snapshot: Snapshot, files: Mapping[str, Mapping[str, int | str]], kind: int
) -> None:
    """Write the structure of a state, and the manifest, beside the files that hold its tensors."""
    listed = {**files, STATE: write_file(temporary / STATE, [snapshot.tree])}
    manifest = {"format": kind, "step": snapshot.step, "versions": _versions(), "files": listed}
    write_file(temporary / MANIFEST, [json.dumps(manifest, indent=2).encode()])


def check_room(folder: Path, needed: int) -> None:
    """Raise an OSError where a disk has fewer free bytes than are ``needed``, and some to spare."""
    needed, free = needed + _SPARE, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {_megabytes(needed)} and {_megabytes(free)} are free")


@contextlib.contextmanager
def not_saved(folder: Path, step: int) -> Iterator[None]:
    """Inside, an OSError becomes a :class:`NotSavedError` about the checkpoint of ``step``."""
    try:
        yield
    except NotSavedError:
        raise
    except OSError as error:
        failed = NotSavedError(
            f"the checkpoint of step {step} cannot be written to {folder} "
            f"({error.strerror or error}); the ones before it are whole: make room there, then resume the run"
        )
        failed.errno = error.errno
        raise failed from error


def save_checkpoint(folder: str | os.PathLike[str], state: Mapping[str, Any], *, step: int) -> Path:
    """Write a state to a new folder, whole or not at all, and make it durable.

    Args:
        folder: where the checkpoint will be; replaced when it exists.
        state: nested dicts, lists and tuples of tensors, arrays, numbers, strings, booleans, None.
        step: recorded in the manifest.

    Returns:
        ``folder``.

    Raises:
        TypeError: the state holds something else; nothing is written.
        NotSavedError: the disk is full or not writable; what was there before stays.
    """
    folder = Path(folder)
    write_snapshot(folder, take_snapshot(state, step=step))
    return folder


def load_checkpoint(
    folder: str | os.PathLike[str], *, mesh: Any = None, share: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """Read and verify a checkpoint.

    Args:
        folder: as written by :func:`save_checkpoint`, or in parts.
        mesh: of CPUs, one for each process: what was written in parts is read in as many; else whole.
        share: for :func:`verify`.

    Returns:
        The state, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing, has another hash, or cannot be read.
    """
    folder = Path(folder)
    whole = TENSORS in verify(folder, share)
    try:
        if whole:
            tensors = load_file(folder / TENSORS)
        else:
            from phase5_training.checkpoint_parts import load_parts

            tensors = load_parts(folder, mesh)
        state = _decode(json.loads((folder / STATE).read_bytes()), tensors)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{folder} cannot be read ({first_line(error)}); use another checkpoint"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder}/{STATE} holds no mapping; use another checkpoint")
    return state


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Check a checkpoint against its manifest; returns the names of the files that hold its tensors.

    Args:
        folder: of the checkpoint.
        share: (i, n), for process i of n that share the work: of several such files only the i-th and each
            n-th from there on are read.

    Raises:
        CheckpointError: what is wrong, and what to do.
    """
    try:
        if (folder / MANIFEST).stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"it has more than {_LARGEST_MANIFEST} bytes")
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] not in (FORMAT, FORMAT_OF_PARTS):
            raise CheckpointError(
                f"{folder} has checkpoint format {manifest['format']}, this version reads {FORMAT} and "
                f"{FORMAT_OF_PARTS}; resume with the version that wrote it"
            )
        tensors = sorted(manifest["files"].keys() - {STATE})
        # Only names like these are ever opened, whatever a manifest lists.
        if manifest["format"] == FORMAT:
            known, share = tensors == [TENSORS], (0, 1)
        else:
            # All that lie there are read, so all have to have been written with it.
            lying = sorted(path.name for path in folder.glob("*.safetensors"))
            known = bool(tensors) and all(_SHARD.fullmatch(n) for n in tensors) and lying == tensors
        if not known or STATE not in manifest["files"]:
            raise ValueError("it lists other files than a checkpoint has")
        for name in (*tensors[share[0] :: share[1]], STATE):
            wanted = manifest["files"][name]
            if (folder / name).stat().st_size != wanted["bytes"] or _sha256(folder / name) != wanted[
                "sha256"
            ]:
                raise CheckpointError(f"{folder}/{name} does not match its hash; use another checkpoint")
        int(manifest["step"])
        return tensors
    except FileNotFoundError as error:
        missing = error.filename or MANIFEST
        raise CheckpointError(f"{missing} is missing: no whole checkpoint there; use another one") from error
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} has no readable manifest ({error}); use another checkpoint"
        ) from error


def read_back(folder: Path, step: int, share: tuple[int, int] = (0, 1)) -> None:
    """Check that the disk holds what has just been written; ``share`` as for :func:`verify`.

    Raises:
        NotSavedError: it does not.
    """
    try:
        verify(folder, share)
    except CheckpointError as error:
        raise NotSavedError(
            f"the checkpoint of step {step} reads back as something else ({error}); "
            "the ones before it are whole: check the disk, then resume the run"
        ) from error


@dataclass(frozen=True, kw_only=True)
class CheckpointStore:
    """The checkpoints of one run, oldest pruned. Each holds the best weights so far as well as the last.

    Args:
        folder: holds one folder per checkpoint.
        keep: how many to keep, at least 2, so that a damaged newest one has a predecessor.
    """

    folder: Path
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise CheckpointError(f"keep_checkpoints={self.keep} is too few; keep at least 2")

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of ``step``."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def paths(self) -> list[Path]:
        """The checkpoints that exist, oldest first."""
        if not self.folder.is_dir():
            return []
        recover(self.folder)
        return sorted((p for p in self.folder.iterdir() if _is_checkpoint(p)), key=_step)

    def save(self, state: Mapping[str, Any], step: int) -> Path:
        """Write the checkpoint of ``step``, read it back, then prune.

        Raises:
            TypeError: the state holds what a checkpoint cannot; nothing is written.
            NotSavedError: it could not be written, or reads back as something else; none is pruned.
        """
        return self._write(take_snapshot(state, step=step))

    def begin(self, state: Mapping[str, Any], step: int, suspect: int | None = None) -> BackgroundTask[Path]:
        """Copy a state and begin to save it beside what follows, as :meth:`save` does.

        Args:
            state, step: as there.
            suspect: the newest checkpoint of fewer steps is kept, whatever its age.

        Returns:
            The task; its result is the folder, once it was read back, or the NotSavedError.

        Raises:
            TypeError: the state holds what a checkpoint cannot.
        """
        snapshot = take_snapshot(state, step=step)
        return BackgroundTask(lambda: self._write(snapshot, suspect))

    def _write(self, snapshot: Snapshot, suspect: int | None = None) -> Path:
        step, path = snapshot.step, self.path(snapshot.step)
        write_snapshot(path, snapshot)
        read_back(path, step)
        self.prune(suspect)
        return path

    def load_newest(
        self, refused: Callable[[str], None] = lambda message: None
    ) -> tuple[Path, dict[str, Any]]:
        """The newest checkpoint that verifies; also removes what a killed save left behind.

        Newer ones are renamed, so that they do not count among the ``keep`` and no good one is pruned
        for them. When none verifies they all stay as they are.

        Args:
            refused: told why each newer one was not taken, and its new name.

        Raises:
            CheckpointError: there is none.
        """
        self._sweep()
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.paths()):
            try:
                state = self._read(path)
            except CheckpointError as error:
                damaged.append((path, str(error)))
                continue
            for bad, reason in damaged:
                refused(f"{reason}; renamed to {self._put_aside(bad, _DAMAGED).name}")
            return path, state
        why = "".join(f"; {reason}" for _, reason in damaged)
        raise CheckpointError(
            f"{self.folder} holds no checkpoint that can be read{why}; start the run again, "
            "with overwrite=True"
        )

    def load(self, path: Path) -> dict[str, Any]:
        """One checkpoint of this run, chosen by hand.

        Raises:
            CheckpointError: it is none of this run, or does not verify.
        """
        self._sweep()
        if path.resolve().parent != self.folder.resolve() or not _is_checkpoint(path):
            have = ", ".join(p.name for p in self.paths()) or "none"
            raise CheckpointError(f"{path} is no checkpoint of this run; it has {have}")
        return self._read(path)

    def set_aside(self, after: Path) -> list[str]:
        """Rename the checkpoints newer than one to ``superseded-step-...``, so that it is the newest.

        Returns:
            What was done with each, in words.
        """
        newer = [p for p in self.paths() if _step(p) > _step(after)]
        return [f"{p} was passed over; renamed to {self._put_aside(p, _SUPERSEDED).name}" for p in newer]

    def rewind(self, before: int) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint of fewer than ``before`` steps that verifies; those after it are removed.

        Returns:
            Its folder and state; None, and nothing is removed, where there is none.
        """
        for path in reversed(self.paths()):
            if _step(path) >= before:
                continue
            try:
                state = self._read(path)
            except CheckpointError:
                continue
            for newer in self.paths():
                if _step(newer) > _step(path):
                    self._remove(newer)
            return path, state
        return None

    def prune(self, suspect: int | None = None) -> None:
        """Remove all but the newest ``keep``, and the newest of fewer than ``suspect`` steps."""
        paths = self.paths()
        sound = [p for p in paths if suspect is not None and _step(p) < suspect]
        for old in paths[: -self.keep]:
            if old not in sound[-1:]:
                self._remove(old)

    # What processes that share the checkpoints do together: phase5_training.shared_checkpoints.

    def _read(self, path: Path) -> dict[str, Any]:
        return load_checkpoint(path)

    def _sweep(self) -> None:
        sweep(self.folder)

    def _put_aside(self, path: Path, mark: str) -> Path:
        names = itertools.chain([path.name], (f"{path.name}-{i}" for i in itertools.count(2)))
        free = next(n for n in names if not (path.parent / f"{mark}{n}").exists())
        return path.rename(path.parent / f"{mark}{free}")

    def _remove(self, path: Path) -> None:
        remove_folder(path)


def _is_checkpoint(path: Path) -> bool:
    return path.name.startswith(_PREFIX) and path.name[len(_PREFIX) :].isdigit() and path.is_dir()


def _step(path: Path) -> int:
    return int(path.name[len(_PREFIX) :])


def _encode(
    value: Any,
    tensors: dict[str, Tensor],
    wholes: dict[str, Sequence[int]],
    seen: dict[Any, tuple[str, Tensor]],
    path: str,
) -> Any:
    """The value as JSON, with its tensors moved to ``tensors``; one that occurs twice is stored once."""
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        tensors[path] = torch.from_numpy(np.array(value, order="C"))
        return {_ARRAY: path}
    if isinstance(value, DTensor):
        wholes[path], value = tuple(value.shape), plain_rows(value._local_tensor)
    if isinstance(value, Tensor) and value.dtype in DTYPES:
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if value.numel() else path
        if key not in seen:
            # With the tensor: the address of one that is freed is given to the next.
            seen[key] = (path, value)
            # A copy of its own: safetensors refuses tensors that share memory.
            tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: seen[key][0]}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("__") for k in value):
            return {k: _encode(v, tensors, wholes, seen, f"{path}.{k}") for k, v in value.items()}
        return {_ITEMS: [[k, _encode(v, tensors, wholes, seen, f"{path}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors, wholes, seen, f"{path}.{i}") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    raise TypeError(
        f"{path} is a {type(value).__name__}; a checkpoint holds tensors, arrays, numbers, strings, "
        "lists and dicts: return one of these from state_dict()"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _ARRAY in value:
        return tensors[value[_ARRAY]].numpy()
    if _TUPLE in value:
        return tuple(_decode(v, tensors) for v in value[_TUPLE])
    if _ITEMS in value:
        return {k: _decode(v, tensors) for k, v in value[_ITEMS]}
    return {k: _decode(v, tensors) for k, v in value.items()}


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
