"""Convolutions of images with channels last, on CPUs: no matrix of patches is ever written.

Dense ones are matrix products. Of one line of a filter, the pixels that it meets and their channels
are one run of memory; so a row of the product is kernel_h such runs, a line of the image apart, and
the tiles of `cpu_dot` read it where it lies. Only the zeros around the image are written, with the
image between them.

Depthwise ones keep a run of outputs and a line of the filter in registers, a vector of channels
each: every value is loaded once for a line of the filter and used as often as the line is long.
Lines and columns beyond the image are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Array, Conv, Dense, Scheduled, Step
from gfcompile.targets.tvm.schedules.cpu_dense import (
    Blocks,
    Columns,
    Runs,
    choose_tile,
    clamped,
    epilogue_width,
    packing,
    registers,
    tile_sums,
)
from gfcompile.targets.tvm.schedules.cpu_dot import View, product_of
from gfcompile.targets.tvm.schedules.cpu_tiling import fitting_lanes, row_loop, span, tile_rows
from gfcompile.targets.tvm.schedules.math import Expr, float32

_COPY_VECTORS = 4  # that a step of a copy moves
_MOST_OUTPUTS = 14  # of a depthwise tile: more hide no further latency


def schedule_conv(kernel: Conv, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """The convolution for `cpu`."""
    if kernel.depthwise:
        args = ("x", "w", "bias", "y")
        return Scheduled(steps=(Step(func=_depthwise(kernel, cpu), args=args),))
    dense = Dense(
        m=kernel.out_w, n=kernel.n, k=kernel.kernel_h * kernel.kernel_w * kernel.c, x="float32"
    )
    product = product_of(dense, cpu)
    tile = choose_tile(dense, product, cpu.vector_registers)
    run = kernel.kernel_w * kernel.c
    whole_run = ceil(run / product.chunk) * product.chunk  # what is added meets weights of 0
    columns = Columns(kernel=dense, product=product, tile=tile)
    pack_dense = packing(dense, product, tile, storage, block=columns.block)

    def pack_w(raw: Mapping[str, Array]) -> Array:
        lines = raw["w"].reshape(kernel.kernel_h, run, kernel.n)
        lines = np.pad(lines, ((0, 0), (0, whole_run - run), (0, 0)))
        return pack_dense["w"]({"w": lines.reshape(-1, kernel.n)})

    pack = {**pack_dense, "w": pack_w}
    args = ("x", "w", "bias", "y")
    slack = whole_run - run  # by so much the last run reaches beyond the image
    padded = bool(kernel.pad_h or kernel.pad_w or slack or kernel.layout == "nchw")
    func = _conv(kernel, whole_run, columns, padded=padded, slack=slack)
    if not padded:
        return Scheduled(steps=(Step(func=func, args=args),), pack=pack)
    pad = _pad_nchw if kernel.layout == "nchw" else _pad_nhwc
    return Scheduled(
        steps=(
            Step(func=pad(kernel, cpu, slack), args=("x", "padded")),
            Step(func=func, args=("padded", *args[1:])),
        ),
        pack=pack,
        temps={"padded": ("float32", (_padded_size(kernel) + slack,))},
    )


def _padded_size(kernel: Conv) -> int:
    height, width = kernel.h + 2 * kernel.pad_h, kernel.w + 2 * kernel.pad_w
    return kernel.batch * height * width * kernel.c


def _pad_nhwc(kernel: Conv, cpu: Cpu, slack: int) -> Any:
    """The image with zeros around it, a line at a time."""
    height, line = kernel.h + 2 * kernel.pad_h, (kernel.w + 2 * kernel.pad_w) * kernel.c
    image_line, before = kernel.w * kernel.c, kernel.pad_w * kernel.c
    most = _COPY_VECTORS * cpu.float_lanes

    @T.prim_func(s_tir=True)
    def pad(
        x: T.Buffer((kernel.batch, kernel.h, kernel.w, kernel.c), "float32"),
        y: T.Buffer((_padded_size(kernel) + slack,), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for row in row_loop(kernel.batch * height, line):
            i: T.let = row % height - kernel.pad_h
            if i >= 0 and i < kernel.h:
                _fill(y, row * line, before, most)
                _copy(y, row * line + before, image_line, most, x, row // height, i)
                _fill(y, row * line + before + image_line, before, most)
            else:
                _fill(y, row * line, line, most)
            if row == kernel.batch * height - 1:
                _fill(y, (row + 1) * line, slack, most)

    return pad


def _pad_nchw(kernel: Conv, cpu: Cpu, slack: int) -> Any:
    """As `_pad_nhwc`, the channels of a pixel gathered; images have few of them."""
    height, line = kernel.h + 2 * kernel.pad_h, (kernel.w + 2 * kernel.pad_w) * kernel.c
    c, before = kernel.c, kernel.pad_w * kernel.c
    most = _COPY_VECTORS * cpu.float_lanes

    @T.prim_func(s_tir=True)
    def pad(
        x: T.Buffer((kernel.batch, c, kernel.h, kernel.w), "float32"),
        y: T.Buffer((_padded_size(kernel) + slack,), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for row in row_loop(kernel.batch * height, line):
            i: T.let = row % height - kernel.pad_h
            if i >= 0 and i < kernel.h:
                _fill(y, row * line, before, most)
                for j, channel in T.grid(kernel.w, c):
                    y[row * line + before + j * c + channel] = x[row // height, channel, i, j]
                _fill(y, row * line + before + kernel.w * c, before, most)
            else:
                _fill(y, row * line, line, most)
            if row == kernel.batch * height - 1:
                _fill(y, (row + 1) * line, slack, most)

    return pad


def _fill(y: Any, start: Expr, size: int, most: int) -> None:
    """Writes `size` zeros."""
    _vectors(y, start, size, most, lambda _, lanes: _splat(0.0, lanes))


def _copy(y: Any, start: Expr, size: int, most: int, x: Any, image: Expr, row: Expr) -> None:
    """Writes a line of `size` values of x, all its pixels one run."""
    _vectors(y, start, size, most, lambda at, lanes: x[image, row, 0, span(at, lanes)])


def _vectors(y: Any, start: Expr, size: int, most: int, value: Callable[[Expr, int], Expr]) -> None:
    """Writes y[start + at] = value(at) for at < size; the last vector overlaps the one before."""
    if not size:
        return
    lanes = fitting_lanes(size, most)
    with T.serial(ceil(size / lanes)) as i:
        at = I.bind(tirx.min(i * lanes, size - lanes)) if size % lanes else i * lanes
        T.buffer_store(y, value(at, lanes), [span(start + at, lanes)])


def _splat(value: float, lanes: int) -> Expr:
    return float32(value) if lanes == 1 else T.broadcast(float32(value), lanes)


def _conv(kernel: Conv, run: int, columns: Columns, *, padded: bool, slack: int) -> Any:
    """The product.

    Args:
        run: values of x for a line of a filter.
        padded: whether x is what `_pad_nhwc` writes, with so much `slack`.
    """
    product, tile = columns.product, columns.tile
    out_w, n, lines = kernel.out_w, kernel.n, kernel.batch * kernel.out_h
    height, line = kernel.h + 2 * kernel.pad_h, (kernel.w + 2 * kernel.pad_w) * kernel.c
    k = kernel.kernel_h * run

    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("conv")
        I.func_attr({"tirx.noalias": True})
        shape = (kernel.batch, kernel.h, kernel.w, kernel.c)
        x = I.arg("x", I.buffer((_padded_size(kernel) + slack,) if padded else shape))
        elements = columns.per_block * product.w_elements
        w_shape = (columns.group_blocks, k // product.group, elements)
        w = Blocks(I.arg("w", I.buffer(w_shape)), columns, 0)
        bias = I.arg("bias", I.buffer((n + max(0, columns.block - n),)))
        y = I.arg("y", I.buffer((kernel.batch, kernel.out_h, out_w, n)))
        with I.parallel(columns.tiles * lines) as task:
            first = I.bind(columns.first(task // lines))
            runs = columns.runs(0, first)
            image = I.bind(task % lines // kernel.out_h)
            i = I.bind(task % lines % kernel.out_h)
            start = I.bind((image * height + i * kernel.stride_h) * line)
            with I.serial(ceil(out_w / tile.rows)) as piece:
                j = I.bind(clamped(piece * tile.rows, out_w - tile.rows, needed=True))
                pixel = I.bind(start + j * (kernel.stride_w * kernel.c))

                def at(row: Expr, at_k: Expr, pixel: Expr = pixel) -> list[Expr]:
                    place = pixel + row * (kernel.stride_w * kernel.c)
                    place = place + at_k // run * line + at_k % run
                    return [place] if padded else [0, 0, 0, place]

                sums = tile_sums(View(x, at), w, Runs(bias, runs), 0, first, 0, k, product, tile)
                for r in range(tile.rows):
                    for place, width, column in runs:
                        vector = epilogue_width(width, product.lanes, "float32")
                        for begin in range(0, width, vector):
                            within = min(begin, width - vector)
                            with I.vectorized(vector) as lane:
                                value = sums[r][place + within + lane]
                                if kernel.relu:
                                    value = tirx.max(value, float32(0))
                                I.buffer_store(y, value, [image, i, j + r, column + within + lane])
    return builder.get()


def _depthwise(kernel: Conv, cpu: Cpu) -> Any:
    lanes = fitting_lanes(kernel.c, cpu.float_lanes)
    # Outputs, a line of the filter and one value of the image are in registers.
    most = min(_MOST_OUTPUTS, max(1, cpu.vector_registers - kernel.kernel_w - 1))
    outputs = tile_rows(kernel.out_w, most)
    edges, inner = _tiles(kernel, outputs)
    lines = kernel.batch * kernel.out_h

    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("depthwise")
        I.func_attr({"tirx.noalias": True})
        x = I.arg("x", I.buffer((kernel.batch, kernel.h, kernel.w, kernel.c)))
        w = I.arg("w", I.buffer((kernel.kernel_h * kernel.kernel_w, kernel.c)))
        bias = I.arg("bias", I.buffer((kernel.c,)))
        y = I.arg("y", I.buffer((kernel.batch, kernel.out_h, kernel.out_w, kernel.c)))
        with I.parallel(lines) as out_line, I.serial(ceil(kernel.c / lanes)) as block:
            channel = I.bind(clamped(block * lanes, kernel.c - lanes, needed=kernel.c % lanes != 0))
            image, out_i = I.bind(out_line // kernel.out_h), I.bind(out_line % kernel.out_h)
            top = I.bind(out_i * kernel.stride_h - kernel.pad_h)

            def tile(start: Expr) -> None:
                """Outputs from column `start` on; where it is known, columns outside are left."""
                acc = [registers(lanes, "float32") for _ in range(outputs)]
                at = span(0, lanes)
                for total in acc:
                    I.buffer_store(total, bias[span(channel, lanes)], [at])
                first_line = tirx.max(0, -top)
                last_line = tirx.min(kernel.kernel_h, kernel.h - top)
                with I.serial(first_line, last_line) as dy:
                    filter_line = [
                        I.bind(w[dy * kernel.kernel_w + dx, span(channel, lanes)])
                        for dx in range(kernel.kernel_w)
                    ]
                    left = start * kernel.stride_w - kernel.pad_w
                    for place in range((outputs - 1) * kernel.stride_w + kernel.kernel_w):
                        if isinstance(left, int) and not 0 <= left + place < kernel.w:
                            continue
                        uses = [
                            (i, place - i * kernel.stride_w)
                            for i in range(outputs)
                            if 0 <= place - i * kernel.stride_w < kernel.kernel_w
                        ]
                        if not uses:
                            continue
                        value = I.bind(x[image, top + dy, left + place, span(channel, lanes)])
                        for i, dx in uses:
                            I.buffer_store(acc[i], acc[i][at] + value * filter_line[dx], [at])
                for i, total in enumerate(acc):
                    result = total[at]
                    if kernel.relu:
                        result = tirx.max(result, _splat(0.0, lanes))
                    I.buffer_store(y, result, [image, out_i, start + i, span(channel, lanes)])

            for start in edges:
                tile(start)
            if inner:
                with I.serial(len(inner)) as i:
                    tile(I.bind(inner[0] + i * outputs))
    return builder.get()


def _tiles(kernel: Conv, outputs: int) -> tuple[Sequence[int], Sequence[int]]:
    """Where tiles of so many outputs begin: those that reach beyond the image, and the others.

    The others are `outputs` apart.
    """
    edges, inner = [], []
    for start in range(0, kernel.out_w, outputs):
        left = start * kernel.stride_w - kernel.pad_w
        right = left + (outputs - 1) * kernel.stride_w + kernel.kernel_w
        if left >= 0 and right <= kernel.w and start + outputs <= kernel.out_w:
            inner.append(start)
        else:
            edges.append(min(start, kernel.out_w - outputs))
    return edges, inner
