"""LayerNorm's CPU kernel against torch in float64, on every instruction set at hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from run_kernel import CPUS, run_kernel

from gfcompile.targets.tvm.kernel import Act, ActStorage, LayerNorm, channel_blocks, quant_args
from gfcompile.targets.tvm.schedule import act_storage
from gfcompile.targets.tvm.schedules.cpu_norm import schedule_layer_norm

Floats = npt.NDArray[np.float32]
EPS = np.finfo(np.float32).eps
ALL = ("sse", "avx2", "avx512", "a53", "a72", "a76")


def _arguments(rows: int, n: int, *, mean: float = 0.0) -> dict[str, Floats]:
    rng = np.random.default_rng(n)
    return {
        "x": (rng.standard_normal((rows, n)) + mean).astype(np.float32),
        "gamma": rng.standard_normal(n).astype(np.float32),
        "beta": rng.standard_normal(n).astype(np.float32),
        "y": np.zeros((rows, n), np.float32),
    }


def _reference(arguments: dict[str, Floats], eps: float) -> npt.NDArray[np.float64]:
    x, gamma, beta = (torch.from_numpy(arguments[k]).double() for k in ("x", "gamma", "beta"))
    return torch.nn.functional.layer_norm(x, x.shape[-1:], gamma, beta, eps).numpy()


def _tolerance(arguments: dict[str, Floats], n: int) -> float:
    """What rounding may do to gamma * (x - mean) / deviation + beta, of deviation 1.

    The mean is a sum of n terms, in 4 or more running sums: n / 4 roundings of the mean's size
    at worst, which the deviation does not shrink; the rest is a handful of roundings of y.
    """
    offset = np.abs(arguments["x"].mean()) + 1
    gamma = np.abs(arguments["gamma"]).max()
    return float(EPS * gamma * (n / 4 * offset + 16 * np.abs(arguments["x"]).max()))


@pytest.mark.parametrize("name", ALL)
def test_layer_norm_equals_torch(name: str) -> None:
    arguments = _arguments(5, 384)
    kernel = LayerNorm(rows=5, n=384, eps=1e-6)
    after = run_kernel(schedule_layer_norm(kernel, CPUS[name], ActStorage()), arguments, CPUS[name])
    expected = _reference(arguments, 1e-6)
    np.testing.assert_allclose(after["y"], expected, rtol=0, atol=_tolerance(arguments, 384))


@pytest.mark.parametrize("out", ["float32", "int8"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", ["avx512", "a76"])
def test_leading_rows_of_each_image_are_skipped(name: str, images: int, out: Act) -> None:
    cpu, storage = CPUS[name], act_storage(CPUS[name])
    arguments: dict[str, Any] = {**_arguments(images * 5, 64)}
    kept = arguments["x"].reshape(images, 5, 64)[:, 2:].reshape(-1, 64)
    whole = LayerNorm(rows=images * 3, n=64, eps=1e-6, out=out)
    y = np.zeros(kept.shape, storage.dtype_of(out))
    arguments |= {"y": y, "quant": quant_args(0.02, 3)}
    skips = replace(whole, images=images, leading=2)
    results = [
        run_kernel(schedule_layer_norm(kernel, cpu, storage), {**arguments, "x": x}, cpu)["y"]
        for kernel, x in ((skips, arguments["x"]), (whole, kept))
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("n", [1, 3, 17, 96, 131])
@pytest.mark.parametrize("name", ["avx512", "a72"])
def test_rows_that_fill_no_vector(name: str, n: int) -> None:
    arguments = _arguments(3, n)
    kernel = LayerNorm(rows=3, n=n, eps=1e-5)
    after = run_kernel(schedule_layer_norm(kernel, CPUS[name], ActStorage()), arguments, CPUS[name])
    # Two close values have a small deviation, and their rounding is magnified by it.
    deviations = np.sqrt(arguments["x"].var(axis=1, dtype=np.float64) + 1e-5)
    tolerance = _tolerance(arguments, n) / min(1.0, deviations.min())
    np.testing.assert_allclose(after["y"], _reference(arguments, 1e-5), rtol=0, atol=tolerance)


def test_a_mean_far_above_the_deviation_does_not_cancel() -> None:
    # E[x^2] - E[x]^2 would be off by 1e-7 * 1e6 here, a tenth of the variance.
    arguments = _arguments(4, 256, mean=1000.0)
    kernel = LayerNorm(rows=4, n=256, eps=1e-6)
    cpu = CPUS["avx2"]
    after = run_kernel(schedule_layer_norm(kernel, cpu, ActStorage()), arguments, cpu)
    expected = _reference(arguments, 1e-6)
    np.testing.assert_allclose(after["y"], expected, rtol=0, atol=_tolerance(arguments, 256))


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("avx512", ActStorage(dtype="uint8", offset=128)),
        ("avx2", ActStorage()),
        ("a76", ActStorage()),
    ],
)
def test_quantized_output_is_the_float_one_quantized(name: str, storage: ActStorage) -> None:
    cpu, arguments = CPUS[name], _arguments(4, 100)
    floats = run_kernel(
        schedule_layer_norm(LayerNorm(rows=4, n=100, eps=1e-6), cpu, storage), arguments, cpu
    )
    scale, zero_point = 0.03, 11
    quantized = run_kernel(
        schedule_layer_norm(LayerNorm(rows=4, n=100, eps=1e-6, out="int8"), cpu, storage),
        arguments
        | {"quant": quant_args(scale, zero_point), "y": np.zeros((4, 100), storage.dtype)},
        cpu,
    )
    inverse, low, high, zero = quant_args(scale, zero_point)
    expected = np.rint(np.clip(floats["y"] * inverse, low, high)) + zero + storage.offset
    # The same float operations, which LLVM may contract differently: a value within a rounding
    # error of a tie may go the other way.
    difference = np.abs(quantized["y"].astype(np.int32) - expected)
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.99


def test_any_split_into_threads_gives_the_whole_result() -> None:
    arguments = _arguments(70, 256)
    kernel, cpu = LayerNorm(rows=70, n=256, eps=1e-6), CPUS["avx2"]
    scheduled = schedule_layer_norm(kernel, cpu, ActStorage())
    one, three = (run_kernel(scheduled, arguments, cpu, threads=n)["y"] for n in (1, 3))
    np.testing.assert_array_equal(one, three)


def _in_blocks(rows: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    blocks, count, width = channel_blocks(*rows.shape)
    return np.ascontiguousarray(rows.reshape(count, blocks, width).swapaxes(0, 1))


@pytest.mark.parametrize("name", ["sse", "avx2", "avx512"])
def test_blocks_of_channels_hold_the_same_bits(name: str) -> None:
    cpu, storage = CPUS[name], act_storage(CPUS[name])
    given: dict[str, Any] = {**_arguments(7, 96), "quant": quant_args(0.02, 3)}

    def normalized(kernel: LayerNorm) -> npt.NDArray[np.generic]:
        x, y = given["x"], np.zeros((7, 96), storage.dtype_of(kernel.out))
        arguments = {
            "x": _in_blocks(x) if kernel.x_in_blocks else x,
            "y": _in_blocks(y) if kernel.y_in_blocks else y,
        }
        return run_kernel(schedule_layer_norm(kernel, cpu, storage), given | arguments, cpu)["y"]

    kernel = LayerNorm(rows=7, n=96, eps=1e-6)
    got = normalized(replace(kernel, y_in_blocks=True))
    np.testing.assert_array_equal(got, _in_blocks(normalized(kernel)))
    for out in ("float32", "int8"):
        whole = replace(kernel, out=out)
        got = normalized(replace(whole, x_in_blocks=True))
        np.testing.assert_array_equal(got, normalized(whole))
