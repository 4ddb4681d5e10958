"""Global filters in TFLite against numpy's FFT in float64."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_filters import filter_model
from tflite_models import run_tflite

from gfcompile.targets.spectral import dft_matrices
from gfcompile.targets.tflite.emit import TfliteModel, emit

Floats = npt.NDArray[np.float32]
EPS = np.finfo(np.float32).eps


def spectral_weight(h: int, w: int, c: int, seed: int) -> npt.NDArray[np.complex64]:
    """A random K that is Hermitian where a real result needs it to be."""
    kernel = np.random.default_rng(seed).standard_normal((h, w, c))
    return np.fft.rfft2(kernel, axes=(0, 1), norm="ortho").astype(np.complex64)


def expected(x: Floats, shape: tuple[int, ...], k: npt.NDArray[np.complex64]) -> npt.NDArray:
    grid = x.reshape(shape).astype(np.float64)
    spectrum = np.fft.rfft2(grid, axes=(1, 2), norm="ortho") * k
    return np.fft.irfft2(spectrum, s=shape[1:3], axes=(1, 2), norm="ortho").reshape(x.shape)


def check(made: TfliteModel, shape: tuple[int, ...], k: npt.NDArray[np.complex64]) -> None:
    batch, h, w, c = shape
    x = np.random.default_rng(1).standard_normal((batch, h * w, c)).astype(np.float32)
    wanted = expected(x, shape, k)
    # Transforms of 2 h + 2 w rounded terms, and the product's rounding: six deviations.
    tolerance = 6 * EPS * np.sqrt(4 * (h + w) + 8) * np.abs(k).max() * max(1, np.abs(x).max())
    for delegate in (True, False):
        (got,) = run_tflite(made, x, delegate=delegate)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_dft_form_equals_numpy_on_any_grid(batch: int, h: int, w: int, c: int) -> None:
    k = spectral_weight(h, w, c, seed=h * 10 + w)
    made = emit(filter_model("dft", (batch, h, w, c), k.real.copy(), k.imag.copy()))
    check(made, (batch, h, w, c), k)


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (28, 28)])
def test_grids_of_gfnets_equal_numpy_and_are_not_transposed(grid: tuple[int, int]) -> None:
    shape = (1, *grid, 8)
    k = spectral_weight(*grid, 8, seed=0)
    made = emit(filter_model("dft", shape, k.real.copy(), k.imag.copy()))
    check(made, shape, k)
    names = [operator.name for operator in made.operators]
    assert names.count("BATCH_MATMUL") == 5
    assert "TRANSPOSE" not in names


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (5, 6), (14, 14)])
def test_circular_form_equals_numpy(grid: tuple[int, int]) -> None:
    h, w = grid
    kernel = np.random.default_rng(0).standard_normal((h, w, 6)).astype(np.float32)
    made = emit(filter_model("circular", (2, h, w, 6), kernel))
    # A convolution is a product of spectra, with the orthonormal transform's factor.
    k = np.fft.rfft2(kernel.astype(np.float64), axes=(0, 1)).astype(np.complex64)
    check(made, (2, h, w, 6), k)


def test_halves_stay_halves() -> None:
    k = spectral_weight(8, 8, 64, seed=0)
    halves = k.real.astype(np.float16), k.imag.astype(np.float16)
    made = emit(filter_model("dft", (1, 8, 8, 64), *halves))
    check(made, (1, 8, 8, 64), halves[0] + 1j * halves[1].astype(np.float32))
    full = emit(filter_model("dft", (1, 8, 8, 64), k.real.copy(), k.imag.copy()))
    assert len(full.content) - len(made.content) > 0.9 * sum(half.nbytes for half in halves)


@given(st.integers(1, 40))
def test_dft_matrices_equal_numpy(n: int) -> None:
    re, im = dft_matrices(n)
    np.testing.assert_allclose(
        re + 1j * im, np.fft.fft(np.eye(n), norm="ortho"), rtol=0, atol=1e-14
    )
