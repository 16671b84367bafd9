"""JSON and JSON Lines against the standard library's json."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phase5_training.errors import DataError
from phase5_training.pipeline.formats import json_records, open_source
from phase5_training.pipeline.formats.columns import as_rows
from phase5_training.pipeline.formats.json_records import Found, ListFinder, cut, find_in_list, find_lines
from phase5_training.pipeline.formats.source import ReadOptions

MODES = [ReadOptions(), ReadOptions(memory_limit=0), ReadOptions(streaming=True, window=8)]


def write(path, records, wrapped=True):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), "utf-8")
    else:
        path.write_text(json.dumps({"about": "test", "samples": records} if wrapped else records), "utf-8")
    return path


def read(path, options=None):
    source = open_source(path, options)
    return source.gather(np.arange(len(source)))


numbers = st.floats(-1e6, 1e6, width=32).filter(lambda x: x != int(x))
texts = st.text(st.characters(codec="utf-8"), max_size=20)
inputs = st.one_of(
    st.integers(1, 5).flatmap(
        lambda k: st.lists(st.lists(numbers, min_size=k, max_size=k), min_size=1, max_size=20)
    ),
    st.integers(1, 5).flatmap(
        lambda k: st.lists(
            st.lists(st.integers(1 - 2**63, 2**63 - 1), min_size=k, max_size=k), min_size=1, max_size=20
        )
    ),
    st.lists(texts, min_size=1, max_size=20),
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=20),
)


@pytest.mark.parametrize("extension", ["json", "jsonl"])
@pytest.mark.parametrize("options", MODES, ids=["memory", "limited", "streaming"])
@given(inputs=inputs)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_json_reads_we_read(tmp_path, extension, options, inputs):
    records = [{"input": x, "target": i, "metadata": {"quality": i / 7}} for i, x in enumerate(inputs)]
    path = write(tmp_path / f"data.{extension}", records)
    columns = read(path, options)
    assert not columns.bad
    for got, wanted in zip(as_rows(columns.input), inputs, strict=True):
        if isinstance(wanted, str):
            assert got == wanted
        else:
            wanted = np.array(wanted)
            assert np.array_equal(got, wanted.astype(np.float32) if wanted.dtype.kind == "f" else wanted)
    assert columns.target.tolist() == list(range(len(inputs)))
    assert np.allclose(columns.quality, np.arange(len(inputs)) / 7)


@pytest.mark.parametrize("options", MODES, ids=["memory", "limited", "streaming"])
def test_a_bare_list_and_other_keys(tmp_path, options):
    records = [{"text": "ab", "label": 1}, {"text": "c", "label": 0}]
    columns = read(write(tmp_path / "a.json", records, wrapped=False), options)
    assert list(columns.input) == ["ab", "c"]
    assert columns.target.tolist() == [1, 0]


@pytest.mark.parametrize("options", MODES, ids=["memory", "limited", "streaming"])
def test_any_order_and_repeats(tmp_path, options):
    records = [{"input": [i, i * i], "target": i} for i in range(40)]
    for name in ("a.json", "a.jsonl"):
        source = open_source(write(tmp_path / name, records), options)
        for wanted in ([39, 0, 5, 5], [0], [12, 13, 11], [3, 39]):
            got = source.gather(np.array(wanted))
            assert got.target.tolist() == got.index.tolist() == wanted
            assert got.input.tolist() == [[i, i * i] for i in wanted]


def test_blank_lines_count_for_line_numbers_only(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": [1], "target": 0}\n\n   \n{"input": [2], "target": 1}\r\n{"input": [3}\n')
    source = open_source(path)
    assert len(source) == 3
    bad = {k: v for chunk in source.iterate() for k, v in chunk.bad.items()}
    assert list(bad) == [2]
    assert bad[2].startswith("(line 5, byte 62) is not valid JSON")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("  \n", "the file is empty"),
        ('{"samples": [{"input": 1} 2]}', "byte 25: not valid JSON"),
        ('{"input": [1}', "line 1 column 13: not valid JSON"),
        ('{"input": [1], "input": [2]}', "has the key 'input' twice"),
        ('{"samples": [{"input": 1}], "samples": []}', "has the key 'samples' twice"),
        ('{"input": [1]}\n{"input": [2]}', r"the first line is a record by itself: name the file .jsonl"),
        ('{"sample": []}', r"has no 'samples' list and no 'inputs' \(its keys: 'sample'\)"),
        ('{"samples": []}', "the data set is empty"),
        ("[]", "the data set is empty"),
        ('{"samples": 3}', "holds int; wanted a list of records"),
        ('"text"', "holds str; wanted a list of records"),
        ('\ufeff[{"input": 1}]', "wanted an object or a list; save it as UTF-8 without a byte order mark"),
    ],
)
def test_broken_files(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json.*" + message):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ('"text"', "begins with"),
        ('{"samples": [{"input": [1]} {"input": [2]}]}', "byte 27: not valid JSON .* wanted one comma"),
        ('{"samples": [{"input": [1]},, {"input": [2]}]}', "byte 27: not valid JSON .* wanted one comma"),
        ('{"samples": [,{"input": [1]}]}', "byte 13: not valid JSON .* wanted one comma"),
        ('{"samples": [{"input": [1]}, 7, {"input": [2]}]}', "byte 27: not valid JSON"),
        ('{"samples": [{"input": [1]},]}', "byte 27: not valid JSON .* at the end of the list"),
        ('{"samples": [{"input": [1]}], "more": }', "not valid JSON around the list of records"),
        ('{"samples": [{"input": [1]}]} 1', "not valid JSON around the list of records"),
        ('{"about": {"samples": [1]}}', "no records; wanted"),
        ('{"samples": []}', "no records; wanted at least one in the list"),
        ('{"sample": []}', "no records; wanted"),
    ],
)
def test_broken_streams(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json.*" + message):
        read(tmp_path / "a.json", ReadOptions(streaming=True))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "is a list, not an object"),
        ({"target": 1}, "has no 'input'"),
        ({"input": [1, 2], "target": "a"}, "has text as target, the first record has a number"),
        ({"input": "a", "target": 1}, "has text as input, the first record has a list"),
        ({"input": [1, 2]}, "has nothing as target"),
        ({"input": [1, None], "target": 1}, "has null or mixed values in its input"),
        ({"input": [1, "2"], "target": 1}, "has text among numbers in its input"),
        ({"input": [[1], [1, 2]], "target": 1}, "has lists of different lengths inside one record"),
        ({"input": [1, 2], "target": 1, "metadata": {"quality": "high"}}, "has quality 'high', not a number"),
    ],
)
def test_bad_records_are_named(tmp_path, record, reason):
    good = {"input": [1, 2], "target": 0}
    for name in ("a.json", "a.jsonl"):
        for options in MODES:
            source = open_source(write(tmp_path / name, [good, good, record, good]), options)
            bad = {k: v for chunk in source.iterate() for k, v in chunk.bad.items()}
            assert list(bad) == [2]
            assert reason in bad[2]
            assert source.gather(np.array([3, 0])).index.tolist() == [3, 0]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_integers_beyond_64_bits_are_not_rounded(tmp_path, name):
    good, bad = {"input": [1, 2], "target": 0}, {"input": [1, 2**63], "target": 0}
    for record in (bad, {"input": [1, 2], "target": 2**63}):
        source = open_source(write(tmp_path / name, [good, record]))
        assert "an integer beyond 64 signed bits" in next(iter(source.iterate())).bad[1]
    columns = read(write(tmp_path / name, [{"input": [1e19, 2.5], "target": 0}]))
    assert columns.input.tolist() == [[np.float32(1e19), 2.5]]
    for options in MODES:
        for huge in (2**63, 2**64, -(2**63) - 1, 10**40):  # orjson makes a float of those beyond 64 bits
            for record in ({"input": [1, huge], "target": 0}, {"input": [1, 2], "target": huge}):
                source = open_source(write(tmp_path / name, [good, record, good]), options)
                bad = {k: v for chunk in source.iterate() for k, v in chunk.bad.items()}
                assert list(bad) == [1]
                assert "an integer beyond 64 signed bits" in bad[1]


def test_first_record_decides_and_must_be_whole(tmp_path):
    source = open_source(write(tmp_path / "a.json", [{"imput": 1, "target": 2}]))
    assert next(iter(source.iterate())).bad == {
        0: "has no 'input' (its keys: 'imput', 'target'); name the input 'input'"
    }
    source = open_source(write(tmp_path / "a.json", [{"input": 1, "text": 2}]))
    assert next(iter(source.iterate())).bad == {0: "has both 'input' and 'text'; keep one of them"}


def spans_by_hand(text):
    """Records of a JSON list, one character after the other: (spans, place of its end, greatest depth)."""
    depth, quoted, escaped, begin, spans, deepest = 0, False, False, 0, [], 0
    for i, code in enumerate(text.decode("latin1")):
        if quoted:
            if escaped:
                escaped = False
            elif code == "\\":
                escaped = True
            elif code == '"':
                quoted = False
        elif code == '"':
            quoted = True
        elif code in "[{":
            begin = i if depth == 0 else begin
            depth += 1
            deepest = max(depth, deepest)
        elif code in "]}":
            depth -= 1
            if depth < 0:
                return spans, i, deepest
            if depth == 0:
                spans.append((begin, i + 1))
    return spans, -1, deepest


@given(raw=st.lists(st.sampled_from([b"[", b"]", b"{", b"}", b'"', b'\\"', b"\\\\", b"a,"]), max_size=60))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("compiled", [True, False])
def test_records_are_found_as_by_hand(compiled, raw):
    text, quoted = b"", False
    for part in raw:  # a backslash outside of a string is no JSON, and either count may hold
        if part[:1] == b"\\" and not quoted:
            continue
        quoted ^= part == b'"'
        text += part
    find = find_in_list if compiled else json_records._find_in_python
    starts, stops, end, depth = find(text)
    spans, wanted_end, deepest = spans_by_hand(text)
    assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == spans
    assert (end, depth) == (wanted_end, deepest)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
records_of_any_kind = st.recursive(
    plain | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
).filter(lambda value: isinstance(value, (list, dict)))


@given(records=st.lists(records_of_any_kind, max_size=12), block=st.integers(1, 40), spaced=st.booleans())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("finder", [ListFinder("a.json"), find_lines])
def test_blocks_of_any_size_find_the_same_records(finder, records, block, spaced):
    indent = 2 if spaced and finder is not find_lines else None
    parts = [json.dumps(r, ensure_ascii=False, indent=indent).encode() for r in records]
    text = b'{"a": [1], "samples" : [' + b" ,\n".join(parts) + b'], "b": {"samples": []}}'
    if finder is find_lines:
        text = b"\n \n".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "BLOCK_BYTES", block if finder is find_lines else max(block, 24))
        found = list(finder(io.BytesIO(text)))
    got = [f.text[a:b] for f in found for a, b in zip(f.starts, f.stops, strict=True)]
    offsets = [f.base + a for f in found for a in f.starts.tolist()]
    assert got == parts
    assert [text[a : a + len(p)] for a, p in zip(offsets, parts, strict=True)] == parts


GOOD = '{"input": [1], "target": 0}'


@pytest.mark.parametrize("options", [ReadOptions(), ReadOptions(streaming=True)], ids=["loaded", "streamed"])
@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", f'{{"samples": [{GOOD}, {{"input"', "(byte 42) is cut off: the file ends within"),
        ("a.json", f"[{GOOD}", "(byte 28) is cut off"),
        ("a.json", f'[{GOOD}, {{"input" 2}}]', "(byte 30) is not valid JSON"),
        (
            "a.json",
            f'[{GOOD}, {{"input": [NaN]}}]',
            "(byte 30) is not valid JSON: NaN is no number in JSON; le",
        ),
        ("a.json", f'[{GOOD}, {{"input":-Infinity}}]', "(byte 30) is not valid JSON: -Infinity is no number"),
        ("a.json", f'[{GOOD}, {{"input": ": NaN", }}]', "(byte 30) is not valid JSON: t"),
        ("a.json", f"[{GOOD}, " + "[" * 10**6, "(byte 30) is cut off"),
        (
            "a.json",
            f"[{GOOD}, " + "[" * 10**6 + "]" * 10**6 + "]",
            "(byte 30) is not valid JSON: depth limit",
        ),
        ("a.json", f"[{GOOD}, " + "[" * 65 + "]" * 65 + "]", "(byte 30) is nested deeper than 64 levels"),
        ("a.jsonl", f"{GOOD}\n" + "[" * 65 + "]" * 65, "(line 2, byte 28) is nested deeper than 64 levels"),
        (
            "a.jsonl",
            f'{GOOD}\n{{"input": [2], "input": [2]}}\n',
            "(line 2, byte 28) has the key 'input' twice",
        ),
        ("a.jsonl", f"{GOOD}\n{GOOD[:9]}", "(line 2, byte 28) is not valid JSON"),
    ],
)
def test_a_bad_record_is_told_with_its_place(tmp_path, options, name, text, reason):
    (tmp_path / name).write_text(text)
    for again in range(2):  # from the text, and from the index of it
        source = open_source(tmp_path / name, options)
        (bad,) = [chunk.bad for chunk in source.iterate() if chunk.bad]
        assert list(bad) == [1], again
        assert bad[1].startswith(reason), (again, bad)
        assert np.asarray(source.gather(np.array([0])).input).tolist() == [[1]]


def test_a_record_of_a_list_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "MAX_RECORD", 1000)
    monkeypatch.setattr(json_records, "BLOCK_BYTES", 100)
    (tmp_path / "a.json").write_text(f'[{GOOD}, {{"input": [' + "1, " * 2000 + "1]}]")
    with pytest.raises(
        DataError, match=r"a.json byte 28: a record of more than 0 MB; split it, or write arr"
    ):
        open_source(tmp_path / "a.json", ReadOptions(streaming=True)).gather(np.array([0]))


def test_a_line_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "MAX_RECORD", 1000)
    monkeypatch.setattr(json_records, "BLOCK_BYTES", 100)
    for tail in (f"\n{GOOD}\n{GOOD}", ""):
        long = '{"input": [' + "1, " * 2000 + "1]}"
        (tmp_path / "a.jsonl").write_text(f"{GOOD}\n{long}{tail}")
        source = open_source(tmp_path / "a.jsonl", ReadOptions(streaming=True))
        assert len(source) == (4 if tail else 2)
        bad = {k: v for chunk in source.iterate() for k, v in chunk.bad.items()}
        assert list(bad) == [1]
        assert bad[1].startswith("(line 2, byte 28) is 0 MB long; a record has at most")
        if tail:
            assert source.gather(np.array([3, 2])).index.tolist() == [3, 2]


def test_a_single_row_of_an_index_becomes_a_tensor(tmp_path):
    """Its strides are those of the whole row unless it is copied, and torch takes none such."""
    write(tmp_path / "a.jsonl", [{"input": [i / 2, 1.0], "target": i} for i in range(3)])
    source = open_source(tmp_path / "a.jsonl", ReadOptions(memory_limit=0))
    assert len(source) == 3
    assert source.access == "mapped"
    assert torch.from_numpy(source.gather(np.array([1])).input).tolist() == [[0.5, 1.0]]


def test_too_many_bad_records_are_not_collected(tmp_path, monkeypatch):
    monkeypatch.setitem(open_source.__globals__["open_json_lines"].__globals__, "MAX_LOST", 50)
    (tmp_path / "a.jsonl").write_text(GOOD + "\n{" * 60)
    with pytest.raises(DataError, match=r"59 records cannot be read; one of them \(line 2, byte 28\)"):
        open_source(tmp_path / "a.jsonl")


def test_columns_of_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"inputs": [[1.5, 2], [3, 4]], "targets": [0, 1]}))
    columns = read(tmp_path / "a.json")
    assert columns.input.tolist() == [[1.5, 2], [3, 4]]
    assert columns.target.tolist() == [0, 1]


def test_columns_of_json_that_are_far_larger_parsed_than_as_text(tmp_path, monkeypatch):
    path, reader = tmp_path / "a.json", open_source.__globals__["open_json"].__globals__
    monkeypatch.setitem(reader, "WHOLE_OBJECTS", 10)
    path.write_text(json.dumps({"inputs": [[i, 1] for i in range(50)], "name": "{" * 50}))
    assert read(path).input.tolist() == [[i, 1] for i in range(50)]
    text = 4 * path.stat().st_size
    with pytest.raises(DataError, match=r"a\.json: 51 lists in columns take .* MB while they are read"):
        open_source(path, ReadOptions(memory_limit=text + 64 * 51 - 1))
    assert len(open_source(path, ReadOptions(memory_limit=text + 64 * 51))) == 50
    path.write_text(json.dumps({"inputs": [{}] * 11}))
    with pytest.raises(DataError, match=r"12 objects and no list of records; put .* under 'samples'$"):
        open_source(path)
    path.write_text('{"input": [1]}\n' * 11)
    with pytest.raises(DataError, match=r"11 objects and no list of records.*name the file \.jsonl$"):
        open_source(path)


@pytest.mark.parametrize("records", [[], [[1, 2]] * 3])
def test_many_small_records_are_read_one_by_one_with_the_same_result(tmp_path, monkeypatch, records):
    records = records + [{"input": [i, i / 2], "target": i % 3} for i in range(30)]
    (tmp_path / "a.json").write_text(json.dumps({"samples": records, "name": "small"}))
    whole = open_source(tmp_path / "a.json")
    monkeypatch.setitem(open_source.__globals__["open_json"].__globals__, "WHOLE_OBJECTS", 10)
    walked = open_source(tmp_path / "a.json")
    ((first,), (second,)) = whole.iterate(), walked.iterate()
    assert np.array_equal(first.input, second.input)
    assert np.array_equal(first.target, second.target)
    assert first.bad == second.bad
    assert len(first.bad) == len(records) - 30


@pytest.mark.parametrize("first", [0, 1, 2, 5, 9])
def test_portions_of_records_with_a_smaller_first_one(first):
    whole = Found(0, b"", np.arange(5), np.arange(5) + 1, np.arange(5) + 10, faults={1: "one", 4: "four"})
    parts = list(cut(whole, 2, first))
    assert [n for part in parts for n in part.starts.tolist()] == [0, 1, 2, 3, 4]
    assert len(parts[0].starts) == (min(first, 5) or 2)
    assert all(len(part.starts) <= 2 for part in parts[1:])
    told = {int(part.lines[i]): fault for part in parts for i, fault in part.faults.items()}
    assert told == {11: "one", 14: "four"}
