"""Scales, zero points and integers: the arithmetic of `scheme`, in NumPy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.quantize.scheme import MAX_FACTOR, TensorScheme

__all__ = [
    "QParams",
    "dequantize",
    "from_range",
    "group_scales",
    "integers_of",
    "minimize_squared_error",
    "mse_scales",
    "quantize",
    "steps_of",
    "symmetric_scales",
    "with_factors",
]

FloatArray = npt.NDArray[np.floating[Any]]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]
Factors = npt.NDArray[np.uint8]

# A channel of zeros needs some scale. The product of two of these, the scale of a bias, is still a
# normal float32: devices flush denormals to zero.
SMALLEST_SCALE = np.float32(2.0**-60)

# Candidate scales: eighths of an octave down to 1/1024 of the full range, where 99.9% of the range
# would be clipped, then sixty-fourths around the best of them (1% in scale moves the squared error
# near its minimum by far less than 1%).
_COARSE = 2.0 ** (-np.arange(8 * 10 + 1) / 8)
_FINE = 2.0 ** (np.arange(-8, 9) / 64)


@dataclass(frozen=True)
class QParams:
    """Scale (a float32 value) and zero point of a tensor that has one of each."""

    scale: float
    zero_point: int


def quantize(
    values: FloatArray, scale: float | Float32Array, zero_point: int, scheme: TensorScheme
) -> IntArray:
    """rint(values / scale) + zero_point, halves to even, saturated to the scheme's integers.

    A `scale` array must broadcast against `values`.
    """
    steps = np.rint(values.astype(np.float32) / np.asarray(scale, np.float32))
    # Saturated before the cast: a float beyond int32 has no defined integer.
    low, high = scheme.low - zero_point, scheme.high - zero_point
    return np.asarray(np.clip(steps, low, high) + np.float32(zero_point), np.int32)


def dequantize(integers: IntArray, scale: float | Float32Array, zero_point: int) -> Float32Array:
    """(integers - zero_point) * scale in float32."""
    steps = np.asarray(integers - zero_point, np.float32)
    return np.asarray(steps * np.asarray(scale, np.float32), np.float32)


def from_range(low: float, high: float, scheme: TensorScheme) -> QParams:
    """The parameters that represent [low, high], widened to hold zero, within half a step."""
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme.symmetric:
        return QParams(_as_scale(max(-low, high) / scheme.high), 0)
    scale = _as_scale((high - low) / (scheme.high - scheme.low))
    zero_point = round(scheme.low - low / scale)
    return QParams(scale, min(max(zero_point, scheme.low), scheme.high))


def symmetric_scales(weight: FloatArray, axis: int, scheme: TensorScheme) -> Float32Array:
    """One scale per index of `axis`: that channel's largest magnitude is the largest integer.

    A channel of zeros, which any scale represents, gets the smallest that is safe.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    largest = np.abs(weight).max(axis=others).astype(np.float32)
    return np.asarray(np.maximum(largest / np.float32(scheme.high), SMALLEST_SCALE), np.float32)


def mse_scales(weight: FloatArray, axis: int, scheme: TensorScheme) -> Float32Array:
    """One scale per index of `axis`: the one whose squared rounding and clipping error is least.

    Scales are searched from that of `symmetric_scales` down to a quarter of it in steps of 1%.
    """
    widest = symmetric_scales(weight, axis, scheme)
    channels = np.moveaxis(weight, axis, 0).reshape(len(widest), -1).astype(np.float32)
    best = widest
    least = np.full(len(widest), np.inf)
    for step in range(76):
        scales = np.maximum(widest * np.float32(1 - 0.01 * step), SMALLEST_SCALE)
        column = scales[:, np.newaxis]
        error = channels - dequantize(quantize(channels, column, 0, scheme), column, 0)
        squared = np.square(error, dtype=np.float64).sum(axis=1)
        best = np.where(squared < least, scales, best)
        least = np.minimum(squared, least)
    return np.asarray(best, np.float32)


