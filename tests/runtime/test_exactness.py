import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gfcompile.runtime.exactness import max_abs_error, sqnr_db, top1_agreement

arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=6),
    elements=st.floats(-1e6, 1e6, width=32),
)


@given(arrays)
def test_equal_arrays_have_no_error(array: np.ndarray) -> None:
    assert max_abs_error(array, array) == 0.0
    assert sqnr_db(array, array) == math.inf
    assert top1_agreement(array, array) == 1.0


def test_max_abs_error_is_the_largest_difference_whatever_its_sign() -> None:
    assert max_abs_error([1.0, 2.0, 3.0], [1.0, -0.5, 3.25]) == 2.5


def test_unsigned_integers_do_not_wrap() -> None:
    assert max_abs_error(np.array([250], np.uint8), np.array([255], np.uint8)) == 5.0


@pytest.mark.parametrize("decibels", [-3.0, 0.0, 20.0, 60.0])
def test_sqnr_is_ten_log_ten_of_the_energy_ratio(decibels: float) -> None:
    reference = np.array([3.0, -4.0])
    noise = 5.0 * 10 ** (-decibels / 20) * np.array([0.6, 0.8])
    assert sqnr_db(reference, reference + noise) == pytest.approx(decibels, abs=1e-9)


@given(st.integers(-250, 250))  # the squares of most of these leave float64
def test_sqnr_does_not_depend_on_the_unit(exponent: int) -> None:
    reference = np.array([3.0, -4.0, 1.0])
    actual = np.array([3.1, -4.0, 0.8])
    unit = 10.0**exponent
    expected = sqnr_db(reference, actual)
    assert sqnr_db(reference * unit, actual * unit) == pytest.approx(expected, abs=1e-6)


def test_noise_on_silence_is_minus_infinity() -> None:
    assert sqnr_db([0.0, 0.0], [0.0, 1e-3]) == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_passes_no_bound(bad: float) -> None:
    for pair in [([1.0, bad], [1.0, 2.0]), ([1.0, 2.0], [1.0, bad]), ([1.0, bad], [1.0, bad])]:
        assert not max_abs_error(*pair) <= 1e9
        assert not sqnr_db(*pair) >= -1e9


def test_top1_agreement_counts_rows() -> None:
    reference = np.array([[0.0, 1.0, 0.5], [2.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 0.0, 0.0]])
    actual = np.array([[0.0, 0.9, 0.5], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0], [np.nan, 0.0, 0.0]])
    assert top1_agreement(reference, actual) == 0.5
    assert top1_agreement(reference[0], actual[0]) == 1.0


def test_different_shapes_are_not_broadcast() -> None:
    for measure in (max_abs_error, sqnr_db, top1_agreement):
        with pytest.raises(ValueError, match=r"\(3,\).*\(2, 3\)"):
            measure(np.zeros((2, 3)), np.zeros(3))
        with pytest.raises(ValueError, match="empty"):
            measure(np.zeros((0, 3)), np.zeros((0, 3)))
