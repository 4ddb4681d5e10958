"""Patches into rows and tokens into their mean, on a CPU: both move memory, so vectors do it."""

from typing import Any

from tvm.script import tirx as T

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Patchify, Scheduled, Step, TokenMean
from gfcompile.targets.tvm.schedules.cpu_tiling import (
    ceil_div,
    fitting_lanes,
    keep_params,
    row_loop,
    span,
)
from gfcompile.targets.tvm.schedules.math import quantize

Expr = Any  # tvm.tirx.Expr, or a number where TVM accepts one

# Channels-last patches of up to this many pixels interleave whole vectors.
_INTERLEAVED_PIXELS = 16
_SHUFFLED_LANES = 64
_MEAN_VECTORS = 4


def schedule_patchify(kernel: Patchify, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """Patches as rows (channel, dy, dx)."""
    if kernel.layout == "nchw":
        func = _patchify_nchw(kernel, cpu, storage)
    elif kernel.patch_h * kernel.patch_w <= _INTERLEAVED_PIXELS:
        func = _patchify_nhwc(kernel, cpu, storage)
    else:
        func = _patchify_nhwc_large(kernel, storage)
    args = ("x", *(("quant",) if kernel.out == "int8" else ()), "y")
    return Scheduled(steps=(Step(func=keep_params(func, args), args=args),))


def _finish(out: str, storage: ActStorage) -> Any:
    return (lambda v, quant: quantize(v, quant, storage)) if out == "int8" else (lambda v, _: v)


def _out_dtype(out: str, storage: ActStorage) -> str:
    return storage.dtype if out == "int8" else "float32"


def _patchify_nchw(kernel: Patchify, cpu: Cpu, storage: ActStorage) -> Any:
    """A line of a patch is contiguous on both sides."""
    grid_h, grid_w, patch_h, patch_w = kernel.grid_h, kernel.grid_w, kernel.patch_h, kernel.patch_w
    channels, columns = kernel.channels, kernel.channels * patch_h * patch_w
    lanes = fitting_lanes(patch_w, cpu.float_lanes)
    finished = _finish(kernel.out, storage)

    @T.prim_func(s_tir=True)
    def patchify(
        x: T.Buffer((kernel.batch, channels, grid_h * patch_h, grid_w * patch_w), "float32"),
        quant: T.Buffer((4,), "float32"),
        y: T.Buffer((kernel.batch * grid_h * grid_w, columns), _out_dtype(kernel.out, storage)),
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
                        ] = finished(
                            x[b, channel, gy * patch_h + dy, gx * patch_w + dx + lane], quant
                        )

    return patchify


def _patchify_nhwc(kernel: Patchify, cpu: Cpu, storage: ActStorage) -> Any:
    """Vectors of channels, one per pixel of the patch, interleaved into a run of the row."""
    grid_h, grid_w, patch_h, patch_w = kernel.grid_h, kernel.grid_w, kernel.patch_h, kernel.patch_w
    channels, pixels = kernel.channels, kernel.patch_h * kernel.patch_w
    lanes = fitting_lanes(min(channels, _SHUFFLED_LANES // pixels), cpu.float_lanes)
    dtype = _out_dtype(kernel.out, storage)
    finished = _finish(kernel.out, storage)
    order = [pixel * lanes + channel for channel in range(lanes) for pixel in range(pixels)]

    def interleaved(run: Any) -> Expr:
        return T.Shuffle([run[pixel, span(0, lanes)] for pixel in range(pixels)], order)

    @T.prim_func(s_tir=True)
    def patchify(
        x: T.Buffer((kernel.batch, grid_h * patch_h, grid_w * patch_w, channels), "float32"),
        quant: T.Buffer((4,), "float32"),
        y: T.Buffer((kernel.batch * grid_h * grid_w, channels * pixels), dtype),
    ):
        T.func_attr({"tirx.noalias": True})
        for patch_row in row_loop(kernel.batch * grid_h, grid_w * channels * pixels):
            b: T.let = patch_row // grid_h
            gy: T.let = patch_row % grid_h
            for gx, v in T.grid(grid_w, ceil_div(channels, lanes)):
                channel: T.let = T.min(v * lanes, channels - lanes)
                run = T.alloc_buffer((pixels, lanes), dtype)
                for dy in T.unroll(patch_h):
                    for dx in T.unroll(patch_w):
                        for lane in T.vectorized(lanes):
                            run[dy * patch_w + dx, lane] = finished(
                                x[b, gy * patch_h + dy, gx * patch_w + dx, channel + lane], quant
                            )
                y[patch_row * grid_w + gx, span(channel * pixels, lanes * pixels)] = interleaved(
                    run
                )

    return patchify


def _patchify_nhwc_large(kernel: Patchify, storage: ActStorage) -> Any:
    """One value at a time: the pixels of a channel are far apart."""
    grid_h, grid_w, patch_h, patch_w = kernel.grid_h, kernel.grid_w, kernel.patch_h, kernel.patch_w
    channels, columns = kernel.channels, kernel.channels * patch_h * patch_w
    finished = _finish(kernel.out, storage)

    @T.prim_func(s_tir=True)
    def patchify(
        x: T.Buffer((kernel.batch, grid_h * patch_h, grid_w * patch_w, channels), "float32"),
        quant: T.Buffer((4,), "float32"),
        y: T.Buffer((kernel.batch * grid_h * grid_w, columns), _out_dtype(kernel.out, storage)),
    ):
        T.func_attr({"tirx.noalias": True})
        for patch_row in row_loop(kernel.batch * grid_h, grid_w * columns):
            b: T.let = patch_row // grid_h
            gy: T.let = patch_row % grid_h
            for gx, channel, dy, dx in T.grid(grid_w, channels, patch_h, patch_w):
                y[patch_row * grid_w + gx, (channel * patch_h + dy) * patch_w + dx] = finished(
                    x[b, gy * patch_h + dy, gx * patch_w + dx, channel], quant
                )

    return patchify


def schedule_token_mean(kernel: TokenMean, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """Sums of a few vectors of features, over all tokens."""
    tokens, n = kernel.tokens, kernel.n
    lanes = fitting_lanes(n, cpu.float_lanes)
    vectors = min(_MEAN_VECTORS, n // lanes)
    width = lanes * vectors
    blocks = ceil_div(n, width)
    finished = _finish(kernel.out, storage)

    @T.prim_func(s_tir=True)
    def token_mean(
        x: T.Buffer((kernel.batch, tokens, n), "float32"),
        quant: T.Buffer((4,), "float32"),
        y: T.Buffer((kernel.batch, n), _out_dtype(kernel.out, storage)),
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
                    y[b, j + v * lanes + lane] = finished(
                        sums[v, lane] * T.float32(1 / tokens), quant
                    )

    args = ("x", *(("quant",) if kernel.out == "int8" else ()), "y")
    return Scheduled(steps=(Step(func=keep_params(token_mean, args), args=args),))
