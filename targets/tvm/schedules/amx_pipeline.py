"""The loops of a dense kernel on AMX: a block is multiplied while the one before it is finished.

    for each column of blocks, and each block of the column
      accumulator tiles = 0
      for k: accumulators += x * w, and, in between, some vectors of the block before are finished
      the accumulators are stored, for vectors to read: tiles have no lanes

A core multiplies tiles and computes with vectors at the same time, but only those that its reorder
buffer holds: 512 operations, a tenth of a block. So both have to alternate in the program.

For 350 cycles after any instruction of AMX the core's second port takes no multiplications, minima
or conversions of 512 bits; additions, logic and permutations it does (measured on a Xeon of the
fourth generation, by loops of one operation each). What finishes a block has to be cheap in those.

A model's weights do not fit the caches that are near: with 68 rows, reading them takes as long as
multiplying them. So the next columns' weights are asked for meanwhile, line by line; asked for in
bursts, they would keep the loads of x and w waiting.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import ceil

import numpy as np
from tvm import tirx
from tvm.ir import Call
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.tvm.kernel import Array
from gfcompile.targets.tvm.schedules.cpu_dense import (
    Columns,
    Tasks,
    clamped,
    prefetch_line,
)
from gfcompile.targets.tvm.schedules.cpu_dot import Buffer
from gfcompile.targets.tvm.schedules.math import Expr

TILE_ROWS, TILE_BYTES = 16, 64  # bytes of a row
# With fewer rows, a tile does so little for its loads that VNNI is as fast.
LEAST_ROWS = 8
# Annotates a loop whose length is known when it runs with that of a thread that is alone.
USUAL_LENGTH = "gfcompile.usual_length"
# What TVM takes from the stack in multiples of, at the start of a line: a CUDA tensor map.
_STACK_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of the result, by its first row.

    Attributes:
        start: the first row that no block before has computed.
        group: of columns.
        columns: the first one of each vector.
    """

    row: Expr
    start: Expr
    group: Expr
    columns: Sequence[Expr]


