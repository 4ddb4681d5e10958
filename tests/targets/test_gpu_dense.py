"""CUDA products against float64 and exact integers, behind the stand-in driver."""

import numpy as np
import pytest
import torch
from run_gpu_kernel import GPUS, QUANT, STORAGE, TX2, Array, Case, quantized, run_cases

from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.kernel import Dense, quant_args
from gfcompile.targets.tvm.schedules.gpu_dense import choose_tile, product_mode, schedule_dense

EPS = 2.0**-24
GROUP_QUANTS = np.stack([quant_args(0.02, -3), quant_args(0.007, 11), quant_args(0.05, -128)])


def reference(kernel: Dense, args: dict[str, Array]) -> Array:
    """float64, but for the quantization, which has its own float32 definition."""
    if kernel.x == "int8":
        total = args["x"].astype(np.int64) @ args["w"].astype(np.int64) + args["bias"]
        value = total.astype(np.float32).astype(np.float64) * args["scale"]
    else:
        value = args["x"].astype(np.float64) @ args["w"] + args["bias"]
    residual = args.get("residual", np.zeros((1, kernel.n), np.float32))
    if kernel.residual_dtype == "float16":
        residual = residual.view(np.float16)
    residual = residual[np.arange(kernel.m) % len(residual)]
    value = value + residual if kernel.residual_first else value
    if kernel.gelu:
        value = torch.nn.functional.gelu(torch.from_numpy(value)).numpy()
    value = value if kernel.residual_first else value + residual
    if kernel.out == "float32":
        return value
    groups = np.split(value, kernel.out_groups, axis=1)
    quants = args["quant"].reshape(kernel.out_groups, 4)
    return np.hstack([quantized(*pair) for pair in zip(groups, quants, strict=True)])


