"""What is checked of every record, and whether a record that fails is left out or ends the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from phase5_training.errors import UsageError, nearest_match

Policy = Literal["drop", "fail"]

CHECKS: dict[str, str] = {
    "unreadable": "cannot be parsed, or is of another form than the first record",
    "quality": "its metadata state a quality below quality_threshold",
    "nonfinite": "a NaN or infinity, as float32",
    "shape": "another shape than the first record",
    "kind": "numbers where others have text, or values that are neither",
    "target": "other targets than the first record",
    "label": "a class below 0, or beyond num_classes",
    "empty": "nothing in it",
    "too_long": "more tokens than max_length; without a policy it is cut",
    "duplicate": "the same input and target as an earlier record; without a policy it stays",
}
OPTIONAL = ("too_long", "duplicate")  # done only where a policy names them


def check_policies(policies: Mapping[str, Any], max_length: int | None) -> None:
    """Whether policies name checks and what to do.

    Raises:
        UsageError: an unknown check or policy, or too_long without max_length.

    Example:
        >>> check_policies({"nonfinte": "drop"}, None)
        Traceback (most recent call last):
        phase5_training.errors.UsageError: record_policies has 'nonfinte'; did you mean 'nonfinite'?
    """
    for name, policy in policies.items():
        if name not in CHECKS:
            near = nearest_match(str(name), CHECKS)
            hint = f"did you mean {near!r}?" if near else f"wanted one of {', '.join(CHECKS)}"
            raise UsageError(f"record_policies has {name!r}; {hint}")
        if policy not in ("drop", "fail"):
            raise UsageError(f"record_policies has {name}={policy!r}; wanted drop or fail")
    if "too_long" in policies and max_length is None:
        raise UsageError("record_policies has too_long and max_length is not set; say how long is too long")


def policy_of(check: str, policies: Mapping[str, Any], otherwise: Policy) -> Policy:
    """What to do with a record that fails a check.

    Args:
        check: one of `CHECKS`.
        policies: what the user named.
        otherwise: for the checks that are not named; quality is dropped unless named, since a threshold
            asks for that.

    Example:
        >>> policy_of("shape", {"label": "drop"}, "fail"), policy_of("quality", {}, "fail")
        ('fail', 'drop')
    """
    return policies.get(check, "drop" if check == "quality" else otherwise)
