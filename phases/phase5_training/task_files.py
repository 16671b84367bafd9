"""What a task is, and how it is written to files, in the layouts that the pipeline reads.

    json         {"samples": [{"input": ..., "target": ..., "metadata": {}}]}
    jsonl        one such sample a line
    hdf5         /dataset/inputs, /dataset/targets, attributes of /dataset/metadata
    pickle       {"inputs": array, "targets": array}
    npz          arrays inputs, targets
    safetensors  tensors inputs, targets
    npy          NAME.npy and NAME_targets.npy
    bin          the tokens of a text, and NAME.bin.json with {"dtype", "vocab_size"}

Next-token tasks have no targets: in JSON a sample's input is the text itself, in the array formats a row is
a window of context + 1 tokens.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np
import safetensors.numpy

from phase5_training.errors import UsageError, nearest_match

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What a model for the task has to take and give.

    Args:
        input_kind: "features" (float vectors) or "tokens" (integer ids).
        input_shape: shape of one sample.
        target_kind: "class", "tokens" (the next token at every position) or "float".
        num_classes: number of classes, for "class".
        vocab_size: number of token ids, for tokens.
        num_outputs: values a sample, for "float".
    """

    input_kind: Literal["features", "tokens"]
    input_shape: tuple[int, ...]
    target_kind: Literal["class", "tokens", "float"]
    num_classes: int | None = None
    vocab_size: int | None = None
    num_outputs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Split:
    """One side of a task.

    Args:
        inputs: (n, ...) float32 features or uint8 / int64 token ids; windows of context + 1 tokens for
            text, neighbors sharing one token, so that each token is predicted once.
        targets: (n,) int64 classes or float32 values; None for next-token tasks.
        stream: (tokens,) uint8, the text that `inputs` was cut from; None for other tasks.
    """

    inputs: np.ndarray
    targets: np.ndarray | None = None
    stream: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, split, with the model it suits.

    Args:
        name: file stem, letters, digits and '_'.
        description: one paragraph: what it is, how it was split, where it comes from.
        train: what to learn from.
        validation: what to be judged on.
        spec: what a model has to take and give.
        model_name: an architecture of `phase4_bitnet.architectures`.
        model_options: its options.
        details: figures worth keeping, as JSON values.
    """

    name: str
    description: str
    train: Split
    validation: Split
    spec: TaskSpec
    model_name: str
    model_options: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)

    def build_model(self, **options: Any) -> nn.Module:
        """The recommended model; `options` replace or add to `model_options` (ternary=False, ...)."""
        from phase4_bitnet.architectures import build_model

        return build_model(self.model_name, **{**self.model_options, **options})

    def write(self, folder: str | Path, format: str) -> tuple[Path, Path]:
        """Write both splits; see `write_task`.

        Args:
            folder: where to; made if missing. Files of the same names are replaced.
            format: "json", "jsonl", "hdf5", "pickle", "npz", "npy", "safetensors", and for text "bin".

        Returns:
            The paths to pass as train_data_path and val_data_path.

        Raises:
            UsageError: unknown format, or "bin" for a task that is not text.
        """
        return write_task(self, folder, format)


def write_task(task: Task, folder: str | Path, format: str) -> tuple[Path, Path]:
    """Write both splits of a task.

    Args:
        task: the task.
        folder: where to; made if missing. Files of the same names are replaced.
        format: a key of `WRITERS`.

    Returns:
        The paths of the training and the validation file: NAME-train.EXT and NAME-validation.EXT.

    Raises:
        UsageError: unknown format, or "bin" for a task that is not text.
    """
    if format not in WRITERS:
        near = nearest_match(format, WRITERS)
        wanted = f"did you mean {near!r}?" if near else f"use one of {', '.join(WRITERS)}"
        raise UsageError(f"format {format!r} is unknown; {wanted}")
    if format == "bin" and task.train.stream is None:
        raise UsageError(
            f"format 'bin' holds text, and task {task.name!r} is none; use 'npz' or another array format"
        )
    extension, writer = WRITERS[format]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / f"{task.name}-train{extension}", folder / f"{task.name}-validation{extension}")
    for path, split in zip(paths, (task.train, task.validation), strict=True):
        writer(path, split, task)
    return paths


def _samples(split: Split) -> Iterator[dict[str, Any]]:
    if split.stream is not None:
        for row in split.inputs:
            yield {"input": row.tobytes().decode("ascii"), "metadata": {}}
        return
    assert split.targets is not None
    for value, target in zip(split.inputs.tolist(), split.targets.tolist(), strict=True):
        yield {"input": value, "target": target, "metadata": {}}


def _arrays(split: Split) -> dict[str, np.ndarray]:
    arrays = {"inputs": np.ascontiguousarray(split.inputs)}
    if split.targets is not None:
        arrays["targets"] = np.ascontiguousarray(split.targets)
    return arrays


def _write_json(path: Path, split: Split, task: Task) -> None:
    with path.open("w", encoding="utf-8") as file:
        separator = '{"samples": [\n'
        for sample in _samples(split):
            file.write(separator + json.dumps(sample))
            separator = ",\n"
        file.write("\n]}\n")


def _write_jsonl(path: Path, split: Split, task: Task) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in _samples(split))


def _write_hdf5(path: Path, split: Split, task: Task) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("dataset")
        for name, array in _arrays(split).items():
            group.create_dataset(name, data=array)
        attributes = group.create_group("metadata").attrs
        attributes["name"], attributes["description"] = task.name, task.description


def _write_pickle(path: Path, split: Split, task: Task) -> None:
    with path.open("wb") as file:
        pickle.dump(_arrays(split), file, protocol=4)


def _write_npz(path: Path, split: Split, task: Task) -> None:
    np.savez(path, **_arrays(split))  # type: ignore[arg-type]


def _write_npy(path: Path, split: Split, task: Task) -> None:
    arrays = _arrays(split)
    np.save(path, arrays["inputs"])
    beside = path.with_name(f"{path.stem}_targets.npy")
    # Targets that an earlier task left under this name would be read with these inputs.
    beside.unlink(missing_ok=True)
    if "targets" in arrays:
        np.save(beside, arrays["targets"])


def _write_safetensors(path: Path, split: Split, task: Task) -> None:
    safetensors.numpy.save_file(_arrays(split), path, metadata={"name": task.name})


def _write_bin(path: Path, split: Split, task: Task) -> None:
    assert split.stream is not None
    split.stream.tofile(path)
    sidecar = {"dtype": split.stream.dtype.name, "vocab_size": task.spec.vocab_size}
    path.with_name(f"{path.name}.json").write_text(json.dumps(sidecar) + "\n", encoding="utf-8")


WRITERS: dict[str, tuple[str, Callable[[Path, Split, Task], None]]] = {
    "json": (".json", _write_json),
    "jsonl": (".jsonl", _write_jsonl),
    "hdf5": (".h5", _write_hdf5),
    "pickle": (".pkl", _write_pickle),
    "npz": (".npz", _write_npz),
    "npy": (".npy", _write_npy),
    "safetensors": (".safetensors", _write_safetensors),
    "bin": (".bin", _write_bin),
}
