"""Kept patches are found again in the grid, and compared as sets."""

import numpy as np
import pytest

from gfcompile.runtime.kept_patches import overlap, places_in_grid


def test_each_stage_chooses_among_those_kept_before() -> None:
    first = np.array([[7, 2, 5, 0], [1, 3, 6, 4]])
    second = np.array([[3, 1], [0, 2]])  # the fourth and second, first and third of those
    places = places_in_grid([first, second], (4, 2), chosen_anew=False)
    assert places[0].tolist() == [[0, 2, 5, 7], [1, 3, 4, 6]]
    assert places[1].tolist() == [[0, 2], [1, 6]]


def test_each_stage_chooses_among_all() -> None:
    first, second = np.array([[3, 1, 0, 2]]), np.array([[2, 3, 1, 0]])
    places = places_in_grid([first, second], (3, 1), chosen_anew=True)
    assert [place.tolist() for place in places] == [[[0, 1, 3]], [[2]]]


def test_overlap_counts_what_is_in_both() -> None:
    one = np.array([[0, 1, 2, 3], [0, 1, 2, 3]])
    assert overlap(one, one[:, ::-1]) == 1
    assert overlap(one, one + 4) == 0
    assert overlap(one, np.array([[0, 1, 2, 9], [3, 2, 8, 9]])) == pytest.approx(5 / 8)
