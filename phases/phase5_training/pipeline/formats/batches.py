"""Batches that the user makes, in the form Forge hands to the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch

from phase5_training.errors import DataError, UsageError
from phase5_training.pipeline.formats.record_columns import INPUT_KEYS, TARGET_KEYS, choose_key
from phase5_training.pipeline.formats.spec import DataSpec, TargetSpec


class BatchStream:
    """Ready batches, one after another, in the form Forge hands to the loop.

    Args:
        source: a list, an iterable that can be started anew (such as a torch DataLoader), a callable
            returning one, or a generator (one epoch only). Batches are ``(x, y)`` or dicts.

    Raises:
        DataError: a batch of another form, or a generator asked for a second time.
    """

    format = "batches"

    def __init__(self, source: Iterable[Any] | Callable[[], Iterable[Any]]) -> None:
        self.source, self.name = source, type(source).__name__
        self.paths = [self.name]
        self.once = isinstance(source, Iterator)
        self._used = False
        self.samples: int | None = None
        self._head: list[Any] = []

    def first(self) -> dict[str, Any]:
        """The first batch, without losing it."""
        if self._head:
            return as_batch(self._head[0], 0, 0)
        walk = self._start()
        batch = next(walk, None)
        if batch is None:
            raise DataError(f"{self.name}: holds no batches; wanted at least one")
        if self.once:
            self._head.append(batch)
        return as_batch(batch, 0, 0)

    def _start(self) -> Iterator[Any]:
        if self.once:
            return self.source  # type: ignore[return-value]
        return iter(self.source() if callable(self.source) else self.source)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.once and self._used:
            raise DataError(
                f"{self.name}: a generator can be read once, and a second epoch was asked for; pass a list, "
                "a torch DataLoader or a function returning a new iterator, or set epochs=1"
            )
        self._used = True
        return self._batches()

    def _batches(self) -> Iterator[dict[str, Any]]:
        start, number = 0, 0
        head, self._head = self._head, []
        walk = self._start()
        while True:
            raw = head.pop() if head else next(walk, None)
            if raw is None:
                break
            batch = as_batch(raw, number, start)
            start, number = start + len(batch["index"]), number + 1
            yield batch
        self.samples = start


def as_batch(batch: Any, number: int, start: int) -> dict[str, Any]:
    """A user's batch as ``{"input", "target", "index"}``; samples are counted from ``start``."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        batch = {"input": batch[0], "target": batch[1]}
    if not isinstance(batch, Mapping):
        raise DataError(f"batch {number} is {type(batch).__name__}; wanted (inputs, targets) or a dict")
    try:
        keys = choose_key(list(batch), INPUT_KEYS), choose_key(list(batch), TARGET_KEYS)
    except ValueError as error:
        raise DataError(f"batch {number} {error}") from error
    for key, what in zip(keys, ("input", "target"), strict=True):
        if key is None:
            raise DataError(f"batch {number} has no {what!r} (its keys: {sorted(map(str, batch))[:6]})")
    inputs, targets = _tensors(batch[keys[0]], number), _tensors(batch[keys[1]], number)
    sizes = {
        len(t) for part in (inputs, targets) for t in (part.values() if isinstance(part, dict) else [part])
    }
    if len(sizes) != 1:
        raise DataError(f"batch {number}: inputs and targets have {sorted(sizes)} rows; wanted one number")
    n = sizes.pop()
    index = batch["index"] if "index" in batch else torch.arange(start, start + n)
    return {"input": inputs, "target": targets, "index": torch.as_tensor(index)}


def _tensors(value: Any, number: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _tensors(part, number) for key, part in value.items()}
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"batch {number} holds {type(value).__name__}, not numbers ({error})") from error
    if not tensor.ndim:
        raise DataError(f"batch {number} holds a single number; wanted one row per sample")
    return tensor.float() if tensor.is_floating_point() else tensor.long()


