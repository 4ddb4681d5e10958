"""The small rewrites that make linear layers one thing: MatMul, Add, constants as they are read."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_models import Array, check_model, model_of, node_of, ops, run, sampled

from gfcompile.compile.passes.fold_constants import fold_constants
from gfcompile.compile.passes.fold_transposes import fold_transposes
from gfcompile.compile.passes.infer_shapes import infer_shapes
from gfcompile.compile.passes.merge_layout_changes import merge_layout_changes
from gfcompile.compile.passes.order_operands import order_operands
from gfcompile.compile.passes.remove_dead_code import remove_dead_code
from gfcompile.compile.passes.split_gemm import split_gemm
from gfcompile.runtime.errors import CompileError

X, W, B = sampled(2, 6), sampled(4, 6, seed=1), sampled(4, seed=2)


def const(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


# -- split_gemm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", ["transB=1", "transA=1, transB=1", "transB=1, beta=1.0"])
def test_gemm_becomes_matmul_and_add(attributes: str) -> None:
    x = X.T if "transA" in attributes else X
    shape = ",".join(map(str, x.shape))
    model = model_of(
        f"g (float[{shape}] image) => (float[2,4] logits) "
        f"{{ logits = Gemm<{attributes}>(image, w, b) }}",
        w=W,
        b=B,
    )
    assert split_gemm(model, print)
    assert fold_constants(model)
    check_model(model)
    assert ops(model)["MatMul"] == ops(model)["Add"] == 1
    assert ops(model)["Transpose"] == attributes.count("transA")
    np.testing.assert_array_equal(const(node_of(model, "MatMul").inputs[1]), W.T)
    assert [v.name for v in model.graph.outputs] == ["logits"]
    # Six products and an addition in either order.
    np.testing.assert_allclose(run(model, np.ascontiguousarray(x)), X @ W.T + B, rtol=0, atol=1e-5)


def test_gemm_without_bias_becomes_a_matmul_alone() -> None:
    model = model_of(
        "g (float[2,6] image) => (float[2,4] logits) { logits = Gemm<transB=1>(image, w) }", w=W
    )
    assert split_gemm(model, print)
    remove_dead_code(model)
    assert ops(model) == {"Transpose": 1, "MatMul": 1}


def test_a_scaled_gemm_is_left_alone_and_said() -> None:
    text = """g (float[2,6] image) => (float[2,4] logits) {
        logits = Gemm<transB=1, alpha=2.0>(image, w, b)
    }"""
    model, refusals = model_of(text, w=W, b=B), []
    assert not split_gemm(model, refusals.append)
    assert ops(model) == {"Gemm": 1}
    assert "alpha" in refusals[0]


# -- order_operands -----------------------------------------------------------------------------


def test_constants_come_second() -> None:
    model = model_of(
        """g (float[2,4] image) => (float[2,4] logits) {
            a = Add(b, image)
            logits = Mul(b, a)
        }""",
        b=B,
    )
    expected = run(model, X[:, :4])
    assert order_operands(model)
    assert not order_operands(model)
    assert [node.inputs[1].name for node in model.graph] == ["b", "b"]  # type: ignore[union-attr]
    np.testing.assert_array_equal(run(model, X[:, :4]), expected)


def test_operands_that_both_vary_keep_their_order() -> None:
    model = model_of(
        """g (float[2,4] image) => (float[2,4] logits) {
            a = Relu(image)
            logits = Add(a, image)
        }"""
    )
    assert not order_operands(model)


# -- fold_transposes ----------------------------------------------------------------------------

Q = np.random.default_rng(3).integers(-127, 128, (4, 6)).astype(np.int8)
SCALE = np.linspace(0.01, 0.04, 4, dtype=np.float32)
ZERO = np.zeros(4, np.int8)


def quantized(nodes: str, axis: int, scale: Array = SCALE, zero: Array = ZERO) -> ir.Model:
    return model_of(
        f"""g (float[2,6] image) => (float[2,4] logits) {{
            wf = DequantizeLinear<axis={axis}>(w, scale, zero)
            {nodes}
            logits = MatMul(image, wt)
        }}""",
        w=Q,
        scale=scale,
        zero=zero,
        shape=np.array([6, 4]),
    )


def test_a_transpose_moves_into_the_int8_weight_and_takes_the_axis_along() -> None:
    model = quantized("wt = Transpose<perm=[1,0]>(wf)", axis=0)
    expected = run(model, X)
    assert fold_transposes(model)
    remove_dead_code(model)
    check_model(model)
    assert ops(model) == {"DequantizeLinear": 1, "MatMul": 1}
    dequantize = node_of(model, "DequantizeLinear")
    assert dequantize.attributes["axis"].as_int() == 1
    folded = const(dequantize.inputs[0])
    assert folded.dtype == np.int8
    np.testing.assert_array_equal(folded, Q.T)
    np.testing.assert_array_equal(run(model, X), expected)


def test_a_weight_with_one_scale_may_be_reshaped_at_will() -> None:
    one = np.array(0.02, np.float32), np.array(0, np.int8)
    model = quantized("wt = Reshape(wf, shape)", 0, *one)
    expected = run(model, X)
    assert fold_transposes(model)
    remove_dead_code(model)
    assert ops(model) == {"DequantizeLinear": 1, "MatMul": 1}
    np.testing.assert_array_equal(run(model, X), expected)


def test_a_reshape_that_tears_the_quantized_axis_is_left_alone() -> None:
    model = quantized("wt = Reshape(wf, shape)", axis=0)
    assert not fold_transposes(model)
    assert ops(model)["Reshape"] == 1


def test_a_reshape_around_the_quantized_axis_is_folded() -> None:
    model = model_of(
        """g (float[2,4] image) => (float[2,6] logits) {
            wf = DequantizeLinear<axis=0>(w, scale, zero)
            wt = Squeeze(wf, axes)
            logits = MatMul(image, wt)
        }""",
        w=Q[None],
        scale=SCALE[:1],
        zero=ZERO[:1],
        axes=np.array([0]),
    )
    assert not fold_transposes(model)  # the axis itself goes
    model = model_of(
        """g (float[2,4] image) => (float[2,6] logits) {
            wf = DequantizeLinear<axis=1>(w, scale, zero)
            wt = Squeeze(wf, axes)
            logits = MatMul(image, wt)
        }""",
        w=Q[None],
        scale=SCALE,
        zero=ZERO,
        axes=np.array([0]),
    )
    expected = run(model, X[:, :4])
    assert fold_transposes(model)
    assert node_of(model, "MatMul").inputs[1].producer().attributes["axis"].as_int() == 0  # type: ignore[union-attr]
    np.testing.assert_array_equal(run(model, X[:, :4]), expected)


def test_an_activation_that_is_transposed_is_left_alone() -> None:
    model = model_of(
        """g (float[2,4] image) => (float[4,2] logits) {
            q = QuantizeLinear(image, scale, zero)
            f = DequantizeLinear(q, scale, zero)
            logits = Transpose<perm=[1,0]>(f)
        }""",
        scale=np.array(0.1, np.float32),
        zero=np.array(0, np.int8),
    )
    assert not fold_transposes(model)


# -- fold_constants -----------------------------------------------------------------------------


def test_constants_are_folded_but_int8_weights_stay_int8() -> None:
    model = quantized("wt = Transpose<perm=[1,0]>(wf)", axis=0)
    before = ops(model)
    fold_constants(model)
    assert ops(model) == before
    model = model_of(
        """g (float[2,6] image) => (float[2,4] logits) {
            wt = Transpose<perm=[1,0]>(w)
            ws = Mul(wt, b)
            logits = MatMul(image, ws)
        }""",
        w=W,
        b=B,
    )
    assert fold_constants(model)
    remove_dead_code(model)
    assert ops(model) == {"MatMul": 1}
    np.testing.assert_array_equal(const(node_of(model, "MatMul").inputs[1]), W.T * B)


# -- merge_layout_changes, remove_dead_code, infer_shapes ---------------------------------------


def test_transposes_that_undo_each_other_go() -> None:
    model = model_of(
        """g (float[2,4,6] image) => (float[2,4,6] logits) {
            a = Transpose<perm=[0,2,1]>(image)
            b = Transpose<perm=[0,2,1]>(a)
            logits = Relu(b)
        }"""
    )
    assert merge_layout_changes(model)
    remove_dead_code(model)
    assert ops(model) == {"Relu": 1}


def test_dead_nodes_and_constants_go_and_outputs_keep_their_names() -> None:
    model = model_of(
        """g (float[2,4] image) => (float[2,4] logits) {
            unused = Add(image, b)
            a = Relu(image)
            logits = Identity(a)
        }""",
        b=B,
    )
    assert remove_dead_code(model)
    assert ops(model) == {"Relu": 1}
    assert not model.graph.initializers
    assert [value.name for value in model.graph.outputs] == ["logits"]


def test_a_dynamic_shape_is_said_in_one_line() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 20]> '
        "g (float[n,4] image) => (float[n,4] logits) { logits = Relu(image) }"
    )
    with pytest.raises(CompileError, match="the shape of image is not static"):
        infer_shapes(model)
