"""Every operator that the TFLite emitter takes, against ONNX Runtime, with and without XNNPACK."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import model_of, sampled
from tflite_models import check_tflite, run_tflite

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.tflite.emit import emit
from gfcompile.targets.tflite.emitter import LOWERINGS

# name: graph, constants, inputs
CASES = {
    "linear": (
        "g (float[2,5,8] x) => (float[2,5,6] y) { p = MatMul(x, w)  y = Add(p, b) }",
        {"w": sampled(8, 6), "b": sampled(6)},
        [sampled(2, 5, 8)],
    ),
    "bias first": (
        "g (float[5,8] x) => (float[5,6] y) { p = MatMul(x, w)  y = Add(b, p) }",
        {"w": sampled(8, 6), "b": sampled(6)},
        [sampled(5, 8)],
    ),
    "product that is added and read twice": (
        "g (float[5,8] x) => (float[5,6] y) { p = MatMul(x, w)  q = Add(p, b)  y = Mul(p, q) }",
        {"w": sampled(8, 6), "b": sampled(6)},
        [sampled(5, 8)],
    ),
    "product of activations": (
        "g (float[2,3,5,8] a, float[2,3,8,4] b) => (float[2,3,5,4] y) {"
        " p = Transpose<perm=[0,2,3,1]>(a)  q = Transpose<perm=[0,3,1,2]>(p)  y = MatMul(q, b) }",
        {},
        [sampled(2, 3, 5, 8), sampled(2, 3, 8, 4, seed=1)],
    ),
    "constant on the left": (
        "g (float[2,8,4] x) => (float[2,5,4] y) { y = MatMul(m, x) }",
        {"m": sampled(5, 8)},
        [sampled(2, 8, 4)],
    ),
    "patch embedding": (
        "g (float[2,3,8,12] x) => (float[2,6,16] y) {"
        " c = Conv<strides=[4,4]>(x, w, b)  v = Reshape(c, shape)"
        " y = Transpose<perm=[0,2,1]>(v) }",
        {"w": sampled(16, 3, 4, 4), "b": sampled(16), "shape": np.array([2, 16, 6])},
        [sampled(2, 3, 8, 12)],
    ),
    "convolution whose padding is not TFLite's": (
        "g (float[1,3,8,8] x) => (float[1,6,4,4] y) {"
        " y = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w) }",
        {"w": sampled(6, 3, 3, 3)},
        [sampled(1, 3, 8, 8)],
    ),
    "depthwise convolution": (
        "g (float[1,6,9,7] x) => (float[1,6,9,7] y) { y = Conv<group=6, pads=[3,3,3,3]>(x, w, b) }",
        {"w": sampled(6, 1, 7, 7), "b": sampled(6)},
        [sampled(1, 6, 9, 7)],
    ),
    "tokens to image and back": (
        "g (float[1,4,6,3] x) => (float[1,2,2,8] y) {"
        " t = Transpose<perm=[0,2,3,1]>(x)  i = Transpose<perm=[0,3,1,2]>(t)"
        " c = Conv<strides=[2,2]>(i, w)  y = Transpose<perm=[0,2,3,1]>(c) }",
        {"w": sampled(8, 4, 3, 1)},
        [sampled(1, 4, 6, 3)],
    ),
    "arithmetic": (
        "g (float[2,3,4] a, float[3,1] b) => (float[2,3,4] y) {"
        " s = Add(a, b)  d = Sub(s, c)  m = Mul(d, b)  q = Div(m, two)  x = Max(q, b)"
        " y = Min(x, c) }",
        {"c": sampled(4), "two": np.array(2, np.float32)},
        [sampled(2, 3, 4), sampled(3, 1, seed=1)],
    ),
    "functions": (
        "g (float[3,4] x) => (float[3,4] y) {"
        " a = Abs(x)  p = Add(a, one)  s = Sqrt(p)  r = Reciprocal(s)  e = Exp(r)  l = Log(e)"
        " n = Neg(l)  w = Pow(a, two)  t = Tanh(n)  g = Sigmoid(w)  u = Relu(x)"
        " b = Add(t, g)  y = Add(b, u) }",
        {"one": np.array(1, np.float32), "two": np.array(2, np.float32)},
        [sampled(3, 4)],
    ),
    "gelu": (
        "g (float[3,40] x) => (float[3,40] y) { y = Gelu(x) }",
        {},
        [np.linspace(-8, 8, 120, dtype=np.float32).reshape(3, 40)],
    ),
    "gelu by tanh": (
        'g (float[3,40] x) => (float[3,40] y) { y = Gelu<approximate="tanh">(x) }',
        {},
        [np.linspace(-8, 8, 120, dtype=np.float32).reshape(3, 40)],
    ),
    "softmax": (
        "g (float[2,3,7] x) => (float[2,3,7] y) { y = Softmax<axis=-1>(x) }",
        {},
        [5 * sampled(2, 3, 7)],
    ),
    "log softmax": (
        "g (float[2,7] x) => (float[2,7] y) { y = LogSoftmax<axis=1>(x) }",
        {},
        [5 * sampled(2, 7)],
    ),
    "layer normalization": (
        "g (float[2,5,32] x) => (float[2,5,32] y) {"
        " y = LayerNormalization<axis=-1, epsilon=1.0e-6>(x, gamma, beta) }",
        {"gamma": sampled(32), "beta": sampled(32)},
        [3 + sampled(2, 5, 32)],
    ),
    "layer normalization without shift": (
        "g (float[2,32] x) => (float[2,32] y) { y = LayerNormalization(x, gamma) }",
        {"gamma": sampled(32)},
        [sampled(2, 32)],
    ),
    "mean of tokens": (
        "g (float[2,5,6] x) => (float[2,6] y) { y = ReduceMean<keepdims=0>(x, axes) }",
        {"axes": np.array([1])},
        [sampled(2, 5, 6)],
    ),
    "reductions": (
        "g (float[2,5,6] x) => (float[2,1,1] y) {"
        " s = ReduceSum(x, axes)  b = ReduceMax(x, axes)  l = ReduceMin(x, axes)"
        " d = Sub(b, l)  y = Add(s, d) }",
        {"axes": np.array([-1, 1])},
        [sampled(2, 5, 6)],
    ),
    "layout": (
        "g (float[2,3,4] x) => (float[4,2,3] y) {"
        " f = Flatten(x)  u = Unsqueeze(f, one)  s = Squeeze(u, one)  r = Reshape(s, shape)"
        " i = Identity(r)  y = Transpose<perm=[2,0,1]>(i) }",
        {"one": np.array([1]), "shape": np.array([2, 3, 4])},
        [sampled(2, 3, 4)],
    ),
    "slice from the end": (
        "g (float[2,5,8] x) => (float[2,3,4] y) { y = Slice(x, starts, ends, axes) }",
        {
            "starts": np.array([-4, 1]),
            "ends": np.array([np.iinfo(np.int64).max, 4]),
            "axes": np.array([2, 1]),
        },
        [sampled(2, 5, 8)],
    ),
    "split evenly": (
        "g (float[2,3,12] x) => (float[2,3,4] y) {"
        " a, b, c = Split<axis=2, num_outputs=3>(x)  s = Sub(a, b)  y = Mul(s, c) }",
        {},
        [sampled(2, 3, 12)],
    ),
    "split unevenly": (
        "g (float[2,7] x) => (float[2,9] y) {"
        " a, b = Split<axis=-1>(x, sizes)  y = Concat<axis=-1>(b, a, a) }",
        {"sizes": np.array([2, 5])},
        [sampled(2, 7)],
    ),
    "class token": (
        "g (float[3,5,8] x) => (float[3,6,8] y) { e = Expand(t, shape)  y = Concat<axis=1>(e, x) }",
        {"t": sampled(1, 1, 8), "shape": np.array([3, 1, 8])},
        [sampled(3, 5, 8)],
    ),
    "expand": (
        "g (float[3,1,8] x) => (float[3,4,8] y) { y = Expand(x, shape) }",
        {"shape": np.array([3, 4, 8])},
        [sampled(3, 1, 8)],
    ),
    "one token": (
        "g (float[2,5,8] x) => (float[2,8] y) { y = Gather<axis=1>(x, place) }",
        {"place": np.array(-5)},
        [sampled(2, 5, 8)],
    ),
    "constant places": (
        "g (float[2,5,8] x) => (float[2,3,8] y) { y = Gather<axis=1>(x, places) }",
        {"places": np.array([4, -4, 0])},
        [sampled(2, 5, 8)],
    ),
    "kept tokens": (
        "g (float[2,9] scores, float[2,9,8] x) => (float[2,4,8] y, int64[2,4] where) {"
        " best, where = TopK<axis=-1>(scores, k)  u = Unsqueeze(where, last)"
        " e = Expand(u, shape)  y = GatherElements<axis=1>(x, e) }",
        {"k": np.array([4]), "last": np.array([-1]), "shape": np.array([2, 4, 8])},
        [sampled(2, 9), sampled(2, 9, 8, seed=1)],
    ),
    "kept tokens by flat places": (
        "g (float[1,9] scores, float[1,9,8] x) => (float[4,8] y) {"
        " best, where = TopK<axis=1>(scores, k)  c = Cast<to=7>(where)  o = Add(c, zero)"
        " flat = Reshape(o, four)  rows = Reshape(x, shape)  y = Gather<axis=0>(rows, flat) }",
        {
            "k": np.array([4]),
            "zero": np.array(0),
            "four": np.array([4]),
            "shape": np.array([9, 8]),
        },
        [sampled(1, 9), sampled(1, 9, 8, seed=1)],
    ),
    "smallest": (
        "g (float[2,9] x) => (float[2,3] y, int64[2,3] where) {"
        " y, where = TopK<axis=-1, largest=0>(x, k) }",
        {"k": np.array([3])},
        [sampled(2, 9)],
    ),
    "indices in order": (
        "g (int64[2,5] x) => (int64[2,5] y) { y, where = TopK<axis=-1, largest=0>(x, k) }",
        {"k": np.array([5])},
        [np.array([[4, 0, 9, 7, 1], [3, 8, 2, 6, 5]], np.int32)],
    ),
    "largest": (
        "g (float[3,7] x) => (int64[3] y) { y = ArgMax<axis=1, keepdims=0>(x) }",
        {},
        [sampled(3, 7)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_equal_onnx_runtime(case: str) -> None:
    text, constants, inputs = CASES[case]
    check_tflite(model_of(text, **constants), *inputs)


def test_every_lowering_is_tested() -> None:
    tested = {
        node.op_type
        for text, constants, _ in CASES.values()
        for node in model_of(text, **constants).graph
    }
    elsewhere = {"QuantizeLinear", "DequantizeLinear", "GlobalFilterDft", "GlobalFilterCircular"}
    assert set(LOWERINGS) == tested | elsewhere


@pytest.mark.parametrize(
    ("text", "constants", "reason"),
    [
        ("g (float[3,4] x) => (float[3,4] y) { y = Erf(x) }", {}, "no TFLite operators are known"),
        (
            "g (float[3,4] x) => (float[3,4] y) { y = Softmax<axis=0>(x) }",
            {},
            "the last axis alone",
        ),
        (
            "g (float[1,4,8,8] x) => (float[1,4,8,8] y) { y = Conv<group=2>(x, w) }",
            {"w": sampled(4, 2, 1, 1)},
            "2 groups",
        ),
        (
            "g (float[8] x) => (float[4] y) { y = Slice(x, a, b, c, d) }",
            {"a": np.array([0]), "b": np.array([8]), "c": np.array([0]), "d": np.array([2])},
            "steps",
        ),
        (
            "g (float[3,5] x, int64[3,5] i) => (float[3,5] y) { y = GatherElements<axis=0>(x, i) }",
            {},
            "whole rows alone",
        ),
    ],
)
def test_what_it_cannot_take_is_refused_by_name(
    text: str, constants: dict[str, np.ndarray], reason: str
) -> None:
    model = model_of(text, **constants)
    with pytest.raises(CompileError, match=reason) as caught:
        emit(model, target="tflite-xnnpack")
    message = str(caught.value)
    assert message.startswith("tflite-xnnpack cannot take ")
    assert f"(node {model.graph[-1].name or 'y'})" in message
    assert message.endswith(
        "compile for a target of kernels (gfcompile targets), or change the model there"
    )
    assert "\n" not in str(caught.value)


def test_equal_graphs_give_equal_bytes() -> None:
    text, constants, _ = CASES["kept tokens"]
    first, second = (emit(model_of(text, **constants)) for _ in range(2))
    assert first.content == second.content


def test_equal_constants_are_stored_once() -> None:
    w = sampled(64, 64)
    text = "g (float[2,64] x) => (float[2,64] y) { p = MatMul(x, v)  y = MatMul(p, w) }"
    once = emit(model_of(text, v=w, w=w))
    twice = emit(model_of(text, v=w, w=w + 1))
    assert len(twice.content) - len(once.content) >= w.nbytes


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_chains_equal_onnx_runtime(data: st.DataObject) -> None:
    """Linear layers, activations, norms, residuals and views, one after the other."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    batch, tokens, width = (data.draw(st.integers(1, 6)) for _ in range(3))
    constants: dict[str, np.ndarray] = {}
    lines, current = [], "x"
    for number in range(data.draw(st.integers(1, 5))):
        name = f"v{number}"
        match data.draw(st.sampled_from(["linear", "gelu", "norm", "residual", "swap"])):
            case "linear":
                wider = data.draw(st.integers(1, 6))
                constants[f"w{number}"] = rng.standard_normal((width, wider)).astype("f")
                constants[f"b{number}"] = rng.standard_normal(wider).astype("f")
                lines += [f"p{number} = MatMul({current}, w{number})"]
                lines += [f"{name} = Add(p{number}, b{number})"]
                width = wider
            case "gelu":
                lines += [f"{name} = Gelu({current})"]
            case "norm":
                constants[f"g{number}"] = rng.standard_normal(width).astype("f")
                # Rows of nearly equal numbers would have any rounding for a result.
                lines += [
                    f"{name} = LayerNormalization<axis=-1, epsilon=0.1>({current}, g{number})"
                ]
            case "residual":
                lines += [f"{name} = Add({current}, {current})"]
            case "swap":
                lines += [f"{name} = Transpose<perm=[0,2,1]>({current})"]
                tokens, width = width, tokens
        current = name
    shape = f"{batch},{tokens},{width}"
    first = rng.standard_normal((batch, *_first_shape(lines, constants, tokens, width))).astype("f")
    lines.append(f"y = Identity({current})")
    text = f"g (float[{','.join(map(str, first.shape))}] x) => (float[{shape}] y) {{ "
    check_tflite(model_of(text + "  ".join(lines) + " }", **constants), first)


def _first_shape(
    lines: list[str], constants: dict[str, np.ndarray], tokens: int, width: int
) -> tuple[int, int]:
    """Tokens and width before all layers, from those after them."""
    for line in reversed(lines):
        if "MatMul" in line:
            width = constants[line.split(", ")[1].rstrip(")")].shape[0]
        elif "Transpose" in line:
            tokens, width = width, tokens
    return tokens, width


def test_weights_of_halves_are_stored_as_halves() -> None:
    w = sampled(64, 32).astype(np.float16)
    text = "g (float[2,64] x) => (float[2,32] y) { c = Cast<to=1>(w)  y = MatMul(x, c) }"
    made = check_tflite(model_of(text, w=w), sampled(2, 64))
    assert w.nbytes < len(made.content) < 2 * w.nbytes
    assert run_tflite(made, sampled(2, 64))[0].shape == (2, 32)
