"""Plain records: the native reader against orjson, which decides about everything else."""

import json
from functools import cache

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase5_training.pipeline.formats import native, record_parser
from phase5_training.pipeline.formats.columns import Columns, Ragged, Texts
from phase5_training.pipeline.formats.json_checks import MAX_DEPTH, fault_of
from phase5_training.pipeline.formats.json_records import Found
from phase5_training.pipeline.formats.record_parser import RecordParser

needs_compiler = pytest.mark.skipif(native.reader() is None, reason="no C++ compiler")


def found(texts: list[bytes]) -> Found:
    stops = np.cumsum([len(t) + 1 for t in texts]) - 1
    return Found(0, b",".join(texts), stops - [len(t) for t in texts], stops)


def parse(chunks, compiled):
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "reader", cache(lambda: None))
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
        elif isinstance(one, Texts):
            assert one.encoded.offsets.tolist() == other.encoded.offsets.tolist()
            assert one.encoded.flat.tobytes() == other.encoded.flat.tobytes()
        elif isinstance(one, Ragged):
            assert one.flat.tolist() == other.flat.tolist()
            assert one.offsets.tolist() == other.offsets.tolist()
        elif one is not None:
            assert list(map(repr, one)) == list(map(repr, other))


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
        '"s": {"a": [1, {"b": "]}"}], "c": null}', '"s": {"a": 1, "a": 2}', '"s": {"a": 1, "\\u0061": 2}',
        '"\\u0069nput": 1', '"s": [[1, 2], [3, {}], []]', '"s": [1,]', '"s": [01]', '"s": {"a" 1}',
        f'"s": {"[" * (MAX_DEPTH - 1)}{"]" * (MAX_DEPTH - 1)}', f'"s": {"[" * MAX_DEPTH}{"]" * MAX_DEPTH}',
        '"s": 18446744073709551616', '"s": [1e999]', '"metadata": [{"quality": 1}]',
        '"metadata": {"n": {"quality": 1, "quality": 2}}',
        '"s": {' + ",".join(f'"{k}": 0' for k in range(70)) + "}",
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
    odd = b'{"input": [1, 2, 3], "target": 0, "\\n": 0}'
    _, parser = parse([[first]] + [[odd]] * 10, True)
    assert parser._failures == record_parser.TRIES


# Spellings of characters: escapes, pairs and their halves, sequences that UTF-8 has and has not.
PIECES = st.sampled_from([
    b"a", b"long plain text, of more than eight bytes", b" ", b'\\"', b"\\\\", b"\\/", b"\\n", b"\\t",
    b"\\b\\f\\r",
    b"\\u0041", b"\\u00e9", b"\\u20AC", b"\\u0000", b"\\ud83d\\ude00", b"\\ud83d", b"\\ude00", b"\\ud83dx",
    b"\\u12", b"\\x", b"\\", b"\x1f", b"\x7f", b"\x00", b'"', "é漢😀".encode(), b"\xc3", b"\xc0\xaf",
    b"\xe0\x80\x80",
    b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf0\x8f\xbf\xbf", b"\xff", b"\xef\xbb\xbf", b"[{", b"}]", b":,",
])  # fmt: skip


@st.composite
def text_records(draw):
    text = b"".join(draw(st.lists(PIECES, max_size=4)))
    label = draw(st.sampled_from([b'"yes"', b'"n\\u006f"', b'""', b'"\xc3\xa9"', b"3", b'"\\ud800"']))
    extra = draw(
        st.sampled_from([b"", b"", b', "quality": 0.5', b', "note": "\\u0022"', b', "text": "again"'])
    )
    end = draw(st.sampled_from([b"}", b"}", b" }\r", b"},", b""]))
    return b'{"text": "' + text + b'", "label": ' + label + extra + end


@needs_compiler
@given(chunks=st.lists(st.lists(text_records(), min_size=1, max_size=12), min_size=1, max_size=4))
@settings(max_examples=400, deadline=None)
def test_text_read_natively_agrees_with_orjson(chunks):
    chunks = [[b'{"text": "ab", "label": "no"}'], *chunks]
    fast, _ = parse(chunks, True)
    slow, _ = parse(chunks, False)
    for a, b in zip(fast, slow, strict=True):
        same(a, b)


@needs_compiler
def test_one_odd_record_among_many_is_read_alone(monkeypatch):
    plain = [b'{"text": "word %d", "label": %d}' % (i, i) for i in range(40)]
    plain[7] = b'{"\\u0074ext": "odd", "label": 7}'
    plain[9] = b'{"text": 1, "label": 9}'
    read = []
    original = RecordParser._by_orjson
    monkeypatch.setattr(
        RecordParser, "_by_orjson", lambda self, found, *rest, **named: (
            read.append(len(found.starts)) or original(self, found, *rest, **named)
        ),
    )  # fmt: skip
    columns, parser = parse([plain[:3], plain], True)
    assert read == [3, 2]
    assert parser._failures == 0
    texts = list(columns[1].input)
    assert texts[7] == "odd"
    assert texts[8:10] == ["word 8", "word 10"]
    assert columns[1].target.tolist() == [i for i in range(40) if i != 9]
    assert list(columns[1].bad) == [12]


SAMPLES = st.recursive(
    st.sampled_from(["1", "-2.5e3", "null", "true", '""', '"a]"', '"{\\"a\\": 1"', '"\\u0022"', '"\\\\"']),
    lambda held: st.one_of(
        st.lists(held, max_size=3).map(lambda parts: "[" + ", ".join(parts) + "]"),
        st.lists(
            st.tuples(st.sampled_from(['"a"', '"\\u0061"', '"b"', '"é"', '"]"', '"\\""']), held), max_size=3
        ).map(lambda pairs: "{" + ", ".join(f"{k}: {v}" for k, v in pairs) + "}"),
    ),
)


@needs_compiler
@given(texts=st.lists(SAMPLES, min_size=1, max_size=4))
@settings(max_examples=400, deadline=None)
def test_what_the_check_calls_sound_has_no_fault(texts):
    raw = [text.encode() for text in texts]
    for one, sound in zip(raw, record_parser._sound(found(raw)), strict=True):
        fault = fault_of(one, orjson.loads(one))
        assert not (sound and fault)
        # It is in doubt about keys with escapes only.
        assert sound or fault or b"\\" in one


@needs_compiler
@pytest.mark.parametrize("deep", [MAX_DEPTH, MAX_DEPTH + 1])
def test_depth_of_what_is_sound(deep):
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        text = opening * deep + b"1" + closing * deep
        assert record_parser._sound(found([text])).tolist() == [deep <= MAX_DEPTH]


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
