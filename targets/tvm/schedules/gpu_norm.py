"""Layer normalization for CUDA: one warp per row, the row held in registers."""

from typing import Any

from tvm.script import tirx as T

from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.kernel import ActStorage, LayerNorm, Scheduled, Step
from gfcompile.targets.tvm.schedules.gpu_dense import all_of, within
from gfcompile.targets.tvm.schedules.math import quantize
from gfcompile.targets.tvm.schedules.params import keep_params

_ROWS = 4  # rows, and so warps, of a block
_HELD = 32  # values of a row that a lane keeps in registers; a longer row is read three times
_FULL_WARP = 0xFFFFFFFF


def schedule_layer_norm(kernel: LayerNorm, gpu: Gpu, storage: ActStorage) -> Scheduled:  # noqa: ARG001
    """Mean, then variance around it, then the normalized row: two passes lose no digits."""
    rows, n = kernel.rows, kernel.n
    width = 4 if n % 4 == 0 else 1
    pieces = -(-n // (32 * width))
    exact = n % (32 * width) == 0
    held = pieces * width <= _HELD

    def finish(value: Any, quant: Any) -> Any:
        return quantize(value, quant, storage) if kernel.out == "int8" else value

    @T.prim_func(s_tir=True)
    def layer_norm(
        x: T.Buffer((kernel.x_rows, n), "float32"),
        gamma: T.Buffer((n,), "float32"),
        beta: T.Buffer((n,), "float32"),
        quant: T.Buffer((4,), "float32"),
        y: T.Buffer((rows, n), kernel.out),
    ):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", -(-rows // _ROWS))
        lane = T.launch_thread("threadIdx.x", 32)
        warp = T.launch_thread("threadIdx.y", _ROWS)
        values = T.alloc_buffer((pieces * width if held else width,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        mean = T.alloc_buffer((1,), "float32", scope="local")
        result = T.alloc_buffer((width,), kernel.out, scope="local")
        row: T.let = block * _ROWS + warp
        source: T.let = kernel.x_row(row)
        # All lanes of a warp have the same row, so they shuffle together or not at all.
        if all_of(within(row, rows, rows % _ROWS == 0)):
            total[0] = T.float32(0)
            for piece in loop(held, pieces):
                column: T.let = (piece * 32 + lane) * width
                if all_of(within(column, n, exact)):
                    for v in T.vectorized(width):
                        values[slot(held, piece, width) + v] = x[source, column + v]
                    for v in T.unroll(width):
                        total[0] = total[0] + values[slot(held, piece, width) + v]
            for level in T.unroll(5):
                total[0] = total[0] + warp_partner(total[0], level)
            mean[0] = total[0] * T.float32(1 / n)
            total[0] = T.float32(0)
            for piece in loop(held, pieces):
                column: T.let = (piece * 32 + lane) * width
                if all_of(within(column, n, exact)):
                    if not held:
                        for v in T.vectorized(width):
                            values[v] = x[source, column + v]
                    for v in T.unroll(width):
                        values[slot(held, piece, width) + v] = (
                            values[slot(held, piece, width) + v] - mean[0]
                        )
                        total[0] = total[0] + (
                            values[slot(held, piece, width) + v]
                            * values[slot(held, piece, width) + v]
                        )
            for level in T.unroll(5):
                total[0] = total[0] + warp_partner(total[0], level)
            total[0] = T.rsqrt(total[0] * T.float32(1 / n) + T.float32(kernel.eps))
            for piece in loop(held, pieces):
                column: T.let = (piece * 32 + lane) * width
                if all_of(within(column, n, exact)):
                    if not held:
                        for v in T.vectorized(width):
                            values[v] = x[source, column + v] - mean[0]
                    for v in T.unroll(width):
                        result[v] = finish(
                            values[slot(held, piece, width) + v] * total[0] * gamma[column + v]
                            + beta[column + v],
                            quant,
                        )
                    for v in T.vectorized(width):
                        y[row, column + v] = result[v]

    args = ("x", "gamma", "beta", *(("quant",) if kernel.out == "int8" else ()), "y")
    return Scheduled(steps=(Step(func=keep_params(layer_norm, args), args=args),))


def loop(unrolled: bool, extent: int) -> Any:
    """A loop over pieces: unrolled where each piece has registers of its own."""
    return T.unroll(extent) if unrolled else T.serial(extent, unroll=4)


def slot(held: bool, piece: Any, width: int) -> Any:
    """Where a piece lies among a lane's registers."""
    return piece * width if held else 0


def warp_partner(value: Any, level: Any) -> Any:
    """`value` of the lane whose number differs in bit `level`."""
    return T.tvm_warp_shuffle_xor(T.uint32(_FULL_WARP), value, T.shift_left(1, level), 32, 32)
