"""Attention and softmax for CUDA.

A block computes a tile of one head's rows from start to end: their scores against all keys, kept
in shared memory, the softmax over them, a warp per row, and the product with the values. Queries,
keys and values pass through shared memory in slices, and each thread keeps a tile of scores or of
outputs in registers. Nothing but q, k, v and the result is in global memory.

Products are computed as in gpu_dense: float32; dp4a; or int8 widened to float32. Constants that
are the same along a row of scores leave its softmax as it is, so the zero point of k is ignored.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.kernel import ActStorage, Attention, Scheduled, Softmax, Step
from gfcompile.targets.tvm.schedules.gpu_dense import Mode, all_of, within
from gfcompile.targets.tvm.schedules.gpu_norm import loop, slot, warp_partner
from gfcompile.targets.tvm.schedules.math import exp, float32, quantize
from gfcompile.targets.tvm.schedules.params import keep_params

_SHARED_BYTES = 48 * 1024
# |(q - q_zero) k| <= 255 * 128, so a float32 counts 512 products exactly; longer sums go on in
# int32. Products with the values need no such care: 255 times a row's weights, which are at most
# 512 in all since rint(v) <= 2 v.
_EXACT_PRODUCTS = 512
_BYTE_ONES = 0x01010101
_SIGN_BITS = -0x7F7F7F80  # 0x80808080: a byte of 0 ... 255 less 128, for all four
_MEMORY_CYCLES = 400  # from a load to its value
_MOST_REGISTERS = 128
_HELD_PIECES = 8  # of four scores of a row, in a lane's registers
_SOFTMAX_ROWS = 4  # rows, and so warps, of a block
_HELD = 32  # values of a row that a lane keeps in registers; a longer row is read three times
_LOWEST = -3.4028234663852886e38


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a block shares out its rows.

    Attributes:
        tm: rows of one thread.
        tn: keys of one thread, of the keys in shared memory at a time.
        groups: how many times four channels of the output one thread computes.
        ty, tx: threads along rows and along keys or channels.
        bk: channels of queries and keys in shared memory at a time, in units (floats, or words of
            four int8).
        bt: values in shared memory at a time, in units (rows, or words of four rows).
    """

    tm: int
    tn: int
    groups: int
    ty: int
    tx: int
    bk: int
    bt: int

    @property
    def rows(self) -> int:
        return self.tm * self.ty

    @property
    def keys(self) -> int:
        return self.tn * self.tx

    @property
    def columns(self) -> int:
        return 4 * self.groups * self.tx

    @property
    def threads(self) -> int:
        return self.ty * self.tx

    @property
    def rows_per_warp(self) -> int:
        return self.tm * 32 // self.tx


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What follows from a kernel, how it multiplies, and a tile."""

    depth: int  # channels of a head, in units
    depth_steps: int
    key_tiles: int
    weights: int  # of a row, in units, padded to whole slices of values
    padded_tokens: int
    column_tiles: int
    slice_stride: int  # of a row of queries or keys in shared memory
    score_stride: int
    word_stride: int  # of a row of packed weights; dp4a only
    shared_bytes: int
    registers: int  # of a thread, about


def _sizes(kernel: Attention, mode: Mode, tile: Tile) -> _Sizes:
    lanes = 4 if mode == "dp4a" else 1
    depth = kernel.dim // lanes
    weights = -(-kernel.tokens // (lanes * tile.bt)) * tile.bt
    score_stride = _stride(weights * lanes)
    word_stride = _stride(weights) if mode == "dp4a" else 0
    slice_stride = _stride(tile.bk)
    staged = max((tile.rows + tile.keys) * slice_stride, tile.bt * tile.columns)
    return _Sizes(
        depth=depth,
        depth_steps=-(-depth // tile.bk),
        key_tiles=-(-kernel.tokens // tile.keys),
        weights=weights,
        padded_tokens=weights * lanes,
        column_tiles=-(-kernel.dim // tile.columns),
        slice_stride=slice_stride,
        score_stride=score_stride,
        word_stride=word_stride,
        shared_bytes=sum(
            -(-words // 16) * 64
            for words in (tile.rows * score_stride, tile.rows * word_stride, tile.rows, staged)
        ),
        registers=_registers(tile, kernel, mode, weights * lanes),
    )


def _stride(length: int) -> int:
    """At least `length`, in an odd number of 16-byte pieces: rows start in different banks."""
    return (-(-length // 4) | 1) * 4


def _tiles(kernel: Attention, mode: Mode) -> Iterator[Tile]:
    lanes = 4 if mode == "dp4a" else 1
    # Channels at a time: not much under 32 bytes in a row, and all there are, if few.
    depth = -(-kernel.dim // lanes)
    wanted = (16, 32) if mode == "widened" else (8, 16, 32)
    channel_slices = sorted({min(size, -(-depth // 4) * 4) for size in wanted})
    # Values at a time: what adds the least padding, large slices first.
    weights = -(-kernel.tokens // lanes)
    value_slices = sorted(range(32, 3, -4), key=lambda size: -(-weights // size) * size)[:3]
    shapes = ((8, 8), (4, 16), (16, 8), (8, 16), (4, 32), (16, 16), (2, 16), (1, 32))
    for (ty, tx), tm, tn in itertools.product(shapes, range(1, 9), range(1, 9)):
        if ty * (tm - 1) >= kernel.tokens or tx * (tn - 1) >= kernel.tokens:
            continue  # whole rounds of rows or keys that do not exist
        for groups, bk, bt in itertools.product((1, 2), channel_slices, value_slices):
            yield Tile(tm=tm, tn=tn, groups=groups, ty=ty, tx=tx, bk=bk, bt=bt)


def tile_cycles(tile: Tile, sizes: _Sizes, kernel: Attention, gpu: Gpu, mode: Mode) -> float:
    """A static estimate of a kernel's time: cycles of a multiprocessor.

    Four warps issue at once; shared memory passes 128 bytes a cycle, which bounds small tiles; and
    a block waits for memory at each slice, while only the other resident blocks compute.
    """
    dp4a = mode == "dp4a"
    copy_cost = 12 if mode == "widened" else 6
    wavefronts = max(1, tile.tx // 8)  # of 16 bytes for each of the lanes along keys or channels

    staged = _copies((tile.rows + tile.keys) * tile.bk // 4, tile)
    score_issue = (
        (tile.tm + dp4a) * tile.tn * tile.bk
        + tile.bk // 4 * (tile.tm + tile.tn)
        + staged * copy_cost
        + 14
    )
    score_shared = 4 * (tile.bk // 4 * (tile.tm + tile.tn * wavefronts) + 4 * staged)
    scores = sizes.depth_steps * max(score_issue, score_shared) + 3 * tile.tm * tile.tn

    passes = -(-sizes.padded_tokens // 32)
    softmax = tile.rows_per_warp * (passes * (20 + 8 * (mode != "float")) + 60)

    staged = _copies(tile.bt * tile.columns // 4, tile) * (4 if dp4a else 1)
    value_issue = (
        (tile.tm + dp4a) * 4 * tile.groups * tile.bt
        + tile.bt // 4 * tile.tm
        + tile.bt * tile.groups
        + staged * copy_cost
        + 14
    )
    value_shared = 4 * (tile.bt // 4 * tile.tm + tile.bt * tile.groups * wavefronts + 4 * staged)
    slices = sizes.weights // tile.bt
    values = slices * max(value_issue, value_shared) + 4 * tile.groups * tile.tm * (
        12 if kernel.out == "int8" else 4
    )

    instructions = sizes.key_tiles * scores + softmax + sizes.column_tiles * values
    warps = tile.threads // 32
    waits = sizes.key_tiles * sizes.depth_steps + sizes.column_tiles * slices
    waits += tile.rows_per_warp // _rows_together(tile)  # for the warp's other lanes
    alone = max(1.0, warps / 4) * instructions + waits * _MEMORY_CYCLES
    resident = min(
        gpu.blocks_per_sm,
        gpu.registers_per_sm // (sizes.registers * warps * 32),
        gpu.shared_bytes_per_sm // sizes.shared_bytes,
        gpu.threads_per_sm // (warps * 32),
    )
    if not resident:
        return float("inf")

    def together(blocks: int) -> float:
        return max(blocks * warps * instructions / 4, alone) if blocks else 0.0

    blocks = kernel.batch * kernel.heads * -(-kernel.tokens // tile.rows)
    waves, rest = divmod(-(-blocks // gpu.sms), resident)
    return waves * together(resident) + together(rest)


def _copies(pieces: int, tile: Tile) -> int:
    return -(-pieces // tile.threads)


def _registers(tile: Tile, kernel: Attention, mode: Mode, padded_tokens: int) -> int:
    long_sum = mode == "widened" and kernel.dim > _EXACT_PRODUCTS
    scores = tile.tm * tile.tn * (1 + long_sum) + 4 * tile.tm + 4 + tile.tn
    _, run_pieces = _runs(padded_tokens)
    softmax = _rows_together(tile) * (4 * run_pieces + 3) + 16
    values = 4 * tile.groups * (tile.tm + 2) + 4 * tile.tm
    return -(-(max(scores, softmax, values) + 32) // 8) * 8


def _runs(padded_tokens: int) -> tuple[int, int]:
    """How a warp goes through a row of scores, four neighbouring keys a lane at a time.

    Returns:
        How many runs over the lanes' registers, and how many times four keys a lane holds in one.
    """
    pieces = -(-padded_tokens // 128)
    runs = -(-pieces // _HELD_PIECES)
    return runs, -(-pieces // runs)


@functools.cache
def choose_tile(kernel: Attention, gpu: Gpu, mode: Mode) -> Tile:
    """The tile of least estimated time.

    Raises:
        CompileError: one row of scores is more than a block's shared memory.
    """
    candidates = ((tile, _sizes(kernel, mode, tile)) for tile in _tiles(kernel, mode))
    fitting = {
        tile: tile_cycles(tile, sizes, kernel, gpu, mode)
        for tile, sizes in candidates
        if sizes.shared_bytes <= _SHARED_BYTES and sizes.registers <= _MOST_REGISTERS
    }
    if not fitting:
        raise CompileError(
            f"attention over {kernel.tokens} tokens: a row of scores does not fit into a block's "
            f"{_SHARED_BYTES // 1024} KB of shared memory on {gpu.arch}; use a smaller image"
        )
    return min(fitting, key=lambda tile: fitting[tile])


def product_mode(kernel: Attention, gpu: Gpu) -> Mode:
    """What the products of `kernel` are computed in on `gpu`."""
    if kernel.x == "float32":
        return "float"
    # A head that is no whole number of words cannot be read as words.
    return "dp4a" if gpu.int8_dot and kernel.dim % 4 == 0 else "widened"


def schedule_attention(kernel: Attention, gpu: Gpu, storage: ActStorage) -> Scheduled:
    """Attention as one CUDA kernel; s_scale must be positive."""
    assert storage == ActStorage(), "CUDA kernels keep int8 activations as they are"
    mode = product_mode(kernel, gpu)
    func = _attention(kernel, storage, mode, choose_tile(kernel, gpu, mode))
    args = ("x", "params", *(("quant",) if kernel.out == "int8" else ()), "y")
    return Scheduled(steps=(Step(func=keep_params(func, args), args=args),))


def _attention(kernel: Attention, storage: ActStorage, mode: Mode, tile: Tile) -> Any:
    batch, tokens, heads, dim = kernel.batch, kernel.tokens, kernel.heads, kernel.dim
    sizes = _sizes(kernel, mode, tile)
    depth = sizes.depth
    rows = batch * tokens
    dp4a = mode == "dp4a"
    unit = "int32" if dp4a else "float32"
    stored = {"float": "float32", "widened": "int8", "dp4a": "int32"}[mode]
    x_vector = 4 if depth % 4 == 0 else 1
    y_vector = 4 if dim % 4 == 0 else 1

    spans = -(-dim // _EXACT_PRODUCTS) if mode == "widened" else 1
    span_steps = -(-sizes.depth_steps // spans)
    long_sum = spans > 1
    exact_depth = spans * span_steps * tile.bk == depth
    exact_rows = tokens % tile.rows == 0
    exact_keys = tokens % tile.keys == 0
    exact_columns = dim % tile.columns == 0
    exact_tokens = sizes.padded_tokens == tokens

    keys_at = tile.rows * sizes.slice_stride  # of `staged`, behind the queries
    staged_size = max(keys_at + tile.keys * sizes.slice_stride, tile.bt * tile.columns)
    value_pieces = tile.bt * tile.columns // 4
    value_row_pieces = tile.columns // 4
    value_copies = _copies(value_pieces, tile)
    slices = sizes.weights // tile.bt
    channels = 4 * tile.groups
    together = _rows_together(tile)
    runs, run_pieces = _runs(sizes.padded_tokens)

    def key_of(run: Any, value: Any, lane: Any) -> Any:
        """The key whose score is a lane's register `value` in that run over the row."""
        return ((run * run_pieces + value // 4) * 32 + lane) * 4 + value % 4

    def multiply_add(total: Any, a: Any, b: Any) -> Any:
        return _dp4a(a, b, total) if dp4a else total + a * b

    def query(value: Any, params: Any) -> Any:
        """As it goes into the product; dp4a has the zero point's share from the keys' sums."""
        value = tirx.Cast(unit, value)
        return value - params[1] if mode == "widened" else value

    def score(acc: Any, sums: Any, key_sum: Any, params: Any) -> Any:
        """A finished product, in the product's own scale."""
        if dp4a:
            return tirx.Cast("float32", acc - tirx.Cast("int32", params[1]) * key_sum)
        return tirx.Cast("float32", sums) if long_sum else acc

    def value_of(stored_value: Any, params: Any) -> Any:
        value = tirx.Cast("float32", stored_value)
        return value - params[3] if mode == "widened" else value

    def finish(acc: Any, value_sum: Any, norm: Any, params: Any, quant: Any) -> Any:
        """An output from its sum over the row's weights."""
        if dp4a:  # the weights are 128 less than they should be
            zero = tirx.Cast("int32", params[3]) * tirx.Cast("int32", norm)
            acc = tirx.Cast("float32", acc + value_sum * 128 - zero)
        acc = acc * (norm if mode == "float" else params[4])
        return quantize(acc, quant, storage) if kernel.out == "int8" else acc

    @T.prim_func(s_tir=True)
    def attention(
        x: T.Buffer((rows, 3 * heads * depth), stored),
        params: T.Buffer((5,), "float32"),
        quant: T.Buffer((4,), "float32"),
        y: T.Buffer((rows, heads * dim), kernel.out),
    ):
        T.func_attr({"tirx.noalias": True})
        row_block = T.launch_thread("blockIdx.x", -(-tokens // tile.rows))
        head = T.launch_thread("blockIdx.y", heads)
        image = T.launch_thread("blockIdx.z", batch)
        thread = T.launch_thread("threadIdx.x", tile.threads)
        scores = T.alloc_buffer((tile.rows, sizes.score_stride), "float32", scope="shared")
        packed = T.alloc_buffer((tile.rows, max(sizes.word_stride, 1)), "int32", scope="shared")
        norms = T.alloc_buffer((tile.rows,), "float32", scope="shared")
        staged = T.alloc_buffer((staged_size,), unit, scope="shared")
        acc = T.alloc_buffer((tile.tm, tile.tn), unit, scope="local")
        sums = T.alloc_buffer((tile.tm, tile.tn), "int32", scope="local")
        key_sums = T.alloc_buffer((tile.tn,), "int32", scope="local")
        a = T.alloc_buffer((tile.tm, 4), unit, scope="local")
        b = T.alloc_buffer((channels,), unit, scope="local")
        best = T.alloc_buffer((together,), "float32", scope="local")
        total = T.alloc_buffer((together,), "float32", scope="local")
        factor = T.alloc_buffer((together,), "float32", scope="local")
        held = T.alloc_buffer((together, run_pieces * 4), "float32", scope="local")
        four_words = T.alloc_buffer((4,), "int32", scope="local")
        out = T.alloc_buffer((tile.tm, channels), unit, scope="local")
        value_sums = T.alloc_buffer((channels,), "int32", scope="local")
        result = T.alloc_buffer((4,), kernel.out, scope="local")
        ty: T.let = thread // tile.tx
        tx: T.let = thread % tile.tx
        lane: T.let = thread % 32
        warp: T.let = thread // 32

        @T.inline
        def stage(place, count, first_row, column, start, convert):
            """Rows first_row ... of one part of x, channels start ..., to staged[place ...]."""
            for copy in copies(count * tile.bk // x_vector, tile, x_vector):
                piece: T.let = copy * tile.threads + thread
                row: T.let = piece // (tile.bk // x_vector)
                channel: T.let = piece % (tile.bk // x_vector) * x_vector
                if all_of(within_pieces(piece, count * tile.bk // x_vector, tile)):
                    if all_of(
                        within(first_row + row, tokens, False),
                        within(start + channel, depth, exact_depth),
                    ):
                        for v in T.vectorized(x_vector):
                            staged[place + row * sizes.slice_stride + channel + v] = convert(
                                x[image * tokens + first_row + row, column + start + channel + v],
                                params,
                            )
                    else:
                        for v in T.vectorized(x_vector):
                            staged[place + row * sizes.slice_stride + channel + v] = T.Cast(unit, 0)

        # Scores: q @ k.T
        for key_tile in T.serial(sizes.key_tiles, unroll=False):
            if long_sum:
                for i in T.unroll(tile.tm):
                    for j in T.unroll(tile.tn):
                        sums[i, j] = 0
            if dp4a:
                for j in T.unroll(tile.tn):
                    key_sums[j] = 0
            for span in T.serial(spans, unroll=False):
                for i in T.unroll(tile.tm):
                    for j in T.unroll(tile.tn):
                        acc[i, j] = T.Cast(unit, 0)
                for step in T.serial(span_steps, unroll=False):
                    start: T.let = (span * span_steps + step) * tile.bk
                    T.tvm_storage_sync("shared")
                    stage(0, tile.rows, row_block * tile.rows, head * depth, start, query)
                    stage(
                        keys_at,
                        tile.keys,
                        key_tile * tile.keys,
                        (heads + head) * depth,
                        start,
                        lambda value, _params: tirx.Cast(unit, value),
                    )
                    T.tvm_storage_sync("shared")
                    for quad in T.serial(tile.bk // 4, unroll=False):
                        for i in T.unroll(tile.tm):
                            for v in T.vectorized(4):
                                a[i, v] = staged[
                                    (i * tile.ty + ty) * sizes.slice_stride + quad * 4 + v
                                ]
                        for j in T.unroll(tile.tn):
                            for v in T.vectorized(4):
                                b[v] = staged[
                                    keys_at + (j * tile.tx + tx) * sizes.slice_stride + quad * 4 + v
                                ]
                            for i in T.unroll(tile.tm):
                                for v in T.unroll(4):
                                    acc[i, j] = multiply_add(acc[i, j], a[i, v], b[v])
                            if dp4a:
                                for v in T.unroll(4):
                                    key_sums[j] = _dp4a(b[v], _BYTE_ONES, key_sums[j])
                if long_sum:
                    for i in T.unroll(tile.tm):
                        for j in T.unroll(tile.tn):
                            sums[i, j] = sums[i, j] + T.Cast("int32", acc[i, j])
            for j in T.unroll(tile.tn):
                key: T.let = key_tile * tile.keys + j * tile.tx + tx
                if all_of(within(key, tokens, exact_keys)):
                    for i in T.unroll(tile.tm):
                        scores[i * tile.ty + ty, key] = score(
                            acc[i, j], sums[i, j], key_sums[j], params
                        )
        T.tvm_storage_sync("shared")

        @T.inline
        def read_scores(first, run):
            """`together` rows of scores to registers, four neighbouring keys at a time."""
            for r in T.unroll(together):
                for piece in T.unroll(run_pieces):
                    quad: T.let = (run * run_pieces + piece) * 32 + lane
                    if all_of(within(quad * 4, sizes.padded_tokens, False)):
                        for v in T.vectorized(4):
                            held[r, piece * 4 + v] = scores[first + r, quad * 4 + v]

        @T.inline
        def exponentiate(run):
            for r in T.unroll(together):
                for value in T.unroll(run_pieces * 4):
                    if all_of(within(key_of(run, value, lane), tokens, False)):
                        held[r, value] = exp((held[r, value] - best[r]) * params[0])
                    else:
                        held[r, value] = T.float32(0)

        @T.inline
        def add_lanes():
            for level in T.unroll(5):
                for r in T.unroll(together):
                    total[r] = total[r] + warp_partner(total[r], level)

        # Softmax of each row, whose weights take the scores' place
        for group in T.serial(tile.rows_per_warp // together, unroll=False):
            first: T.let = warp * tile.rows_per_warp + group * together
            for r in T.unroll(together):
                best[r] = T.float32(_LOWEST)
                total[r] = T.float32(0)
            for run in T.serial(runs, unroll=False):
                read_scores(first, run)
                for r in T.unroll(together):
                    for value in T.unroll(run_pieces * 4):
                        if all_of(within(key_of(run, value, lane), tokens, False)):
                            best[r] = T.max(best[r], held[r, value])
            for level in T.unroll(5):
                for r in T.unroll(together):
                    best[r] = T.max(best[r], warp_partner(best[r], level))
            for run in T.serial(runs, unroll=False):
                if runs > 1:
                    read_scores(first, run)
                exponentiate(run)
                for r in T.unroll(together):
                    for value in T.unroll(run_pieces * 4):
                        total[r] = total[r] + held[r, value]
            add_lanes()
            for r in T.unroll(together):
                factor[r] = T.float32(1 if mode == "float" else 256) / total[r]
                total[r] = T.float32(0)
            for run in T.serial(runs, unroll=False):
                if runs > 1:
                    read_scores(first, run)
                    exponentiate(run)
                if mode != "float":
                    for r in T.unroll(together):
                        for value in T.unroll(run_pieces * 4):
                            held[r, value] = _weight(held[r, value], factor[r])
                            total[r] = total[r] + held[r, value]
                for r in T.unroll(together):
                    for piece in T.unroll(run_pieces):
                        quad: T.let = (run * run_pieces + piece) * 32 + lane
                        if all_of(within(quad * 4, sizes.padded_tokens, False)):
                            if dp4a:
                                packed[first + r, quad] = _word(
                                    [T.Cast("int32", held[r, piece * 4 + v]) for v in range(4)]
                                ) ^ _int32(_SIGN_BITS)
                            else:
                                for v in T.vectorized(4):
                                    scores[first + r, quad * 4 + v] = held[r, piece * 4 + v]
            if dp4a:
                add_lanes()
            if lane == 0:
                for r in T.unroll(together):
                    norms[first + r] = factor[r] if mode == "float" else total[r]

        # Outputs: weights @ v
        for column_tile in T.serial(sizes.column_tiles, unroll=False):
            for j in T.unroll(channels):
                for i in T.unroll(tile.tm):
                    out[i, j] = T.Cast(unit, 0)
                if dp4a:
                    value_sums[j] = 0
            for step in T.serial(slices, unroll=False):
                T.tvm_storage_sync("shared")
                for copy in T.serial(value_copies, unroll=2):
                    piece: T.let = copy * tile.threads + thread
                    row: T.let = step * tile.bt + piece // value_row_pieces
                    channel: T.let = column_tile * tile.columns + piece % value_row_pieces * 4
                    if all_of(within_pieces(piece, value_pieces, tile)):
                        if dp4a:
                            for v in T.unroll(4):
                                if all_of(
                                    within(row * 4 + v, tokens, exact_tokens),
                                    within(channel, dim, exact_columns),
                                ):
                                    four_words[v] = x[
                                        image * tokens + row * 4 + v,
                                        (2 * heads + head) * depth + channel // 4,
                                    ]
                                else:
                                    four_words[v] = 0
                            for v in T.vectorized(4):
                                staged[piece * 4 + v] = transposed(four_words, v)
                        else:
                            if all_of(
                                within(row, tokens, exact_tokens),
                                within(channel, dim, exact_columns),
                            ):
                                if y_vector == 4:
                                    for v in T.vectorized(4):
                                        staged[piece * 4 + v] = value_of(
                                            x[
                                                image * tokens + row,
                                                (2 * heads + head) * depth + channel + v,
                                            ],
                                            params,
                                        )
                                else:
                                    for v in T.unroll(4):
                                        staged[piece * 4 + v] = value_of(
                                            x[
                                                image * tokens + row,
                                                (2 * heads + head) * depth
                                                + T.min(channel + v, dim - 1),
                                            ],
                                            params,
                                        )
                            else:
                                for v in T.vectorized(4):
                                    staged[piece * 4 + v] = T.Cast(unit, 0)
                T.tvm_storage_sync("shared")
                for quad in T.serial(tile.bt // 4, unroll=False):
                    for i in T.unroll(tile.tm):
                        for v in T.vectorized(4):
                            if dp4a:
                                a[i, v] = packed[i * tile.ty + ty, step * tile.bt + quad * 4 + v]
                            else:
                                a[i, v] = scores[i * tile.ty + ty, step * tile.bt + quad * 4 + v]
                    for inner in T.unroll(4):
                        for group in T.unroll(tile.groups):
                            for v in T.vectorized(4):
                                b[group * 4 + v] = staged[
                                    (quad * 4 + inner) * tile.columns
                                    + (group * tile.tx + tx) * 4
                                    + v
                                ]
                        for j in T.unroll(channels):
                            for i in T.unroll(tile.tm):
                                out[i, j] = multiply_add(out[i, j], a[i, inner], b[j])
                            if dp4a:
                                value_sums[j] = _dp4a(b[j], _BYTE_ONES, value_sums[j])
            for i in T.unroll(tile.tm):
                row: T.let = row_block * tile.rows + i * tile.ty + ty
                if all_of(within(row, tokens, exact_rows)):
                    for group in T.unroll(tile.groups):
                        channel: T.let = column_tile * tile.columns + (group * tile.tx + tx) * 4
                        if all_of(within(channel, dim, exact_columns)):
                            for v in T.unroll(4):
                                result[v] = finish(
                                    out[i, group * 4 + v],
                                    value_sums[group * 4 + v],
                                    norms[i * tile.ty + ty],
                                    params,
                                    quant,
                                )
                            if y_vector == 4:
                                for v in T.vectorized(4):
                                    y[image * tokens + row, head * dim + channel + v] = result[v]
                            else:
                                for v in T.unroll(4):
                                    if channel + v < dim:
                                        y[image * tokens + row, head * dim + channel + v] = result[
                                            v
                                        ]

    return attention


def _rows_together(tile: Tile) -> int:
    """How many rows a warp normalizes at a time: two hide each other's latency."""
    return 2 if tile.rows_per_warp % 2 == 0 else 1


def copies(pieces: int, tile: Tile, vector: int) -> Any:
    """The loop in which a block copies so many pieces; single elements are many."""
    count = _copies(pieces, tile)
    return T.unroll(count) if vector == 4 else T.serial(count, unroll=False)


def within_pieces(piece: Any, pieces: int, tile: Tile) -> Any:
    """Whether this thread has a piece to copy."""
    return within(piece, pieces, pieces % tile.threads == 0)


def transposed(words: Any, byte: Any) -> Any:
    """Byte `byte` of each of four words, as a word."""
    return _word([(words[row] >> (byte * 8)) & _int32(0xFF) for row in range(4)])


def _word(values: list[Any]) -> Any:
    """Four values of 0 to 255 as the bytes of a word, lowest first."""
    word = values[0]
    for position, value in enumerate(values[1:], start=1):
        word = word | (value << _int32(8 * position))
    return word


def _weight(exponential: Any, factor: Any) -> Any:
    """A quantized weight of the softmax, plus 128: 0 to 255."""
    rounded = T.call_pure_extern("float32", "rintf", exponential * factor)
    return tirx.min(rounded, float32(255))


def _dp4a(a: Any, b: Any, total: Any) -> Any:
    return T.call_pure_extern("int32", "__dp4a", a, b, total)


def _int32(value: int) -> Any:
    return tirx.const(value, "int32")


# --- softmax alone


def schedule_softmax(kernel: Softmax, gpu: Gpu, storage: ActStorage) -> Scheduled:  # noqa: ARG001
    """A warp per row: its maximum, then the sum of the exponentials, then their shares."""
    rows, n = kernel.rows, kernel.n
    width = 4 if n % 4 == 0 else 1
    pieces = -(-n // (32 * width))
    exact = n % (32 * width) == 0
    held = pieces * width <= _HELD

    @T.prim_func(s_tir=True)
    def softmax(x: T.Buffer((rows, n), "float32"), y: T.Buffer((rows, n), "float32")):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", -(-rows // _SOFTMAX_ROWS))
        lane = T.launch_thread("threadIdx.x", 32)
        warp = T.launch_thread("threadIdx.y", _SOFTMAX_ROWS)
        values = T.alloc_buffer((pieces * width if held else width,), "float32", scope="local")
        best = T.alloc_buffer((1,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        row: T.let = block * _SOFTMAX_ROWS + warp

        @T.inline
        def read(piece):
            for v in T.vectorized(width):
                values[slot(held, piece, width) + v] = x[row, (piece * 32 + lane) * width + v]

        @T.inline
        def exponentiate(piece):
            for v in T.unroll(width):
                values[slot(held, piece, width) + v] = exp(
                    values[slot(held, piece, width) + v] - best[0]
                )

        # All lanes of a warp have the same row, so they shuffle together or not at all.
        if all_of(within(row, rows, rows % _SOFTMAX_ROWS == 0)):
            best[0] = T.float32(_LOWEST)
            total[0] = T.float32(0)
            for piece in loop(held, pieces):
                if all_of(within((piece * 32 + lane) * width, n, exact)):
                    read(piece)
                    for v in T.unroll(width):
                        best[0] = T.max(best[0], values[slot(held, piece, width) + v])
            for level in T.unroll(5):
                best[0] = T.max(best[0], warp_partner(best[0], level))
            for piece in loop(held, pieces):
                if all_of(within((piece * 32 + lane) * width, n, exact)):
                    if not held:
                        read(piece)
                    exponentiate(piece)
                    for v in T.unroll(width):
                        total[0] = total[0] + values[slot(held, piece, width) + v]
            for level in T.unroll(5):
                total[0] = total[0] + warp_partner(total[0], level)
            total[0] = T.float32(1) / total[0]
            for piece in loop(held, pieces):
                if all_of(within((piece * 32 + lane) * width, n, exact)):
                    if not held:
                        read(piece)
                        exponentiate(piece)
                    for v in T.vectorized(width):
                        y[row, (piece * 32 + lane) * width + v] = (
                            values[slot(held, piece, width) + v] * total[0]
                        )

    return Scheduled(steps=(Step(func=softmax, args=("x", "y")),))
