"""forge inspect-data: figures against numpy over all records, in every way of reading, and what it prints."""

import json

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase5_training.cli import main
from phase5_training.errors import DataError
from phase5_training.inspection import Figures, inspect_data
from phase5_training.inspection_text import as_text
from phase5_training.pipeline.data_config import DataConfig

X = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
Y = np.arange(300) % 7 % 3
Q = np.where(np.arange(300) % 10 == 0, np.nan, np.arange(300) / 300)


def write_h5(path):
    with h5py.File(path, "w") as file:
        file["dataset/inputs"], file["dataset/targets"], file["dataset/quality"] = X, Y, Q


def write_npz(path):
    np.savez(path, inputs=X, targets=Y, quality=Q)


def write_jsonl(path):
    rows = zip(X.astype(float).tolist(), Y.tolist(), Q.tolist(), strict=True)
    path.write_text(
        "\n".join(json.dumps({"input": x, "target": y, "quality": None if q != q else q}) for x, y, q in rows)
    )


def test_arrays_of_other_names_in_hdf5(tmp_path, capsys):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw/x"], file["raw/answers"] = X, Y
    words = ["inspect-data", str(tmp_path / "a.h5"), "--json"]
    assert main([*words, "--inputs-path", "raw/x", "--targets-path", "/raw/answers"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["records"] == 300
    assert found["targets"]["target"]["classes"]["0"] == int((Y == 0).sum())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [write_h5, write_npz, write_jsonl])
def test_figures_against_numpy(tmp_path, write, streaming):
    name = "a." + write.__name__.removeprefix("write_")
    write(tmp_path / name)
    found = inspect_data([tmp_path / name], DataConfig(streaming=streaming), samples=2)
    assert (found["records"], found["readable"], found["problem"]) == (300, 300, None)
    assert found["files"] == [{"path": str(tmp_path / name), "bytes": (tmp_path / name).stat().st_size}]
    assert found["input"]["shapes"] == [{"shape": [5], "records": 300}]
    numbers = found["input"]["numbers"]
    wide = X.astype(np.float64)
    assert numbers["count"] == 1500
    assert (numbers["min"], numbers["max"]) == (wide.min(), wide.max())
    assert numbers["mean"] == pytest.approx(wide.mean(), rel=1e-12)
    assert numbers["std"] == pytest.approx(wide.std(), rel=1e-12)
    counts = {str(k): int((k == Y).sum()) for k in range(3)}
    assert found["targets"]["target"]["classes"] == counts
    stated = Q[~np.isnan(Q)]
    assert found["quality"]["without"] == 30
    bars = [bar["records"] for bar in found["quality"]["histogram"]]
    assert bars == np.histogram(stated, 10, (0, 1))[0].tolist()
    assert found["training"]["num_classes"] == 3
    assert [s["index"] for s in found["samples"]] == [0, 1]
    assert found["samples"][1]["input"] == pytest.approx(X[1].tolist())
    assert json.loads(json.dumps(found, allow_nan=False))["input"] == found["input"]


@given(st.lists(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=6), max_size=6))
@settings(max_examples=100, deadline=None)
def test_figures_in_parts(parts):
    figures = Figures()
    for part in parts:
        figures.add(np.array(part))
    flat = np.array([v for part in parts for v in part])
    kept = flat[np.isfinite(flat)]
    found = figures.result()
    assert (found["count"], found["not_finite"]) == (len(flat), len(flat) - len(kept))
    if len(kept):
        assert (found["min"], found["max"]) == (kept.min(), kept.max())
        assert found["mean"] == pytest.approx(kept.mean(), rel=1e-9, abs=1e-6)
        assert found["std"] == pytest.approx(kept.std(), rel=1e-6, abs=1e-3)


BAD = (
    '{"input": "good", "target": "a"}\n{"input": "", "target": "b"}\n{"input": "good", "target": "a"}\n'
    '{"input": 7, "target": "a"}\n{"input": "long text", "target": "\\u001b[2J", "quality": 0.1}\n{"inp'
)


