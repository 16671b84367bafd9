"""Records of numbers: the native reader against orjson, which decides about everything else."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase5_training.pipeline.formats import native, record_parser
from phase5_training.pipeline.formats.columns import Columns
from phase5_training.pipeline.formats.json_records import Found
from phase5_training.pipeline.formats.record_parser import RecordParser

needs_compiler = pytest.mark.skipif(native.reader() is None, reason="no C++ compiler")


def found(texts: list[bytes]) -> Found:
    stops = np.cumsum([len(t) + 1 for t in texts]) - 1
    return Found(0, b",".join(texts), stops - [len(t) for t in texts], stops)


def parse(chunks, compiled):
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "reader", lambda: None)
        parser, out, start = RecordParser(), [], 0
        for texts in chunks:
            out.append(parser(found(texts), range(start, start + len(texts))))
            start += len(texts)
        return out, parser


def same(a: Columns, b: Columns) -> None:
    assert a.bad == b.bad
    assert np.array_equal(a.index, b.index)
    for one, other in ((a.input, b.input), (a.target, b.target), (a.quality, b.quality)):
        assert type(one) is type(other)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


numbers = st.one_of(
    st.integers(-5, 100).map(str),
    st.integers(-(2**63), 2**64).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["0", "-0", "0.0", "-0.0", "01", "1.", ".5", "1e5", "1E-3", "1e+2", "1e999", "+1", "1e",
                     "-", "123456789012345678", "1234567890123456789", "9007199254740993.0", "NaN", "null",
                     "true", '"1"', "1_0", "0x1", "1e-400", "5e-324"]),
)  # fmt: skip
spaces = st.sampled_from(["", " ", "\n\t "])


@st.composite
def record_texts(draw):
    width, gap = 3, draw(spaces)
    plain = draw(st.booleans())
    number = st.integers(0, 9).map(str) if plain else numbers
    inputs = ("," + gap).join(draw(st.lists(number, min_size=width, max_size=width if plain else width + 1)))
    members = [f'"input":{gap}[{gap}{inputs}{gap}]', f'"target"{gap}:{draw(number)}']
    extra = draw(st.sampled_from([
        None, None, f'"metadata": {{"quality": {draw(numbers)}}}', '"metadata": {"source": "web"}',
        '"id": "b"',
        '"id": "\\u00e9"', '"id": "é"', '"input": [1, 2, 3]', '"metadata": 3', '"quality": 0.5', '"x": [1]',
        '"metadata": {"quality": null, "n": 3}', '"quality": null', '"id": "\x01"',
    ]))  # fmt: skip
    if extra is not None:
        members.insert(draw(st.integers(0, 2)), extra)
    return ("{" + gap + f"{gap},".join(members) + gap + "}").encode()


first = b'{"input": [1, 2, 3], "target": 0}'


@needs_compiler
@given(chunks=st.lists(st.lists(record_texts(), min_size=1, max_size=4), min_size=1, max_size=5))
@settings(max_examples=400, deadline=None)
def test_the_native_reader_agrees_with_orjson(chunks):
    chunks = [[first], *chunks]
    fast, _ = parse(chunks, True)
    slow, _ = parse(chunks, False)
    for a, b in zip(fast, slow, strict=True):
        same(a, b)


@needs_compiler
@pytest.mark.parametrize("kind", ["int", "float", "mixed", "scalar", "image", "no target", "vector target"])
def test_plain_records_are_read_natively(kind, monkeypatch):
    rng = np.random.default_rng(0)
    shape = {"scalar": (), "image": (3, 4)}.get(kind, (5,))
    records = []
    for i in range(60):
        floats = kind == "float" or (kind == "mixed" and i >= 20)
        values = rng.normal(size=shape) if floats else rng.integers(-9, 10**17, shape)
        record = {"input": values.tolist(), "target": [i, i] if kind == "vector target" else i}
        if kind == "no target":
            del record["target"]
        if i % 2:
            record["metadata"] = {"quality": i / 60, "source": "web"}
        records.append(json.dumps(record).encode())
    chunks = [records[i : i + 10] for i in range(0, 60, 10)]
    slow, _ = parse(chunks, False)
    calls = []
    original = RecordParser._by_orjson
    monkeypatch.setattr(RecordParser, "_by_orjson", lambda *a, **k: calls.append(1) or original(*a, **k))
    fast, _ = parse(chunks, True)
    assert len(calls) == 1  # the first stretch, which fixes the form
    for a, b in zip(fast, slow, strict=True):
        same(a, b)


@needs_compiler
def test_records_that_are_never_plain_are_left_to_orjson(monkeypatch):
    odd = b'{"input": [1, 2, 3], "target": 0, "note": "\\n"}'
    _, parser = parse([[first]] + [[odd]] * 10, True)
    assert parser._failures == record_parser.TRIES


def test_without_a_compiler(monkeypatch, tmp_path, caplog):
    native.reader.cache_clear()
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with caplog.at_level("INFO", logger="forge"):
        assert native.reader() is None
    assert "no C++ compiler; install g++" in caplog.text
    native.reader.cache_clear()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho cannot >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.reader() is None
    native.reader.cache_clear()
    monkeypatch.setenv("FORGE_NATIVE", "0")
    assert native.reader() is None
    native.reader.cache_clear()
