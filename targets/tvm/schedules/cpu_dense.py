"""Dense kernels on CPUs: one recipe for every instruction set, float32 and int8.

    for each part of the rows                           (parallel, with panels)
      for each panel of columns, packed as it is read
        for each tile of rows of the part
          accumulators = bias
          for k: accumulators += x * w                  (registers only, see cpu_dot)
          y = epilogue(accumulators)                    (vectors only)

The parts are for threads: each reads most of what it wrote itself in the kernel before. To get a
line from another core's cache may take a hundred cycles, which is a whole tile's product by AMX.

Nothing is padded but weights: where rows or columns do not divide by the tile, the last tile
overlaps the one before it and computes the same numbers again. Two tasks may so write the same
bytes to the same place; results do not depend on how tasks are split.

Weights lie in blocks of columns. On ARM a block is a tile; on x86 it is 16 columns for every
instruction set, from SSE to AMX, so that a library for all of them has its weights once.

A model's float32 weights come from the third-level cache or from memory, at a third of the speed at
which the first tile of rows could take them. So with AVX-512, whose tiles take that much, each
tile of rows asks for its share of the weights that come next.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
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
from gfcompile.targets.tvm.schedules import neon_epilogue
from gfcompile.targets.tvm.schedules.cpu_dot import (
    X86_BLOCK,
    Buffer,
    Product,
    Tile,
    View,
    act_storage,
    product_of,
)
from gfcompile.targets.tvm.schedules.math import (
    Expr,
    gelu,
    gelu_to_quantize,
    half_to_float,
    stored,
)

__all__ = [
    "LINE_BYTES",
    "Blocks",
    "Columns",
    "DenseChoice",
    "Runs",
    "act_storage",
    "choose_tile",
    "clamped",
    "counts_steps",
    "cut",
    "declare",
    "dense_choices",
    "epilogue_width",
    "fits_registers",
    "operand_names",
    "packing",
    "packing_steps",
    "prefetch_line",
    "quant_of",
    "registers",
    "schedule_dense",
    "store",
    "store_steps",
    "tile_cycles",
    "tile_sums",
]

# Tasks to split a kernel into: enough for the 8 to 12 cores of the largest boards.
_TASKS = 16
# The model of a core that chooses tiles: cycles of a vector instruction (loads: see Product), and
# what a load takes more of a whole line of weights, which come from the second-level cache (of 68
# to 197 rows); the least between two additions to one accumulator; what it takes to fill and drain
# the pipeline around a tile.
_INSTRUCTION = 0.5
_FAR_LINE = {"int32": 0.2, "float32": 0.35}
LINE_BYTES = 64
_LATENCY = 4
_TILE_START = 30
# Vectors of accumulators in a tile: more hide no further latency, and every one is code.
_ACCUMULATORS = 24
# Steps of the inner loop between two requests for weights that come next. More often, the requests
# cost registers; more rarely, they come in bursts and keep other loads waiting.
_TURN_STEPS = 4
# From so many tiles of columns on, laying x out for them pays.
_WORTH_PANELS = 8
# TVM keeps smaller arrays on the stack.
_LOCAL_BYTES = 1024
# Weights that take as long to read as an activation that another core wrote: measured. And the
# bytes of them that stay in a second-level cache of x86, so that one thread may read them twice.
_WEIGHTS_PER_ACTIVATION = 3
_WEIGHT_BYTES = 1 << 20
# Tiles that the model calls slower than this, compared with its best, are not worth measuring.
_WORTH_MEASURING = 1.5

_UNROLLS = (1, 2, 3, 4)

Order = Literal["columns", "rows"]


@dataclass(frozen=True, kw_only=True)
class DenseChoice:
    """What a dense kernel may do one way or another; its results are the same bits either way.

    Attributes:
        rows, vectors: the register tile.
        unroll: chunks of k in the unrolled inner loop.
        order: what the outer loop goes over. "columns" keeps a tile's weights in cache while all
            rows pass by, "rows" a tile of rows while all weights do.
    """

    rows: int
    vectors: int
    unroll: int = 1
    order: Order = "columns"

    @property
    def tile(self) -> Tile:
        return Tile(rows=self.rows, vectors=self.vectors)


def dense_choices(kernel: Dense, cpu: Cpu) -> Sequence[DenseChoice]:
    """Every choice that is worth measuring, the likeliest first: the default one leads."""
    product = product_of(kernel, cpu)
    tiles = _tiles(kernel, product, cpu.vector_registers)
    cycles = {tile: _cycles(kernel, product, tile) for tile in tiles}
    best = min(cycles.values())
    near = [tile for tile in cycles if cycles[tile] <= _WORTH_MEASURING * best]
    unrolls = (product.unroll,) if product.span else _UNROLLS  # a span is a loop of its own
    return [
        DenseChoice(rows=tile.rows, vectors=tile.vectors, unroll=unroll, order=order)
        for tile in sorted(near, key=lambda tile: cycles[tile])
        for order in get_args(Order)
        for unroll in sorted(unrolls, key=lambda unroll: unroll != _default(product, tile).unroll)
    ]


def schedule_dense(
    kernel: Dense, cpu: Cpu, storage: ActStorage, choice: DenseChoice | None = None
) -> Scheduled:
    """The dense kernel for `cpu`, by default as a model of a core chooses."""
    product = product_of(kernel, cpu)
    if choice is None:
        tile = choose_tile(kernel, product, cpu.vector_registers)
        choice = _default(product, tile)
    tile = choice.tile
    columns = Columns(kernel=kernel, product=product, tile=tile)
    k = _whole(kernel.k, product.group)
    steps = []
    temps: dict[str, tuple[str, tuple[int, ...]]] = {}
    x = "x"
    x_dtype = storage.dtype_of(kernel.x)
    panels = None
    if product.rows > 1:
        x = "x_pairs"
        temps[x] = (product.x_dtype, _x_shape(kernel, product, k))
        steps.append(Step(func=_pair_rows(kernel.m, kernel.k, k), args=("x", x)))
    elif product.by_lane and tile.rows > 1 and columns.tiles >= _WORTH_PANELS:
        panels = Panels(m=kernel.m, k=kernel.k, rows=tile.rows, chunk=product.chunk)
        x = "x_panels"
        temps[x] = (product.x_dtype, panels.shape)
        steps.append(Step(func=_panel_rows(panels, x_dtype, product.x_dtype), args=("x", x)))
    elif k != kernel.k or x_dtype != product.x_dtype:
        x = "x_groups"
        temps[x] = (product.x_dtype, (kernel.m, k))
        group_rows = _group_rows(kernel.m, kernel.k, k, x_dtype, product.x_dtype)
        steps.append(Step(func=group_rows, args=("x", x)))
    func = _dense(kernel, k, columns, choice, storage, panels)
    steps.append(Step(func=func, args=(x, *operand_names(kernel))))
    pack = dict(packing(kernel, product, tile, storage, block=columns.block))
    if counts_steps(kernel, storage):
        pack |= packing_steps(kernel)
    return Scheduled(steps=tuple(steps), pack=pack, temps=temps)


def packing_steps(kernel: Dense) -> Mapping[str, Callable[[Mapping[str, Array]], Array]]:
    """How scales become those of a kernel that counts in steps of its result."""

    def pack_scale(raw: Mapping[str, Array]) -> Array:
        inverse = raw["quant"].reshape(-1, 4)[:, 0]
        scale: Array = raw["scale"] * np.repeat(inverse, kernel.n // kernel.out_groups)
        return scale

    return {"scale": pack_scale, "quant": lambda raw: neon_epilogue.steps_args(raw["quant"])}


def _default(product: Product, tile: Tile) -> DenseChoice:
    """The rule's own choice with a tile: integers on AVX-512 gain by a longer loop."""
    longer = _loads_lines(product) and product.group > 1
    unroll = 2 if longer else product.unroll
    return DenseChoice(rows=tile.rows, vectors=tile.vectors, unroll=unroll)


