"""Attention and softmax on CPUs, attention fused: of its matrix, a tile of rows exists at a time.

    for each head of each image                           (parallel)
      lay k and v out as a dense product's weights, add up their columns
    for each tile of rows of each head                    (parallel)
      s = q @ k.T                                         (register tiles, see cpu_dot)
      s = exp(s - the row's maximum), and the row's sum
      p = s as integers of 1/256                          (int8 only)
      y = p @ v, divided by the row's sum                 (register tiles)

Zero points: of (q - q_zero) . (k - k_zero), what is the same for all keys moves a whole row, to
which softmax is indifferent. There remains q . k - q_zero * sum(k), and the sums of keys are a
bias. Likewise p . (v - v_zero) = p . v - v_zero * sum(p). Where the product takes int16, zero
points are subtracted before it instead.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Attention, Scheduled, Softmax, Step
from gfcompile.targets.tvm.schedules.cpu_dense import (
    epilogue_width,
    fits_registers,
    registers,
    tile_cycles,
    tile_sums,
)
from gfcompile.targets.tvm.schedules.cpu_dot import (
    Buffer,
    Product,
    Tile,
    View,
    activation_product_of,
)
from gfcompile.targets.tvm.schedules.cpu_tiling import (
    apart,
    fitting_lanes,
    fold_lanes,
    row_loop,
    span,
    sum_of_lanes,
)
from gfcompile.targets.tvm.schedules.math import (
    LOG2_E,
    Expr,
    exp,
    exp2,
    float32,
    round_to_int32,
    stored,
)

# Below every score: what stands in the columns that only fill up a vector.
MASKED = -3e38
# Vectors of a row that a step of the softmax takes: each is a long chain of dependent operations.
_SOFTMAX_VECTORS = 4
# An exponential, in vector instructions.
_EXP = 15
# Of float16 scores so many products are added up in float16, as an exponential of them follows:
# 57 dB of a softmax's result are left, where 64 at a time would leave 48.
_SCORE_SPAN = 16
# Tiles that the model calls slower than this, compared with its best, are not worth measuring.
_WORTH_MEASURING = 1.3


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """The register tiles of both products; what they compute are the same bits.

    Attributes:
        rows: of both tiles.
        scores, values: their vectors, in q @ k.T and in p @ v.
    """

    rows: int
    scores: int
    values: int


def attention_choices(kernel: Attention, cpu: Cpu) -> Sequence[AttentionChoice]:
    """Every choice that is worth measuring, the likeliest first: the default one leads."""
    product = activation_product_of(kernel.x, cpu)
    costs = _tile_costs(kernel, product, cpu.vector_registers, best_only=False)
    least = costs[0][0]
    return [
        AttentionChoice(rows=rows, scores=scores, values=values)
        for cost, rows, scores, values in costs
        if cost <= _WORTH_MEASURING * least
    ]


def schedule_attention(
    kernel: Attention, cpu: Cpu, storage: ActStorage, choice: AttentionChoice | None = None
) -> Scheduled:
    """Attention for `cpu`: keys and values into place, then everything else."""
    # A sum of products less a bias, which passes through float32 exactly.
    assert kernel.x != "int8" or kernel.dim <= 256
    plan = _plan(kernel, cpu, storage, choice)
    heads = kernel.batch * kernel.heads

    def scratch_of_workers(dtype: str, columns: int) -> tuple[str, tuple[int, ...]]:
        return dtype, (plan.workers, apart(plan.rows, columns, dtype), columns)

    temps: dict[str, tuple[str, tuple[int, ...]]] = {
        "k": (plan.product.w_dtype, (heads, plan.score_groups, plan.score_row)),
        "v": (plan.product.w_dtype, (heads, plan.value_groups, plan.value_row)),
        "s": scratch_of_workers("float32", plan.score_columns),
    }
    if plan.sums_keys:
        temps["k_bias"] = ("int32", (heads, plan.score_columns))
    if plan.p_offset:
        temps["v_bias"] = ("int32", (heads, plan.value_columns))
    if plan.stores_p:
        temps["p"] = scratch_of_workers(plan.product.x_dtype, plan.p_columns)
    if plan.converts_queries:
        columns = plan.score_groups * plan.product.group
        temps["q"] = scratch_of_workers(plan.product.x_dtype, columns)
    biases = tuple(name for name in ("k_bias", "v_bias") if name in temps)
    scratch = tuple(name for name in ("s", "p", "q") if name in temps)
    quant = ("quant",) if kernel.out == "int8" else ()
    pack_args = ("x", "params", "k", "v", *biases)
    args = ("x", "params", "k", "v", *biases, *scratch, *quant, "y")
    return Scheduled(
        steps=(
            Step(func=lay_out(plan, temps, pack_args), args=pack_args),
            Step(func=_attention(plan, temps, args), args=args),
        ),
        temps=temps,
    )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Equal panels of columns, side by side.

    Attributes:
        first: vector in which they begin.
        panels: how many there are.
        vectors: of each panel.
        width: columns of each panel; further ones only fill up its last vector.
    """

    first: int
    panels: int
    vectors: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a kernel is cut.

    Attributes:
        rows: of a tile, for both products.
        scores, values: panels of the columns of q @ k.T (tokens) and of p @ v (channels).
        workers: slices of the tiles that may run in parallel, each with scratch of its own.
    """

    kernel: Attention
    storage: ActStorage
    product: Product
    rows: int
    scores: tuple[Segment, ...]
    values: tuple[Segment, ...]
    workers: int

    @property
    def row_tiles(self) -> int:
        return ceil(self.kernel.tokens / self.rows)

    @property
    def score_columns(self) -> int:
        return _vectors(self.scores) * self.product.columns

    @property
    def value_columns(self) -> int:
        return _vectors(self.values) * self.product.columns

    @property
    def score_row(self) -> int:
        """Elements of k, laid out, for one group."""
        return self.score_columns * self.product.group

    @property
    def value_row(self) -> int:
        return self.value_columns * self.product.group

    @property
    def score_groups(self) -> int:
        return ceil(self.kernel.dim / self.product.group)

    @property
    def value_groups(self) -> int:
        return ceil(self.kernel.tokens / self.product.group)

    def value_group(self, group: Expr) -> Expr:
        """Where a group of tokens lies in v: p may have its columns in another order."""
        return group

    def finish_keys(self, buffers: Mapping[str, Buffer], task: Expr) -> None:
        """What else k and its bias need, laid out."""

    @property
    def p_columns(self) -> int:
        return max(self.score_columns, self.value_groups * self.product.group)

    @property
    def widens(self) -> bool:
        """Whether all operands are int16, zero points already subtracted."""
        return self.product.x_dtype == "int16"

    @property
    def converts_queries(self) -> bool:
        """Whether queries are multiplied in another dtype than x has."""
        return self.widens or (self.kernel.x == "float16" and self.product.x_dtype != "float16")

    @property
    def stores_p(self) -> bool:
        """Whether what v is multiplied by has another dtype than the scores."""
        return self.product.x_dtype != "float32"

    @property
    def sums_keys(self) -> bool:
        return self.kernel.x == "int8" and not self.widens

    @property
    def p_offset(self) -> int:
        """What is added to p, of 0 to 255, to store it."""
        return -128 if self.product.x_dtype == "int8" else 0


def _plan(kernel: Attention, cpu: Cpu, storage: ActStorage, choice: AttentionChoice | None) -> Plan:
    product = activation_product_of(kernel.x, cpu)
    if choice is None:
        rows, scores, values = choose_tiles(kernel, product, cpu.vector_registers)
    else:
        rows, scores, values = choice.rows, choice.scores, choice.values
    tiles = kernel.batch * kernel.heads * ceil(kernel.tokens / rows)
    return Plan(
        kernel=kernel,
        storage=storage,
        product=product,
        rows=rows,
        scores=segments_of(kernel.tokens, product, scores),
        values=segments_of(kernel.dim, product, values),
        workers=min(cpu.cores, tiles),
    )


def choose_tiles(kernel: Attention, product: Product, available: int) -> tuple[int, int, int]:
    """Rows of a tile, its vectors in q @ k.T and in p @ v: the fewest cycles by cpu_dense's model.

    Args:
        available: vector registers.
    """
    return _tile_costs(kernel, product, available, best_only=True)[0][1:]


def _tile_costs(
    kernel: Attention, product: Product, available: int, *, best_only: bool
) -> list[tuple[float, int, int, int]]:
    """Cycles, rows, and vectors in either product, ascending.

    Args:
        best_only: whether to take, for each number of rows, the best vectors alone.
    """

    def cycles(rows: int, n: int, k: int, vectors: int) -> float:
        return sum(
            segment.panels * tile_cycles(product, Tile(rows=rows, vectors=segment.vectors), k)
            for segment in segments_of(n, product, vectors)
        )

    def costs(rows: int, n: int, k: int) -> list[tuple[float, int]]:
        candidates = [
            vectors
            for vectors in range(product.vector_step, available, product.vector_step)
            if fits_registers(product, Tile(rows=rows, vectors=vectors), available)
        ]
        found = sorted((cycles(rows, n, k, v), v) for v in candidates or [0])
        return found[:1] if best_only else found

    tokens, dim = kernel.tokens, kernel.dim
    choices = []
    for rows in range(1, min(tokens, available) + 1):
        if fits_registers(product, Tile(rows=rows, vectors=product.vector_step), available):
            softmax = rows * ceil(tokens / product.lanes) * _EXP
            choices += [
                (ceil(tokens / rows) * (first + second + softmax), rows, scores, values)
                for first, scores in costs(rows, tokens, dim)
                for second, values in costs(rows, dim, tokens)
            ]
    return sorted(choices)


def segments_of(n: int, product: Product, vectors: int) -> tuple[Segment, ...]:
    """Panels of `vectors` vectors, and a narrower one with what is left of n columns."""
    panel = vectors * product.columns
    full, rest = divmod(n, panel)
    segments = [Segment(first=0, panels=full, vectors=vectors, width=panel)] if full else []
    if rest:
        step = product.vector_step
        narrow = ceil(rest / (product.columns * step)) * step
        segments.append(Segment(first=full * vectors, panels=1, vectors=narrow, width=rest))
    return tuple(segments)


def _vectors(segments: Sequence[Segment]) -> int:
    return segments[-1].first + segments[-1].panels * segments[-1].vectors


class _Filled:
    """A buffer for `tile_sums` that has the same value everywhere."""

    def __init__(self, value: int) -> None:
        self._value = value

    def vload(self, _indices: Sequence[Expr], dtype: str) -> Expr:
        base, _, lanes = dtype.rpartition("x")
        return T.broadcast(tirx.const(self._value, base), int(lanes))


def _columns(buffer: Buffer, task: Expr, product: Product, segment: Segment) -> View:
    """k or v, laid out, as the weights of one segment."""

    def index(panel: Expr, group: Expr, vector: Expr, _element: Expr) -> list[Expr]:
        at = segment.first + panel * segment.vectors + vector
        return [task, group, at * product.w_elements]

    return View(buffer, index)


def buffers_of(plan: Plan, temps: Any, names: Sequence[str]) -> dict[str, Buffer]:
    """The arguments `names` of the function under construction."""
    kernel, storage = plan.kernel, plan.storage
    rows, width = kernel.batch * kernel.tokens, kernel.heads * kernel.dim
    types = {
        "x": (storage.dtype_of(kernel.x), (rows, 3 * width)),
        "params": ("float32", (5,)),
        "quant": ("float32", (4,)),
        "y": (storage.dtype_of(kernel.out), (rows, width)),
    } | temps
    return {name: I.arg(name, I.buffer(types[name][1], types[name][0])) for name in names}


def _zero_point(params: Buffer, index: int, storage: ActStorage) -> Expr:
    """A zero point as int32, moved as the stored values are."""
    return tirx.Cast("int32", params[index]) + storage.offset


def lay_out(plan: Plan, temps: Any, names: Sequence[str]) -> Any:
    """k as (groups of channels, tokens, group), v as (groups of tokens, channels, group)."""
    kernel, product, storage = plan.kernel, plan.product, plan.storage
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("lay_out")
        I.func_attr({"tirx.noalias": True})
        buffers = buffers_of(plan, temps, names)
        x, params = buffers["x"], buffers["params"]
        with I.parallel(kernel.batch * kernel.heads) as task:
            row = I.bind(task // kernel.heads * kernel.tokens)
            column = I.bind(task % kernel.heads * kernel.dim)

            def part(number: int) -> Callable[[Expr, Expr, int], Expr]:
                """Loads of k (1) or v (2) by token and channel, as the product's weights."""
                start = column + number * kernel.heads * kernel.dim
                zero = _zero_point(params, number + 1, storage) if plan.widens else None

                def load(token: Expr, channel: Expr, lanes: int) -> Expr:
                    dtype = f"{x.dtype}x{lanes}" if lanes > 1 else x.dtype
                    value = x.vload([row + token, start + channel], dtype)
                    return I.bind(_as_weights(value, zero, lanes, product, storage))

                return load

            _lay_out_keys(plan, part(1), buffers["k"], task)
            _lay_out_values(plan, part(2), buffers["v"], task)
            if "k_bias" in buffers:
                factor = I.bind(-_zero_point(params, 1, storage))
                _add_columns(plan.scores, plan.score_groups, product, buffers, "k", task, factor)
                plan.finish_keys(buffers, task)
            if "v_bias" in buffers:
                factor = tirx.const(-plan.p_offset, "int32")
                _add_columns(plan.values, plan.value_groups, product, buffers, "v", task, factor)
    return builder.get()


