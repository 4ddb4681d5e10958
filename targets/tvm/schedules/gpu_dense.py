"""Matrix products for CUDA: a register tile per thread, operands staged in shared memory.

Three ways to multiply, chosen by the kernel's dtype and the GPU:

* float32: FFMA.
* int8 where dp4a is one instruction (sm_72, sm_87): int32 words of four values, dp4a.
* int8 elsewhere: stored as int8, widened to float32 on the way into shared memory, multiplied by
  FFMA. A sum of at most 1024 products is below 2**24, so the float holds it exactly; longer sums
  go on in int32.

A product of few rows is bound by reading the weights, and has a kernel of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.kernel import ActStorage, Array, Dense, Scheduled, Step
from gfcompile.targets.tvm.schedules.math import (
    float32,
    gelu_in_few_registers,
    half_to_float,
    quantize,
)
from gfcompile.targets.tvm.schedules.params import keep_params

Mode = Literal["float", "widened", "dp4a"]

_EXACT_PRODUCTS = 1024  # 128 * 127 * 1024 < 2**24
_FEW_ROWS = 4
_GEMV_SPLITS = 8  # warps of a block that share a column's sum
_SHARED_BYTES = 48 * 1024
# Tiles that `tile_cycles` calls slower than this, compared with its best, are left out of a search.
_WORTH_ASSEMBLING = 1.5


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where the rows of x are, if it is no plain matrix.

    Attributes:
        shape: of the buffer.
        vector: how many neighbours of a row, aligned, can be loaded at once.
        load: (x, row, column, i) -> element `column` + i of a row, i < `vector`.
        exists: (row, column) -> whether there is such a piece of `vector` elements; else it is 0.
    """

    shape: tuple[int, ...]
    vector: int
    load: Callable[[Any, Any, Any, Any], Any]
    exists: Callable[[Any, Any], Any]


def schedule_dense(
    kernel: Dense, gpu: Gpu, storage: ActStorage, choice: "Tile | None" = None
) -> Scheduled:
    """A dense product with its epilogue, as one CUDA kernel."""
    assert kernel.n % kernel.out_groups == 0, "groups of columns are equally wide"
    assert storage == ActStorage(), "CUDA kernels keep int8 activations as they are"
    if kernel.m <= _FEW_ROWS:
        func, pack_w = _few_rows(kernel, storage)
    else:
        func, pack_w = tiled(kernel, gpu, storage, choice=choice)
    keep = {
        "x": True,
        "w": True,
        "scale": kernel.x == "int8",
        "bias": True,
        "residual": kernel.residual_rows > 0,
        "quant": kernel.out == "int8",
        "y": True,
    }
    args = tuple(name for name, kept in keep.items() if kept)
    return Scheduled(steps=(Step(func=keep_params(func, args), args=args),), pack={"w": pack_w})


# --- few rows: one warp reads 32 neighbouring columns, several warps share the sum over k


