"""Quantize and Dequantize on a CPU, where no kernel before or after could take them in."""

from typing import Any

from tvm.script import tirx as T

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Dequantize, Quantize, Scheduled, Step
from gfcompile.targets.tvm.schedules.cpu_tiling import ceil_div, fitting_lanes, row_loop
from gfcompile.targets.tvm.schedules.math import dequantize, quantize

# Float vectors per step: narrowed to bytes, they fill one vector.
_VECTORS = 4


def schedule_quantize(kernel: Quantize, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """float32 to stored int8, element by element."""
    func = _element_wise(
        kernel.size,
        cpu,
        ("float32", 4, storage.dtype),
        lambda value, quant: quantize(value, quant, storage),
    )
    return Scheduled(steps=(Step(func=func, args=("x", "quant", "y")),))


def schedule_dequantize(kernel: Dequantize, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """Stored int8 to float32, element by element."""
    func = _element_wise(
        kernel.size,
        cpu,
        (storage.dtype, 2, "float32"),
        lambda value, dequant: dequantize(value, dequant, storage),
    )
    return Scheduled(steps=(Step(func=func, args=("x", "dequant", "y")),))


def _element_wise(size: int, cpu: Cpu, types: tuple[str, int, str], convert: Any) -> Any:
    """y[i] = convert(x[i], params) with types = (x's dtype, params' length, y's dtype)."""
    x_dtype, params_length, y_dtype = types
    lanes = fitting_lanes(size, _VECTORS * cpu.float_lanes)

    @T.prim_func(s_tir=True)
    def element_wise(
        x: T.Buffer((size,), x_dtype),
        params: T.Buffer((params_length,), "float32"),
        y: T.Buffer((size,), y_dtype),
    ):
        T.func_attr({"tirx.noalias": True})
        for v in row_loop(ceil_div(size, lanes), lanes):
            i: T.let = T.min(v * lanes, size - lanes)
            for lane in T.vectorized(lanes):
                y[i + lane] = convert(x[i + lane], params)

    return element_wise
