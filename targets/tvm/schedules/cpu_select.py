"""Token selection on a CPU: which tokens are kept, and their rows."""

from tvm import tirx
from tvm.script import tirx as T

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import (
    ActStorage,
    GatherRows,
    InversePermutation,
    Scheduled,
    SelectTokens,
    Step,
)
from gfcompile.targets.tvm.schedules.cpu_tiling import ceil_div, fitting_lanes, row_loop
from gfcompile.targets.tvm.schedules.math import Expr, order_key

# Vectors that a step of a copy moves.
_COPY_VECTORS = 4


def schedule_select_tokens(kernel: SelectTokens, cpu: Cpu, _storage: ActStorage) -> Scheduled:
    """A token's rank is how many come before it: no sorting, no branch but on whether it is kept.

    Every token is compared with every other, a vector of them at a time: for 196 tokens some
    thousand comparisons.
    """
    batch, tokens, kept, leading = kernel.batch, kernel.tokens, kernel.kept, kernel.leading
    lanes = fitting_lanes(tokens, cpu.float_lanes)

    def precedes(key: Expr, token: Expr, other_key: Expr, other: Expr) -> Expr:
        return tirx.Or(key > other_key, tirx.And(key == other_key, token < other))

    @T.prim_func(s_tir=True)
    def select_tokens(
        scores: T.Buffer((batch, tokens), "float32"),
        keys: T.Buffer((batch, tokens), "int32"),
        ranks: T.Buffer((batch, tokens), "int32"),
        y: T.Buffer((batch, leading + kept), kernel.index),
    ):
        T.func_attr({"tirx.noalias": True})
        for b in row_loop(batch, tokens * tokens):
            for v in T.serial(ceil_div(tokens, lanes)):
                i: T.let = T.min(v * lanes, tokens - lanes)
                for lane in T.vectorized(lanes):
                    keys[b, i + lane] = order_key(scores[b, i + lane])
            for v in T.serial(ceil_div(tokens, lanes)):
                i: T.let = T.min(v * lanes, tokens - lanes)
                counts = T.alloc_buffer((lanes,), "int32")
                for lane in T.vectorized(lanes):
                    counts[lane] = 0
                for j in T.serial(tokens):
                    for lane in T.vectorized(lanes):
                        counts[lane] = counts[lane] + T.Select(
                            precedes(keys[b, j], j, keys[b, i + lane], i + lane), 1, 0
                        )
                for lane in T.vectorized(lanes):
                    ranks[b, i + lane] = counts[lane]
            for i in T.serial(leading):
                y[b, i] = T.Cast(kernel.index, i)
            for i in T.serial(tokens):
                if ranks[b, i] < kept:
                    y[b, leading + ranks[b, i]] = T.Cast(kernel.index, i + kernel.offset)

    temps = dict.fromkeys(("keys", "ranks"), ("int32", (batch, tokens)))
    return Scheduled(
        steps=(Step(func=select_tokens, args=("scores", "keys", "ranks", "y")),), temps=temps
    )


def schedule_inverse_permutation(
    kernel: InversePermutation, _cpu: Cpu, _storage: ActStorage
) -> Scheduled:
    """One scattered store per element; far too few of them for more."""
    batch, n = kernel.batch, kernel.n

    @T.prim_func(s_tir=True)
    def inverse_permutation(x: T.Buffer((batch, n), "int64"), y: T.Buffer((batch, n), "int64")):
        T.func_attr({"tirx.noalias": True})
        for b, i in T.grid(batch, n):
            to: T.let = T.max(T.min(T.Cast("int32", x[b, i]), n - 1), 0)
            y[b, to] = T.Cast("int64", i)

    return Scheduled(steps=(Step(func=inverse_permutation, args=("x", "y")),))


def schedule_gather_rows(kernel: GatherRows, cpu: Cpu, _storage: ActStorage) -> Scheduled:
    """Rows copied, vector by vector."""
    batch, tokens, kept, n = kernel.batch, kernel.tokens, kernel.kept, kernel.n
    lanes = fitting_lanes(n, _COPY_VECTORS * cpu.float_lanes)

    @T.prim_func(s_tir=True)
    def gather_rows(
        x: T.Buffer((batch, tokens, n), "float32"),
        indices: T.Buffer((batch, kept), "int32"),
        y: T.Buffer((batch, kept, n), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for row in row_loop(batch * kept, n):
            b: T.let = row // kept
            i: T.let = row % kept
            token: T.let = T.max(T.min(indices[b, i], tokens - 1), 0)
            for v in T.serial(ceil_div(n, lanes)):
                j: T.let = T.min(v * lanes, n - lanes)
                for lane in T.vectorized(lanes):
                    y[b, i, j + lane] = x[b, token, j + lane]

    return Scheduled(steps=(Step(func=gather_rows, args=("x", "indices", "y")),))
