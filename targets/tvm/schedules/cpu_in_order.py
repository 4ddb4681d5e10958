"""Dense kernels for a NEON core that issues in order, the Cortex-A53: loops over k as assembly.

What such a core does first it must finish first. In LLVM's model of the A53, a load that follows
an fmla waits until it would end after it, 6 cycles, and so do additions to a pointer (7) and a
branch (9); an ld4, which takes the longest of all loads, waits only 2. LLVM itself loads by ldp
and gets to 63% of the rate of its multiplications. Here

 - an ld4 brings four registers in time for what multiplies them 8 cycles later. Weights and x lie
   so that it puts each number where it belongs. (What smull starts takes 6 cycles, and there an
   ld1 of two or four registers never waits.)
 - ld4 and ld1 have no offsets. So each load of a round has a pointer of its own, and all of them
   move on at once, while the branch waits anyway.
 - at the end of a round, loads fetch what the next one begins with. The last round's read up to
   `SPARE` bytes behind x and w, and use nothing of that.

Registers are named by hand, and the order is the one written here: LLVM's scheduler and its
allocation of registers leave inline assembly alone.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Array, Dense, Scheduled, Step
from gfcompile.targets.tvm.schedules.cpu_dense import (
    Columns,
    clamped,
    counts_steps,
    cut,
    declare,
    operand_names,
    packing,
    packing_steps,
    registers,
    store,
    store_steps,
)
from gfcompile.targets.tvm.schedules.cpu_dot import Buffer, Tile, View, product_of
from gfcompile.targets.tvm.schedules.math import Expr

SPARE = 128
# How much more to compute than there is. LLVM's loop over k takes 1.4 times as long, of int8 1.1.
_WORTH = 1.15
_LANES = 4
_QUAD_BYTES = 64  # what one load of four registers brings


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The loop over k of one register tile.

    Attributes:
        name: of the function (sums, x, w, bias, rounds) that computes a tile.
        tile: of `rows` and of vectors of columns.
        columns: of the tile.
        depth: k of a round.
        before, round, after: its instructions; $0 to $4 are the function's arguments.
        kind, products: of a round, how `instructions` counts what multiplies: operations of int8,
            and of float32 instructions.
        loads: of a round, registers.
    """

    name: str
    tile: Tile
    columns: int
    depth: int
    before: Sequence[str]
    round: Sequence[str]
    after: Sequence[str]
    kind: Literal["arithmetic", "product"]
    products: int
    loads: int

    def takes(self, kernel: Dense) -> bool:
        """Whether it computes `kernel`, and little of it twice where tiles overlap."""
        rows, columns = kernel.m, kernel.n // kernel.out_groups
        if rows < self.tile.rows or columns < self.columns or kernel.k % self.depth:
            return False
        computed = _whole(rows, self.tile.rows) * _whole(columns, self.columns)
        return computed <= _WORTH * rows * columns

    @property
    def llvm(self) -> str:
        """The function, in LLVM's language."""
        lines = [*self.before, "1:", *self.round, "b.ne 1b", *self.after]
        clobbered = [f"x{i}" for i in range(_COUNTER + 1)] + [f"v{i}" for i in range(32)]
        constraints = ",".join(
            ["r"] * 5 + [f"~{{{name}}}" for name in (*clobbered, "cc", "memory")]
        )
        text = "\\0A".join(lines)
        return (
            f"define void @{self.name}(ptr %sums, ptr %x, ptr %w, ptr %bias, i64 %rounds) {{\n"
            f'call void asm sideeffect "{text}", "{constraints}"'
            "(ptr %sums, ptr %x, ptr %w, ptr %bias, i64 %rounds)\nret void\n}\n"
        )


_SUMS, _X, _W, _BIAS, _ROUNDS = (f"${i}" for i in range(5))
_COUNTER = 17  # pointers are in the general registers below it


def _whole(count: int, unit: int) -> int:
    return ceil(count / unit) * unit


def _registers(first: int, count: int, shape: str) -> str:
    return "{" + ", ".join(f"v{first + i}.{shape}" for i in range(count)) + "}"


# --- float32: 9 rows by 2 vectors ------------------------------------------------------------

