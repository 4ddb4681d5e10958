"""Which tokens go on, and their rows, for CUDA."""

from tvm import tirx
from tvm.script import tirx as T

from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.kernel import (
    ActStorage,
    GatherRows,
    InversePermutation,
    Scheduled,
    SelectTokens,
    Step,
)
from gfcompile.targets.tvm.schedules.gpu_dense import all_of, within
from gfcompile.targets.tvm.schedules.math import order_key

_SELECT_THREADS = 128
_CHUNK = 1024  # scores in shared memory at a time
_GATHER_THREADS = 256


def schedule_select_tokens(kernel: SelectTokens, gpu: Gpu, storage: ActStorage) -> Scheduled:  # noqa: ARG001
    """A thread per token counts the better ones, and so knows where its index goes.

    No sort, no second pass, and every place is written once: the ranks are a permutation.
    """
    batch, tokens, kept = kernel.batch, kernel.tokens, kernel.kept
    leading, offset = kernel.leading, kernel.offset
    assert kept <= tokens, "no more tokens can be kept than there are"
    chunk = min(_CHUNK, tokens)
    chunks = -(-tokens // chunk)
    copies = -(-chunk // _SELECT_THREADS)

    @T.prim_func(s_tir=True)
    def select_tokens(
        scores: T.Buffer((batch, tokens), "float32"),
        y: T.Buffer((batch, leading + kept), kernel.index),
    ):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", -(-max(tokens, leading) // _SELECT_THREADS))
        image = T.launch_thread("blockIdx.y", batch)
        thread = T.launch_thread("threadIdx.x", _SELECT_THREADS)
        keys = T.alloc_buffer((chunk,), "int32", scope="shared")
        own = T.alloc_buffer((1,), "int32", scope="local")
        rank = T.alloc_buffer((1,), "int32", scope="local")
        token: T.let = block * _SELECT_THREADS + thread
        own[0] = order_key(scores[image, tirx.min(token, tokens - 1)])
        rank[0] = 0
        for first in T.serial(chunks, unroll=False):
            T.tvm_storage_sync("shared")
            for copy in T.serial(copies, unroll=False):
                place: T.let = copy * _SELECT_THREADS + thread
                if all_of(
                    within(place, chunk, chunk % _SELECT_THREADS == 0),
                    within(first * chunk + place, tokens, tokens % chunk == 0),
                ):
                    keys[place] = order_key(scores[image, first * chunk + place])
            T.tvm_storage_sync("shared")
            for place in T.serial(tirx.min(chunk, tokens - first * chunk)):
                earlier: T.let = first * chunk + place < token
                rank[0] = rank[0] + T.Cast(
                    "int32", keys[place] > own[0] or (keys[place] == own[0] and earlier)
                )
        if token < tokens and rank[0] < kept:
            y[image, leading + rank[0]] = T.Cast(kernel.index, token + offset)
        if token < leading:
            y[image, token] = T.Cast(kernel.index, token)

    return Scheduled(steps=(Step(func=select_tokens, args=("scores", "y")),))


def schedule_inverse_permutation(
    kernel: InversePermutation, _gpu: Gpu, _storage: ActStorage
) -> Scheduled:
    """A thread per element."""
    batch, n = kernel.batch, kernel.n

    @T.prim_func(s_tir=True)
    def inverse_permutation(x: T.Buffer((batch, n), "int64"), y: T.Buffer((batch, n), "int64")):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", -(-n // _SELECT_THREADS))
        row = T.launch_thread("blockIdx.y", batch)
        thread = T.launch_thread("threadIdx.x", _SELECT_THREADS)
        i: T.let = block * _SELECT_THREADS + thread
        if i < n:
            to: T.let = tirx.max(tirx.min(T.Cast("int32", x[row, i]), n - 1), 0)
            y[row, to] = T.Cast("int64", i)

    return Scheduled(steps=(Step(func=inverse_permutation, args=("x", "y")),))


def schedule_gather_rows(kernel: GatherRows, gpu: Gpu, storage: ActStorage) -> Scheduled:  # noqa: ARG001
    """A thread per value, or per four neighbours of a row."""
    batch, tokens, kept, n = kernel.batch, kernel.tokens, kernel.kept, kernel.n
    width = 4 if n % 4 == 0 else 1
    row_pieces = n // width
    pieces = batch * kept * row_pieces

    @T.prim_func(s_tir=True)
    def gather_rows(
        x: T.Buffer((batch, tokens, n), "float32"),
        indices: T.Buffer((batch, kept), "int32"),
        y: T.Buffer((batch, kept, n), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", -(-pieces // _GATHER_THREADS))
        thread = T.launch_thread("threadIdx.x", _GATHER_THREADS)
        piece: T.let = block * _GATHER_THREADS + thread
        if all_of(within(piece, pieces, pieces % _GATHER_THREADS == 0)):
            image: T.let = piece // (kept * row_pieces)
            row: T.let = piece // row_pieces % kept
            column: T.let = piece % row_pieces * width
            token: T.let = T.max(T.min(indices[image, row], tokens - 1), 0)
            for v in T.vectorized(width):
                y[image, row, column + v] = x[image, token, column + v]

    return Scheduled(steps=(Step(func=gather_rows, args=("x", "indices", "y")),))
