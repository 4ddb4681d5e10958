"""The estimate of what pruning gains, by hand and by what it must grow and shrink with."""

import pytest

from gfcompile.compile.models import model_spec
from gfcompile.compile.pruning_gain import estimated_gain, note_on_gain
from gfcompile.runtime.roofline import Peaks
from gfcompile.targets.target import find_target

# Weights for nothing: what is left are operations.
COMPUTE = Peaks(float32_gflops=100, float16_gflops=100, int8_gops=400, bandwidth_gb_s=1e9)
PARENT = model_spec("deit_small")


def test_without_weights_to_move_float32_gains_what_operations_fall_by() -> None:
    spec = model_spec("dynamicvit_deit_s")
    gain = estimated_gain(spec, PARENT, COMPUTE, int8=False)
    assert gain == pytest.approx(PARENT.macs / spec.macs)


def test_predictors_in_float_cost_int8_more() -> None:
    spec = model_spec("dynamicvit_deit_s")
    patches = 196 + 137 + 96
    predictors = patches * (384**2 + 192**2 + 192 * 96 + 96) + 3 * 192**2
    least = (spec.macs - predictors) / 4 + predictors
    gain = estimated_gain(spec, PARENT, COMPUTE, int8=True)
    assert gain == pytest.approx(PARENT.macs / 4 / least)


def test_a_model_that_only_moves_its_weights_gains_nothing() -> None:
    peaks = Peaks(float32_gflops=1e9, float16_gflops=1e9, int8_gops=1e9, bandwidth_gb_s=1)
    assert estimated_gain(model_spec("dynamicvit_deit_s"), PARENT, peaks, int8=True) < 1


@pytest.mark.parametrize("name", ["dynamicvit_lvvit_s", "convnext_t", "swin_t"])
def test_keeping_less_gains_more(name: str) -> None:
    parent = model_spec(str(model_spec(name).parent))
    gains = [
        estimated_gain(model_spec(name, ratio), parent, COMPUTE, int8=False)
        for ratio in (0.9, 0.7, 0.5)
    ]
    assert gains == sorted(gains)


def test_a_model_that_keeps_all_is_its_parent() -> None:
    spec = model_spec("dynamicvit_deit_s", 1.0)
    assert estimated_gain(spec, PARENT, COMPUTE, int8=True) == pytest.approx(1)


def test_the_terminal_says_when_it_does_not_pay() -> None:
    target = find_target("x86-64-v4")
    worth = note_on_gain(model_spec("dynamicvit_deit_s"), PARENT, target, int8=True)
    assert "an estimated 1." in worth
    assert "not measured" in worth
    little = note_on_gain(model_spec("dynamicvit_deit_s", 0.99), PARENT, target, int8=True)
    assert "does not pay on x86-64-v4" in little
    assert "deit_small" in little
    formats = note_on_gain(
        model_spec("dynamicvit_deit_s"), PARENT, find_target("tflite"), int8=True
    )
    assert "no estimate" in formats
