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
from gfcompile.targets.tvm.schedules.cpu_dot import Buffer
from gfcompile.targets.tvm.schedules.math import Expr

LANES = 16
_SEGMENTS, _WIDTH = 32, 0.25
# Within the last segment, where H is next to nothing.
_LIMIT = (_SEGMENTS - 0.51) * _WIDTH
# Added to a number it leaves the nearest multiple of 1/4, or of 1, in the low bits.
_QUARTER_MAGIC, _MAGIC = 1.5 * 2**21, 1.5 * 2**23
_MAGIC_BITS = 0x4B400000


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

    def floats_of(value: Expr) -> Expr:
        return T.broadcast(
            tirx.const(value, "float32") if isinstance(value, float) else value, LANES
        )

    def ints_of(value: Expr) -> Expr:
        return T.broadcast(tirx.const(value, "int32") if isinstance(value, int) else value, LANES)

    v = I.bind(v)
    a = I.bind(tirx.reinterpret(floats, tirx.reinterpret(ints, v) & ints_of(0x7FFFFFFF)))
    within = I.bind(tirx.min(a, floats_of(_LIMIT)))
    # By way of its bits: TVM takes (a + b) - b for a.
    segment = I.bind(tirx.reinterpret(ints, within + floats_of(_QUARTER_MAGIC)))
    d = I.bind(within - (tirx.reinterpret(floats, segment) - floats_of(_QUARTER_MAGIC)))

    def coefficient(power: int) -> Expr:
        low, high = (coefficients.vload([power, at], floats) for at in (0, LANES))
        pick = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpermi2var.ps.512")
        return T.call_llvm_pure_intrin(pick, low, segment, high, dtype=floats)

    p = coefficient(3)
    for power in (2, 1, 0):
        p = p * d + coefficient(power)
    steps = (v + a - p) * floats_of(quant[0] * tirx.const(0.5, "float32"))
    # Bits of a float32 order as integers do: what is too large for the magic number stays so.
    bits = tirx.reinterpret(ints, tirx.max(steps, floats_of(quant[1])) + floats_of(_MAGIC))
    shift = tirx.Cast("int32", quant[3]) + tirx.const(-_MAGIC_BITS, "int32")
    limited = tirx.max(tirx.min(bits + ints_of(shift), ints_of(127)), ints_of(-128))
    stored = tirx.reinterpret(f"{storage.dtype}x{LANES}", tirx.Cast(f"int8x{LANES}", limited))
    return stored ^ T.broadcast(tirx.const(storage.offset, storage.dtype), LANES)
