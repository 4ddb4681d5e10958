"""The expressions that all schedules share, as LLVM compiles them."""

from collections.abc import Callable
from math import erf as exact_erf
from typing import Any

import numpy as np
import pytest
from run_kernel import CPUS, poison, run_kernel
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.tvm.kernel import ActStorage, Array, Scheduled, Step, quant_args
from gfcompile.targets.tvm.schedules.math import (
    GELU_TO_QUANTIZE_ERROR,
    dequantize,
    exp,
    exp2,
    gelu,
    gelu_in_few_registers,
    gelu_to_quantize,
    half_to_float,
    quantize,
)

EPS = float(np.finfo(np.float32).eps)
STORAGES = (ActStorage(), ActStorage(dtype="uint8", offset=128))
# One with each kind of vectors: SSE, AVX-512 and NEON.
SOME_CPUS = ("sse", "avx512", "a72")


def apply(
    expression: Callable[..., Any],
    values: Array,
    out: str,
    cpu: str,
    parameters: Array | None = None,
) -> Array:
    """`expression` over `values`, vectorized by 16; `parameters` is its second argument."""
    count = -(-values.size // 16)
    given = np.zeros((1,), np.float32) if parameters is None else parameters
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("apply")
        I.func_attr({"tirx.noalias": True})
        x = I.arg("x", I.buffer((count * 16,), str(values.dtype)))
        p = I.arg("p", I.buffer(given.shape, "float32"))
        y = I.arg("y", I.buffer((count * 16,), out))
        with I.serial(count) as i, I.vectorized(16) as lane:
            at = i * 16 + lane
            value = expression(x[at]) if parameters is None else expression(x[at], p)
            I.buffer_store(y, value, [at])
    scheduled = Scheduled(steps=(Step(func=builder.get(), args=("x", "p", "y")),))
    padded = np.resize(values, count * 16)
    args = {"x": padded, "p": given, "y": poison((count * 16,), out)}
    return run_kernel(scheduled, args, CPUS[cpu])["y"][: values.size]


@pytest.mark.parametrize("cpu", SOME_CPUS)
def test_gelu_holds_its_stated_bounds(cpu: str) -> None:
    v = np.concatenate([np.linspace(-12, 12, 40001), [0.0, 1e-30, -1e4, 1e4]]).astype(np.float32)
    wide = v.astype(np.float64)
    expected = 0.5 * wide * (1 + np.vectorize(exact_erf)(wide / np.sqrt(2)))
    for exact in (gelu, gelu_in_few_registers):
        error = np.abs(apply(exact, v, "float32", cpu) - expected)
        assert (error <= 3e-7 * np.abs(wide)).all()
    coarse = np.abs(apply(gelu_to_quantize, v, "float32", cpu) - expected)
    assert (coarse <= GELU_TO_QUANTIZE_ERROR + EPS * np.abs(wide)).all()


@pytest.mark.parametrize("cpu", SOME_CPUS)
def test_exponentials_hold_their_stated_bounds(cpu: str) -> None:
    fractions = np.linspace(-1, 1, 40001)
    v = np.concatenate([fractions, np.linspace(-125.99, 127, 8001)]).astype(np.float32)
    exact = np.exp2(v.astype(np.float64))
    assert np.abs(apply(exp2, v, "float32", cpu) / exact - 1).max() <= 1.9e-7
    v = np.concatenate([fractions, np.linspace(-87, 88, 8001)]).astype(np.float32)
    wide = v.astype(np.float64)
    error = np.abs(apply(exp, v, "float32", cpu) / np.exp(wide) - 1)
    assert (error <= 2e-7 + 1.2e-7 * np.abs(wide)).all()


@pytest.mark.parametrize("cpu", SOME_CPUS)
def test_exponentials_at_their_ends(cpu: str) -> None:
    ends = np.array([0, -126, -127, -3e38, -np.inf], np.float32)
    expected = np.array([1, *[2.0**-126] * 4], np.float32)
    np.testing.assert_array_equal(apply(exp2, ends, "float32", cpu), expected)


@pytest.mark.parametrize("cpu", SOME_CPUS)
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.dtype)
@pytest.mark.parametrize("zero_point", [-128, -3, 127])
def test_quantize_is_onnx_quantize_linear(cpu: str, storage: ActStorage, zero_point: int) -> None:
    scale = np.float32(0.25)  # a power of two, so that ties are ties
    v = np.concatenate([np.arange(-1200, 1200) * 0.125 * 0.25, [-1e30, 1e30, np.inf, -np.inf]])
    v = v.astype(np.float32)
    stored = apply(
        lambda x, quant: quantize(x, quant, storage),
        v,
        storage.dtype,
        cpu,
        quant_args(float(scale), zero_point),
    )
    expected = np.clip(np.rint(v / scale) + zero_point, -128, 127)
    np.testing.assert_array_equal(stored.astype(np.int32) - storage.offset, expected)


@pytest.mark.parametrize("cpu", SOME_CPUS)
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.dtype)
def test_dequantize_is_onnx_dequantize_linear(cpu: str, storage: ActStorage) -> None:
    logical = np.arange(-128, 128)
    scale, zero_point = np.float32(0.037), 11
    result = apply(
        lambda q, dequant: dequantize(q, dequant, storage),
        (logical + storage.offset).astype(storage.dtype),
        "float32",
        cpu,
        np.array([scale, zero_point], np.float32),
    )
    expected = (logical - zero_point).astype(np.float32) * scale
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("cpu", SOME_CPUS)
def test_half_to_float_is_exact_for_every_finite_half(cpu: str) -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    result = apply(half_to_float, bits, "float32", cpu)
    expected = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(result.view(np.uint32), expected.view(np.uint32))


def test_a_shared_value_is_bound_once() -> None:
    text = str(gelu(tirx.Var("v", "float32") + tirx.const(1, "float32")))
    assert text.count("v + ") == 1
