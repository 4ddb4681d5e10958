import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gfcompile.quantize.observers import ActivationObserver, WeightObserver
from gfcompile.quantize.qparams import dequantize, quantize
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.runtime.errors import CompileError
from gfcompile.runtime.exactness import sqnr_db

SCHEME = QuantScheme()


def observed(*tensors: np.ndarray, rule: str = "mse") -> ActivationObserver:
    observer = ActivationObserver(SCHEME.activation, rule)
    for tensor in tensors:
        observer(torch.from_numpy(np.asarray(tensor, np.float32)))
    return observer


def sqnr_after(values: np.ndarray, rule: str) -> float:
    observer = observed(values, rule=rule)
    params = observer.settle("layer")
    integers = quantize(values, params.scale, params.zero_point, SCHEME.activation)
    return sqnr_db(values, dequantize(integers, params.scale, params.zero_point))


def test_rare_outliers_do_not_take_the_resolution_from_the_rest() -> None:
    values = np.random.default_rng(0).standard_normal(1_000_000)
    values[:2] = [40.0, -40.0]
    # min/max: step 80/255, noise step^2/12 per value, 20.9 dB. Best clip c: noise c^2 5.1 from
    # steps plus 2 (40 - c)^2 from clipping, least near c = 11: 26.4 dB.
    assert sqnr_after(values, "minmax") == pytest.approx(20.9, abs=0.2)
    assert sqnr_after(values, "mse") == pytest.approx(26.4, abs=0.3)


@pytest.mark.parametrize("degrees_of_freedom", [3, 4])
def test_heavy_tails_are_clipped_to_advantage(degrees_of_freedom: int) -> None:
    values = np.random.default_rng(1).standard_t(degrees_of_freedom, 300_000)
    assert sqnr_after(values, "mse") > sqnr_after(values, "minmax") + 1.0


def test_an_outlier_that_holds_the_energy_is_kept() -> None:
    values = np.random.default_rng(2).standard_normal(10_000)
    values[0] = 1e6
    observer = observed(values)
    params = observer.settle("layer")
    assert (SCHEME.activation.high - params.zero_point) * params.scale > 0.99e6


def test_uniform_values_are_not_clipped() -> None:
    values = np.linspace(-1, 3, 100_001, dtype=np.float32)
    observer = observed(values)
    params = observer.settle("layer")
    assert params.scale == pytest.approx(4 / 255, rel=0.01)
    assert observer.clipped_fraction() < 0.002


def test_clipped_fraction_and_sqnr_are_those_of_the_values_themselves() -> None:
    values = np.random.default_rng(3).laplace(size=200_000).astype(np.float32)
    observer = observed(values)
    params = observer.settle("layer")
    steps = values / params.scale + params.zero_point
    clipped = ((steps < -128.5) | (steps > 127.5)).mean()
    integers = quantize(values, params.scale, params.zero_point, SCHEME.activation)
    exact = sqnr_db(values, dequantize(integers, params.scale, params.zero_point))
    assert observer.clipped_fraction() == pytest.approx(clipped, rel=0.1)
    # A value counts as its bin's centre, at most a quarter of a step off, evenly to both sides.
    assert observer.sqnr_db() == pytest.approx(exact, abs=0.05)


@given(
    st.lists(
        hnp.arrays(np.float32, 5, elements=st.floats(-(2.0**100), 2.0**100, width=32)),
        min_size=1,
        max_size=4,
    ).filter(lambda batches: max(np.abs(b).max() for b in batches) > 1e-9)
)
def test_neither_order_nor_batching_matters(batches: list[np.ndarray]) -> None:
    apart = observed(*batches)
    together = observed(np.concatenate(batches[::-1]))
    assert apart.settle("layer") == together.settle("layer")


@given(st.floats(2.0**-30, 2.0**100, width=32), st.sampled_from([-1, 1]))
def test_a_constant_is_represented_to_a_small_part_of_a_step(value: float, sign: int) -> None:
    constant = np.full(7, sign * value, np.float32)
    observer = observed(constant)
    params = observer.settle("layer")
    integers = quantize(constant, params.scale, params.zero_point, SCHEME.activation)
    error = np.abs(dequantize(integers, params.scale, params.zero_point) - constant)
    # The bin's centre stands for the constant, at most 2^-10 of it away.
    assert error.max() <= value * 2.0**-9


def test_the_histogram_is_ascending_with_exact_counts_of_both_zeros_and_denormals() -> None:
    values = np.array([0.0, -0.0, 1e-42, -3.0, 5.0, 5.0], np.float32)
    centres, counts = observed(values).histogram()
    assert (np.diff(centres) >= 0).all()
    assert counts.sum() == 6
    assert np.abs(centres[1:-1]).max() < 1e-38
    assert centres[0] == pytest.approx(-3.0, rel=2.0**-10)
    assert centres[-1] == 5.0


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([1.0, math.nan], "NaN or infinity"),
        ([1.0, math.inf], "NaN or infinity"),
        ([-math.inf, 1.0], "NaN or infinity"),
        ([0.0, -0.0], "only zeros"),
    ],
)
def test_unusable_values_are_refused_by_the_name_of_the_layer(
    values: list[float], complaint: str
) -> None:
    # The trouble comes first, so that good batches after it cannot cover it up.
    tensors = [np.array(values)]
    if "NaN" in complaint:
        tensors.append(np.ones(3))
    with pytest.raises(CompileError, match=f"{complaint}.*blocks.3.mlp.fc1"):
        observed(*tensors).settle("blocks.3.mlp.fc1")


def test_a_layer_that_calibration_never_reached_is_named() -> None:
    with pytest.raises(CompileError, match="never reached the input of head"):
        observed().settle("head")


def test_a_weight_channel_that_is_tiny_beside_its_bias_gets_room() -> None:
    observer = WeightObserver(SCHEME.weight)
    observer(torch.tensor([[1.0, -2.0], [0.0, 0.0], [1e-12, 0.0]]))
    before = observer.calculate_qparams()[0]
    bias = np.array([0.5, 3.0, 3.0], np.float32)
    observer.make_room_for_bias(bias, 0.01, SCHEME.bias_limit)
    scales, zeros = observer.calculate_qparams()
    assert scales[0] == before[0]
    assert (np.abs(bias) / (0.01 * scales.numpy()) <= SCHEME.bias_limit * (1 + 1e-6)).all()
    assert not zeros.any()
