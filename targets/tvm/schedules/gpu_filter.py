"""The global filter for CUDA.

DFT form, three kernels: the real DFT of each grid row; per column of the half spectrum the DFT,
the product with K and the inverse DFT, in shared memory; the inverse of each row. Each transform
is a product with a constant matrix. Threads of a warp run along the channels, so that every access
to memory is coalesced, and each keeps a tile of outputs in registers.

Circular form, one kernel: a depthwise circular convolution, a tile of a row's outputs per thread.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script import tirx as T

from gfcompile.targets.spectral import irfft_matrices, rfft_matrices
from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.kernel import (
    ActStorage,
    Array,
    CircularFilter,
    DftFilter,
    Scheduled,
    Step,
)
from gfcompile.targets.tvm.schedules.gpu_dense import all_of, within
from gfcompile.targets.tvm.schedules.math import half_to_float
from gfcompile.targets.tvm.schedules.params import keep_params

_SHARED_BYTES = 48 * 1024
_CHANNELS = 32  # of a block: 128 bytes in a row


def schedule_dft_filter(kernel: DftFilter, gpu: Gpu, storage: ActStorage) -> Scheduled:  # noqa: ARG001
    """Row DFT; column DFT, product with K, inverse column DFT; inverse row DFT.

    The spectrum between the kernels is (batch, w // 2 + 1, h, 2, c): real and imaginary part of a
    column of the half spectrum lie together, as the second kernel reads them.
    """
    batch, h, w, c = kernel.batch, kernel.h, kernel.w, kernel.c
    half = w // 2 + 1
    grid = (batch, h, w, c)
    spectrum = (batch, half, h, 2, c)

    forward = np.stack(rfft_matrices(w), axis=-1).reshape(w, 2 * half)
    backward = np.stack(irfft_matrices(w), axis=1).reshape(2 * half, w)
    row, row_matrix = _transform_lines(
        forward,
        lines=(batch, h),
        channels=c,
        source=grid,
        source_at=lambda b, i, q: (b, i, q),
        output=spectrum,
        output_at=lambda b, i, o: (b, o // 2, i, o % 2),
    )
    inverse_row, inverse_row_matrix = _transform_lines(
        backward,
        lines=(batch, h),
        channels=c,
        source=spectrum,
        source_at=lambda b, i, q: (b, q // 2, i, q % 2),
        output=grid,
        output_at=lambda b, i, o: (b, i, o),
    )
    column, column_matrix = _filter_columns(kernel)
    return Scheduled(
        steps=(
            Step(func=row, args=("x", "row_matrix", "spectrum")),
            Step(
                func=column, args=("spectrum", "k_re", "k_im", "column_matrix", "filtered_spectrum")
            ),
            Step(func=inverse_row, args=("filtered_spectrum", "inverse_row_matrix", "y")),
        ),
        temps={"spectrum": ("float32", spectrum), "filtered_spectrum": ("float32", spectrum)},
        consts={
            "row_matrix": row_matrix,
            "column_matrix": column_matrix,
            "inverse_row_matrix": inverse_row_matrix,
        },
    )


def _outputs_per_thread(count: int, most: int = 8) -> int:
    """How many of `count` outputs a thread computes: least padding, then the most."""
    sizes = range(1, min(count, most) + 1)
    good = [size for size in sizes if size >= min(4, count)]
    return min(good, key=lambda size: (-(-count // size) * size, -size))


def _in_groups(matrix: Array, size: int) -> Array:
    """The columns of `matrix` in groups of `size`, each group padded to a multiple of 4.

    So that a thread reads its coefficients as 16-byte vectors.
    """
    inputs, outputs = matrix.shape
    groups, padded = -(-outputs // size), -(-size // 4) * 4
    result = np.zeros((inputs, groups, padded), np.float32)
    for group in range(groups):
        part = matrix[:, group * size : (group + 1) * size]
        result[:, group, : part.shape[1]] = part
    return result.reshape(inputs, groups * padded)


def _transform_lines(
    matrix: Array,
    *,
    lines: tuple[int, int],
    channels: int,
    source: tuple[int, ...],
    source_at: Callable[[Any, Any, Any], tuple[Any, ...]],
    output: tuple[int, ...],
    output_at: Callable[[Any, Any, Any], tuple[Any, ...]],
) -> tuple[Any, Array]:
    """output[at(b, i, o)] = sum over q of matrix[q, o] * source[at(b, i, q)], per channel.

    Returns:
        The function of (source, matrix, output), and the matrix as it wants it.
    """
    batch, count = lines
    inputs, outputs = matrix.shape
    size = _outputs_per_thread(outputs)
    padded = -(-size // 4) * 4
    groups = -(-outputs // size)
    packed = _in_groups(matrix, size)
    width = 4 if channels % 4 == 0 else 1
    lanes = _CHANNELS // width
    block_lines = max(1, min(128 // (lanes * groups), 16))
    # A thread block has at most 1024 threads; the groups that do not fit go to further blocks.
    block_groups = min(groups, 512 // lanes)
    shared = packed.nbytes <= _SHARED_BYTES // 2
    threads = lanes * block_groups * block_lines
    copies = -(-packed.size // threads)

    def coefficient(staged: Any, direct: Any, q: Any, position: Any) -> Any:
        return staged[q, position] if shared else direct[q, position]

    @T.prim_func(s_tir=True)
    def transform_lines(
        x: T.Buffer(source, "float32"),
        coefficients: T.Buffer(packed.shape, "float32"),
        y: T.Buffer(output, "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        channel_block = T.launch_thread("blockIdx.x", -(-channels // _CHANNELS))
        line_block = T.launch_thread("blockIdx.y", -(-batch * count // block_lines))
        group_block = T.launch_thread("blockIdx.z", -(-groups // block_groups))
        lane = T.launch_thread("threadIdx.x", lanes)
        block_group = T.launch_thread("threadIdx.y", block_groups)
        block_line = T.launch_thread("threadIdx.z", block_lines)
        staged = T.alloc_buffer(packed.shape if shared else (1, 1), "float32", scope="shared")
        acc = T.alloc_buffer((size, width), "float32", scope="local")
        values = T.alloc_buffer((width,), "float32", scope="local")
        factors = T.alloc_buffer((padded,), "float32", scope="local")
        if shared:
            thread: T.let = (block_line * block_groups + block_group) * lanes + lane
            for copy in T.serial(copies, unroll=4):
                position: T.let = copy * threads + thread
                if position < packed.size:
                    staged[position // packed.shape[1], position % packed.shape[1]] = coefficients[
                        position // packed.shape[1], position % packed.shape[1]
                    ]
            T.tvm_storage_sync("shared")
        line: T.let = line_block * block_lines + block_line
        group: T.let = group_block * block_groups + block_group
        channel: T.let = (channel_block * lanes + lane) * width
        if all_of(
            within(line, batch * count, batch * count % block_lines == 0),
            within(group, groups, groups % block_groups == 0),
            within(channel, channels, channels % _CHANNELS == 0),
        ):
            for o in T.unroll(size):
                for v in T.unroll(width):
                    acc[o, v] = T.float32(0)
            for q in T.serial(inputs, unroll=2):
                for v in T.vectorized(width):
                    values[v] = x[(*source_at(line // count, line % count, q), channel + v)]
                for quad in T.unroll(padded // 4):
                    for v in T.vectorized(4):
                        factors[quad * 4 + v] = coefficient(
                            staged, coefficients, q, group * padded + quad * 4 + v
                        )
                for o in T.unroll(size):
                    for v in T.unroll(width):
                        acc[o, v] = acc[o, v] + factors[o] * values[v]
            for o in T.unroll(size):
                if all_of(within(group * size + o, outputs, outputs % size == 0)):
                    for v in T.vectorized(width):
                        y[
                            (
                                *output_at(line // count, line % count, group * size + o),
                                channel + v,
                            )
                        ] = acc[o, v]

    return transform_lines, packed


def _filter_columns(kernel: DftFilter) -> tuple[Any, Array]:
    """DFT along h, product with K and inverse DFT, of each column of the half spectrum.

    Returns:
        The function of (spectrum, k_re, k_im, column_matrix, filtered spectrum), and the DFT
        matrix: real parts, then imaginary parts.
    """
    batch, h, c = kernel.batch, kernel.h, kernel.c
    half = kernel.w // 2 + 1
    # Frequencies and positions mirror each other: row u of the full matrix is row h - u conjugated.
    re, im = rfft_matrices(h)
    mirror = [min(u, h - u) for u in range(h)]
    sign = np.array([1.0 if u <= h // 2 else -1.0 for u in range(h)])
    size = _outputs_per_thread(h, most=7)
    padded = -(-size // 4) * 4
    groups = -(-h // size)
    packed = np.stack([_in_groups(re[:, mirror], size), _in_groups(im[:, mirror] * sign, size)])

    width = 2 if c % 2 == 0 else 1
    lanes = _CHANNELS // width
    while lanes > 1 and (lanes * groups > 512 or 8 * h * lanes * width > _SHARED_BYTES - 1024):
        lanes //= 2
    # A grid of few rows fills a block with several columns.
    columns = max(1, min(64 // (lanes * groups), 8, half))
    column_bytes = 8 * h * lanes * width
    shared = packed.nbytes + columns * column_bytes <= _SHARED_BYTES
    threads = lanes * groups * columns
    matrix_copies = -(-packed.size // threads)
    copies = -(-h // groups)
    channels = lanes * width
    k_stored = "uint16" if kernel.k_dtype == "float16" else "float32"
    row_size = packed.shape[2]

    def factor(value: Any) -> Any:
        return half_to_float(value) if kernel.k_dtype == "float16" else value

    def coefficient(staged: Any, direct: Any, part: int, q: Any, position: Any) -> Any:
        return staged[part, q, position] if shared else direct[part, q, position]

    def plus_or_minus(total: Any, product: Any, negative: bool) -> Any:
        return total - product if negative else total + product

    @T.inline
    def transform(data, staged, coefficients, acc_re, acc_im, block_column, group, first, inverse):
        # acc = the column times the DFT matrix, or times its conjugate, which is its inverse.
        values_re = T.alloc_buffer((width,), "float32", scope="local")
        values_im = T.alloc_buffer((width,), "float32", scope="local")
        cosines = T.alloc_buffer((padded,), "float32", scope="local")
        sines = T.alloc_buffer((padded,), "float32", scope="local")
        for o in T.unroll(size):
            for v in T.unroll(width):
                acc_re[o, v] = T.float32(0)
                acc_im[o, v] = T.float32(0)
        for q in T.serial(h, unroll=False):
            for v in T.vectorized(width):
                values_re[v] = data[block_column, q, 0, first + v]
            for v in T.vectorized(width):
                values_im[v] = data[block_column, q, 1, first + v]
            for quad in T.unroll(padded // 4):
                for v in T.vectorized(4):
                    cosines[quad * 4 + v] = coefficient(
                        staged, coefficients, 0, q, group * padded + quad * 4 + v
                    )
                for v in T.vectorized(4):
                    sines[quad * 4 + v] = coefficient(
                        staged, coefficients, 1, q, group * padded + quad * 4 + v
                    )
            for o in T.unroll(size):
                for v in T.unroll(width):
                    acc_re[o, v] = acc_re[o, v] + cosines[o] * values_re[v]
                    acc_re[o, v] = plus_or_minus(acc_re[o, v], sines[o] * values_im[v], not inverse)
                    acc_im[o, v] = acc_im[o, v] + cosines[o] * values_im[v]
                    acc_im[o, v] = plus_or_minus(acc_im[o, v], sines[o] * values_re[v], inverse)

    @T.prim_func(s_tir=True)
    def filter_columns(
        x: T.Buffer((batch, half, h, 2, c), "float32"),
        k_re: T.Buffer((h, half, c), k_stored),
        k_im: T.Buffer((h, half, c), k_stored),
        coefficients: T.Buffer(packed.shape, "float32"),
        y: T.Buffer((batch, half, h, 2, c), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        channel_block = T.launch_thread("blockIdx.x", -(-c // channels))
        column_block = T.launch_thread("blockIdx.y", -(-half // columns))
        b = T.launch_thread("blockIdx.z", batch)
        lane = T.launch_thread("threadIdx.x", lanes)
        group = T.launch_thread("threadIdx.y", groups)
        block_column = T.launch_thread("threadIdx.z", columns)
        staged = T.alloc_buffer(packed.shape if shared else (1, 1, 1), "float32", scope="shared")
        data = T.alloc_buffer((columns, h, 2, channels), "float32", scope="shared")
        acc_re = T.alloc_buffer((size, width), "float32", scope="local")
        acc_im = T.alloc_buffer((size, width), "float32", scope="local")
        values_re = T.alloc_buffer((width,), "float32", scope="local")
        values_im = T.alloc_buffer((width,), "float32", scope="local")
        if shared:
            thread: T.let = (block_column * groups + group) * lanes + lane
            for copy in T.serial(matrix_copies, unroll=4):
                position: T.let = copy * threads + thread
                if position < packed.size:
                    staged[
                        position // (h * row_size),
                        position // row_size % h,
                        position % row_size,
                    ] = coefficients[
                        position // (h * row_size),
                        position // row_size % h,
                        position % row_size,
                    ]
        column: T.let = column_block * columns + block_column
        first: T.let = lane * width
        channel: T.let = channel_block * channels + first
        if all_of(within(column, half, half % columns == 0), within(channel, c, c % channels == 0)):
            for copy in T.serial(copies, unroll=4):
                i: T.let = copy * groups + group
                if all_of(within(i, h, h % groups == 0)):
                    for part in T.unroll(2):
                        for v in T.vectorized(width):
                            data[block_column, i, part, first + v] = x[
                                b, column, i, part, channel + v
                            ]
        T.tvm_storage_sync("shared")
        transform(data, staged, coefficients, acc_re, acc_im, block_column, group, first, False)
        # Everyone has read the column before it is replaced by its filtered spectrum.
        T.tvm_storage_sync("shared")
        if all_of(within(column, half, half % columns == 0), within(channel, c, c % channels == 0)):
            for o in T.unroll(size):
                if all_of(within(group * size + o, h, h % size == 0)):
                    for v in T.unroll(width):
                        values_re[v] = factor(k_re[group * size + o, column, channel + v])
                        values_im[v] = factor(k_im[group * size + o, column, channel + v])
                        data[block_column, group * size + o, 0, first + v] = (
                            acc_re[o, v] * values_re[v] - acc_im[o, v] * values_im[v]
                        )
                        data[block_column, group * size + o, 1, first + v] = (
                            acc_re[o, v] * values_im[v] + acc_im[o, v] * values_re[v]
                        )
        T.tvm_storage_sync("shared")
        transform(data, staged, coefficients, acc_re, acc_im, block_column, group, first, True)
        if all_of(within(column, half, half % columns == 0), within(channel, c, c % channels == 0)):
            for o in T.unroll(size):
                if all_of(within(group * size + o, h, h % size == 0)):
                    for v in T.vectorized(width):
                        y[b, column, group * size + o, 0, channel + v] = acc_re[o, v]
                    for v in T.vectorized(width):
                        y[b, column, group * size + o, 1, channel + v] = acc_im[o, v]

    return filter_columns, packed


def schedule_circular_filter(kernel: CircularFilter, gpu: Gpu, storage: ActStorage) -> Scheduled:  # noqa: ARG001
    """A lane per channel; a thread keeps a stretch of one row's outputs.

    Of every row of x and of the kernel it reads a stretch of 2 * size - 1 and of size values at a
    time, which make size * size products.
    """
    batch, h, w, c = kernel.batch, kernel.h, kernel.w, kernel.c
    size = _outputs_per_thread(w)
    stretches = -(-w // size)
    lines = batch * h * stretches
    block_lines = min(4, lines)
    is_int8 = kernel.x == "int8"
    assert not is_int8 or CircularFilter.exact_in_float(h, w), kernel
    k_stored = "uint16" if kernel.k_dtype == "float16" else "float32"
    # Added to an index before it is reduced modulo w, so that it is never negative.
    turns = -(-(w + 3 * size) // w) * w

    def factor(value: Any) -> Any:
        if is_int8:
            return T.Cast("float32", value)
        return half_to_float(value) if kernel.k_dtype == "float16" else value

    def widened(value: Any, zero_point: Any) -> Any:
        return T.Cast("float32", value) - zero_point[0] if is_int8 else value

    def scaled(value: Any, scale: Any, at: Any) -> Any:
        return value * scale[at] if is_int8 else value

    @T.prim_func(s_tir=True)
    def circular_filter(
        x: T.Buffer((batch, h, w, c), kernel.x),
        k: T.Buffer((h, w, c), "int8" if is_int8 else k_stored),
        scale: T.Buffer((c,), "float32"),
        zero_point: T.Buffer((1,), "float32"),
        y: T.Buffer((batch, h, w, c), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        channel_block = T.launch_thread("blockIdx.x", -(-c // _CHANNELS))
        line_block = T.launch_thread("blockIdx.y", -(-lines // block_lines))
        lane = T.launch_thread("threadIdx.x", _CHANNELS)
        block_line = T.launch_thread("threadIdx.y", block_lines)
        acc = T.alloc_buffer((size,), "float32", scope="local")
        window = T.alloc_buffer((2 * size - 1,), "float32", scope="local")
        weights = T.alloc_buffer((size,), "float32", scope="local")
        line: T.let = line_block * block_lines + block_line
        channel: T.let = channel_block * _CHANNELS + lane
        if all_of(
            within(line, lines, lines % block_lines == 0),
            within(channel, c, c % _CHANNELS == 0),
        ):
            b: T.let = line // (h * stretches)
            i: T.let = line // stretches % h
            j: T.let = line % stretches * size
            for o in T.unroll(size):
                acc[o] = T.float32(0)
            for p in T.serial(h, unroll=False):
                for stretch in T.serial(stretches, unroll=False):
                    for t in T.unroll(2 * size - 1):
                        window[t] = widened(
                            x[
                                b,
                                (i + h - p) % h,
                                (j - stretch * size + (t - size + 1 + turns)) % w,
                                channel,
                            ],
                            zero_point,
                        )
                    for q in T.unroll(size):
                        if all_of(within(stretch * size + q, w, w % size == 0)):
                            weights[q] = factor(k[p, stretch * size + q, channel])
                        else:
                            weights[q] = T.float32(0)
                    for q in T.unroll(size):
                        for o in T.unroll(size):
                            acc[o] = acc[o] + weights[q] * window[o - q + size - 1]
            for o in T.unroll(size):
                if all_of(within(j + o, w, w % size == 0)):
                    y[b, i, j + o, channel] = scaled(acc[o], scale, channel)

    scaling = ("scale", "zero_point") if is_int8 else ()
    func = keep_params(circular_filter, ("x", "k", *scaling, "y"))
    return Scheduled(steps=(Step(func=func, args=("x", "kernel", *scaling, "y")),))
