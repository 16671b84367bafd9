"""Checkpoints: tensors in safetensors, the rest in JSON, nothing that can run code.

    checkpoints/step-00001000/
        tensors.safetensors     every tensor of the state, flat
        state.json              the state's structure, with references to the tensors
        manifest.json           format version, step, size and SHA-256 of the two files; written last

A checkpoint appears by one rename of a finished, synced folder, so a folder with that name is whole
unless the disk failed it; the hashes tell. Temporary folders of a killed save are swept by the next;
a checkpoint that was stepping aside for its replacement when the process died gets its name back. One
that does not verify becomes ``damaged-step-...`` once an older one has taken its place.
"""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from phase5_training.errors import ForgeError

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_PREFIX, _TEMPORARY, _DAMAGED = "step-", ".saving-", "damaged-"
_ASIDE = re.compile(re.escape(f"{_TEMPORARY}old-") + r"(?P<name>.+)-\d+")
# The keys that mark what JSON has no word for.
_TENSOR, _ARRAY, _TUPLE, _ITEMS = "__tensor__", "__array__", "__tuple__", "__items__"


class CheckpointError(ForgeError, ValueError):
    """A checkpoint that is incomplete, damaged or of another format."""


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
        OSError: the disk is full or not writable; what was there before stays.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, tensors, {}, "state"), allow_nan=True).encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    temporary = folder.parent / f"{_TEMPORARY}{folder.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        save_file(tensors, temporary / TENSORS)
        _sync(temporary / TENSORS)
        _write(temporary / STATE, tree)
        files = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
            for name in (TENSORS, STATE)
        }
        manifest = {"format": FORMAT, "step": step, "files": files}
        _write(temporary / MANIFEST, json.dumps(manifest, indent=2).encode())
        _sync(temporary)
        if folder.exists():
            # A rename cannot replace a folder that is not empty; the old one steps aside first.
            aside = folder.parent / f"{_TEMPORARY}old-{folder.name}-{os.getpid()}"
            os.rename(folder, aside)
            try:
                os.rename(temporary, folder)
            except BaseException:
                os.rename(aside, folder)
                raise
            shutil.rmtree(aside)
        else:
            os.rename(temporary, folder)
        _sync(folder.parent)
    except SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"{folder} cannot be written ({error}); free space, or choose another output_dir"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
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
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
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
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has checkpoint format {manifest['format']}, this version reads {FORMAT}; "
                "resume with the version that wrote it"
            )
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} has no readable manifest ({error}); use another checkpoint"
        ) from error


@dataclass(frozen=True, kw_only=True)
class CheckpointStore:
    """The checkpoints of one run, oldest pruned.

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
        _recover(self.folder)
        found = [
            p
            for p in self.folder.iterdir()
            if p.name.startswith(_PREFIX) and p.name[len(_PREFIX) :].isdigit() and p.is_dir()
        ]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def save(self, state: Mapping[str, Any], step: int) -> Path:
        """Write the checkpoint of ``step``, read it back, then prune."""
        path = save_checkpoint(self.path(step), state, step=step)
        verify(path)
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old)
        return path

    def load_newest(
        self, refused: Callable[[str], None] = lambda message: None
    ) -> tuple[Path, dict[str, Any]]:
        """The newest checkpoint that verifies.

        Newer ones are renamed, so that they do not count among the ``keep`` and no good one is pruned
        for them. When none verifies they all stay as they are.

        Args:
            refused: told why each newer one was not taken, and its new name.

        Raises:
            CheckpointError: there is none.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.paths()):
            try:
                state = load_checkpoint(path)
            except CheckpointError as error:
                damaged.append((path, str(error)))
                continue
            for bad, reason in damaged:
                refused(f"{reason}; renamed to {_put_aside(bad).name}")
            return path, state
        raise CheckpointError(f"{self.folder} holds no checkpoint that can be read; start the run again")


def sweep(folder: Path) -> None:
    """Remove what killed saves left behind, and give a checkpoint back that one had moved aside."""
    _recover(folder)
    for entry in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(entry, ignore_errors=True)


def _recover(folder: Path) -> None:
    for entry in folder.glob(f"{_TEMPORARY}old-*"):
        match = _ASIDE.fullmatch(entry.name)
        if match and not (folder / match["name"]).exists():
            os.rename(entry, folder / match["name"])


def _put_aside(path: Path) -> Path:
    names = itertools.chain([path.name], (f"{path.name}-{i}" for i in itertools.count(2)))
    free = next(n for n in names if not (path.parent / f"{_DAMAGED}{n}").exists())
    return path.rename(path.parent / f"{_DAMAGED}{free}")


def seed_everything(seed: int) -> None:
    """Seed every random generator that training may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every random generator that training may draw from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore :func:`random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _encode(value: Any, tensors: dict[str, Tensor], seen: dict[Any, tuple[str, Tensor]], path: str) -> Any:
    """The value as JSON, with its tensors moved to ``tensors``; one that occurs twice is stored once."""
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        tensors[path] = torch.from_numpy(np.array(value, order="C"))
        return {_ARRAY: path}
    if isinstance(value, Tensor):
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


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
