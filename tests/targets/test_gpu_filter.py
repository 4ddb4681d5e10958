"""The global filter's forms for CUDA against NumPy's FFT, behind the stand-in driver."""

import numpy as np
import pytest
from run_gpu_kernel import STORAGE, TX2, Array, Case, run_cases

from gfcompile.targets.tvm.kernel import CircularFilter, DftFilter
from gfcompile.targets.tvm.schedules.gpu_filter import (
    schedule_circular_filter,
    schedule_dft_filter,
)

EPS = 2.0**-24

DFT_KERNELS = [
    DftFilter(batch=1, h=14, w=14, c=384, k_dtype="float16"),
    DftFilter(batch=2, h=7, w=7, c=64),
    DftFilter(batch=1, h=28, w=28, c=36, k_dtype="float16"),
    DftFilter(batch=1, h=56, w=56, c=8),
    DftFilter(batch=1, h=5, w=8, c=3),
    DftFilter(batch=1, h=1, w=9, c=6),
    DftFilter(batch=1, h=9, w=1, c=4),
    DftFilter(batch=1, h=66, w=70, c=4),  # too large for matrices in shared memory
]
CIRCULAR_KERNELS = [
    CircularFilter(batch=1, h=7, w=7, c=64, k_dtype="float16"),
    CircularFilter(batch=2, h=14, w=14, c=33),
    CircularFilter(batch=1, h=5, w=8, c=3),
    CircularFilter(batch=1, h=3, w=11, c=3),
    CircularFilter(batch=1, h=1, w=9, c=6),
]


def stored(weights: Array, dtype: str) -> tuple[Array, Array]:
    """Weights as the kernel's argument, and their exact values."""
    rounded = weights.astype(dtype)
    argument = rounded.view(np.uint16) if dtype == "float16" else rounded
    return argument, rounded.astype(np.float64)


def dft_case(kernel: DftFilter) -> Case:
    rng = np.random.default_rng(0)
    h, w = kernel.h, kernel.w
    x = rng.standard_normal((kernel.batch, h, w, kernel.c), np.float32)
    # The spectrum of a real kernel is Hermitian, as the contract has it.
    spectrum = np.fft.rfft2(rng.standard_normal((h, w, kernel.c)), axes=(0, 1), norm="ortho")
    k_re, re = stored(spectrum.real, kernel.k_dtype)
    k_im, im = stored(spectrum.imag, kernel.k_dtype)
    product = np.fft.rfft2(x.astype(np.float64), axes=(1, 2), norm="ortho") * (re + 1j * im)
    expected = np.fft.irfft2(product, s=(h, w), axes=(1, 2), norm="ortho")
    args = {"x": x, "k_re": k_re, "k_im": k_im}
    return schedule_dft_filter(kernel, TX2, STORAGE), args, expected


def circular_case(kernel: CircularFilter) -> Case:
    rng = np.random.default_rng(0)
    h, w = kernel.h, kernel.w
    x = rng.standard_normal((kernel.batch, h, w, kernel.c), np.float32)
    argument, exact = stored(rng.standard_normal((h, w, kernel.c)), kernel.k_dtype)
    product = np.fft.rfft2(x.astype(np.float64), axes=(1, 2)) * np.fft.rfft2(exact, axes=(0, 1))
    expected = np.fft.irfft2(product, s=(h, w), axes=(1, 2))
    return schedule_circular_filter(kernel, TX2, STORAGE), {"x": x, "kernel": argument}, expected


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_the_dft_form_is_numpy_s_fft_on_any_grid(order: str) -> None:
    cases = [dft_case(kernel) for kernel in DFT_KERNELS]
    results = run_cases(cases, TX2, order=order)
    for kernel, (_, _, expected), y in zip(DFT_KERNELS, cases, results, strict=True):
        # One rounding per addition of the four sums, each relative to the largest result.
        additions = 2 * kernel.w + 4 * kernel.h + 8
        assert np.abs(y - expected).max() <= additions * EPS * np.abs(expected).max(), kernel


def test_integers_are_summed_exactly() -> None:
    rng = np.random.default_rng(0)
    cases: list[Case] = []
    for shape in [(1, 7, 7, 64), (2, 5, 8, 3), (1, 14, 14, 33)]:
        batch, h, w, c = shape
        x = rng.integers(-128, 128, shape).astype(np.int8)
        weight = rng.integers(-127, 128, (h, w, c)).astype(np.int8)
        scale = rng.uniform(1e-4, 1e-3, c).astype(np.float32)
        kernel = CircularFilter(batch=batch, h=h, w=w, c=c, x="int8")
        args = {"x": x, "kernel": weight, "scale": scale, "zero_point": np.array([41], np.float32)}
        sums = np.zeros(shape, np.int64)
        for p in range(h):
            for q in range(w):
                sums += np.roll(x.astype(np.int64) - 41, (p, q), axis=(1, 2)) * weight[p, q]
        wanted = sums.astype(np.float32) * scale
        cases.append((schedule_circular_filter(kernel, TX2, STORAGE), args, wanted))
    for (_, _, wanted), y in zip(cases, run_cases(cases, TX2), strict=True):
        assert np.array_equal(y, wanted)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_the_circular_form_is_a_product_of_spectra(order: str) -> None:
    cases = [circular_case(kernel) for kernel in CIRCULAR_KERNELS]
    results = run_cases(cases, TX2, order=order)
    for kernel, (_, _, expected), y in zip(CIRCULAR_KERNELS, cases, results, strict=True):
        additions = kernel.h * kernel.w + 4
        assert np.abs(y - expected).max() <= additions * EPS * np.abs(expected).max(), kernel
