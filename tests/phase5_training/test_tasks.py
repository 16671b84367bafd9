"""Tasks against plain python, their splits, and their files read back with the plain libraries."""

from __future__ import annotations

import itertools
import json
import pickle
import sys
import sysconfig
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from phase5_training.errors import DataError, UsageError
from phase5_training.task_files import WRITERS, Split, Task
from phase5_training.tasks import OPERATIONS, TASKS, load_task

SMALL: dict[str, dict[str, Any]] = {
    "modular_arithmetic": {"modulus": 7},
    "digits": {"hidden": (8,)},
    "python_text": {"max_bytes": 60_000, "context": 32, "validation_share": 0.4},
    "breast_cancer": {"hidden": (8,)},
    "wine": {"hidden": (8,)},
    "diabetes": {"hidden": (8,)},
}
every_task = pytest.mark.parametrize("name", list(TASKS))


def small(name: str, **options: Any) -> Task:
    return load_task(name, **{**SMALL[name], **options})


def rows(split: Split) -> list[tuple[Any, Any]]:
    assert split.targets is not None
    return [(tuple(x), y) for x, y in zip(split.inputs.tolist(), split.targets.tolist(), strict=True)]


def test_every_task_has_a_small_example() -> None:
    assert set(SMALL) == set(TASKS)


@pytest.mark.parametrize("modulus", [7, 97])
@pytest.mark.parametrize("operation", ["*", "+", "-", "/"])
def test_table_is_plain_arithmetic(operation: str, modulus: int) -> None:
    task = load_task("modular_arithmetic", operation=operation, modulus=modulus)
    expected = {}
    for a in range(modulus):
        for b in range(1 if operation in "*/" else 0, modulus):
            if operation == "/":
                c = a * pow(b, -1, modulus) % modulus
            else:
                c = {"*": a * b, "+": a + b, "-": a - b}[operation] % modulus
            expected[a, modulus, b, modulus + 1] = c
    found = rows(task.train) + rows(task.validation)
    assert len(found) == len(expected)
    assert dict(found) == expected


def test_s5_is_composition_of_permutations() -> None:
    task = load_task("modular_arithmetic", operation="S5")
    elements = list(itertools.permutations(range(5)))
    number = {element: i for i, element in enumerate(elements)}
    found = rows(task.train) + rows(task.validation)
    assert len(found) == len({x for x, _ in found}) == 14400
    for (a, operation, b, equals), c in found:
        assert (operation, equals) == (120, 121)
        assert c == number[tuple(elements[a][elements[b][x]] for x in range(5))]
    assert task.spec.num_classes == 120
    assert task.spec.vocab_size == 122


@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_arithmetic_splits_are_disjoint_cover_and_follow_the_seed(fraction: float) -> None:
    first, again, other = (
        load_task("modular_arithmetic", train_fraction=fraction, seed=seed) for seed in (1, 1, 2)
    )
    train, validation = ({x for x, _ in rows(side)} for side in (first.train, first.validation))
    assert not train & validation
    assert len(train) + len(validation) == 97 * 96
    assert len(train) == int(97 * 96 * fraction)
    assert rows(first.train) == rows(again.train)
    assert rows(first.train) != rows(other.train)
    # A random half has every answer; the first half of the table in order would not have every a.
    assert {x[0] for x in train} == set(range(97))


@pytest.mark.parametrize("seed", [0, 5])
def test_digits_are_scikit_learns_split_by_class(seed: int) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    task = load_task("digits", seed=seed, validation_share=0.25)
    found = sorted(rows(task.train) + rows(task.validation))
    assert found == sorted((tuple(x / 16), int(y)) for x, y in zip(data.data, data.target, strict=True))
    counts = [np.bincount(side.targets, minlength=10) for side in (task.train, task.validation)]
    for held, total in zip(counts[1], counts[0] + counts[1], strict=True):
        assert held == round(total * 0.25)
    assert task.train.inputs.dtype == np.float32
    assert task.train.inputs.max() == 1