def _loads_lines(product: Product) -> bool:
    """Whether a vector of weights is a whole cache line, as with AVX-512."""
    return product.lanes * 4 == LINE_BYTES


def choose_tile(kernel: Dense, product: Product, registers: int) -> Tile:
    """The register tile that takes the fewest cycles, by the model above."""
    tiles = _tiles(kernel, product, registers)
    return min(tiles, key=lambda tile: _cycles(kernel, product, tile))


def _tiles(kernel: Dense, product: Product, registers: int) -> Sequence[Tile]:
    """The tiles that fit the registers and cover the columns."""
    tiles = (
        Tile(rows=rows, vectors=vectors)
        for rows in range(_whole(min(kernel.m, registers), product.rows), 0, -product.rows)
        for vectors in range(product.vector_step, registers, product.vector_step)
    )
    return [
        tile
        for tile in tiles
        if Columns(kernel=kernel, product=product, tile=tile).is_possible
        and fits_registers(product, tile, registers)
    ]


def _cycles(kernel: Dense, product: Product, tile: Tile) -> float:
    """Cycles of the whole kernel, by the model above."""
    outputs = tile.rows * tile.vectors * product.columns / product.lanes
    epilogue = _INSTRUCTION * outputs * (28 if kernel.gelu else 6)
    row_tiles = ceil(kernel.m / tile.rows)
    column_tiles = Columns(kernel=kernel, product=product, tile=tile).tiles
    return row_tiles * column_tiles * (tile_cycles(product, tile, kernel.k) + epilogue)


def fits_registers(product: Product, tile: Tile, registers: int) -> bool:
    """Whether the tile's inner loop needs no more than `registers`, and little code."""
    few = product.operands(tile) * tile.vectors <= _ACCUMULATORS
    a_row = 4 * tile.vectors * product.lanes
    return product.registers(tile) <= registers and few and a_row < _LOCAL_BYTES


