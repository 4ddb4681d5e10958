"""Dense kernels on CPUs: one recipe for every instruction set, float32 and int8.

    for each panel of columns, packed as it is read     (parallel, with blocks of rows)
      for each tile of rows
        accumulators = bias
        for k: accumulators += x * w                    (registers only, see cpu_dot)
        y = epilogue(accumulators)                      (vectors only)

Nothing is padded but weights: where rows or columns do not divide by the tile, the last tile
overlaps the one before it and computes the same numbers again. Two tasks may so write the same
bytes to the same place; results do not depend on how tasks are split.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, get_args

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Array, Dense, Scheduled, Step
from gfcompile.targets.tvm.schedules.cpu_dot import (
    Buffer,
    Product,
    Tile,
    WideningNeon,
    act_storage,
    product_of,
)
from gfcompile.targets.tvm.schedules.math import Expr, gelu, half_to_float, quantize

__all__ = [
    "DenseChoice",
    "act_storage",
    "choose_tile",
    "dense_choices",
    "epilogue_width",
    "fits_registers",
    "packing",
    "registers",
    "schedule_dense",
    "tile_cycles",
    "tile_sums",
]

# Tasks to split a kernel into: enough for the 8 to 12 cores of the largest boards.
_TASKS = 16
# The model of a core that chooses tiles: cycles of a vector instruction, and of a load besides
# (fitted to some 20 tiles on AVX2 and AVX-512); the least between two additions to one
# accumulator; what it takes to fill and drain the pipeline around a tile.
_INSTRUCTION = 0.5
_LOAD = 0.2
_LATENCY = 4
_TILE_START = 30
# Vectors of accumulators in a tile: more hide no further latency, and every one is code.
_ACCUMULATORS = 24
# Tiles that the model calls slower than this, compared with its best, are not worth measuring.
_WORTH_MEASURING = 1.5

Order = Literal["panels", "rows"]


@dataclass(frozen=True, kw_only=True)
class DenseChoice:
    """What a dense kernel may do one way or another; its results are the same bits either way.

    Attributes:
        rows, vectors: the register tile.
        unroll: chunks of k in the unrolled inner loop.
        order: what the outer loop goes over. "panels" keeps a panel of weights in cache while
            all rows pass by, "rows" a tile of rows while all weights do.
    """

    rows: int
    vectors: int
    unroll: int = 1
    order: Order = "panels"

    @property
    def tile(self) -> Tile:
        return Tile(rows=self.rows, vectors=self.vectors)


def dense_choices(kernel: Dense, cpu: Cpu) -> Sequence[DenseChoice]:
    """Every choice that is worth measuring, the likeliest first: the default one leads."""
    product = product_of(kernel, cpu)
    cycles = {
        tile: _cycles(kernel, product, tile)
        for tile in _tiles(kernel, product, cpu.vector_registers)
    }
    best = min(cycles.values())
    near = [tile for tile in cycles if cycles[tile] <= _WORTH_MEASURING * best]
    return [
        DenseChoice(rows=tile.rows, vectors=tile.vectors, unroll=unroll, order=order)
        for tile in sorted(near, key=lambda tile: cycles[tile])
        for order in get_args(Order)
        for unroll in (1, 2)
    ]


def schedule_dense(
    kernel: Dense, cpu: Cpu, storage: ActStorage, choice: DenseChoice | None = None
) -> Scheduled:
    """The dense kernel for `cpu`, by default as its model of a core chooses."""
    product = product_of(kernel, cpu)
    if choice is None:
        tile = choose_tile(kernel, product, cpu.vector_registers)
        choice = DenseChoice(rows=tile.rows, vectors=tile.vectors)
    tile = choice.tile
    k = ceil(kernel.k / product.group) * product.group
    steps, temps = [], {}
    x = "x"
    x_dtype = storage.dtype if kernel.x == "int8" else "float32"
    if k != kernel.k or x_dtype != product.x_dtype:
        x = "x_groups"
        temps[x] = (product.x_dtype, (kernel.m, k))
        group_rows = _group_rows(kernel.m, kernel.k, k, x_dtype, product.x_dtype)
        steps.append(Step(func=group_rows, args=("x", x)))
    args = [x, "w"]
    args += ["scale"] if kernel.x == "int8" else []
    args += ["bias"]
    args += ["residual"] if kernel.residual_rows else []
    args += ["quant"] if kernel.out == "int8" else []
    args += ["y"]
    steps.append(Step(func=_dense(kernel, k, product, choice, storage), args=tuple(args)))
    return Scheduled(steps=tuple(steps), pack=packing(kernel, product, tile, storage), temps=temps)


def choose_tile(kernel: Dense, product: Product, registers: int) -> Tile:
    """The register tile that takes the fewest cycles, by the model above."""
    tiles = _tiles(kernel, product, registers)
    return min(tiles, key=lambda tile: _cycles(kernel, product, tile))


def _tiles(kernel: Dense, product: Product, registers: int) -> Iterable[Tile]:
    """The tiles that fit the registers and reach beyond neither rows nor columns."""
    tiles = (
        Tile(rows=rows, vectors=vectors)
        for rows in range(min(kernel.m, registers), 0, -1)
        for vectors in range(product.vector_step, registers, product.vector_step)
        if vectors * product.columns <= kernel.n // kernel.out_groups
        or vectors == product.vector_step
    )
    return (tile for tile in tiles if fits_registers(product, tile, registers))


def _cycles(kernel: Dense, product: Product, tile: Tile) -> float:
    """Cycles of the whole kernel, by the model above."""
    outputs = tile.rows * tile.vectors * product.columns / product.lanes
    epilogue = _INSTRUCTION * outputs * (28 if kernel.gelu else 6)
    row_tiles, panels = ceil(kernel.m / tile.rows), _panels(kernel, product, tile)
    return row_tiles * panels * (tile_cycles(product, tile, kernel.k) + epilogue)


def fits_registers(product: Product, tile: Tile, registers: int) -> bool:
    """Whether the tile's inner loop needs no more than `registers`, and little code."""
    return product.registers(tile) <= registers and tile.rows * tile.vectors <= _ACCUMULATORS


