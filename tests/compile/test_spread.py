"""Evaluations of one graph differ where a value lies on a rounding tie, and nowhere else."""

from functools import partial

import numpy as np
import onnx_ir as ir
import pytest

from gfcompile.compile.graph import run
from gfcompile.compile.spread import moved_by_rounding, other_evaluations


def graph(factor: float, count: int = 64) -> ir.Model:
    """Multiplies an image by constants, and quantizes to steps of 1."""
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        quantizer (float[1,{count}] image) => (float[1,{count}] logits)
        <float[{count}] factors = {{{", ".join([str(factor)] * count)}}},
         float step = {{1.0}}, int8 zero = {{0}}>
        {{
            product = Mul (image, factors)
            stored = QuantizeLinear (product, step, zero)
            logits = DequantizeLinear (stored, step, zero)
        }}
    """
    return ir.from_onnx_text(text)


@pytest.mark.parametrize(("factor", "apart"), [(2.5, 1.0), (2.25, 0.0)])
def test_only_ties_fall_to_either_side(factor: float, apart: float) -> None:
    image = np.ones((1, 64), np.float32)
    model = graph(factor)
    logits = np.concatenate(list(other_evaluations(model, partial(run, images=[image]))))
    # The step itself is a constant, and moves as well.
    assert np.ptp(logits) == pytest.approx(apart, abs=4 * np.finfo(np.float32).eps)


def test_constants_move_by_one_unit_in_the_last_place_at_most() -> None:
    model = graph(0.3)
    moved = moved_by_rounding(model, seed=0)
    before, after = (m.graph.initializers["factors"].const_value for m in (model, moved))
    assert before is not None
    assert after is not None
    neighbours = np.nextafter(np.float32(0.3), np.array([-1, 1], np.float32))
    assert set(after.numpy()) == {np.float32(0.3), *neighbours}
    assert set(before.numpy()) == {np.float32(0.3)}
    zero = moved.graph.initializers["zero"].const_value
    assert zero is not None
    assert zero.dtype == ir.DataType.INT8
