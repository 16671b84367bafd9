"""A few changed files of every format, the same ones each time; `make fuzz` goes on for longer."""

from pathlib import Path

import pytest

from hostile.fuzz import fuzz
from hostile.reference import READERS


@pytest.mark.parametrize("ending", READERS)
def test_changed_files_are_refused_or_read_rightly(ending: str, tmp_path: Path) -> None:
    outcomes = fuzz(ending, 0, tmp_path, derandomize=True)
    assert sum(outcomes.values()) >= 50
    assert outcomes["kept"]
