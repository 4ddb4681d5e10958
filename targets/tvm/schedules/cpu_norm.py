"""Layer normalization on a CPU: a few rows stay in the first-level cache for three passes."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import (
    CHANNEL_BLOCK,
    ActStorage,
    Array,
    LayerNorm,
    Scheduled,
    Step,
    channel_blocks,
)
from gfcompile.targets.tvm.schedules import avx512, neon_epilogue
from gfcompile.targets.tvm.schedules.cpu_tiling import (
    ceil_div,
    fitting_lanes,
    row_loop,
    span,
    splat,
    sum_of_lanes,
)
from gfcompile.targets.tvm.schedules.math import stored
from gfcompile.targets.tvm.schedules.params import keep_params

Expr = Any  # tvm.tirx.Expr, or a number where TVM accepts one

# The indices of a few elements, or the index of one, made of the first.
_Indices = Callable[[Expr], Expr]
# The terms of a sum, by the first element and what makes all their indices of it.
_Term = Callable[[Expr, _Indices], Expr]

# Enough independent sums to keep the adders busy while each waits for its own last result.
_ACCUMULATORS = 4


def schedule_layer_norm(kernel: LayerNorm, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """Means, then the variances about them (E[x^2] - E[x]^2 would cancel), then the rows."""
    n = kernel.n
    lanes = fitting_lanes(n, cpu.float_lanes)
    # Of the last pass, as many vectors as fill one when they are narrowed to bytes; but in a single
    # block of channels, unless each is loaded by itself.
    in_blocks = kernel.x_in_blocks or kernel.y_in_blocks
    by_vector = kernel.out == "int8" and lanes == avx512.LANES
    widest = CHANNEL_BLOCK if in_blocks and not by_vector else n
    width = next(
        lanes * vectors
        for vectors in (4, 2, 1)
        if (n % (lanes * vectors) == 0 and lanes * vectors <= widest) or vectors == 1
    )
    pairs = 2 * neon_epilogue.LANES
    in_steps = kernel.out == "int8" and storage.saturates and n % pairs == 0
    quant_args = neon_epilogue.STEPS_ARGS if in_steps else 4
    together = min(_rows(kernel, cpu), kernel.rows)
    x_shape = channel_blocks(kernel.x_rows, n) if kernel.x_in_blocks else (kernel.x_rows, n)
    y_shape = channel_blocks(kernel.rows, n) if kernel.y_in_blocks else (kernel.rows, n)
    rows_of = functools.partial(
        _Rows,
        kernel=kernel,
        storage=storage,
        lanes=lanes,
        width=width,
        by_vector=by_vector,
        in_steps=in_steps,
    )

    @T.prim_func(s_tir=True)
    def layer_norm(
        x: T.Buffer(x_shape, "float32"),
        gamma: T.Buffer((n,), "float32"),
        beta: T.Buffer((n,), "float32"),
        quant: T.Buffer((quant_args,), "float32"),
        y: T.Buffer(y_shape, storage.dtype_of(kernel.out)),
    ):
        T.func_attr({"tirx.noalias": True})
        for block in row_loop(ceil_div(kernel.rows, together), together * n):
            first: T.let = T.min(block * together, kernel.rows - together)
            rows_of(x=x, gamma=gamma, beta=beta, quant=quant, y=y).normalize(first, together)

    args = ("x", "gamma", "beta", *(("quant",) if kernel.out == "int8" else ()), "y")
    steps = (Step(func=keep_params(layer_norm, args), args=args),)
    return Scheduled(steps=steps, pack=_packing_steps() if in_steps else {})


def _packing_steps() -> Mapping[str, Callable[[Mapping[str, Array]], Array]]:
    """How constants become those of a kernel that counts in steps of its result."""
    return {
        "gamma": lambda raw: raw["gamma"] * raw["quant"][0],
        "beta": lambda raw: raw["beta"] * raw["quant"][0],
        "quant": lambda raw: neon_epilogue.steps_args(raw["quant"]),
    }


def _rows(kernel: LayerNorm, cpu: Cpu) -> int:
    """Rows that are summed up side by side: a row's sums are chains of dependent operations.

    float32 results wait for memory rather than for those: four rows of them, of which as many
    streams are read, took a third longer within a model. ARM's cores have not been measured.
    """
    if kernel.out != "int8" or cpu.arch != "x86_64":
        return 1
    return 4 if cpu.vector_registers >= 32 else 2


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """What is built for a few rows at once.

    Attributes:
        lanes: of the vectors that rows are summed up in.
        width: elements of those that results are computed in.
        by_vector: whether these are made of vectors of their own, which AVX-512 narrows together.
        in_steps: whether they are counted in steps of int8 before they are rounded.
    """

    kernel: LayerNorm
    storage: ActStorage
    lanes: int
    width: int
    by_vector: bool
    in_steps: bool
    x: Any
    gamma: Any
    beta: Any
    quant: Any
    y: Any

    def normalize(self, first: Expr, count: int) -> None:
        """Writes the results of `count` rows."""
        n, width = self.kernel.n, self.width
        sources = [T.bind(self.kernel.x_row(first + i)) for i in range(count)]
        means, scales = (T.alloc_buffer((count,), "float32") for _ in range(2))
        for i, (mean, scale) in enumerate(self._statistics(sources)):
            T.buffer_store(means, mean, [i])
            T.buffer_store(scales, scale, [i])
        with T.serial(count) as i:
            row = T.bind(first + i)
            source = T.bind(self.kernel.x_row(row))
            mean, scale = T.bind(means[i]), T.bind(scales[i])
            with T.serial(ceil_div(n, width)) as v:
                j = T.bind(T.min(v * width, n - width))
                if self.in_steps:
                    self._store_steps(row, source, j, mean, scale)
                else:
                    self._store(row, source, j, mean, scale)

    def _statistics(self, sources: Sequence[Expr]) -> Iterator[tuple[Expr, Expr]]:
        """Of each row the mean, and what the distances from it are to be multiplied by."""
        n = self.kernel.n

        def element(row: Expr) -> _Term:
            return lambda start, indices: self._x(row, start, indices)

        def squared_distance(row: Expr, mean: Expr) -> _Term:
            def squared(start: Expr, indices: _Indices) -> Expr:
                distance = self._x(row, start, indices) - mean
                return distance * distance

            return squared

        sums = _row_sums(n, self.lanes, [element(row) for row in sources])
        means = [T.bind(total * T.float32(1 / n)) for total in sums]
        terms = [squared_distance(row, mean) for row, mean in zip(sources, means, strict=True)]
        variances = [squares * T.float32(1 / n) for squares in _row_sums(n, self.lanes, terms)]
        eps = T.float32(self.kernel.eps)
        scales = [T.float32(1) / T.sqrt(variance + eps) for variance in variances]
        return zip(means, scales, strict=True)

    def _x(self, row: Expr, start: Expr, indices: _Indices) -> Expr:
        return self.x[_at(row, start, indices, self.kernel.x_in_blocks)]

    def _normal(
        self, source: Expr, start: Expr, indices: _Indices, mean: Expr, scale: Expr
    ) -> Expr:
        of_row = indices(start)
        distance = self._x(source, start, indices) - mean
        return distance * scale * self.gamma[of_row] + self.beta[of_row]

    def _store(self, row: Expr, source: Expr, start: Expr, mean: Expr, scale: Expr) -> None:
        """Writes `width` results of a row."""
        kernel, lanes = self.kernel, self.lanes
        if self.by_vector:
            mean, scale = splat(mean, lanes), splat(scale, lanes)
            starts = [start + i for i in range(0, self.width, lanes)]
            vector = _vector(lanes)
            values = [T.bind(self._normal(source, at, vector, mean, scale)) for at in starts]
            levels = avx512.quantized(values, self.quant, self.storage)
            T.buffer_store(self.y, levels, [row, span(start, self.width)])
            return
        with T.vectorized(self.width) as lane:

            def indices(first: Expr) -> Expr:
                return first + lane

            value = self._normal(source, start, indices, mean, scale)
            value = stored(value, kernel.out, self.quant, self.storage)
            T.buffer_store(self.y, value, list(_at(row, start, indices, kernel.y_in_blocks)))

    def _store_steps(self, row: Expr, source: Expr, start: Expr, mean: Expr, scale: Expr) -> None:
        """Writes `width` results of a row, counted in steps before they are rounded."""
        lanes = neon_epilogue.LANES
        steps = neon_epilogue.Steps(self.quant, ())
        mean, scale = T.broadcast(mean, lanes), T.broadcast(scale, lanes)
        for i in range(0, self.width, 2 * lanes):
            two = [
                T.bind(self._normal(source, start + at, _vector(lanes), mean, scale))
                for at in (i, i + lanes)
            ]
            T.buffer_store(self.y, steps.stored(two), [row, span(start + i, 2 * lanes)])


def _at(row: Expr, start: Expr, indices: _Indices, in_blocks: bool) -> tuple[Expr, ...]:
    """Where the elements of a row are from `start` on; in blocks, all are of one."""
    if in_blocks:
        return start // CHANNEL_BLOCK, row, indices(start % CHANNEL_BLOCK)
    return row, indices(start)


def _vector(lanes: int) -> _Indices:
    return functools.partial(span, lanes=lanes)


def _row_sums(n: int, lanes: int, terms: Sequence[_Term]) -> list[Expr]:
    """Writes the sum of each term over n elements."""
    vectors, rest = divmod(n, lanes)
    ways = min(_ACCUMULATORS, vectors)
    sums = [T.alloc_buffer((ways, lanes), "float32") for _ in terms]

    def add(way: int, vector: Expr) -> None:
        for acc, term in zip(sums, terms, strict=True):
            value = acc[way, span(0, lanes)] + term(vector * lanes, _vector(lanes))
            T.buffer_store(acc, value, [way, span(0, lanes)])

    for acc in sums:
        for way in range(ways):
            T.buffer_store(acc, splat(0.0, lanes), [way, span(0, lanes)])
    with T.serial(vectors // ways) as group:
        for way in range(ways):
            add(way, group * ways + way)
    for way in range(vectors % ways):
        add(way, vectors // ways * ways + way)
    return [_total(n, rest, lanes, acc, term) for acc, term in zip(sums, terms, strict=True)]


def _total(n: int, rest: int, lanes: int, sums: Any, term: _Term) -> Expr:
    """The sum of a row's running sums and of what fills no vector."""
    total = T.alloc_buffer((1,), "float32")
    partial = sums[0, span(0, lanes)]
    for way in range(1, int(sums.shape[0])):
        partial = partial + sums[way, span(0, lanes)]
    T.buffer_store(total, sum_of_lanes(partial, lanes), [0])
    with T.serial(rest) as j:
        T.buffer_store(total, total[0] + term(n - rest + j, _vector(1)), [0])
    return total[0]
