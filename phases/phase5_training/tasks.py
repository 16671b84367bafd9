"""Real tasks that need no download, ready to be written in every format that the pipeline reads.

    modular_arithmetic   a o b = c over integers modulo p, or permutations of five things (grokking)
    digits               1797 handwritten digits, 8x8, shipped with scikit-learn
    python_text          the source text of Python's standard library, byte by byte
    breast_cancer, wine  small tables with classes, shipped with scikit-learn
    diabetes             a small table with a value to regress, shipped with scikit-learn

Every task is a pure function of its options: the same call gives the same arrays, rows and split.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from phase5_training.errors import DataError, UsageError, nearest_match
from phase5_training.task_files import Split, Task, TaskSpec

OPERATIONS = ("*", "+", "-", "/", "S5")
# Folders that hold no library source: tests, other people's packages, and tables made for one machine.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def load_task(name: str, **options: Any) -> Task:
    """Make a task by name.

    Args:
        name: one of `TASKS`.
        options: arguments of the function of that name.

    Returns:
        The task.

    Raises:
        UsageError: unknown name or option (with the nearest match), or a bad value.

    >>> task = load_task("modular_arithmetic", modulus=5, operation="+")
    >>> len(task.train), len(task.validation), task.spec.num_classes
    (12, 13, 5)
    """
    if name not in TASKS:
        near = nearest_match(name, TASKS)
        raise UsageError(
            f"task {name!r} is unknown; " + (f"did you mean {near!r}?" if near else _choices(TASKS))
        )
    known = inspect.signature(TASKS[name]).parameters
    for option in options:
        if option not in known:
            near = nearest_match(option, known)
            raise UsageError(
                f"task {name!r} has no option {option!r}; "
                + (f"did you mean {near!r}?" if near else _choices(known))
            )
    return TASKS[name](**options)


def modular_arithmetic(
    *, operation: str = "*", modulus: int | None = None, train_fraction: float = 0.5, seed: int = 0
) -> Task:
    """The table of a binary operation, part of it hidden: the task on which grokking was found.

    A row is the tokens [a, operation, b, =] and its target the class c with a o b = c. The table has
    every pair; for "*" and "/" b runs from 1, so that "/" is defined and both have the size that the
    literature uses. Elements are tokens 0 to n - 1, the operation is n, "=" is n + 1.

    Args:
        operation: "*", "+", "-", "/" modulo `modulus`, or "S5": composition of permutations of five
            things, element i the i-th of itertools.permutations, (a o b)(x) = a(b(x)).
        modulus: 97 when None; a prime for "/"; not for "S5".
        train_fraction: share of the table to train on, rounded down to whole rows.
        seed: of the split.

    Returns:
        The task; rows are in a random order that depends on the seed only.

    Raises:
        UsageError: an argument is outside its range.

    Source: Power et al. 2022, "Grokking" (arXiv:2201.02177); Lee et al. 2024, "Grokfast"
    (arXiv:2405.20233), whose tables for "*" also leave out b = 0.
    """
    if operation not in OPERATIONS:
        raise UsageError(f"operation={operation!r} is unknown; use one of {', '.join(map(repr, OPERATIONS))}")
    if operation == "S5":
        if modulus is not None:
            raise UsageError(f"modulus={modulus} does not apply to operation='S5'; leave it out")
        table, size = _permutation_table(5), 120
    else:
        size = _integer("modulus", 97 if modulus is None else modulus, 2)
        table = _modular_table(operation, size)
    share = _share("train_fraction", train_fraction)
    order = np.random.default_rng(_integer("seed", seed, 0)).permutation(len(table))
    cut = int(len(table) * share)
    if not 0 < cut < len(table):
        raise UsageError(f"train_fraction={train_fraction} of {len(table)} rows leaves a side empty; use 0.5")
    a, b, c = table[order].T
    inputs = np.stack([a, np.full_like(a, size), b, np.full_like(a, size + 1)], axis=1)
    what = "composition in S5" if operation == "S5" else f"a {operation} b modulo {size}"
    return Task(
        name="modular_arithmetic",
        description=f"{what}: {cut} of the {len(table)} rows to train on, the others to judge by.",
        train=Split(inputs=inputs[:cut], targets=c[:cut]),
        validation=Split(inputs=inputs[cut:], targets=c[cut:]),
        spec=TaskSpec(
            input_kind="tokens", input_shape=(4,), target_kind="class", num_classes=size, vocab_size=size + 2
        ),
        model_name="decoder",
        model_options={
            "vocab_size": size + 2, "dim": 128, "layers": 2, "heads": 4, "max_length": 4, "num_classes": size,
        },
        details={"operation": operation, "modulus": None if operation == "S5" else size, "seed": seed},
    )  # fmt: skip


def digits(
    *,
    seed: int = 0,
    validation_share: float = 0.2,
    train_size: int | None = None,
    hidden: tuple[int, ...] = (512, 512),
) -> Task:
    """Handwritten digits: 1797 images of 8x8 gray values, scaled to 0..1 (divided by 16).

    Args:
        seed: of the split.
        validation_share: share of each digit's images to judge by, rounded to whole images.
        train_size: how many of the others to train on, the first in their random order; None takes all.
            With 200 or fewer the network knows them by heart long before it generalizes.
        hidden: hidden widths of the recommended model.

    Returns:
        The task.

    Raises:
        UsageError: an argument is outside its range, or scikit-learn is not installed.

    Source: UCI Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), as shipped by
    scikit-learn.
    """
    data = _sklearn_datasets().load_digits()
    inputs, targets = (data.data / 16).astype(np.float32), data.target.astype(np.int64)
    train, validation = _stratified(targets, _share("validation_share", validation_share), seed)
    if train_size is not None and _integer("train_size", train_size, 1) > len(train):
        raise UsageError(f"train_size={train_size} is more than the {len(train)} images there are; lower it")
    train = train[:train_size]
    return Task(
        name="digits",
        description=(
            f"Handwritten digits, 8x8 gray values in 0..1; {len(train)} to train on, "
            f"{len(validation)} to judge by."
        ),
        train=Split(inputs=inputs[train], targets=targets[train]),
        validation=Split(inputs=inputs[validation], targets=targets[validation]),
        spec=TaskSpec(input_kind="features", input_shape=(64,), target_kind="class", num_classes=10),
        model_name="mlp",
        model_options={"in_features": 64, "hidden": tuple(hidden), "num_outputs": 10},
        details={"seed": seed, "source": "sklearn.datasets.load_digits"},
    )


def python_text(*, max_bytes: int = 8_000_000, validation_share: float = 0.1, context: int = 128) -> Task:
    """The source text of this Python's standard library, to be predicted byte by byte.

    Whole files go to one side by a hash of their path, so no module is on both. When the library is
    larger than `max_bytes`, files are kept in the order of another hash while they fit. Files follow
    one another in the order of their paths. Only ASCII files are taken, so that a byte is a character
    and every format holds the same text; folders of tests and of installed packages are left out. The
    text differs between versions of Python: compare losses on one version only.

    Args:
        max_bytes: most bytes to take, both sides together.
        validation_share: share of the files to judge by, approximately.
        context: bytes a sample predicts; `Split.inputs` holds windows of one more.

    Returns:
        The task, with the whole text of each side in `Split.stream`.

    Raises:
        UsageError: an argument is outside its range.
        DataError: this Python has no source files.
    """
    max_bytes, context = _integer("max_bytes", max_bytes, 1), _integer("context", context, 1)
    share = _share("validation_share", validation_share)
    folder = Path(sysconfig.get_path("stdlib"))
    texts = _choose_files(_library_sources(folder), max_bytes)
    sides = [
        np.frombuffer(
            b"".join(data for path, data in texts.items() if (_hash(path)[0] < share) is held), np.uint8
        )
        for held in (False, True)
    ]
    for side, name in zip(sides, ("train", "validation"), strict=True):
        if len(side) < context + 1:
            raise DataError(
                f"{folder}: the {name} side has {len(side)} bytes of source, fewer than one window of "
                f"{context + 1}; use a Python installed with its library's source, more max_bytes or another "
                "validation_share"
            )
    train, validation = (Split(inputs=_windows(side, context), stream=side) for side in sides)
    return Task(
        name="python_text",
        description=(
            f"Source of the standard library of Python {platform.python_version()}: {len(texts)} files, "
            f"{len(sides[0])} bytes to train on, {len(sides[1])} to judge by, split by file."
        ),
        train=train,
        validation=validation,
        spec=TaskSpec(input_kind="tokens", input_shape=(context,), target_kind="tokens", vocab_size=256),
        model_name="decoder",
        model_options={"vocab_size": 256, "dim": 128, "layers": 4, "heads": 4, "max_length": context},
        details={"python": platform.python_version(), "files": len(texts), "context": context},
    )


def breast_cancer(
    *, seed: int = 0, validation_share: float = 0.2, hidden: tuple[int, ...] = (128, 128)
) -> Task:
    """Malignant or benign, from 30 measurements of cell nuclei; 569 cases (Wolberg et al. 1995).

    Args:
        seed: of the split, stratified by class.
        validation_share: share to judge by.
        hidden: hidden widths of the recommended model.

    Returns:
        The task; features have mean 0 and deviation 1 over the training rows.

    Raises:
        UsageError: an argument is outside its range, or scikit-learn is not installed.
    """
    return _table("breast_cancer", seed, validation_share, hidden)


def wine(*, seed: int = 0, validation_share: float = 0.2, hidden: tuple[int, ...] = (128, 128)) -> Task:
    """Which of three cultivars, from 13 chemical measurements; 178 wines (Aeberhard and Forina 1991).

    Args:
        seed: as for `breast_cancer`.
        validation_share: as for `breast_cancer`.
        hidden: as for `breast_cancer`.

    Returns:
        The task, as for `breast_cancer`.

    Raises:
        UsageError: as for `breast_cancer`.
    """
    return _table("wine", seed, validation_share, hidden)


def diabetes(*, seed: int = 0, validation_share: float = 0.2, hidden: tuple[int, ...] = (128, 128)) -> Task:
    """Disease progression after a year, from 10 measurements; 442 patients (Efron et al. 2004).

    The target too has mean 0 and deviation 1 over the training rows, so a loss of 1 is that of always
    guessing the mean; `details` holds "target_mean" and "target_std" to go back.

    Args:
        seed: of the split.
        validation_share: as for `breast_cancer`.
        hidden: as for `breast_cancer`.

    Returns:
        The task, as for `breast_cancer`.

    Raises:
        UsageError: as for `breast_cancer`.
    """
    return _table("diabetes", seed, validation_share, hidden)


TASKS: dict[str, Callable[..., Task]] = {
    f.__name__: f for f in (modular_arithmetic, digits, python_text, breast_cancer, wine, diabetes)
}


def _modular_table(operation: str, p: int) -> np.ndarray:
    """(rows, 3) int64: every a, b and a o b modulo p."""
    if operation == "/" and any(p % d == 0 for d in range(2, int(p**0.5) + 1)):
        raise UsageError(
            f"modulus={p} is not a prime, so operation='/' is not defined; use for example modulus=97"
        )
    a, b = (g.ravel() for g in np.meshgrid(np.arange(p), np.arange(operation in "*/", p), indexing="ij"))
    if operation == "/":
        # a = c * b: the product table read backwards.
        c = a
        a = c * b % p
    else:
        c = {"*": a * b, "+": a + b, "-": a - b}[operation] % p
    return np.stack([a, b, c], axis=1)


def _permutation_table(n: int) -> np.ndarray:
    """(n!^2, 3) int64: the indices of every a, b and a after b."""
    elements = np.array(list(itertools.permutations(range(n))))
    place = n ** np.arange(n)
    index = np.zeros(n**n, dtype=np.int64)
    index[elements @ place] = np.arange(len(elements))
    composed = index[elements[:, elements] @ place]  # [a, b, x] -> a(b(x))
    a, b = np.indices(composed.shape)
    return np.stack([a.ravel(), b.ravel(), composed.ravel()], axis=1)


def _library_sources(folder: Path) -> dict[str, bytes]:
    """{path from `folder`: text} of the library's ASCII modules, in the order of their paths."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not path.name.startswith("_sysconfigdata"):
            data = path.read_bytes()
            if data.isascii() and b"\0" not in data:  # NUL pads text
                found["/".join(parts)] = data
    return dict(sorted(found.items()))


