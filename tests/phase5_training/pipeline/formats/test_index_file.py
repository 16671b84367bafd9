"""Side files: used when they are sound and of this very file, made again otherwise, never in the way."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from phase5_training.errors import DataError
from phase5_training.pipeline.formats import index_file, open_source
from phase5_training.pipeline.formats import json as json_reader
from phase5_training.pipeline.formats.columns import as_rows
from phase5_training.pipeline.formats.index_file import places
from phase5_training.pipeline.formats.json import JsonRecords
from phase5_training.pipeline.formats.source import ReadOptions

BIG = ReadOptions(memory_limit=0)  # nothing fits: all is indexed
N = 50


def record(i, kind):
    return {
        "numbers": {"input": [i, 2 * i], "target": i % 3},
        "floats": {"input": [i / 2, 1.5], "target": i / 4, "quality": i / 100},
        "growing": {"input": [10 ** (i // 4), -i], "target": i if i < 20 else i + 0.5},
        "named": {"input": i, "target": {"a": i, "b": [i / 2, 0.25]}},
        "text": {"input": "ab" * i, "target": str(i % 3)},
        "ragged": {"input": [1] * (1 + i % 4), "target": i},
    }[kind]


KINDS = ["numbers", "floats", "growing", "named", "text", "ragged"]


def write(path, kind="numbers", n=N):
    records = [record(i, kind) for i in range(n)]
    if path.suffix == ".json":
        path.write_text(json.dumps({"samples": records}))
    else:
        path.write_text("\n".join(map(json.dumps, records)))
    return path


def contents(source):
    """Every record: from a walk, and gathered backwards."""
    walked = [(int(i), row, t) for c in source.iterate() for i, row, t in _rows(c)]
    order = np.arange(len(source))[::-1]
    gathered = sorted(_rows(source.gather(order)), key=lambda r: r[0])
    assert repr(walked) == repr(gathered)
    return repr(walked)


def _rows(columns):
    target = columns.target
    if isinstance(target, dict):
        target = list(zip(*(as_rows(v) for v in target.values()), strict=True))
    targets = [tuple(map(_plain, t)) if isinstance(t, tuple) else _plain(t) for t in as_rows(target)]
    inputs = map(_plain, as_rows(columns.input))
    return [(int(i), row, t) for i, row, t in zip(columns.index, inputs, targets, strict=True)]


def _plain(value):
    return value if isinstance(value, str) else np.asarray(value, np.float64).tolist()


@pytest.fixture(autouse=True)
def small_portions(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("phase5_training.pipeline.formats.json.CHUNK_ROWS", 7)


@pytest.mark.parametrize("extension", ["json", "jsonl"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_and_later_openings_give_the_same(tmp_path, kind, extension):
    path = write(tmp_path / f"a.{extension}", kind)
    plain = contents(open_source(path))
    first = contents(open_source(path, BIG))
    (side,) = tmp_path.glob(".a.*")
    assert side == places(path)[0]
    before = side.stat().st_mtime_ns
    again = open_source(path, BIG)
    assert contents(again) == first == plain
    assert side.stat().st_mtime_ns == before  # and not made again
    has_rows = kind not in ("text", "ragged")
    assert again.access == ("mapped" if has_rows else "parsed")
    assert again.describe()["index"] == str(side)
    assert not list(tmp_path.glob("*.part"))


def test_rows_take_the_narrowest_type(tmp_path):
    source = open_source(write(tmp_path / "a.json", "growing"), BIG)
    list(source.iterate())
    assert source._index.rows.dtype["input"].base == np.int64
    assert source._index.rows.dtype["target"] == np.float32
    source = open_source(write(tmp_path / "b.json", "numbers"), BIG)
    list(source.iterate())
    assert source._index.rows.dtype["input"].base == np.uint8


def test_damage_anywhere_is_found(tmp_path):
    path = write(tmp_path / "a.jsonl")
    wanted = contents(open_source(path, BIG))
    side = places(path)[0]
    sound = side.read_bytes()
    rng = np.random.default_rng(0)
    broken = [b"", b"x", sound[:-1], sound[: len(sound) // 2], sound + b"x", b"\0" * len(sound)]
    for place in [*rng.integers(0, len(sound), 60).tolist(), 0, len(sound) - 1, len(sound) - 20]:
        broken.append(sound[:place] + bytes([sound[place] ^ 1 << rng.integers(0, 8)]) + sound[place + 1 :])
    for raw in broken:
        side.write_bytes(raw)
        assert contents(open_source(path, BIG)) == wanted
        assert side.read_bytes() == sound  # made again


def forged(sound, **changes):
    """A side file with another footer, checksums as they were."""
    end = len(index_file.MAGIC) + 8
    length = int.from_bytes(sound[-end : -len(index_file.MAGIC)], "little")
    footer = json.loads(sound[-end - length : -end]) | changes
    raw = json.dumps(footer).encode()
    return sound[: -end - length] + raw + len(raw).to_bytes(8, "little") + index_file.MAGIC


@pytest.mark.parametrize(
    "changes",
    [
        {"count": N - 1}, {"count": -1}, {"count": "50"}, {"count": 2**62}, {"sections": {}}, {"fields": []},
        {"fields": [["input", "object", [2]], ["target", "uint8", []]]},
        {"fields": [["input", "uint8", [2**62, 2**62]], ["target", "uint8", []]]},
        {"fields": [["inputs", "uint8", [2]], ["target", "uint8", []]]},
        {"fields": [["input", "uint8", [2]], ["input", "uint8", []]]},
        {"fields": [["input", "uint8", [-2]]]}, {"fields": 3}, {"bad": {"50": "x"}}, {"bad": [3]},
        {"key": None}, {"sections": {"rows": {"offset": 12, "size": 3, "crc32": 0}}},
    ],
)  # fmt: skip
def test_forged_footers_are_refused(tmp_path, changes):
    path = write(tmp_path / "a.json")
    wanted = contents(open_source(path, BIG))
    side = places(path)[0]
    sound = side.read_bytes()
    side.write_bytes(forged(sound, **changes))
    assert contents(open_source(path, BIG)) == wanted
    assert side.read_bytes() == sound


def test_another_version_of_the_file_gets_another_index(tmp_path):
    path = write(tmp_path / "a.json")
    first = contents(open_source(path, BIG))
    stat = path.stat()
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"[49, 98]", b"[48, 98]"))  # as long as before, and as old
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert contents(open_source(path, BIG)) != first
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert contents(open_source(path, BIG)) == first


def test_what_streaming_made_lacks_rows_and_is_made_again_for_random_access(tmp_path):
    path = write(tmp_path / "a.json")
    stream = open_source(path, ReadOptions(streaming=True))
    first = contents(stream)
    assert stream.access == "parsed"
    source = open_source(path, BIG)
    assert contents(source) == first
    assert source.access == "mapped"
    assert contents(open_source(path, ReadOptions(streaming=True))) == first


def test_a_read_only_folder_keeps_its_index_in_the_cache(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json")
    make = index_file.tempfile.NamedTemporaryFile

    def refuse(*arguments, dir, **keywords):
        if dir == tmp_path:
            raise PermissionError(13, "Permission denied")
        return make(*arguments, dir=dir, **keywords)

    monkeypatch.setattr(index_file.tempfile, "NamedTemporaryFile", refuse)
    wanted = contents(open_source(path, BIG))
    beside, cached = places(path)
    assert not beside.exists()
    assert cached.is_relative_to(tmp_path / "cache")
    assert cached.exists()
    assert contents(open_source(path, BIG)) == wanted


def test_without_any_place_it_stays_in_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json")
    wanted = contents(open_source(path, BIG))
    places(path)[0].unlink()

    def refuse(*arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index_file.tempfile, "NamedTemporaryFile", refuse)
    source = open_source(path, BIG)
    assert contents(source) == wanted
    assert "cannot be written (Permission denied)" in source.describe()["index"]
    monkeypatch.undo()
    monkeypatch.setattr(index_file.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    source = open_source(path, BIG)
    assert contents(source) == wanted
    assert "no room for it" in source.describe()["index"]


@pytest.mark.parametrize("failing", ["RowFile._append", "IndexWriter._put_in_place"])
def test_a_full_disk_leaves_an_index_in_memory_and_no_leftovers(tmp_path, monkeypatch, failing):
    path = write(tmp_path / "a.json")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"phase5_training.pipeline.formats.index_file.{failing}", full)
    source = open_source(path, BIG)
    wanted = contents(open_source(path))
    assert contents(source) == wanted
    assert "No space left" in source.describe()["index"]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.json"]


def test_an_abandoned_walk_leaves_nothing(tmp_path):
    source = open_source(write(tmp_path / "a.json"), BIG)
    walk = source.iterate()
    next(walk)
    assert list(tmp_path.glob(".*.part"))
    walk.close()
    assert not list(tmp_path.glob(".*"))
    stale = places(tmp_path / "a.json")[0].with_name(".a.json.forge-index.x.part")
    young = stale.with_name(".a.json.forge-index.y.part")
    stale.touch(), young.touch()
    os.utime(stale, (time.time() - 2 * 86400,) * 2)
    list(source.iterate())
    assert not stale.exists()
    assert young.exists()


def _open_at_once(path, barrier, results):
    barrier.wait()
    results.put(contents(open_source(path, BIG)))


def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path):
    path = write(tmp_path / "a.json", n=3000)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_open_at_once, args=(path, barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(set(found)) == 1
    assert contents(open_source(path, BIG)) == found[0]
    assert not list(tmp_path.glob(".*.part"))


def test_unreadable_records_are_remembered(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(record(i, "numbers")) for i in range(N)]
    lines[9], lines[30] = '{"input": [1, 2}', '{"input": [1], "target": "x"}'
    path.write_text("\n".join(lines))

    def bad(source):
        return {p: r for c in source.iterate() for p, r in c.bad.items()}

    first = open_source(path, BIG)
    wanted = bad(first)
    assert sorted(wanted) == [9, 30]
    assert "line 10, byte" in wanted[9]
    again = open_source(path, BIG)
    assert again._index.path
    assert bad(again) == wanted
    assert again.gather(np.array([31, 8])).input.tolist() == [[31, 62], [8, 16]]
    assert [i for c in again.iterate() for i in c.index.tolist()] == [i for i in range(N) if i not in wanted]
    places(path)[0].unlink()
    monkeypatch.setattr(index_file, "MAX_BAD", 1)
    source = open_source(path, BIG)
    assert bad(source) == wanted
    assert "more than 1 records are unreadable" in source.describe()["index"]
    assert bad(source).keys() == wanted.keys()


def test_a_source_travels_to_another_process(tmp_path):
    import pickle

    path = write(tmp_path / "a.json")
    source = open_source(path, BIG)
    wanted = contents(source)
    assert contents(pickle.loads(pickle.dumps(source))) == wanted


def test_links_and_folders_of_shards(tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(3):
        write(tmp_path / "d" / f"{i}.jsonl", n=5 + i)
    source = open_source(tmp_path / "d", BIG)
    assert len(source) == 18
    assert len(contents(source)) > 100
    again = open_source(tmp_path / "d", BIG)  # the side files there are no data files
    assert contents(again) == contents(source)
    assert isinstance(again._shards[0], JsonRecords)


def forge(path, change):
    """Give the side file of a data file other places of its records, with the right checksum."""
    side = places(path)[0]
    raw = side.read_bytes()
    end = len(index_file.MAGIC) + 8
    length = int.from_bytes(raw[-end : 8 - end], "little")
    footer = json.loads(raw[-end - length : -end])
    at = footer["sections"]["spans"]["offset"]
    spans = np.frombuffer(raw[at : -end - length], np.int64).reshape(-1, 2).copy()
    change(spans)
    footer["sections"]["spans"]["crc32"] = zlib.crc32(spans.tobytes())
    text = json.dumps(footer).encode()
    side.write_bytes(raw[:at] + spans.tobytes() + text + len(text).to_bytes(8, "little") + index_file.MAGIC)


@pytest.mark.parametrize("span", [(0, 1 << 60), (-5, 10), (10, 5), (1 << 62, (1 << 62) + 5)])
def test_an_index_that_came_with_its_file_names_no_place_elsewhere(tmp_path, span):
    path = write(tmp_path / "a.jsonl", "ragged")
    contents(open_source(path, BIG))
    forge(path, lambda spans: spans.__setitem__(7, span))
    with pytest.raises(DataError, match=r"a.jsonl: .*forge-index .*; delete"):
        open_source(path, BIG).gather(np.array([7]))


def test_an_index_whose_records_share_their_text_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "ragged")
    source = open_source(path, BIG)
    contents(source)
    assert source.gather(np.array([7, 7, 3])).index.tolist() == [7, 7, 3]
    forge(path, lambda spans: spans.__setitem__(slice(None), spans[7]))
    with pytest.raises(DataError, match="overlap; delete it"):
        open_source(path, BIG)
    forge(path, lambda spans: spans.__setitem__(slice(None), spans[7]))
    # Nor where each is sought by itself.
    monkeypatch.setattr(json_reader, "FIRST", 1)
    monkeypatch.setattr(json_reader, "READ_BYTES", 1)
    with pytest.raises(DataError, match="overlap; delete it"):
        list(open_source(path, BIG).iterate())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_the_place_of_the_index_is_not_waited_for(tmp_path):
    path = write(tmp_path / "a.jsonl")
    os.mkfifo(places(path)[0])
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for a writer"))
    signal.alarm(20)
    try:
        assert len(contents(open_source(path, BIG))) > 100
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert places(path)[0].is_file()  # what was made takes its place


def test_a_file_is_closed_with_its_source(tmp_path):
    path = write(tmp_path / "a.jsonl", "text")
    source = open_source(path, BIG)
    source.gather(np.array([3, 1]))
    descriptor = source._descriptor()
    assert os.readlink(f"/proc/self/fd/{descriptor}") == str(path)
    del source
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_program_that_ends_with_an_open_source_says_nothing(tmp_path):
    path = write(tmp_path / "a.jsonl")
    program = (
        "from phase5_training.pipeline.data_loader import DataConfig, DataLoaderFactory\n"
        f"loader = DataLoaderFactory.create_loader({str(path)!r}, DataConfig(streaming=True))\n"
        "batches = list(loader)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
