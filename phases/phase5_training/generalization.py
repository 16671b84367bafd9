"""How far validation lags training, for a filter that helps where generalization is delayed.

A network that groks fits its training set, and understands the validation set many steps later. Amplifying
the slow part of the gradient shortens that wait and costs steps elsewhere (docs/findings.md), so the
"auto" filter amplifies by how much is waiting to be generalized::

    fit       accuracy, or 1 - loss / first loss where there is none, of training and of validation
    lag       fit of training - fit of validation, at the latest validation
    evidence  0 up to a lag of LEAST, 1 from MOST, linear in between
"""

import math
from collections.abc import Mapping
from typing import Any

# Below LEAST lies what a network that has generalized shows: the noise of a batch, ordinary overfitting.
LEAST, MOST = 0.2, 0.5


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
        self._first_loss: float | None = None
        self._training: dict[str, float | None] = {"loss": None, "accuracy": None}

    def observe_training(self, metrics: Mapping[str, Any]) -> None:
        """Take note of "loss" and "accuracy" (None where there is none) of the latest training steps."""
        self._training = {name: metrics.get(name) for name in ("loss", "accuracy")}
        loss = self._training["loss"]
        if self._first_loss is None and loss is not None and math.isfinite(loss) and loss > 0:
            self._first_loss = loss

    def observe_validation(self, metrics: Mapping[str, Any]) -> None:
        """Compare "loss" and "accuracy" of a validation with the latest of training."""
        lag = self._lag(metrics)
        if lag is not None and math.isfinite(lag):
            self.evidence = min(1.0, max(0.0, (lag - LEAST) / (MOST - LEAST)))

    def _lag(self, validation: Mapping[str, Any]) -> float | None:
        ours, theirs = self._training["accuracy"], validation.get("accuracy")
        if ours is not None and theirs is not None:
            return ours - float(theirs)
        ours, theirs = self._training["loss"], validation.get("loss")
        if ours is None or theirs is None or self._first_loss is None:
            return None
        if not (math.isfinite(ours) and math.isfinite(theirs)):
            return None  # a loss that could not be computed is no fit of 0
        # Worse than at the start is no fit at all, not less than none.
        return max(0.0, 1 - ours / self._first_loss) - max(0.0, 1 - float(theirs) / self._first_loss)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"evidence": self.evidence, "first_loss": self._first_loss, "training": self._training}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.evidence, self._first_loss = state["evidence"], state["first_loss"]
        self._training = dict(state["training"])
