"""Checkpoints: tensors in safetensors, the rest in JSON, nothing that can run code.

    checkpoints/step-00001000/
        tensors.safetensors     every tensor of the state, flat
        state.json              the state's structure, with references to the tensors
        manifest.json           versions, step, size and SHA-256 of the two files; written last

A checkpoint appears by one rename of a finished, synced folder (:mod:`phase4_bitnet.durable_folder`), so
a folder with that name is whole unless the disk failed it; the hashes, which are of what was in memory,
tell. It counts as saved once it was read back from the disk, and only then are older ones removed. What
killed saves leave behind is swept by the next save or resume. A checkpoint that does not verify becomes
``damaged-step-...`` once an older one has taken its place.
"""

import errno
import hashlib
import itertools
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phase4_bitnet.durable_folder import recover, remove_folder, sweep, write_file, write_folder
from phase5_training.background import BackgroundTask
from phase5_training.errors import ForgeError

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_PREFIX, _DAMAGED, _SUPERSEDED = "step-", "damaged-", "superseded-"
_LARGEST_MANIFEST = 2**20  # bytes; ours have a few hundred
_SPARE = 2**20  # bytes that must stay free, for folders, records and the report
# The keys that mark what JSON has no word for.
_TENSOR, _ARRAY, _TUPLE, _ITEMS = "__tensor__", "__array__", "__tuple__", "__items__"
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


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
    """

    step: int
    tree: bytes
    tensors: Mapping[str, Tensor]


def take_snapshot(state: Mapping[str, Any], *, step: int) -> Snapshot:
    """Copy a state.

    Args:
        state: nested dicts, lists and tuples of tensors, arrays, numbers, strings, booleans, None.
        step: recorded in the manifest.

    Raises:
        TypeError: the state holds something else.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, tensors, {}, "state"), allow_nan=True).encode()
    return Snapshot(step=step, tree=tree, tensors=tensors)


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot to a folder, whole or not at all, and make it durable.

    Raises:
        NotSavedError: there is not enough space, or the disk is failing or not writable; what was in
            ``folder`` before stays.
    """

    def write(temporary: Path) -> None:
        files = {
            TENSORS: write_file(temporary / TENSORS, _tensor_file(snapshot.tensors)),
            STATE: write_file(temporary / STATE, [snapshot.tree]),
        }
        manifest = {"format": FORMAT, "step": snapshot.step, "versions": _versions(), "files": files}
        write_file(temporary / MANIFEST, [json.dumps(manifest, indent=2).encode()])

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        needed = len(snapshot.tree) + sum(t.nbytes for t in snapshot.tensors.values()) + _SPARE
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"it needs {_megabytes(needed)} and {_megabytes(free)} are free")
        write_folder(folder, write)
    except OSError as error:
        failed = NotSavedError(
            f"the checkpoint of step {snapshot.step} cannot be written to {folder} "
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


def load_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and verify a checkpoint.

    Args:
        folder: as written by :func:`save_checkpoint`.

    Returns:
        The state, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing, has another hash, or cannot be read.
    """
    folder = Path(folder)
    verify(folder)
    try:
        tensors = load_file(folder / TENSORS)
        state = _decode(json.loads((folder / STATE).read_bytes()), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); use another checkpoint") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder}/{STATE} holds no mapping; use another checkpoint")
    return state


