"""Batches whose loss or gradient was not finite, and losses far above those before them."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from phase5_training.distributed import Ranks
from phase5_training.events import CallbackRegistry, Event
from phase5_training.loop_config import LoopConfig

WINDOW, LEAST = 100, 30  # losses that one is compared with, and how many there must be at least


@dataclass(frozen=True, kw_only=True)
class BadBatch:
    """A batch that a step took, or skipped.

    Args:
        kind: "nonfinite" (the step was skipped) or "spike" (it was taken).
        step: the optimizer step, from 1.
        epoch: of the data, from 0.
        samples: positions of the batch's samples in their source.
        loss: the mean loss of the batch; None where it is not finite.
        score: of a spike, its robust z-score.
        rollbacks: times that the run had gone back to a checkpoint by then.
    """

    kind: str
    step: int
    epoch: int
    samples: list[int]
    loss: float | None
    score: float | None = None
    rollbacks: int = 0


def robust_score(value: float, before: Sequence[float]) -> float:
    """How far a value lies above others, in robust standard deviations.

    The median stands for the mean, and 1.4826 times the median distance from it for the deviation (Iglewicz
    and Hoaglin 1993, "How to Detect and Handle Outliers"), so that spikes do not raise the bar for the next.
    A twentieth of the median is taken for the deviation at least: losses that hardly differ have no outliers.

    Args:
        value: a finite number.
        before: finite numbers, at least one.

    Example:
        >>> round(robust_score(9.0, [1.0, 2.0, 3.0, 4.0, 5.0]), 2)
        4.05
    """
    median = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in before)
    return (value - median) / max(deviation, 0.05 * abs(median), 1e-12)


class BatchWatch:
    """Remembers the batches since the last look and finds the bad ones among them.

    Nothing waits for the device until :meth:`look`.

    Args:
        threshold: robust z-score from which a loss is a spike.
        device: where losses and flags are.

    Example:
        >>> watch = BatchWatch(threshold=10.0)
        >>> for step, loss in enumerate([1.0] * 40 + [9.0], start=1):
        ...     watch.note(step, 0, torch.tensor([step]), torch.tensor(loss), torch.tensor(False))
        >>> [(bad.kind, bad.step, bad.samples) for bad in watch.look()]
        [('spike', 41, [41])]
    """

    def __init__(self, threshold: float, device: torch.device | str = "cpu") -> None:
        self.threshold, self.device = threshold, device
        self.in_a_row = 0
        self._steps: list[tuple[int, int, Tensor | None, Tensor, Tensor]] = []
        self._losses: list[float] = []

    def note(self, step: int, epoch: int, samples: Tensor | None, loss: Tensor, nonfinite: Tensor) -> None:
        """Take one step: its sample ids (n,) or None, its () loss, and whether it was skipped, () bool."""
        self._steps.append((step, epoch, samples, loss, nonfinite))

    def look(self, rollbacks: int = 0) -> list[BadBatch]:
        """The bad batches since the last look, marked with ``rollbacks``; waits for the device."""
        if not self._steps:
            return []
        losses = torch.stack([loss.double() for *_, loss, _ in self._steps]).tolist()
        flags = torch.stack([flag for *_, flag in self._steps]).tolist()
        found = []
        for (step, epoch, samples, _, _), loss, skipped in zip(self._steps, losses, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            finite = math.isfinite(loss)
            score = None
            if finite and not skipped:
                if len(self._losses) >= LEAST:
                    score = robust_score(loss, self._losses)
                self._losses = [*self._losses[1 - WINDOW :], loss]
            spike = score is not None and score >= self.threshold
            if skipped or spike:
                found.append(
                    BadBatch(
                        kind="nonfinite" if skipped else "spike",
                        step=step,
                        epoch=epoch,
                        samples=[] if samples is None else samples.reshape(-1).tolist(),
                        loss=loss if finite else None,
                        score=score if spike else None,
                        rollbacks=rollbacks,
                    )
                )
        self._steps = []
        return found

    def suspect(self, step: int) -> int:
        """The first step that is or may be bad: of those skipped in a row, and of those not looked at yet.

        Args:
            step: the last one.
        """
        return (self._steps[0][0] if self._steps else step + 1) - self.in_a_row

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to find what an uninterrupted one would."""
        steps, pending = self._steps, {}
        if steps:
            samples = [torch.empty(0) if s is None else s.reshape(-1) for _, _, s, _, _ in steps]
            pending = {
                "numbers": [[step[0], step[1], len(s)] for step, s in zip(steps, samples, strict=True)],
                "samples": torch.cat([s.long().cpu() for s in samples]),
                "losses": torch.stack([loss for *_, loss, _ in steps]),
                "flags": torch.stack([flag for *_, flag in steps]),
            }
        return {"pending": pending, "losses": self._losses, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        pending, self._steps = state["pending"], []
        if pending:
            samples = pending["samples"].split([n for _, _, n in pending["numbers"]])
            losses, flags = pending["losses"].to(self.device), pending["flags"].to(self.device)
            rest = zip(pending["numbers"], samples, losses, flags, strict=True)
            self._steps = [(step, epoch, s, loss, flag) for (step, epoch, _), s, loss, flag in rest]
        self._losses, self.in_a_row = list(state["losses"]), state["in_a_row"]


def of_all_ranks(bad: Sequence[BadBatch], ranks: Ranks) -> list[BadBatch]:
    """The same batches, with the samples that other ranks had of them.

    Args:
        bad: found by this rank; the others found the same, since losses and flags are those of all.
        ranks: those that share each batch.
    """
    if ranks.alone or not bad:
        return list(bad)
    samples = ranks.gathered([b.samples for b in bad])
    # A resumed run knows the first rank's samples only, of the steps since the last look.
    joined = (dict.fromkeys(itertools.chain.from_iterable(own)) for own in zip(*samples, strict=True))
    return [replace(b, samples=list(own)) for b, own in zip(bad, joined, strict=True)]


def tell(bad: Sequence[BadBatch], callbacks: CallbackRegistry, step: int, total: int) -> None:
    """Fire the events of bad batches.

    Args:
        bad: found at this look.
        callbacks: who is told.
        step: the last one.
        total: steps skipped so far in the run.
    """
    skipped, spikes = ([asdict(b) for b in bad if b.kind == kind] for kind in ("nonfinite", "spike"))
    if skipped:
        metrics = {"step": step, "skipped": len(skipped), "total": total, "batches": skipped}
        callbacks.fire(Event.NONFINITE_STEP, step, metrics)
    if spikes:
        metrics = {"step": step, "spikes": len(spikes), "batches": spikes}
        callbacks.fire(Event.LOSS_SPIKE, step, metrics)


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Bad numbers that call for more than a report.

    Args:
        why: in words.
        first_step: of the bad ones; a checkpoint to go back to has fewer.
        roll_back: whether to go back to one.
        fatal: whether the run fails where it does not go back.
    """

    why: str
    first_step: int
    roll_back: bool
    fatal: bool


def judge(bad: Sequence[BadBatch], in_a_row: int, step: int, config: LoopConfig) -> Trouble | None:
    """What the policies of a run make of its bad batches.

    Args:
        bad: found at this look.
        in_a_row: skipped steps up to the last one.
        step: the last one.
        config: the policies.
    """
    if in_a_row >= config.max_nonfinite and config.nonfinite != "skip":
        return Trouble(
            why=f"the last {in_a_row} steps up to step {step} were skipped: their loss or gradient was not "
            "finite",
            first_step=step - in_a_row + 1,
            roll_back=config.nonfinite == "rollback",
            fatal=True,
        )
    spikes = [b for b in bad if b.kind == "spike"]
    if not spikes or config.loss_spikes != "rollback":
        return None
    first = spikes[0]
    why = f"the loss of step {first.step} was {first.loss:.4g}, far above those before"
    return Trouble(why=why, first_step=first.step, roll_back=True, fatal=False)
