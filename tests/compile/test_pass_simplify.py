import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_models import model_of, ops, run, sampled

from gfcompile.compile.passes.simplify import simplify
from gfcompile.compile.trace import rounding_tolerance
from gfcompile.targets.onnx_values import NAME_SCOPES, module_path

SCALED_CONV = """g (float[1,3,8,8] image) => (float[1,4,2,2] logits) {
    a = Conv<strides=[4,4]>(image, w)
    b = Mul(a, gamma)
    logits = Mul(b, two)
}"""
CONSTANTS = {
    "w": sampled(4, 3, 4, 4, seed=1),
    "gamma": sampled(1, 4, 1, 1, seed=2),
    "two": np.array(2, np.float32),
}
X = sampled(1, 3, 8, 8)


def test_factors_move_into_the_convolution() -> None:
    model = model_of(SCALED_CONV, **CONSTANTS)
    simpler = simplify(model, print)
    assert simpler.graph.num_nodes() < model.graph.num_nodes()
    assert ops(simpler)["Conv"] == 1
    expected = run(model, X)
    tolerance = rounding_tolerance(model) * np.abs(expected).max()
    np.testing.assert_allclose(run(simpler, X), expected, rtol=0, atol=tolerance)


def test_modules_that_nodes_came_from_are_remembered() -> None:
    model = model_of(SCALED_CONV, **CONSTANTS)
    *_, last = model.graph
    last.metadata_props[NAME_SCOPES] = "['', 'stem', 'stem.scale', 'mul']"
    *_, last = simplify(model, print).graph
    assert (last.op_type, module_path(last)) == ("Conv", "stem.scale")


def test_linear_layers_are_not_turned_into_gemm() -> None:
    model = model_of(
        """g (float[1,2,3] image) => (float[1,2,4] logits) {
            p = MatMul(image, w)
            logits = Add(p, b)
        }""",
        w=sampled(3, 4),
        b=sampled(4),
    )
    assert simplify(model, print) is model


def test_a_quantized_graph_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("onnxsim.simplify", never)
    model = model_of(
        """g (float[2,3] image) => (float[2,4] logits) {
            wf = DequantizeLinear<axis=1>(w, s)
            p = MatMul(image, wf)
            a = Identity(p)
            logits = Identity(a)
        }""",
        w=np.ones((3, 4), np.int8),
        s=np.ones(4, np.float32),
    )
    assert simplify(model, print) is model


def test_a_simplification_that_changes_the_result_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = model_of(
        "g (float[1,3,8,8] image) => (float[1,4,2,2] logits) "
        "{ logits = Conv<strides=[4,4]>(image, w) }",
        **CONSTANTS,
    )

    def spoil(*_: object, **__: object) -> tuple[onnx.ModelProto, bool]:
        return ir.to_proto(wrong), True

    monkeypatch.setattr("onnxsim.simplify", spoil)
    model, refusals = model_of(SCALED_CONV, **CONSTANTS), []
    assert simplify(model, refusals.append) is model
    assert refusals == ["onnxsim's simplification is left out: it changes the result"]