_FLOAT = Tile(rows=9, vectors=2)
_FLOAT_SUB = 16  # k between two moves of the pointers
_X_QUADS = _FLOAT.rows * _FLOAT_SUB // 16
_W_QUADS = _FLOAT.vectors * _FLOAT_SUB // 4
# Vector registers: sums, two quads of x, and of w one and a half: of the quad before, the second
# half is still in use when the next one comes.
_X_AT = _FLOAT.rows * _FLOAT.vectors
_W_AT = _X_AT + 8
# Multiplications between a load and what needs it. Of x it is when the last use of the quad before
# the last has just passed; of w anything from 8 to 18 will do that keeps the two apart.
_X_AHEAD, _W_AHEAD = 8, 13


def _float_loop() -> Loop:
    """Two times 16 k: as x has 9 quads in 16, the windows of the second half are the others.

    Of x a quad has 4 rows by 2 k and the next 4 rows by the same, going on with the first rows at
    the next 2 k: see `_x_place`. Of w it has two vectors at two k.
    """
    rows, vectors = _FLOAT.rows, _FLOAT.vectors
    step = rows * vectors  # multiplications of one k
    sub = step * _FLOAT_SUB

    def load_x(quad: int) -> str:
        first = _X_AT + 4 * (quad % 2)
        return f"ld4 {_registers(first, 4, '4s')}, [x{quad % _X_QUADS}]"

    def load_w(quad: int) -> str:
        first = _W_AT + 2 * (1 - quad % 2)
        return f"ld4 {_registers(first, 4, '4s')}, [x{_X_QUADS + quad % _W_QUADS}]"

    # By the multiplication that it comes before. Those of the next half's begin are negative.
    loads: defaultdict[int, list[str]] = defaultdict(list)
    ahead = []  # pointers of what is loaded before its half begins, and the loads of the first one
    for quad in range(2 * _X_QUADS):
        k, row = 2 * (8 * quad // rows), 8 * quad % rows
        at = k * step + row - _X_AHEAD
        loads[at % (2 * sub) or 2 * sub].append(load_x(quad))
        if at <= 0:
            ahead.append((quad, _X_QUADS * _QUAD_BYTES, load_x(quad)))
    for quad in range(2 * _W_QUADS):
        at = quad * 4 // vectors * step - _W_AHEAD
        loads[at % (2 * sub)].append(load_w(quad))
        if at <= 0:
            ahead.append((_X_QUADS + quad, _W_QUADS * _QUAD_BYTES, load_w(quad)))

    lines = []
    count = 0
    for k in range(2 * _FLOAT_SUB):
        for vector in range(vectors):
            for row in range(rows):
                if count % sub:  # else the load came before the pointers moved on
                    lines += loads[count]
                a, lane = _x_register(k, row)
                w = _w_register(k * vectors + vector)
                lines.append(f"fmla v{row * vectors + vector}.4s, v{w}.4s, v{a}.s[{lane}]")
                count += 1
        if count % sub == 0:
            lines += loads[count]
            lines += [f"subs x{_COUNTER}, x{_COUNTER}, #1"] if count == 2 * sub else []
            lines += [f"add x{i}, x{i}, #{_X_QUADS * _QUAD_BYTES}" for i in range(_X_QUADS)]
            lines += [
                f"add x{i}, x{i}, #{_W_QUADS * _QUAD_BYTES}"
                for i in range(_X_QUADS, _X_QUADS + _W_QUADS)
            ]
    before = [f"add x{i}, {_X}, #{i * _QUAD_BYTES}" for i in range(_X_QUADS)]
    before += [f"add x{_X_QUADS + i}, {_W}, #{i * _QUAD_BYTES}" for i in range(_W_QUADS)]
    before.append(f"mov x{_COUNTER}, {_ROUNDS}")
    for pointer, stride, load in ahead:
        before += [load, f"add x{pointer}, x{pointer}, #{stride}"]
    pairs = [f"q{2 * row}, q{2 * row + 1}" for row in range(rows)]
    before += [f"ldp {pair}, [{_BIAS}]" for pair in pairs]
    after = [f"stp {pair}, [{_SUMS}, #{32 * row}]" for row, pair in enumerate(pairs)]
    return Loop(
        name="gf_in_order_float",
        tile=_FLOAT,
        columns=vectors * _LANES,
        depth=2 * _FLOAT_SUB,
        before=before,
        round=lines,
        after=after,
        kind="arithmetic",
        products=2 * sub,
        loads=4 * 2 * (_X_QUADS + _W_QUADS),
    )


def _x_place(k: int, row: int) -> int:
    """Where a number of x lies in its panel: in fours, (row, k), (row, k + 1), and of row + 4.

    Rows are counted on from the last one to the first one of the next two k.
    """
    pair = k // 2 * _FLOAT.rows + row
    quad, place = divmod(pair, 8)
    half, lane = divmod(place, 4)
    return 16 * quad + 4 * lane + 2 * half + k % 2


def _x_register(k: int, row: int) -> tuple[int, int]:
    """The register and the lane that x (row, k) is in: ld4 puts every fourth number in one."""
    quad, place = divmod(_x_place(k, row), 16)
    lane, register = divmod(place, 4)
    return _X_AT + 4 * (quad % 2) + register, lane


def _w_register(vector: int) -> int:
    """The register of a vector of w. A quad's last two are where the next one does not come."""
    quad, i = divmod(vector, 4)
    return _W_AT + (3 - i if quad % 2 else 2 + i)


def _pack_float_w(w: Array) -> Array:
    """Vectors of w, (..., 4), in an order in which ld4 puts them where `_w_register` says."""
    quads = w.reshape(-1, 4, _LANES)
    quads[1::2] = quads[1::2, ::-1]
    return quads.transpose(0, 2, 1)


def _panel_float_x(load: Callable[[int, int], Expr], put: Callable[[int, Expr], None]) -> None:
    """Builds 16 k of a panel; `load` gives four k of a row."""
    at: dict[int, tuple[Expr, int]] = {}
    for row in range(_FLOAT.rows):
        for four in range(_FLOAT_SUB // 4):
            vector = load(row, 4 * four)
            for half in (0, 2):
                at[_x_place(4 * four + half, row)] = (vector, half)
    for place in range(0, _FLOAT.rows * _FLOAT_SUB, 4):
        (a, i), (b, j) = at[place], at[place + 2]
        put(place, T.Shuffle([a, b], [i, i + 1, 4 + j, 5 + j]))


# --- int8: 4 rows by 4 columns, 16 k at a time ------------------------------------------------

_INT8 = Tile(rows=4, vectors=4)
_INT8_CHUNK, _INT8_CHUNKS = 16, 8
# Vector registers: 16 sums, products on their way, two quads of x, three columns of w.
_PARTS = 5
_PARTS_AT, _INT8_X_AT, _INT8_W_AT = 16, 21, 29
# The smlal2 and the sadalp of a row and a column come so many pairs of those after the smull, as
# each takes 6 cycles to its result.
_SMLAL_AFTER, _SADALP_AFTER = 2, 4
# Columns of a chunk: of each two, the one used last is in a register that the next two leave alone.
_COLUMN_ORDER = (1, 0, 2, 3)


def _int8_loop() -> Loop:
    """Eight chunks of 16 k, each of 4 rows by 4 columns of smull, smlal2 and sadalp.

    Columns come by twos: most by ldp, which waits for 2 cycles but needs no pointer, and every
    fourth two by ld1, so that the loop is within a tenth of its multiplications' rate.
    """
    rows, chunk_slots = _INT8.rows, 3 * _INT8.rows * _INT8.vectors
    round_bytes = _INT8_CHUNKS * _QUAD_BYTES
    twos = range(2 * _INT8_CHUNKS)
    by_ld1 = {two: f"x{_INT8_CHUNKS + i}" for i, two in enumerate(twos[3::4])}
    by_ldp = f"x{_INT8_CHUNKS + len(by_ld1)}"
    pairs = [
        (chunk, column, row)
        for chunk in range(_INT8_CHUNKS)
        for column in _COLUMN_ORDER
        for row in range(rows)
    ]
    end = 3 * len(pairs)  # from here on no pair begins, and what is loaded is the next round's
    slots: list[tuple[float, str]] = []
    for i, (chunk, column, row) in enumerate(pairs):
        part = _PARTS_AT + i % _PARTS
        w, x = _INT8_W_AT + column // 2 + column % 2, _int8_x(chunk) + row
        slots += [
            (3 * i, f"smull v{part}.8h, v{w}.8b, v{x}.8b"),
            (3 * (i + _SMLAL_AFTER) + 1, f"smlal2 v{part}.8h, v{w}.16b, v{x}.16b"),
            (3 * (i + _SADALP_AFTER) + 2, f"sadalp v{_INT8.vectors * row + column}.4s, v{part}.8h"),
        ]
    for chunk in range(_INT8_CHUNKS):
        at = chunk_slots * (2 * chunk - 1) / 2 if chunk else end
        slots.append((at - 0.5, f"ld1 {_registers(_int8_x(chunk), 4, '16b')}, [x{chunk}]"))
    for two in twos:
        # When the last smlal2 is done that takes the register of the two before used first.
        last = two * chunk_slots // 6 - rows - 1
        at = 3 * (last + _SMLAL_AFTER) + 1.5 if two else end + 6.5
        first = _INT8_W_AT + two % 2
        offset = 32 * two if two else round_bytes
        ldp = f"ldp q{first}, q{first + 1}, [{by_ldp}, #{offset}]"
        ld1 = f"ld1 {_registers(first, 2, '16b')}, [{by_ld1.get(two)}]"
        slots.append((at, ld1 if two in by_ld1 else ldp))
    lines = [line for _, line in sorted(slots, key=lambda slot: slot[0])]
    lines.append(f"subs x{_COUNTER}, x{_COUNTER}, #1")
    pointers = [f"x{i}" for i in range(_INT8_CHUNKS + len(by_ld1) + 1)]
    lines += [f"add {pointer}, {pointer}, #{round_bytes}" for pointer in pointers]

    before = [f"add x{i}, {_X}, #{i * _QUAD_BYTES}" for i in range(_INT8_CHUNKS)]
    before += [f"add {pointer}, {_W}, #{32 * two}" for two, pointer in by_ld1.items()]
    before += [f"mov {by_ldp}, {_W}", f"mov x{_COUNTER}, {_ROUNDS}"]
    before += [f"ld1 {_registers(_int8_x(0), 4, '16b')}, [x0]", f"add x0, x0, #{round_bytes}"]
    before.append(f"ldp q{_INT8_W_AT}, q{_INT8_W_AT + 1}, [{by_ldp}]")
    sums = rows * _INT8.vectors
    before += [f"movi v{i}.2d, #0" for i in range(sums)]
    # Of four sums of a column's lanes one vector of columns; those of row r end in v(4 r).
    after = [f"addp v{i}.4s, v{i}.4s, v{i + 1}.4s" for i in range(0, sums, 2)]
    after += [f"addp v{i}.4s, v{i}.4s, v{i + 2}.4s" for i in range(0, sums, 4)]
    after.append(f"ldr q{_PARTS_AT}, [{_BIAS}]")
    after += [f"add v{i // 4}.4s, v{i}.4s, v{_PARTS_AT}.4s" for i in range(0, sums, 4)]
    after.append(f"st1 {_registers(0, 4, '4s')}, [{_SUMS}]")
    return Loop(
        name="gf_in_order_int8",
        tile=_INT8,
        columns=_INT8.vectors,
        depth=_INT8_CHUNK * _INT8_CHUNKS,
        before=before,
        round=lines,
        after=after,
        kind="product",
        products=2 * rows * _INT8.vectors * _INT8_CHUNK * _INT8_CHUNKS,
        loads=2 * 4 * _INT8_CHUNKS,
    )


def _int8_x(chunk: int) -> int:
    """The first register of a chunk of x."""
    return _INT8_X_AT + 4 * (chunk % 2)


# --- the kernel ------------------------------------------------------------------------------

_LOOPS: Mapping[str, Loop] = {"float32": _float_loop(), "int8": _int8_loop()}
LOOPS: Mapping[str, Loop] = {loop.name: loop for loop in _LOOPS.values()}


def takes(kernel: Dense, cpu: Cpu) -> bool:
    """Whether such a loop computes `kernel`: on other CPUs, and of odd sizes, `cpu_dense` does."""
    return (
        cpu.in_order
        and not cpu.shares_weights
        and cpu.int8_dot is None
        and kernel.w == "float32"
        and kernel.x in _LOOPS
        and _LOOPS[kernel.x].takes(kernel)
    )


def schedule_dense(kernel: Dense, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """The dense kernel for `cpu`, which issues in order."""
    loop = _LOOPS[kernel.x]
    product = product_of(kernel, cpu)
    columns = Columns(kernel=kernel, product=product, tile=loop.tile)
    m, k, rows = kernel.m, kernel.k, loop.tile.rows
    row_tiles = ceil(m / rows)
    tasks = cut(kernel, product, row_tiles, columns.tiles)
    item = np.dtype(product.x_dtype).itemsize
    spare = SPARE // item
    panel_w = columns.block * k
    x_shape = (row_tiles * rows * k + spare,)
    w_shape = (kernel.out_groups * columns.group_blocks * panel_w + spare,)
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("dense")
        I.func_attr({"tirx.noalias": True})
        operands = declare(columns, x_shape, storage, w_shape=w_shape)
        with I.attr(0, "pragma_import_llvm", loop.llvm), I.parallel(tasks.count) as task:
            column_tile, first_step, steps = tasks.at(task)
            group = column_tile // columns.group_tiles
            first = I.bind(columns.first(column_tile))
            runs = columns.runs(group, first)
            panel = group * columns.group_blocks + first // columns.per_block
            with I.serial(steps) as i:
                step = first_step + i
                row = I.bind(clamped(step * rows, m - rows, m % rows != 0))
                sums = registers(rows * columns.block, product.acc_dtype)
                arguments = (
                    T.address_of(sums[0]),
                    T.address_of(operands.x[step * rows * k]),
                    T.address_of(operands.w[panel * panel_w]),
                    T.address_of(operands.bias[runs[0][2]]),
                    T.int64(k // loop.depth),
                )
                I.evaluate(T.call_extern("void", loop.name, *arguments))
                if counts_steps(kernel, storage):
                    store_steps(kernel, operands, product, sums, rows, row, runs, group)
                else:
                    by_row = [_row_of(sums, r, columns.block) for r in range(rows)]
                    store(kernel, operands, product, by_row, row, runs, group)
    pack = dict(packing(kernel, product, loop.tile, storage))
    pack_w = pack["w"]

    def pack_and_order(raw: Mapping[str, Array]) -> Array:
        w = pack_w(raw)
        ordered = w if kernel.x == "int8" else _pack_float_w(w)
        return np.pad(ordered.reshape(-1), (0, spare))

    pack["w"] = pack_and_order
    if counts_steps(kernel, storage):
        pack |= packing_steps(kernel)
    return Scheduled(
        steps=(
            Step(func=_panels(kernel, loop, x_shape, product.x_dtype), args=("x", "x_panels")),
            Step(func=builder.get(), args=("x_panels", *operand_names(kernel))),
        ),
        pack=pack,
        temps={"x_panels": (product.x_dtype, x_shape)},
    )


def _row_of(sums: Buffer, row: int, columns: int) -> View:
    return View(sums, lambda at: [row * columns + at])


def _panels(kernel: Dense, loop: Loop, shape: tuple[int, ...], dtype: str) -> Any:
    """x (m, k) as panels of a tile's rows, one after the other, in the order of the loads."""
    m, k, rows = kernel.m, kernel.k, loop.tile.rows
    count = ceil(m / rows)
    depth = _INT8_CHUNK if dtype == "int8" else _FLOAT_SUB
    lanes = 16 // np.dtype(dtype).itemsize
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("panel_rows")
        I.func_attr({"tirx.noalias": True})
        x = I.arg("x", I.buffer((m, k), dtype))
        y = I.arg("y", I.buffer(shape, dtype))
        with I.parallel(count) as panel:
            first = I.bind(clamped(panel * rows, m - rows, m % rows != 0))
            with I.serial(k // depth) as i:

                def load(row: int, at: int) -> Expr:
                    return I.bind(x.vload([first + row, i * depth + at], f"{dtype}x{lanes}"))

                def put(place: int, vector: Expr) -> None:
                    at = (panel * k + i * depth) * rows + place
                    I.buffer_store(y, vector, [T.ramp(at, 1, lanes)])

                if dtype == "int8":
                    for row in range(rows):
                        put(row * depth, load(row, 0))
                else:
                    _panel_float_x(load, put)
    return builder.get()
