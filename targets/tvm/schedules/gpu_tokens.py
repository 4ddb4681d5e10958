"""Patches to rows and the mean over tokens, for CUDA."""

from typing import Any

from tvm.script import tirx as T

from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.kernel import ActStorage, Patchify, Scheduled, Step, TokenMean
from gfcompile.targets.tvm.schedules.gpu_dense import all_of, within
from gfcompile.targets.tvm.schedules.math import quantize
from gfcompile.targets.tvm.schedules.params import keep_params

_THREADS = 256
_SPLITS = 8  # warps of a block that share a channel's sum


def schedule_patchify(kernel: Patchify, gpu: Gpu, storage: ActStorage) -> Scheduled:  # noqa: ARG001
    """A thread per output, or per four neighbours along dx: writes are in order."""
    columns = kernel.channels * kernel.patch_h * kernel.patch_w
    grid = kernel.grid_h * kernel.grid_w
    rows = kernel.batch * grid
    height, image_width = kernel.grid_h * kernel.patch_h, kernel.grid_w * kernel.patch_w
    width = 4 if kernel.patch_w % 4 == 0 else 1
    pieces = rows * columns // width

    def finish(value: Any, quant: Any) -> Any:
        return quantize(value, quant, storage) if kernel.out == "int8" else value

    @T.prim_func(s_tir=True)
    def patchify(
        x: T.Buffer((kernel.batch, kernel.channels, height, image_width), "float32"),
        quant: T.Buffer((4,), "float32"),
        y: T.Buffer((rows, columns), kernel.out),
    ):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", -(-pieces // _THREADS))
        thread = T.launch_thread("threadIdx.x", _THREADS)
        values = T.alloc_buffer((width,), "float32", scope="local")
        result = T.alloc_buffer((width,), kernel.out, scope="local")
        piece: T.let = block * _THREADS + thread
        if all_of(within(piece, pieces, pieces % _THREADS == 0)):
            row: T.let = piece // (columns // width)
            column: T.let = piece % (columns // width) * width
            batch: T.let = row // grid
            channel: T.let = column // (kernel.patch_h * kernel.patch_w)
            i: T.let = row % grid // kernel.grid_w * kernel.patch_h + (
                column // kernel.patch_w % kernel.patch_h
            )
            j: T.let = row % kernel.grid_w * kernel.patch_w + column % kernel.patch_w
            for v in T.vectorized(width):
                values[v] = x[batch, channel, i, j + v]
            for v in T.unroll(width):
                result[v] = finish(values[v], quant)
            for v in T.vectorized(width):
                y[row, column + v] = result[v]

    args = ("x", *(("quant",) if kernel.out == "int8" else ()), "y")
    return Scheduled(steps=(Step(func=keep_params(patchify, args), args=args),))


def schedule_token_mean(kernel: TokenMean, gpu: Gpu, storage: ActStorage) -> Scheduled:  # noqa: ARG001
    """A lane per channel; the warps of a block each sum a share of the tokens."""
    batch, tokens, n = kernel.batch, kernel.tokens, kernel.n
    steps = -(-tokens // _SPLITS)

    def finish(value: Any, quant: Any) -> Any:
        return quantize(value, quant, storage) if kernel.out == "int8" else value

    @T.prim_func(s_tir=True)
    def token_mean(
        x: T.Buffer((batch, tokens, n), "float32"),
        quant: T.Buffer((4,), "float32"),
        y: T.Buffer((batch, n), kernel.out),
    ):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", -(-n // 32))
        image = T.launch_thread("blockIdx.y", batch)
        lane = T.launch_thread("threadIdx.x", 32)
        split = T.launch_thread("threadIdx.y", _SPLITS)
        partial = T.alloc_buffer((_SPLITS, 32), "float32", scope="shared")
        total = T.alloc_buffer((1,), "float32", scope="local")
        column: T.let = block * 32 + lane
        total[0] = T.float32(0)
        if all_of(within(column, n, n % 32 == 0)):
            for step in T.serial(steps, unroll=8):
                token: T.let = step * _SPLITS + split
                if all_of(within(token, tokens, tokens % _SPLITS == 0)):
                    total[0] = total[0] + x[image, token, column]
        partial[split, lane] = total[0]
        T.tvm_storage_sync("shared")
        if split == 0:
            for other in T.unroll(_SPLITS - 1):
                total[0] = total[0] + partial[other + 1, lane]
            if all_of(within(column, n, n % 32 == 0)):
                y[image, column] = finish(total[0] * T.float32(1 / tokens), quant)

    args = ("x", *(("quant",) if kernel.out == "int8" else ()), "y")
    return Scheduled(steps=(Step(func=keep_params(token_mean, args), args=args),))
