"""Running figures of training: summed on the device, read at log intervals and epoch ends."""

import os
import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor

from phase5_training.outputs import IGNORE_INDEX, unwrap_outputs
from phase5_training.protocols import Optimizes

# What one step adds to the sums, in this order.
_FIGURES = ("loss", "good_steps", "correct", "counted", "skipped")


class Meter:
    """Means of loss and accuracy since the last log and over the epoch, and throughput.

    Args:
        device: where the sums live.

    Example:
        >>> meter = Meter("cpu")
        >>> meter.add(torch.tensor(0.5), torch.tensor(False), samples=4)
        >>> meter.add(torch.tensor(float("nan")), torch.tensor(True), samples=4)
        >>> figures = meter.read(now=2.0)
        >>> figures["loss"], figures["skipped"], figures["samples_per_s"]
        (0.5, 1, 4.0)
    """

    def __init__(self, device: torch.device | str) -> None:
        self.lr: float | None = None
        self.wait_seconds = 0.0
        self.steps = 0
        self._samples = 0
        self._seconds, self._started = 0.0, 0.0
        self._worked = (time.perf_counter(), time.process_time())
        self._window = torch.zeros(len(_FIGURES), dtype=torch.float64, device=device)
        self._epoch = torch.zeros_like(self._window)
        self.correct = self._window.new_zeros(2)
        """Right answers and answers of the batch in progress; several ranks add theirs up here."""

    def count_correct(self, outputs: Any, target: Any) -> None:
        """Count right answers of a micro-batch where the targets are classes; no wait for the device."""
        logits = unwrap_outputs(outputs)
        if not isinstance(target, Tensor) or not isinstance(logits, Tensor):
            return
        if target.is_floating_point() or logits.shape[:-1] != target.shape:
            return  # no classes in the last dimension: values, or segmentation with (n, classes, h, w)
        valid = target != IGNORE_INDEX
        self.correct += torch.stack([((logits.detach().argmax(-1) == target) & valid).sum(), valid.sum()])

    def forget(self) -> None:
        """Drop what was counted of a batch whose step is not taken."""
        self.correct.zero_()

    def add(self, loss: Tensor, nonfinite: Tensor, samples: int, *, counts: bool | Tensor = True) -> None:
        """Take one optimizer step: its () loss, whether it was skipped, and its samples.

        ``counts`` is False for a batch without a valid target, which has no loss to average.
        """
        good = (~nonfinite & torch.as_tensor(counts).to(nonfinite.device, non_blocking=True)).double()
        figures = torch.cat(
            [
                # A skipped step has no loss to average.
                torch.stack([torch.where(nonfinite, 0.0, loss.double()), good]),
                self.correct,
                nonfinite.double()[None],
            ]
        )
        self._window += figures
        self._epoch += figures
        self.correct.zero_()
        self.steps, self._samples = self.steps + 1, self._samples + samples

    def note_wait(self, seconds: float) -> None:
        """Count time in which a batch was waited for."""
        self.wait_seconds += seconds

    def read(self, now: float) -> dict[str, Any]:
        """Figures since the last read, as numbers; waits for the device.

        Args:
            now: seconds on the clock that :meth:`pause` and :meth:`resume` use.
        """
        sums = dict(zip(_FIGURES, self._window.tolist(), strict=True))
        seconds = max(self._seconds + now - self._started, 1e-9)
        figures = {
            "loss": _ratio(sums["loss"], sums["good_steps"]),
            "accuracy": _ratio(sums["correct"], sums["counted"]),
            "lr": self.lr,
            "samples_per_s": self._samples / seconds,
            "data_wait_share": min(1.0, self.wait_seconds / seconds),
            "cpu_share": self._cpu_share(),
            "skipped": round(sums["skipped"]),
            "steps": self.steps,
        }
        self._window.zero_()
        self.steps, self._samples, self.wait_seconds = 0, 0, 0.0
        self._seconds, self._started = 0.0, now
        return figures

    def _cpu_share(self) -> float:
        """Share of the cores' time that this process has used since the last read."""
        (wall, cpu), now = self._worked, (time.perf_counter(), time.process_time())
        self._worked = now
        return min(1.0, (now[1] - cpu) / max(now[0] - wall, 1e-9) / cores())

    def pause(self, now: float) -> None:
        """Stop the throughput clock: what follows is not training."""
        self._seconds += now - self._started

    def resume(self, now: float) -> None:
        """Go on counting time as training."""
        self._started = now

    def end_epoch(self) -> dict[str, float | None]:
        """Mean loss and accuracy of the epoch, which is over."""
        sums = dict(zip(_FIGURES, self._epoch.tolist(), strict=True))
        self._epoch.zero_()
        return {
            "loss": _ratio(sums["loss"], sums["good_steps"]),
            "accuracy": _ratio(sums["correct"], sums["counted"]),
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums, so that a resumed run reports what an uninterrupted one would."""
        return {"window": self._window, "epoch": self._epoch, "steps": self.steps, "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._window.copy_(state["window"])
        self._epoch.copy_(state["epoch"])
        self.steps, self._samples = state["steps"], state["samples"]


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def number(value: Tensor | None) -> float | None:
    """A () tensor as a number; waits for the device."""
    return None if value is None else float(value)


def optimizer_figures(optimizer: Optimizes) -> dict[str, Any]:
    """Figures of the optimizer's last step and of the codes, as numbers and lists; waits for the device."""
    report, zeros = optimizer.report, optimizer.layer_zero_share()
    layers = {"layer_zero_share": zeros, "layer_flip_share": report.layer_flip_share}
    return {
        "grad_norm": float(report.grad_norm),
        "slow_ratio": number(report.slow_ratio),
        "zero_share": None if zeros is None else number(optimizer.overall(zeros)),
        "flip_share": number(report.flip_share),
        # Six digits are finer than a code in a million.
        **{key: [round(x, 6) for x in value.tolist()] for key, value in layers.items() if value is not None},
    }


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def gpu_share(device: torch.device) -> float | None:
    """Share of the last moment in which the device was busy; None on a CPU, and without nvidia-ml-py."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except (ModuleNotFoundError, RuntimeError):
        return None


def memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
