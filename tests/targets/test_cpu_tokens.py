"""Patchify and TokenMean on CPUs against numpy, on every instruction set at hand."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from run_kernel import CPUS, run_kernel

from gfcompile.targets.tvm.kernel import ActStorage, Patchify, TokenMean, quant_args
from gfcompile.targets.tvm.schedules.cpu_tokens import schedule_patchify, schedule_token_mean

Array = npt.NDArray[Any]
EPS = np.finfo(np.float32).eps
ALL = ("sse", "avx2", "avx512", "a72", "a76")
UNSIGNED = ActStorage(dtype="uint8", offset=128)


def _patches(kernel: Patchify, x: Array) -> Array:
    rows = x.reshape(
        kernel.batch, kernel.channels, kernel.grid_h, kernel.patch_h, kernel.grid_w, kernel.patch_w
    )
    return rows.transpose(0, 2, 4, 1, 3, 5).reshape(
        kernel.batch * kernel.grid_h * kernel.grid_w, -1
    )


def _image(kernel: Patchify) -> Array:
    height, width = kernel.grid_h * kernel.patch_h, kernel.grid_w * kernel.patch_w
    shape = (kernel.batch, kernel.channels, height, width)
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def _check_patchify(kernel: Patchify, name: str, storage: ActStorage, threads: int = 1) -> None:
    x = _image(kernel)
    expected = _patches(kernel, x)
    arguments = {"x": x, "y": np.zeros(expected.shape, np.float32)}
    if kernel.out == "int8":
        inverse, low, high, zero = quant = quant_args(0.02, -9)
        stored = np.rint(np.clip(expected * inverse, low, high)) + zero + storage.offset
        expected = stored.astype(storage.dtype)
        arguments |= {"quant": quant, "y": np.zeros(expected.shape, storage.dtype)}
    scheduled = schedule_patchify(kernel, CPUS[name], storage)
    after = run_kernel(scheduled, arguments, CPUS[name], threads=threads)
    np.testing.assert_array_equal(after["y"], expected)


@pytest.mark.parametrize("out", ["float32", "int8"])
@pytest.mark.parametrize("name", ALL)
def test_patches_of_an_image(name: str, out: Literal["float32", "int8"]) -> None:
    kernel = Patchify(batch=1, channels=3, grid_h=3, grid_w=4, patch_h=16, patch_w=16, out=out)
    _check_patchify(kernel, name, UNSIGNED if name == "avx512" else ActStorage())


@pytest.mark.parametrize("out", ["float32", "int8"])
@pytest.mark.parametrize("name", ALL)
def test_patches_of_a_channels_last_grid(name: str, out: Literal["float32", "int8"]) -> None:
    kernel = Patchify(batch=2, channels=1, grid_h=3, grid_w=2, patch_h=2, patch_w=80, out=out)
    _check_patchify(kernel, name, UNSIGNED if name == "avx512" else ActStorage())


@pytest.mark.parametrize("patch", [(1, 1), (4, 4), (3, 5), (6, 10)], ids=str)
@pytest.mark.parametrize("name", ["avx2", "a72"])
def test_patches_of_any_size(name: str, patch: tuple[int, int]) -> None:
    height, width = patch
    kernel = Patchify(batch=2, channels=5, grid_h=3, grid_w=2, patch_h=height, patch_w=width)
    _check_patchify(kernel, name, ActStorage())


def test_patchify_in_threads() -> None:
    kernel = Patchify(batch=1, channels=3, grid_h=7, grid_w=7, patch_h=16, patch_w=16)
    _check_patchify(kernel, "avx2", ActStorage(), threads=3)


def _check_mean(kernel: TokenMean, name: str, threads: int = 1) -> None:
    rng = np.random.default_rng(kernel.n)
    x = rng.standard_normal((kernel.batch, kernel.tokens, kernel.n)).astype(np.float32)
    scheduled = schedule_token_mean(kernel, CPUS[name], ActStorage())
    arguments = {"x": x, "y": np.zeros((kernel.batch, kernel.n), np.float32)}
    after = run_kernel(scheduled, arguments, CPUS[name], threads=threads)
    # A rounding per token, each of a partial sum that is at most tokens * max|mean| and whose
    # errors the division by tokens shrinks again.
    tolerance = EPS * kernel.tokens * np.abs(x).max()
    np.testing.assert_allclose(after["y"], x.mean(axis=1, dtype=np.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_mean_over_tokens(name: str) -> None:
    _check_mean(TokenMean(batch=1, tokens=49, n=384), name)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (3, 10, 100), (1, 196, 65)], ids=str)
@pytest.mark.parametrize("name", ["avx512", "a72"])
def test_mean_of_any_shape(name: str, shape: tuple[int, int, int]) -> None:
    batch, tokens, n = shape
    _check_mean(TokenMean(batch=batch, tokens=tokens, n=n), name)


def test_mean_in_threads() -> None:
    _check_mean(TokenMean(batch=2, tokens=100, n=384), "avx2", threads=3)


@pytest.mark.parametrize(("name", "storage"), [("avx512", UNSIGNED), ("a76", ActStorage())])
def test_quantized_mean(name: str, storage: ActStorage) -> None:
    # Integers below 2**24 add exactly in any order, and 64 tokens make the division exact.
    x = np.random.default_rng(1).integers(-50, 50, (2, 64, 48)).astype(np.float32)
    kernel = TokenMean(batch=2, tokens=64, n=48, out="int8")
    quant = quant_args(0.125, 5)
    after = run_kernel(
        schedule_token_mean(kernel, CPUS[name], storage),
        {"x": x, "quant": quant, "y": np.zeros((2, 48), storage.dtype)},
        CPUS[name],
    )
    expected = np.clip(np.rint(x.mean(axis=1) * 8) + 5, -128, 127)
    np.testing.assert_array_equal(after["y"].astype(np.int32) - storage.offset, expected)
