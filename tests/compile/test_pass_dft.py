"""The matrices against NumPy's FFT. All are float64: 1e-13 is a few hundred roundings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfcompile.compile.passes.dft import (
    dft_matrix,
    dft_tensor,
    inverse_real_dft_matrices,
    project_hermitian,
    real_dft_matrices,
    roots_of_unity,
)

lengths = st.integers(1, 64)


@given(lengths)
def test_real_matrices_equal_numpy(n: int) -> None:
    x = np.random.default_rng(n).standard_normal(n)
    re, im = real_dft_matrices(n)
    np.testing.assert_allclose(re @ x + 1j * (im @ x), np.fft.rfft(x, norm="ortho"), atol=1e-13)


@given(lengths)
def test_inverse_real_matrices_equal_numpy_also_on_spectra_that_are_not_hermitian(n: int) -> None:
    rng = np.random.default_rng(n)
    z = rng.standard_normal(n // 2 + 1) + 1j * rng.standard_normal(n // 2 + 1)
    re, im = inverse_real_dft_matrices(n)
    expected = np.fft.irfft(z, n, norm="ortho")
    np.testing.assert_allclose(re @ z.real + im @ z.imag, expected, atol=1e-13)


@given(lengths)
def test_stacked_matrix_equals_numpy_and_its_transpose_inverts_it(n: int) -> None:
    rng = np.random.default_rng(n)
    z = rng.standard_normal(n) + 1j * rng.standard_normal(n)
    y = dft_matrix(n) @ np.concatenate([z.real, z.imag])
    np.testing.assert_allclose(y[:n] + 1j * y[n:], np.fft.fft(z, norm="ortho"), atol=1e-13)
    np.testing.assert_allclose(dft_matrix(n).T @ dft_matrix(n), np.eye(2 * n), atol=1e-13)


@given(st.integers(1, 24), st.integers(1, 24), st.booleans(), st.booleans())
def test_dft_tensor_equals_numpy_with_padding_and_cutting(
    size: int, length: int, inverse: bool, onesided: bool
) -> None:
    rng = np.random.default_rng(size * 100 + length)
    parts = 1 if onesided and not inverse else 2
    x = rng.standard_normal((size, parts))
    z = x[:, 0] + 1j * (x[:, 1] if parts == 2 else 0)
    tensor = dft_tensor(size, parts, length, inverse=inverse, onesided=onesided)
    y = np.tensordot(x, tensor, axes=2)
    if onesided:
        expected = np.fft.irfft(z, length) if inverse else np.fft.rfft(z.real, length)
    else:
        expected = np.fft.ifft(z, length) if inverse else np.fft.fft(z, length)
    expected_parts = np.stack([expected.real, expected.imag], axis=-1)[:, : y.shape[1]]
    np.testing.assert_allclose(y, expected_parts, atol=1e-12)


@pytest.mark.parametrize("n", [4, 12, 56, 1000])
def test_quarters_of_the_circle_are_exact(n: int) -> None:
    quarter = n // 4
    roots = roots_of_unity(np.arange(0, 10 * n, quarter), n)
    assert set(roots) == {1, 1j, -1, -1j}


@given(st.integers(1, 9), st.integers(1, 9))
def test_hermitian_projection_leaves_the_inverse_transform_alone(h: int, w: int) -> None:
    rng = np.random.default_rng(h * 10 + w)
    shape = (h, w // 2 + 1, 2)
    k = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    projected = project_hermitian(k, w)
    before, after = (np.fft.irfft2(z, s=(h, w), axes=(0, 1)) for z in (k, projected))
    np.testing.assert_allclose(after, before, atol=1e-14)
    np.testing.assert_allclose(
        projected, np.fft.rfft2(after, axes=(0, 1)), atol=1e-12
    )  # now it is the spectrum of something real
    np.testing.assert_array_equal(project_hermitian(projected, w), projected)