def tile_cycles(product: Product, tile: Tile, k: int) -> float:
    """Cycles of `tile_sums`, by the model above."""
    per_multiply, per_vector = product.operations
    operations = tile.rows * tile.vectors * per_multiply + tile.vectors * per_vector
    step = max(_INSTRUCTION * operations + _LOAD * product.loads(tile), _LATENCY)
    return ceil(k / product.group) * step + _TILE_START


def _dense(
    kernel: Dense, k: int, product: Product, choice: DenseChoice, storage: ActStorage
) -> Any:
    """The kernel as a PrimFunc; k is rounded up to whole groups."""
    m, n, tile = kernel.m, kernel.n, choice.tile
    columns = tile.vectors * product.columns
    group_columns = n // kernel.out_groups
    panels, row_tiles = _panels(kernel, product, tile), ceil(m / tile.rows)
    group_panels = panels // kernel.out_groups
    outer, inner = (panels, row_tiles) if choice.order == "panels" else (row_tiles, panels)
    blocks = _blocks(inner, outer)
    y_dtype = storage.dtype if kernel.out == "int8" else "float32"

    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("dense")
        I.func_attr({"tirx.noalias": True})
        x = I.arg("x", I.buffer((m, k), product.x_dtype))
        w_shape = (panels, k // product.group, tile.vectors, product.w_elements)
        w = I.arg("w", I.buffer(w_shape, product.w_dtype))
        scale = I.arg("scale", I.buffer((n,))) if kernel.x == "int8" else None
        bias = I.arg("bias", I.buffer((n + _pad_columns(kernel, columns),), product.acc_dtype))
        rows = kernel.residual_rows
        halves = kernel.residual_dtype == "float16"
        residual_buffer = I.buffer((rows, n), "uint16" if halves else "float32") if rows else None
        residual = I.arg("residual", residual_buffer) if rows else None
        groups = kernel.out_groups
        quant_shape = (groups, 4) if groups > 1 else (4,)
        quant = I.arg("quant", I.buffer(quant_shape)) if kernel.out == "int8" else None
        y = I.arg("y", I.buffer((m, n), y_dtype))

        def finish(acc: Expr, row: Expr, column: Expr, group: Expr) -> Expr:
            value = acc if scale is None else tirx.Cast("float32", acc) * scale[column]
            if kernel.gelu and not kernel.residual_first:
                value = gelu(value)
            if residual is not None:
                addend = residual[row if rows >= m else row % rows, column]
                value = value + (half_to_float(addend) if halves else addend)
            if kernel.gelu and kernel.residual_first:
                value = gelu(value)
            if quant is None:
                return value
            values = [quant[group, i] for i in range(4)] if groups > 1 else quant
            return quantize(value, values, storage)

        with (
            I.parallel(outer * blocks) as task,
            I.serial(inner // blocks) as i,
        ):
            first, second = task // blocks, task % blocks * (inner // blocks) + i
            panel, row_tile = (first, second) if choice.order == "panels" else (second, first)
            group = panel // group_panels
            overlaps = group_panels * columns > group_columns
            within = _clamped(panel % group_panels * columns, group_columns - columns, overlaps)
            column = I.bind(group * group_columns + within)
            row = I.bind(_clamped(row_tile * tile.rows, m - tile.rows, m % tile.rows != 0))
            sums = tile_sums(x, w, bias, row, panel, column, k, product, tile, choice.unroll)
            width = min(group_columns, columns)
            vector = epilogue_width(width, product.lanes, kernel.out)
            for r in range(tile.rows):
                for start in range(0, width, vector):
                    # Where a vector does not fit any more, it overlaps the one before it.
                    at = min(start, width - vector)
                    with I.vectorized(vector) as lane:
                        value = finish(sums[r][at + lane], row + r, column + at + lane, group)
                        I.buffer_store(y, value, [row + r, column + at + lane])
    return builder.get()


def tile_sums(
    x: Buffer,
    w: Buffer,
    bias: Buffer,
    row: Expr,
    panel: Expr,
    column: Expr,
    k: int,
    product: Product,
    tile: Tile,
    unroll: int = 1,
) -> list[Buffer]:
    """Builds bias + x @ w for one tile: a buffer of columns for each row, all in registers.

    Args:
        unroll: chunks of k in the inner loop.
    """
    rows, vectors, lanes = tile.rows, tile.vectors, product.lanes
    dtype = f"{product.acc_dtype}x{lanes}"
    across = isinstance(product, WideningNeon)  # a vector is the partial sums of one column
    acc = [registers(vectors * lanes, product.acc_dtype) for _ in range(rows)]

    def load(r: int, v: int) -> Expr:
        return acc[r].vload([v * lanes], dtype)

    def store(buffers: list[Buffer], value: Expr, r: int, v: int) -> None:
        I.buffer_store(buffers[r], value, [T.ramp(v * lanes, 1, lanes)])

    def multiply(first_group: Expr, groups: int) -> None:
        first_k = first_group * product.group
        if product.by_lane:  # loaded together, used one after the other
            loaded = [product.load_x(x, row + r, first_k, groups) for r in range(rows)]
        for g in range(groups):
            weights = [product.load_w(w, panel, first_group + g, v) for v in range(vectors)]
            for r in range(rows):
                if product.by_lane:
                    a = loaded[r][g]
                else:
                    (a,) = product.load_x(x, row + r, first_k + g * product.group, 1)
                for v, b in enumerate(weights):
                    store(acc, product.multiply(load(r, v), a, b), r, v)

    for v in range(vectors):
        zero = T.broadcast(tirx.const(0, product.acc_dtype), lanes)
        start = zero if across else I.bind(bias.vload([column + v * lanes], dtype))
        for r in range(rows):
            store(acc, start, r, v)
    per_chunk = product.chunk // product.group
    chunks, left = divmod(k // product.group, per_chunk)
    together = min(unroll, max(chunks, 1))
    if chunks:
        with I.serial(chunks // together) as step:
            for i in range(together):
                multiply((step * together + i) * per_chunk, per_chunk)
    for chunk in range(chunks // together * together, chunks):
        multiply(chunk * per_chunk, per_chunk)
    for g in range(left):
        multiply(chunks * per_chunk + g, 1)
    if not isinstance(product, WideningNeon):
        return acc
    sums = [registers(vectors, product.acc_dtype) for _ in range(rows)]
    for r in range(rows):
        for v in range(0, vectors, lanes):
            total = product.sums([load(r, v + i) for i in range(lanes)])
            store(sums, total + bias.vload([column + v], dtype), r, v // lanes)
    return sums


def registers(size: int, dtype: str) -> Buffer:
    """A small array that LLVM keeps in vector registers.

    It has to be one of scope "global" and at most 1 KB: TVM asks the runtime for the memory of any
    other on every call.
    """
    assert size * 4 <= 1024
    return I.alloc_buffer((size,), dtype, scope="global")


def _group_rows(m: int, k: int, k_groups: int, source: str, target: str) -> Any:
    """x (m, k) as (m, k_groups) of another dtype; the columns added meet weights of 0."""
    vector = min(16, _power_of_two(k))
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("group_rows")
        I.func_attr({"tirx.noalias": True})
        x = I.arg("x", I.buffer((m, k), source))
        y = I.arg("y", I.buffer((m, k_groups), target))
        with I.parallel(m) as row:
            with I.serial(ceil(k / vector)) as i, I.vectorized(vector) as lane:
                at = _clamped(i * vector, k - vector, k % vector != 0) + lane
                I.buffer_store(y, tirx.Cast(target, x[row, at]), [row, at])
            for at in range(k, k_groups):
                I.buffer_store(y, tirx.const(0, target), [row, at])
    return builder.get()


def packing(
    kernel: Dense, product: Product, tile: Tile, storage: ActStorage
) -> Mapping[str, Callable[[Mapping[str, Array]], Array]]:
    """How the raw constants become those of `_dense`."""
    columns = tile.vectors * product.columns
    group_columns = kernel.n // kernel.out_groups
    group_panels = _panels(kernel, product, tile) // kernel.out_groups
    panels = kernel.out_groups * group_panels
    pad_columns = _pad_columns(kernel, columns)

    def pack_w(raw: Mapping[str, Array]) -> Array:
        w = np.pad(raw["w"], ((0, -kernel.k % product.group), (0, pad_columns)))
        # The columns of each panel, the last one of a group overlapping.
        last = max(0, group_columns - columns)
        within = np.minimum(np.arange(group_panels) * columns, last)
        first = np.arange(kernel.out_groups)[:, None] * group_columns + within
        w = w[:, first.reshape(-1, 1) + np.arange(columns)]  # (k, panels, columns)
        groups = w.shape[0] // product.group
        w = w.reshape(groups, product.group, panels, tile.vectors, product.columns)
        shape = (panels, groups, tile.vectors, product.w_elements)
        return np.ascontiguousarray(w.transpose(2, 0, 3, 4, 1)).reshape(shape)

    def pack_bias(raw: Mapping[str, Array]) -> Array:
        bias = raw["bias"]
        if kernel.x == "int8":
            # stored x = logical x + offset, for which the products must not be charged.
            column_sums = raw["w"].astype(np.int64).sum(axis=0)
            bias = (bias - storage.offset * column_sums).astype(np.int32)
        return np.pad(bias, (0, pad_columns))

    pack = {"w": pack_w}
    if pad_columns or (kernel.x == "int8" and storage.offset):
        pack["bias"] = pack_bias
    return pack


def _panels(kernel: Dense, product: Product, tile: Tile) -> int:
    """Panels of columns, the last one of each group perhaps overlapping."""
    group_columns = kernel.n // kernel.out_groups
    return kernel.out_groups * ceil(group_columns / (tile.vectors * product.columns))


def _pad_columns(kernel: Dense, columns: int) -> int:
    """Columns by which a panel reaches beyond n, where it is wider than a group."""
    return max(0, columns - kernel.n // kernel.out_groups)


def _blocks(inner: int, outer: int) -> int:
    """Into how many equal blocks to split the inner loop, so that there are tasks enough."""
    divisors = [d for d in range(1, inner + 1) if inner % d == 0]
    return next((d for d in divisors if d * outer >= _TASKS), inner)


def _clamped(value: Expr, highest: int, needed: bool) -> Expr:
    """min(value, highest), at least 0; just the value where it never gets there."""
    return tirx.min(value, max(0, highest)) if needed else value


def epilogue_width(columns: int, lanes: int, out: str) -> int:
    """Columns of one vector of the epilogue: wider than a register where bytes are to be stored."""
    if out == "int8":
        wide = next((w for w in (16, 8) if columns % w == 0), 0)
        return max(wide, min(lanes, _power_of_two(columns)))
    return min(lanes, _power_of_two(columns))


def _power_of_two(limit: int) -> int:
    """The largest power of two that is at most `limit`."""
    return 1 << (limit.bit_length() - 1)
