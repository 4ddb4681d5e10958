"""The filter's CPU kernels against numpy's FFT in float64, on every instruction set at hand."""

import re
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import tvm
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from run_kernel import CPUS, host_cpu, run_kernel, tvm_target

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, CircularFilter, DftFilter
from gfcompile.targets.tvm.schedules.cpu_filter import (
    schedule_circular_filter,
    schedule_dft_filter,
)

Floats = npt.NDArray[np.float32]
EPS = np.finfo(np.float32).eps

NATIVE = ("sse", "avx2", "avx512")
ARM = ("a53", "a72", "a76")


def _input(batch: int, h: int, w: int, c: int) -> Floats:
    rng = np.random.default_rng(h * 100 + w)
    return rng.standard_normal((batch, h, w, c)).astype(np.float32)


def _spectral_weight(h: int, w: int, c: int) -> npt.NDArray[np.complex64]:
    """A random K whose first and, for even w, last column are Hermitian along h."""
    rng = np.random.default_rng(h * 100 + w + 1)
    k = rng.standard_normal((h, w // 2 + 1, c)) + 1j * rng.standard_normal((h, w // 2 + 1, c))
    for column in {0, w // 2} if w % 2 == 0 else {0}:
        mirror = np.roll(k[::-1, column], 1, axis=0)
        k[:, column] = (k[:, column] + mirror.conj()) / 2
    return k.astype(np.complex64)


def _tolerance(h: int, w: int, x: Floats, k: npt.NDArray[np.generic]) -> float:
    """Six deviations of the rounding of an output.

    Four transforms of h or w terms, and half a dozen operations more in each: as many roundings,
    each of a partial sum whose size is that of the output, at most the largest |K| |x|.
    """
    roundings = 2 * (h + w) + 24
    return float(6 * EPS * np.sqrt(roundings) * np.abs(k).max() * max(1, np.abs(x).max()))


def _check_dft(
    shape: tuple[int, int, int, int], cpu: Cpu, *, half: bool = False, threads: int = 1
) -> None:
    batch, h, w, c = shape
    x, k = _input(*shape), _spectral_weight(h, w, c)
    constants = {"k_re": k.real, "k_im": k.imag}
    if half:
        constants = {name: value.astype(np.float16) for name, value in constants.items()}
        k = constants["k_re"] + 1j * constants["k_im"].astype(np.float32)
        constants = {name: value.view(np.uint16) for name, value in constants.items()}
    kernel = DftFilter(batch=batch, h=h, w=w, c=c, k_dtype="float16" if half else "float32")
    scheduled = schedule_dft_filter(kernel, cpu, ActStorage())
    after = run_kernel(
        scheduled, {"x": x, **constants, "y": np.zeros_like(x)}, cpu, threads=threads
    )
    spectrum = np.fft.rfft2(x.astype(np.float64), axes=(1, 2)) * k
    expected = np.fft.irfft2(spectrum, s=(h, w), axes=(1, 2))
    np.testing.assert_allclose(after["y"], expected, rtol=0, atol=_tolerance(h, w, x, k))


def _check_circular(
    shape: tuple[int, int, int, int], cpu: Cpu, *, half: bool = False, threads: int = 1
) -> None:
    batch, h, w, c = shape
    x = _input(*shape)
    weight = np.random.default_rng(5).standard_normal((h, w, c)).astype(np.float32)
    if half:
        weight = weight.astype(np.float16)
    kernel = CircularFilter(batch=batch, h=h, w=w, c=c, k_dtype="float16" if half else "float32")
    scheduled = schedule_circular_filter(kernel, cpu, ActStorage())
    constant = weight.view(np.uint16) if half else weight
    args = {"x": x, "kernel": constant, "y": np.zeros_like(x)}
    after = run_kernel(scheduled, args, cpu, threads=threads)
    expected = np.zeros(shape)
    for p in range(h):
        for q in range(w):
            expected += np.roll(x.astype(np.float64), (p, q), axis=(1, 2)) * weight[p, q]
    # h * w products summed one after the other, a partial sum at most about 4 sqrt(h w) large.
    tolerance = 6 * EPS * np.sqrt(h * w) * 4 * np.sqrt(h * w)
    np.testing.assert_allclose(after["y"], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NATIVE + ARM)
def test_dft_filter_equals_numpy(name: str) -> None:
    _check_dft((1, 14, 14, 48), CPUS[name])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("grid", [(14, 14), (5, 8)])
@pytest.mark.parametrize("name", NATIVE)
def test_blocks_of_channels_hold_the_same_bits(
    name: str, grid: tuple[int, int], threads: int
) -> None:
    cpu, (h, w) = CPUS[name], grid
    shape = (2, h, w, 48)
    x, k = _input(*shape), _spectral_weight(h, w, 48)
    arguments = {"k_re": k.real, "k_im": k.imag}
    kernel = DftFilter(batch=2, h=h, w=w, c=48)

    def filtered(kernel: DftFilter, x: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        scheduled = schedule_dft_filter(kernel, cpu, ActStorage())
        given = arguments | {"x": x, "y": np.zeros_like(x)}
        return run_kernel(scheduled, given, cpu, threads=threads)["y"]

    def in_blocks(pixels: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return np.ascontiguousarray(np.moveaxis(pixels.reshape(2, h, w, 3, 16), 3, 0))

    got = filtered(replace(kernel, in_blocks=True), in_blocks(x))
    np.testing.assert_array_equal(got, in_blocks(filtered(kernel, x)))


@pytest.mark.parametrize("name", NATIVE + ARM)
def test_circular_filter_equals_numpy(name: str) -> None:
    _check_circular((1, 7, 7, 48), CPUS[name])


# Odd, even, non-square, single rows and columns; channels that fill no vector, or not the last.
GRIDS = [(7, 7, 33), (5, 8, 24), (1, 9, 3), (9, 1, 5), (1, 1, 1), (2, 2, 4), (13, 6, 17)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
@pytest.mark.parametrize("name", ["avx2", "a72"])
def test_dft_filter_on_any_grid(name: str, grid: tuple[int, int, int]) -> None:
    _check_dft((2, *grid), CPUS[name])


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_circular_filter_on_any_grid(grid: tuple[int, int, int]) -> None:
    _check_circular((2, *grid), CPUS["avx2"])


@pytest.mark.parametrize("grid", [(56, 56, 16), (28, 28, 16)], ids=["56", "28"])
def test_dft_filter_on_the_large_grids_of_the_pyramids(grid: tuple[int, int, int]) -> None:
    _check_dft((1, *grid), host_cpu())


@settings(deadline=None, max_examples=6, derandomize=True, phases=[Phase.generate])
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 40))
def test_dft_filter_on_grids_that_hypothesis_chooses(h: int, w: int, c: int) -> None:
    _check_dft((1, h, w, c), host_cpu())


def test_short_transforms_need_no_scratch_on_arm() -> None:
    def scratch(name: str, n: int) -> set[str]:
        kernel = DftFilter(batch=1, h=n, w=n, c=16)
        return set(schedule_dft_filter(kernel, CPUS[name], ActStorage()).temps)

    assert scratch("a53", 14) == scratch("a76", 7) == {"spectrum"}
    assert scratch("a76", 28) == scratch("avx2", 14) == {"spectrum", "line"}


@pytest.mark.parametrize("name", ["avx512", "sse", "a76"])
def test_float16_weights_are_exactly_their_values(name: str) -> None:
    _check_dft((1, 6, 7, 20), CPUS[name], half=True)
    _check_circular((1, 4, 5, 20), CPUS[name], half=True)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("avx512", (1, 14, 14, 48)),
        ("avx512", (2, 5, 4, 20)),
        ("avx2", (1, 7, 7, 33)),
        ("sse", (1, 3, 9, 5)),
        ("a72", (1, 4, 5, 20)),
        ("a76", (1, 7, 7, 16)),
        ("avx2", (1, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("storage", [ActStorage(), ActStorage(dtype="uint8", offset=128)])
def test_integers_are_summed_exactly(
    name: str, shape: tuple[int, int, int, int], storage: ActStorage
) -> None:
    batch, h, w, c = shape
    rng = np.random.default_rng(7)
    x = rng.integers(-128, 128, shape).astype(np.int8)
    weight = rng.integers(-127, 128, (h, w, c)).astype(np.int8)
    scale, zero_point = rng.uniform(1e-4, 1e-3, c).astype(np.float32), -93
    kernel = CircularFilter(batch=batch, h=h, w=w, c=c, x="int8")
    args = {
        "x": (x.astype(np.int16) + storage.offset).astype(storage.dtype),
        "kernel": weight,
        "scale": scale,
        "zero_point": np.array([zero_point], np.float32),
        "y": np.zeros(shape, np.float32),
    }
    after = run_kernel(schedule_circular_filter(kernel, CPUS[name], storage), args, CPUS[name])
    sums = np.zeros(shape, np.int64)
    for p in range(h):
        for q in range(w):
            sums += np.roll(x.astype(np.int64) - zero_point, (p, q), axis=(1, 2)) * weight[p, q]
    assert np.array_equal(after["y"], sums.astype(np.float32) * scale)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_split_into_threads_gives_the_whole_result(threads: int) -> None:
    _check_dft((2, 5, 4, 40), CPUS["avx2"], threads=threads)
    _check_circular((2, 5, 4, 40), CPUS["avx2"], threads=threads)


@pytest.mark.parametrize(
    ("name", "vector", "single"),
    [
        ("avx512", r"vfmadd\d+ps\s.*zmm", r"vfn?m(add|sub)\d+ss"),
        ("avx2", r"vfmadd\d+ps\s.*ymm", r"vfn?m(add|sub)\d+ss"),
        ("a72", r"fmla\s+v\d+\.4s", r"fmadd\s+s\d+"),
    ],
)
def test_every_product_is_a_vector_product(name: str, vector: str, single: str) -> None:
    cpu = CPUS[name]
    for scheduled in (
        schedule_dft_filter(DftFilter(batch=1, h=14, w=14, c=64), cpu, ActStorage()),
        schedule_circular_filter(CircularFilter(batch=1, h=7, w=7, c=64), cpu, ActStorage()),
    ):
        func = scheduled.steps[0].func.with_attr("global_symbol", "filter")
        assembly = tvm.compile(tvm.IRModule({"filter": func}), tvm_target(cpu)).mod.inspect_source(
            "asm"
        )
        assert len(re.findall(vector, assembly)) > 40
        assert not re.findall(single, assembly)
