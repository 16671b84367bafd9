"""Validation figures weighted by sample or token, and the early-stopping rule.

Everything is summed on the device and read once at the end of a pass, so validation never waits for a
batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phase5_training.distributed import Ranks
from phase5_training.errors import DataError, UsageError, nearest_match
from phase5_training.modes import eval_mode
from phase5_training.outputs import IGNORE_INDEX, count_units, unwrap_outputs

TASKS = ("classification", "next_token", "regression", "multi_task")


class RealTimeValidator:
    """Measures a model on a validation set and leaves it exactly as it was.

    Args:
        model: called as ``model(batch["input"])``.
        task: "classification", "next_token", "regression" or "multi_task"; None reads the kind of
            each batch's target (integers: accuracy; floats: mse, mae, r2).
        device: where to move each batch; None leaves it where it is.
        use_amp: run the forward pass under autocast.
        amp_dtype: dtype of autocast.
        max_batches: stop a pass after so many batches; None takes them all.
        bytes_per_token: mean bytes of text behind one token: 1 for the byte vocabulary; None
            leaves bits_per_byte out.
        ranks: processes that measure together, each its part of the batches; the figures are of all.

    Raises:
        UsageError: an unknown task, ``max_batches`` below 1, ``bytes_per_token`` not above 0.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> batch = {"input": torch.ones(4, 2), "target": torch.tensor([0, 1, 2, 0])}
        >>> result = RealTimeValidator(model).run_validation([batch], F.cross_entropy)
        >>> result["samples"], result["loss"] == result["avg_loss"], model.training
        (4, True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        task: str | None = None,
        device: torch.device | str | None = None,
        use_amp: bool = False,
        amp_dtype: torch.dtype = torch.bfloat16,
        max_batches: int | None = None,
        bytes_per_token: float | None = 1.0,
        ranks: Ranks | None = None,
    ) -> None:
        if task is not None and task not in TASKS:
            near = nearest_match(str(task), TASKS)
            hint = f"did you mean {near!r}? " if near else ""
            raise UsageError(f"task={task!r} is unknown; {hint}choose one of {', '.join(TASKS)}")
        if max_batches is not None and max_batches < 1:
            raise UsageError(f"max_batches={max_batches} is less than 1; use None for all batches")
        if bytes_per_token is not None and not bytes_per_token > 0:
            raise UsageError(f"bytes_per_token={bytes_per_token} is not above 0; use None to leave it out")
        self.model, self.task, self.device = model, task, device
        self.use_amp, self.amp_dtype = use_amp, amp_dtype
        self.max_batches, self.bytes_per_token = max_batches, bytes_per_token
        self.ranks = ranks or Ranks()

    def validate_step(self, batch: Mapping[str, Any], loss_fn: Callable[..., Tensor]) -> dict[str, Any]:
        """The figures of one batch, as :meth:`run_validation` gives them for a whole set."""
        return self._run([batch], loss_fn)

    def run_validation(
        self, val_loader: Iterable[Mapping[str, Any]], loss_fn: Callable[..., Tensor]
    ) -> dict[str, Any]:
        """The figures of a validation set, each weighted by the samples or tokens it is a mean over.

        Args:
            val_loader: batches {"input", "target"}.
            loss_fn: a loss with ``units(batch)`` called as ``loss_fn(outputs, batch)``, or a plain
                function called as ``loss_fn(outputs, target)``.

        Returns:
            Floats, None where a figure does not apply: loss (also avg_loss), accuracy (also
            avg_accuracy; with several tasks the mean over those that have one), perplexity,
            bits_per_byte, mse, mae, r2; and the ints samples and units. With several tasks also
            "<task>/accuracy" or "<task>/mse", "/mae" and "/r2". perplexity is that of the plain
            likelihood, whatever terms the loss adds.

        Raises:
            DataError: no batches, or not one valid target.
        """
        batches = iter(val_loader)
        if self.max_batches is not None:
            batches = islice(batches, self.max_batches)
        return self._run(batches, loss_fn)

    def _run(self, batches: Iterable[Mapping[str, Any]], loss_fn: Callable[..., Tensor]) -> dict[str, Any]:
        sums = _Sums()
        # no_grad, not inference_mode: what a forward pass caches (rotary tables, codes) must be usable
        # in training afterwards, and inference tensors are not.
        with eval_mode(self.model), torch.no_grad():
            for batch in batches:
                self._add(sums, _to_device(batch, self.device), loss_fn)
        return self._figures(sums)

    def _add(self, sums: _Sums, batch: Mapping[str, Any], loss_fn: Callable[..., Tensor]) -> None:
        target = batch["target"]
        if self.device is not None:
            kind = torch.device(self.device).type
        else:
            kind = (next(iter(target.values())) if isinstance(target, Mapping) else target).device.type
        with torch.autocast(kind, dtype=self.amp_dtype, enabled=self.use_amp):
            outputs = self.model(batch["input"])
            if hasattr(loss_fn, "units"):
                loss, units = loss_fn(outputs, batch), loss_fn.units(batch)
            else:
                loss, units = loss_fn(unwrap_outputs(outputs, target), target), count_units(target)
        outputs = unwrap_outputs(outputs, target)
        sums.batches += 1
        sums.samples += _first(target).shape[0]
        sums.add("units", units)
        weighted = loss.double() * units
        if isinstance(units, Tensor):
            # A batch without a valid target has no mean: it must not turn the sum into nan.
            weighted = torch.where(units.to(loss.device) > 0, weighted, 0.0)
        sums.add("loss", weighted)
        if isinstance(target, Mapping):
            for name, each in target.items():
                sums.add_task(f"{name}/", outputs[name], each)
        else:
            sums.add_task("", outputs, target)
            if self.task == "next_token":
                nll = loss * units if getattr(loss_fn, "is_nll", False) else _token_nll(outputs, target)
                sums.add("nll", nll)

    def _figures(self, sums: _Sums) -> dict[str, Any]:
        if not sums.batches:
            raise DataError(
                "the validation set gave no batches; give it at least one sample, or no set at all"
            )
        read = sums.read() if self.ranks.alone else sums.of_all(self.ranks)
        if not read["units"][0]:
            raise DataError(
                f"none of the {sums.samples} validation samples has a valid target; not all may be -100"
            )
        loss = read["loss"][0] / read["units"][0]
        result: dict[str, Any] = dict.fromkeys(("perplexity", "bits_per_byte", "mse", "mae", "r2"))
        accuracies = []
        for prefix, kind in sums.tasks.items():
            if kind == "class":
                count = read[f"{prefix}count"][0]
                result[f"{prefix}accuracy"] = read[f"{prefix}hits"][0] / count if count else None
                accuracies.append(result[f"{prefix}accuracy"])
            else:
                result.update({prefix + key: value for key, value in _regression(read, prefix).items()})
        known = [value for value in accuracies if value is not None]
        accuracy = sum(known) / len(known) if known else None
        if "nll" in read:
            nats = read["nll"][0] / read["count"][0]
            result["perplexity"] = (
                math.exp(nats) if nats < 700 else (math.nan if math.isnan(nats) else math.inf)
            )
            if self.bytes_per_token is not None:
                result["bits_per_byte"] = nats / math.log(2) / self.bytes_per_token
        result.update(loss=loss, avg_loss=loss, accuracy=accuracy, avg_accuracy=accuracy)
        return result | {"samples": sums.samples, "units": int(read["units"][0])}


