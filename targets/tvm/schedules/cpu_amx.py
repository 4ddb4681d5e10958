"""Dense int8 kernels on x86 CPUs with AMX: products of whole tiles, 16 rows by 64 bytes each.

The loops are those of `amx_pipeline`: blocks of two tiles of rows by two vectors of columns, whose
four products take two loads of x and two of w.

Weights lie as for VNNI, whose groups of four k are the rows of a tile of w. A tile's rows and
columns are set in steps of one row and four bytes, so nothing has to be padded: blocks of rows and
columns overlap at the end as those of `cpu_dense` do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Dense, Scheduled, Step
from gfcompile.targets.tvm.schedules import amx_gelu
from gfcompile.targets.tvm.schedules.amx_pipeline import (
    LEAST_ROWS,
    TILE_BYTES,
    TILE_ROWS,
    Block,
    Pipeline,
    instruct,
    load_tile,
    tile_config,
)
from gfcompile.targets.tvm.schedules.cpu_dense import (
    Columns,
    cut,
    declare,
    finish,
    operand_names,
    packing,
    quant_of,
)
from gfcompile.targets.tvm.schedules.cpu_dot import Buffer, Tile, product_of
from gfcompile.targets.tvm.schedules.math import Expr

# Accumulators are tiles 0 to 3, (row tile, vector); then those of x, then those of w.
_X_TILE, _W_TILE = 4, 6
_PAIR = 2  # of row tiles and of vectors: 2 x 2 accumulators for 2 + 2 loads


def takes(kernel: Dense) -> bool:
    """Whether AMX is worth while: VNNI does the rest."""
    group_columns = kernel.n // kernel.out_groups
    whole = kernel.k % 4 == 0 and group_columns >= 16
    return kernel.x == "int8" and kernel.m >= LEAST_ROWS and whole


def schedule_dense(kernel: Dense, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """The int8 dense kernel for `cpu`, which has AMX."""
    product = product_of(kernel, cpu)
    m, k = kernel.m, kernel.k
    depth = _depth(k)
    row_tiles = min(_PAIR, ceil(m / TILE_ROWS))
    row_steps = ceil(m / (row_tiles * TILE_ROWS))
    tile_rows = ceil(m / (row_tiles * row_steps))
    block_rows = min(row_tiles * tile_rows, m)
    offset = block_rows - tile_rows  # of the second tile, which overlaps the first if it must
    group_columns = kernel.n // kernel.out_groups
    paired = min(_PAIR, group_columns // product.block)
    tile = Tile(rows=block_rows, vectors=paired)
    columns = Columns(kernel=kernel, product=product, tile=tile)
    row_overlap = m % block_rows
    lanes = product.lanes
    tiles = [(t, v) for v in range(paired) for t in range(row_tiles)]
    pipeline = Pipeline(
        columns=columns,
        tasks=cut(kernel, product, row_steps, columns.tiles),
        rows=m,
        block_rows=block_rows,
        tile_rows=tile_rows,
        vectors=paired,
        accumulators=len(tiles),
        finishes=row_tiles,
        chunks=k // depth,
        products=len(tiles),
        w_lines=ceil(k * columns.block / TILE_BYTES),
    )
    of_sums, of_x, of_w = (tile_rows, TILE_BYTES), (tile_rows, depth), (depth // 4, TILE_BYTES)
    consts = {"config": tile_config([of_sums] * _X_TILE + [of_x] * _PAIR + [of_w] * _PAIR)}
    by_table = kernel.gelu and kernel.out == "int8" and not kernel.residual_rows
    if by_table:
        consts["gelu"] = amx_gelu.table()
    # Lines of y then come from where the thread wrote them last, not from another core.
    in_place = (
        kernel.residual_rows == m
        and kernel.residual_dtype == kernel.out == "float32"
        and group_columns % (paired * lanes) == 0
    )

    @contextmanager
    def once(conditions: Sequence[Expr]) -> Iterator[None]:
        """What is added to in its place is so only once; other rows may be written again."""
        if in_place and conditions:
            with I.If(tirx.all(*conditions)), I.Then():
                yield
        else:
            yield

    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("dense")
        I.func_attr({"tirx.noalias": True})
        operands = declare(columns, (kernel.m, k), storage)
        x, w, bias, y = operands.x, operands.w, operands.bias, operands.y
        config = I.arg("config", I.buffer((TILE_BYTES,), "uint8"))
        if by_table:
            coefficients = I.arg("gelu", I.buffer(consts["gelu"].shape))

        def multiply(row: Expr, panel: Expr, chunk: Expr) -> Iterator[None]:
            for number, (t, v) in enumerate(tiles):
                if t == 0:
                    load_tile(_W_TILE + v, w, [panel + v, chunk * (depth // 4), 0], TILE_BYTES)
                if v == 0:
                    load_tile(_X_TILE + t, x, [row + t * offset, chunk * depth], k)
                instruct("tdpbusd", *map(T.int8, (number, _X_TILE + t, _W_TILE + v)))
                yield

        def finish_gelu(acc: Expr, row: Expr, column: Expr, group: Expr) -> None:
            total = tirx.Cast(f"float32x{lanes}", acc + bias.vload([column], f"int32x{lanes}"))
            value = total * operands.scale.vload([column], f"float32x{lanes}")
            quant = quant_of(kernel, operands, group)
            quantized = amx_gelu.quantized_gelu(value, coefficients, quant, storage)
            I.buffer_store(y, quantized, [row, T.ramp(column, 1, lanes)])

        def finish_vector(acc: Buffer, at: Expr, row: Expr, column: Expr, group: Expr) -> None:
            with I.vectorized(lanes) as lane:
                place = (row, column + lane)
                value = finish(kernel, operands, acc[at + lane] + bias[place[1]], *place, group)
                I.buffer_store(y, value, list(place))

        def finish_row(block: Block, sums: Sequence[Buffer], r: Expr) -> Iterator[None]:
            for t in range(row_tiles):
                row = block.row + t * offset + r
                conditions = []
                if row_overlap:
                    conditions.append(row >= block.start)
                if t > 0 and offset < tile_rows:
                    conditions.append(offset + r >= tile_rows)
                with once(conditions):
                    for acc, (of, v) in zip(sums, tiles, strict=True):
                        if of == t and by_table:
                            vector = acc.vload([r * lanes], f"int32x{lanes}")
                            finish_gelu(vector, row, block.columns[v], block.group)
                        elif of == t:
                            finish_vector(acc, r * lanes, row, block.columns[v], block.group)
                yield

        pipeline.emit(w, config, multiply, finish_row)

    return Scheduled(
        steps=(Step(func=builder.get(), args=("x", *operand_names(kernel), *consts)),),
        pack=packing(kernel, product, tile, storage, block=columns.block),
        consts=consts,
        in_place={"y": "residual"} if in_place else {},
    )


def _depth(k: int) -> int:
    """The k of a tile: the most that divides k, in groups of four."""
    return max(depth for depth in range(4, TILE_BYTES + 1, 4) if k % depth == 0)
