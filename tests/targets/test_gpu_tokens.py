"""Patches, means and quantization for CUDA against NumPy, behind the stand-in driver."""

import numpy as np
from run_gpu_kernel import QUANT, STORAGE, TX2, Array, Case, quantized, run_cases

from gfcompile.targets.tvm.kernel import Dequantize, Patchify, Quantize, TokenMean
from gfcompile.targets.tvm.schedules.gpu_quant import schedule_dequantize, schedule_quantize
from gfcompile.targets.tvm.schedules.gpu_tokens import schedule_patchify, schedule_token_mean

PATCHES = [
    Patchify(batch=1, channels=3, grid_h=14, grid_w=14, patch_h=16, patch_w=16, out="int8"),
    Patchify(batch=2, channels=3, grid_h=5, grid_w=3, patch_h=3, patch_w=2),
    Patchify(batch=2, channels=1, grid_h=7, grid_w=7, patch_h=2, patch_w=128),  # channels last
    Patchify(batch=1, channels=5, grid_h=3, grid_w=2, patch_h=2, patch_w=4, out="int8"),
]
MEANS = [
    TokenMean(batch=1, tokens=196, n=384, out="int8"),
    TokenMean(batch=2, tokens=49, n=45),
]


def patch_case(kernel: Patchify) -> Case:
    rng = np.random.default_rng(0)
    size = kernel.grid_h * kernel.patch_h, kernel.grid_w * kernel.patch_w
    x = rng.standard_normal((kernel.batch, kernel.channels, *size), np.float32)
    tiles = x.reshape(
        *(kernel.batch, kernel.channels, kernel.grid_h, kernel.patch_h, kernel.grid_w, -1)
    )
    rows = kernel.batch * kernel.grid_h * kernel.grid_w
    expected = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(rows, -1)
    args: dict[str, Array] = {"x": x}
    if kernel.out == "int8":
        args["quant"] = QUANT
        expected = quantized(expected, QUANT)
    return schedule_patchify(kernel, TX2, STORAGE), args, expected


def test_patches_become_rows_in_the_order_of_a_convolution_s_weight() -> None:
    cases = [patch_case(kernel) for kernel in PATCHES]
    for (_, _, expected), y in zip(cases, run_cases(cases, TX2), strict=True):
        np.testing.assert_array_equal(y, expected)


def test_the_mean_over_tokens() -> None:
    rng = np.random.default_rng(0)
    cases: list[Case] = []
    for kernel in MEANS:
        args = {"x": rng.standard_normal((kernel.batch, kernel.tokens, kernel.n), np.float32)}
        expected = args["x"].mean(axis=1, dtype=np.float64)
        if kernel.out == "int8":
            args["quant"] = QUANT
            expected = quantized(expected, QUANT)
        cases.append((schedule_token_mean(kernel, TX2, STORAGE), args, expected))
    for (_, _, expected), y in zip(cases, run_cases(cases, TX2, order="reverse"), strict=True):
        if expected.dtype == np.int8:
            assert np.abs(y.astype(int) - expected).max() <= 1  # at ties
        else:  # a warp adds tokens / 8 values of about 1, and eight such sums are added
            np.testing.assert_allclose(y, expected, rtol=0, atol=(49 / 8 + 8) * 2.0**-24)


def test_quantize_is_onnx_s_and_dequantize_its_inverse() -> None:
    rng = np.random.default_rng(0)
    cases: list[Case] = []
    for size in (1000, 1001):
        x = rng.standard_normal(size, np.float32) * 2
        x[:8] = (np.arange(8) - 3.5) * np.float32(0.02)  # ties, to even
        expected = quantized(x, QUANT)
        scheduled = schedule_quantize(Quantize(size=size), TX2, STORAGE)
        cases.append((scheduled, {"x": x, "quant": QUANT}, expected))
        dequant = np.array([0.02, -3], np.float32)
        back = (expected.astype(np.float32) - dequant[1]) * dequant[0]
        scheduled = schedule_dequantize(Dequantize(size=size), TX2, STORAGE)
        cases.append((scheduled, {"x": expected, "dequant": dequant}, back))
    for (_, _, expected), y in zip(cases, run_cases(cases, TX2), strict=True):
        np.testing.assert_array_equal(y, expected)
