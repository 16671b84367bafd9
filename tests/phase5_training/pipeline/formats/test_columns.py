"""Ragged rows and texts against Python's lists, with the native functions and without."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase5_training.pipeline.formats import native
from phase5_training.pipeline.formats.columns import Ragged, Texts, concat_values

ROWS = st.lists(st.lists(st.integers(0, 100), max_size=9), min_size=1, max_size=8)
TYPES = ["uint8", "int16", "int32", "int64"]


@pytest.fixture(params=["native", "numpy"], autouse=True)
def way(request, monkeypatch):
    found = native.reader()
    if request.param == "numpy":
        monkeypatch.setattr(native, "reader", cache(lambda: None))
        monkeypatch.setattr(native, "ready", lambda: None)
    elif found is None:
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("dtype", TYPES)
@given(rows=ROWS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_taken_and_padded_as_lists_are(dtype, rows, data):
    ragged = Ragged.from_rows([np.array(row, dtype) for row in rows])
    chosen = data.draw(st.lists(st.integers(-len(rows), len(rows) - 1), max_size=6))
    taken = ragged.take(np.array(chosen, np.int64))
    assert [taken.row(i).tolist() for i in range(len(taken))] == [rows[i] for i in chosen]
    assert taken.flat.dtype == dtype
    start, stop, step = data.draw(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 2)))
    part = ragged.take(slice(start, stop, step))
    assert [part.row(i).tolist() for i in range(len(part))] == rows[start:stop:step]
    assert part.offsets[0] == 0
    width, fill = data.draw(st.integers(0, 12)), data.draw(st.sampled_from([0, -100, 7]))
    padded = ragged.padded(width, fill)
    assert padded.tolist() == [(row + [fill] * width)[:width] for row in rows]
    assert padded.dtype == np.int64
    assert part.padded(3, -1).tolist() == [(row + [-1] * 3)[:3] for row in rows[start:stop:step]]


def test_a_row_that_is_not_there_is_refused():
    ragged = Ragged.from_rows([np.array([1, 2]), np.array([3])])
    with pytest.raises(IndexError):
        ragged.take(np.array([0, 2]))


def test_every_other_element_of_an_array():
    ragged = Ragged(np.arange(8)[::2], np.array([0, 1, 4]))
    assert ragged.take(np.array([1])).flat.tolist() == [2, 4, 6]
    assert ragged.padded(2, 0).tolist() == [[0, 0], [2, 4]]


def test_texts():
    texts = Texts.of(["a\udc80", b"\xff", "", "é"])
    assert list(texts) == ["a?", "\ufffd", "", "é"]
    joined = concat_values([texts, Texts.of(["z"])])
    assert isinstance(joined, Texts)
    assert list(joined.take(np.array([4, 3]))) == ["z", "é"]
    assert concat_values([texts, ["z"]])[3:] == ["é", "z"]


def test_neighboring_parts_are_joined_without_a_copy():
    whole = Ragged(np.arange(6, dtype=np.uint8), np.array([0, 2, 2, 5, 6]))
    near = [whole.take(slice(1, 3)), whole.take(slice(3, 4))]
    joined = concat_values(near)
    assert np.shares_memory(joined.flat, whole.flat)
    assert [joined.row(i).tolist() for i in range(3)] == [[], [2, 3, 4], [5]]
    swapped = concat_values(near[::-1])
    assert [swapped.row(i).tolist() for i in range(3)] == [[5], [], [2, 3, 4]]
    strided = Ragged(whole.flat[:4:2], np.array([0, 2]))
    assert concat_values([strided, whole.take(slice(2, 4))]).flat.tolist() == [0, 2, 2, 3, 4, 5]


def test_stretches_of_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        firsts, sizes = np.array([7, 0, 4]), np.array([3, 2, 0])
        assert native.read_runs(file.fileno(), firsts, sizes) == b"78901"
        assert native.read_runs(file.fileno(), firsts, np.array([4, 2, 0])) is None
        assert native.read_runs(file.fileno(), firsts[:0], sizes[:0]) == b""


@pytest.mark.parametrize("offsets", [[0, 9], [6, 8]])
def test_offsets_that_lead_out_of_the_elements_are_refused_and_not_followed(offsets):
    with pytest.raises(IndexError):
        Ragged(np.arange(4), np.array(offsets)).take(np.array([0, 0]))