def dense_case(kernel: Dense, gpu: Gpu, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    m, n, k = kernel.m, kernel.n, kernel.k
    args: dict[str, Array]
    if kernel.x == "int8":
        args = {
            "x": rng.integers(-128, 128, (m, k), np.int8),
            "w": rng.integers(-127, 128, (k, n), np.int8),
            # A product of two such values has a deviation of some 5400.
            "scale": (rng.uniform(0.5, 1.5, n) / (5400 * np.sqrt(k))).astype(np.float32),
            "bias": rng.integers(-9999, 9999, n, np.int32),
        }
    else:
        args = {
            "x": rng.standard_normal((m, k), np.float32),
            "w": rng.standard_normal((k, n), np.float32) / np.float32(np.sqrt(k)),
            "bias": rng.standard_normal(n, np.float32),
        }
    if kernel.residual_rows:
        residual = rng.standard_normal((kernel.residual_rows, n), np.float32)
        if kernel.residual_dtype == "float16":
            residual = residual.astype(np.float16).view(np.uint16)
        args["residual"] = residual
    if kernel.out == "int8":
        args["quant"] = QUANT if kernel.out_groups == 1 else GROUP_QUANTS[: kernel.out_groups]
    return schedule_dense(kernel, gpu, STORAGE), args, reference(kernel, args)


def assert_close(kernel: Dense, y: Array, case: Case) -> None:
    _, args, expected = case
    if kernel.out == "int8":
        steps = np.abs(y.astype(int) - expected)
        # A value within float error of a rounding tie may fall to its other side.
        assert steps.max() <= 1
        assert (steps > 0).mean() <= 1e-3
        return
    if kernel.x == "int8":
        magnitude = np.abs(expected) + 1
        bound = 4 * EPS * magnitude
    else:
        # Each of k additions and products rounds by at most EPS of what it adds up to at most.
        absolute = np.abs(args["x"]).astype(np.float64) @ np.abs(args["w"])
        bound = (kernel.k + 4) * EPS * (absolute + np.abs(args["bias"]) + 1)
    if kernel.gelu:  # its slope is at most 1.13; the polynomial adds 3e-7 |v|
        bound = 1.13 * bound + 4e-7 * (np.abs(expected) + 1)
    assert (np.abs(y - expected) <= bound).all()


FLOAT_KERNELS = [
    Dense(m=196, n=256, k=96, gelu=True),
    Dense(m=98, n=64, k=128, residual_rows=98),
    Dense(m=50, n=67, k=45, residual_rows=25),  # nothing divides
    Dense(m=1, n=1000, k=384),
    Dense(m=3, n=45, k=37, residual_rows=1, out="int8"),
    Dense(m=30, n=48, k=32, gelu=True, residual_rows=1, residual_first=True),
    Dense(m=7, n=4, k=4, out="int8", gelu=True),
    Dense(m=9, n=42, k=20, out="int8", out_groups=3),
]
INT8_KERNELS = [
    Dense(m=196, n=256, k=96, x="int8", gelu=True, out="int8"),
    Dense(m=98, n=64, k=1536, x="int8", residual_rows=98),
    Dense(m=50, n=64, k=32, x="int8", residual_rows=25, residual_dtype="float16"),
    Dense(m=50, n=68, k=45, x="int8", out="int8"),
    Dense(m=50, n=66, k=2052, x="int8"),
    Dense(m=67, n=144, k=64, x="int8", out="int8", out_groups=3),
    Dense(m=1, n=96, k=64, x="int8", out="int8", out_groups=2),
    Dense(m=2, n=1001, k=384, x="int8", gelu=True),
]


@pytest.mark.parametrize(
    ("arch", "order"), [("sm_62", "forward"), ("sm_62", "reverse"), ("sm_87", "reverse")]
)
def test_products_with_every_epilogue_are_right_in_either_thread_order(
    arch: str, order: str
) -> None:
    gpu = GPUS[arch]
    kernels = [*FLOAT_KERNELS, *INT8_KERNELS]
    cases = [dense_case(kernel, gpu) for kernel in kernels]
    for kernel, case, y in zip(kernels, cases, run_cases(cases, gpu, order=order), strict=True):
        assert_close(kernel, y, case)


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("m", [1, 56])
def test_int8_products_of_the_largest_magnitudes_are_exact(arch: str, m: int) -> None:
    """-128 * 127 summed 1536 times is beyond what a float32 counts in ones."""
    rng = np.random.default_rng(1)
    n, k = 64, 1536
    x = np.full((m, k), -128, np.int8)
    w = np.full((k, n), 127, np.int8)
    w[rng.integers(0, k, 200), rng.integers(0, n, 200)] -= 1
    x[:, rng.integers(0, k, 9)] += rng.integers(0, 3, 9).astype(np.int8)
    total = x.astype(np.int64) @ w.astype(np.int64)
    assert np.abs(total).max() > 2**24
    # The bias takes all but a small odd number away again, which shows an error of one.
    wanted = rng.integers(-99, 99, n) * 2 + 1
    bias = (wanted - total[0]).astype(np.int32)
    args = {"x": x, "w": w, "scale": np.ones(n, np.float32), "bias": bias}
    kernel = Dense(m=m, n=n, k=k, x="int8")
    (y,) = run_cases(
        [(schedule_dense(kernel, GPUS[arch], STORAGE), args, total + bias)], GPUS[arch]
    )
    np.testing.assert_array_equal(y, total + bias)


def test_int8_is_computed_in_what_the_gpu_has() -> None:
    kernel = Dense(m=196, n=384, k=384, x="int8")
    modes = {arch: product_mode(kernel, gpu) for arch, gpu in GPUS.items()}
    assert modes == {"sm_53": "widened", "sm_62": "widened", "sm_72": "dp4a", "sm_87": "dp4a"}


def test_the_tile_of_the_zoo_s_grid_has_no_padding() -> None:
    kernel = Dense(m=196, n=1536, k=384)
    tile = choose_tile(kernel, TX2, "float")
    assert 196 % tile.rows == 0
    assert 1536 % tile.columns == 0