def test_digits_follow_the_seed() -> None:
    first, again, other = (load_task("digits", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.train.inputs, again.train.inputs)
    assert not np.array_equal(first.train.inputs, other.train.inputs)


@pytest.mark.parametrize("name", ["breast_cancer", "wine", "diabetes"])
def test_tables_are_standardized_by_the_training_rows(name: str) -> None:
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    task = load_task(name, seed=3)
    x = task.train.inputs.astype(np.float64)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=0), 1, atol=1e-5)
    assert abs(task.validation.inputs.mean(axis=0)).max() > 1e-3
    assert len(task.train) + len(task.validation) == len(data.target)
    # Undo the scaling of one column: every row is still there, and no other.
    column = np.concatenate([task.train.inputs[:, 0], task.validation.inputs[:, 0]]).astype(np.float64)
    restored = (column - column.mean()) / column.std()
    expected = (data.data[:, 0] - data.data[:, 0].mean()) / data.data[:, 0].std()
    np.testing.assert_allclose(np.sort(restored), np.sort(expected), atol=1e-4)
    assert task.train.targets is not None
    assert task.validation.targets is not None
    targets = np.concatenate([task.train.targets, task.validation.targets]).astype(np.float64)
    if name == "diabetes":
        targets = targets * task.details["target_std"] + task.details["target_mean"]
    np.testing.assert_allclose(np.sort(targets), np.sort(data.target), atol=1e-4)


def test_text_is_the_librarys_files_split_by_file() -> None:
    task = small("python_text")
    library = Path(sysconfig.get_path("stdlib"))
    assert task.train.stream is not None
    assert task.validation.stream is not None
    sides = [task.train.stream.tobytes(), task.validation.stream.tobytes()]
    assert sum(map(len, sides)) <= 60_000
    files = 0
    for path in sorted(library.rglob("*.py")):
        data = path.read_bytes()
        if len(data) > 500 and "test" not in path.parts and "site-packages" not in path.parts:
            held = [data in side for side in sides]
            assert not all(held), path
            files += any(held)
    assert files >= 2
    assert all(side.isascii() and b"\0" not in side for side in sides)


def test_text_windows_predict_each_byte_once() -> None:
    side = small("python_text").train
    assert side.stream is not None
    assert side.inputs.shape[1] == 33
    joined = np.concatenate([side.inputs[:1, 0], side.inputs[:, 1:].ravel()])
    assert np.array_equal(joined, side.stream[: len(joined)])
    assert len(side.stream) - len(joined) < 32


def test_text_stays_within_the_bound_and_is_the_same_twice() -> None:
    first, again = small("python_text"), small("python_text")
    larger = small("python_text", max_bytes=200_000)
    assert np.array_equal(first.train.stream, again.train.stream)
    assert larger.train.stream is not None
    assert first.train.stream is not None
    assert len(first.train.stream) < len(larger.train.stream) < 200_000