def test_bad_records_are_listed_with_reasons(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(BAD)
    assert main(["inspect-data", "a.jsonl", "--quality-threshold", "0.5", "--quarantine", "q.jsonl"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for line in (
        "jsonl: 6 records, 4 can be read",
        "input: text (4); length 0 to 9, mean 4.25, std 3.192",
        "target: text (4); length 1 to 4, mean 1.75, std 1.299",
        "             a         2   50.0%  ##############################",
        "quality: 0.1 to 0.1, mean 0.1, std 0; 3 records state none",
        "record 0: input 'good'  target 'a'",
        "bad or repeated: 5 records (83.3%)",
        "  empty: 1",
        "    a.jsonl record 2 is record 0 again",
    ):
        assert line in out.splitlines(), out
    assert "\x1b" not in out
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert sorted((r["index"], r["reason"]) for r in rows) == [
        (1, "empty"), (2, "duplicate"), (3, "unreadable"), (4, "quality"), (5, "unreadable"),
    ]  # fmt: skip
    assert "line 6, byte" in rows[1]["detail"]


def test_json_and_data_that_no_run_can_use(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"input": [1, 2], "target": -1}')
    assert main(["inspect-data", "a.jsonl", "--json", "--samples", "1"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["problem"] == "a.jsonl: all 1 records were dropped (label 1)"
    assert found["training"] is None
    assert found["samples"] == [{"file": "a.jsonl", "index": 0, "input": [1, 2], "target": -1}]
    assert err == "forge: a.jsonl: all 1 records were dropped (label 1)\n"
    assert main(["inspect-data", "none.jsonl"]) == 2
    with pytest.raises(DataError, match="no such file"):
        inspect_data(["none.jsonl"])


def test_shapes_that_differ_and_many_classes(tmp_path):
    rows = [{"input": [1] * (1 + i % 7), "target": i} for i in range(1100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = inspect_data([tmp_path / "a.jsonl"], DataConfig(pad_id=0))
    assert "classes" not in found["targets"]["target"]
    assert found["input"]["different_shapes"] == 7
    assert found["input"]["shapes"][0] == {"shape": [1], "records": 158}
    assert "and 2 others" in as_text(found)
    assert found["training"]["ragged"] is True


def test_named_targets_and_long_rows(tmp_path):
    np.savez(
        tmp_path / "a.npz", inputs=np.full((4, 20), np.inf), **{"targets.b": np.ones(4), "targets.a": Y[:4]}
    )
    found = inspect_data([tmp_path / "a.npz"])
    assert sorted(found["targets"]) == ["a", "b"]
    assert found["input"]["numbers"] == {"count": 80, "not_finite": 80}
    assert found["samples"][0]["input"] == ["inf"] * 8 + ["... 20 numbers"]
    assert found["samples"][0]["target"] == {"a": 0, "b": 1.0}
    assert "no finite numbers" in as_text(found)
    assert found["problem"].endswith("all 4 records were dropped (nonfinite 4)")


HOSTILE = "a\x1b[2J\u202egnp\a\nb"
SHOWN = "a\\x1b[2J\\u202egnp\\x07\\nb"


def test_nothing_that_a_terminal_obeys_is_printed(tmp_path, capsys):
    name = f"{HOSTILE}.jsonl"
    rows = [
        {"input": HOSTILE, "targets": {HOSTILE: HOSTILE}},
        {"input": "x", "targets": {HOSTILE: "y"}},
        {"input": 1.0, "targets": {HOSTILE: "y"}},
        {"input": "x", "targets": {f"{HOSTILE}2": "y"}},
    ]
    (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    assert main(["inspect-data", name]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert all(line.isprintable() for line in out.split("\n")), out
    assert f"{SHOWN}.jsonl  " in out
    assert f"  {SHOWN} " in out, "a class"
    assert f"{SHOWN}: text" in out, "a target"
    assert main(["inspect-data", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"][0]["path"] == name
    assert HOSTILE in found["targets"][HOSTILE]["classes"]


@pytest.mark.parametrize(
    "words",
    [
        ["inspect-data", HOSTILE],
        ["inspect-data", "named.jsonl"],
        ["train", "--train-data-path", "named.jsonl", "--model", HOSTILE],
        ["resume", HOSTILE],
        [HOSTILE],
    ],
)
def test_nothing_that_a_terminal_obeys_is_in_an_error(words, tmp_path, capsys):
    record = {"input": [1.5], "targets": {"a": 1, HOSTILE: "x"}}
    other = {"input": [1.5], "targets": {HOSTILE: -1}}
    (tmp_path / "named.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps(other)}")
    assert main(words) in (0, 2)
    out, err = capsys.readouterr()
    assert len((out + err).splitlines()) >= 1
    assert all(line.isprintable() for line in (out + err).split("\n")), err