@dataclass(frozen=True, kw_only=True)
class _Turns:
    """Chunks from `first` to `end` that bring so many rows along each, from `first_row` on."""

    first: int
    end: int
    rows: int
    first_row: int


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How a dense kernel is cut into blocks.

    Attributes:
        columns, tasks: of blocks.
        rows: of the kernel.
        block_rows: of a block.
        tile_rows: of a tile; a block has one or two, which overlap if they must.
        vectors: of columns, in a block.
        accumulators: tiles of sums, numbers 0 and on.
        finishes: steps that finish a row of all these tiles.
        chunks: tiles along k.
        products: of a chunk.
        w_lines: cache lines of the weights of a vector of columns.
    """

    columns: Columns
    tasks: Tasks
    rows: int
    block_rows: int
    tile_rows: int
    vectors: int
    accumulators: int
    finishes: int
    chunks: int
    products: int
    w_lines: int

    def emit(
        self,
        w: Buffer,
        config: Buffer,
        multiply: Callable[[Expr, Expr, Expr], Iterator[None]],
        finish: Callable[[Block, Sequence[Buffer], Expr], Iterator[None]],
    ) -> None:
        """Emits the kernel's loops.

        Args:
            w: packed weights, (panels, lines, a line).
            config: the operand of ldtilecfg.
            multiply: emits the products of (a row, a panel of w, a chunk), one after the other.
            finish: emits the vectors of (a block, its sums, a row of its tiles), likewise.
        """
        turns = self._turns()
        lanes = self.columns.product.lanes
        with launch(self.tasks.count):
            sums = [own(self.tile_rows * lanes, "int32") for _ in range(self.accumulators)]
            waiting = _Waiting(self.vectors)
            instruct("ldtilecfg", T.address_of(config[0]))
            share = _Share(self.tasks)
            lines = I.bind(share.by_passes(self._lines))

            def finish_rows(turn: Expr, like: _Turns) -> Iterator[None]:
                first = like.first_row + (turn - like.first) * like.rows
                for r in range(like.rows):
                    yield from finish(waiting.block, sums, first + r)

            with usual_serial(share.first, share.end, usual=self.tasks.columns) as task:
                column, start, steps = share.at(task)
                group = column // self.columns.group_tiles
                first = I.bind(self.columns.first(column))
                places = [
                    I.bind(self.columns.column(group, first + v)) for v in range(self.vectors)
                ]
                panel = I.bind(group * self.columns.group_blocks + first)
                with usual_serial(0, steps, usual=self.tasks.steps) as i:
                    at, last = I.bind((start + i) * self.block_rows), self.rows - self.block_rows
                    row = I.bind(clamped(at, last, self.rows % self.block_rows != 0))
                    done = I.bind(self.tasks.pass_of(start, i) * self.chunks)

                    def chunk_products(chunk: Expr) -> Iterator[None]:
                        with usual_serial(0, lines, usual=self._lines(self.tasks.steps)) as line:
                            for v in range(self.vectors):
                                ahead = panel + self.vectors + v
                                prefetch_line(w, [ahead, (done + chunk) * lines + line, 0])
                        yield from multiply(row, panel, chunk)

                    for number in range(self.accumulators):
                        instruct("tilezero", T.int8(number))
                    exists = I.bind(waiting.exists)
                    for like in turns:
                        first, end = exists * like.first, exists * like.end
                        with usual_serial(first, end, usual=like.end - like.first) as chunk:
                            _alternate(
                                chunk_products(chunk),
                                self.products,
                                finish_rows(chunk, like),
                                like.rows * self.finishes,
                            )
                    done_turns = turns[-1].end
                    usual = self.chunks - done_turns
                    with usual_serial(exists * done_turns, self.chunks, usual=usual) as chunk:
                        _all(chunk_products(chunk))
                    for number, stored in enumerate(sums):
                        to = T.address_of(stored[0])
                        instruct("tilestored64", T.int8(number), to, T.int64(TILE_BYTES))
                    waiting.keep(Block(row=row, start=at, group=group, columns=places))
            with usual_serial(0, waiting.exists * self.tile_rows, usual=self.tile_rows) as row:
                _all(finish(waiting.block, sums, row))
            instruct("tilerelease")

    def _turns(self) -> list[_Turns]:
        """The rows of a tile, dealt to chunks evenly: those that get one more come first."""
        count = min(self.chunks, self.tile_rows)
        rows, more = divmod(self.tile_rows, count)
        turns = [
            _Turns(first=0, end=more, rows=rows + 1, first_row=0),
            _Turns(first=more, end=count, rows=rows, first_row=more * (rows + 1)),
        ]
        return [like for like in turns if like.end > like.first]

    def _lines(self, passes: int) -> int:
        """How many to ask for beside a chunk, if the weights are passed over so often."""
        return ceil(self.w_lines / (passes * self.chunks))


def load_tile(tile: int, buffer: Buffer, at: list[Expr], stride: int) -> None:
    """Loads rows that are `stride` bytes apart."""
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


def usual_serial(start: Expr, stop: Expr, *, usual: int) -> AbstractContextManager[Expr]:
    loop: AbstractContextManager[Expr] = I.serial(start, stop, annotations={USUAL_LENGTH: usual})
    return loop


@contextmanager
def launch(count: int) -> Iterator[None]:
    """What each thread does, once: a parallel loop within becomes the thread's share of it.

    A loop of one turn needs no threads but the caller's.
    """
    if count == 1:
        yield
        return
    with I.attr(T.int32(0), "pragma_parallel_launch_point", T.int32(1)):
        yield


def share_of(count: int) -> tuple[Expr, Expr]:
    """Of a parallel loop within a launch, the first turn of the thread, and where its turns end.

    How many threads there are is known when the kernel runs.
    """
    if count == 1:
        return 0, 1
    share = own(2, "int32")
    I.buffer_store(share, T.int32(count), [0])
    I.buffer_store(share, T.int32(0), [1])
    with I.parallel(count) as turn:
        I.buffer_store(share, tirx.min(share[0], turn), [0])
        I.buffer_store(share, turn + 1, [1])
    return I.bind(share[0]), I.bind(share[1])


def own(size: int, dtype: str) -> Buffer:
    """Memory of a thread's own, on its stack, a whole number of cache lines.

    TVM would have an array that is allocated out of the parallel loop be one for all threads.
    """
    blocks = ceil(size * np.dtype(dtype).itemsize / _STACK_BLOCK)
    memory = T.ptr(dtype)
    taken = T.tvm_stack_alloca("tensormap", blocks)
    I.bind(Call(taken.op, list(taken.args), ret_ty=memory.ty), var=memory)
    return I.decl_buffer((size,), dtype, data=memory)


class _Share:
    """A thread's share of the tasks: of a column all parts as one, if it has all of them.

    A thread alone would read the weights once for each part of the rows.
    """

    first: Expr
    end: Expr

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self.first, end = share_of(tasks.count)
        if tasks.count > 1:
            self._has_all = I.bind(end - self.first == tasks.count)
        self.end = self._or_if_all(end, tasks.columns)

    def at(self, task: Expr) -> tuple[Expr, Expr, Expr]:
        """As `Tasks.at`."""
        column, first, steps = self._tasks.at(task)
        return column, self._or_if_all(first, 0), self._or_if_all(steps, self._tasks.steps)

    def by_passes(self, of: Callable[[int], int]) -> Expr:
        """What `of` says of how often the thread passes over a column's weights."""
        return self._or_if_all(of(self._tasks.passes), of(self._tasks.steps))

    def _or_if_all(self, some: Expr, every: int) -> Expr:
        if not self._tasks.by_rows or self._tasks.parts == 1:
            return some
        return tirx.Select(self._has_all, T.int32(every), some)


class _Waiting:
    """The block that waits to be finished, if there is one."""

    def __init__(self, vectors: int) -> None:
        self._state = own(4 + vectors, "int32")
        self._store([0] * (4 + vectors))

    def keep(self, block: Block) -> None:
        self._store([1, block.row, block.start, block.group, *block.columns])

    @property
    def exists(self) -> Expr:
        """1 or 0."""
        return self._state[0]

    @property
    def block(self) -> Block:
        _, row, start, group, *columns = [self._state[i] for i in range(int(self._state.shape[0]))]
        return Block(row=row, start=start, group=group, columns=columns)

    def _store(self, values: Sequence[Expr]) -> None:
        for i, value in enumerate(values):
            I.buffer_store(self._state, tirx.Cast("int32", value), [i])


def _alternate(some: Iterator[None], count: int, others: Iterator[None], of_others: int) -> None:
    """Emits `count` of some, and `of_others` of others as evenly between them as can be."""
    for i, _ in enumerate(some):
        for _ in range(i * of_others // count, (i + 1) * of_others // count):
            next(others)


def _all(some: Iterator[None]) -> None:
    deque(some, maxlen=0)
