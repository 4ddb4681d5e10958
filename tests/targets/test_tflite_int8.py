"""QDQ graphs in TFLite: the graph's own scales, integer products, ONNX Runtime's integers."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from onnx_models import model_of, run, sampled
from quantized_graphs import OUTPUT_SCALE, quantized_graphs
from tflite_models import run_tflite

from gfcompile.compile.passes.quantize_values import quantize_values
from gfcompile.compile.value_ranges import value_scales
from gfcompile.quantize.qparams import QParams
from gfcompile.runtime.errors import CompileError
from gfcompile.targets.tflite.emit import Normalization, TfliteModel, emit
from gfcompile.targets.tflite.options import TfliteOptions
from gfcompile.targets.tflite.results import results_without_scale

IN, OUT, BATCH = 24, 10, 5
X_SCALE, X_ZERO = np.float32(0.031), np.int8(-7)
Y_SCALE, Y_ZERO = np.float32(0.043), np.int8(11)


def linear(*, quantized_result: bool) -> ir.Model:
    """QDQ, product, bias, and QDQ of the result where it is asked for."""
    w_scale = (0.001 * (1 + np.arange(OUT))).astype(np.float32)
    rng = np.random.default_rng(0)
    tail = "y = Identity(s)"
    if quantized_result:
        tail = "yq = QuantizeLinear(s, ys, yz)  y = DequantizeLinear(yq, ys, yz)"
    return model_of(
        f"g (float[{BATCH},{IN}] x) => (float[{BATCH},{OUT}] y) {{"
        " xq = QuantizeLinear(x, xs, xz)  xr = DequantizeLinear(xq, xs, xz)"
        " wr = DequantizeLinear<axis=1>(w, ws)  br = DequantizeLinear<axis=0>(b, bs)"
        f" p = MatMul(xr, wr)  s = Add(p, br)  {tail} }}",
        w=rng.integers(-127, 128, (IN, OUT)).astype(np.int8),
        ws=w_scale,
        b=rng.integers(-3000, 3000, OUT).astype(np.int32),
        bs=X_SCALE * w_scale,
        xs=np.array(X_SCALE),
        xz=np.array(X_ZERO),
        ys=np.array(Y_SCALE),
        yz=np.array(Y_ZERO),
    )


def parameters(made: TfliteModel) -> list[tuple[npt.NDArray, npt.NDArray]]:
    """Scales and zero points in the file, read back from its bytes."""
    model = schema.ModelT.InitFromPackedBuf(made.content)
    return [
        (tensor.quantization.scale, tensor.quantization.zeroPoint)
        for tensor in model.subgraphs[0].tensors
        if tensor.quantization is not None and tensor.quantization.scale is not None
    ]


def test_scales_and_zero_points_are_the_graphs_bit_by_bit() -> None:
    model = linear(quantized_result=True)
    found = parameters(emit(model))
    wanted = [
        (model.graph.initializers[scale].const_value.numpy(), zero)  # type: ignore[union-attr]
        for scale, zero in (("xs", X_ZERO), ("ws", 0), ("bs", 0), ("ys", Y_ZERO))
    ]
    for scale, zero_point in wanted:
        assert any(
            np.array_equal(scale.reshape(-1), found_scale)
            and (found_scale.dtype == np.float32 and (found_zero == zero_point).all())
            for found_scale, found_zero in found
        )


@pytest.mark.parametrize("delegate", [True, False])
def test_product_of_integers_equals_onnx_runtime(delegate: bool) -> None:
    model = linear(quantized_result=True)
    made = emit(model)
    assert [operator.name for operator in made.operators] == [
        "QUANTIZE",
        "FULLY_CONNECTED",
        "DEQUANTIZE",
    ]
    x = sampled(BATCH, IN) * 3
    (got,) = run_tflite(made, x, delegate=delegate)
    # A sum that lies on a rounding tie may fall to either side.
    np.testing.assert_allclose(got, run(model, x), rtol=0, atol=Y_SCALE * (1 + 1e-5))


def test_results_of_products_get_a_scale_that_covers_them() -> None:
    model = linear(quantized_result=False)
    (value,) = results_without_scale(model)
    assert value.name == "s"
    images = [sampled(BATCH, IN, seed=seed) * 3 for seed in range(3)]
    before = [run(model, image) for image in images]
    model.graph.inputs[0].name = "image"
    scales = value_scales(model, ["s"], images)
    quantize_values(model, scales)
    assert not results_without_scale(model)
    assert model.graph.outputs[0].name == "y"
    for image, wanted in zip(images, before, strict=True):
        # Clipping is rare; otherwise half a step.
        error = np.abs(run(model, image) - wanted)
        assert np.quantile(error, 0.95) <= scales["s"].scale * 0.5 * (1 + 1e-4)


def test_a_quantized_graph_output_keeps_its_name() -> None:
    model = model_of("g (float[3] x) => (float[3] y) { y = Neg(x) }")
    quantize_values(model, {"y": QParams(0.5, 3)})
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_array_equal(run(model, np.array([0.2, 0.3, 90], "f")), [0, -0.5, -65.5])


@pytest.mark.parametrize("interface", ["int8", "uint8"])
def test_integer_interfaces_give_the_same_integers(interface: str) -> None:
    model = linear(quantized_result=True)
    made = emit(model, options=TfliteOptions(interface=interface))  # type: ignore[arg-type]
    offset = 128 if interface == "uint8" else 0
    (source,), (result,) = made.inputs.values(), made.outputs.values()
    assert source.dtype == result.dtype == interface
    assert source.quantization is not None
    assert result.quantization is not None
    assert source.quantization.scale[0] == X_SCALE
    assert source.quantization.zero_point[0] == int(X_ZERO) + offset
    assert result.quantization.zero_point[0] == int(Y_ZERO) + offset
    stored = np.random.default_rng(0).integers(-128, 128, (BATCH, IN)).astype(np.int8)
    (got,) = run_tflite(made, (stored.astype(np.int16) + offset).astype(interface))
    wanted = run(model, (stored.astype(np.float32) - X_ZERO) * X_SCALE)
    real = (got.astype(np.float32) - offset - Y_ZERO) * Y_SCALE
    np.testing.assert_allclose(real, wanted, rtol=0, atol=Y_SCALE * (1 + 1e-5))


def test_integer_interface_of_a_float_model_is_refused() -> None:
    model = model_of("g (float[3] x) => (float[3] y) { y = Neg(x) }")
    with pytest.raises(CompileError, match="not quantized at once"):
        emit(model, options=TfliteOptions(interface="int8"))


IMAGE = (
    "g (float[1,3,8,8] image) => (float[1,4,4,4] y) {"
    " q = QuantizeLinear(image, s, z)  r = DequantizeLinear(q, s, z)"
    " v = DequantizeLinear<axis=0>(w, ws)  c = Conv<strides=[2,2]>(r, v)"
    " cq = QuantizeLinear(c, s, z)  y = DequantizeLinear(cq, s, z) }"
)
NORMALIZATION = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize("integer_only", [False, True])
def test_pixels_are_normalized_as_the_graph_wants_them(integer_only: bool) -> None:
    scale, zero = np.array(0.02, np.float32), np.array(-14, np.int8)
    # The identity, as weights: every second pixel of each channel.
    w = np.zeros((4, 3, 2, 2), np.int8)
    w[[0, 1, 2], [0, 1, 2], 0, 0] = 1
    made = emit(
        model_of(IMAGE, s=scale, z=zero, w=w, ws=np.ones(4, np.float32)),
        options=TfliteOptions(input="uint8-image"),
        normalization=NORMALIZATION,
        integer_only=integer_only,
        also=["q"],
    )
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3)).astype(np.uint8)
    result = run_tflite(made, pixels.transpose(0, 3, 1, 2))[-1]
    real = (pixels / 255 - NORMALIZATION.mean) / NORMALIZATION.std
    wanted = np.clip(real / scale + zero, -128, 127)
    # Half a step, and what a normalization in float32 or in int32 rounds before.
    np.testing.assert_allclose(result, wanted, rtol=0, atol=0.5 + 2e-3)


@pytest.mark.parametrize("same_scale", [True, False])
def test_integers_are_joined_where_their_scales_agree(same_scale: bool) -> None:
    model = model_of(
        "g (float[2,4] a, float[2,4] b) => (float[2,8] y) {"
        " p = QuantizeLinear(a, s, z)  pr = DequantizeLinear(p, s, z)"
        " q = QuantizeLinear(b, t, z)  qr = DequantizeLinear(q, t, z)"
        " y = Concat<axis=1>(pr, qr) }",
        s=np.array(0.1, np.float32),
        t=np.array(0.1 if same_scale else 0.2, np.float32),
        z=np.array(0, np.int8),
    )
    made = emit(model)
    names = [operator.name for operator in made.operators]
    assert (names.index("DEQUANTIZE") > names.index("CONCATENATION")) == same_scale
    inputs = sampled(2, 4), sampled(2, 4, seed=1)
    np.testing.assert_allclose(run_tflite(made, *inputs)[0], run(model, *inputs), atol=1e-6)


def test_requantization_rounds_twice_as_the_graph_does() -> None:
    model = model_of(
        "g (float[64] x) => (float[64] y) {"
        " p = QuantizeLinear(x, s, z)  r = DequantizeLinear(p, s, z)"
        " q = QuantizeLinear(r, t, z)  y = DequantizeLinear(q, t, z) }",
        s=np.array(0.1, np.float32),
        t=np.array(0.23, np.float32),
        z=np.array(3, np.int8),
    )
    x = np.linspace(-10, 10, 64, dtype=np.float32)
    np.testing.assert_array_equal(run_tflite(emit(model), x)[0], run(model, x))


@settings(max_examples=40)
@given(quantized_graphs())
def test_random_quantized_graphs_are_what_onnx_runtime_says(
    case: tuple[ir.Model, npt.NDArray],
) -> None:
    model, x = case
    made = emit(model)
    wanted = run(model, x)
    for delegate in (True, False):
        (got,) = run_tflite(made, x, delegate=delegate)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=OUTPUT_SCALE * (1 + 1e-5))
