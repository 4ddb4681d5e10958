import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gfcompile.quantize.qparams import (
    QParams,
    dequantize,
    from_range,
    group_scales,
    integers_of,
    minimize_squared_error,
    mse_scales,
    quantize,
    steps_of,
    symmetric_scales,
)
from gfcompile.quantize.scheme import QuantScheme, TensorScheme
from gfcompile.runtime.errors import UserError

ACTIVATION = QuantScheme().activation
WEIGHT = QuantScheme().weight
INT4 = TensorScheme(low=-7, high=7, symmetric=True, per_channel=True)

# float32 rounds v / scale and q * scale by 2^-24 relative each, |q| < 256: 3e-5 of a step.
HALF_STEP = 0.5 + 1e-4
NORMAL = np.finfo(np.float32).tiny

finite = st.floats(-1e6, 1e6, width=32).filter(lambda v: v == 0 or abs(v) > 1e-12)
weights = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=finite
)
samples = hnp.arrays(np.float32, st.integers(1, 60), elements=finite).filter(np.any)


def error_of(values: np.ndarray, counts: np.ndarray, params: QParams) -> float:
    integers = quantize(values, params.scale, params.zero_point, ACTIVATION)
    back = (integers - params.zero_point).astype(np.float64) * params.scale
    return float((counts * (values - back) ** 2).sum())


@given(weights, st.sampled_from([WEIGHT, INT4]))
def test_weight_round_trip_error_is_at_most_half_a_step(
    weight: np.ndarray, scheme: TensorScheme
) -> None:
    scales = symmetric_scales(weight, 0, scheme).reshape(-1, *[1] * (weight.ndim - 1))
    integers = quantize(weight, scales, 0, scheme)
    assert integers.min() >= scheme.low
    assert integers.max() <= scheme.high
    error = np.abs(dequantize(integers, scales, 0).astype(np.float64) - weight)
    assert (error <= HALF_STEP * scales).all()


@given(weights)
def test_weight_scales_are_normal_and_mirror_images_quantize_to_mirror_images(
    weight: np.ndarray,
) -> None:
    scales = symmetric_scales(weight, 0, WEIGHT)
    assert scales.dtype == np.float32
    assert (scales >= NORMAL).all()
    assert (symmetric_scales(-weight, 0, WEIGHT) == scales).all()
    shape = (-1, *[1] * (weight.ndim - 1))
    one, other = (quantize(w, scales.reshape(shape), 0, WEIGHT) for w in (weight, -weight))
    assert (one == -other).all()


def test_an_all_zero_channel_has_a_scale_whose_square_is_normal() -> None:
    scales = symmetric_scales(np.zeros((3, 4), np.float32), 0, WEIGHT)
    assert (scales * scales >= NORMAL).all()
    assert np.isfinite(1 / scales).all()


def test_each_channel_has_its_own_scale_along_either_axis() -> None:
    weight = np.array([[127.0, 1.0], [-254.0, 0.5]], np.float32)
    assert symmetric_scales(weight, 0, WEIGHT).tolist() == [1.0, 2.0]
    assert symmetric_scales(weight, -1, WEIGHT).tolist() == [2.0, np.float32(1 / 127)]


@given(finite, finite)
@example(0.0, 1e-30)
def test_zero_is_exactly_represented_whatever_the_range(a: float, b: float) -> None:
    params = from_range(min(a, b), max(a, b), ACTIVATION)
    assert params.scale >= NORMAL
    assert params.scale == np.float32(params.scale)
    zero = quantize(np.zeros(1, np.float32), params.scale, params.zero_point, ACTIVATION)
    assert ACTIVATION.low <= zero[0] <= ACTIVATION.high
    assert dequantize(zero, params.scale, params.zero_point)[0] == 0.0


@given(samples)
def test_a_range_covers_what_it_was_made_from_within_half_a_step(values: np.ndarray) -> None:
    params = from_range(float(values.min()), float(values.max()), ACTIVATION)
    integers = quantize(values, params.scale, params.zero_point, ACTIVATION)
    error = np.abs(dequantize(integers, params.scale, params.zero_point).astype(float) - values)
    # Half a step of rounding, or half a step that rounding the zero point took off the range,
    # and then a value between two steps is not both: it saturates by less than that half.
    assert (error <= HALF_STEP * params.scale).all()


@given(samples)
def test_the_search_is_never_worse_than_min_max(values: np.ndarray) -> None:
    points, counts = np.unique(values.astype(np.float64), return_counts=True)
    weights = counts.astype(np.float64)
    found = minimize_squared_error(points, weights, ACTIVATION)
    plain = from_range(points[0], points[-1], ACTIVATION)
    assert ACTIVATION.low <= found.zero_point <= ACTIVATION.high
    assert found.scale >= NORMAL
    # quantize() divides in float32: a tie may round the other way, by 2^-24 of the value.
    slack = 1e-6 * float((weights * points**2).sum()) / 255
    assert error_of(points, weights, found) <= error_of(points, weights, plain) + slack


