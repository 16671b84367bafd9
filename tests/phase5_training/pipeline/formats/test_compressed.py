"""Compressed JSON, written by the compressors themselves; every mode gives the same records."""

import gzip
import json
import sys

import numpy as np
import pytest
import zstandard

from phase5_training.errors import DataError, UsageError
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.pipeline.formats import compressed, forward, open_source
from phase5_training.pipeline.formats.source import ReadOptions

PACKERS = {"gz": gzip.compress, "zst": zstandard.compress}
MODES = [ReadOptions(), ReadOptions(memory_limit=0), ReadOptions(streaming=True, window=16)]


def write(path, records):
    text = json.dumps({"samples": records}) if ".json." in path.name else "\n".join(map(json.dumps, records))
    path.write_bytes(PACKERS[path.suffix[1:]](text.encode()))
    return path


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    monkeypatch.setattr(compressed, "CHUNK_ROWS", 9)


@pytest.mark.parametrize("kind", ["numbers", "text"])
@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson.zst"])
@pytest.mark.parametrize("options", MODES, ids=["memory", "limited", "streaming"])
def test_every_compression_in_every_mode(tmp_path, name, options, kind):
    inputs = [[i, i * i] if kind == "numbers" else "x" * i for i in range(100)]
    path = write(tmp_path / name, [{"input": x, "target": i} for i, x in enumerate(inputs)])
    for _ in range(2):  # the second time with what the first has kept
        source = open_source(path, options)
        walked = [t for c in source.iterate() for t in c.target.tolist()]
        assert walked == list(range(100))
        for wanted in ([0], [20, 11, 13, 13], [40, 30], [99]):
            got = source.gather(np.array(wanted))
            assert got.target.tolist() == got.index.tolist() == wanted
            assert [x if isinstance(x, str) else x.tolist() for x in got.input] == [inputs[i] for i in wanted]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["numbers", "text"])
def test_the_loader_takes_the_access_that_there_is(tmp_path, kind, workers):
    inputs = [[i, i] if kind == "numbers" else "ab" * i for i in range(1, 301)]
    path = write(tmp_path / "a.jsonl.gz", [{"input": x, "target": i % 3} for i, x in enumerate(inputs)])
    options = {"batch_size": 8, "memory_limit_mb": 0, "shuffle_buffer": 64, "num_workers": workers}
    loader = DataLoaderFactory.create_loader(path, DataConfig(**options))
    assert loader.mode == ("random access" if kind == "numbers" else "streaming")
    epoch = list(loader)
    index = np.concatenate([b["index"] for b in epoch])
    assert sorted(index.tolist()) == list(range(300))
    assert (np.abs(index - np.arange(300)).max() < 64) == (kind == "text")
    loader.set_position(0, 20)
    again = np.concatenate([b["index"] for b in loader])
    assert again.tolist() == index[160:].tolist()


def test_several_files_of_one_kind(tmp_path):
    write(tmp_path / "a.jsonl.zst", [{"input": [1], "target": 0}])
    write(tmp_path / "b.jsonl.zst", [{"input": [2], "target": 1}])
    assert open_source(tmp_path).gather(np.array([1, 0])).input.tolist() == [[2], [1]]


@pytest.mark.parametrize("suffix", PACKERS)
def test_damage_is_told_with_its_place(tmp_path, suffix):
    path = write(tmp_path / f"a.jsonl.{suffix}", [{"input": [i], "target": i} for i in range(50_000)])
    raw = path.read_bytes()
    for broken in (raw[: len(raw) // 2], raw[:9] + b"\xff" * 40 + raw[49:], b"not compressed"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.jsonl\.\w+: damaged or cut short after \d+ bytes"):
            open_source(path)


def test_what_grows_out_of_proportion_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"input": 1}\n' * 200_000))
    monkeypatch.setattr(compressed, "LEAST_GROWTH", 1 << 10)
    with pytest.raises(DataError, match=r"grows to more than \d+ bytes, 1100 times its size"):
        open_source(path)


def test_what_does_not_fit_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "narrowed", lambda chunk: chunk)
    path = write(tmp_path / "a.jsonl.gz", [{"input": [i] * 100, "target": i} for i in range(1000)])
    assert open_source(path, ReadOptions(memory_limit=100 * 8 * 1001 + 9000)).access == "memory"
    assert open_source(path, ReadOptions(memory_limit=100 * 8 * 500)).access == "parsed"


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.zst", [{"input": [1], "target": 0}])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UsageError, match=r"need the zstandard package: pip install 'forge-training\[zstd\]'"):
        open_source(path)


def test_the_name_of_a_compressed_file_says_what_is_in_it(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match=r"unknown extension '.gz'"):
        open_source(tmp_path / "a.gz")
