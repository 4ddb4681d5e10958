"""Patches into rows and tokens into their mean, on a CPU: both move memory, so vectors do it."""

from typing import Any

from tvm.script import tirx as T

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Patchify, Scheduled, Step, TokenMean
from gfcompile.targets.tvm.schedules.cpu_tiling import (
    ceil_div,
    fitting_lanes,
    row_loop,
)
from gfcompile.targets.tvm.schedules.math import stored
from gfcompile.targets.tvm.schedules.params import keep_params

Expr = Any  # tvm.tirx.Expr, or a number where TVM accepts one

# Vectors that a step of a copy moves; narrowed to bytes, they fill one.
_PATCH_VECTORS = 4
_MEAN_VECTORS = 4


def schedule_patchify(kernel: Patchify, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """Patches as rows (channel, dy, dx); a line of a patch is contiguous on both sides."""
    grid_h, grid_w, patch_h, patch_w = kernel.grid_h, kernel.grid_w, kernel.patch_h, kernel.patch_w
    channels, columns = kernel.channels, kernel.channels * patch_h * patch_w
    lanes = fitting_lanes(patch_w, _PATCH_VECTORS * cpu.float_lanes)

    @T.prim_func(s_tir=True)
    def patchify(
        x: T.Buffer((kernel.batch, channels, grid_h * patch_h, grid_w * patch_w), "float32"),
        quant: T.Buffer((4,), "float32"),
        y: T.Buffer((kernel.batch * grid_h * grid_w, columns), storage.dtype_of(kernel.out)),
    ):
        T.func_attr({"tirx.noalias": True})
        for patch_row in row_loop(kernel.batch * grid_h, grid_w * columns):
            b: T.let = patch_row // grid_h
            gy: T.let = patch_row % grid_h
            for gx, channel, dy in T.grid(grid_w, channels, patch_h):
                for v in T.serial(ceil_div(patch_w, lanes)):
                    dx: T.let = T.min(v * lanes, patch_w - lanes)
                    for lane in T.vectorized(lanes):
                        y[
                            patch_row * grid_w + gx,
                            (channel * patch_h + dy) * patch_w + dx + lane,
                        ] = stored(
                            x[b, channel, gy * patch_h + dy, gx * patch_w + dx + lane],
                            kernel.out,
                            quant,
                            storage,
                        )

    args = ("x", *(("quant",) if kernel.out == "int8" else ()), "y")
    return Scheduled(steps=(Step(func=keep_params(patchify, args), args=args),))


def schedule_token_mean(kernel: TokenMean, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """Sums of a few vectors of features, over all tokens."""
    tokens, n = kernel.tokens, kernel.n
    lanes = fitting_lanes(n, cpu.float_lanes)
    vectors = min(_MEAN_VECTORS, n // lanes)
    width = lanes * vectors
    blocks = ceil_div(n, width)

    @T.prim_func(s_tir=True)
    def token_mean(
        x: T.Buffer((kernel.batch, tokens, n), "float32"),
        quant: T.Buffer((4,), "float32"),
        y: T.Buffer((kernel.batch, n), storage.dtype_of(kernel.out)),
    ):
        T.func_attr({"tirx.noalias": True})
        for task in row_loop(kernel.batch * blocks, tokens * width):
            b: T.let = task // blocks
            j: T.let = T.min(task % blocks * width, n - width)
            sums = T.alloc_buffer((vectors, lanes), "float32")
            for v in T.unroll(vectors):
                for lane in T.vectorized(lanes):
                    sums[v, lane] = T.float32(0)
            for token in T.serial(tokens):
                for v in T.unroll(vectors):
                    for lane in T.vectorized(lanes):
                        sums[v, lane] = sums[v, lane] + x[b, token, j + v * lanes + lane]
            for v in T.unroll(vectors):
                for lane in T.vectorized(lanes):
                    y[b, j + v * lanes + lane] = stored(
                        sums[v, lane] * T.float32(1 / tokens), kernel.out, quant, storage
                    )

    args = ("x", *(("quant",) if kernel.out == "int8" else ()), "y")
    return Scheduled(steps=(Step(func=keep_params(token_mean, args), args=args),))