def tile_cycles(product: Product, tile: Tile, k: int) -> float:
    """Cycles of `tile_sums`, by the model above."""
    per_multiply, per_vector = product.operations
    operations = product.operands(tile) * tile.vectors * per_multiply + tile.vectors * per_vector
    far = _FAR_LINE[product.acc_dtype] * tile.vectors if _loads_lines(product) else 0
    step = max(
        _INSTRUCTION * operations + product.load_cycles * product.loads(tile) + far, _LATENCY
    )
    return ceil(k / product.group) * step + _TILE_START


@dataclass(frozen=True, kw_only=True)
class Columns:
    """How the columns of a kernel are packed into blocks, and cut into tiles.

    Vectors are counted from a group's first block on; the last block, and the last tile, overlap
    those before them where columns do not divide.
    """

    kernel: Dense
    product: Product
    tile: Tile

    @property
    def block(self) -> int:
        """Columns of a block."""
        return self.product.block or self.tile.vectors * self.product.columns

    @property
    def per_block(self) -> int:
        """Vectors of a block."""
        return self.block // self.product.columns

    @property
    def in_group(self) -> int:
        """Columns of a group."""
        return self.kernel.n // self.kernel.out_groups

    @property
    def group_blocks(self) -> int:
        return ceil(self.in_group / self.block)

    @property
    def group_tiles(self) -> int:
        return ceil(self.group_blocks * self.per_block / self.tile.vectors)

    @property
    def tiles(self) -> int:
        return self.kernel.out_groups * self.group_tiles

    @property
    def is_possible(self) -> bool:
        """Whether such tiles cover the columns: of a block that is padded, all at once."""
        if not self.product.block:
            least = self.tile.vectors == self.product.vector_step
            return least or self.tile.vectors * self.product.columns <= self.in_group
        if self.in_group < self.block:
            return self.tile.vectors == self.per_block
        return self.tile.vectors <= self.group_blocks * self.per_block

    @property
    def is_even(self) -> bool:
        """Whether blocks divide the columns, so that those of a tile are neighbours."""
        return self.in_group % self.block == 0

    def first(self, tile: Expr) -> Expr:
        """The first vector of a tile."""
        vectors = self.group_blocks * self.per_block
        overlaps = vectors % self.tile.vectors != 0
        within = tile % self.group_tiles * self.tile.vectors
        return clamped(within, vectors - self.tile.vectors, overlaps)

    def column(self, group: Expr, vector: Expr) -> Expr:
        """The first column of a vector."""
        start = group * self.in_group
        if self.is_even:
            return start + vector * self.product.columns
        at = clamped(vector // self.per_block * self.block, self.in_group - self.block, True)
        return start + at + vector % self.per_block * self.product.columns

    def runs(self, group: Expr, first: Expr) -> list[tuple[int, int, Expr]]:
        """The columns of a tile as runs of neighbours: place in the tile, width, first column."""
        whole = self.tile.vectors * self.product.columns
        if self.is_even or self.tile.vectors == self.per_block:
            return [(0, min(whole, self.in_group), I.bind(self.column(group, first)))]
        width = min(self.block, self.product.vector_step * self.product.columns)
        return [
            (at, width, I.bind(self.column(group, first + at // self.product.columns)))
            for at in range(0, whole, width)
        ]


@dataclass(frozen=True)
class Blocks:
    """Packed weights, (blocks, k / group, elements), as `tile_sums` indexes them."""

    buffer: Buffer
    columns: Columns
    first_block: Expr  # of the group

    def vload(self, at: Sequence[Expr], dtype: str) -> Expr:
        first, group, vector, _ = at
        per_block, in_tile = self.columns.per_block, self.columns.tile.vectors
        if in_tile % per_block == 0:  # a tile begins where a block does
            block, place = first // per_block + vector // per_block, vector % per_block
        elif per_block % in_tile == 0:  # or is within one
            block, place = first // per_block, first % per_block + vector
        else:
            block, place = (first + vector) // per_block, (first + vector) % per_block
        product = self.columns.product
        groups, wide = product.depth // product.group, product.cell[0]
        offset = place * product.columns * product.depth + group % groups * product.group * wide
        return self.buffer.vload([self.first_block + block, group // groups, offset], dtype)


@dataclass(frozen=True)
class Runs:
    """A row of values for all columns, indexed by places in a tile."""

    buffer: Buffer
    runs: Sequence[tuple[int, int, Expr]]

    def vload(self, at: Sequence[int], dtype: str) -> Expr:
        start, _, column = next(run for run in reversed(self.runs) if run[0] <= at[0])
        return self.buffer.vload([column + (at[0] - start)], dtype)


@dataclass(frozen=True, kw_only=True)
class Panels:
    """x laid out for tiles of `rows` rows: (tiles, chunks of k, rows, chunk).

    A tile then reads x from one end to the other, so that one instruction loads two registers.
    """

    m: int
    k: int
    rows: int
    chunk: int

    @property
    def chunks(self) -> int:
        return ceil(self.k / self.chunk)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (ceil(self.m / self.rows), self.chunks, self.rows, self.chunk)

    def first_row(self, panel: Expr) -> Expr:
        return clamped(panel * self.rows, self.m - self.rows, self.m % self.rows != 0)

    def view(self, buffer: Buffer, panel: Expr) -> View:
        """A panel as rows of k."""
        return View(buffer, lambda r, k: [panel, k // self.chunk, r, k % self.chunk])


def _panel_rows(panels: Panels, source: str, dtype: str) -> Any:
    """x (m, k) as panels of `dtype`, what is added to its rows as zeros."""
    m, k, rows, chunk = panels.m, panels.k, panels.rows, panels.chunk
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("panel_rows")
        I.func_attr({"tirx.noalias": True})
        x = I.arg("x", I.buffer((m, k), source))
        y = I.arg("y", I.buffer(panels.shape, dtype))

        def converted(value: Expr) -> Expr:
            return value if source == dtype else tirx.Cast(dtype, value)

        with I.parallel(panels.shape[0]) as panel:
            row = I.bind(panels.first_row(panel))
            if k >= chunk:
                with I.serial(k // chunk) as i:
                    for r in range(rows):
                        with I.vectorized(chunk) as lane:
                            value = converted(x[row + r, i * chunk + lane])
                            I.buffer_store(y, value, [panel, i, r, lane])
            for at in range(k // chunk * chunk, panels.chunks * chunk):
                with I.serial(rows) as r:
                    value = converted(x[row + r, at]) if at < k else tirx.const(0, dtype)
                    I.buffer_store(y, value, [panel, at // chunk, r, at % chunk])
    return builder.get()


def _dense(
    kernel: Dense,
    k: int,
    columns: Columns,
    choice: DenseChoice,
    storage: ActStorage,
    panels: Panels | None,
) -> Any:
    """The kernel as a PrimFunc; k is rounded up to whole groups."""
    m, product, tile = kernel.m, columns.product, columns.tile
    by_rows = choice.order == "rows"
    row_tiles = ceil(m / tile.rows)
    blocks = row_blocks(columns.tiles, row_tiles)
    by_columns = cut(kernel, product, row_tiles, columns.tiles)
    passes = by_columns.passes
    rows_are_lines = product.block * 4 == LINE_BYTES  # those of a block: on x86
    reads_ahead = rows_are_lines and not by_rows and passes > 1

    def tiles_of(task: Expr) -> tuple[Expr, Expr, Expr]:
        """Opens the loop over the tiles of a task: the row and the column of one, and its pass."""
        if by_rows:
            each = columns.tiles // blocks
            i = frame.enter_context(I.serial(each))
            return task // blocks, task % blocks * each + i, i
        column_tile, first, count = by_columns.at(task)
        i = frame.enter_context(I.serial(count))
        return first + i, column_tile, by_columns.pass_of(first, i)

    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("dense")
        I.func_attr({"tirx.noalias": True})
        operands = declare(
            columns, _x_shape(kernel, product, k) if panels is None else panels.shape, storage
        )
        tasks = row_tiles * blocks if by_rows else by_columns.count
        with I.parallel(tasks) as task, ExitStack() as frame:
            row_tile, column_tile, nth_pass = tiles_of(task)
            group = column_tile // columns.group_tiles
            first = I.bind(columns.first(column_tile))
            runs = columns.runs(group, first)
            w = Blocks(operands.w, columns, group * columns.group_blocks)
            bias = Runs(operands.bias, runs)
            every, per_tile = ceil(m / product.rows), product.operands(tile)
            operand = I.bind(clamped(row_tile * per_tile, every - per_tile, every % per_tile != 0))
            x, x_row = operands.x, operand
            if panels is not None:
                x, x_row = panels.view(x, row_tile), 0

            def read_ahead(turn: Expr, turns: int) -> None:
                block = group * columns.group_blocks + (first + tile.vectors) // columns.per_block
                all_lines = tile.vectors * k / (columns.per_block * product.group)
                lines = ceil(all_lines / (passes * turns))
                with I.serial(lines) as line:
                    at = (nth_pass * turns + turn) * lines + line
                    prefetch_line(operands.w, [block, at, 0])

            sums = tile_sums(
                x,
                w,
                bias,
                x_row,
                first,
                0,
                k,
                product,
                tile,
                unroll=choice.unroll,
                each_turn=read_ahead if reads_ahead else None,
            )
            if counts_steps(kernel, storage):
                held = _held(sums, product.lanes, runs)
                store_steps(kernel, operands, product, held, len(sums), operand, runs, group)
            else:
                store(kernel, operands, product, sums, operand, runs, group)
    return builder.get()


def counts_steps(kernel: Dense, storage: ActStorage) -> bool:
    """Whether values are counted in steps of the quantized result, by `neon_epilogue`."""
    return (
        storage.saturates
        and kernel.x == kernel.out == "int8"
        and not kernel.residual_rows
        and kernel.n // kernel.out_groups % neon_epilogue.LANES == 0
    )


@dataclass(frozen=True, kw_only=True)
class Operands:
    """The buffers of a dense kernel; those that it does not take are None."""

    x: Buffer
    w: Buffer
    scale: Buffer
    bias: Buffer
    residual: Buffer
    quant: Buffer
    y: Buffer
    storage: ActStorage


def operand_names(kernel: Dense) -> tuple[str, ...]:
    """The arguments of a dense kernel after x, in the order of `declare`."""
    names = ["w"]
    names += ["scale"] if kernel.x == "int8" else []
    names += ["bias"]
    names += ["residual"] if kernel.residual_rows else []
    names += ["quant"] if kernel.out == "int8" else []
    return (*names, "y")


def declare(
    columns: Columns,
    x_shape: Sequence[int],
    storage: ActStorage,
    bias_dtype: str = "",
    w_shape: Sequence[int] = (),
) -> Operands:
    """Declares the parameters of the PrimFunc under construction.

    Args:
        bias_dtype: if not that of the accumulators.
        w_shape: if not that of blocks.
    """
    kernel, product = columns.kernel, columns.product
    n, rows, groups = kernel.n, kernel.residual_rows, kernel.out_groups
    blocks_shape = (
        *(groups * columns.group_blocks, ceil(kernel.k / product.depth)),
        columns.per_block * product.columns * product.depth,
    )
    padded = n + max(0, columns.block - columns.in_group)
    residual_dtype = "uint16" if kernel.residual_dtype == "float16" else "float32"
    quant_args = neon_epilogue.STEPS_ARGS if counts_steps(kernel, storage) else 4
    quant_shape = (groups, quant_args) if groups > 1 else (quant_args,)
    return Operands(
        x=I.arg("x", I.buffer(x_shape, product.x_dtype)),
        w=I.arg("w", I.buffer(w_shape or blocks_shape, product.w_dtype)),
        scale=I.arg("scale", I.buffer((n,))) if kernel.x == "int8" else None,
        bias=I.arg("bias", I.buffer((padded,), bias_dtype or product.acc_dtype)),
        residual=I.arg("residual", I.buffer((rows, n), residual_dtype)) if rows else None,
        quant=I.arg("quant", I.buffer(quant_shape)) if kernel.out == "int8" else None,
        y=I.arg("y", I.buffer((kernel.m, n), storage.dtype_of(kernel.out))),
        storage=storage,
    )


def finish(
    kernel: Dense, operands: Operands, acc: Expr, row: Expr, column: Expr, group: Expr
) -> Expr:
    """What is stored for an accumulator, its bias included: the epilogue of one element."""
    rows = kernel.residual_rows
    value = acc
    if operands.scale is not None:
        value = tirx.Cast("float32", acc) * operands.scale[column]
    activation = gelu if kernel.out == "float32" else gelu_to_quantize
    if kernel.gelu and not kernel.residual_first:
        value = activation(value)
    if rows:
        addend = operands.residual[row if rows >= kernel.m else row % rows, column]
        value = value + (half_to_float(addend) if kernel.residual_dtype == "float16" else addend)
    if kernel.gelu and kernel.residual_first:
        value = activation(value)
    return stored(value, kernel.out, quant_of(kernel, operands, group), operands.storage)


def quant_of(kernel: Dense, operands: Operands, group: Expr) -> Any:
    """The `quant` argument of a group of columns."""
    quant = operands.quant
    return [quant[group, i] for i in range(4)] if kernel.out_groups > 1 else quant


def store(
    kernel: Dense,
    operands: Operands,
    product: Product,
    sums: Sequence[Buffer],
    operand: Expr,
    runs: Sequence[tuple[int, int, Expr]],
    group: Expr,
) -> None:
    """Writes what becomes of a tile's sums; its first row is that of `operand`."""
    for r, row_sums in enumerate(sums):
        row = I.bind(_row(operand, r, kernel.m, product))
        for place, width, column in runs:
            for at, vector in epilogue_vectors(width, product.lanes, kernel.out):
                with I.vectorized(vector) as lane:
                    acc = row_sums[(place + at + lane,)]
                    to = (row, column + at + lane)
                    value = finish(kernel, operands, acc, *to, group)
                    I.buffer_store(operands.y, value, list(to))


def store_steps(
    kernel: Dense,
    operands: Operands,
    product: Product,
    sums: Buffer,
    rows: int,
    operand: Expr,
    runs: Sequence[tuple[int, int, Expr]],
    group: Expr,
) -> None:
    """As `store`, where values are counted in steps, row after row in a loop.

    Written out, so many rows would keep each other from the registers: LLVM works on all of them at
    once, and stores and loads twice as much as this does.

    Args:
        sums: of all `rows` rows, one after the other, in memory.
    """
    lanes = neon_epilogue.LANES
    vector = f"int32x{lanes}"
    width = runs[-1][0] + runs[-1][1]
    steps = neon_epilogue.Steps(operands.quant, (group,) if kernel.out_groups > 1 else ())
    scales = {
        place + at: I.bind(operands.scale.vload([column + at], f"float32x{lanes}"))
        for place, run_width, column in runs
        for at in range(0, run_width, lanes)
    }
    with I.serial(rows) as r:
        row = I.bind(_row(operand, r, kernel.m, product))

        def value_at(place: int) -> Expr:
            acc = sums.vload([r * width + place], vector)
            value = I.bind(tirx.Cast(f"float32x{lanes}", acc) * scales[place])
            return steps.gelu(value) if kernel.gelu else value

        for place, run_width, column in runs:
            for at in range(0, run_width, 2 * lanes):
                two = [value_at(place + i) for i in (at, at + lanes) if i < run_width]
                stored = steps.stored(two)
                to = T.ramp(column + at, 1, lanes * len(two))
                I.buffer_store(operands.y, stored, [row, to])


def _held(sums: Sequence[Buffer], lanes: int, runs: Sequence[tuple[int, int, Expr]]) -> Buffer:
    """A tile's sums as `store_steps` takes them."""
    width = runs[-1][0] + runs[-1][1]
    held = registers(len(sums) * width, "int32")
    for r, row_sums in enumerate(sums):
        for at in range(0, width, lanes):
            value = row_sums.vload([at], f"int32x{lanes}")
            I.buffer_store(held, value, [T.ramp(r * width + at, 1, lanes)])
    return held


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
    *,
    unroll: int = 1,
    span: int = 0,
    each_turn: Callable[[Expr, int], None] | None = None,
) -> list[Buffer]:
    """Builds bias + x @ w for one tile: a buffer of columns for each row, all in registers.

    Args:
        unroll: chunks of k in the inner loop.
        span: whole chunks of k, shorter than the product's own span where it has one.
        each_turn: builds what else is to be done now and then; it gets which time it is, of how
            many.
    """
    if product.span:
        span = span or product.span
        return _sums_by_span(x, w, bias, row, panel, column, k, product, tile, span)
    rows, vectors, lanes = product.operands(tile), tile.vectors, product.lanes
    dtype = f"{product.acc_dtype}x{lanes}"
    partial = lanes // product.columns  # accumulators that make a vector of sums at the end
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
        start = zero if partial > 1 else I.bind(bias.vload([column + v * lanes], dtype))
        for r in range(rows):
            store(acc, start, r, v)
    per_chunk = product.chunk // product.group
    chunks, left = divmod(k // product.group, per_chunk)
    together = min(unroll, max(chunks, 1))
    if chunks:
        steps = chunks // together
        if each_turn is None:
            with I.serial(steps) as step:
                for i in range(together):
                    multiply((step * together + i) * per_chunk, per_chunk)
        else:
            turn_steps = max(n for n in range(1, _TURN_STEPS + 1) if steps % n == 0)
            with I.serial(steps // turn_steps) as turn:
                each_turn(turn, steps // turn_steps)
                with I.serial(turn_steps) as step:
                    for i in range(together):
                        chunk = (turn * turn_steps + step) * together + i
                        multiply(chunk * per_chunk, per_chunk)
    for chunk in range(chunks // together * together, chunks):
        multiply(chunk * per_chunk, per_chunk)
    for g in range(left):
        multiply(chunks * per_chunk + g, 1)
    if partial == 1:
        return acc
    sums = [registers(vectors * product.columns, product.acc_dtype) for _ in range(tile.rows)]
    for r in range(rows):
        for v in range(0, vectors, partial):
            totals = product.sums([load(r, v + i) for i in range(partial)])
            addend = bias.vload([column + v * product.columns], dtype)
            for i, total in enumerate(totals):
                store(sums, total + addend, r * product.rows + i, v // partial)
    return sums


def _sums_by_span(
    x: Buffer,
    w: Buffer,
    bias: Buffer,
    row: Expr,
    panel: Expr,
    column: Expr,
    k: int,
    product: Product,
    tile: Tile,
    span: int,
) -> list[Buffer]:
    """As `tile_sums`, of sums over `span` k each.

    Those are in registers, the totals on the stack. The loop over k is one over spans, which are
    whole chunks, and in it one over their chunks.
    """
    rows, vectors, wide = tile.rows, tile.vectors, product.columns
    places = [(r, v, T.ramp(v * wide, 1, wide)) for r in range(rows) for v in range(vectors)]
    sums = [registers(vectors * wide, product.acc_dtype) for _ in range(rows)]
    part = [registers(vectors * wide, product.x_dtype) for _ in range(rows)]

    def multiply(k: Expr, steps: int) -> None:
        loaded = [product.load_x(x, row + r, k, steps) for r in range(rows)]
        for step in range(steps):
            weights = [product.load_w(w, panel, k + step, v) for v in range(vectors)]
            for r, v, at in places:
                value = product.multiply(part[r][at], loaded[r][step], weights[v])
                I.buffer_store(part[r], value, [at])

    def add_up(build_products: Callable[[], None]) -> None:
        for r, _, at in places:
            I.buffer_store(part[r], T.broadcast(tirx.const(0, product.x_dtype), wide), [at])
        build_products()
        for r, _, at in places:
            total = tirx.Cast(f"{product.acc_dtype}x{wide}", part[r][at])
            I.buffer_store(sums[r], sums[r][at] + total, [at])

    def whole(first: Expr, length: int) -> None:
        with I.serial(length // product.chunk) as chunk:
            multiply(first + chunk * product.chunk, product.chunk)

    for v in range(vectors):
        start = I.bind(bias.vload([column + v * wide], f"{product.acc_dtype}x{wide}"))
        for r in range(rows):
            I.buffer_store(sums[r], start, [T.ramp(v * wide, 1, wide)])
    spans, rest = divmod(k, span)
    if spans:
        with I.serial(spans) as i:
            add_up(lambda: whole(i * span, span))

    def remainder() -> None:
        chunks = rest // product.chunk * product.chunk
        if chunks:
            whole(spans * span, chunks)
        for step in range(chunks, rest):
            multiply(spans * span + step, 1)

    if rest:
        add_up(remainder)
    return sums


def prefetch_line(buffer: Buffer, at: list[Expr]) -> None:
    """Asks for a line that is soon read, into the second-level cache.

    It may lie behind the buffer: asking for what is not there does nothing.
    """
    read, second_level, data = T.int32(0), T.int32(2), T.int32(1)
    address = T.address_of(buffer[tuple(at)])
    I.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, read, second_level, data))


def registers(size: int, dtype: str) -> Buffer:
    """A small array that LLVM keeps in vector registers.

    It has to be one of scope "global" and less than `_LOCAL_BYTES`: TVM asks the runtime for the
    memory of any other on every call.
    """
    assert 4 * size < _LOCAL_BYTES
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
                at = clamped(i * vector, k - vector, k % vector != 0) + lane
                I.buffer_store(y, tirx.Cast(target, x[row, at]), [row, at])
            for at in range(k, k_groups):
                I.buffer_store(y, tirx.const(0, target), [row, at])
    return builder.get()


def _pair_rows(m: int, k: int, k_groups: int) -> Any:
    """x (m, k) as pairs of rows, eight k of one beside eight k of the other, zeros after k.

    Of an odd number of rows, the last pair overlaps the one before it.
    """
    pairs = ceil(m / 2)
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("pair_rows")
        I.func_attr({"tirx.noalias": True})
        x = I.arg("x", I.buffer((m, k), "int8"))
        y = I.arg("y", I.buffer((pairs, 2 * k_groups), "int8"))
        with I.parallel(pairs) as pair:
            first = I.bind(clamped(2 * pair, m - 2, m % 2 != 0))
            for r in range(2):
                with I.serial(k // 8) as eight, I.vectorized(8) as i:
                    I.buffer_store(y, x[first + r, eight * 8 + i], [pair, eight * 16 + r * 8 + i])
                for i in range(k // 8 * 8, k_groups):
                    value = x[first + r, i] if i < k else tirx.const(0, "int8")
                    I.buffer_store(y, value, [pair, i // 8 * 16 + r * 8 + i % 8])
    return builder.get()


def _x_shape(kernel: Dense, product: Product, k: int) -> tuple[int, int]:
    """How a kernel reads x: rows of k, or operands of several rows each."""
    return ceil(kernel.m / product.rows), product.rows * k


def _row(operand: Expr, r: int, m: int, product: Product) -> Expr:
    """The row of x that is number r from an operand's first one on."""
    first = (operand + r // product.rows) * product.rows
    return clamped(first, m - product.rows, m % product.rows != 0) + r % product.rows


def _whole(count: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `count`."""
    return ceil(count / unit) * unit


def packing(
    kernel: Dense, product: Product, tile: Tile, storage: ActStorage, block: int = 0
) -> Mapping[str, Callable[[Mapping[str, Array]], Array]]:
    """How the raw constants become those of a kernel with this tile.

    Args:
        block: columns of a block of weights, (blocks, k / group, elements). If 0, a block is a
            tile, and its vectors an axis of their own.
    """
    columns = block or tile.vectors * product.columns
    group_columns = kernel.n // kernel.out_groups
    group_panels = ceil(group_columns / columns)
    panels = kernel.out_groups * group_panels
    pad_columns = max(0, columns - group_columns)

    def pack_w(raw: Mapping[str, Array]) -> Array:
        w = np.pad(raw["w"], ((0, -kernel.k % product.depth), (0, pad_columns)))
        # The columns of each panel, the last one of a group overlapping.
        last = max(0, group_columns - columns)
        within = np.minimum(np.arange(group_panels) * columns, last)
        first = np.arange(kernel.out_groups)[:, None] * group_columns + within
        w = w[:, first.reshape(-1, 1) + np.arange(columns)]  # (k, panels, columns)
        wide, deep = product.cell
        w = w.reshape(-1, product.depth // deep, deep, panels, columns // wide, wide)
        elements = product.columns * product.depth
        vectors = [columns * product.depth] if block else [columns // product.columns, elements]
        shape = (panels, w.shape[0], *vectors)
        return np.ascontiguousarray(w.transpose(3, 0, 4, 1, 5, 2)).reshape(shape)

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


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """How the tiles of a kernel are cut into tasks: a column of tiles each, of a part of the rows.

    Attributes:
        steps: tiles of a column.
        columns: columns of tiles.
        parts: of the rows, equal or a step apart.
        by_rows: whether a thread gets neighbouring rows rather than neighbouring columns.
    """

    steps: int
    columns: int
    parts: int
    by_rows: bool

    @property
    def count(self) -> int:
        return self.parts * self.columns

    def at(self, task: Expr) -> tuple[Expr, Expr, Expr]:
        """A task's column, its first step, and how many steps it has."""
        if self.by_rows:
            part, column = task // self.columns, task % self.columns
        else:
            part, column = task % self.parts, task // self.parts
        first, end = (self._boundary(column, part + i) for i in range(2))
        return column, first, end - first

    def _boundary(self, column: Expr, part: Expr) -> Expr:
        """The first step of a part: rounded down in every other column, else up."""
        if self.steps % self.parts == 0:
            return part * (self.steps // self.parts)
        return (part * self.steps + column % 2 * (self.parts - 1)) // self.parts

    @property
    def passes(self) -> int:
        """How often a thread at least passes over a column's weights before the next column's."""
        return self.steps // self.parts if self.by_rows else self.steps

    def pass_of(self, first: Expr, i: Expr) -> Expr:
        """Which pass the step `i` of a task that begins at step `first` is."""
        return i if self.by_rows else first + i


def cut(kernel: Dense, product: Product, steps: int, columns: int) -> Tasks:
    """The tasks of a kernel with so many columns of so many tiles.

    Where a thread gets rows, it reads all weights, and activations that it wrote itself; where it
    gets columns, its share of the weights, and activations of all threads. ARM's cores share a
    cache.
    """
    weights, activations = kernel.n * kernel.k, kernel.m * (kernel.n + kernel.k)
    by_rows = (
        product.block == X86_BLOCK
        and weights <= _WEIGHTS_PER_ACTIVATION * activations
        and weights * np.dtype(product.w_dtype).itemsize <= _WEIGHT_BYTES
    )
    # A thread reads all the weights for each of its parts: so as few as can be, an even number.
    parts = min(steps, 2 * ceil(_TASKS / (2 * columns))) if by_rows else row_blocks(steps, columns)
    return Tasks(steps=steps, columns=columns, parts=parts, by_rows=by_rows)


def row_blocks(inner: int, outer: int) -> int:
    """Into how many equal blocks to split an inner loop, so that there are tasks enough."""
    divisors = [d for d in range(1, inner + 1) if inner % d == 0]
    return next((d for d in divisors if d * outer >= _TASKS), inner)


def clamped(value: Expr, highest: int, needed: bool) -> Expr:
    """min(value, highest), at least 0; just the value where it never gets there."""
    return tirx.min(value, max(0, highest)) if needed else value


def epilogue_width(columns: int, lanes: int, out: str) -> int:
    """Columns of one vector of the epilogue: wider than a register where bytes are to be stored."""
    if out == "int8":
        wide = next((w for w in (16, 8) if columns % w == 0), 0)
        return max(wide, min(lanes, _power_of_two(columns)))
    return min(lanes, _power_of_two(columns))


def epilogue_vectors(columns: int, lanes: int, out: str) -> Iterator[tuple[int, int]]:
    """Where the vectors of an epilogue start, and how wide they are; the last ones may overlap."""
    at = 0
    while at < columns:
        width = lanes if out == "float32" else min(columns - at, 16 if out == "int8" else 2 * lanes)
        width = min(max(_power_of_two(width), lanes), _power_of_two(columns))
        at = min(at, columns - width)
        yield at, width
        at += width


def _power_of_two(limit: int) -> int:
    """The largest power of two that is at most `limit`."""
    return 1 << (limit.bit_length() - 1)
