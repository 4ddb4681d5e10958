"""What NEON does with a tile's sums on their way to int8, in whole registers.

The scale of a quantized result is known when weights are packed, so it goes into the factors of
the columns and into the coefficients of GELU: a value is counted in steps of the result from its
first conversion on, and to round it is all that is left to do.
"""

from collections.abc import Sequence

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.tvm.kernel import Array
from gfcompile.targets.tvm.schedules.cpu_dot import Buffer
from gfcompile.targets.tvm.schedules.math import COARSE_TAIL_LIMIT, TAIL_EIGHTH_ROOT, Expr

LANES = 4
# The zero point, and what GELU takes: two registers.
STEPS_ARGS = 8


def steps_args(quant: Array) -> Array:
    """Of `kernel.quant_args`, (..., 4), the constants of `Steps`, (..., STEPS_ARGS).

    Those of GELU take numbers of steps: the coefficients of its root, then where it ends.
    """
    inverse, zero_point = quant[..., 0].astype(np.float64), quant[..., 3]
    root = [coefficient / inverse**i for i, coefficient in enumerate(TAIL_EIGHTH_ROOT)]
    args = np.stack([zero_point, *root, COARSE_TAIL_LIMIT * inverse], axis=-1)
    assert args.shape[-1] == STEPS_ARGS
    return args.astype(np.float32)


class Steps:
    """Builds what becomes of vectors of values, each a number of steps of the result."""

    def __init__(self, args: Buffer, group: Sequence[Expr]) -> None:
        """Takes the constants of a group of columns from `args`, which `steps_args` made."""
        halves = [I.bind(args.vload([*group, i], f"float32x{LANES}")) for i in (0, LANES)]
        lanes = [T.Shuffle([half], [i] * LANES) for half in halves for i in range(LANES)]
        zero_point = tirx.Cast("int16", args[(*group, 0)])
        self._zero_point = I.bind(T.broadcast(zero_point, 2 * LANES))
        *self._root, self._limit = lanes[1:]

    def gelu(self, v: Expr) -> Expr:
        """As `math.gelu_to_quantize`, whose polynomial this is."""
        a = I.bind(_intrinsic("fminnm.v4f32", f"float32x{LANES}", tirx.abs(v), self._limit))
        square = I.bind(a * a)
        c0, c1, c2, c3, c4, c5 = self._root
        tail = I.bind(c0 + a * c1 + square * (c2 + a * c3 + square * (c4 + a * c5)))
        for _ in range(3):
            tail = I.bind(tail * tail)
        return I.bind(tirx.max(v, T.broadcast(T.float32(0), LANES)) - a * tail)

    def stored(self, values: Sequence[Expr]) -> Expr:
        """One or two vectors as int8: rounded half to even, held within int8's range."""
        halves = [_intrinsic("sqxtn.v4i16", "int16x4", _rounded(value)) for value in values]
        words = T.Shuffle([halves[0], halves[-1]], list(range(2 * LANES)))
        shifted = _intrinsic("sqadd.v8i16", "int16x8", words, self._zero_point)
        stored = I.bind(_intrinsic("sqxtn.v8i8", "int8x8", shifted))
        if len(values) == 2:
            return stored
        # As a word: LLVM would bring four bytes of a vector to eight first.
        word = T.Shuffle([T.reinterpret(stored, dtype="int32x2")], [0])
        return T.reinterpret(word, dtype=f"int8x{LANES}")


def _rounded(value: Expr) -> Expr:
    return _intrinsic("fcvtns.v4i32.v4f32", "int32x4", value)


def _intrinsic(name: str, dtype: str, *args: Expr) -> Expr:
    number = T.llvm_lookup_intrinsic_id(f"llvm.aarch64.neon.{name}")
    return T.call_llvm_pure_intrin(number, *args, dtype=dtype)