def _choose_files(texts: dict[str, bytes], max_bytes: int) -> dict[str, bytes]:
    kept, total = set(), 0
    for path in sorted(texts, key=lambda p: _hash(p)[1]):
        if total + len(texts[path]) <= max_bytes:
            kept.add(path)
            total += len(texts[path])
    return {path: data for path, data in texts.items() if path in kept}


def _hash(path: str) -> tuple[float, float]:
    """Two independent numbers in [0, 1) that depend on the path only."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32, int.from_bytes(digest[4:8]) / 2**32


def _windows(stream: np.ndarray, context: int) -> np.ndarray:
    """(n, context + 1): window i starts at token i * context; an incomplete last one is left out."""
    return np.lib.stride_tricks.sliding_window_view(stream, context + 1)[::context]


def _table(name: str, seed: int, validation_share: float, hidden: tuple[int, ...]) -> Task:
    data = getattr(_sklearn_datasets(), f"load_{name}")()
    share = _share("validation_share", validation_share)
    regression = name == "diabetes"
    strata = np.zeros(len(data.target), dtype=np.int64) if regression else data.target
    train, validation = _stratified(strata, share, seed)
    inputs = _standardize(data.data, train)[0].astype(np.float32)
    width, details = inputs.shape[1], {"seed": seed, "source": f"sklearn.datasets.load_{name}"}
    if regression:
        targets, mean, std = _standardize(data.target.astype(np.float64)[:, None], train)
        details |= {"target_mean": float(mean[0]), "target_std": float(std[0])}
        targets = targets[:, 0].astype(np.float32)
        classes, outputs = None, 1
    else:
        targets = data.target.astype(np.int64)
        classes, outputs = int(targets.max()) + 1, None
    return Task(
        name=name,
        description=(
            f"{name}: {width} measurements, standardized over the training rows; {len(train)} to train on, "
            f"{len(validation)} to judge by."
        ),
        train=Split(inputs=inputs[train], targets=targets[train]),
        validation=Split(inputs=inputs[validation], targets=targets[validation]),
        spec=TaskSpec(
            input_kind="features",
            input_shape=(width,),
            target_kind="float" if regression else "class",
            num_classes=classes,
            num_outputs=outputs,
        ),
        model_name="mlp",
        model_options={"in_features": width, "hidden": tuple(hidden), "num_outputs": classes or 1},
        details=details,
    )


def _standardize(values: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns with mean 0 and deviation 1 over the rows `train`; and that mean and deviation."""
    mean, std = values[train].mean(axis=0), values[train].std(axis=0)
    std = np.where(std > 0, std, 1.0)
    return (values - mean) / std, mean, std


def _stratified(targets: np.ndarray, validation_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of both sides in random order, each class divided in the same proportion."""
    rng = np.random.default_rng(_integer("seed", seed, 0))
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for value in np.unique(targets):
        rows = rng.permutation(np.flatnonzero(targets == value))
        cut = round(len(rows) * validation_share)
        if not 0 < cut < len(rows):
            raise UsageError(
                f"validation_share={validation_share} of the {len(rows)} rows of class {value} leaves a side "
                "empty; use 0.2"
            )
        sides[0].append(rows[cut:])
        sides[1].append(rows[:cut])
    train, validation = (rng.permutation(np.concatenate(side)) for side in sides)
    return train, validation


def _sklearn_datasets() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UsageError(
            "this task's data ships with scikit-learn; pip install 'forge-training[tasks]'"
        ) from error
    return datasets


def _integer(name: str, value: object, least: int) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name}={value!r} is not an integer of {least} or more; change {name}")
    return int(value)


def _share(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise UsageError(f"{name}={value!r} is not a share between 0 and 1; use for example {name}=0.2")
    return float(value)


def _choices(names: Any) -> str:
    return f"use one of {', '.join(names)}"
