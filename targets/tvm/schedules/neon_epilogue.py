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
from gfcompile.targets.tvm.schedules.math import Expr

LANES = 4
# GELU as in `math`, but an eighth root of the tail that has no third and no fifth power: with each
# power a constant would have to be copied, as a multiply-add overwrites its addend. It is wrong by
# 6.8e-6; with them by 1.5e-6, for 0.4% more instructions of a model.
_TAIL_LIMIT = 5.42
_TAIL_ROOT = {
    0: 0.9169801473617554,
    1: -0.09121595323085785,
    2: -0.03258000686764717,
    4: 0.0012654801830649376,
    6: -2.0181742002023384e-05,
}
GELU_ERROR = 8e-6
# The zero point, and what GELU takes; with what fills two registers.
STEPS_ARGS = 8


def steps_args(quant: Array) -> Array:
    """Of `kernel.quant_args`, (..., 4), the constants of `Steps`, (..., STEPS_ARGS).

    Those of GELU take numbers of steps: the coefficients of its root, then where it ends.
    """
    inverse, zero_point = quant[..., 0].astype(np.float64), quant[..., 3]
    root = [coefficient / inverse**power for power, coefficient in _TAIL_ROOT.items()]
    args = np.stack([zero_point, *root, _TAIL_LIMIT * inverse], axis=-1)
    padding = [(0, 0)] * (args.ndim - 1) + [(0, STEPS_ARGS - args.shape[-1])]
    return np.pad(args, padding).astype(np.float32)


class Steps:
    """Builds what becomes of vectors of values, each a number of steps of the result."""

    def __init__(self, args: Buffer, group: Sequence[Expr]) -> None:
        """Takes the constants of a group of columns from `args`, which `steps_args` made."""
        halves = [I.bind(args.vload([*group, i], f"float32x{LANES}")) for i in (0, LANES)]
        lanes = [T.Shuffle([half], [i] * LANES) for half in halves for i in range(LANES)]
        zero_point = tirx.Cast("int16", args[(*group, 0)])
        self._zero_point = I.bind(T.broadcast(zero_point, 2 * LANES))
        self._root, self._limit = lanes[1:6], lanes[6]

    def gelu(self, v: Expr) -> Expr:
        """GELU of v, to `GELU_ERROR` before it was counted in steps."""
        a = I.bind(_intrinsic("fminnm.v4f32", f"float32x{LANES}", tirx.abs(v), self._limit))
        square = I.bind(a * a)
        c0, c1, c2, c4, c6 = self._root
        tail = I.bind(c0 + a * c1 + square * (c2 + square * (c4 + square * c6)))
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
