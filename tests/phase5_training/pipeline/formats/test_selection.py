"""A selection against the array of positions that it stands for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phase5_training.pipeline.formats.selection import Selection


@given(n=st.integers(1, 300), lost=st.sets(st.integers(0, 299)), places=st.lists(st.integers(0, 299)))
def test_against_an_array(n, lost, places):
    plain = np.array([i for i in range(n) if i not in lost], np.int64)
    chosen = Selection.without(n, [i for i in lost if i < n])
    assert len(chosen) == len(plain)
    assert chosen.positions().tolist() == plain.tolist()
    wanted = np.array([place for place in places if place < len(plain)], np.int64)
    assert chosen[wanted].tolist() == plain[wanted].tolist()
    every = np.arange(n + 1)
    assert chosen.rank(every).tolist() == np.searchsorted(plain, every).tolist()
    start = min(8, n // 8 * 8)
    assert chosen.mask(start, n).tolist() == [i not in lost for i in range(start, n)]
    assert Selection(chosen.bits(n)).positions().tolist() == plain.tolist()
