"""How far one stage's numbers are from another's: the three figures of the ledger."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["max_abs_error", "sqnr_db", "top1_agreement"]


def max_abs_error(reference: ArrayLike, actual: ArrayLike) -> float:
    """The largest |actual - reference|; NaN or inf when either holds a NaN or an infinity."""
    _, error = _wanted_and_error(reference, actual)
    return float(np.abs(error).max())


def sqnr_db(reference: ArrayLike, actual: ArrayLike) -> float:
    """Signal to quantization noise, 10 log10(sum reference^2 / sum error^2), in dB.

    inf for equal arrays, -inf for noise on a reference of zeros; NaN when either holds a NaN or
    an infinity.
    """
    wanted, error = _wanted_and_error(reference, actual)
    if not (np.isfinite(wanted).all() and np.isfinite(error).all()):
        return float("nan")
    # Scaled to 1 first: the squares of large values overflow, those of small ones vanish.
    top = float(max(np.abs(wanted).max(), np.abs(error).max()))
    if top == 0.0:
        return float("inf")
    signal = float(np.square(wanted / top).sum())
    noise = float(np.square(error / top).sum())
    if noise == 0.0:
        return float("inf")
    if signal == 0.0:
        return float("-inf")
    return float(10.0 * (np.log10(signal) - np.log10(noise)))


def top1_agreement(reference: ArrayLike, actual: ArrayLike) -> float:
    """The fraction of rows, along the last axis, whose largest element is at the same place.

    Rows with a NaN do not agree.
    """
    wanted, _ = _wanted_and_error(reference, actual)
    classes = wanted.shape[-1] if wanted.ndim else 1
    expected = wanted.reshape(-1, classes)
    got = np.asarray(actual).reshape(-1, classes)
    same = expected.argmax(axis=1) == got.argmax(axis=1)
    whole = ~(np.isnan(expected).any(axis=1) | np.isnan(got).any(axis=1))
    return float((same & whole).mean())


def _wanted_and_error(
    reference: ArrayLike, actual: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The reference and actual - reference, both float64.

    Raises:
        ValueError: shapes that differ, or nothing to compare. Broadcasting would make a number
            out of a mistake.
    """
    wanted = np.asarray(reference, np.float64)
    got = np.asarray(actual, np.float64)
    if wanted.shape != got.shape:
        raise ValueError(f"cannot compare shape {got.shape} with a reference of {wanted.shape}")
    if wanted.size == 0:
        raise ValueError(f"nothing to compare: shape {wanted.shape} is empty")
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and means it
        return wanted, got - wanted
