"""Scalar TIR expressions that the schedules of every device share.

Each function builds an expression and may be called from the body of a TVMScript function, inside
`T.vectorized` loops and GPU threads alike: nothing here becomes a library call, a branch or a
table, so LLVM keeps the vectors and CUDA the registers.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from gfcompile.targets.tvm.kernel import ActStorage

Expr = Any  # tvm.tirx.Expr, or a number where TVM accepts one

LOG2_E = 1.4426950408889634

_SQRT_HALF = 0.7071067811865476

# erf(x) = x * P(t), t = 2 x^2 / L^2 - 1, for |x| <= L; beyond L it is 1 to within the error of P,
# 4e-7. A weighted minimax fit, as monomials of the centred t: in powers of x^2 the same
# polynomial would cancel catastrophically in float32.
_ERF_LIMIT = 3.8
_ERF_COEFFICIENTS = (
    0.37210768461227417,
    -0.18564051389694214,
    0.1377314329147339,
    -0.11120755970478058,
    0.09097310900688171,
    -0.07231751084327698,
    0.054147880524396896,
    -0.03969425708055496,
    0.029478585347533226,
    -0.01694926619529724,
    0.005586299113929272,
    -0.00450774235650897,
    0.005742543842643499,
    -0.002292884513735771,
)

# GELU(v) = max(v, 0) - H(|v|), H(a) = a (1 - Phi(a)): a bump, here as a minimax polynomial of a on
# [0, L], to 5e-6 before rounding; beyond L GELU is max(v, 0) to 6e-5.
_BUMP_LIMIT = 4.2
_BUMP_COEFFICIENTS = (
    -5.614681111709707e-08,
    0.5002153614170424,
    -0.40193109622237655,
    0.014357558477503904,
    0.03251098796037173,
    0.0456726128921175,
    -0.04698186330834765,
    0.01805849769374574,
    -0.003612325934972624,
    0.00037705982380625337,
    -1.6326506682138838e-05,
)
# What `gelu_to_quantize` may be wrong by.
GELU_TO_QUANTIZE_ERROR = 7e-5

# 2**f for |f| <= 1/2, a minimax fit of the relative error with the first coefficient held at 1, so
# that 2**0 is 1: 9.2e-8 in exact arithmetic, 1.9e-7 with the roundings of float32.
_EXP2_COEFFICIENTS = (
    1.0,
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.0013264729641377926,
)
_EXP2_LOWEST = -126.0

# 1.5 * 2**23: adding it leaves the nearest integer, ties to even, in the low bits of the sum.
_ROUND_MAGIC = 12582912.0
_ROUND_MAGIC_BITS = 0x4B400000


def float32(value: float) -> Expr:
    """`value` as a float32 constant."""
    return tirx.const(value, "float32")


def let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """`body(value)` with `value` computed once, however often `body` mentions it."""
    var = tirx.Var("shared", value.ty.dtype)
    return tirx.Let(var, value, body(var))


def erf(v: Expr) -> Expr:
    """The error function of a float32, to 5e-7; `T.erf` would be a scalar call of libm."""

    def polynomial(x: Expr) -> Expr:
        return let(
            x * x * float32(2 / _ERF_LIMIT**2) - float32(1),
            lambda t: x * _horner(_ERF_COEFFICIENTS, t),
        )

    return let(clip(v, float32(-_ERF_LIMIT), float32(_ERF_LIMIT)), polynomial)


def gelu(v: Expr) -> Expr:
    """GELU in its exact form, 0.5 v (1 + erf(v / sqrt 2)), to 3e-7 |v|."""
    return let(v, lambda x: x * float32(0.5) * (float32(1) + erf(x * float32(_SQRT_HALF))))


def gelu_to_quantize(v: Expr) -> Expr:
    """GELU to 7e-5, and to 3e-5 where |v| < 4.2, in two thirds of the instructions of `gelu`.

    For results that are rounded to steps of int8, some hundred times wider: one in some thousand
    falls to the other side.
    """

    def bump(x: Expr) -> Expr:
        return let(
            tirx.min(tirx.max(x, -x), float32(_BUMP_LIMIT)),
            lambda a: _horner(_BUMP_COEFFICIENTS, a),
        )

    return let(v, lambda x: tirx.max(x, float32(0)) - bump(x))


def exp2(v: Expr) -> Expr:
    """2**v of a float32 of at most 127, to a relative 1.9e-7; below -126 it is 2**-126.

    v = n + f with n its nearest integer, which the sum with the magic number leaves in the low
    bits; 2**n goes straight into the exponent.
    """

    def scaled(v: Expr) -> Expr:
        return let(v + float32(_ROUND_MAGIC), lambda shifted: power(v, shifted))

    def power(v: Expr, shifted: Expr) -> Expr:
        exponent = tirx.reinterpret("int32", shifted) << tirx.const(23, "int32")
        fraction = v - (shifted - float32(_ROUND_MAGIC))
        mantissa = let(fraction, lambda f: _horner(_EXP2_COEFFICIENTS, f))
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
    shift = tirx.Cast("int32", quant[3]) + tirx.const(storage.offset, "int32")
    return tirx.Cast(storage.dtype, round_to_int32(clip(v * quant[0], quant[1], quant[2]), shift))


def round_to_int32(v: Expr, shift: Expr = 0) -> Expr:
    """The integer nearest to a float32 within +-2**22, ties to even, plus `shift`."""
    bits = tirx.reinterpret("int32", v + float32(_ROUND_MAGIC))
    return bits + (shift + tirx.const(-_ROUND_MAGIC_BITS, "int32"))


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


def _uint32(value: int) -> Expr:
    return tirx.const(value, "uint32")
