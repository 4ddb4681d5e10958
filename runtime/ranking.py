"""How well one list of figures puts things in the order of another."""

import numpy as np
import numpy.typing as npt


def rank_correlation(one: npt.ArrayLike, other: npt.ArrayLike) -> float | None:
    """Spearman's rank correlation: 1 if both put things in the same order, -1 in the opposite one.

    Equal figures share the mean of their ranks. None for fewer than three things, or where all of
    one side are equal: there is no order then.
    """
    first, second = (_ranks(np.asarray(values, np.float64)) for values in (one, other))
    if first.size < 3:
        return None
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / norm if norm > 0 else None


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middles: npt.NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return middles[inverse]
