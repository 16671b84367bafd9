"""The errors a user of Forge can meet, and the "did you mean" lookup their messages use.

Every message is one line: what was found, where, what was wanted, and the remedy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def printable(text: str) -> str:
    r"""Text with escapes for all that a terminal would obey or not show.

    Names, keys and labels come from data files: escape sequences could rewrite what was printed before,
    and overrides of the writing direction could show another name than there is.

    >>> printable("red \x1b[31m\nline \u202e")
    'red \\x1b[31m\\nline \\u202e'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def in_one_line(text: str) -> str:
    r"""Text as one line for a terminal: runs of white space become a space, see :func:`printable`.

    >>> in_one_line("a\n  b\a")
    'a b\\x07'
    """
    # str.split takes some control characters for white space.
    return printable(re.sub(r"[ \t\r\n]+", " ", text).strip())


class ForgeError(Exception):
    r"""Base of every error Forge raises on purpose; ``str(error)`` is one line.

    ``exit_code`` is what the command line returns when the error ends the program.

    >>> str(ForgeError("batch_size=0 is not positive;\n use batch_size=1 or more"))
    'batch_size=0 is not positive; use batch_size=1 or more'
    """

    exit_code: int = 1

    def __str__(self) -> str:
        return in_one_line(super().__str__())


class UsageError(ForgeError, ValueError):
    """A bad argument, option or configuration key: exit code 2.

    >>> UsageError("epochs=-1 is negative; use epochs=0 or more").exit_code
    2
    """

    exit_code = 2


class DataError(ForgeError, ValueError):
    """A bad data file or record, found before training: exit code 2.

    One that appears during training (the data changed, or can be read once only) is raised on as
    :class:`RunFailed` by the factory, with exit code 1.

    >>> DataError("data.json record 3: 'input' is missing; add it or drop the record").exit_code
    2
    """

    exit_code = 2


class RunFailed(ForgeError, RuntimeError):  # noqa: N818 - an outcome, and the name callers read
    """A run that started and could not finish: exit code 1.

    >>> RunFailed("loss was NaN for 100 steps in a row; lower the learning rate").exit_code
    1
    """

    exit_code = 1


def first_line(error: BaseException) -> str:
    r"""What an exception says, cut to its first line; its type where it says nothing.

    >>> first_line(ValueError("a\nb")), first_line(MemoryError())
    ('a', 'MemoryError')
    """
    lines = re.split(r"[\r\n]+", str(error).strip())
    return printable(lines[0]) or type(error).__name__


class OtherRankFailed(RunFailed):
    """What the first of several processes did for all failed there; it says why itself."""


def nearest_match(name: str, choices: Iterable[str]) -> str | None:
    """The choice closest in spelling to ``name``, or None when nothing is near.

    Args:
        name: what the user wrote; case and the difference between ``-`` and ``_`` are ignored.
        choices: the names that exist.

    Returns:
        One of ``choices`` as it was given, or None.

    Example:
        >>> nearest_match("learning_rat", ["learning_rate", "epochs"])
        'learning_rate'
        >>> nearest_match("Early-Stop", ["epoch_end", "early_stop"])
        'early_stop'
        >>> nearest_match("zebra", ["learning_rate", "epochs"]) is None
        True
    """
    folded: dict[str, str] = {}
    for choice in choices:
        folded.setdefault(_fold(choice), choice)
    found = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def _fold(name: str) -> str:
    return name.strip().lower().replace("-", "_")
