"""GELU to int8 beside AMX's tiles, where multiplications have one port alone: see `amx_pipeline`.

GELU(v) = max(v, 0) - H(a), a = |v|, H(a) = a (1 - Phi(a)), as in `math`. Here H is a cubic in each
of 32 segments, whose coefficients a permutation picks:

    2 GELU(v) = v + a - p(d),   a = n / 4 + d,   |d| <= 1/8

Additions and permutations do most of what `math.gelu_to_quantize` multiplies for: 8 operations are
for the one port and 16 for any, not 17 and 7.
"""

import math
from collections.abc import Sequence

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from gfcompile.targets.tvm.kernel import ActStorage, Array
from gfcompile.targets.tvm.schedules import avx512
from gfcompile.targets.tvm.schedules.avx512 import LANES
from gfcompile.targets.tvm.schedules.cpu_dot import Buffer
from gfcompile.targets.tvm.schedules.cpu_tiling import splat
from gfcompile.targets.tvm.schedules.math import ROUND_MAGIC, ROUND_MAGIC_BITS, Expr

_SEGMENTS, _WIDTH = 32, 0.25
# Within the last segment, where H is next to nothing.
_LIMIT = (_SEGMENTS - 0.51) * _WIDTH
# As ROUND_MAGIC, for the nearest multiple of the width.
_WIDTH_MAGIC = ROUND_MAGIC * _WIDTH


def table() -> Array:
    """The coefficients of p, (power of d, segment) float32; p is within 3.6e-6 of 2 H."""

    def twice_tail(a: Array) -> Array:
        return np.array([v * math.erfc(v / math.sqrt(2)) for v in a.flat]).reshape(a.shape)

    # A cubic through Chebyshev's nodes is nearly the nearest one. Segment 0 has one half alone.
    nodes = np.cos(np.pi * (np.arange(4) + 0.5) / 4) / 2 * _WIDTH
    centres = np.arange(_SEGMENTS) * _WIDTH
    at = np.where(centres[:, None] > 0, nodes, (nodes + _WIDTH / 2) / 2)
    powers = at[:, :, None] ** np.arange(4)
    values = twice_tail(centres[:, None] + at)
    coefficients = np.linalg.solve(powers, values[..., None])[..., 0]
    return np.asarray(coefficients.T, np.float32)


def quantized_gelu(
    v: Expr, coefficients: Buffer, quant: Sequence[Expr], storage: ActStorage
) -> Expr:
    """A vector of `LANES` float32 as stored int8 activations, with the error of `p` halved.

    Args:
        v: finite.
        coefficients: those of `table`.
        quant: `kernel.quant_args`.
    """
    floats, ints = f"float32x{LANES}", f"int32x{LANES}"

    def lanes_of(value: Expr, dtype: str = "float32") -> Expr:
        return splat(value, LANES, dtype)

    v = I.bind(v)
    a = I.bind(tirx.reinterpret(floats, tirx.reinterpret(ints, v) & lanes_of(0x7FFFFFFF, "int32")))
    within = I.bind(tirx.min(a, lanes_of(_LIMIT)))
    # By way of its bits: TVM takes (a + b) - b for a.
    segment = I.bind(tirx.reinterpret(ints, within + lanes_of(_WIDTH_MAGIC)))
    d = I.bind(within - (tirx.reinterpret(floats, segment) - lanes_of(_WIDTH_MAGIC)))

    def coefficient(power: int) -> Expr:
        low, high = (coefficients.vload([power, at], floats) for at in (0, LANES))
        return avx512.picked(low, high, segment)

    p = coefficient(3)
    for power in (2, 1, 0):
        p = p * d + coefficient(power)
    steps = (v + a - p) * lanes_of(quant[0] * tirx.const(0.5, "float32"))
    # Bits of a float32 order as integers do: what is too large for the magic number stays so.
    bits = tirx.reinterpret(ints, tirx.max(steps, lanes_of(quant[1])) + lanes_of(ROUND_MAGIC))
    shift = tirx.Cast("int32", quant[3]) + tirx.const(-ROUND_MAGIC_BITS, "int32")
    limited = tirx.max(
        tirx.min(bits + lanes_of(shift), lanes_of(127, "int32")), lanes_of(-128, "int32")
    )
    stored = tirx.reinterpret(f"{storage.dtype}x{LANES}", tirx.Cast(f"int8x{LANES}", limited))
    return stored ^ T.broadcast(tirx.const(storage.offset, storage.dtype), LANES)
