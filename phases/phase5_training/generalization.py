"""How far validation lags training, for a filter that helps where generalization is delayed.

A network that groks fits its training set, and understands the validation set many steps later. Amplifying
the slow part of the gradient shortens that wait and costs steps elsewhere (docs/findings.md), so the
"auto" filter amplifies by how much is waiting to be generalized::

    fit       accuracy, or 1 - loss / first loss where there is none, of training and of validation
    lag       fit of training - fit of validation, at the latest validation
    retreat   best fit of validation so far - that of the latest
    evidence  0 up to a lag of LEAST, 1 from MOST, linear in between; times
              1 up to a retreat of one margin, 0 from two, linear in between

A network that waits to generalize has not been better on the validation set than it is; one that was, and
fits its training set better and better, overfits, and a filter makes that worse. The margin is two standard
errors of the best accuracy, and at least MARGIN.
"""

import math
from collections.abc import Mapping
from typing import Any

# Below LEAST lies what a network that has generalized shows: the noise of a batch, ordinary overfitting.
LEAST, MOST = 0.2, 0.5
# Runs that generalize late, in benchmarks/records, fell back by 0.026 at most on the way.
MARGIN = 0.03


class GeneralizationLag:
    """Follows the figures of a run and says how strong the evidence for delayed generalization is.

    Example:
        >>> lag = GeneralizationLag()
        >>> lag.observe_training({"loss": 4.6, "accuracy": 0.01})
        >>> lag.observe_training({"loss": 0.1, "accuracy": 1.0})
        >>> lag.observe_validation({"loss": 9.0, "accuracy": 0.1})
        >>> lag.evidence
        1.0
    """

    def __init__(self) -> None:
        self.evidence = 0.0
        self._best: float | None = None
        self._first_loss: float | None = None
        self._training: dict[str, float | None] = {"loss": None, "accuracy": None}

    def observe_training(self, metrics: Mapping[str, Any]) -> None:
        """Take note of "loss" and "accuracy" (None where there is none) of the latest training steps."""
        self._training = {name: metrics.get(name) for name in ("loss", "accuracy")}
        loss = self._training["loss"]
        if self._first_loss is None and loss is not None and math.isfinite(loss) and loss > 0:
            self._first_loss = loss

    def observe_validation(self, metrics: Mapping[str, Any]) -> None:
        """Compare "loss" and "accuracy" of a validation with the latest of training.

        Args:
            metrics: also "units", the samples or tokens that the accuracy is over, where it is known.
        """
        fits = self._fits(metrics)
        if fits is None:
            return
        training, validation = fits
        best = self._best = validation if self._best is None else max(self._best, validation)
        margin = max(MARGIN, 2 * _standard_error(best, metrics.get("units")))
        waiting = _share((training - validation - LEAST) / (MOST - LEAST))
        self.evidence = waiting * _share(2 - (best - validation) / margin)

    def _fits(self, validation: Mapping[str, Any]) -> tuple[float, float] | None:
        """Fit of training and of validation by one figure; None where that could not be computed."""
        ours, theirs = self._training["accuracy"], validation.get("accuracy")
        if ours is not None and theirs is not None:
            fits = ours, float(theirs)
            return fits if all(map(math.isfinite, fits)) else None
        ours, theirs = self._training["loss"], validation.get("loss")
        if ours is None or theirs is None or self._first_loss is None:
            return None
        if not (math.isfinite(ours) and math.isfinite(theirs)):
            return None
        # Worse than at the start is no fit at all, not less than none.
        return max(0.0, 1 - ours / self._first_loss), max(0.0, 1 - float(theirs) / self._first_loss)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "evidence": self.evidence,
            "best": self._best,
            "first_loss": self._first_loss,
            "training": self._training,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.evidence, self._first_loss = state["evidence"], state["first_loss"]
        self._best = state.get("best")
        self._training = dict(state["training"])


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))


def _standard_error(accuracy: float, units: int | None) -> float:
    """Of a share of so many samples; 0 where it is none, or their number is unknown."""
    return math.sqrt(accuracy * (1 - accuracy) / units) if units and 0 <= accuracy <= 1 else 0.0
