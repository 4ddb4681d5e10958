"""How each CPU instruction set multiplies a tile: what `cpu_dense` has to know of it.

A `Product` keeps a tile of accumulators in vector registers. One multiply takes `group`
consecutive k of a row of x and of `columns` columns of w, and adds the products, exactly for int8,
to one accumulator vector; where it takes several `rows` at once, the accumulator holds a small
tile of them. Weights are packed in the order in which they are read:
(panels, k / group, vectors, columns * group).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import Act, ActStorage, Dense
from gfcompile.targets.tvm.schedules.math import Expr

# Columns of a block of weights on x86: a vector of AVX-512, a tile of AMX.
X86_BLOCK = 16
# The same on ARM, for a library of several levels: the tile that most of them choose. Of int8,
# four columns by 16 k lie together, in vectors of four by four, as sdot takes them.
ARM_BLOCK = 12
_ARM_DEPTH = 16
_ARM_CELL = (4, 4)
# The same of float16 weights, whose vectors have 8 columns.
_HALF_BLOCK = 24

Buffer = Any  # a tvm.tirx.Buffer, under construction


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Accumulators of a register tile: `rows` of x times `vectors` vectors of columns."""

    rows: int
    vectors: int


class View:
    """A buffer whose elements are named otherwise: `index` turns such a name into an index."""

    def __init__(self, buffer: Buffer, index: Callable[..., list[Expr]]) -> None:
        self._buffer, self._index = buffer, index

    def __getitem__(self, indices: tuple[Expr, ...]) -> Expr:
        return self._buffer[tuple(self._index(*indices))]

    def vload(self, indices: Sequence[Expr], dtype: str) -> Expr:
        return self._buffer.vload(self._index(*indices), dtype)


