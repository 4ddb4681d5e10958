"""Layer normalization on a CPU: a row stays in the first-level cache for its three passes."""

from collections.abc import Callable, Mapping
from typing import Any

from tvm.script import tirx as T

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Array, LayerNorm, Scheduled, Step
from gfcompile.targets.tvm.schedules import neon_epilogue
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

# Enough independent sums to keep the adders busy while each waits for its own last result.
_ACCUMULATORS = 4


def schedule_layer_norm(kernel: LayerNorm, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """Mean, then the variance about it (E[x^2] - E[x]^2 would cancel), then the row."""
    n, eps = kernel.n, kernel.eps
    lanes = fitting_lanes(n, cpu.float_lanes)
    # Of the last pass, as many vectors as fill one when they are narrowed to bytes.
    width = next(
        lanes * vectors for vectors in (4, 2, 1) if n % (lanes * vectors) == 0 or vectors == 1
    )
    pairs = 2 * neon_epilogue.LANES
    in_steps = kernel.out == "int8" and storage.saturates and n % pairs == 0
    quant_args = neon_epilogue.STEPS_ARGS if in_steps else 4

    def element(x: Any, row: Expr) -> Callable[[Expr], Expr]:
        return lambda j: x[row, j]

    def squared_distance(x: Any, row: Expr, mean: Expr) -> Callable[[Expr], Expr]:
        return lambda j: (x[row, j] - mean) * (x[row, j] - mean)

    @T.prim_func(s_tir=True)
    def layer_norm(
        x: T.Buffer((kernel.x_rows, n), "float32"),
        gamma: T.Buffer((n,), "float32"),
        beta: T.Buffer((n,), "float32"),
        quant: T.Buffer((quant_args,), "float32"),
        y: T.Buffer((kernel.rows, n), storage.dtype_of(kernel.out)),
    ):
        T.func_attr({"tirx.noalias": True})
        for row in row_loop(kernel.rows, n):
            source: T.let = kernel.x_row(row)
            mean: T.let = _row_sum(n, lanes, element(x, source)) * T.float32(1 / n)
            squares: T.let = _row_sum(n, lanes, squared_distance(x, source, mean))
            variance: T.let = squares * T.float32(1 / n)
            scale: T.let = T.float32(1) / T.sqrt(variance + T.float32(eps))
            for v in T.serial(ceil_div(n, width)):
                j: T.let = T.min(v * width, n - width)
                if in_steps:
                    _store_steps(x, source, gamma, beta, quant, y, row, j, width, mean, scale)
                else:
                    for lane in T.vectorized(width):
                        y[row, j + lane] = stored(
                            (x[source, j + lane] - mean) * scale * gamma[j + lane] + beta[j + lane],
                            kernel.out,
                            quant,
                            storage,
                        )

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


def _store_steps(
    x: Any,
    source: Expr,
    gamma: Any,
    beta: Any,
    quant: Any,
    y: Any,
    row: Expr,
    start: Expr,
    width: int,
    mean: Expr,
    scale: Expr,
) -> None:
    """Writes `width` results of a row, counted in steps before they are rounded."""
    lanes = neon_epilogue.LANES
    steps = neon_epilogue.Steps(quant, ())

    def value(at: Expr) -> Expr:
        distance = x[source, span(at, lanes)] - T.broadcast(mean, lanes)
        normal = distance * T.broadcast(scale, lanes)
        return T.bind(normal * gamma[span(at, lanes)] + beta[span(at, lanes)])

    for i in range(0, width, 2 * lanes):
        two = [value(start + i), value(start + i + lanes)]
        T.buffer_store(y, steps.stored(two), [row, span(start + i, 2 * lanes)])


def _row_sum(n: int, lanes: int, term: Callable[[Expr], Expr]) -> Expr:
    """Writes the sum of `term` over n elements, whose index is a vector's or a single one."""
    vectors, rest = divmod(n, lanes)
    ways = min(_ACCUMULATORS, vectors)
    sums = T.alloc_buffer((ways, lanes), "float32")

    def add(way: int, vector: Expr) -> None:
        value = sums[way, span(0, lanes)] + term(span(vector * lanes, lanes))
        T.buffer_store(sums, value, [way, span(0, lanes)])

    for way in range(ways):
        T.buffer_store(sums, splat(0.0, lanes), [way, span(0, lanes)])
    with T.serial(vectors // ways) as group:
        for way in range(ways):
            add(way, group * ways + way)
    for way in range(vectors % ways):
        add(way, vectors // ways * ways + way)
    total = T.alloc_buffer((1,), "float32")
    partial = sums[0, span(0, lanes)]
    for way in range(1, ways):
        partial = partial + sums[way, span(0, lanes)]
    T.buffer_store(total, sum_of_lanes(partial, lanes), [0])
    with T.serial(rest) as j:
        T.buffer_store(total, total[0] + term(n - rest + j), [0])
    return total[0]
