"""Spearman's rank correlation against SciPy's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from gfcompile.runtime.ranking import rank_correlation

pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30)


@given(pairs)
def test_it_equals_scipys(values: list[tuple[int, int]]) -> None:
    one, other = np.array(values, float).T
    found = rank_correlation(one, other)
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def test_order_counts_and_distance_does_not() -> None:
    assert rank_correlation([1, 2, 3, 1000], [0.1, 0.2, 0.3, 0.4]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_two_things_have_no_correlation() -> None:
    assert rank_correlation([1, 2], [1, 2]) is None