@dataclass(frozen=True)
class Product(ABC):
    """One instruction set's way to multiply.

    Attributes:
        lanes: 32-bit lanes of a vector register.
        block: columns of a block of packed weights; 0 where a block is a tile.

    Class attributes:
        x_dtype, w_dtype, acc_dtype: of x as the tile reads it, of the packed weights, and of the
            accumulators.
        group: consecutive k that one multiply adds up.
        chunk: consecutive k of the unrolled inner loop.
        operations: vector instructions for one multiply, and per vector of weights besides.
        by_lane: whether a chunk of each row stays in a register, to be multiplied lane by lane;
            otherwise every group is loaded, broadcast, on its own.
        load_cycles: what a load takes besides what it keeps waiting, in `cpu_dense`'s model.
        temporaries: registers needed besides accumulators, weights and rows.
        unroll: chunks of k in the inner loop, unless a search found better.
        vector_step: the number of vectors in a tile is a multiple of it.
        rows: of x that one operand holds; the number of rows in a tile is a multiple of it.
        span: consecutive k whose products are added up in x's dtype, before that sum is added to
            an accumulator; 0 where accumulators take every product.
    """

    lanes: int
    block: int = 0

    x_dtype: ClassVar[str]
    w_dtype: ClassVar[str]
    acc_dtype: ClassVar[str] = "int32"
    group: ClassVar[int]
    chunk: ClassVar[int]
    operations: ClassVar[tuple[int, int]] = (1, 0)
    by_lane: ClassVar[bool] = False
    # Fitted to some 20 tiles on AVX2 and AVX-512.
    load_cycles: ClassVar[float] = 0.2
    temporaries: ClassVar[int] = 1
    unroll: ClassVar[int] = 1
    vector_step: ClassVar[int] = 1
    rows: ClassVar[int] = 1
    span: ClassVar[int] = 0

    @property
    def depth(self) -> int:
        """Consecutive k whose cells lie together in a block, before those of the next columns."""
        return self.group

    @property
    def cell(self) -> tuple[int, int]:
        """Columns and k of packed weights that lie together, those of one column first."""
        return self.columns, self.group

    @property
    def columns(self) -> int:
        """Columns of w in one vector of weights."""
        return self.lanes

    @property
    def w_elements(self) -> int:
        """Elements in one vector of weights."""
        return self.columns * self.group

    def registers(self, tile: Tile) -> int:
        """Vector registers that the inner loop needs."""
        rows = self.operands(tile) if self.by_lane else 0
        weights = tile.vectors if tile.rows > 1 else 1  # for one row, each is used as it is loaded
        return self.operands(tile) * tile.vectors + weights + rows + self.temporaries

    def operands(self, tile: Tile) -> int:
        """Operands that the rows of a tile make."""
        return tile.rows // self.rows

    def loads(self, tile: Tile) -> float:
        """Loads for one group of k."""
        return tile.vectors + self.operands(tile) * (self.group / self.chunk if self.by_lane else 1)

    def load_w(self, w: Buffer, panel: Expr, group: Expr, vector: int) -> Expr:
        """The weights of one multiply."""
        at = [panel, group, vector, 0]
        return I.bind(w.vload(at, f"{self.w_dtype}x{self.w_elements}"))

    @abstractmethod
    def load_x(self, x: Buffer, row: Expr, k: Expr, groups: int) -> Sequence[Expr]:
        """For each of `groups` groups from k on, x's operand of a multiply.

        Of `rows` rows at once, `row` counts such operands.

        With `by_lane`, `groups` is those of a chunk, or 1 in what is left of k.
        """

    @abstractmethod
    def multiply(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        """acc plus the products of x's operand a and the weights b."""

    def sums(self, accumulators: Sequence[Expr]) -> Sequence[Expr]:
        """For each of `rows` rows a vector of columns: the totals of neighbouring accumulators."""
        raise NotImplementedError(f"{type(self).__name__} has one sum for each column")


class _BroadcastFloat(Product):
    """float32 on x86: a number of x, broadcast, times a vector of columns."""

    x_dtype = w_dtype = acc_dtype = "float32"
    group, chunk = 1, 4

    def load_x(self, x: Buffer, row: Expr, k: Expr, groups: int) -> Sequence[Expr]:
        return [I.bind(T.broadcast(x[row, k + i], self.lanes)) for i in range(groups)]

    def multiply(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        return acc + a * b


class FloatSse(_BroadcastFloat):
    """float32 without a fused multiply-add."""

    operations = (2, 0)


class FloatFma(_BroadcastFloat):
    """float32 with AVX2 and FMA or AVX-512."""


class FloatNeon(Product):
    """float32 on ARM: four numbers of x in a register, each multiplied by its lane."""

    x_dtype = w_dtype = acc_dtype = "float32"
    group, chunk = 1, 4
    by_lane = True
    temporaries = 0
    unroll = 2

    def load_x(self, x: Buffer, row: Expr, k: Expr, groups: int) -> Sequence[Expr]:
        if groups == 1:
            return [I.bind(T.broadcast(x[row, k], self.lanes))]
        return _lanes(I.bind(x.vload([row, k], "float32x4")))

    def multiply(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        return acc + a * b


class FloatNeonInOrder(FloatNeon):
    """The same for a core that issues in order: LLVM loads a round's operands before it multiplies.

    With fewer registers to spare, it spills them.
    """

    temporaries = 4
    load_cycles = 0.5
    unroll = 4


class HalfNeon(Product):
    """float16 on ARM that computes in it: eight numbers of x in a register, each by its lane.

    A sum of n products is off by the square root of n / 2 roundings: after 64 of them 58 dB are
    left, where 1536 would leave 44. To add them to float32 sums takes 9 instructions for a vector
    of the tile, that is a seventh of the products' own.
    """

    x_dtype = w_dtype = "float16"
    acc_dtype = "float32"
    group, chunk = 1, 8
    by_lane = True
    # A lane is one of a register below v16; with fewer to spare, LLVM moves rows about and spills.
    temporaries = 4
    span = 64

    @property
    def columns(self) -> int:
        return 2 * self.lanes

    def load_x(self, x: Buffer, row: Expr, k: Expr, groups: int) -> Sequence[Expr]:
        if groups == 1:
            return [I.bind(T.broadcast(x[row, k], self.columns))]
        return _lanes(I.bind(x.vload([row, k], "float16x8")), 8)

    def multiply(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        return acc + a * b


class HalfStoredNeon(FloatNeon):
    """float16 weights on ARM that only converts them: widened as they are loaded."""

    w_dtype = "float16"

    def load_w(self, w: Buffer, panel: Expr, group: Expr, vector: int) -> Expr:
        narrow = super().load_w(w, panel, group, vector)
        return I.bind(tirx.Cast(f"float32x{self.lanes}", narrow))


class Vnni(Product):
    """uint8 x int8 on x86 with VNNI: four products a lane by vpdpbusd, without saturation."""

    x_dtype, w_dtype = "uint8", "int8"
    group, chunk = 4, 8

    def load_x(self, x: Buffer, row: Expr, k: Expr, groups: int) -> Sequence[Expr]:
        dtype = f"uint8x{4 * self.lanes}"
        words = [
            T.reinterpret(x.vload([row, k + 4 * i], "uint8x4"), dtype="int32")
            for i in range(groups)
        ]
        return [I.bind(T.reinterpret(T.broadcast(word, self.lanes), dtype=dtype)) for word in words]

    def multiply(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        return _intrinsic(
            f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", f"int32x{self.lanes}", acc, a, b
        )


class MultiplyAddPairs(Product):
    """int8 on x86 without VNNI: widened to int16, pairs of products added by pmaddwd.

    pmaddubsw would do without widening, but saturates. x is widened beforehand, once for all
    panels; the weights stay int8 in memory and are widened as they are loaded.
    """

    x_dtype, w_dtype = "int16", "int8"
    group, chunk = 2, 4
    operations = (2, 1)
    temporaries = 2

    def load_w(self, w: Buffer, panel: Expr, group: Expr, vector: int) -> Expr:
        narrow = super().load_w(w, panel, group, vector)
        return I.bind(tirx.Cast(f"int16x{2 * self.lanes}", narrow))

    def load_x(self, x: Buffer, row: Expr, k: Expr, groups: int) -> Sequence[Expr]:
        dtype = f"int16x{2 * self.lanes}"
        words = [
            T.reinterpret(x.vload([row, k + 2 * i], "int16x2"), dtype="int32")
            for i in range(groups)
        ]
        return [I.bind(T.reinterpret(T.broadcast(word, self.lanes), dtype=dtype)) for word in words]

    def multiply(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[self.lanes]
        return acc + _intrinsic(f"llvm.x86.{name}", f"int32x{self.lanes}", a, b)


class MultiplyAddQuads(MultiplyAddPairs):
    """pmaddwd over four k, which is how VNNI's weights lie: two sums for each column."""

    group, chunk = 4, 8
    vector_step = 2

    @property
    def columns(self) -> int:
        return self.lanes // 2

    def load_w(self, w: Buffer, panel: Expr, group: Expr, vector: int) -> Expr:
        narrow = Product.load_w(self, w, panel, group, vector)
        return I.bind(tirx.Cast(f"int16x{2 * self.lanes}", narrow))

    def load_x(self, x: Buffer, row: Expr, k: Expr, groups: int) -> Sequence[Expr]:
        dtype = f"int16x{2 * self.lanes}"
        quads = [
            T.reinterpret(x.vload([row, k + 4 * i], "int16x4"), dtype="int64")
            for i in range(groups)
        ]
        return [
            I.bind(T.reinterpret(T.broadcast(quad, self.lanes // 2), dtype=dtype)) for quad in quads
        ]

    def sums(self, accumulators: Sequence[Expr]) -> Sequence[Expr]:
        even, odd = (list(range(first, 2 * self.lanes, 2)) for first in (0, 1))
        return [T.Shuffle(list(accumulators), even) + T.Shuffle(list(accumulators), odd)]


class MultiplyAddInt16(MultiplyAddPairs):
    """pmaddwd where both sides are int16 in memory: int8 less its zero point, exactly."""

    w_dtype = "int16"
    operations = (2, 0)
    temporaries = 1
    load_w = Product.load_w


class Sdot(Product):
    """int8 on ARM with the dot product: sixteen k of x in a register, four by lane."""

    x_dtype = w_dtype = "int8"
    group, chunk = 4, 16
    by_lane = True
    temporaries = 0
    unroll = 3

    @property
    def depth(self) -> int:
        return _ARM_DEPTH if self.block else self.group

    def load_x(self, x: Buffer, row: Expr, k: Expr, groups: int) -> Sequence[Expr]:
        if groups == 1:
            word = T.reinterpret(x.vload([row, k], "int8x4"), dtype="int32")
            return [I.bind(T.reinterpret(T.broadcast(word, 4), dtype="int8x16"))]
        words = I.bind(T.reinterpret(x.vload([row, k], "int8x16"), dtype="int32x4"))
        return [T.reinterpret(lane, dtype="int8x16") for lane in _lanes(words)]

    def multiply(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        return _intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", "int32x4", acc, b, a)


class WideningNeon(Product):
    """int8 on ARM without the dot product: smull, smlal2 and sadalp over sixteen k of a column.

    The sum of two products fits int16 because weights are within [-127, 127]. An accumulator
    vector belongs to one column and is summed up across its lanes when the tile is done.
    """

    x_dtype = w_dtype = "int8"
    group = chunk = 16
    operations = (3, 0)
    by_lane = True  # in that a row's sixteen k are one register, not in the multiplication
    temporaries = 2
    unroll = 4
    vector_step = 4

    @property
    def columns(self) -> int:
        return 1

    def load_x(self, x: Buffer, row: Expr, k: Expr, groups: int) -> Sequence[Expr]:
        assert groups == 1
        return [I.bind(x.vload([row, k], "int8x16"))]

    def multiply(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        return acc + _add_pairs(_long(a, b, T.vectorlow) + _long(a, b, T.vectorhigh))

    def sums(self, accumulators: Sequence[Expr]) -> Sequence[Expr]:
        """The sums over the lanes of four accumulators, as one vector."""

        def add_pairs(a: Expr, b: Expr) -> Expr:
            return _intrinsic("llvm.aarch64.neon.addp.v4i32", "int32x4", a, b)

        a, b, c, d = accumulators
        return [add_pairs(add_pairs(a, b), add_pairs(c, d))]


class WideningNeonFours(WideningNeon):
    """The same over weights that lie as sdot takes them: ld4 brings four columns in order."""

    # Of what ld4 brings, nothing is loaded later; with fewer to spare, LLVM spills.
    temporaries = 4
    unroll = 2

    @property
    def cell(self) -> tuple[int, int]:
        return _ARM_CELL

    def load_w(self, w: Buffer, panel: Expr, group: Expr, vector: int) -> Expr:
        # The same load for four vectors, which LLVM merges: they become one instruction.
        four = w.vload([panel, group, vector - vector % 4, 0], "int8x64")
        words = I.bind(T.reinterpret(four, dtype="int32x16"))
        column = T.Shuffle([words], list(range(vector % 4, 16, 4)))
        return I.bind(T.reinterpret(column, dtype="int8x16"))


class Smmla(Product):
    """int8 on ARM with the matrix product: eight k of two rows times eight k of two columns.

    Rows lie in pairs, (pairs, k / 8, 2 * 8), see `cpu_dense`. Weights lie as sdot takes them,
    four columns by four k, so that a library for both has them once.
    """

    x_dtype = w_dtype = "int8"
    group, chunk = 8, 16
    operations = (1, 1)  # zip, which brings together what a column has in two fours
    vector_step = 2
    rows = 2

    @property
    def depth(self) -> int:
        return _ARM_DEPTH

    @property
    def cell(self) -> tuple[int, int]:
        return _ARM_CELL

    @property
    def columns(self) -> int:
        return 2

    def load_w(self, w: Buffer, panel: Expr, group: Expr, vector: int) -> Expr:
        # Of four columns, the first four k come before the others; the same load for two vectors.
        four = w.vload([panel, group, vector - vector % 2, 0], "int8x32")
        words = I.bind(T.reinterpret(four, dtype="int32x8"))
        first = 2 * (vector % 2)
        columns = T.Shuffle([words], [first, first + 4, first + 1, first + 5])
        return I.bind(T.reinterpret(columns, dtype="int8x16"))

    def load_x(self, x: Buffer, row: Expr, k: Expr, groups: int) -> Sequence[Expr]:
        return [I.bind(x.vload([row, 2 * (k + 8 * i)], "int8x16")) for i in range(groups)]

    def multiply(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        return _intrinsic("llvm.aarch64.neon.smmla.v4i32.v16i8", "int32x4", acc, a, b)

    def sums(self, accumulators: Sequence[Expr]) -> Sequence[Expr]:
        """Two tiles of 2 x 2 as two rows of four."""
        return [T.Shuffle(list(accumulators), [i, i + 1, i + 4, i + 5]) for i in (0, 2)]


class WideningNeonAnyInt8(WideningNeon):
    """As WideningNeon, with -128 on both sides: two of its squares would exceed int16."""

    operations = (4, 0)

    def multiply(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        acc = acc + _add_pairs(_long(a, b, T.vectorlow))
        return acc + _add_pairs(_long(a, b, T.vectorhigh))


def act_storage(cpu: Cpu) -> ActStorage:
    """How int8 activations lie in memory on `cpu`: VNNI multiplies uint8 with int8."""
    if cpu.int8_dot == "vnni":
        return ActStorage(dtype="uint8", offset=128)
    return ActStorage(saturates=cpu.arch == "aarch64")


def product_of(kernel: Dense, cpu: Cpu) -> Product:
    """How `cpu` multiplies in `kernel`."""
    lanes = cpu.vector_bytes // 4
    if cpu.arch == "aarch64":
        if kernel.w == "float16":
            half_block = _HALF_BLOCK if cpu.shares_weights else 0
            return (HalfNeon if cpu.float16 else HalfStoredNeon)(lanes, half_block)
        block = ARM_BLOCK if cpu.shares_weights else 0
        if kernel.x == "float32":
            return (FloatNeonInOrder if cpu.in_order else FloatNeon)(lanes, block)
        if cpu.i8mm and kernel.m > 1:
            return Smmla(lanes, block)
        if cpu.int8_dot == "sdot":
            return Sdot(lanes, block)
        return (WideningNeonFours if block else WideningNeon)(lanes, block)
    assert kernel.w == "float32", "x86 has no kernels in float16"
    if kernel.x == "float32":
        return (FloatSse if cpu.vector_bytes == 16 else FloatFma)(lanes, X86_BLOCK)
    return (Vnni if cpu.int8_dot == "vnni" else MultiplyAddQuads)(lanes, X86_BLOCK)


def activation_product_of(x: Act, cpu: Cpu) -> Product:
    """How `cpu` multiplies two activations, of which int8 ones use all of int8's range.

    The second one has to be laid out as weights first, less its zero point where it is int16.
    """
    lanes = cpu.vector_bytes // 4
    if x == "int8" and cpu.int8_dot is None:
        return WideningNeonAnyInt8(lanes) if cpu.arch == "aarch64" else MultiplyAddInt16(lanes)
    return product_of(Dense(m=1, n=1, k=1, x=x, w="float16" if x == "float16" else "float32"), cpu)


def _long(a: Expr, b: Expr, half: Any) -> Expr:
    """The products of one half of int8x16 vectors."""
    halves = (half(a, dtype="int8x8"), half(b, dtype="int8x8"))
    return _intrinsic("llvm.aarch64.neon.smull.v8i16", "int16x8", *halves)


def _add_pairs(products: Expr) -> Expr:
    return _intrinsic("llvm.aarch64.neon.saddlp.v4i32.v8i16", "int32x4", products)


def _lanes(vector: Expr, count: int = 4) -> list[Expr]:
    """Each lane of a 128-bit vector, broadcast; LLVM folds it into the multiply."""
    return [T.broadcast(T.Shuffle([vector], [i]), count) for i in range(count)]


def _intrinsic(name: str, dtype: str, *args: Expr) -> Expr:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)
