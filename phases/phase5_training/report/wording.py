"""How figures are worded for people: the report and the progress display use the same words."""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

MISSING = "–"


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number that can be shown: no NaN, no infinity, no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """A figure in as few characters as keep its meaning.

    Example:
        >>> number(1234567), number(0.012345678), number(2.5e-6), number(None)
        ('1,234,567', '0.01235', '2.5e-06', '–')
    """
    if not is_finite(value):
        return MISSING
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}g}"
    return f"{value:.{digits}g}"


def share(value: Any) -> str:
    """A share of one as a percentage, with the second decimal only next to 0 and 100.

    Example:
        >>> share(0.4217), share(0.99954), share(1.0), share(None)
        ('42.2%', '99.95%', '100%', '–')
    """
    if not is_finite(value):
        return MISSING
    if value in (0, 1):
        return f"{value:.0%}"
    if 0 < value < 0.01 or 0.99 < value < 1:
        # Rounding must not turn "nearly all" into "all".
        return f"{min(value, 0.9999):.2%}" if value > 0.5 else f"{max(value, 0.0001):.2%}"
    return f"{value:.1%}"


def rises(figure: str) -> bool:
    """Whether more of a validation figure is better; those of one task of several have its name in front.

    Example:
        >>> rises("accuracy"), rises("parity/accuracy"), rises("loss")
        (True, True, False)
    """
    return figure.endswith(("accuracy", "r2"))


def figure_value(value: Any, figure: str) -> str:
    """A validation figure as text: accuracy as a percentage, others as they are.

    Example:
        >>> figure_value(0.95, "accuracy"), figure_value(2.1, "bits_per_byte")
        ('95.0%', '2.1')
    """
    return share(value) if figure.endswith("accuracy") else number(value)


def duration(seconds: Any) -> str:
    """A time in the two largest units that matter.

    Example:
        >>> duration(0.42), duration(42), duration(185), duration(7500), duration(200000)
        ('0.42 s', '42 s', '3 min 05 s', '2 h 05 min', '2 d 7 h')
    """
    if not is_finite(seconds) or seconds < 0:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def compact(value: Any) -> str:
    """A count in three digits and a letter.

    Example:
        >>> compact(950), compact(12340), compact(10_600_000), compact(0.25)
        ('950', '12.3k', '10.6M', '0.25')
    """
    if not is_finite(value):
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def megabytes(value: Any) -> str:
    """A size given in megabytes.

    Example:
        >>> megabytes(0.0421), megabytes(512), megabytes(20480)
        ('42.1 kB', '512 MB', '20.5 GB')
    """
    if not is_finite(value):
        return MISSING
    if abs(value) < 1:
        return f"{value * 1000:.3g} kB"
    return f"{value:.3g} MB" if abs(value) < 1000 else f"{value / 1000:.3g} GB"


def label(key: str) -> str:
    """A record's key as a label.

    Example:
        >>> label("best_val_loss"), label("samples_per_s")
        ('Best validation loss', 'Samples per s')
    """
    words = re.sub(r"\bval\b", "validation", key.replace("_", " ").strip())
    return words[:1].upper() + words[1:]


_STOP_REASONS = {
    "finished": "all epochs were done",
    "max_steps": "all steps were done",
    "max_seconds": "the time given was up",
    "early_stop": "validation had stopped improving",
    "interrupted": "it was interrupted",
    "failed": "it failed",
}


def stop_reason(reason: Any) -> str:
    """Why a run ended, in words; a reason not known here is given as it is.

    Example:
        >>> stop_reason("max_steps"), stop_reason("disk_full")
        ('all steps were done', 'disk full')
    """
    return _STOP_REASONS.get(str(reason)) or one_line(str(reason).replace("_", " "))


def one_line(text: Any, limit: int = 300) -> str:
    r"""Text without line breaks or control characters, which could move the cursor of a terminal.

    Example:
        >>> one_line("red \x1b[31m\nline")
        'red [31m line'
    """
    clean = "".join(c if c.isprintable() else " " if c.isspace() else "" for c in str(text))
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."
