"""Dense float32 kernels on x86 CPUs with AMX: products of integers of 24 bits, in digits of eight.

A float32 product takes AVX-512 32 times as long as an int8 one takes AMX. Of a row of x, and of a
column of w, all numbers are integers times a step, that of the largest one being 24 bits wide, and
an integer is three signed digits to the base 256 (Ozaki et al., 2012; Ootomo et al., 2024):

    x = step_x (d0 2^16 + d1 2^8 + d2),   w = step_w (e0 2^16 + e1 2^8 + e2)

Digits multiply exactly, and products of one order i + j of digits d_i e_j have a sum in common:

    x w = 2^32 step_x step_w (s0 + 2^-8 (s1 + 2^-8 (s2 + 2^-8 s3))) + error

What is left out is d2 e2, next to nothing. With |d| <= 128, and half a step for each rounding,
for each k

    |error| < 1.01 * 2^-24 (|x| max|w| + |w| max|x|) + 2^-32 max|x| max|w|

besides what rounding the steps makes, 2^-22 of the sum at most. A loop in float32 rounds the sum
of all k before each. As roundings are independent of one another, errors grow with the root of the
number of k, those of the loop with the number: for 192 and 384 k of a pruning model's predictors
they are 0.6 to 0.9 and 0.5 times as large. Without order 3, six products, they would be 1.4 to 2.2
and 1.0 times as large.

    each row of x into its digits                       (parallel)
    the loops of `amx_pipeline`, of blocks of one tile: four accumulators, by order

Random digits keep the tiles' multipliers as busy as can be: the core's clock falls by a fifth
until some 50 us after them.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Array, Dense, Scheduled, Step
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
    registers,
)
from gfcompile.targets.tvm.schedules.cpu_dot import Buffer, Tile, product_of
from gfcompile.targets.tvm.schedules.cpu_tiling import fold_lanes
from gfcompile.targets.tvm.schedules.math import Expr, float32

_DIGITS = 3
# The largest integer whose digits are at most 127 each, less what rounding to float32 may add.
_LIMIT = 0x7F7F00
_HALVES = 0x808080  # half of the base for each digit: makes them unsigned, carries included
_LEAST = 1e-30  # of what a row's or a column's largest number is taken for: 0 has no inverse
_ORDERS = 4
# Accumulators are tiles 0 to 3, by order; then that of a digit of x, then those of w's three.
_X_TILE, _W_TILE = _ORDERS, _ORDERS + 1
# For each digit of x those of w that it is multiplied by. Products of one order are apart: one
# waits for the one before it in its accumulator three times as long as it takes.
_PARTNERS = ((0, 1, 2), (2, 0, 1), (1, 0))
PRODUCTS = sum(map(len, _PARTNERS))
# Order 2 has three products, of 2^14 at most, for each k.
_MOST_K = 2**31 // (3 << 14)


def takes(kernel: Dense) -> bool:
    """Whether it may be computed so, and AMX is worth while: AVX-512 does the rest."""
    group_columns = kernel.n // kernel.out_groups
    whole = kernel.k % TILE_BYTES == 0 and kernel.k < _MOST_K and group_columns >= 16
    return kernel.fixed_point and kernel.x == "float32" and kernel.m >= LEAST_ROWS and whole


def schedule_dense(kernel: Dense, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """The float32 dense kernel for `cpu`, which has AMX."""
    # To the tiles it is a product of int8, with three times the rows and columns.
    digits = dataclasses.replace(kernel, x="int8", k=_DIGITS * kernel.k)
    product = product_of(digits, cpu)
    m, k = kernel.m, kernel.k
    steps = ceil(m / TILE_ROWS)
    tile_rows = ceil(m / steps)
    tile = Tile(rows=tile_rows, vectors=1)
    columns = Columns(kernel=digits, product=product, tile=tile)
    lanes = product.lanes
    w_rows = k // 4  # of a digit
    pipeline = Pipeline(
        columns=columns,
        tasks=cut(digits, product, steps, columns.tiles),
        rows=m,
        block_rows=tile_rows,
        tile_rows=tile_rows,
        vectors=1,
        accumulators=_ORDERS,
        finishes=1,
        chunks=k // TILE_BYTES,
        products=PRODUCTS,
        w_lines=_DIGITS * w_rows,
    )

    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("dense")
        I.func_attr({"tirx.noalias": True})
        operands = declare(columns, (_DIGITS * m, k), storage, bias_dtype="float32")
        x, w, y = operands.x, operands.w, operands.y
        x_step = I.arg("x_step", I.buffer((m,)))
        config = I.arg("config", I.buffer((TILE_BYTES,), "uint8"))
        plain = dataclasses.replace(operands, scale=None)

        def multiply(row: Expr, panel: Expr, chunk: Expr) -> Iterator[None]:
            for d, partners in enumerate(_PARTNERS):
                load_tile(_X_TILE, x, [d * m + row, chunk * TILE_BYTES], k)
                for e in partners:
                    if d == 0:  # of w all digits stay in their tiles
                        at = [panel, e * w_rows + chunk * (TILE_BYTES // 4), 0]
                        load_tile(_W_TILE + e, w, at, TILE_BYTES)
                    instruct("tdpbssd", *map(T.int8, (d + e, _X_TILE, _W_TILE + e)))
                    yield

        def finish_row(block: Block, sums: Sequence[Buffer], r: Expr) -> Iterator[None]:
            with I.vectorized(lanes) as lane:
                place = (block.row + r, block.columns[0] + lane)
                total = _total([stored[r * lanes + lane] for stored in sums])
                value = total * x_step[place[0]] * operands.scale[place[1]]
                value = value + operands.bias[place[1]]
                I.buffer_store(y, finish(kernel, plain, value, *place, block.group), list(place))
            yield

        pipeline.emit(w, config, multiply, finish_row)
    of_rows, of_w = (tile_rows, TILE_BYTES), (TILE_BYTES // 4, TILE_BYTES)
    args = ("digits", *operand_names(digits), "x_step", "config")
    pack_digits = packing(digits, product, tile, storage, block=columns.block)["w"]
    return Scheduled(
        steps=(
            Step(func=_split_rows(m, k), args=("x", "digits", "x_step")),
            Step(func=builder.get(), args=args),
        ),
        pack={
            "w": lambda raw: pack_digits({"w": _split_columns(raw["w"])}),
            "scale": lambda raw: _column_step(raw["w"]) * np.float32(1 << 16),
        },
        temps={"digits": ("uint8", (_DIGITS * m, k)), "x_step": ("float32", (m,))},
        consts={"config": tile_config([of_rows] * (_ORDERS + 1) + [of_w] * _DIGITS)},
    )


def _total(sums: list[Expr]) -> Expr:
    """The sums of all orders, as a float32 in units of order 0."""
    total = tirx.Cast("float32", sums[-1])
    for part in reversed(sums[:-1]):
        total = total * float32(2.0**-8) + tirx.Cast("float32", part)
    return total


def _split_rows(m: int, k: int) -> Any:
    """x (m, k) as digits (digit, m, k) and the step of each row, times 2^16.

    Of 64 neighbouring k, four that are 16 apart become one word of a tile.
    """
    lanes = 16
    vectors = TILE_BYTES // lanes
    chunks = k // TILE_BYTES
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("split_rows")
        I.func_attr({"tirx.noalias": True})
        x = I.arg("x", I.buffer((m, k)))
        digits = I.arg("digits", I.buffer((_DIGITS * m, k), "uint8"))
        x_step = I.arg("x_step", I.buffer((m,)))
        with I.parallel(m) as row:
            largest = registers(TILE_BYTES, "float32")
            for v in range(vectors):
                at = T.ramp(v * lanes, 1, lanes)
                I.buffer_store(largest, T.broadcast(float32(0), lanes), [at])
            with I.serial(chunks) as chunk:
                for v in range(vectors):
                    at = T.ramp(v * lanes, 1, lanes)
                    loaded = x.vload([row, chunk * TILE_BYTES + v * lanes], f"float32x{lanes}")
                    known = largest.vload([v * lanes], f"float32x{lanes}")
                    I.buffer_store(largest, tirx.max(known, tirx.abs(loaded)), [at])
            most = I.bind(_largest(largest, vectors, lanes))
            inverse = I.bind(float32(_LIMIT) / most)
            I.buffer_store(x_step, most * float32(65536 / _LIMIT), [row])
            with I.serial(chunks) as chunk:
                integers = [
                    I.bind(_integers(x, [row, chunk * TILE_BYTES + v * lanes], inverse, lanes))
                    for v in range(vectors)
                ]
                for digit in range(_DIGITS):
                    words = _digit(integers, 8 * (_DIGITS - 1 - digit), lanes)
                    stored = T.reinterpret(words, dtype=f"uint8x{TILE_BYTES}")
                    at = T.ramp(chunk * TILE_BYTES, 1, TILE_BYTES)
                    I.buffer_store(digits, stored, [digit * m + row, at])
    return builder.get()


def _largest(largest: Buffer, vectors: int, lanes: int) -> Expr:
    """The largest of some vectors, but never 0."""
    dtype = f"float32x{lanes}"
    of_vectors = functools.reduce(
        tirx.max, (largest.vload([v * lanes], dtype) for v in range(vectors))
    )
    return tirx.max(fold_lanes(of_vectors, lanes, tirx.max), float32(_LEAST))


def _integers(x: Buffer, at: list[Expr], inverse: Expr, lanes: int) -> Expr:
    """A vector of x in steps, to the nearest, as unsigned digits that are each too large by half.

    The conversion rounds as the CPU always does: to the nearest, ties to even.
    """
    steps = x.vload(at, f"float32x{lanes}") * T.broadcast(inverse, lanes)
    every_lane, as_always = tirx.const((1 << lanes) - 1, "uint16"), T.int32(4)
    rounded = T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.x86.avx512.mask.cvtps2dq.512"),
        steps,
        T.broadcast(T.int32(0), lanes),
        every_lane,
        as_always,
        dtype=f"int32x{lanes}",
    )
    return rounded + T.broadcast(T.int32(_HALVES), lanes)


def _digit(integers: list[Expr], shift: int, lanes: int) -> Expr:
    """The digit at bit `shift` of each of four vectors, four to a word, signed."""

    def splat(value: int) -> Expr:
        return T.broadcast(tirx.const(value, "int32"), lanes)

    words = splat(np.uint32(0x80808080).astype(np.int32).item())
    for byte, vector in enumerate(integers):
        by = 8 * byte - shift
        moved = vector << splat(by) if by > 0 else vector >> splat(-by) if by < 0 else vector
        mask = np.uint32(0xFF << 8 * byte).astype(np.int32).item()
        words = words ^ (moved & splat(mask))
    return words


def _column_step(w: Array) -> Array:
    """The step of each column of w, (n,) float32."""
    largest = np.maximum(np.abs(w).max(axis=0), np.float32(_LEAST))
    return np.asarray(largest / np.float32(_LIMIT), np.float32)


def _split_columns(w: Array) -> Array:
    """w (k, n) as signed digits (digit * k, n), of 64 neighbouring k as those of x are ordered."""
    k, n = w.shape
    unsigned = np.rint(w / _column_step(w).astype(np.float64)).astype(np.int64) + _HALVES
    shifts = 8 * np.arange(_DIGITS)[::-1]
    digits = ((unsigned >> shifts[:, None, None]) & 0xFF) - 0x80  # (digit, k, n)
    ordered = digits.reshape(_DIGITS, -1, 4, TILE_BYTES // 4, n).swapaxes(2, 3)
    return ordered.reshape(_DIGITS * k, n).astype(np.int8)
