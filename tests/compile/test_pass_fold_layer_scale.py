"""x * W + b, times gamma: folded, and equal to rounding of the sums of six."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_models import Array, check_model, model_of, node_of, ops, run, sampled

from gfcompile.compile.passes.fold_layer_scale import fold_layer_scale
from gfcompile.compile.passes.remove_dead_code import remove_dead_code

X, W, B = sampled(2, 6), sampled(6, 4, seed=1), sampled(4, seed=2)
GAMMA = np.array([1e-4, -0.5, 0, 3], np.float32)


def const(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def fold(model: ir.Model, *inputs: Array) -> tuple[Array, Array]:
    """The outputs before and after."""
    before = run(model, *inputs)
    assert fold_layer_scale(model)
    remove_dead_code(model)
    check_model(model)
    assert ops(model)["Mul"] == 0
    assert [value.name for value in model.graph.outputs] == ["logits"]
    return before, run(model, *inputs)


@pytest.mark.parametrize("order", ["Mul(gamma, y)", "Mul(y, gamma)"])
@pytest.mark.parametrize("bias", ["Add(p, b)", "Add(b, p)", "Identity(p)"])
def test_float_weights_and_bias_take_the_factor(order: str, bias: str) -> None:
    text = f"""g (float[2,6] image) => (float[2,4] logits) {{
        p = MatMul(image, w)
        y = {bias}
        logits = {order}
    }}"""
    if "Identity" in bias:
        text = text.replace("p = ", "y = ").replace("y = Identity(p)", "")
    model = model_of(text, w=W, b=B, gamma=GAMMA)
    before, after = fold(model, X)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(const(node_of(model, "MatMul").inputs[1]), W * GAMMA)


def test_one_factor_for_all_channels_is_folded_too() -> None:
    model = model_of(
        """g (float[2,6] image) => (float[2,4] logits) {
            p = MatMul(image, w)
            logits = Mul(p, gamma)
        }""",
        w=W,
        gamma=np.array(0.25, np.float32),
    )
    before, after = fold(model, X)
    np.testing.assert_array_equal(after, before)  # a power of two


Q = np.random.default_rng(3).integers(-127, 128, (6, 4)).astype(np.int8)
QB = np.random.default_rng(4).integers(-999, 1000, 4).astype(np.int32)
X_SCALE = np.float32(0.037)
W_SCALE = np.array([0.011, 0.013, 0.017, 0.019], np.float32)


def quantized_model(bias_scale: Array) -> ir.Model:
    return model_of(
        """g (float[2,6] image) => (float[2,4] logits) {
            q = QuantizeLinear(image, xs, xz)
            x = DequantizeLinear(q, xs, xz)
            wf = DequantizeLinear<axis=1>(w, ws, wz)
            bf = DequantizeLinear<axis=0>(b, bs)
            p = MatMul(x, wf)
            y = Add(p, bf)
            logits = Mul(gamma, y)
        }""",
        w=Q,
        ws=W_SCALE,
        wz=np.zeros(4, np.int8),
        b=QB,
        bs=bias_scale,
        xs=np.array(X_SCALE),
        xz=np.array(-3, np.int8),
        gamma=GAMMA,
    )


def test_int8_weights_keep_their_values_and_the_scales_take_the_factor() -> None:
    model = quantized_model(X_SCALE * W_SCALE)
    before, after = fold(model, X)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    product, add = node_of(model, "MatMul"), node_of(model, "Add")
    weight, bias = (node.inputs[1].producer() for node in (product, add))  # type: ignore[union-attr]
    assert weight is not None
    assert bias is not None
    sign = np.sign(GAMMA).astype(np.int8)
    values, scale = const(weight.inputs[0]), const(weight.inputs[1])
    assert values.dtype == np.int8
    np.testing.assert_array_equal(values, Q * sign)
    np.testing.assert_array_equal(scale, W_SCALE * np.where(GAMMA == 0, 1, np.abs(GAMMA)))
    assert weight.attributes["axis"].as_int() == 1
    assert const(bias.inputs[0]).dtype == np.int32
    np.testing.assert_array_equal(const(bias.inputs[0]), QB * sign)
    # The contract of the QDQ graph, bit for bit.
    np.testing.assert_array_equal(const(bias.inputs[1]), X_SCALE * scale)


def test_activations_keep_their_names() -> None:
    model = quantized_model(X_SCALE * W_SCALE)
    fold(model, X)
    assert node_of(model, "QuantizeLinear").outputs[0].name == "q"


UNTOUCHED = {
    "the product is used elsewhere": """
        p = MatMul(image, w)
        s = Mul(p, gamma)
        logits = Add(p, s)""",
    "the sum is used elsewhere": """
        p = MatMul(image, w)
        y = Add(p, b)
        s = Mul(y, gamma)
        logits = Add(y, s)""",
    "the factor varies over rows": """
        p = MatMul(image, w)
        logits = Mul(p, rows)""",
    "a factor that is no constant": """
        p = MatMul(image, w)
        y = Relu(p)
        logits = Mul(p, y)""",
    "something lies between": """
        p = MatMul(image, w)
        y = Relu(p)
        logits = Mul(y, gamma)""",
    "the addend is no bias": """
        p = MatMul(image, w)
        residual = Tanh(image)
        other = MatMul(residual, w)
        y = Add(p, other)
        logits = Mul(y, gamma)""",
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_is_no_layer_scale_is_left_alone(name: str) -> None:
    model = model_of(
        f"g (float[2,6] image) => (float[2,4] logits) {{ {UNTOUCHED[name]} }}",
        w=W,
        b=B,
        gamma=GAMMA,
        rows=sampled(2, 1),
    )
    before = run(model, X)
    assert not fold_layer_scale(model)
    np.testing.assert_array_equal(run(model, X), before)


def test_the_lowest_int8_has_no_negative_and_is_left_alone() -> None:
    model = quantized_model(X_SCALE * W_SCALE)
    weight = model.graph.initializers["w"]
    values = Q.copy()
    values[0, 1] = -128
    weight.const_value = ir.tensor(values, name="w")
    assert not fold_layer_scale(model)
