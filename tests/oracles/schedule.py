"""The learning-rate plan written as a table: one list of multipliers for a whole run."""

from __future__ import annotations

import math
from fractions import Fraction


def cosine_tail(length, final):
    """From 1 to final, both ends included; a tail of one step stays at 1."""
    if length == 1:
        return [1.0]
    return [final + (1 - final) * math.cos(math.pi / 2 * k / (length - 1)) ** 2 for k in range(length)]


def linear_tail(length, final):
    if length == 1:
        return [1.0]
    return [1 - k * (1 - final) / (length - 1) for k in range(length)]


def phase_table(warmup, acceleration, consolidation, total, up=5.0, down=0.2, final=0.01):
    ramp = [k / warmup for k in range(1, warmup + 1)]
    rest = total - warmup - acceleration - consolidation
    return ramp + [up] * acceleration + [down] * consolidation + cosine_tail(rest, final)


def shares(total, lengths):
    """The exact rational length of each of the four phases of a run too short for ``lengths``."""
    room = Fraction(total) * Fraction(8000, 18000)
    scaled = [room * length / sum(lengths) for length in lengths]
    return [*scaled, total - sum(scaled)]
