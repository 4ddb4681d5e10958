"""Integers of four bits, two to a byte, and such that have factors."""

from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.quantize.scheme import MAX_FACTOR

__all__ = ["factored", "fits_int4", "pack_int4", "unpack_int4"]

_MAX_CODE = 7


def fits_int4(values: npt.NDArray[np.signedinteger[Any]]) -> bool:
    """Whether all values are in [-8, 7]."""
    return values.size == 0 or bool(values.min() >= -8 and values.max() <= 7)


def factored(
    values: npt.NDArray[np.int8], axes: tuple[int, ...]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint8]] | None:
    """Codes of four bits and the factors that make `values` of them; None if there are none.

    Of all factors that do, the smallest.

    Args:
        axes: along these a factor is the same; it has size 1 there.
    """
    factors = np.zeros(np.abs(values).max(axis=axes, keepdims=True).shape, np.uint8)
    largest = np.abs(values.astype(np.int16)).max(axis=axes, keepdims=True)
    for factor in range(1, MAX_FACTOR + 1):
        fits = (values % factor == 0).all(axis=axes, keepdims=True)
        factors[(factors == 0) & fits & (largest <= _MAX_CODE * factor)] = factor
    if not factors.all():
        return None
    return (values // factors.astype(np.int8)).astype(np.int8), factors


def pack_int4(values: npt.NDArray[np.signedinteger[Any]]) -> npt.NDArray[np.uint8]:
    """Integers of [-8, 7], flattened, two to a byte: the earlier one in the low half."""
    assert fits_int4(values), "more than four bits"
    flat = values.reshape(-1).astype(np.int8)
    even = np.append(flat, np.int8(0)) if flat.size % 2 else flat
    halves = even.view(np.uint8) & 0x0F
    return np.asarray(halves[0::2] | (halves[1::2] << 4), np.uint8)


def unpack_int4(packed: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """The inverse of `pack_int4`, for an array of this shape."""
    halves = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(-1)
    signed = ((halves ^ 8).astype(np.int16) - 8).astype(np.int8)  # sign bit 3
    return signed[: int(np.prod(shape))].reshape(shape)
