"""Policies of single checks, the share that may be left out, duplicates; against plain loops over records."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase5_training.errors import DataError, UsageError
from phase5_training.pipeline.data_loader import DataConfig, DataLoaderFactory
from phase5_training.pipeline.formats.columns import Columns, Ragged
from phase5_training.pipeline.formats.duplicates import Duplicates
from phase5_training.pipeline.formats.policies import CHECKS
from phase5_training.quarantine import Quarantine

GOOD = {"input": [1.0, 2.0], "target": 1}
# One record for each check, and the options under which it is checked.
BAD = {
    "unreadable": ({"target": 1}, {}),
    "quality": ({**GOOD, "quality": 0.1}, {"quality_threshold": 0.5}),
    "nonfinite": ({"input": [1.0, 1e39], "target": 1}, {}),
    "shape": ({"input": [1.0], "target": 1}, {}),
    "label": ({"input": [3.0, 2.0], "target": 5}, {"num_classes": 5}),
    "duplicate": (dict(GOOD), {}),
    "empty": ({"input": "", "target": 1}, {}),
    "too_long": ({"input": "abcdefgh", "target": 1}, {"max_length": 7}),
}


def records_with(check):
    record, options = BAD[check]
    text = isinstance(record.get("input"), str)
    good = [
        {"input": f"text {i}" if text else [float(i), 2.0], "target": i % 3, "quality": 0.9} for i in range(9)
    ]
    good[1] = {**GOOD, "input": "abc" if text else GOOD["input"], "quality": 0.9}
    return [*good, record], options


def load(path, records, **options):
    path.write_text("\n".join(map(json.dumps, records)))
    dropped = []
    loader = DataLoaderFactory.create_loader(path, DataConfig(**options), quarantine=dropped.append)
    return sorted(i for batch in loader for i in batch["index"].tolist()), dropped, loader


@pytest.mark.parametrize("check", BAD)
def test_each_check_has_its_policy(tmp_path, check):
    records, options = records_with(check)
    for streaming in (False, True):
        kept, dropped, loader = load(
            tmp_path / "a.jsonl", records, record_policies={check: "drop"}, streaming=streaming, **options
        )
        assert kept == list(range(9))
        (row,) = dropped
        assert row["file"] == str(tmp_path / "a.jsonl")
        assert (row["index"], row["reason"]) == (9, check)
        assert row["detail"]
        assert loader.description()["dropped"] == {check: 1}
        with pytest.raises(DataError, match=r"a\.jsonl record 9 "):
            load(tmp_path / "a.jsonl", records, invalid_records="drop", record_policies={check: "fail"},
                 streaming=streaming, **options)  # fmt: skip


def test_checks_that_nobody_asked_for():
    assert set(CHECKS) == set(BAD) | {"kind", "target"}


def test_optional_checks_are_off_unless_named(tmp_path):
    for check in ("duplicate", "too_long"):
        records, options = records_with(check)
        kept, dropped, _ = load(tmp_path / "a.jsonl", records, invalid_records="drop", **options)
        assert (kept, dropped) == (list(range(10)), [])


def test_more_than_a_share_dropped_stops_the_run(tmp_path):
    records = [{"input": [float(i)], "target": 0, "quality": i / 10} for i in range(10)]
    kept, dropped, _ = load(tmp_path / "a.jsonl", records, quality_threshold=0.2)
    assert (kept, len(dropped)) == (list(range(2, 10)), 2)
    with pytest.raises(DataError, match=r"3 of 10 records \(30%\) would be left out \(quality 3\), more than "
                       r"max_dropped_share=0.2; .*forge inspect-data"):  # fmt: skip
        load(tmp_path / "a.jsonl", records, quality_threshold=0.3)
    kept, _, _ = load(tmp_path / "a.jsonl", records, quality_threshold=0.3, max_dropped_share=0.3)
    assert kept == list(range(3, 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record_policies": {"labels": "drop"}}, "record_policies has 'labels'; did you mean 'label'"),
        ({"record_policies": {"label": "keep"}}, "label='keep'; wanted drop or fail"),
        ({"record_policies": {"too_long": "drop"}}, "max_length is not set"),
        ({"max_dropped_share": 1.5}, r"max_dropped_share=1.5 is not in \[0, 1\]"),
        ({"num_classes": 0}, "num_classes=0 is not a whole number of at least 1"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(**options)


def test_labels_and_tokens_beyond_reason(tmp_path):
    good = [{"input": [1, 2], "target": 0}] * 9
    with pytest.raises(DataError, match=r"record 9 has target 1e\+15, more than 1048576 classes; set task="):
        load(tmp_path / "a.jsonl", [*good, {"input": [1, 2], "target": 10**15}])
    kept, _, loader = load(
        tmp_path / "a.jsonl", [*good, {"input": [1, 2], "target": 10**15}], task="regression"
    )
    assert (len(kept), loader.spec.target_kind) == (10, "float")
    with pytest.raises(DataError, match=r"holds 1000000000000 among whole numbers.*input_kind='features'"):
        load(tmp_path / "a.jsonl", [*good, {"input": [1, 10**12], "target": 0}])


numbers = st.one_of(st.floats(width=32), st.sampled_from([1e39, 0.0, 1.0]))


@given(
    rows=st.lists(st.tuples(numbers, st.integers(-2, 6), st.one_of(st.none(), st.floats(0, 1))), min_size=1),
    policies=st.dictionaries(st.sampled_from(["duplicate", "nonfinite"]), st.just("drop")),
)
@settings(max_examples=60, deadline=None)
def test_against_a_plain_loop(tmp_path_factory, rows, policies):
    """What is left, by a loop that looks at one record after another."""
    path = tmp_path_factory.getbasetemp() / "loop.npz"
    quality = np.array([np.nan if q is None else q for _, _, q in rows])
    inputs, targets = np.array([[x, 1.0] for x, _, _ in rows]), np.array([y for _, y, _ in rows])
    np.savez(path, inputs=inputs, targets=targets, quality=quality)
    wanted, seen, reasons = [], set(), []
    for i, (x, y, q) in enumerate(rows):
        with np.errstate(over="ignore"):
            x = np.float32(x)
        reason = None
        if q is not None and q < 0.5:
            reason = "quality"
        elif y < 0 or y >= 5:
            reason = "label"
        elif not math.isfinite(x):
            reason = "nonfinite"
        elif "duplicate" in policies and (x.tobytes(), y) in seen:
            reason = "duplicate"
        seen.add((x.tobytes(), y) if reason is None else None)
        reasons.append((i, reason))
        if reason is None:
            wanted.append(i)
    config = DataConfig(
        quality_threshold=0.5, num_classes=5, invalid_records="drop", max_dropped_share=1,
        record_policies=policies, shuffle=False, task="classification",
    )  # fmt: skip
    dropped = []
    if not wanted:
        with pytest.raises(DataError, match="records were dropped"):
            DataLoaderFactory.create_loader(path, config)
        return
    loader = DataLoaderFactory.create_loader(path, config, quarantine=dropped.append)
    assert [i for batch in loader for i in batch["index"].tolist()] == wanted
    assert sorted((d["index"], d["reason"]) for d in dropped) == [(i, r) for i, r in reasons if r]


@given(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=20), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_duplicates_against_a_dictionary(rows, cut):
    duplicates, first, wanted = Duplicates(), {}, {}
    for i, row in enumerate(rows):
        if tuple(row) in first:
            wanted[i] = first[tuple(row)]
        first.setdefault(tuple(row), i)
    for start in range(0, len(rows), cut):
        part = rows[start : start + cut]
        # Parts of a file may come in different types.
        kind = np.uint8 if start % 2 else np.int64
        values = Ragged.from_rows([np.array(row, kind) for row in part])
        duplicates.add(Columns(np.arange(start, start + len(part)), values, [str(len(r)) for r in part]))
    assert duplicates.repeated() == wanted


def test_the_boundary_between_input_and_target_counts():
    duplicates = Duplicates()
    duplicates.add(Columns(np.arange(2), ["ab", "a"], ["c", "bc"]))
    duplicates.add(
        Columns(np.arange(2, 4), [np.zeros((1, 2)), np.zeros((2, 1))], {"b": ["x"] * 2, "a": ["y"] * 2})
    )
    assert duplicates.repeated() == {}


def test_long_names_in_a_file_do_not_fill_the_list(tmp_path):
    _, dropped, _ = load(tmp_path / "a.jsonl", [GOOD] * 9 + [{"k" * 10**6: 1}], invalid_records="drop")
    assert len(dropped[0]["detail"]) < 400
    quarantine = Quarantine()
    quarantine.append({"file": "\udcff", "index": 1})
    assert list(quarantine) == [{"file": "\udcff", "index": 1}]
    quarantine.append({"file": "b", "index": 2})
    assert [row["index"] for row in quarantine] == [1, 2]
