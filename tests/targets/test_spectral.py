"""The DFT matrices against numpy.fft, and the choice of the filter's form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfcompile.targets.spectral import (
    choose_form,
    circular_macs,
    cosine_matrix,
    filter_costs_us,
    folded_dft_macs,
    irfft_matrices,
    plain_dft_macs,
    rfft_matrices,
    sine_matrix,
)
from gfcompile.targets.target import find_target

LENGTHS = st.integers(1, 64)
EPS = np.finfo(np.float64).eps


def _signal(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((3, n))


def _tolerance(n: int) -> float:
    """A sum of n products of numbers of order 4, each rounded a few times."""
    return 16 * EPS * n


@settings(deadline=None, max_examples=30)
@given(LENGTHS)
def test_rfft_matrices_equal_numpy(n: int) -> None:
    x = _signal(n)
    re, im = rfft_matrices(n)
    assert re.shape == im.shape == (n, n // 2 + 1)
    expected = np.fft.rfft(x, norm="ortho")
    np.testing.assert_allclose(x @ re + 1j * (x @ im), expected, atol=_tolerance(n))


@settings(deadline=None, max_examples=30)
@given(LENGTHS)
def test_irfft_matrices_equal_numpy_on_any_half_spectrum(n: int) -> None:
    # Also on one whose first and last values are not real: their imaginary parts are ignored.
    spectrum = _signal(2 * (n // 2 + 1)).view(np.complex128)
    re, im = irfft_matrices(n)
    assert re.shape == im.shape == (n // 2 + 1, n)
    expected = np.fft.irfft(spectrum, n, norm="ortho")
    got = spectrum.real @ re + spectrum.imag @ im
    np.testing.assert_allclose(got, expected, atol=_tolerance(n))


@settings(deadline=None, max_examples=30)
@given(LENGTHS)
def test_even_and_odd_halves_make_up_the_transform(n: int) -> None:
    x = _signal(n)
    even, odd = n // 2 + 1, (n - 1) // 2
    mirror = np.roll(x[:, ::-1], 1, axis=1)
    sums = (x + mirror)[:, :even]
    sums[:, 0] = x[:, 0]
    if n % 2 == 0:
        sums[:, -1] = x[:, n // 2]
    spectrum = np.fft.rfft(x, norm="ortho")
    np.testing.assert_allclose(sums @ cosine_matrix(n), spectrum.real, atol=_tolerance(n))
    differences = (x - mirror)[:, 1 : 1 + odd]
    np.testing.assert_allclose(
        differences @ sine_matrix(n), -spectrum.imag[:, 1 : 1 + odd], atol=_tolerance(n)
    )


def test_angles_of_long_transforms_keep_their_digits() -> None:
    n = 4096
    theta = 2 * np.pi * ((n - 1) * (n // 2 - 1) % n) / n
    assert rfft_matrices(n)[0][n - 1, n // 2 - 1] == np.cos(theta) / np.sqrt(n)


def test_products_per_element_are_those_of_the_grid() -> None:
    # 14: 8 cosine and 6 sine sums, 64 + 36 products per line, 28 lines, there and back.
    assert folded_dft_macs(14, 14) == 2 * 28 * 100
    assert plain_dft_macs(14, 14) == 96 * 196
    assert circular_macs(7, 7) == 49 * 49


@pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3", "raspberry-pi-4", "jetson-tx2"])
def test_large_grids_take_the_dft_and_tiny_ones_the_convolution(target: str) -> None:
    device = find_target(target)
    assert choose_form(device, 56, 56, 64) == "dft"
    assert choose_form(device, 14, 14, 384) == "dft"
    assert choose_form(device, 3, 3, 512) == "circular"


@pytest.mark.parametrize("target", ["x86-64-v4", "jetson-orin"])
def test_the_chosen_form_is_the_cheaper_one(target: str) -> None:
    device = find_target(target)
    for n in range(1, 30):
        dft, circular = filter_costs_us(device, n, n, 256)
        assert (choose_form(device, n, n, 256) == "dft") == (dft <= circular)
