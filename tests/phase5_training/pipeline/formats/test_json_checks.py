"""Equal keys and depth against Python's json, for objects of any form and escapes of any kind."""

import json

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phase5_training.pipeline.formats.json_checks import MAX_DEPTH, fault_of

# Spellings of two keys and of texts, with quotes escaped both ways and what looks like a key.
KEYS = st.sampled_from(['"a"', '"\\u0061"', '"b"', '"b\\""', '"b\\u0022"'])
TEXTS = st.sampled_from(
    ['""', '"a"', '"\\""', '"\\u0022"', '"\\u0022\\u0022"', '"\\", \\"a\\": 1"', '"\\\\"']
)


def objects(held):
    return st.lists(st.tuples(KEYS, held), max_size=3).map(
        lambda pairs: "{" + ", ".join(f"{key} : {value}" for key, value in pairs) + "}"
    )


VALUES = st.recursive(
    st.sampled_from(["1", "null", "-2.5"]) | TEXTS,
    lambda held: objects(held) | st.lists(held, max_size=3).map(lambda parts: "[" + ",".join(parts) + "]"),
)


def occurs_twice(text):
    found = []

    def look(pairs):
        found.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    json.loads(text, object_pairs_hook=look)
    return any(found)


@settings(max_examples=300, deadline=None)
@given(objects(VALUES))
@example('{"a": "\\u0022\\u0022", "b": 1, "b": ""}')  # two quotes only in the value, two only in the text
@example('{"a": {"a": {"b": 1, "b": 2}}}')
@example('{"a": "x", "b": ["a", "b"]}')
def test_equal_keys_against_python(text):
    raw = text.encode()
    assert (fault_of(raw, orjson.loads(raw)) is not None) == occurs_twice(text)


@pytest.mark.parametrize("deep", [MAX_DEPTH, MAX_DEPTH + 1])
def test_depth(deep):
    raw = b'{"a": "[[", "b": ' + b"[" * (deep - 1) + b"]" * (deep - 1) + b"}"
    assert fault_of(raw, orjson.loads(raw)) == (
        f"is nested deeper than {MAX_DEPTH} levels" if deep > MAX_DEPTH else None
    )