def verify(folder: Path) -> int:
    """Check a checkpoint against its manifest; returns its step.

    Raises:
        CheckpointError: what is wrong, and what to do.
    """
    try:
        if (folder / MANIFEST).stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"it has more than {_LARGEST_MANIFEST} bytes")
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has checkpoint format {manifest['format']}, this version reads {FORMAT}; "
                "resume with the version that wrote it"
            )
        # Only these two names are ever opened, whatever a manifest lists.
        if sorted(manifest["files"]) != sorted((TENSORS, STATE)):
            raise ValueError("it lists other files than a checkpoint has")
        for name in (TENSORS, STATE):
            wanted = manifest["files"][name]
            if (folder / name).stat().st_size != wanted["bytes"] or _sha256(folder / name) != wanted[
                "sha256"
            ]:
                raise CheckpointError(f"{folder}/{name} does not match its hash; use another checkpoint")
        return int(manifest["step"])
    except FileNotFoundError as error:
        missing = error.filename or MANIFEST
        raise CheckpointError(f"{missing} is missing: no whole checkpoint there; use another one") from error
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} has no readable manifest ({error}); use another checkpoint"
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
        try:
            verify(path)
        except CheckpointError as error:
            raise NotSavedError(
                f"the checkpoint of step {step} reads back as something else ({error}); "
                "the ones before it are whole: check the disk, then resume the run"
            ) from error
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
        sweep(self.folder)
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.paths()):
            try:
                state = load_checkpoint(path)
            except CheckpointError as error:
                damaged.append((path, str(error)))
                continue
            for bad, reason in damaged:
                refused(f"{reason}; renamed to {_put_aside(bad, _DAMAGED).name}")
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
        sweep(self.folder)
        if path.resolve().parent != self.folder.resolve() or not _is_checkpoint(path):
            have = ", ".join(p.name for p in self.paths()) or "none"
            raise CheckpointError(f"{path} is no checkpoint of this run; it has {have}")
        return load_checkpoint(path)

    def set_aside(self, after: Path) -> list[str]:
        """Rename the checkpoints newer than one to ``superseded-step-...``, so that it is the newest.

        Returns:
            What was done with each, in words.
        """
        newer = [p for p in self.paths() if _step(p) > _step(after)]
        return [f"{p} was passed over; renamed to {_put_aside(p, _SUPERSEDED).name}" for p in newer]

    def rewind(self, before: int) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint of fewer than ``before`` steps that verifies; those after it are removed.

        Returns:
            Its folder and state; None, and nothing is removed, where there is none.
        """
        for path in reversed(self.paths()):
            if _step(path) >= before:
                continue
            try:
                state = load_checkpoint(path)
            except CheckpointError:
                continue
            for newer in self.paths():
                if _step(newer) > _step(path):
                    remove_folder(newer)
            return path, state
        return None

    def prune(self, suspect: int | None = None) -> None:
        """Remove all but the newest ``keep``, and the newest of fewer than ``suspect`` steps."""
        paths = self.paths()
        sound = [p for p in paths if suspect is not None and _step(p) < suspect]
        for old in paths[: -self.keep]:
            if old not in sound[-1:]:
                remove_folder(old)


def _is_checkpoint(path: Path) -> bool:
    return path.name.startswith(_PREFIX) and path.name[len(_PREFIX) :].isdigit() and path.is_dir()


def _step(path: Path) -> int:
    return int(path.name[len(_PREFIX) :])


def _put_aside(path: Path, mark: str) -> Path:
    names = itertools.chain([path.name], (f"{path.name}-{i}" for i in itertools.count(2)))
    free = next(n for n in names if not (path.parent / f"{mark}{n}").exists())
    return path.rename(path.parent / f"{mark}{free}")


def _encode(value: Any, tensors: dict[str, Tensor], seen: dict[Any, tuple[str, Tensor]], path: str) -> Any:
    """The value as JSON, with its tensors moved to ``tensors``; one that occurs twice is stored once."""
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        tensors[path] = torch.from_numpy(np.array(value, order="C"))
        return {_ARRAY: path}
    if isinstance(value, Tensor) and value.dtype in _DTYPES:
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if value.numel() else path
        if key not in seen:
            # With the tensor: the address of one that is freed is given to the next.
            seen[key] = (path, value)
            # A copy of its own: safetensors refuses tensors that share memory.
            tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: seen[key][0]}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("__") for k in value):
            return {k: _encode(v, tensors, seen, f"{path}.{k}") for k, v in value.items()}
        return {_ITEMS: [[k, _encode(v, tensors, seen, f"{path}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors, seen, f"{path}.{i}") for i, v in enumerate(value)]
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


def _tensor_file(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The pieces of a safetensors file, so that it is hashed and written without another copy in memory.

    Source: https://github.com/huggingface/safetensors, section Format.
    """
    # Large elements first, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, start = {}, 0
    for name, tensor in ordered:
        place = [start, start + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        start = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
