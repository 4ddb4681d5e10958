"""Convolutions for CUDA: dense ones as products of rows that are cut as they are read.

Depthwise, a thread has a run of outputs of one channel and takes the channels' lines of the image
through registers; the lanes of a warp are neighbouring channels, which are neighbours in memory.
"""

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.kernel import ActStorage, Conv, Dense, Scheduled, Step
from gfcompile.targets.tvm.schedules.gpu_dense import Rows, all_of, tiled, within
from gfcompile.targets.tvm.schedules.math import float32
from gfcompile.targets.tvm.schedules.params import keep_params

_MOST_OUTPUTS = 7  # of a depthwise thread; the grids of the zoo are multiples of it
_CHANNELS, _LINES = 32, 4  # of a depthwise block


def schedule_conv(kernel: Conv, gpu: Gpu, storage: ActStorage) -> Scheduled:
    """The convolution as one CUDA kernel."""
    args = ("x", "w", "bias", "y")
    if kernel.depthwise:
        return Scheduled(steps=(Step(func=_depthwise(kernel), args=args),))
    dense = Dense(
        m=kernel.batch * kernel.out_h * kernel.out_w,
        n=kernel.n,
        k=kernel.kernel_h * kernel.kernel_w * kernel.c,
    )
    func, pack_w = tiled(dense, gpu, storage, _rows(kernel), relu=kernel.relu)
    return Scheduled(steps=(Step(func=keep_params(func, args), args=args),), pack={"w": pack_w})


def _rows(kernel: Conv) -> Rows:
    """Of the product: a row is an output pixel, a column (dy, dx, channel) of what it sees."""
    pixels, line = kernel.out_h * kernel.out_w, kernel.kernel_w * kernel.c
    last = kernel.layout == "nhwc"

    def place(row: Any, column: Any) -> tuple[Any, Any, Any, Any]:
        """Image, channel, and place in the image, which may be outside."""
        i = row % pixels // kernel.out_w * kernel.stride_h + column // line - kernel.pad_h
        j = row % kernel.out_w * kernel.stride_w + column % line // kernel.c - kernel.pad_w
        return row // pixels, column % kernel.c, i, j

    def load(x: Any, row: Any, column: Any, offset: Any) -> Any:
        image, channel, i, j = place(row, column)
        return x[image, i, j, channel + offset] if last else x[image, channel + offset, i, j]

    def exists(row: Any, column: Any) -> Any:
        _, _, i, j = place(row, column)
        inside_h = None if not kernel.pad_h else tirx.And(i >= 0, i < kernel.h)
        inside_w = None if not kernel.pad_w else tirx.And(j >= 0, j < kernel.w)
        return None if not kernel.pad_h and not kernel.pad_w else all_of(inside_h, inside_w)

    size = (kernel.h, kernel.w, kernel.c) if last else (kernel.c, kernel.h, kernel.w)
    return Rows(
        shape=(kernel.batch, *size),
        vector=4 if last and kernel.c % 4 == 0 else 1,
        load=load,
        exists=exists,
    )


def _depthwise(kernel: Conv) -> Any:
    kernel_w, stride, c = kernel.kernel_w, kernel.stride_w, kernel.c
    outputs = min(_MOST_OUTPUTS, kernel.out_w)
    tiles = -(-kernel.out_w // outputs)
    places = (outputs - 1) * stride + kernel_w
    lines = kernel.batch * kernel.out_h

    @T.prim_func(s_tir=True)
    def depthwise(
        x: T.Buffer((kernel.batch, kernel.h, kernel.w, c), "float32"),
        w: T.Buffer((kernel.kernel_h * kernel_w, c), "float32"),
        bias: T.Buffer((c,), "float32"),
        y: T.Buffer((lines, kernel.out_w, c), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", -(-c // _CHANNELS))
        line_block = T.launch_thread("blockIdx.y", -(-lines // _LINES))
        tile = T.launch_thread("blockIdx.z", tiles)
        lane = T.launch_thread("threadIdx.x", _CHANNELS)
        line = T.launch_thread("threadIdx.y", _LINES)
        totals = T.alloc_buffer((outputs,), "float32", scope="local")
        taps = T.alloc_buffer((kernel_w,), "float32", scope="local")
        value = T.alloc_buffer((1,), "float32", scope="local")
        channel: T.let = block * _CHANNELS + lane
        out_line: T.let = line_block * _LINES + line
        # The last tile overlaps the one before it.
        start: T.let = tirx.min(tile * outputs, kernel.out_w - outputs)
        if all_of(
            within(channel, c, c % _CHANNELS == 0), within(out_line, lines, lines % _LINES == 0)
        ):
            for i in T.unroll(outputs):
                totals[i] = bias[channel]
            for dy in T.serial(kernel.kernel_h, unroll=False):
                at: T.let = out_line % kernel.out_h * kernel.stride_h + dy - kernel.pad_h
                if at >= 0 and at < kernel.h:
                    for dx in T.unroll(kernel_w):
                        taps[dx] = w[dy * kernel_w + dx, channel]
                    for place in T.unroll(places):
                        column: T.let = start * stride + place - kernel.pad_w
                        value[0] = T.float32(0)
                        if column >= 0 and column < kernel.w:
                            value[0] = x[out_line // kernel.out_h, at, column, channel]
                        for i in T.unroll(outputs):
                            if i * stride <= place and place < i * stride + kernel_w:
                                totals[i] = totals[i] + value[0] * taps[place - i * stride]
            for i in T.unroll(outputs):
                y[out_line, start + i, channel] = (
                    tirx.max(totals[i], float32(0)) if kernel.relu else totals[i]
                )

    return depthwise