class EarlyStopping:
    """Remembers the best validation figure and says when to stop.

    Args:
        patience: stop at this many evaluations in a row without improvement; None never stops.
        monitor: the figure's name in a validation result.
        mode: "min" or "max"; None is "max" for accuracy and r2 (also of one task), else "min".
        min_delta: an improvement has to be larger than this; 0 or more.

    Raises:
        UsageError: an argument out of its range.

    Example:
        >>> rule = EarlyStopping(patience=2)
        >>> [rule.update(value, step) for step, value in enumerate([1.0, 0.5, 0.7, float("nan")])]
        [(True, False), (True, False), (False, False), (False, True)]
        >>> rule.best, rule.best_step
        (0.5, 1)
    """

    def __init__(
        self,
        patience: int | None = 5,
        monitor: str = "loss",
        mode: str | None = None,
        min_delta: float = 0.0,
    ) -> None:
        if patience is not None and patience < 1:
            raise UsageError(f"patience={patience} is less than 1; use early_stopping=False to never stop")
        if mode not in (None, "min", "max"):
            raise UsageError(f"mode={mode!r} is unknown; use 'min', 'max', or None to go by the figure")
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise UsageError(
                f"min_delta={min_delta} is not a number of 0 or more; use 0.0 for any improvement"
            )
        self.patience, self.monitor, self.min_delta = patience, monitor, min_delta
        higher = monitor.endswith(("accuracy", "r2"))
        self.mode = mode or ("max" if higher else "min")
        self.best: float | None = None
        self.best_step: int | None = None
        self.bad_evaluations = 0

    def update(self, value: float | None, step: int) -> tuple[bool, bool]:
        """Take the figure of one evaluation; returns (improved, should_stop).

        A value that is not finite never improves and counts against the patience.

        Raises:
            UsageError: ``value`` is None: the task does not have the monitored figure.
        """
        if value is None:
            raise UsageError(f"monitor={self.monitor!r} is not measured for this task; use monitor='loss'")
        gain = math.inf
        if self.best is not None:
            gain = self.best - value if self.mode == "min" else value - self.best
        improved = math.isfinite(value) and gain > self.min_delta
        if improved:
            self.best, self.best_step, self.bad_evaluations = float(value), step, 0
        else:
            self.bad_evaluations += 1
        return improved, self.stopped

    @property
    def stopped(self) -> bool:
        """Whether patience has run out, by the patience in force now."""
        return self.patience is not None and self.bad_evaluations >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What has been seen; the settings are not part of it."""
        return {"best": self.best, "best_step": self.best_step, "bad_evaluations": self.bad_evaluations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.best, self.best_step = state["best"], state["best_step"]
        self.bad_evaluations = int(state["bad_evaluations"])


class _Sums:
    """Running sums in float64 on the device they arrive on; one transfer at the end."""

    def __init__(self) -> None:
        self.batches = 0
        self.samples = 0
        self.tasks: dict[str, str] = {}  # prefix -> "class" or "float"
        self._totals: dict[str, Tensor | int] = {}
        self._shifts: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | int) -> None:
        if isinstance(value, Tensor):
            value = value.double()
        self._totals[name] = self._totals[name] + value if name in self._totals else value

    def add_task(self, prefix: str, outputs: Tensor, target: Tensor) -> None:
        if not target.is_floating_point():
            self.tasks[prefix] = "class"
            self.add(f"{prefix}hits", (outputs.argmax(dim=-1) == target).sum())  # never -100
            self.add(f"{prefix}count", (target != IGNORE_INDEX).sum())
            return
        self.tasks[prefix] = "float"
        rows = target.reshape(target.shape[0], -1).double()
        error = outputs.reshape(rows.shape).double() - rows
        # Sums of squares around the first batch's mean: around 0 a large offset would eat the digits.
        if prefix not in self._shifts:
            self._shifts[prefix] = rows.mean(dim=0)
        centered = rows - self._shifts[prefix]
        self.add(f"{prefix}rows", rows.shape[0])
        self.add(f"{prefix}squares", error.square().sum(dim=0))
        self.add(f"{prefix}absolutes", error.abs().sum())
        self.add(f"{prefix}centered", centered.sum(dim=0))
        self.add(f"{prefix}centered_squares", centered.square().sum(dim=0))

    def read(self) -> dict[str, list[float]]:
        tensors = {
            name: value.reshape(-1) for name, value in self._totals.items() if isinstance(value, Tensor)
        }
        flat = torch.cat(list(tensors.values())).tolist()
        result: dict[str, list[float]] = {}
        for name, value in self._totals.items():
            if isinstance(value, Tensor):
                size = tensors[name].numel()
                result[name], flat = flat[:size], flat[size:]
            else:
                result[name] = [float(value)]
        return result

    def of_all(self, ranks: Ranks) -> dict[str, list[float]]:
        """:meth:`read` and the count of samples, over all ranks."""
        shifts = {prefix: shift.tolist() for prefix, shift in self._shifts.items()}
        parts = ranks.gathered((self.read(), shifts, self.samples))
        total, common, self.samples = parts[0]
        for own, own_shifts, samples in parts[1:]:
            self.samples += samples
            for prefix, shift in own_shifts.items():
                _move_center(own, prefix, shift, common[prefix])
            total = {name: [a + b for a, b in zip(total[name], own[name], strict=True)] for name in total}
        return total


def _move_center(sums: dict[str, list[float]], prefix: str, old: list[float], new: list[float]) -> None:
    """Sums of targets around ``old``, and of their squares, as they are around ``new``; in place."""
    rows = sums[f"{prefix}rows"][0]
    by = [a - b for a, b in zip(old, new, strict=True)]
    firsts, seconds = sums[f"{prefix}centered"], sums[f"{prefix}centered_squares"]
    sums[f"{prefix}centered_squares"] = [
        second + 2 * d * first + rows * d * d for second, first, d in zip(seconds, firsts, by, strict=True)
    ]
    sums[f"{prefix}centered"] = [first + rows * d for first, d in zip(firsts, by, strict=True)]


def _regression(read: Mapping[str, list[float]], prefix: str) -> dict[str, float | None]:
    """mse, mae and r2; r2 is the mean over the outputs, None where an output never varies."""
    rows, squares = read[f"{prefix}rows"][0], read[f"{prefix}squares"]
    sums = zip(read[f"{prefix}centered_squares"], read[f"{prefix}centered"], strict=True)
    spreads = [total - offset**2 / rows for total, offset in sums]
    r2 = None
    if all(spread > 0 for spread in spreads):
        r2 = sum(1 - error / spread for error, spread in zip(squares, spreads, strict=True)) / len(squares)
    elements = rows * len(squares)
    return {"mse": sum(squares) / elements, "mae": read[f"{prefix}absolutes"][0] / elements, "r2": r2}


def _token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, targets.reshape(-1).long(), ignore_index=IGNORE_INDEX, reduction="sum")


def _first(target: Any) -> Tensor:
    return next(iter(target.values())) if isinstance(target, Mapping) else target


def _to_device(value: Any, device: torch.device | str | None) -> Any:
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to_device(each, device) for key, each in value.items()}
    return value
