"""GELU to int8 by table, against erf in double precision."""

import math

import numpy as np
import pytest
from run_kernel import CPUS, run_kernel
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.tvm.kernel import ActStorage, Array, Scheduled, Step, quant_args
from gfcompile.targets.tvm.schedules.amx_gelu import LANES, quantized_gelu, table
from gfcompile.targets.tvm.schedules.math import GELU_TO_QUANTIZE_ERROR

EPS = float(np.finfo(np.float32).eps)


def exact_gelu(v: Array) -> Array:
    return np.array([x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in v.astype(np.float64)])


def quantized(v: Array, quant: Array, storage: ActStorage) -> Array:
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("apply")
        I.func_attr({"tirx.noalias": True})
        x = I.arg("x", I.buffer(v.shape))
        gelu, given = I.arg("gelu", I.buffer(table().shape)), I.arg("quant", I.buffer((4,)))
        y = I.arg("y", I.buffer(v.shape, storage.dtype))
        with I.serial(v.size // LANES) as i:
            vector = x.vload([i * LANES], f"float32x{LANES}")
            stored = quantized_gelu(vector, gelu, [given[j] for j in range(4)], storage)
            I.buffer_store(y, stored, [T.ramp(i * LANES, 1, LANES)])
    scheduled = Scheduled(
        steps=(Step(func=builder.get(), args=("x", "gelu", "quant", "y")),),
        consts={"gelu": table()},
    )
    args = {"x": v, "quant": quant, "y": np.zeros(v.shape, storage.dtype)}
    y = run_kernel(scheduled, args, CPUS["avx512"])["y"]
    return np.asarray(y.astype(np.int32) - storage.offset)


@pytest.mark.parametrize("storage", [ActStorage(), ActStorage(dtype="uint8", offset=128)], ids=str)
@pytest.mark.parametrize(("scale", "zero_point"), [(0.03, -115), (0.001, 4), (1.0, 127)])
def test_it_rounds_as_erf_does_but_next_to_ties(
    scale: float, zero_point: int, storage: ActStorage
) -> None:
    v = np.linspace(-9, 9, 64000, dtype=np.float32)
    steps = exact_gelu(v) / np.float32(scale)
    # Three roundings of float32 besides.
    bound = GELU_TO_QUANTIZE_ERROR / scale + 2 * EPS * np.abs(steps)
    near_tie = np.abs(np.abs(steps - np.trunc(steps)) - 0.5) <= bound
    expected = np.clip(np.rint(steps) + zero_point, -128, 127)
    got = quantized(v, quant_args(scale, zero_point), storage)
    assert near_tie.mean() < 0.02
    np.testing.assert_array_equal(got[~near_tie], expected[~near_tie])
    assert np.abs(got - expected).max() <= 1


def test_what_is_too_large_is_the_last_step() -> None:
    v = np.repeat(np.array([300, 1e7, 1e30, -1e30], np.float32), LANES)
    got = quantized(v, quant_args(0.001, 3), ActStorage())
    np.testing.assert_array_equal(got, np.repeat([127, 127, 127, 3], LANES))


def test_the_table_holds_its_stated_bound() -> None:
    a = np.linspace(0, 7.87, 200001)
    segment = np.rint(4 * a).astype(int)
    powers = (a - segment / 4) ** np.arange(4)[:, None]
    tail = np.array([x * math.erfc(x / math.sqrt(2)) for x in a])
    assert np.abs((table()[:, segment] * powers).sum(0) - tail).max() <= 3.6e-6