def test_the_search_finds_what_brute_force_over_both_ends_finds() -> None:
    rng = np.random.default_rng(0)
    for values in (
        rng.standard_normal(2000),
        rng.standard_t(2, 2000),
        np.maximum(rng.standard_normal(2000), -0.17),
        np.append(rng.standard_normal(2000), [40.0, 55.0]),
    ):
        points, counts = np.sort(values), np.ones(len(values))
        found = error_of(points, counts, minimize_squared_error(points, counts, ACTIVATION))
        brute = min(
            error_of(points, counts, from_range(low, high, ACTIVATION))
            for low in points[0] * 2.0 ** (-np.arange(0, 8, 0.25))
            for high in points[-1] * 2.0 ** (-np.arange(0, 8, 0.25))
        )
        assert found <= 1.02 * brute


@pytest.mark.parametrize(
    ("value", "integer"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (1e9, 127), (-1e9, -128)]
)
def test_halves_round_to_even_and_the_rest_saturates(value: float, integer: int) -> None:
    assert quantize(np.array([value]), 1.0, 0, ACTIVATION)[0] == integer


def test_four_bit_scales_leave_less_error_than_those_that_clip_nothing() -> None:
    scheme = QuantScheme.with_weight_bits(4).weight
    weight = np.random.default_rng(0).standard_t(4, (6, 500)).astype(np.float32)

    def error(scales: np.ndarray) -> np.ndarray:
        column = scales[:, np.newaxis]
        rounded = dequantize(quantize(weight, column, 0, scheme), column, 0)
        return np.square(rounded - weight).sum(axis=1)

    widest = symmetric_scales(weight, 0, scheme)
    best = mse_scales(weight, 0, scheme)
    assert (error(best) < 0.75 * error(widest)).all()
    for factor in (0.98, 1.02):
        assert (error(best) <= 1.02 * error(best * np.float32(factor))).all()
    assert np.array_equal(mse_scales(np.zeros((2, 3), np.float32), 0, scheme), [2.0**-60] * 2)


@pytest.mark.parametrize("rule", ["minmax", "mse"])
@pytest.mark.parametrize("shape", [(5, 48), (3, 40), (4, 3, 4, 4), (2, 7)])
def test_a_weight_in_groups_is_an_integer_of_eight_bits_times_its_channels_scale(
    shape: tuple[int, ...], rule: str
) -> None:
    scheme = TensorScheme(low=-7, high=7, symmetric=True, per_channel=True, group_size=16)
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=shape) * rng.uniform(0.1, 1, shape)).astype(np.float32)
    scales, factors = group_scales(weight, scheme, rule)
    assert scales.shape == shape[:1]
    assert factors.shape == (shape[0], -(-int(np.prod(shape[1:])) // 16))
    assert factors.max() == 18
    integers = integers_of(weight, scales, factors, scheme)
    assert np.abs(integers).max() <= 126
    steps = np.broadcast_to(steps_of(scales, factors, shape, scheme), shape)
    rounded = integers * scales.reshape(-1, *[1] * (len(shape) - 1))
    if rule == "minmax":  # nothing is clipped
        assert (np.abs(rounded - weight) <= HALF_STEP * steps).all()
    # What was rounded once is left as it is.
    again = integers_of(rounded.astype(np.float32), scales, factors, scheme)
    assert np.array_equal(again, integers)


def test_groups_follow_weights_that_differ_along_a_channel() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(32, 128)).astype(np.float32)
    weight *= np.repeat(2.0 ** rng.integers(-3, 1, (32, 4)), 32, axis=1).astype(np.float32)
    grouped = TensorScheme(low=-7, high=7, symmetric=True, per_channel=True, group_size=32)
    scales, factors = group_scales(weight, grouped, "mse")
    ours = integers_of(weight, scales, factors, grouped) * scales[:, np.newaxis]
    column = mse_scales(weight, 0, INT4)[:, np.newaxis]
    plain = dequantize(quantize(weight, column, 0, INT4), column, 0)
    assert np.square(ours - weight).mean() < np.square(plain - weight).mean() / 1.5


def test_groups_that_cannot_be_are_named() -> None:
    for size in (0, -16, 24):
        with pytest.raises(UserError, match="no multiple of 16"):
            QuantScheme.with_weight_bits(4, group_size=size)
    with pytest.raises(UserError, match="--group-size is for --weight-bits 4"):
        QuantScheme.with_weight_bits(8, group_size=32)