class BatchLoader:
    """The same face for batches the user makes; position is reached by reading up to it."""

    seeks = False

    def __init__(
        self, stream: BatchStream, split: str, task: str | None, rank: int = 0, world_size: int = 1
    ) -> None:
        self._stream, self.split = stream, split
        self._rank, self._world_size = rank, world_size
        self.spec = _spec_of_batches(stream, task)
        self.num_samples: int | None = None
        self._position = (0, 0)

    def __len__(self) -> int:
        return len(self._stream.source)  # type: ignore[arg-type]  # TypeError where it has no length

    def first(self) -> dict[str, Any]:
        """The first batch; the next iteration begins with it all the same."""
        return self._stream.first()

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration begin at ``batch`` of ``epoch``; batches before it are read and dropped."""
        if epoch < 0 or batch < 0:
            raise UsageError(f"no position epoch {epoch}, batch {batch}; both count from 0")
        if epoch and self._stream.once:
            raise DataError(f"{self._stream.name}: a generator can be read once and has no epoch {epoch}")
        self._position = (epoch, batch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, skip = self._position
        self._position = (epoch + 1, 0)
        for number, batch in enumerate(self._stream):
            if number >= skip:
                yield self._share(batch, number)
        self.num_samples = self._stream.samples

    def _share(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """This rank's part of a batch, cut as a `BatchPlan` cuts."""
        n, ranks = len(batch["index"]), self._world_size
        if ranks == 1:
            return batch
        if n < ranks:
            raise DataError(f"batch {number} has {n} samples for {ranks} ranks; wanted at least one for each")
        rows = slice(n * self._rank // ranks, n * (self._rank + 1) // ranks)
        return {
            key: {k: v[rows] for k, v in part.items()} if isinstance(part, dict) else part[rows]
            for key, part in batch.items()
        }

    def sentence(self) -> str:
        """What is read, in words."""
        return f"{self.split} data: batches of {self._stream.name}, as they come"

    def description(self) -> dict[str, Any]:
        """What a run's record says about its data."""
        spec = self.spec
        return {
            "format": "batches",
            "mode": "generator" if self._stream.once else "iterable",
            "files": [],
            "split": self.split,
            "samples": self.num_samples,
            "dropped": {},
            "task": spec.task,
            "input_kind": spec.input_kind,
            "input_shape": list(spec.input_shape),
            "input_dtype": spec.input_dtype,
            "target_kind": spec.target_kind,
            "num_classes": spec.num_classes,
            "vocab_size": spec.vocab_size,
            "cache_hit_rate": None,
        }


def _spec_of_batches(stream: BatchStream, task: str | None) -> DataSpec:
    """What the batches hold, judged by all of them where they are a list, else by the first."""
    source = stream.source
    batches = list(stream) if isinstance(source, (list, tuple)) else [stream.first()]
    inputs, targets = batches[0]["input"], batches[0]["target"]

    def one(pick: Callable[[dict], torch.Tensor]) -> TargetSpec:
        values = [pick(batch) for batch in batches]
        first = values[0]
        if first.is_floating_point() or task == "regression":
            return TargetSpec(kind="float", shape=tuple(first.shape[1:]))
        low, high = min(int(v.min()) for v in values), max(int(v.max()) for v in values)
        kind: Literal["class", "tokens"] = "class" if first.ndim == 1 else "tokens"
        return TargetSpec(
            kind=kind, shape=tuple(first.shape[1:]), num_classes=high + 1, label_range=(low, high)
        )

    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
    tokens = not first.is_floating_point() and first.ndim <= 2
    top = None
    if tokens and not isinstance(inputs, dict):
        top = max(int(batch["input"].max()) for batch in batches)
    common: dict[str, Any] = {
        "input_kind": "tokens" if tokens else "features",
        "input_shape": tuple(first.shape[1:]),
        "input_dtype": str(first.dtype).removeprefix("torch."),
        "vocab_size": None if top is None else top + 1,
        "max_token": top,
    }
    if isinstance(targets, dict):
        named = {name: one(lambda batch, name=name: batch["target"][name]) for name in targets}  # type: ignore[misc]
        return DataSpec(task=task or "multi_task", target_kind="multi", targets=named, **common)
    target = one(lambda batch: batch["target"])
    inferred = {"class": "classification", "tokens": "next_token", "float": "regression"}[target.kind]
    return DataSpec(
        task=task or inferred, target_kind=target.kind, target_shape=target.shape,
        num_classes=target.num_classes, label_range=target.label_range, **common,
    )  # fmt: skip
