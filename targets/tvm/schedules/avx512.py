"""What AVX-512 does in an instruction that portable arithmetic takes several for.

Arguments are whole registers: 16 float32 or int32.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from gfcompile.targets.tvm.kernel import ActStorage
from gfcompile.targets.tvm.schedules.math import Expr

LANES = 16
BYTES = 64
_QUARTERS = 4  # of a register, which packs go by
# Of all lanes, rounded as the control register says: to nearest, ties to even.
_MODE = (T.int16(-1), T.int32(4))


def fraction(v: Expr) -> Expr:
    """v less the integer nearest to it, exactly."""
    return _pure("mask.reduce.ps", "float32", v, T.int32(8), v, *_MODE)


def scaled(m: Expr, n: Expr) -> Expr:
    """m * 2**n for whole n; 0 where that is too little for a float32."""
    return _pure("mask.scalef.ps", "float32", m, n, m, *_MODE)


def rounded(v: Expr) -> Expr:
    """The integers nearest to v, ties to even; the least one where they exceed an int32."""
    return _pure("mask.cvtps2dq", "int32", v, T.broadcast(T.int32(0), LANES), *_MODE)


def picked(low: Expr, high: Expr, numbers: Expr) -> Expr:
    """For each lane one of the 32 float32 of `low` and `high`, by the low five bits of a number."""
    return _pure("vpermi2var.ps", "float32", low, numbers, high)


def packed(words: Sequence[Expr], dtype: str, shift: Expr | None = None) -> Expr:
    """Up to four registers of int32 as one of int8 or uint8, plus `shift` (int16), saturated.

    The bytes are the words' by turns: four of the first register, four of the second, ...
    """
    words = [*words, *[T.broadcast(T.int32(0), LANES)] * (_QUARTERS - len(words))]
    halves = [_pure("packssdw", "int16", *words[i : i + 2]) for i in (0, 2)]
    if shift is not None:
        halves = [half + shift for half in halves]
    name = "packuswb" if dtype == "uint8" else "packsswb"
    return T.reinterpret(_pure(name, "int8", *halves), dtype=f"{dtype}x{BYTES}")


def quantized(values: Sequence[Expr], quant: Any, storage: ActStorage) -> Expr:
    """Up to four registers of float32 as one of int8 activations: `math.quantize`, by saturation.

    Args:
        values: the registers.
        quant: buffer of `kernel.quant_args`.
        storage: how the device stores int8 activations.
    """
    inverse, highest = (T.bind(T.broadcast(quant[i], LANES)) for i in (0, 2))
    # Without the limit, what exceeds an int32 would be the least number.
    words = [T.bind(rounded(tirx.min(value * inverse, highest))) for value in values]
    shift = T.broadcast(tirx.Cast("int16", quant[3]) + T.int16(storage.offset), 2 * LANES)
    turns = T.bind(T.reinterpret(packed(words, storage.dtype, shift), dtype=f"int32x{LANES}"))
    order = [i % _QUARTERS * _QUARTERS + i // _QUARTERS for i in range(_QUARTERS * len(values))]
    in_order = T.Shuffle([turns], order)
    return T.reinterpret(in_order, dtype=f"{storage.dtype}x{LANES * len(values)}")


def _pure(name: str, dtype: str, *args: Expr) -> Expr:
    lanes = BYTES // np.dtype(dtype).itemsize
    number = T.llvm_lookup_intrinsic_id(f"llvm.x86.avx512.{name}.512")
    return T.call_llvm_pure_intrin(number, *args, dtype=f"{dtype}x{lanes}")
