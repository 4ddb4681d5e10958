"""Layer normalization for CUDA against float64, behind the stand-in driver."""

import numpy as np
import pytest
from run_gpu_kernel import QUANT, STORAGE, TX2, Array, Case, quantized, run_cases

from gfcompile.targets.tvm.kernel import LayerNorm
from gfcompile.targets.tvm.schedules.gpu_norm import schedule_layer_norm

KERNELS = [
    LayerNorm(rows=196, n=384, eps=1e-6, out="int8"),
    LayerNorm(rows=64, n=64, eps=1e-6),
    LayerNorm(rows=5, n=45, eps=1e-5),
    LayerNorm(rows=7, n=1500, eps=1e-6),  # longer than a warp's registers hold
    LayerNorm(rows=9, n=2001, eps=1e-6, out="int8"),
    LayerNorm(rows=10, n=64, eps=1e-6, images=2, leading=3),
]


def norm_case(kernel: LayerNorm) -> Case:
    rng = np.random.default_rng(0)
    args: dict[str, Array] = {
        "x": rng.standard_normal((kernel.x_rows, kernel.n), np.float32) * 2 + 5,
        "gamma": rng.standard_normal(kernel.n, np.float32),
        "beta": rng.standard_normal(kernel.n, np.float32),
    }
    of_images = args["x"].astype(np.float64).reshape(kernel.images, -1, kernel.n)
    x = of_images[:, kernel.leading :].reshape(kernel.rows, kernel.n)
    centred = x - x.mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + kernel.eps)
    expected = centred * scale * args["gamma"] + args["beta"]
    if kernel.out == "int8":
        args["quant"] = QUANT
        expected = quantized(expected, QUANT)
    return schedule_layer_norm(kernel, TX2, STORAGE), args, expected


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_rows_of_any_length_are_normalized(order: str) -> None:
    cases = [norm_case(kernel) for kernel in KERNELS]
    results = run_cases(cases, TX2, order=order)
    for kernel, (_, args, expected), y in zip(KERNELS, cases, results, strict=True):
        if kernel.out == "int8":
            steps = np.abs(y.astype(int) - expected)
            assert steps.max() <= 1  # at ties
            assert (steps > 0).mean() <= 1e-3
        else:
            # A lane adds n / 32 values and then five partners: so many roundings of a mean of 5,
            # as large against a deviation of 2 as 5 / 2 times the same after scaling.
            roundings = kernel.n / 32 + 5 + 8
            bound = roundings * 2.0**-24 * 4 * (np.abs(args["gamma"]) + np.abs(expected) + 1)
            assert (np.abs(y - expected) <= bound).all()
