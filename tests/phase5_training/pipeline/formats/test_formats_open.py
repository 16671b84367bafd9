"""Choosing a reader: extensions, missing files, folders, lists, globs, shards."""

import json

import numpy as np
import pytest

from phase5_training.errors import DataError
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.pipeline.formats import EXTENSIONS, open_source
from phase5_training.pipeline.formats.source import ArraySource, ReadOptions


def shard(path, start, n):
    path.write_text(json.dumps([{"input": [i, i + 1], "target": i} for i in range(start, start + n)]))
    return path


def everything(source):
    return source.gather(np.arange(len(source)))


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_folders_and_globs_are_one_source(tmp_path, streaming):
    files = [shard(tmp_path / f"part{k}.json", 10 * k, 10) for k in range(3)]
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / ".hidden.json").write_text("{")
    for where in (files, tmp_path, str(tmp_path / "part*.json"), [str(f) for f in files]):
        source = open_source(where, ReadOptions(streaming=streaming))
        assert len(source) == 30
        assert everything(source).target.tolist() == list(range(30))
        picked = source.gather(np.array([25, 3, 11, 25]))
        assert picked.target.tolist() == [25, 3, 11, 25]
        assert picked.index.tolist() == [25, 3, 11, 25]
        assert source.locate(25) == (str(files[2]), 5)
        assert [i for chunk in source.iterate() for i in chunk.index] == list(range(30))


def test_a_bad_record_is_named_by_its_own_file(tmp_path):
    shard(tmp_path / "a.json", 0, 3)
    (tmp_path / "b.json").write_text('[{"input": [1, 2], "target": 0}, {"target": 1}]')
    source = open_source(tmp_path)
    assert source.locate(4) == (str(tmp_path / "b.json"), 1)
    assert [c.bad for c in source.iterate() if c.bad] == [{4: "has no 'input'"}]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data.jsn", r"unknown extension '.jsn'; did you mean .json"),
        ("data.xlsx", r"unknown extension ..xlsx.; .*known are .json"),
        ("data", r"unknown extension '\(none\)'"),
    ],
)
def test_unknown_extensions(tmp_path, name, message):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / name)


def test_missing_files_name_what_is_near(tmp_path):
    shard(tmp_path / "training.json", 0, 2)
    with pytest.raises(DataError, match=r"trainin.json: no such file; did you mean training.json\?"):
        open_source(tmp_path / "trainin.json")
    with pytest.raises(DataError, match=r"no such file; the folder holds training.json"):
        open_source(tmp_path / "x.h5")
    with pytest.raises(DataError, match=r"the folder .*/none does not exist either"):
        open_source(tmp_path / "none" / "x.h5")
    with pytest.raises(DataError, match="no file matches"):
        open_source(tmp_path / "*.h5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        open_source(tmp_path / "empty")
    with pytest.raises(DataError, match="list of data files is empty"):
        open_source([])


def test_mixed_formats_are_refused(tmp_path):
    shard(tmp_path / "a.json", 0, 2)
    np.save(tmp_path / "b.npy", np.ones(2))
    with pytest.raises(DataError, match=r"different formats \['.json', '.npy'\]"):
        open_source(tmp_path)


def test_links_out_of_a_folder_are_refused(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    folder.mkdir()
    shard(outside / "a.json", 0, 2)
    (folder / "a.json").symlink_to(outside / "a.json")
    inside = folder / "b.json"
    shard(inside, 0, 2)
    (folder / "c.json").symlink_to(inside)
    by_name = folder / "a.json"
    for where in (folder, folder / "*.json", [inside, folder / "a*"]):
        with pytest.raises(DataError, match=r"a.json: a link that leads out .*by itself"):
            open_source(where)
    assert len(open_source(by_name)) == 2
    assert len(open_source(f"{tmp_path}/d*/a.json")) == 2  # the pattern begins where both lie
    by_name.unlink()
    assert len(open_source(folder)) == len(open_source(folder / "*.json")) == 4


def test_a_pattern_finds_no_hidden_files(tmp_path):
    """The index that a first pass leaves beside a file is hidden."""
    (tmp_path / "a.jsonl").write_text('{"input": [0.5], "target": 1}\n' * 5)
    for _ in range(2):
        assert len(open_source(tmp_path / "*", ReadOptions(memory_limit=0))) == 5
    assert (tmp_path / ".a.jsonl.forge-index").is_file()
    (tmp_path / "a.jsonl").rename(tmp_path / ".b.jsonl")
    assert len(open_source(tmp_path / ".*.jsonl")) == 5


def test_sidecars_are_no_data(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    (tmp_path / "a.bin.json").write_text('{"dtype": "uint16", "vocab_size": 1000}')
    assert open_source(tmp_path).format == "bin"
    np.save(tmp_path / "x.npy", np.ones((4, 2)))
    np.save(tmp_path / "x_targets.npy", np.arange(4))
    assert open_source(str(tmp_path / "*.npy")).gather(np.array([2])).target.tolist() == [2]


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("content", [b"", b"\x00" * 3, b"garbage\xff\xfe" * 40, b"[" * 100_000])
def test_no_reader_breaks_on_what_is_not_its_format(tmp_path, extension, content):
    path = tmp_path / f"data{extension}"
    path.write_bytes(content)
    if extension == ".txt" and len(content) > 300:
        return  # any bytes are a text of bytes
    for streaming in (False, True):
        with pytest.raises(DataError) as caught:
            DataLoaderFactory.create_loader(path, DataConfig(streaming=streaming))
        assert "data" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_rows_must_match():
    with pytest.raises(DataError, match="inputs has 3 rows and targets has 2"):
        ArraySource("npy", ["x.npy"], np.ones((3, 1)), np.ones(2))


def test_streaming_gives_mapped_pages_back(tmp_path, monkeypatch):
    from phase5_training.pipeline.formats import mapped_pages

    np.save(tmp_path / "a.npy", np.arange(40.0).reshape(20, 2))
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "b.bin")
    (tmp_path / "b.bin.json").write_text('{"dtype": "uint16", "vocab_size": 1000}')
    given = []
    monkeypatch.setattr(mapped_pages, "RESIDENT", 64)
    original = mapped_pages.mapped_under

    class Watched:
        def __init__(self, mapped):
            self.mapped = mapped

        def madvise(self, advice):
            given.append(advice)
            self.mapped.madvise(advice)

    monkeypatch.setattr(mapped_pages, "mapped_under", lambda a: (m := original(a)) and Watched(m))
    for name in ("a.npy", "b.bin"):
        for options in (
            ReadOptions(memory_limit=0, block_length=9),
            ReadOptions(streaming=True, block_length=9),
        ):
            given.clear()
            source = open_source(tmp_path / name, options)
            before = source.gather(np.array([3, 1])).input.tolist()
            rows = [row for chunk in source.iterate() for row in chunk.input.tolist()]
            assert source.gather(np.array([3, 1])).input.tolist() == before == [rows[3], rows[1]]
            assert bool(given) == options.streaming
