"""Scalar TIR expressions that the schedules of every device share.

Each function builds an expression and may be called from the body of a TVMScript function, inside
`T.vectorized` loops and GPU threads alike: nothing here becomes a library call, a branch or a
table, so LLVM keeps the vectors and CUDA the registers.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from gfcompile.targets.tvm.kernel import Act, ActStorage

Expr = Any  # tvm.tirx.Expr, or a number where TVM accepts one

LOG2_E = 1.4426950408889634

# GELU(v) = max(v, 0) - H(|v|), H(a) = a (1 - Phi(a)). The tail of the normal distribution falls
# like exp(-a^2 / 2), which polynomials follow badly; a root of it they follow well: 1 - Phi is Q^4
# or Q^8, Q a minimax fit on [0, L], and squarings cost less than the terms that they replace.
# Beyond L a is taken for L, where H is next to nothing.
_TAIL_LIMIT = 5.4
_TAIL_FOURTH_ROOT = (  # 1 - Phi(a) to 4.5e-8
    0.8408963967364728,
    -0.16773324742635332,
    -0.05020230235932937,
    0.004660874792742365,
    0.003781868831595923,
    -2.6040955681397423e-05,
    -0.00031074625506017267,
    5.9026789843562896e-05,
    -3.4447666522518e-06,
)
_COARSE_TAIL_LIMIT = 5.1
_TAIL_EIGHTH_ROOT = (  # a (1 - Phi(a)) to 1.5e-6
    0.917003333568573,
    -0.09149029850959778,
    -0.03172305226325989,
    -0.001106916111893952,
    0.0019391670357435942,
    -0.00019087908731307834,
)
# What `gelu_to_quantize` may be wrong by.
GELU_TO_QUANTIZE_ERROR = 2e-6

# 2**f for |f| <= 1/2, a minimax fit of the relative error with the first coefficient held at 1, so
# that 2**0 is 1: 9.2e-8 in exact arithmetic, 1.9e-7 with the roundings of float32.
EXP2_COEFFICIENTS = (
    1.0,
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.0013264729641377926,
)
_EXP2_LOWEST = -126.0

# 1.5 * 2**23: adding it leaves the nearest integer, ties to even, in the low bits of the sum.
ROUND_MAGIC = 12582912.0
ROUND_MAGIC_BITS = 0x4B400000


def float32(value: float) -> Expr:
    """`value` as a float32 constant."""
    return tirx.const(value, "float32")


def let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """`body(value)` with `value` computed once, however often `body` mentions it."""
    var = tirx.Var("shared", value.ty.dtype)
    return tirx.Let(var, value, body(var))


def gelu(v: Expr) -> Expr:
    """GELU in its exact form, v Phi(v), to 3e-7 |v|."""
    return _gelu(v, _TAIL_FOURTH_ROOT, 2, _TAIL_LIMIT, _by_pairs)


def gelu_in_few_registers(v: Expr) -> Expr:
    """The same in one register less, for threads of a GPU."""
    return _gelu(v, _TAIL_FOURTH_ROOT, 2, _TAIL_LIMIT, _horner)


def gelu_to_quantize(v: Expr) -> Expr:
    """GELU to 2e-6, in three quarters of the instructions of `gelu`.

    For results that are rounded to steps of int8, some ten thousand times wider: one in as many
    falls to the other side. Of a model whose ranges outliers have widened, that one is noticed.
    """
    return _gelu(v, _TAIL_EIGHTH_ROOT, 3, _COARSE_TAIL_LIMIT, _by_pairs)


def _gelu(
    v: Expr,
    root: Sequence[float],
    squarings: int,
    limit: float,
    polynomial: Callable[[Sequence[float], Expr], Expr],
) -> Expr:
    """max(v, 0) - a Q(a)^(2^squarings), a = |v| up to `limit`."""

    def bump(a: Expr) -> Expr:
        tail = polynomial(root, a)
        for _ in range(squarings):
            tail = let(tail, lambda q: q * q)
        return a * tail

    def difference(x: Expr) -> Expr:
        a = tirx.min(tirx.abs(x), float32(limit))
        return tirx.max(x, float32(0)) - let(a, bump)

    return let(v, difference)


def exp2(v: Expr) -> Expr:
    """2**v of a float32 of at most 127, to a relative 1.9e-7; below -126 it is 2**-126.

    v = n + f with n its nearest integer, which the sum with the magic number leaves in the low
    bits; 2**n goes straight into the exponent.
    """

    def scaled(v: Expr) -> Expr:
        return let(v + float32(ROUND_MAGIC), lambda shifted: power(v, shifted))

    def power(v: Expr, shifted: Expr) -> Expr:
        exponent = tirx.reinterpret("int32", shifted) << tirx.const(23, "int32")
        fraction = v - (shifted - float32(ROUND_MAGIC))
        mantissa = let(fraction, lambda f: _horner(EXP2_COEFFICIENTS, f))
        return tirx.reinterpret("float32", tirx.reinterpret("int32", mantissa) + exponent)

    return let(tirx.max(v, float32(_EXP2_LOWEST)), scaled)


def exp(v: Expr) -> Expr:
    """e**v of a float32 of at most 88, to a relative 2e-7 + 1.2e-7 |v|, or 2**-126 if that is more.

    The second term is the rounding of v log2(e): nothing where e**v is added to 1, as in a softmax.
    """
    return exp2(v * float32(LOG2_E))


def clip(v: Expr, lowest: Expr, highest: Expr) -> Expr:
    """`v` held within [lowest, highest]."""
    return tirx.max(tirx.min(v, highest), lowest)


def quantize(v: Expr, quant: Any, storage: ActStorage) -> Expr:
    """A float32 as a stored int8 activation: ONNX QuantizeLinear, half to even.

    Args:
        v: the value.
        quant: buffer of `kernel.quant_args`: 1 / scale, lowest, highest, zero_point.
        storage: how the device stores int8 activations.
    """
    if storage.saturates:
        return _quantize_saturating(v * quant[0], quant[3])
    shift = tirx.Cast("int32", quant[3]) + tirx.const(storage.offset, "int32")
    return tirx.Cast(storage.dtype, round_to_int32(clip(v * quant[0], quant[1], quant[2]), shift))


def stored(v: Expr, out: Act, quant: Any, storage: ActStorage) -> Expr:
    """A float32 as a kernel with that `out` stores it; `quant` is used for int8 alone."""
    if out == "int8":
        return quantize(v, quant, storage)
    return v if out == "float32" else tirx.Cast(out, v)


def _quantize_saturating(steps: Expr, zero_point: Expr) -> Expr:
    """`quantize` where saturating is free: limits that an int16 and an int8 have anyway."""

    def pure(name: str, dtype: str, *args: Expr) -> Expr:
        return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)

    def narrowed(value: Expr, wide: str, narrow: str, limit: int) -> Expr:
        low, high = tirx.const(-limit, wide), tirx.const(limit - 1, wide)
        return tirx.Cast(narrow, tirx.max(tirx.min(value, high), low))

    nearest = pure("llvm.fptosi.sat", "int32", pure("llvm.roundeven", "float32", steps))
    shifted = pure(
        "llvm.sadd.sat",
        "int16",
        narrowed(nearest, "int32", "int16", 1 << 15),
        tirx.Cast("int16", zero_point),
    )
    return narrowed(shifted, "int16", "int8", 1 << 7)


def round_to_int32(v: Expr, shift: Expr = 0) -> Expr:
    """The integer nearest to a float32 within +-2**22, ties to even, plus `shift`."""
    bits = tirx.reinterpret("int32", v + float32(ROUND_MAGIC))
    return bits + (shift + tirx.const(-ROUND_MAGIC_BITS, "int32"))


def dequantize(q: Expr, dequant: Any, storage: ActStorage) -> Expr:
    """A stored int8 activation as float32: (logical - zero_point) * scale, as ONNX has it.

    Args:
        q: the stored value.
        dequant: buffer of (scale, zero_point).
        storage: how the device stores int8 activations.
    """
    logical = tirx.Cast("int32", q) - tirx.const(storage.offset, "int32")
    return (tirx.Cast("float32", logical) - dequant[1]) * dequant[0]


def half_to_float(bits: Expr) -> Expr:
    """The float32 of a finite float16 given by its bits (uint16), subnormals included.

    The exponent and mantissa shifted into a float32's place read 2**112 times too small, and one
    exact multiplication puts that right, for a subnormal half (a subnormal float32 here) too.
    """

    def assemble(word: Expr) -> Expr:
        magnitude = (word & _uint32(0x7FFF)) << _uint32(13)
        sign = (word & _uint32(0x8000)) << _uint32(16)
        return tirx.reinterpret("float32", magnitude | sign) * float32(2.0**112)

    return let(tirx.Cast("uint32", bits), assemble)


def order_key(score: Expr) -> Expr:
    """An int32 that orders as the float32 does: equal for both zeros, and total, NaN included."""

    def key(bits: Expr) -> Expr:
        flipped = bits ^ ((bits >> tirx.const(31, "int32")) & tirx.const(0x7FFFFFFF, "int32"))
        # TVM takes the bits of -0 for a number that no int32 has, so zeros are told as floats.
        return tirx.Select(score == float32(0), tirx.const(0, "int32"), flipped)

    return let(tirx.reinterpret("int32", score), key)


def _horner(coefficients: Sequence[float], v: Expr) -> Expr:
    """The polynomial with `coefficients`, that of the lowest power first."""
    acc = float32(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        acc = acc * v + float32(coefficient)
    return acc


def _by_pairs(coefficients: Sequence[float], v: Expr) -> Expr:
    """The polynomial as Horner's scheme in v^2 over pairs of terms.

    A multiply-add overwrites its addend on ARM: here that is a sum of its own in every second
    one, and no constant that would have to be copied first.
    """
    pairs = [coefficients[i : i + 2] for i in range(0, len(coefficients), 2)]
    terms = [
        float32(pair[0]) + v * float32(pair[1]) if len(pair) == 2 else float32(pair[0])
        for pair in pairs
    ]

    def horner(square: Expr) -> Expr:
        acc = terms[-1]
        for term in reversed(terms[:-1]):
            acc = term + acc * square
        return acc

    return let(v * v, horner)


def _uint32(value: int) -> Expr:
    return tirx.const(value, "uint32")
