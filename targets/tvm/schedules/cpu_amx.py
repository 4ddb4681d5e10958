"""Dense int8 kernels on x86 CPUs with AMX: products of whole tiles, 16 rows by 64 bytes each.

    for each part of the rows                           (parallel, with pairs of blocks)
      for each pair of blocks of columns
        for each block of rows of the part              (two tiles of them)
          four accumulator tiles = 0
          for k: accumulators += x * w                  (tdpbusd)
          y = epilogue(accumulators + bias)             (AVX-512, from memory: tiles have no lanes)

A model's weights do not fit the caches that are near: with 68 rows, reading them takes as long as
multiplying them. So the next columns' weights are asked for meanwhile, line by line, in whichever
of the two loops takes longer; asked for in bursts, they would keep the loads of x and w waiting.

Weights lie as for VNNI, whose groups of four k are the rows of a tile of w. A tile's rows and
columns are set in steps of one row and four bytes, so nothing has to be padded: blocks of rows and
columns overlap at the end as those of `cpu_dense` do.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Array, Dense, Scheduled, Step
from gfcompile.targets.tvm.schedules.cpu_dense import (
    Columns,
    clamped,
    cut,
    declare,
    finish,
    operand_names,
    packing,
    prefetch_line,
    registers,
)
from gfcompile.targets.tvm.schedules.cpu_dot import Tile, product_of
from gfcompile.targets.tvm.schedules.math import Expr

# One less than there are: a tile of sums, as the epilogue reads it, has to stay below 1 KB. A
# product takes a cycle a row, so nothing is lost.
TILE_ROWS = 15
TILE_BYTES = 64  # of a row
# Tasks to split a kernel into. Setting the tiles up takes as long as a dozen products of them.
SLICES = 16
# With fewer rows, a tile does so little for its loads that VNNI is as fast.
LEAST_ROWS = 8
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
    paired = min(_PAIR, kernel.n // kernel.out_groups // product.block)
    tile = Tile(rows=block_rows, vectors=paired)
    columns = Columns(kernel=kernel, product=product, tile=tile)
    lanes = product.lanes
    tasks = cut(kernel, product, row_steps, columns.tiles)
    slices = min(SLICES, tasks.count)
    chunks = k // depth
    in_epilogue = chunks < tile_rows
    turns = row_tiles * tile_rows if in_epilogue else chunks
    lines = ceil(k * columns.block / (TILE_BYTES * tasks.passes * turns))

    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("dense")
        I.func_attr({"tirx.noalias": True})
        operands = declare(columns, (kernel.m, k), storage)
        x, w, bias, y = operands.x, operands.w, operands.bias, operands.y
        config = I.arg("config", I.buffer((TILE_BYTES,), "uint8"))

        def load_x(t: int, row: Expr, at: Expr) -> None:
            load_tile(_X_TILE + t, x, [row + t * offset, at], k)

        def prefetch(panel: Expr, turn: Expr) -> None:
            for v in range(paired):
                for line in range(lines):
                    prefetch_line(w, [panel + paired + v, turn * lines + line, 0])

        with I.parallel(slices) as part:
            # A tile is stored where the epilogue reads it.
            sums = [
                [registers(tile_rows * lanes, "int32") for _ in range(paired)]
                for _ in range(row_tiles)
            ]
            instruct("ldtilecfg", T.address_of(config[0]))
            with I.serial(part * tasks.count // slices, (part + 1) * tasks.count // slices) as task:
                column_tile, start, steps = tasks.at(task)
                group = column_tile // columns.group_tiles
                first = I.bind(columns.first(column_tile))
                column = [I.bind(columns.column(group, first + v)) for v in range(paired)]
                panel = I.bind(group * columns.group_blocks + first)
                with I.serial(steps) as i:
                    step = (start + i) * block_rows
                    row = I.bind(clamped(step, m - block_rows, m % block_rows != 0))
                    done = I.bind(tasks.pass_of(start, i) * turns)
                    for t in range(row_tiles):
                        for v in range(paired):
                            instruct("tilezero", T.int8(_accumulator(t, v)))
                    with I.serial(chunks) as chunk:
                        if not in_epilogue:
                            prefetch(panel, done + chunk)
                        for t in range(row_tiles):
                            load_x(t, row, chunk * depth)
                        for v in range(paired):
                            at = [panel + v, chunk * (depth // 4), 0]
                            load_tile(_W_TILE + v, w, at, TILE_BYTES)
                            for t in range(row_tiles):
                                tiles = _accumulator(t, v), _X_TILE + t, _W_TILE + v
                                instruct("tdpbusd", *map(T.int8, tiles))
                    for t in range(row_tiles):
                        for v in range(paired):
                            at = T.address_of(sums[t][v][0])
                            number = T.int8(_accumulator(t, v))
                            instruct("tilestored64", number, at, T.int64(TILE_BYTES))
                    for t in range(row_tiles):
                        with I.serial(tile_rows) as r:
                            if in_epilogue:
                                prefetch(panel, done + t * tile_rows + r)
                            for v in range(paired):
                                with I.vectorized(lanes) as lane:
                                    place = (row + t * offset + r, column[v] + lane)
                                    acc = sums[t][v][r * lanes + lane] + bias[place[1]]
                                    value = finish(kernel, operands, acc, *place, group)
                                    I.buffer_store(y, value, list(place))
            instruct("tilerelease")
    args = ("x", *operand_names(kernel), "config")
    of_sums, of_x, of_w = (tile_rows, TILE_BYTES), (tile_rows, depth), (depth // 4, TILE_BYTES)
    return Scheduled(
        steps=(Step(func=builder.get(), args=args),),
        pack=packing(kernel, product, tile, storage, block=columns.block),
        consts={"config": tile_config([of_sums] * _X_TILE + [of_x] * _PAIR + [of_w] * _PAIR)},
    )


def _depth(k: int) -> int:
    """The k of a tile: the most that divides k, in groups of four."""
    return max(depth for depth in range(4, TILE_BYTES + 1, 4) if k % depth == 0)


def _accumulator(row_tile: int, vector: int) -> int:
    return row_tile * _PAIR + vector


def load_tile(tile: int, buffer: Any, at: list[Expr], stride: int) -> None:
    instruct("tileloadd64", T.int8(tile), T.address_of(buffer[tuple(at)]), T.int64(stride))


def instruct(instruction: str, *args: Expr) -> None:
    I.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{instruction}", *args))


def tile_config(tiles: Sequence[tuple[int, int]]) -> Array:
    """The operand of ldtilecfg (Intel SDM, volume 1, 18.3) for tiles of so many rows and bytes."""
    config = np.zeros(TILE_BYTES, np.uint8)
    config[0] = 1  # palette
    row_bytes, rows = config[16:32].view(np.uint16), config[48:56]
    rows[:], row_bytes[:] = zip(*tiles, strict=True)
    return config