@pytest.fixture(params=list(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return small(request.param)


@pytest.mark.parametrize("format", [f for f in WRITERS if f != "bin"])
def test_every_format_reads_back_with_the_plain_library(task: Task, format: str, tmp_path: Path) -> None:
    paths = task.write(tmp_path / "new" / "folder", format)
    assert paths[0] != paths[1]
    for path, split in zip(paths, (task.train, task.validation), strict=True):
        inputs, targets = read_plainly(path, format)
        if split.stream is not None and format in ("json", "jsonl"):
            inputs = np.array([np.frombuffer(text.encode(), np.uint8) for text in inputs])
        assert np.array_equal(np.asarray(inputs, split.inputs.dtype), split.inputs)
        if split.targets is None:
            assert targets is None
        else:
            assert np.array_equal(np.asarray(targets, split.targets.dtype), split.targets)


def read_plainly(path: Path, format: str) -> tuple[Any, Any]:
    if format in ("json", "jsonl"):
        text = path.read_text("utf-8")
        samples = (
            json.loads(text)["samples"]
            if format == "json"
            else [json.loads(line) for line in text.splitlines()]
        )
        assert all(set(s) <= {"input", "target", "metadata"} for s in samples)
        targets = [s["target"] for s in samples] if "target" in samples[0] else None
        return [s["input"] for s in samples], targets
    if format == "hdf5":
        with h5py.File(path) as file:
            assert file["dataset/metadata"].attrs["name"] in TASKS
            group = file["dataset"]
            return group["inputs"][:], group["targets"][:] if "targets" in group else None
    if format == "pickle":
        held = pickle.loads(path.read_bytes())
        return held["inputs"], held.get("targets")
    if format == "npz":
        with np.load(path, allow_pickle=False) as held:
            return held["inputs"], held.get("targets", None)
    if format == "npy":
        beside = path.with_name(path.stem + "_targets.npy")
        return np.load(path), np.load(beside) if beside.exists() else None
    tensors = load_file(path)
    return tensors["inputs"], tensors.get("targets")


def test_token_files_hold_the_stream(tmp_path: Path) -> None:
    task = small("python_text")
    for path, split in zip(task.write(tmp_path, "bin"), (task.train, task.validation), strict=True):
        assert split.stream is not None
        assert path.read_bytes() == split.stream.tobytes()
        assert json.loads(path.with_name(path.name + ".json").read_text()) == {
            "dtype": "uint8",
            "vocab_size": 256,
        }


def test_targets_of_an_earlier_task_do_not_stay_beside_an_array(tmp_path: Path) -> None:
    stale = tmp_path / "python_text-train_targets.npy"
    np.save(stale, np.zeros(3))
    small("python_text").write(tmp_path, "npy")
    assert not stale.exists()


@every_task
@pytest.mark.parametrize("ternary", [True, False])
def test_recommended_model_fits_the_task(name: str, ternary: bool) -> None:
    task = small(name)
    model = task.build_model(ternary=ternary)
    batch = torch.from_numpy(np.array(task.validation.inputs[:3]))
    if task.spec.target_kind == "tokens":
        out = model(batch[:, :-1].long())
        assert out.shape == (3, *task.spec.input_shape, task.spec.vocab_size)
        return
    out = model(batch)
    assert tuple(task.validation.inputs.shape[1:]) == task.spec.input_shape
    assert out.shape == (3, task.spec.num_classes or task.spec.num_outputs)
    if task.spec.input_kind == "tokens":
        assert task.train.inputs.max() == (task.spec.vocab_size or 0) - 1
    if task.spec.target_kind == "class":
        assert task.train.targets is not None
        assert set(task.train.targets.tolist()) == set(range(task.spec.num_classes or 0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, "did you mean 'digits'"),
        ("zzz", {}, "use one of modular_arithmetic, digits"),
        ("digits", {"sead": 1}, "did you mean 'seed'"),
        ("modular_arithmetic", {"operation": "x"}, r"use one of '\*'"),
        ("modular_arithmetic", {"operation": "/", "modulus": 91}, "91 is not a prime"),
        ("modular_arithmetic", {"operation": "S5", "modulus": 97}, "leave it out"),
        ("modular_arithmetic", {"modulus": 1}, "not an integer of 2 or more"),
        ("modular_arithmetic", {"train_fraction": 1.0}, "not a share between 0 and 1"),
        ("modular_arithmetic", {"train_fraction": 1e-9}, "leaves a side empty"),
        ("modular_arithmetic", {"seed": -1}, "seed=-1"),
        ("digits", {"validation_share": 0.001}, "leaves a side empty"),
        ("digits", {"validation_share": True}, "not a share"),
        ("python_text", {"context": 0}, "context=0"),
    ],
)
def test_bad_options_are_refused_with_a_remedy(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_task(name, **options)
    assert "\n" not in str(caught.value)


def test_bad_formats_are_refused_with_a_remedy(tmp_path: Path) -> None:
    task = small("modular_arithmetic")
    with pytest.raises(UsageError, match="did you mean 'json'"):
        task.write(tmp_path, "jason")
    with pytest.raises(UsageError, match="'bin' holds text"):
        task.write(tmp_path, "bin")
    assert not list(tmp_path.iterdir())


def test_a_python_without_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="has 0 bytes of source"):
        load_task("python_text")


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UsageError, match=r"forge-training\[tasks\]"):
        load_task("digits")
    assert len(load_task("modular_arithmetic", modulus=5).train)


def test_operations_are_those_the_docstring_names() -> None:
    document = TASKS["modular_arithmetic"].__doc__ or ""
    assert all(f'"{operation}"' in document for operation in OPERATIONS)
