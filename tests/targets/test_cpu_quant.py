"""Quantize and Dequantize on CPUs, bit for bit against the definition in ONNX."""

import numpy as np
import numpy.typing as npt
import pytest
from run_kernel import CPUS, run_kernel

from gfcompile.targets.tvm.kernel import ActStorage, Dequantize, Quantize, quant_args
from gfcompile.targets.tvm.schedules.cpu_quant import schedule_dequantize, schedule_quantize

ALL = ("sse", "avx2", "avx512", "a72", "a76")
STORAGES = [ActStorage(), ActStorage(dtype="uint8", offset=128)]
SIZES = [1, 15, 1000, 20000]


def _quantized(x: npt.NDArray[np.float32], scale: float, zero_point: int) -> npt.NDArray[np.int8]:
    inverse = np.float32(1) / np.float32(scale)
    with np.errstate(over="ignore"):  # the largest values become infinite here, as in the kernel
        steps = np.rint(x * inverse) + zero_point
    return np.clip(steps, -128, 127).astype(np.int8)


def _values(scale: float) -> npt.NDArray[np.float32]:
    """Ties of both parities, their neighbours, both ends and far beyond, signed zeros."""
    # A scale that is a power of two makes every tie exact.
    ties = (np.arange(-140, 140, dtype=np.float32) + np.float32(0.5)) * np.float32(scale)
    beside = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (-1, 1)]
    far = np.array([0.0, -0.0, 1e6, -1e6, 3e38, -3e38, 1e-40, np.inf, -np.inf], np.float32)
    return np.concatenate([ties, *beside, far])


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.dtype)
@pytest.mark.parametrize("name", ALL)
def test_quantize_rounds_half_to_even_and_saturates(name: str, storage: ActStorage) -> None:
    cpu = CPUS[name]
    for zero_point in (-128, 0, 127):
        x = _values(0.25)
        arguments = {
            "x": x,
            "quant": quant_args(0.25, zero_point),
            "y": np.zeros(x.size, storage.dtype),
        }
        after = run_kernel(schedule_quantize(Quantize(size=x.size), cpu, storage), arguments, cpu)
        logical = after["y"].astype(np.int32) - storage.offset
        np.testing.assert_array_equal(logical, _quantized(x, 0.25, zero_point))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["avx512", "a72"])
def test_quantize_of_any_size(name: str, size: int) -> None:
    cpu, storage = CPUS[name], ActStorage()
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    arguments = {"x": x, "quant": quant_args(0.017, 3), "y": np.zeros(size, np.int8)}
    after = run_kernel(schedule_quantize(Quantize(size=size), cpu, storage), arguments, cpu)
    np.testing.assert_array_equal(after["y"], _quantized(x, 0.017, 3))


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.dtype)
@pytest.mark.parametrize("name", ALL)
def test_dequantize_of_every_value(name: str, storage: ActStorage) -> None:
    cpu, scale, zero_point = CPUS[name], np.float32(0.0173), -7
    logical = np.arange(-128, 128)
    arguments = {
        "x": (logical + storage.offset).astype(storage.dtype),
        "dequant": np.array([scale, zero_point], np.float32),
        "y": np.zeros(256, np.float32),
    }
    after = run_kernel(schedule_dequantize(Dequantize(size=256), cpu, storage), arguments, cpu)
    expected = (logical - zero_point).astype(np.float32) * scale
    np.testing.assert_array_equal(after["y"], expected)


def test_any_split_into_threads_gives_the_whole_result() -> None:
    cpu, size = CPUS["avx2"], 50001
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    arguments = {"x": x, "quant": quant_args(0.02, 0), "y": np.zeros(size, np.int8)}
    scheduled = schedule_quantize(Quantize(size=size), cpu, ActStorage())
    after = run_kernel(scheduled, arguments, cpu, threads=3)
    np.testing.assert_array_equal(after["y"], _quantized(x, 0.02, 0))
