"""Every case of the table: refused with one line, or kept out of the data, within bounds."""

import re
from pathlib import Path
from typing import Any

import pytest

from hostile.cases import CASES, Case, ran
from hostile.sandbox import Outcome, run
from phase5_training.pipeline.data_loader import DataConfig, DataLoaderFactory

MODES = {
    "loaded": {},
    "in place": {"memory_limit_mb": 0},
    "streamed": {"streaming": True},
}
# Bytes a reader may take: its own buffers (a record of 64 MB twice), and so many times the file.
FLOOR, SHARE = 256 << 20, 64


def read(where: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Read all of it as training would."""
    dropped: list[dict] = []
    loader = DataLoaderFactory.create_loader(where, DataConfig(**options), quarantine=dropped.append)
    rows = {}
    for batch in loader:
        rows |= {int(i): row.clone() for i, row in zip(batch["index"], batch["input"], strict=True)}
    return {"rows": rows, "dropped": dropped}


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.is_file())


def outcome_of(where: Any, folder: Path, options: dict[str, Any]) -> Outcome:
    found = run(lambda: read(where, options), folder)
    assert found.ended in ("returned", "raised"), found.ended
    assert not found.forbidden
    assert not ran(folder).exists()
    assert found.peak <= FLOOR + SHARE * size_of(folder), f"took {found.peak >> 20} MB"
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_file(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    where = case.write(folder)
    for mode, options in MODES.items():
        found = outcome_of(where, folder, {**case.options, **options})
        if found.error not in ("DataError", "NoListError"):
            pytest.fail(
                f"{mode}: {found.error} {found.message[:200]} {str(found.value)[:200]}\n{found.trace}"
            )
        if not re.search(case.refused, found.message):
            pytest.fail(f"{mode}: {found.message} | wanted {case.refused}")
        assert len(found.message) < 1000
        assert "\n" not in found.message


@pytest.mark.parametrize("case", [c for c in CASES if c.dropped is not None], ids=lambda case: case.name)
def test_bad_record_is_left_out(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    where = case.write(folder)
    for mode, options in MODES.items():
        drop = {"invalid_records": "drop", "max_dropped_share": 1.0}
        found = outcome_of(where, folder, {**case.options, **options, **drop})
        if found.ended != "returned":
            pytest.fail(f"{mode}: {found.error} {found.message[:200]}\n{found.trace}")
        assert case.dropped is not None
        for record in found.value["dropped"]:
            assert re.fullmatch(case.dropped[record["index"]], record["reason"]), record
            assert Path(record["file"]) == where
            assert len(record["detail"]) < 400
        assert {record["index"] for record in found.value["dropped"]} == set(case.dropped), mode
        assert 0 in found.value["rows"]
        assert all(row.tolist()[0] == 1.0 for row in found.value["rows"].values())