def _as_weights(
    value: Expr, zero: Expr | None, lanes: int, product: Product, storage: ActStorage
) -> Expr:
    """Loaded activations as weights of the product."""
    suffix = f"x{lanes}" if lanes > 1 else ""
    if zero is not None:
        amount = tirx.Cast("int16", zero)
        amount = T.broadcast(amount, lanes) if lanes > 1 else amount
        return tirx.Cast(f"int16{suffix}", value) - amount
    if storage.offset and product.w_dtype == "int8":
        sign = tirx.const(storage.offset, storage.dtype)
        sign = T.broadcast(sign, lanes) if lanes > 1 else sign
        return T.reinterpret(value ^ sign, dtype=f"int8{suffix}")
    return value


def _lay_out_keys(plan: Plan, load: Callable[..., Expr], k: Buffer, task: Expr) -> None:
    """Groups of channels move as units: a transposition of words, unless they are 16 bytes.

    The last tokens are read again for columns beyond them, whose scores nothing reads.
    """
    tokens, dim = plan.kernel.tokens, plan.kernel.dim
    group = plan.product.group

    def store(value: Expr, unit: Expr, token: Expr, lanes: int) -> None:
        I.buffer_store(k, value, [task, unit, T.ramp(token * group, 1, lanes)])

    if group == 16 and dim % group == 0:
        with I.serial(tokens) as token, I.serial(dim // group) as unit:
            store(load(token, unit * group, group), unit, token, group)
    elif group < 16 and dim % (4 * group) == 0:
        word = plan.product.w_dtype if group == 1 else "int32"
        with I.serial(ceil(tokens / 4)) as block, I.serial(dim // (4 * group)) as units:
            rows = [
                load(tirx.min(block * 4 + i, tokens - 1), units * (4 * group), 4 * group)
                for i in range(4)
            ]
            words = [T.reinterpret(value, dtype=f"{word}x4") for value in rows]
            for i, column in enumerate(_transposed(words)):
                value = T.reinterpret(column, dtype=f"{plan.product.w_dtype}x{4 * group}")
                store(value, units * 4 + i, block * 4, 4 * group)
    else:
        with I.serial(tokens) as token, I.serial(plan.score_groups * group) as channel:
            value = load(token, tirx.min(channel, dim - 1), 1)
            value = tirx.Select(channel < dim, value, tirx.const(0, plan.product.w_dtype))
            at = token * group + channel % group
            I.buffer_store(k, value, [task, channel // group, at])


def _lay_out_values(plan: Plan, load: Callable[..., Expr], v: Buffer, task: Expr) -> None:
    """The tokens of a group are interleaved; those beyond the last one are 0."""
    tokens, dim = plan.kernel.tokens, plan.kernel.dim
    product, group = plan.product, plan.product.group
    lanes = {1: 4, 2: 8, 4: 16, 16: 16}[group]
    if dim % lanes:
        with I.serial(plan.value_groups * group) as token, I.serial(dim) as channel:
            value = load(tirx.min(token, tokens - 1), channel, 1)
            value = tirx.Select(token < tokens, value, tirx.const(0, product.w_dtype))
            at = channel * group + token % group
            I.buffer_store(v, value, [task, plan.value_group(token // group), at])
        return

    def lay_out_group(first: Expr, present: int) -> None:
        """A group that begins with the token `first`."""
        with I.serial(dim // lanes) as block:
            zeros = T.broadcast(tirx.const(0, product.w_dtype), lanes)
            rows = [load(first + i, block * lanes, lanes) for i in range(present)]
            rows += [zeros] * (group - present)
            for i, value in enumerate(_interleaved(rows, product.w_dtype)):
                width = lanes * group if group < 16 else group
                at = T.ramp(block * (lanes * group) + i * width, 1, width)
                I.buffer_store(v, value, [task, plan.value_group(first // group), at])

    full, rest = divmod(tokens, group)
    if full:
        with I.serial(full) as index:
            lay_out_group(index * group, group)
    if rest:
        lay_out_group(full * group, rest)


def _transposed(rows: Sequence[Expr]) -> list[Expr]:
    """Columns of a 4 x 4 matrix."""
    return [I.bind(T.Shuffle(list(rows), [i, 4 + i, 8 + i, 12 + i])) for i in range(4)]


def _interleaved(rows: Sequence[Expr], dtype: str) -> list[Expr]:
    """Vectors whose elements, one after the other, are the columns of `rows`."""
    if len(rows) == 1:
        return list(rows)
    if len(rows) < 16:
        lanes = {2: 8, 4: 16}[len(rows)]
        order = [row * lanes + lane for lane in range(lanes) for row in range(len(rows))]
        return [T.Shuffle(list(rows), order)]
    # 16 x 16 bytes: first four rows at a time into words of a column, then words into columns.
    words = []
    for first in range(0, 16, 4):
        parts = []
        for lane in range(0, 16, 4):
            order = [row * 16 + lane + i for i in range(4) for row in range(4)]
            mixed = T.Shuffle(list(rows[first : first + 4]), order)
            parts.append(I.bind(T.reinterpret(mixed, dtype="int32x4")))
        words.append(parts)
    columns: list[Expr] = []
    for lane in range(4):
        columns += _transposed([parts[lane] for parts in words])
    return [T.reinterpret(column, dtype=f"{dtype}x16") for column in columns]


def _add_columns(
    segments: Sequence[Segment],
    groups: int,
    product: Product,
    buffers: dict[str, Buffer],
    name: str,
    task: Expr,
    factor: Expr,
) -> None:
    """The bias of k or v: the sums of its columns, which are a product with ones, times factor."""
    step = product.vector_step
    every = Segment(first=0, panels=_vectors(segments) // step, vectors=step, width=0)
    weights = _columns(buffers[name], task, product, every)
    with I.serial(every.panels) as panel:
        (sums,) = tile_sums(
            _Filled(1),
            weights,
            _Filled(0),
            0,
            panel,
            0,
            groups * product.group,
            product,
            Tile(rows=1, vectors=step),
        )
        columns = step * product.columns
        with I.vectorized(columns) as lane:
            value = sums[lane] * factor
            I.buffer_store(buffers[f"{name}_bias"], value, [task, panel * columns + lane])


def _attention(plan: Plan, temps: Any, names: Sequence[str]) -> Any:
    """All after the layout."""
    kernel, rows = plan.kernel, plan.rows
    tiles = kernel.batch * kernel.heads * plan.row_tiles
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("attention")
        I.func_attr({"tirx.noalias": True})
        buffers = buffers_of(plan, temps, names)
        with I.parallel(plan.workers) as worker:
            first = worker * tiles // plan.workers
            last = (worker + 1) * tiles // plan.workers
            with I.serial(first, last) as index:
                task = I.bind(index // plan.row_tiles)
                start = index % plan.row_tiles * rows
                if kernel.tokens % rows:  # the last tile overlaps the one before
                    start = tirx.min(start, kernel.tokens - rows)
                tile = _RowTile(
                    plan=plan,
                    buffers=buffers,
                    task=task,
                    worker=worker,
                    row=I.bind(task // kernel.heads * kernel.tokens + start),
                    column=I.bind(task % kernel.heads * kernel.dim),
                )
                tile.score()
                tile.combine(tile.softmax())
    return builder.get()


@dataclass(frozen=True, kw_only=True)
class _RowTile:
    """What is built for one tile of rows of one head.

    Attributes:
        task: the head, counted over the images.
        row: of x and y, in which the tile begins.
        column: of y, and of the queries in x, in which the head begins.
    """

    plan: Plan
    buffers: Mapping[str, Buffer]
    task: Expr
    worker: Expr
    row: Expr
    column: Expr

    def score(self) -> None:
        """s = q @ k.T, masked where there are no tokens."""
        plan, product = self.plan, self.plan.product
        queries = self._converted_queries() if plan.converts_queries else self._queries()
        bias: View | _Filled = _Filled(0)
        if plan.sums_keys:
            bias = View(self.buffers["k_bias"], lambda at: [self.task, at])
        k = plan.score_groups * product.group
        for segment, first, sums in self._products(plan.scores, queries, "k", bias, k, _SCORE_SPAN):
            for r in range(plan.rows):
                for at in range(0, segment.vectors * product.columns, product.lanes):
                    with I.vectorized(product.lanes) as lane:
                        value = tirx.Cast("float32", sums[r][at + lane])
                        if at + product.lanes > segment.width:
                            present = at + lane < segment.width
                            value = tirx.Select(present, value, float32(MASKED))
                        I.buffer_store(
                            self.buffers["s"], value, [self.worker, r, first + at + lane]
                        )

    def softmax(self) -> Buffer:
        """s into exponentials or, where p is apart, into p.

        Returns:
            For each row, what its p @ v is to be multiplied by (float) or lessened by (int8).
        """
        # One pass over all rows after the other: each row of a pass ends in a long chain of
        # dependent operations, which the next row hides.
        s, exact = self.buffers["s"], self.plan.kernel.x == "int8"
        halves = self.buffers.get("p") if not exact else None
        factors = registers(self.plan.rows, "float32")

        def score(r: Expr, at: Expr) -> Expr:
            return s[self.worker, r, at]

        def exponential(r: Expr, at: Expr) -> Expr:
            return exp2((s[self.worker, r, at] - factors[r]) * scale)

        def keep_exponential(r: Expr, at: Expr, value: Expr) -> None:
            if halves is None:
                I.buffer_store(s, value, [self.worker, r, at])
            else:
                I.buffer_store(halves, tirx.Cast("float16", value), [self.worker, r, at])

        self._reduce_rows(
            float32(MASKED),
            tirx.max,
            score,
            None,
            lambda r, peak: I.buffer_store(factors, peak, [r]),
        )
        scale = I.bind(self.buffers["params"][0] * float32(LOG2_E))
        whole = float32(256 if exact else 1)
        self._reduce_rows(
            float32(0),
            operator.add,
            exponential,
            keep_exponential,
            lambda r, total: I.buffer_store(factors, whole / total, [r]),
        )
        return self._levels(factors) if exact else factors

    def _levels(self, factors: Buffer) -> Buffer:
        """p = exponentials times factors, rounded; returns v_zero times the sum of each row's."""
        s, p, dtype = self.buffers["s"], self.buffers["p"], self.plan.product.x_dtype
        moved = registers(self.plan.rows, "int32")
        v_zero = tirx.Cast("int32", self.buffers["params"][3])

        def level(r: Expr, at: Expr) -> Expr:
            return round_to_int32(tirx.min(s[self.worker, r, at] * factors[r], float32(255)))

        def keep(r: Expr, at: Expr, value: Expr) -> None:
            moved = tirx.Cast(dtype, value + self.plan.p_offset)
            I.buffer_store(p, moved, [self.worker, r, at])

        self._reduce_rows(
            tirx.const(0, "int32"),
            operator.add,
            level,
            keep,
            lambda r, total: I.buffer_store(moved, total * v_zero, [r]),
        )
        return moved

    def combine(self, finals: Buffer) -> None:
        """y = p @ v, finished."""
        plan, kernel, product = self.plan, self.plan.kernel, self.plan.product
        params, quant = self.buffers["params"], self.buffers.get("quant")

        def finish(acc: Expr, r: int) -> Expr:
            if kernel.x != "int8":
                value = acc * finals[r]
            else:
                exact = acc if plan.widens else acc - finals[r]
                value = tirx.Cast("float32", exact) * params[4]
            return stored(value, kernel.out, quant, plan.storage)

        p = View(self.buffers["p" if plan.stores_p else "s"], lambda r, k: [self.worker, r, k])
        bias: View | _Filled = _Filled(0)
        if plan.p_offset:
            bias = View(self.buffers["v_bias"], lambda at: [self.task, at])
        k = plan.value_groups * product.group
        for segment, first, sums in self._products(plan.values, p, "v", bias, k):
            vector = epilogue_width(segment.width, product.lanes, kernel.out)
            for r in range(plan.rows):
                for begin in range(0, segment.width, vector):
                    at = min(begin, segment.width - vector)
                    with I.vectorized(vector) as lane:
                        I.buffer_store(
                            self.buffers["y"],
                            finish(sums[r][at + lane], r),
                            [self.row + r, self.column + first + at + lane],
                        )

    def _queries(self) -> View:
        return View(self.buffers["x"], lambda r, k: [self.row + r, self.column + k])

    def _converted_queries(self) -> View:
        """The queries as the product has them; int16 ones less their zero point."""
        x, q, dim = self.buffers["x"], self.buffers["q"], self.plan.kernel.dim
        dtype, zero = self.plan.product.x_dtype, None
        if self.plan.widens:
            zero = tirx.Cast(dtype, _zero_point(self.buffers["params"], 1, self.plan.storage))
        width = min(16, dim & -dim)
        with (
            I.serial(self.plan.rows) as r,
            I.serial(dim // width) as i,
            I.vectorized(width) as lane,
        ):
            value = x[self.row + r, self.column + i * width + lane]
            converted = tirx.Cast(dtype, value)
            at = [self.worker, r, i * width + lane]
            I.buffer_store(q, converted if zero is None else converted - zero, at)
        return View(q, lambda r, k: [self.worker, r, k])

    def _products(
        self,
        segments: Sequence[Segment],
        left: View,
        weights: str,
        bias: View | _Filled,
        k: int,
        span: int = 0,
    ) -> Iterator[tuple[Segment, Expr, list[Buffer]]]:
        """For each segment, within the loop over its panels: their first column, and sums."""
        product = self.plan.product
        for segment in segments:
            columns = _columns(self.buffers[weights], self.task, product, segment)
            tile = Tile(rows=self.plan.rows, vectors=segment.vectors)
            with I.serial(segment.panels) as panel:
                first = I.bind((segment.first + panel * segment.vectors) * product.columns)
                sums = tile_sums(left, columns, bias, 0, panel, first, k, product, tile, span=span)
                yield segment, first, sums

    def _reduce_rows(
        self,
        start: Expr,
        combine: Callable[[Expr, Expr], Expr],
        term: Callable[[Expr, Expr], Expr],
        keep: Callable[[Expr, Expr, Expr], None] | None,
        finish: Callable[[Expr, Expr], None],
    ) -> None:
        """`finish(row, its terms combined)`, after `keep(row, column, term)` for each of them."""
        lanes, dtype = self.plan.product.lanes, start.ty.dtype
        wide = min(_SOFTMAX_VECTORS * lanes, self.plan.score_columns)
        full, rest = divmod(self.plan.score_columns, wide)
        with I.serial(self.plan.rows) as r:
            acc, terms = registers(wide, dtype), registers(wide, dtype)

            def add(first: Expr, width: int) -> None:
                with I.vectorized(width) as lane:
                    I.buffer_store(terms, term(r, first + lane), [lane])
                with I.vectorized(width) as lane:
                    I.buffer_store(acc, combine(acc[lane], terms[lane]), [lane])
                if keep is not None:
                    with I.vectorized(width) as lane:
                        keep(r, first + lane, terms[lane])

            with I.vectorized(wide) as lane:
                I.buffer_store(acc, start, [lane])
            with I.serial(full) as i:
                add(i * wide, wide)
            for i in range(0, rest, lanes):
                add(full * wide + i, lanes)
            vectors = [acc.vload([at], f"{dtype}x{lanes}") for at in range(0, wide, lanes)]
            total = functools.reduce(combine, vectors)
            finish(r, fold_lanes(total, lanes, combine, dtype))


def schedule_softmax(kernel: Softmax, cpu: Cpu, _storage: ActStorage) -> Scheduled:
    """Softmax, a row at a time: its maximum, its exponentials and their sum, their quotient."""
    rows, n = kernel.rows, kernel.n
    lanes = fitting_lanes(n, cpu.float_lanes)
    full, rest = divmod(n, lanes)

    @T.prim_func(s_tir=True)
    def softmax(x: T.Buffer((rows, n), "float32"), y: T.Buffer((rows, n), "float32")):
        T.func_attr({"tirx.noalias": True})
        for row in row_loop(rows, n):
            peaks = T.alloc_buffer((lanes,), "float32")
            sums = T.alloc_buffer((lanes,), "float32")
            for lane in T.vectorized(lanes):
                peaks[lane] = x[row, lane]
            for v in T.serial(1, ceil(n / lanes)):
                j: T.let = T.min(v * lanes, n - lanes)
                for lane in T.vectorized(lanes):
                    peaks[lane] = T.max(peaks[lane], x[row, j + lane])
            peak: T.let = fold_lanes(peaks[span(0, lanes)], lanes, tirx.max)
            for lane in T.vectorized(lanes):
                sums[lane] = T.float32(0)
            for v in T.serial(full):
                for lane in T.vectorized(lanes):
                    y[row, v * lanes + lane] = exp(x[row, v * lanes + lane] - peak)
                for lane in T.vectorized(lanes):
                    sums[lane] = sums[lane] + y[row, v * lanes + lane]
            for i in T.serial(rest):
                y[row, full * lanes + i] = exp(x[row, full * lanes + i] - peak)
                sums[0] = sums[0] + y[row, full * lanes + i]
            factor: T.let = T.float32(1) / sum_of_lanes(sums[span(0, lanes)], lanes)
            for v in T.serial(full):
                for lane in T.vectorized(lanes):
                    y[row, v * lanes + lane] = y[row, v * lanes + lane] * factor
            for i in T.serial(rest):
                y[row, full * lanes + i] = y[row, full * lanes + i] * factor

    return Scheduled(steps=(Step(func=softmax, args=("x", "y")),))
