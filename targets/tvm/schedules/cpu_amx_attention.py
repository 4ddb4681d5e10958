"""int8 attention on x86 CPUs with AMX: both products by tiles, among the vectors of the softmax.

    lay k and v out, the bias of s                        (as in cpu_attention)
    for each tile of 16 rows of each head                 (parallel)
      the maximum of each row of s
      for each row:
        products of tiles: y = p @ v of the tile of rows before, s = q @ k.T of the next one
        s = exp(s - maximum), and its sum
      y of the tile before, finished
      p = s as integers of 1/256

A core multiplies tiles while it computes vectors, if it meets them close together: hence three
tiles of rows are under way at a time, and each row of exponentials brings a few products along.
With the first tile and the last one there is less under way: so all that a thread does is one
sequence, however many workers' shares it has.

What the tiles can do costs no vector instruction. A bias, loaded as each row of the sums at first,
makes s a float32: one whose exponent leaves integers the low bits of its mantissa. What lies
beyond the last token is masked by its bias. One more column of v is its zero point, which makes
v_zero * sum(p).
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Attention, Scheduled, Step
from gfcompile.targets.tvm.schedules import avx512
from gfcompile.targets.tvm.schedules.amx_pipeline import (
    TILE_BYTES,
    instruct,
    launch,
    load_tile,
    own,
    share_of,
    tile_config,
    usual_serial,
)
from gfcompile.targets.tvm.schedules.cpu_attention import (
    MASKED,
    Plan,
    buffers_of,
    lay_out,
    segments_of,
)
from gfcompile.targets.tvm.schedules.cpu_dot import Buffer, activation_product_of
from gfcompile.targets.tvm.schedules.cpu_tiling import apart, fold_lanes
from gfcompile.targets.tvm.schedules.math import (
    EXP2_COEFFICIENTS,
    LOG2_E,
    ROUND_MAGIC_BITS,
    Expr,
    float32,
)

_ROWS = 16  # of a tile
_LANES = 16  # of a vector of 32 bits, which is a row of a tile of sums
_BLOCK = 4  # vectors of scores, which become one of p and a tile's row
# The tiles' numbers.
_Y, _P, _V, _S, _Q, _K = range(6)


def takes(kernel: Attention) -> bool:
    """Whether tiles suit the kernel: VNNI does the rest."""
    whole = kernel.tokens >= _ROWS and kernel.dim % _LANES == 0
    return kernel.x == "int8" and whole and kernel.dim <= TILE_BYTES


def schedule_attention(kernel: Attention, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """The int8 attention kernel for `cpu`, which has AMX; the bits are those that VNNI computes."""
    product = activation_product_of("int8", cpu)
    heads = kernel.batch * kernel.heads
    plan = _TilePlan(
        kernel=kernel,
        storage=storage,
        product=product,
        rows=_ROWS,
        scores=segments_of(kernel.tokens, product, 1),
        values=segments_of(kernel.dim, product, 1),
        workers=min(cpu.cores, heads * ceil(kernel.tokens / _ROWS)),
    )

    def scratch_of_workers(dtype: str, rows: int, columns: int) -> tuple[str, tuple[int, ...]]:
        return dtype, (plan.workers, apart(rows, columns, dtype), columns)

    temps = {
        "k": ("int8", (heads, plan.score_groups, plan.score_row)),
        "v": ("int8", (heads, plan.blocks * TILE_BYTES // product.group, plan.value_row)),
        "k_bias": ("int32", (heads, plan.score_columns)),
        "s": scratch_of_workers("float32", 2 * _ROWS, plan.score_columns),
        "p": scratch_of_workers("uint8", _ROWS, plan.p_row),
        "sums": scratch_of_workers("int32", _ROWS, plan.sums_row),
    }
    sums, q, k = (_ROWS, TILE_BYTES), (_ROWS, kernel.dim), (plan.score_groups, TILE_BYTES)
    config = tile_config([sums, sums, sums, sums, q, k, sums, sums])
    pack_args = ("x", "params", "k", "v", "k_bias")
    quant = ("quant",) if kernel.out == "int8" else ()
    args = (*pack_args, "s", "p", "sums", "config", *quant, "y")
    types = temps | {"config": (str(config.dtype), config.shape)}
    return Scheduled(
        steps=(
            Step(func=lay_out(plan, types, pack_args), args=pack_args),
            Step(func=_attention(plan, types, args), args=args),
        ),
        temps=temps,
        consts={"config": config},
    )


@dataclass(frozen=True, kw_only=True)
class _TilePlan(Plan):
    """How a kernel is cut into tiles."""

    @property
    def score_tiles(self) -> int:
        """Tiles of s in a tile of rows."""
        return self.score_columns // _LANES

    @property
    def blocks(self) -> int:
        """Tiles of p in a tile of rows."""
        return ceil(self.score_tiles / _BLOCK)

    @property
    def value_tiles(self) -> int:
        """Tiles of columns of p @ v, and one for the sums of p."""
        return self.kernel.dim // _LANES + 1

    @property
    def p_row(self) -> int:
        return self.blocks * TILE_BYTES

    @property
    def sums_row(self) -> int:
        return self.value_tiles * _LANES

    def value_group(self, group: Expr) -> Expr:
        # Four vectors become one of bytes quarter by quarter: first the first of each.
        within = group % _LANES
        return group - within + within % _BLOCK * _BLOCK + within // _BLOCK

    def finish_keys(self, buffers: Mapping[str, Buffer], task: Expr) -> None:
        tokens, group = self.kernel.tokens, self.product.group
        masked = tirx.const(int(np.float32(MASKED).view(np.int32)), "int32")
        k, bias = buffers["k"], buffers["k_bias"]
        with I.serial(self.score_tiles) as tile, I.vectorized(_LANES) as lane:
            at = tile * _LANES + lane
            # Integers of up to 2**22 fit: 64 products of 255 and 128 come to half of that.
            value = bias[task, at] + tirx.const(ROUND_MAGIC_BITS, "int32")
            I.buffer_store(bias, tirx.Select(at < tokens, value, masked), [task, at])
        beyond = (self.score_columns - tokens) * group
        if beyond:
            with I.serial(self.score_groups) as unit:
                zeros = T.broadcast(tirx.const(0, self.product.w_dtype), beyond)
                I.buffer_store(k, zeros, [task, unit, T.ramp(tokens * group, 1, beyond)])


def _attention(plan: _TilePlan, types: Any, names: Sequence[str]) -> Any:
    """All after the layout."""
    tiles = plan.kernel.batch * plan.kernel.heads * plan.row_tiles
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("attention")
        I.func_attr({"tirx.noalias": True})
        buffers = buffers_of(plan, types, names)
        with launch(plan.workers):
            worker, end = share_of(plan.workers)
            first = I.bind(worker * tiles // plan.workers)
            last = I.bind(end * tiles // plan.workers)
            thread_tiles = _RowTiles(
                plan=plan,
                buffers=buffers,
                worker=worker,
                accumulators=own(_BLOCK * _LANES, "float32"),
                peaks=own(_ROWS, "float32"),
                factors=own(_ROWS, "float32"),
                zero_points=own(TILE_BYTES, "int8"),
            )
            with I.If(first < last), I.Then():
                thread_tiles.begin()
                thread_tiles.load_queries(first)
                with I.serial(plan.score_tiles) as step:
                    thread_tiles.score(first, step)
                with usual_serial(first, last, usual=tiles) as index:
                    thread_tiles.maxima(index)
                    with I.If(index + 1 < last), I.Then():
                        thread_tiles.load_queries(index + 1)
                    thread_tiles.exponentials(index, first, last)
                    with I.If(index > first), I.Then():
                        thread_tiles.finish(index - 1)
                    thread_tiles.levels(index)
                with I.serial(plan.blocks * plan.value_tiles) as step:
                    thread_tiles.combine(last - 1, step)
                thread_tiles.finish(last - 1)
                instruct("tilerelease")
    return builder.get()


@dataclass(frozen=True, kw_only=True)
class _RowTiles:
    """What is built for the tiles of rows of a thread, by their `index` over all heads.

    Attributes:
        worker: whose scratch the thread has.
        accumulators: of a row, in registers.
        peaks: the maximum of each row.
        factors: what each row's exponentials are to be multiplied by.
        zero_points: that of v, as a row of a tile.
    """

    plan: _TilePlan
    buffers: Mapping[str, Buffer]
    worker: Expr
    accumulators: Buffer
    peaks: Buffer
    factors: Buffer
    zero_points: Buffer

    def begin(self) -> None:
        zero = tirx.Cast("int8", self.buffers["params"][3])
        at = T.ramp(0, 1, TILE_BYTES)
        I.buffer_store(self.zero_points, T.broadcast(zero, TILE_BYTES), [at])
        instruct("ldtilecfg", T.address_of(self.buffers["config"][0]))

    def load_queries(self, index: Expr) -> None:
        kernel = self.plan.kernel
        at = [self._row(index), self._column(index)]
        load_tile(_Q, self.buffers["x"], at, 3 * kernel.heads * kernel.dim)

    def score(self, index: Expr, step: Expr) -> None:
        """A tile of s = q @ k.T."""
        task, columns = self._task(index), self.plan.score_columns
        load_tile(_S, self.buffers["k_bias"], [task, step * _LANES], 0)
        load_tile(_K, self.buffers["k"], [task, 0, step * TILE_BYTES], self.plan.score_row)
        instruct("tdpbusd", *map(T.int8, (_S, _Q, _K)))
        at = [self.worker, index % 2 * _ROWS, step * _LANES]
        _store_tile(_S, self.buffers["s"], at, 4 * columns)

    def maxima(self, index: Expr) -> None:
        with I.serial(self._known(index), _ROWS) as r:

            def scores(vectors: Sequence[Expr]) -> Sequence[Expr]:
                return [self._scores(index, r, vector) for vector in vectors]

            peak = self._reduce(float32(MASKED), tirx.max, scores)
            I.buffer_store(self.peaks, peak, [r])

    def exponentials(self, index: Expr, first: Expr, last: Expr) -> None:
        """s into exponentials, and the products of two other tiles of rows."""
        plan, s = self.plan, self.buffers["s"]
        scale = I.bind(T.broadcast(self.buffers["params"][0] * float32(LOG2_E), _LANES))
        known, combined = self._known(index), plan.blocks * plan.value_tiles
        with I.serial(_ROWS) as r:
            with I.If(index > first), I.Then(), _share(r, combined) as step:
                self.combine(index - 1, step)
            with I.If(index + 1 < last), I.Then(), _share(r, plan.score_tiles) as step:
                self.score(index + 1, step)
            with I.If(r >= known), I.Then():
                peak = I.bind(T.broadcast(self.peaks[r], _LANES))

                def exponentials(vectors: Sequence[Expr]) -> Sequence[Expr]:
                    values = [(self._scores(index, r, v) - peak) * scale for v in vectors]
                    powers = _exp2([I.bind(value) for value in values])
                    for vector, power in zip(vectors, powers, strict=True):
                        I.buffer_store(s, power, self._at(index, r, vector, whole=True))
                    return powers

                total = self._reduce(float32(0), operator.add, exponentials)
                I.buffer_store(self.factors, float32(256) / total, [r])

    def levels(self, index: Expr) -> None:
        """p = exponentials times factors, rounded and held below 256."""
        with I.serial(_ROWS) as r:
            factor = I.bind(T.broadcast(self.factors[r], _LANES))

            def level(vector: Expr) -> Expr:
                return I.bind(avx512.rounded(self._scores(index, r, vector) * factor))

            def block(number: Expr, present: int) -> None:
                words = [level(number * _BLOCK + i) for i in range(present)]
                at = [self.worker, r, T.ramp(number * TILE_BYTES, 1, TILE_BYTES)]
                I.buffer_store(self.buffers["p"], avx512.packed(words, "uint8"), at)

            full, rest = divmod(self.plan.score_tiles, _BLOCK)
            if full:
                with I.serial(full) as number:
                    block(number, _BLOCK)
            if rest:
                block(full, rest)

    def combine(self, index: Expr, step: Expr) -> None:
        """A step of y = p @ v or, at last, of v_zero * sum(p): it adds a tile of p's products."""
        plan, v, sums = self.plan, self.buffers["v"], self.buffers["sums"]
        column, block = I.bind(step // plan.blocks), I.bind(step % plan.blocks)
        with I.If(block == 0), I.Then():
            instruct("tilezero", T.int8(_Y))
        load_tile(_P, self.buffers["p"], [self.worker, 0, block * TILE_BYTES], plan.p_row)
        with I.If(column < plan.value_tiles - 1):
            with I.Then():
                group = block * (TILE_BYTES // plan.product.group)
                at = [self._task(index), group, column * TILE_BYTES]
                load_tile(_V, v, at, plan.value_row)
            with I.Else():
                load_tile(_V, self.zero_points, [0], 0)
        instruct("tdpbusd", *map(T.int8, (_Y, _P, _V)))
        with I.If(block == plan.blocks - 1), I.Then():
            _store_tile(_Y, sums, [self.worker, 0, column * _LANES], 4 * plan.sums_row)

    def finish(self, index: Expr) -> None:
        """y, from its sums."""
        kernel, sums, y = self.plan.kernel, self.buffers["sums"], self.buffers["y"]
        row, column = I.bind(self._row(index)), I.bind(self._column(index))
        scale = I.bind(T.broadcast(self.buffers["params"][4], _LANES))
        with I.serial(self._known(index), _ROWS) as r:

            def sum_of(first: int) -> Expr:
                return sums.vload([self.worker, r, first], f"int32x{_LANES}")

            zero = I.bind(sum_of(kernel.dim))
            values = [
                I.bind(tirx.Cast(f"float32x{_LANES}", sum_of(first) - zero) * scale)
                for first in range(0, kernel.dim, _LANES)
            ]
            if kernel.out == "int8":
                levels = avx512.quantized(values, self.buffers["quant"], self.plan.storage)
                I.buffer_store(y, levels, [row + r, T.ramp(column, 1, kernel.dim)])
            else:
                for i, value in enumerate(values):
                    at = T.ramp(column + i * _LANES, 1, _LANES)
                    I.buffer_store(y, value, [row + r, at])

    def _reduce(
        self,
        start: Expr,
        combine: Callable[[Expr, Expr], Expr],
        terms: Callable[[Sequence[Expr]], Sequence[Expr]],
    ) -> Expr:
        """The terms of a row's vectors combined, in the order in which VNNI's kernel does it."""
        tiles = self.plan.score_tiles
        ways = min(_BLOCK, tiles)
        full, rest = divmod(tiles, ways)
        acc = self.accumulators

        def add(vectors: Sequence[Expr]) -> None:
            for way, term in enumerate(terms(vectors)):
                at = T.ramp(way * _LANES, 1, _LANES)
                I.buffer_store(acc, combine(acc[at], term), [at])

        with I.vectorized(ways * _LANES) as lane:
            I.buffer_store(acc, start, [lane])
        with I.serial(full) as i:
            add([i * ways + way for way in range(ways)])
        for i in range(rest):
            add([full * ways + i])
        parts = [acc.vload([way * _LANES], f"float32x{_LANES}") for way in range(ways)]
        return fold_lanes(functools.reduce(combine, parts), _LANES, combine)

    def _at(self, index: Expr, r: Expr, vector: Expr, *, whole: bool = False) -> list[Expr]:
        """Where a vector of s begins, or all of it."""
        column = vector * _LANES
        return [self.worker, index % 2 * _ROWS + r, T.ramp(column, 1, _LANES) if whole else column]

    def _scores(self, index: Expr, r: Expr, vector: Expr) -> Expr:
        return I.bind(self.buffers["s"].vload(self._at(index, r, vector), f"float32x{_LANES}"))

    def _task(self, index: Expr) -> Expr:
        """The head, counted over the images."""
        return index // self.plan.row_tiles

    def _start(self, index: Expr) -> Expr:
        """The row of the head in which the tile begins; the last one overlaps the one before."""
        return tirx.min(index % self.plan.row_tiles * _ROWS, self.plan.kernel.tokens - _ROWS)

    def _known(self, index: Expr) -> Expr:
        """The rows that the tile before has computed."""
        return I.bind(index % self.plan.row_tiles * _ROWS - self._start(index))

    def _row(self, index: Expr) -> Expr:
        """Of x and y, in which the tile begins."""
        kernel = self.plan.kernel
        return self._task(index) // kernel.heads * kernel.tokens + self._start(index)

    def _column(self, index: Expr) -> Expr:
        """Of y, and of the queries in x, in which the head begins."""
        return self._task(index) % self.plan.kernel.heads * self.plan.kernel.dim


def _share(turn: Expr, steps: int) -> Any:
    """A loop over the steps of one of `_ROWS` turns."""
    return I.serial(turn * steps // _ROWS, (turn + 1) * steps // _ROWS)


def _store_tile(tile: int, buffer: Buffer, at: list[Expr], stride: int) -> None:
    instruct("tilestored64", T.int8(tile), T.address_of(buffer[tuple(at)]), T.int64(stride))


def _exp2(values: Sequence[Expr]) -> Sequence[Expr]:
    """2**v by AVX-512, the same bits as `math.exp2`; below -126 they vanish.

    Operation by operation for all vectors: each is a long chain, and a core looks no further than
    some hundred instructions for those that it can do meanwhile.
    """
    fractions = [I.bind(avx512.fraction(value)) for value in values]
    powers = [T.broadcast(float32(EXP2_COEFFICIENTS[-1]), _LANES)] * len(values)
    for coefficient in reversed(EXP2_COEFFICIENTS[:-1]):
        addend = T.broadcast(float32(coefficient), _LANES)
        powers = [I.bind(p * f + addend) for p, f in zip(powers, fractions, strict=True)]
    wholes = [I.bind(v - f) for v, f in zip(values, fractions, strict=True)]
    return [
        I.bind(avx512.scaled(power, whole)) for power, whole in zip(powers, wholes, strict=True)
    ]
