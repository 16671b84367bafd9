"""When a figure may reach its target, from how it has gone so far."""

from __future__ import annotations

from collections.abc import Sequence

LEAST = 3  # points that a trend is taken from


def seconds_to_target(points: Sequence[tuple[float, float]], target: float, *, rising: bool) -> float | None:
    """Seconds from the last point until a figure may reach its target; None where it does not head there.

    The trend is the straight line of least squares through the newer half of the points. Curves flatten, so
    this is early rather than late.

    Args:
        points: (seconds, figure), oldest first.
        target: the figure to reach.
        rising: larger is better.

    Returns:
        0 where the newest figure is there already.

    Example:
        >>> seconds_to_target([(0, 0.1), (10, 0.2), (20, 0.3), (30, 0.4)], 0.6, rising=True)
        20.0
        >>> seconds_to_target([(0, 0.1), (10, 0.2), (20, 0.3)], 0.05, rising=False) is None
        True
    """
    if not points:
        return None
    now, newest = points[-1]
    if newest >= target if rising else newest <= target:
        return 0.0
    used = points[-max(LEAST, (len(points) + 1) // 2) :]
    if len(used) < LEAST:
        return None
    mean_x = sum(x for x, _ in used) / len(used)
    mean_y = sum(y for _, y in used) / len(used)
    spread = sum((x - mean_x) ** 2 for x, _ in used)
    if not spread:
        return None
    slope = sum((x - mean_x) * (y - mean_y) for x, y in used) / spread
    if not (slope > 0 if rising else slope < 0):
        return None
    reached_at = mean_x + (target - mean_y) / slope
    return round(max(0.0, reached_at - now), 3)
