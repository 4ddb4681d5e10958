"""Evaluations of one graph differ in as many values as were flipped, by one step, and no more."""

from functools import partial

import numpy as np
import onnx_ir as ir
import pytest

from gfcompile.compile.agreement import recompute, run_with_ties_of
from gfcompile.compile.graph import run
from gfcompile.compile.ledger import compare_int8
from gfcompile.compile.spread import allow_for_ties, other_evaluations, with_flips

STEP, COUNT = 0.25, 20_000


def quantizer() -> ir.Model:
    return ir.from_onnx_text(
        f"""
        <ir_version: 10, opset_import: ["" : 20]>
        quantizer (float[1,{COUNT}] image) => (float[1,{COUNT}] logits)
        <float step = {{{STEP}}}, int8 zero = {{3}}>
        {{
            stored = QuantizeLinear (image, step, zero)
            logits = DequantizeLinear (stored, step, zero)
        }}
        """
    )


@pytest.mark.parametrize("share", [0.01, 0.001])
def test_about_as_many_values_are_flipped_as_asked_by_one_step(share: float) -> None:
    model = quantizer()
    image = np.random.default_rng(1).uniform(-20, 20, (1, COUNT)).astype(np.float32)
    plain = run(model, [image])[0]
    flips = np.abs(run(with_flips(model, share, seed=0), [image])[0] - plain)
    assert set(np.unique(flips)) == {0.0, STEP}
    # Four standard deviations of a binomial count.
    assert abs(np.count_nonzero(flips) - share * COUNT) < 4 * np.sqrt(share * COUNT)
    assert np.array_equal(run(model, [image])[0], plain)


def test_an_artifact_without_flips_is_held_to_what_onnx_runtime_does_itself() -> None:
    image = np.zeros((1, COUNT), np.float32)
    evaluate = partial(run, images=[image])
    assert len(list(other_evaluations(quantizer(), evaluate, flipped=0.0))) == 1
    assert len(list(other_evaluations(quantizer(), evaluate, flipped=0.001))) > 2


def test_one_tie_that_carries_far_is_allowed_for_where_it_explains_the_logits() -> None:
    model = ir.from_onnx_text(
        f"""
        <ir_version: 10, opset_import: ["" : 20]>
        amplifier (float[1,{COUNT}] image) => (float[1,1] logits)
        <float step = {{{STEP}}}, int8 zero = {{3}}, float loud = {{1000.0}},
         int64[1] first = {{0}}, int64[1] second = {{1}}, int64[1] axis = {{1}},
         int8[1,{COUNT}] stored>
        {{
            stored = QuantizeLinear (image, step, zero)
            read = DequantizeLinear (stored, step, zero)
            one = Slice (read, first, second, axis)
            logits = Mul (one, loud)
        }}
        """
    )
    image = np.random.default_rng(1).uniform(-20, 20, (1, COUNT)).astype(np.float32)
    expected = run(model, [image])
    stored = recompute(model, [{"stored": np.zeros((1, COUNT), np.int8)}], [image])[0]["stored"]
    flipped = stored.copy()
    flipped[0, 0] += 1
    ties = partial(run_with_ties_of, model, [{"stored": stored}], [{"stored": flipped}], [image])

    def agrees(logits: np.ndarray, *, knowing: bool) -> bool:
        agreement = compare_int8(
            [{"stored": stored}], [{"stored": flipped}], expected, [logits], logits_step=STEP
        )
        evaluate = partial(run, images=[image])
        same_ties = ties if knowing else None
        known = allow_for_ties(agreement, model, evaluate, expected, same_ties=same_ties)
        return known.logits_agree

    explained = expected[0] + 1000 * STEP
    assert not agrees(explained, knowing=False)
    assert agrees(explained, knowing=True)
    assert not agrees(expected[0] + 3000 * STEP, knowing=True)
