"""float32 to int8 and back, element by element, for CUDA."""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.kernel import ActStorage, Dequantize, Quantize, Scheduled, Step
from gfcompile.targets.tvm.schedules.gpu_dense import all_of, within
from gfcompile.targets.tvm.schedules.math import dequantize, quantize

_THREADS = 256


def schedule_quantize(kernel: Quantize, gpu: Gpu, storage: ActStorage) -> Scheduled:  # noqa: ARG001
    """Four neighbours a thread, where the size allows."""
    func = _elementwise(
        kernel.size, "float32", "int8", 4, lambda v, quant: quantize(v, quant, storage)
    )
    return Scheduled(steps=(Step(func=func, args=("x", "quant", "y")),))


def schedule_dequantize(kernel: Dequantize, gpu: Gpu, storage: ActStorage) -> Scheduled:  # noqa: ARG001
    """Four neighbours a thread, where the size allows."""
    func = _elementwise(
        kernel.size, "int8", "float32", 2, lambda v, dequant: dequantize(v, dequant, storage)
    )
    return Scheduled(steps=(Step(func=func, args=("x", "dequant", "y")),))


def _elementwise(
    size: int, source: str, output: str, parameters: int, convert: Callable[[Any, Any], Any]
) -> Any:
    width = 4 if size % 4 == 0 else 1
    pieces = size // width

    @T.prim_func(s_tir=True)
    def elementwise(
        x: T.Buffer((size,), source),
        parameter: T.Buffer((parameters,), "float32"),
        y: T.Buffer((size,), output),
    ):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", -(-pieces // _THREADS))
        thread = T.launch_thread("threadIdx.x", _THREADS)
        values = T.alloc_buffer((width,), source, scope="local")
        result = T.alloc_buffer((width,), output, scope="local")
        piece: T.let = block * _THREADS + thread
        if all_of(within(piece, pieces, pieces % _THREADS == 0)):
            for v in T.vectorized(width):
                values[v] = x[piece * width + v]
            for v in T.unroll(width):
                result[v] = convert(values[v], parameter)
            for v in T.vectorized(width):
                y[piece * width + v] = result[v]

    return elementwise
