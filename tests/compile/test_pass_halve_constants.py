import numpy as np
import onnx_ir as ir
import pytest
from onnx_models import check_model, model_of, node_of, ops, run, sampled

from gfcompile.compile.passes.fold_constants import fold_constants
from gfcompile.compile.passes.halve_constants import MIN_ELEMENTS, halve_constants

SIDE = 64
assert SIDE * SIDE == MIN_ELEMENTS
LARGE = sampled(SIDE, SIDE)
X = sampled(SIDE, SIDE, seed=1)


def model_with(nodes: str, **constants: np.ndarray) -> ir.Model:  # type: ignore[type-arg]
    shape = f"float[{SIDE},{SIDE}]"
    return model_of(f"g ({shape} image) => ({shape} logits) {{ {nodes} }}", **constants)


def test_a_large_constant_is_stored_in_float16_and_cast_back() -> None:
    model = model_with("logits = Add(image, pos)", pos=LARGE)
    assert halve_constants(model, print)
    check_model(model)
    assert ops(model) == {"Cast": 1, "Add": 1}
    (stored,) = model.graph.initializers.values()
    assert stored.dtype == ir.DataType.FLOAT16
    cast = node_of(model, "Cast").outputs[0]
    assert (cast.dtype, tuple(cast.shape or ())) == (ir.DataType.FLOAT, (SIDE, SIDE))
    for optimize in (False, True):
        np.testing.assert_array_equal(
            run(model, X, optimize=optimize), X + LARGE.astype(np.float16).astype(np.float32)
        )


def test_a_constant_that_two_nodes_read_is_cast_once() -> None:
    model = model_with("a = Add(image, pos) logits = Mul(a, pos)", pos=LARGE)
    assert halve_constants(model, print)
    assert ops(model)["Cast"] == 1
    check_model(model)


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ("logits = MatMul(image, w)", {"w": LARGE}),
        ("logits = Add(image, row)", {"row": LARGE[:1]}),
        ("logits = Add(image, image)", {}),
    ],
    ids=["a weight", "a small constant", "none"],
)
def test_other_constants_stay(nodes: str, constants: dict[str, np.ndarray]) -> None:  # type: ignore[type-arg]
    model = model_with(nodes, **constants)
    assert not halve_constants(model, print)
    assert ops(model)["Cast"] == 0


@pytest.mark.parametrize("factor", [1e6, 1e-7])
def test_what_float16_cannot_hold_stays_and_is_said(factor: float) -> None:
    model = model_with("logits = Add(image, pos)", pos=(LARGE * factor).astype(np.float32))
    refusals: list[str] = []
    assert not halve_constants(model, refusals.append)
    assert refusals == ["pos: float16 cannot hold it, it stays in float32"]


def test_folding_would_undo_it() -> None:
    """Why it must come last."""
    model = model_with("logits = Add(image, pos)", pos=LARGE)
    halve_constants(model, print)
    fold_constants(model)
    assert ops(model)["Cast"] == 0