def _few_rows(kernel: Dense, storage: ActStorage) -> tuple[Any, Any]:
    m, n, k = kernel.m, kernel.n, kernel.k
    # Four int8 columns or one float32 column a lane: a warp reads 128 bytes in a row either way.
    width = 4 if kernel.x == "int8" else 1
    padded = -(-n // width) * width
    columns = 32 * width
    unit = "int32" if kernel.x == "int8" else "float32"
    steps = -(-k // _GEMV_SPLITS)
    finish = _epilogue(kernel, storage)

    @T.prim_func(s_tir=True)
    def dense(
        x: T.Buffer((m, k), kernel.x),
        w: T.Buffer((k, padded), kernel.x),
        scale: T.Buffer((n,), "float32"),
        bias: T.Buffer((n,), unit),
        residual: T.Buffer((max(kernel.residual_rows, 1), n), _residual_dtype(kernel)),
        quant: T.Buffer(_quant_shape(kernel), "float32"),
        y: T.Buffer((m, n), kernel.out),
    ):
        T.func_attr({"tirx.noalias": True})
        column_block = T.launch_thread("blockIdx.x", -(-n // columns))
        row = T.launch_thread("blockIdx.y", m)
        lane = T.launch_thread("threadIdx.x", 32)
        split = T.launch_thread("threadIdx.y", _GEMV_SPLITS)
        partial = T.alloc_buffer((_GEMV_SPLITS, columns), unit, scope="shared")
        acc = T.alloc_buffer((width,), unit, scope="local")
        total = T.alloc_buffer((1,), unit, scope="local")
        first: T.let = column_block * columns + lane * width
        for v in T.unroll(width):
            acc[v] = T.Cast(unit, 0)
        if first < padded:
            for step in T.serial(steps, unroll=4):
                if all_of(within(step * _GEMV_SPLITS + split, k, k % _GEMV_SPLITS == 0)):
                    for v in T.unroll(width):
                        acc[v] = acc[v] + T.Cast(unit, x[row, step * _GEMV_SPLITS + split]) * (
                            T.Cast(unit, w[step * _GEMV_SPLITS + split, first + v])
                        )
        for v in T.unroll(width):
            partial[split, lane * width + v] = acc[v]
        T.tvm_storage_sync("shared")
        if split < width:
            column: T.let = split * 32 + lane
            total[0] = partial[0, column]
            for other in T.unroll(_GEMV_SPLITS - 1):
                total[0] = total[0] + partial[other + 1, column]
            if column_block * columns + column < n:
                y[row, column_block * columns + column] = finish(
                    total[0],
                    row,
                    column_block * columns + column,
                    scale,
                    bias,
                    residual,
                    quant,
                )

    def pack(raw: Mapping[str, Array]) -> Array:
        return np.pad(raw["w"], ((0, 0), (0, padded - n)))

    return dense, pack


def _epilogue(kernel: Dense, storage: ActStorage, *, relu: bool = False) -> Any:
    """The expression from a finished sum to an output: (sum, row, column, buffers) -> value."""

    def finish(
        total: Any, row: Any, column: Any, scale: Any, bias: Any, residual: Any, quant: Any
    ) -> Any:
        if kernel.x == "int8":
            value = tirx.Cast("float32", total + bias[column]) * scale[column]
        else:
            value = total + bias[column]
        if relu:
            value = tirx.max(value, float32(0))
        if kernel.gelu and not kernel.residual_first:
            value = gelu_in_few_registers(value)
        if kernel.residual_rows:
            aligned = kernel.residual_rows >= kernel.m
            addend = residual[row if aligned else row % kernel.residual_rows, column]
            halves = kernel.residual_dtype == "float16"
            value = value + (half_to_float(addend) if halves else addend)
        if kernel.gelu and kernel.residual_first:
            value = gelu_in_few_registers(value)
        return quantize(value, quant_of(quant, column), storage) if kernel.out == "int8" else value

    def quant_of(quant: Any, column: Any) -> Any:
        """The quantization of that column's group."""
        if kernel.out_groups == 1:
            return quant
        width = kernel.n // kernel.out_groups
        # Four neighbours that share a group should share the division, too.
        group = column // 4 // (width // 4) if width % 4 == 0 else column // width
        return [quant[group, index] for index in range(4)]

    return finish


def _quant_shape(kernel: Dense) -> tuple[int, ...]:
    return (4,) if kernel.out_groups == 1 else (kernel.out_groups, 4)


def _residual_dtype(kernel: Dense) -> str:
    return "uint16" if kernel.residual_dtype == "float16" else "float32"


def within(index: Any, size: int, always: bool) -> Any:
    """The guard `index < size`, or None where it holds always."""
    return None if always else index < size


def all_of(*conditions: Any) -> Any:
    """The conjunction of the guards that are not None; Python's True if there is none."""
    needed = [condition for condition in conditions if condition is not None]
    if not needed:
        return True
    joined = needed[0]
    for condition in needed[1:]:
        joined = tirx.And(joined, condition)
    return joined


# --- many rows: a tile of the product per thread


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a block shares out its part of the product.

    Attributes:
        tm, tn: rows and columns of one thread; tn is a multiple of 4.
        ty, tx: threads along rows and along columns.
        bk: how much of k is in shared memory at a time, in units (floats, or words of 4 int8).
    """

    tm: int
    tn: int
    ty: int
    tx: int
    bk: int

    @property
    def rows(self) -> int:
        return self.tm * self.ty

    @property
    def columns(self) -> int:
        return self.tn * self.tx

    @property
    def threads(self) -> int:
        return self.ty * self.tx

    @property
    def shared_bytes(self) -> int:
        return 4 * self.bk * (self.rows + self.columns)


# Rows first: 196 = 7 * 28, and the grids of the zoo are multiples of 7; 8 serves the rest.
_TILES = tuple(
    Tile(tm=tm, tn=tn, ty=ty, tx=tx, bk=bk)
    for tm in (7, 8, 4)
    for tn in (8, 4)
    for ty, tx in ((4, 16), (8, 8), (4, 8), (8, 16), (14, 16), (28, 8), (7, 32), (16, 16))
    for bk in (8, 16)
)


def tile_cycles(tile: Tile, kernel: Dense, gpu: Gpu, mode: Mode) -> float:
    """A static estimate of a product's time: cycles in which a multiprocessor issues.

    Counted: multiply-adds, shared-memory loads, the copy into shared memory, loop and barrier,
    epilogue; rounded up to whole tiles and to whole blocks per multiprocessor. Four warps issue
    at once, and eight are taken to be enough to hide latency.
    """
    units = kernel.k // 4 if mode == "dp4a" else kernel.k
    steps = -(-units // tile.bk)
    copies = -(-tile.rows * tile.bk // 4 // tile.threads) + -(
        -tile.columns * tile.bk // 4 // tile.threads
    )
    copy_cost = 12 if mode == "widened" else 5  # load, address, guard, store; four conversions
    multiply = tile.tm * tile.tn * tile.bk
    shared_loads = tile.bk // 4 * (tile.tm + tile.tn)
    epilogue = tile.tm * tile.tn * (6 + 22 * kernel.gelu)
    instructions = steps * (multiply + shared_loads + copies * copy_cost + 12) + epilogue
    blocks = -(-kernel.m // tile.rows) * -(-kernel.n // tile.columns)
    per_sm = -(-blocks // gpu.sms)
    warps = -(-tile.threads // 32)
    registers = _registers(tile, kernel, mode)
    resident = min(
        per_sm,
        gpu.registers_per_sm // (registers * warps * 32),
        gpu.shared_bytes_per_sm // tile.shared_bytes,
        gpu.threads_per_sm // (warps * 32),
    )
    if not resident:
        return float("inf")
    hidden = min(1.0, resident * warps / 8)
    return per_sm * warps * instructions / 4 / hidden


def _registers(tile: Tile, kernel: Dense, mode: Mode) -> int:
    sums = tile.tm * tile.tn * (2 if mode == "widened" and kernel.k > _EXACT_PRODUCTS else 1)
    # Beside the sums, a slice of both operands, and addresses.
    return -(-(sums + 4 * tile.tm + tile.tn + 28) // 8) * 8


def choose_tile(kernel: Dense, gpu: Gpu, mode: Mode) -> Tile:
    """The tile of least estimated time."""
    return min(_fitting(kernel, mode), key=lambda tile: tile_cycles(tile, kernel, gpu, mode))


def dense_choices(kernel: Dense, gpu: Gpu) -> Sequence[Tile]:
    """Every tile that is worth assembling, the likeliest first: the default one leads."""
    if kernel.m <= _FEW_ROWS:
        return ()
    mode = product_mode(kernel, gpu)
    cycles = {tile: tile_cycles(tile, kernel, gpu, mode) for tile in _fitting(kernel, mode)}
    best = min(cycles.values())
    near = [tile for tile in cycles if cycles[tile] <= _WORTH_ASSEMBLING * best]
    return sorted(near, key=lambda tile: cycles[tile])


def _fitting(kernel: Dense, mode: Mode) -> list[Tile]:
    return [
        tile
        for tile in _TILES
        if tile.threads % 32 == 0
        and tile.shared_bytes <= _SHARED_BYTES
        and _registers(tile, kernel, mode) <= 168
    ]


def product_mode(kernel: Dense, gpu: Gpu) -> Mode:
    """What the products of `kernel` are computed in on `gpu`."""
    if kernel.x == "float32":
        return "float"
    # A row that is no whole number of words cannot be read as words.
    return "dp4a" if gpu.int8_dot and kernel.k % 4 == 0 else "widened"


def tiled(
    kernel: Dense,
    gpu: Gpu,
    storage: ActStorage,
    rows: Rows | None = None,
    *,
    relu: bool = False,
    choice: Tile | None = None,
) -> tuple[Any, Any]:
    """The product of many rows: its function, and how w is packed.

    Args:
        rows: of x, for a float32 product.
        relu: after the bias.
        choice: the tile; by default that of least estimated time.
    """
    mode = product_mode(kernel, gpu)
    tile = choice or choose_tile(kernel, gpu, mode)
    m, n = kernel.m, kernel.n
    depth = kernel.k // 4 if mode == "dp4a" else kernel.k  # of the product, in units
    padded = -(-n // 4) * 4
    unit = "int32" if mode == "dp4a" else "float32"
    stored = {"float": "float32", "widened": "int8", "dp4a": "int32"}[mode]
    if rows is None:
        rows = Rows(
            shape=(m, depth),
            vector=4 if depth % 4 == 0 else 1,
            load=lambda x, row, column, i: x[row, column + i],
            exists=lambda _row, _column: None,
        )
    x_vector, load, exists = rows.vector, rows.load, rows.exists
    y_vector = 4 if n % 4 == 0 else 1

    steps = -(-depth // tile.bk)
    chunks = -(-steps * tile.bk // _EXACT_PRODUCTS) if mode == "widened" else 1
    chunk_steps = -(-steps // chunks)
    exact_depth = chunks * chunk_steps * tile.bk == depth
    exact_rows = m % tile.rows == 0
    exact_columns = n % tile.columns == 0
    long_sum = chunks > 1

    x_pieces = tile.rows * tile.bk // x_vector
    x_row_pieces = tile.bk // x_vector
    x_copies = -(-x_pieces // tile.threads)
    w_pieces = tile.bk * tile.columns // 4
    w_row_pieces = tile.columns // 4
    w_copies = -(-w_pieces // tile.threads)
    groups = tile.tn // 4
    finish = _epilogue(kernel, storage, relu=relu)

    def multiply_add(total: Any, a: Any, b: Any) -> Any:
        if mode == "dp4a":
            return T.call_pure_extern("int32", "__dp4a", a, b, total)
        return total + a * b

    @T.prim_func(s_tir=True)
    def dense(
        x: T.Buffer(rows.shape, stored),
        w: T.Buffer((depth, padded), stored),
        scale: T.Buffer((n,), "float32"),
        bias: T.Buffer((n,), "float32" if mode == "float" else "int32"),
        residual: T.Buffer((max(kernel.residual_rows, 1), n), _residual_dtype(kernel)),
        quant: T.Buffer(_quant_shape(kernel), "float32"),
        y: T.Buffer((m, n), kernel.out),
    ):
        T.func_attr({"tirx.noalias": True})
        # Neighbouring blocks share their columns of w, so that w is read from DRAM once.
        row_block = T.launch_thread("blockIdx.x", -(-m // tile.rows))
        column_block = T.launch_thread("blockIdx.y", -(-n // tile.columns))
        thread = T.launch_thread("threadIdx.x", tile.threads)
        xs = T.alloc_buffer((tile.rows, tile.bk), unit, scope="shared")
        ws = T.alloc_buffer((tile.bk, tile.columns), unit, scope="shared")
        acc = T.alloc_buffer((tile.tm, tile.tn), unit, scope="local")
        sums = T.alloc_buffer((tile.tm, tile.tn), "int32", scope="local")
        a = T.alloc_buffer((tile.tm, 4), unit, scope="local")
        b = T.alloc_buffer((tile.tn,), unit, scope="local")
        result = T.alloc_buffer((4,), kernel.out, scope="local")
        ty: T.let = thread // tile.tx
        tx: T.let = thread % tile.tx
        if long_sum:
            for i in T.unroll(tile.tm):
                for j in T.unroll(tile.tn):
                    sums[i, j] = 0
        for chunk in T.serial(chunks, unroll=False):
            for i in T.unroll(tile.tm):
                for j in T.unroll(tile.tn):
                    acc[i, j] = T.Cast(unit, 0)
            # Unrolled further, ptxas would load several steps ahead and run out of registers.
            for step in T.serial(chunk_steps, unroll=False):
                start: T.let = (chunk * chunk_steps + step) * tile.bk
                T.tvm_storage_sync("shared")
                for copy in T.unroll(x_copies):
                    piece: T.let = copy * tile.threads + thread
                    x_row: T.let = piece // x_row_pieces
                    x_col: T.let = piece % x_row_pieces * x_vector
                    if all_of(within(piece, x_pieces, x_pieces % tile.threads == 0)):
                        if all_of(
                            within(row_block * tile.rows + x_row, m, exact_rows),
                            within(start + x_col, depth, exact_depth),
                            exists(row_block * tile.rows + x_row, start + x_col),
                        ):
                            for v in T.vectorized(x_vector):
                                xs[x_row, x_col + v] = T.Cast(
                                    unit,
                                    load(x, row_block * tile.rows + x_row, start + x_col, v),
                                )
                        else:
                            for v in T.vectorized(x_vector):
                                xs[x_row, x_col + v] = T.Cast(unit, 0)
                for copy in T.unroll(w_copies):
                    piece: T.let = copy * tile.threads + thread
                    w_row: T.let = piece // w_row_pieces
                    w_col: T.let = piece % w_row_pieces * 4
                    if all_of(within(piece, w_pieces, w_pieces % tile.threads == 0)):
                        if all_of(
                            within(start + w_row, depth, exact_depth),
                            within(column_block * tile.columns + w_col, padded, exact_columns),
                        ):
                            for v in T.vectorized(4):
                                ws[w_row, w_col + v] = T.Cast(
                                    unit, w[start + w_row, column_block * tile.columns + w_col + v]
                                )
                        else:
                            for v in T.vectorized(4):
                                ws[w_row, w_col + v] = T.Cast(unit, 0)
                T.tvm_storage_sync("shared")
                for quad in T.serial(tile.bk // 4, unroll=False):
                    for i in T.unroll(tile.tm):
                        for v in T.vectorized(4):
                            a[i, v] = xs[i * tile.ty + ty, quad * 4 + v]
                    for inner in T.unroll(4):
                        for group in T.unroll(groups):
                            for v in T.vectorized(4):
                                b[group * 4 + v] = ws[
                                    quad * 4 + inner, (group * tile.tx + tx) * 4 + v
                                ]
                        for i in T.unroll(tile.tm):
                            for j in T.unroll(tile.tn):
                                acc[i, j] = multiply_add(acc[i, j], a[i, inner], b[j])
            if long_sum:
                for i in T.unroll(tile.tm):
                    for j in T.unroll(tile.tn):
                        sums[i, j] = sums[i, j] + T.Cast("int32", acc[i, j])
        for i in T.unroll(tile.tm):
            row: T.let = row_block * tile.rows + i * tile.ty + ty
            if all_of(within(row, m, exact_rows)):
                for group in T.unroll(groups):
                    column: T.let = column_block * tile.columns + (group * tile.tx + tx) * 4
                    if y_vector == 4:
                        if all_of(within(column, n, exact_columns)):
                            for v in T.unroll(4):
                                result[v] = finish(
                                    total_of(mode, long_sum, acc, sums, i, group * 4 + v),
                                    row,
                                    column + v,
                                    scale,
                                    bias,
                                    residual,
                                    quant,
                                )
                            for v in T.vectorized(4):
                                y[row, column + v] = result[v]
                    else:
                        for v in T.unroll(4):
                            if column + v < n:
                                y[row, column + v] = finish(
                                    total_of(mode, long_sum, acc, sums, i, group * 4 + v),
                                    row,
                                    column + v,
                                    scale,
                                    bias,
                                    residual,
                                    quant,
                                )

    def pack(raw: Mapping[str, Array]) -> Array:
        wide = np.pad(raw["w"], ((0, 0), (0, padded - n)))
        if mode != "dp4a":
            return wide
        # Word (q, c) holds rows 4q to 4q + 3 of column c, lowest byte first.
        words = wide.reshape(depth, 4, padded).transpose(0, 2, 1)
        return np.ascontiguousarray(words).view(np.int32)[..., 0]

    return dense, pack


def total_of(mode: Mode, long_sum: bool, acc: Any, sums: Any, i: Any, j: Any) -> Any:
    """A finished sum: float32, or int32 for int8 products."""
    if mode != "widened":
        return acc[i, j]
    return sums[i, j] if long_sum else tirx.Cast("int32", acc[i, j])
