"""The discrete Fourier transform as real matrices, in float64."""

from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def roots_of_unity(numerators: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.complex128]:
    """exp(2j * pi * numerators / n), exact at every quarter of the circle."""
    # Reduce mod n while it is still an exact integer: the raw angle grows to 2*pi*n and its
    # cosine would lose the digits that float32 weights keep.
    reduced = numerators % n
    roots = np.exp(2j * np.pi * reduced / n)
    quarters = np.array([1, 1j, -1, -1j])[4 * reduced // n]
    return np.where(4 * reduced % n == 0, quarters, roots)


def dft_tensor(
    size: int, parts: int, length: int, *, inverse: bool, onesided: bool
) -> npt.NDArray[np.float64]:
    """What ONNX's DFT does along one axis, as a real linear map.

    Args:
        size: of the input's axis; it is cut or padded with zeros to the transform's length.
        parts: of the input's last axis: 1 for real input, 2 for (real, imaginary).
        length: of the transform (of its result in time, when inverse and onesided).
        inverse: conjugated, and divided by `length`.
        onesided: only the first half of the spectrum is there: of the output, or, when inverse,
            of the input, which stands for its Hermitian completion and gives real output.

    Returns:
        (size, parts, output size, output parts): y[k, b] = sum_ja x[j, a] * tensor[j, a, k, b].
    """
    half = length // 2 + 1
    sign = 1 if inverse else -1
    rows = half if inverse and onesided else length
    columns = half if onesided and not inverse else length
    roots = roots_of_unity(sign * np.outer(np.arange(rows), np.arange(columns)), length)
    if inverse:
        roots = roots / length
    if inverse and onesided:
        # Each column that is not its own mirror image stands for two.
        roots = roots * _multiplicity(length)[:, None]
    used = min(size, rows)
    out_parts = 1 if inverse and onesided else 2
    tensor = np.zeros((size, parts, columns, out_parts))
    tensor[:used, 0, :, 0] = roots.real[:used]
    if out_parts == 2:
        tensor[:used, 0, :, 1] = roots.imag[:used]
    if parts == 2:
        tensor[:used, 1, :, 0] = -roots.imag[:used]
        if out_parts == 2:
            tensor[:used, 1, :, 1] = roots.real[:used]
    return tensor


def real_dft_matrices(n: int) -> tuple[Matrix, Matrix]:
    """Real and imaginary part of the orthonormal DFT of n real values.

    For real x of length n, ``re @ x + 1j * (im @ x) == np.fft.rfft(x, norm="ortho")``.

    Returns:
        re, im: each (n // 2 + 1, n).
    """
    roots = roots_of_unity(-np.outer(np.arange(n // 2 + 1), np.arange(n)), n) / np.sqrt(n)
    return roots.real, roots.imag


def inverse_real_dft_matrices(n: int) -> tuple[Matrix, Matrix]:
    """The orthonormal inverse of `real_dft_matrices`, from half a spectrum.

    ``re @ z.real + im @ z.imag == np.fft.irfft(z, n, norm="ortho")``.

    Returns:
        re, im: each (n, n // 2 + 1).
    """
    roots = roots_of_unity(np.outer(np.arange(n), np.arange(n // 2 + 1)), n) / np.sqrt(n)
    roots = roots * _multiplicity(n)
    return roots.real, -roots.imag


def dft_matrix(n: int) -> Matrix:
    """The orthonormal DFT of n complex values, stacked as (real, imaginary).

    ``dft_matrix(n) @ [z.real, z.imag]`` is ``np.fft.fft(z, norm="ortho")``, stacked likewise; the
    inverse is its transpose.

    Returns:
        (2 * n, 2 * n).
    """
    roots = roots_of_unity(-np.outer(np.arange(n), np.arange(n)), n) / np.sqrt(n)
    return np.block([[roots.real, -roots.imag], [roots.imag, roots.real]])


def project_hermitian(spectrum: npt.NDArray[np.complex128], w: int) -> npt.NDArray[Any]:
    """`spectrum` (h, w // 2 + 1, C) made the half spectrum of a real (h, w, C) signal.

    The first and, for even w, the last column are their own mirror images along h. What is not
    Hermitian there has no meaning: an inverse real FFT may drop it (NumPy, pocketfft) or not.
    """
    projected = spectrum.copy()
    h = spectrum.shape[0]
    mirrored = -np.arange(h) % h
    for column in {0, w // 2} if w % 2 == 0 else {0}:
        values = spectrum[:, column]
        projected[:, column] = (values + values[mirrored].conj()) / 2
    return projected


def _multiplicity(n: int) -> npt.NDArray[np.float64]:
    """How many entries of the full spectrum each entry of the half spectrum stands for."""
    count = np.full(n // 2 + 1, 2.0)
    count[0] = 1
    if n % 2 == 0:
        count[-1] = 1
    return count
