"""Parquet, Arrow and CSV, written by pyarrow and by the csv module."""

import csv
import sys

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from phase5_training.errors import DataError, UsageError
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.pipeline.formats import open_source
from phase5_training.pipeline.formats.columns import as_rows
from phase5_training.pipeline.formats.source import ReadOptions

N = 100
MODES = [ReadOptions(), ReadOptions(memory_limit=0), ReadOptions(streaming=True, window=64)]


def write(path, columns):
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path, row_group_size=15)
    elif path.name.startswith("stream"):
        with pa.ipc.new_stream(str(path), table.schema) as sink:
            sink.write_table(table, max_chunksize=15)
    else:
        with pa.ipc.new_file(str(path), table.schema) as sink:
            sink.write_table(table, max_chunksize=15)
    return path


rng = np.random.default_rng(0)
INPUTS = {
    "lists": rng.integers(0, 99, (N, 4)).tolist(),
    "fixed lists": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(N * 3.0)), 3),
    "ragged": [[i] * (1 + i % 3) for i in range(N)],
    "nested": (rng.integers(-99, 99, (N, 2, 3)) / 4).tolist(),
    "text": ["x" * i for i in range(N)],
    "numbers": pa.array(np.arange(N, dtype=np.int16)),
    "dictionary": pa.array(["a", "bc"] * (N // 2)).dictionary_encode(),
}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow", "a.feather"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("options", MODES, ids=["memory", "limited", "streaming"])
def test_every_kind_of_column_in_every_mode(tmp_path, name, kind, options):
    table = pa.table({"input": INPUTS[kind], "target": np.arange(N), "quality": np.arange(N) / N})
    source = open_source(write(tmp_path / name, table), options)
    wanted = table["input"].to_pylist()
    assert len(source) == N
    walked = [row for chunk in source.iterate() for row in as_rows(chunk.input)]
    assert [w if isinstance(w, str) else np.asarray(w).tolist() for w in walked] == wanted
    for order in ([3], [20, 14, 14, 15], [40, 30]):
        got = source.gather(np.array(order))
        assert got.target.tolist() == got.index.tolist() == order
        assert np.allclose(got.quality, np.array(order) / N)
        rows = [r if isinstance(r, str) else np.asarray(r).tolist() for r in as_rows(got.input)]
        assert rows == [wanted[i] for i in order]


def test_several_targets_and_other_columns(tmp_path):
    table = {"text": ["a", "b"], "targets.x": [1, 2], "targets.y": [0.5, 1.5], "note": ["n", "m"]}
    columns = open_source(write(tmp_path / "a.parquet", table)).gather(np.array([1, 0]))
    assert columns.input == ["b", "a"]
    assert {k: v.tolist() for k, v in columns.target.items()} == {"x": [2, 1], "y": [1.5, 0.5]}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("options", MODES, ids=["memory", "limited", "streaming"])
def test_columns_of_a_table_are_features(tmp_path, name, options):
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",")
        writer.writerow(["width", "height", "label"])
        writer.writerows([i / 2, i, i % 3] for i in range(N))
    source = open_source(tmp_path / name, options)
    list(source.iterate())
    got = source.gather(np.array([7, 2]))
    assert got.input.tolist() == [[3.5, 7], [1, 2]]
    assert got.target.tolist() == [1, 2]


def test_text_of_a_table(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ['with, comma\nand "quotes"', "no"], ["ü", "yes"]])
    columns = open_source(tmp_path / "a.csv").gather(np.array([0, 1]))
    assert columns.input == ['with, comma\nand "quotes"', "ü"]
    assert columns.target == ["no", "yes"]


@pytest.mark.parametrize("options", MODES, ids=["memory", "limited", "streaming"])
def test_what_is_missing_is_a_bad_record(tmp_path, options):
    table = {"input": [[1, 2], None, [3, 4], [5, None], [6, 7]], "target": [0, 1, None, 1, 0]}
    source = open_source(write(tmp_path / "a.parquet", table), options)
    bad = {k: v for chunk in source.iterate() for k, v in chunk.bad.items()}
    assert sorted(bad) == [1, 2, 3]
    assert "has nothing as 'input'" in bad[1]
    assert "has nothing within 'input'" in bad[3]
    assert source.gather(np.array([4, 0])).input.tolist() == [[6, 7], [1, 2]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"input": pa.array([1], pa.timestamp("s"))}, r"column 'input' holds timestamp.*; wanted numbers"),
        ({"input": [["a"]]}, "lists of string; wanted lists of numbers"),
        ({"input": [[[1], [2, 3]]]}, "nested lists of different lengths"),
        ({"name": ["a"], "label": [1]}, r"no column is named 'input', and \['name'\] are no numbers"),
        ({"input": [1], "text": ["a"]}, "has both 'input' and 'text'"),
        ({"input": pa.array([], pa.int64())}, "holds no records"),
    ],
)
def test_tables_that_hold_no_records_of_ours(tmp_path, table, message):
    with pytest.raises(DataError, match=rf"a\.parquet: .*{message}"):
        open_source(write(tmp_path / "a.parquet", table))


def test_damage_is_told_in_one_line(tmp_path):
    path = write(tmp_path / "a.parquet", {"input": [[1, 2]] * 50, "target": [0] * 50})
    raw = path.read_bytes()
    for broken in (raw[:-20], raw[:40], b"", raw[:60] + b"\xff" * 60 + raw[120:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read \(") as caught:
            list(open_source(path).iterate())
        assert "\n" not in str(caught.value)
    (tmp_path / "b.csv").write_text("x,label\n1,2\n3\n")
    with pytest.raises(DataError, match=r"b\.csv: cannot be read \("):
        open_source(tmp_path / "b.csv")


@pytest.mark.parametrize("workers", [0, 2])
def test_row_groups_are_shuffled_and_read_once(tmp_path, workers):
    table = {"input": np.arange(N * 2.0).reshape(N, 2).tolist(), "target": np.arange(N) % 3}
    path = write(tmp_path / "a.parquet", table)
    options = {"batch_size": 8, "memory_limit_mb": 0, "shuffle_buffer": 16, "num_workers": workers}
    loader = DataLoaderFactory.create_loader(path, DataConfig(**options))
    for _ in range(2):
        batches = list(loader)
        index = np.concatenate([b["index"] for b in batches])
        assert sorted(index.tolist()) == list(range(N))
        assert np.array_equal(np.concatenate([b["input"] for b in batches])[:, 0], 2.0 * index)


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"input": [1]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"need the pyarrow package: pip install 'forge-training\[arrow\]'"):
        open_source(path)
