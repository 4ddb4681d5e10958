"""The filter's matrices against NumPy's FFT, in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfcompile.targets.coreml.filters import (
    compact_gains,
    compact_matrices,
    dense_gains,
    dense_matrices,
    separable_gains,
    separable_matrices,
)

CHANNELS = 2
# Sums of 256 products of size 1, each rounded at 1e-16, with an order of magnitude to spare.
TOLERANCE = 1e-12

grids = st.tuples(st.integers(1, 16), st.integers(1, 16))


def drawn(h: int, w: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image, the spectrum of a real kernel, and the image filtered by NumPy."""
    generator = np.random.default_rng(h * 100 + w)
    x, kernel = generator.standard_normal((2, h, w, CHANNELS))
    spectrum = np.fft.rfft2(kernel, axes=(0, 1))
    y = np.fft.irfft2(np.fft.rfft2(x, axes=(0, 1)) * spectrum, s=(h, w), axes=(0, 1))
    return x, spectrum, y


@given(grids)
def test_dense_form_with_three_products_is_the_filter(grid: tuple[int, int]) -> None:
    h, w = grid
    x, k, y = drawn(h, w)
    forward, inverse = dense_matrices(h, w)
    gains = dense_gains(k.real, k.imag, w)
    result = inverse @ (gains * (forward @ x.reshape(h * w, CHANNELS)))
    np.testing.assert_allclose(result.reshape(y.shape), y, atol=TOLERANCE * h * w)


@given(grids)
def test_compact_form_with_four_products_is_the_filter(grid: tuple[int, int]) -> None:
    h, w = grid
    x, k, y = drawn(h, w)
    forward, inverse = compact_matrices(h, w)
    gains = compact_gains(k.real, k.imag, w)  # (2, 1, frequencies, channels)
    halves = (forward @ x.reshape(h * w, CHANNELS)).reshape(1, 2, -1, CHANNELS)
    result = inverse @ (gains * halves).reshape(-1, CHANNELS)
    np.testing.assert_allclose(result.reshape(y.shape), y, atol=TOLERANCE * h * w)


@given(grids)
def test_separable_form_is_the_filter(grid: tuple[int, int]) -> None:
    h, w = grid
    x, k, y = drawn(h, w)
    rows, into, back = separable_matrices(h, w)
    gains = separable_gains(k.real, k.imag)
    for c in range(CHANNELS):
        lines = (rows @ x[..., c]).reshape(h, 2 * w)
        result = rows.T @ ((gains[..., c] * (lines @ into)) @ back).reshape(2 * h, w)
        np.testing.assert_allclose(result, y[..., c], atol=TOLERANCE * h * w)


@pytest.mark.parametrize(("h", "w"), [(14, 14), (7, 7), (5, 6)])
def test_mirror_images_are_not_computed(h: int, w: int) -> None:
    """A real grid of n points has n degrees of freedom: f frequencies, r of them real."""
    forward, _ = dense_matrices(h, w)
    real = (1 + (h % 2 == 0)) * (1 + (w % 2 == 0))
    assert len(forward) == 3 * (h * w - real) // 2 + real