def group_scales(
    weight: FloatArray, scheme: TensorScheme, rule: str
) -> tuple[Float32Array, Factors]:
    """One scale per output channel, and the factors of its groups, (channels, groups).

    The group that needs the widest steps has the largest factor; the others are as much finer as
    whole factors allow.

    Args:
        weight: output channels first; a group is of neighbours among the rest, flattened.
        rule: as in `QuantScheme.weight_range`.
    """
    assert scheme.group_size is not None, scheme
    channels = weight.reshape(len(weight), -1).astype(np.float32)
    # Zeros fill up the last group: they are represented whatever its scale.
    padded = np.pad(channels, ((0, 0), (0, -channels.shape[1] % scheme.group_size)))
    choose = mse_scales if rule == "mse" else symmetric_scales
    wanted = choose(padded.reshape(-1, scheme.group_size), 0, scheme).reshape(len(weight), -1)
    scales = np.maximum(wanted.max(axis=1) / np.float32(MAX_FACTOR), SMALLEST_SCALE)
    # A range that must not be clipped is not rounded down either.
    rounded = np.rint if rule == "mse" else np.ceil
    factors = np.clip(rounded(wanted / scales[:, np.newaxis]), 1, MAX_FACTOR)
    return np.asarray(scales, np.float32), np.asarray(factors, np.uint8)


def steps_of(
    scales: Float32Array, factors: Factors | None, shape: tuple[int, ...], scheme: TensorScheme
) -> Float32Array:
    """How far apart the values are that each weight can have; broadcasts against `shape`.

    Args:
        scales: (channels,), of the first axis.
        factors: None where there are no groups.
    """
    column = scales.reshape(-1, *[1] * (len(shape) - 1))
    if factors is None:
        return column
    return np.asarray(column * _spread(factors, shape, scheme), np.float32)


def integers_of(
    weight: FloatArray, scales: Float32Array, factors: Factors | None, scheme: TensorScheme
) -> IntArray:
    """The weight in steps of its channels' scales, factors of groups multiplied in."""
    codes = quantize(weight, steps_of(scales, factors, weight.shape, scheme), 0, scheme)
    return with_factors(codes, factors, scheme)


def with_factors(codes: IntArray, factors: Factors | None, scheme: TensorScheme) -> IntArray:
    """Integers in steps of their channels' scales, from such in steps of their groups'."""
    if factors is None:
        return codes
    return np.asarray(codes * _spread(factors, codes.shape, scheme).astype(np.int32), np.int32)


def _spread(factors: Factors, shape: tuple[int, ...], scheme: TensorScheme) -> Factors:
    """The factor of each weight."""
    assert scheme.group_size is not None, scheme
    size = int(np.prod(shape[1:]))
    # Of the file's own size, whatever size of a group it names.
    return factors[:, np.arange(size) // scheme.group_size].reshape(shape)


def minimize_squared_error(
    values: Float64Array, counts: Float64Array, scheme: TensorScheme
) -> QParams:
    """The parameters whose expected squared error over a histogram is least.

    Whatever the zero point, zero is represented, so the representable values are multiples of the
    scale, and the zero point says only which 2^8 of them. The rounding error of each value
    therefore depends on the scale alone, and one pass over the histogram, summed up from the left,
    gives the error of every zero point: the search over both is exhaustive, for each of about a
    hundred scales, and no outlier can trap it in a local minimum.

    Args:
        values: ascending, finite, not all zero.
        counts: how often each value occurs.
    """
    widest = from_range(float(values[0]), float(values[-1]), scheme)
    if scheme.symmetric:
        zero_points = np.zeros(1, np.int64)
    else:
        zero_points = np.arange(scheme.low, scheme.high + 1)
    moments = np.stack([counts, counts * values, counts * values * values])
    sums = np.concatenate([np.zeros((3, 1)), np.cumsum(moments, axis=1)], axis=1)

    def best_at(scale: float) -> tuple[float, QParams]:
        scale = _as_scale(scale)
        residue = values - scale * np.rint(values / scale)
        rounding = np.concatenate([[0.0], np.cumsum(counts * residue * residue)])
        lowest = (scheme.low - zero_points) * scale
        highest = (scheme.high - zero_points) * scale
        first = np.searchsorted(values, lowest)  # values[first:last] are not clipped
        last = np.searchsorted(values, highest, side="right")
        below, above = sums[:, first], sums[:, -1:] - sums[:, last]
        error = rounding[last] - rounding[first]
        for bound, (count, first_moment, second_moment) in ((lowest, below), (highest, above)):
            # The sum of (v - bound)^2; cancellation may leave it a rounding error below zero.
            error += np.maximum(second_moment - 2 * bound * first_moment + bound**2 * count, 0)
        best = int(error.argmin())
        return float(error[best]), QParams(scale, int(zero_points[best]))

    # Ties go to the earlier, wider scale: `min` keeps the first.
    coarse = min((best_at(widest.scale * step) for step in _COARSE), key=lambda found: found[0])
    fine = (best_at(coarse[1].scale * step) for step in _FINE)
    return min((coarse, *fine), key=lambda found: found[0])[1]


def _as_scale(scale: float) -> float:
    return float(max(np.float32(scale), SMALLEST_SCALE))
