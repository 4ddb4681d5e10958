"""Discrete Fourier transforms as matrices, and which form of the global filter a target runs.

A global filter, irfft2(rfft2(x) * K), multiplies a grid by three linear maps. All of them are
small, so each is a matrix product here; this module has the matrices, in float64, and the cost of
the products. Callers cast them to the precision that they compute in.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from gfcompile.targets.target import (
    GPU_LAUNCH_US,
    AnyTarget,
    Cpu,
    Gpu,
    ModelFormat,
    Target,
)

Matrix = npt.NDArray[np.float64]
FilterForm = Literal["dft", "circular", "native"]

# On CPUs both forms run at 0.6 of the fp32 peak, give or take a tenth, once the DFT form is charged
# 16 operations per element beside its products, for the sums and differences of mirror images and
# for the product with K: measured with AVX-512 and AVX2 on grids from 4x4 to 56x56. The break-even
# is at 5x5, where the two are equal within 5%.
_CPU_EFFICIENCY = 0.6
_CPU_DFT_OPERATIONS_PER_ELEMENT = 16

# On GPUs an estimate, not measured on a board: half the fp32 peak, all of the bandwidth, and the
# time between two dependent kernels.
_GPU_EFFICIENCY = 0.5
_GPU_DFT_LAUNCHES = 3


def rfft_matrices(n: int) -> tuple[Matrix, Matrix]:
    """Real and imaginary parts of the orthonormal real-input DFT of length n.

    For real x of length n, ``x @ re + 1j * (x @ im) == np.fft.rfft(x, norm="ortho")``.

    Returns:
        re, im: each (n, n // 2 + 1).
    """
    theta = _angles(n, n, n // 2 + 1)
    return np.cos(theta) / np.sqrt(n), -np.sin(theta) / np.sqrt(n)


def irfft_matrices(n: int) -> tuple[Matrix, Matrix]:
    """Inverse of `rfft_matrices`: from the half spectrum back to the n real values.

    For a half spectrum X, ``X.real @ re + X.imag @ im == np.fft.irfft(X, n, norm="ortho")``.

    Returns:
        re, im: each (n // 2 + 1, n).
    """
    re, im = rfft_matrices(n)
    # Every frequency but 0 and n/2 stands for its mirror image too.
    weight = _mirror_weights(n)[:, None]
    # The imaginary part of those two does not reach a real result; their sines are zero but for
    # the rounding of sin(pi), which is dropped as well.
    sine = np.where(weight == 2, im.T, 0)
    return weight * re.T, weight * sine


def dft_matrices(n: int) -> tuple[Matrix, Matrix]:
    """Real and imaginary parts of the orthonormal complex DFT of length n, (n, n) each."""
    theta = _angles(n, n, n)
    return np.cos(theta) / np.sqrt(n), -np.sin(theta) / np.sqrt(n)


def cosine_matrix(n: int) -> Matrix:
    """cos(2 pi j k / n) / sqrt(n) for j, k = 0 ... n // 2: the even half of the real DFT."""
    cosine: Matrix = np.cos(_angles(n, n // 2 + 1, n // 2 + 1)) / np.sqrt(n)
    return cosine


def sine_matrix(n: int) -> Matrix:
    """sin(2 pi j k / n) / sqrt(n) for j, k = 1 ... (n - 1) // 2: the odd half of the real DFT."""
    side = (n - 1) // 2 + 1
    sine: Matrix = np.sin(_angles(n, side, side)[1:, 1:]) / np.sqrt(n)
    return sine


def folded_dft_macs(h: int, w: int) -> int:
    """Products per channel of the DFT form when mirror images are added first (CPUs).

    Every line of n values takes (n//2 + 1)^2 cosine and ((n-1)//2)^2 sine products, and there are
    h + w lines, there and back.
    """
    return 2 * (h * _folded_line(w) + w * _folded_line(h))


def plain_dft_macs(h: int, w: int) -> int:
    """Products per channel of the DFT form as dense matrices on the half spectrum (GPUs)."""
    half = w // 2 + 1
    return 2 * (h * w * 2 * half + half * 4 * h * h)


def circular_macs(h: int, w: int) -> int:
    """Products per channel of the circular form."""
    return (h * w) ** 2


def choose_form(target: AnyTarget, h: int, w: int, c: int) -> FilterForm:
    """The faster form of a global filter over an h x w grid of c channels on `target`.

    "native" is never chosen: no target that is compiled through kernels of our own has an FFT, and
    that of the model formats takes powers of two alone or none at all.
    """
    if isinstance(target, ModelFormat):
        # In float a depthwise convolution of the grid's own size takes LiteRT 12 times as long at
        # 14x14. In 8 bits it keeps 38 dB of a filter and a spectrum 14, as its largest frequency
        # leaves the others few steps.
        return "circular" if target.integer_only else "dft"
    dft_us, circular_us = filter_costs_us(target, h, w, c)
    return "dft" if dft_us <= circular_us else "circular"


def filter_costs_us(target: Target, h: int, w: int, c: int) -> tuple[float, float]:
    """Estimated microseconds of the DFT and of the circular form, on one core or the GPU."""
    if target.gpu:
        return _gpu_costs_us(target.gpu, target.bandwidth_gb_s, h, w, c)
    return _cpu_costs_us(target.cpu, h, w, c)


def _cpu_costs_us(cpu: Cpu, h: int, w: int, c: int) -> tuple[float, float]:
    macs_per_us = _CPU_EFFICIENCY * cpu.fp32_gflops / 2 * 1e3
    dft = folded_dft_macs(h, w) + _CPU_DFT_OPERATIONS_PER_ELEMENT * h * w
    return c * dft / macs_per_us, c * circular_macs(h, w) / macs_per_us


def _gpu_costs_us(gpu: Gpu, bandwidth_gb_s: float, h: int, w: int, c: int) -> tuple[float, float]:
    macs_per_us = _GPU_EFFICIENCY * gpu.fp32_tflops / 2 * 1e6
    elements_per_us = bandwidth_gb_s * 1e3 / 4
    image, spectrum = h * w, h * 2 * (w // 2 + 1)
    # Input, output and K once; the spectrum is written and read twice between the three kernels.
    dft = plain_dft_macs(h, w) / macs_per_us + (2 * image + 5 * spectrum) / elements_per_us
    circular = circular_macs(h, w) / macs_per_us + 3 * image / elements_per_us
    return c * dft + _GPU_DFT_LAUNCHES * GPU_LAUNCH_US, c * circular + GPU_LAUNCH_US


def _folded_line(n: int) -> int:
    return (n // 2 + 1) ** 2 + ((n - 1) // 2) ** 2


def _angles(n: int, rows: int, columns: int) -> Matrix:
    # Reduce j*k mod n while it is still an exact integer: the raw angle grows to 2*pi*n and its
    # cosine would lose the digits that float32 weights keep.
    return 2 * np.pi * (np.outer(np.arange(rows), np.arange(columns)) % n) / n


def _mirror_weights(n: int) -> Matrix:
    """How often each frequency of the half spectrum occurs in the whole one: 1 or 2."""
    k = np.arange(n // 2 + 1)
    return np.where((k == 0) | (2 * k == n), 1.0, 2.0)
