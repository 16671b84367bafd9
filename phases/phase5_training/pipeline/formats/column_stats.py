"""What a column of the data has held so far, and what is wrong with the next rows of it."""

from __future__ import annotations

import numpy as np

from phase5_training.pipeline.formats.columns import Ragged, Texts, Values, as_rows
from phase5_training.pipeline.formats.record_columns import narrow

Reason = tuple[str, str]  # (short name for counting, sentence for the user)


class ColumnStats:
    """What one column has held so far, and what is wrong with the next rows of it."""

    def __init__(self, what: str, pad: bool = False) -> None:
        self.what, self._pad = what, pad
        self.kind: str | None = None  # "text", "int" or "float"
        self.shape: tuple[int, ...] | None = None
        self.ragged = False
        self.low, self.high, self.longest = 0, -1, 0
        self.names: set[str] = set()

    def check(self, values: Values, text: bool = False) -> dict[int, Reason]:
        """Reasons against rows of ``values``; ``text`` says they are encoded text."""
        kind = "text" if text or is_text(values) else "number"
        if self.kind is not None and (self.kind == "text") != (kind == "text"):
            held = "text" if self.kind == "text" else "numbers"
            now = "text" if kind == "text" else "numbers"
            return every_row(values, "kind", f"has {now} as {self.what}, the records before it have {held}")
        if isinstance(values, Texts) or (kind == "text" and isinstance(values, list)):
            return {}
        if isinstance(values, Ragged):
            return self._check_ragged(values, text)
        if isinstance(values, list):
            bad: dict[int, Reason] = {}
            for i, row in enumerate(values):
                wrong = self._check_array(row[None])
                if wrong:
                    bad[i] = wrong[0]
            return bad
        return self._check_array(values)

    def _check_array(self, values: np.ndarray) -> dict[int, Reason]:
        shape = values.shape[1:]
        if self.shape is None and len(values):
            self.shape = shape
        if shape != self.shape:
            if not (self._pad and len(shape) == len(self.shape or ()) == 1 and values.dtype.kind in "iu"):
                text = f"has {self.what} of shape {shape}, the first record {self.shape}"
                return every_row(values, "shape", text + self._remedy(shape))
            self.ragged = True
        if 0 in shape:
            return every_row(values, "empty", f"has nothing in its {self.what} (shape {shape})")
        try:
            values = narrow(values)
        except ValueError as error:
            return every_row(values, "kind", f"has {error} in its {self.what}")
        with np.errstate(invalid="ignore"):
            sound = values.dtype.kind != "f" or bool(np.isfinite(values.sum(dtype=np.float64)))
        if not sound:
            finite = np.isfinite(values).reshape(len(values), -1).all(1)
            text = f"has NaN or infinity (as float32) in its {self.what}"
            return {int(i): ("nonfinite", text) for i in np.flatnonzero(~finite)}
        return {}

    def _check_ragged(self, values: Ragged, text: bool) -> dict[int, Reason]:
        lengths = values.lengths
        kind = "text" if text else "list"
        bad: dict[int, Reason] = {
            int(i): ("empty", f"has an empty {kind} as {self.what}") for i in np.flatnonzero(lengths == 0)
        }
        if not text and self.shape is None and len(values):
            self.shape = (int(lengths[0]),)
        if text or self._pad:
            self.ragged = True
        else:
            for i in np.flatnonzero(lengths != (self.shape or (0,))[0]).tolist():
                shape = (int(lengths[i]),)
                sentence = f"has {self.what} of shape {shape}, the first record {self.shape}"
                bad[i] = ("shape", sentence + self._remedy(shape))
        return bad

    def _remedy(self, shape: tuple[int, ...]) -> str:
        one = len(shape) == len(self.shape or ()) == 1 and self.what == "input"
        return "; make them equal" + (", or set pad_id to pad lists of token ids" if one else "")

    def update(self, values: Values, text: bool = False) -> None:
        """Take in rows that passed."""
        if not len(values):
            return
        if isinstance(values, Texts) or is_text(values):
            self.kind = "text"
            self.names.update(map(label_text, set(as_rows(values))))
            return
        if isinstance(values, Ragged):
            self.longest = max(self.longest, int(values.lengths.max()))
            numbers = [values.flat]
        elif isinstance(values, list):
            numbers = values
        else:
            numbers = [values]
            self.longest = max(self.longest, values.shape[1] if values.ndim > 1 else 1)
        floats = any(n.dtype.kind == "f" for n in numbers)
        self.kind = "text" if text else "float" if floats or self.kind == "float" else "int"
        if not floats:
            lows, highs = [int(n.min()) for n in numbers if n.size], [int(n.max()) for n in numbers if n.size]
            first = self.high < self.low
            self.low = min(lows) if first else min(self.low, *lows)
            self.high = max(highs) if first else max(self.high, *highs)


def is_text(values: Values) -> bool:
    """Whether a column holds text not yet encoded."""
    if isinstance(values, Texts):
        return True
    return isinstance(values, list) and bool(values) and isinstance(values[0], (str, bytes))


def every_row(values: Values, tag: str, sentence: str) -> dict[int, Reason]:
    """The same reason against all rows."""
    return dict.fromkeys(range(len(values)), (tag, sentence))


def label_text(label: str | bytes) -> str:
    """A label as text, whatever the file kept it as."""
    return label.decode("utf-8", "replace") if isinstance(label, bytes) else str(label)
