"""Norms and filters in operators that have integer kernels, and the scales that these need."""

import numpy as np
import pytest
from onnx_models import model_of, ops, run, sampled
from tflite_filters import filter_model

from gfcompile.compile.passes.convolve_global_filters import convolve_global_filters
from gfcompile.compile.passes.expand_layer_norms import expand_layer_norms
from gfcompile.compile.passes.infer_shapes import check_model
from gfcompile.compile.passes.quantize_constants import quantize_constants
from gfcompile.compile.passes.quantize_values import quantize_edges, quantize_values
from gfcompile.compile.passes.remove_dead_code import remove_dead_code
from gfcompile.quantize.qparams import QParams
from gfcompile.runtime.errors import CompileError
from gfcompile.targets.tflite.results import values_without_scale


@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 16), (1, 2, 3, 16)])
def test_expanded_norm_equals_the_norm_but_for_its_epsilon(shape: tuple[int, ...]) -> None:
    dims = ",".join(map(str, shape))
    model = model_of(
        f"g (float[{dims}] x) => (float[{dims}] y) {{"
        " n = LayerNormalization<axis=-1, epsilon=1.0e-6>(x, gamma, beta)  y = Neg(n) }",
        gamma=sampled(16),
        beta=sampled(16, seed=1),
    )
    x = 2 + sampled(*shape, seed=2)
    expected = run(model, x)
    assert expand_layer_norms(model)
    remove_dead_code(model)
    check_model(model)
    assert "LayerNormalization" not in ops(model)
    # The epsilon is a millionth of the variance, of which the root takes a half.
    np.testing.assert_allclose(run(model, x), expected, rtol=2e-5, atol=2e-5)


def test_norm_of_another_axis_is_refused() -> None:
    model = model_of(
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = LayerNormalization<axis=1>(x, gamma) }",
        gamma=sampled(3, 4),
    )
    with pytest.raises(CompileError, match="last axis"):
        expand_layer_norms(model)


@pytest.mark.parametrize("grid", [(4, 6), (5, 1), (1, 3)])
def test_convolved_filter_equals_the_filter(grid: tuple[int, int]) -> None:
    h, w = grid
    kernel = sampled(h, w, 3)
    model = filter_model("circular", (2, h, w, 3), kernel)
    x = sampled(2, h * w, 3, seed=1)
    spectra = np.fft.rfft2(kernel, axes=(0, 1)) * np.fft.rfft2(x.reshape(2, h, w, 3), axes=(1, 2))
    expected = np.fft.irfft2(spectra, s=grid, axes=(1, 2)).reshape(x.shape)
    assert convolve_global_filters(model)
    remove_dead_code(model)
    check_model(model)
    assert ops(model)["Conv"] == 1
    np.testing.assert_allclose(run(model, x), expected, rtol=0, atol=1e-5)


def test_spectral_filter_is_refused_with_what_to_do() -> None:
    model = filter_model("dft", (1, 4, 4, 2), sampled(4, 3, 2), sampled(4, 3, 2))
    with pytest.raises(CompileError, match="--fft circular"):
        convolve_global_filters(model)


GRAPH = (
    "g (float[2,8] x) => (float[2,6] y) {"
    " xq = QuantizeLinear(x, s, z)  xr = DequantizeLinear(xq, s, z)"
    " p = MatMul(xr, w)  l = Add(p, b)  g = Gelu(l)  y = Mul(g, c) }"
)
CONSTANTS = {
    "s": np.array(0.03, np.float32),
    "z": np.array(5, np.int8),
    "w": sampled(8, 6),
    "b": sampled(6),
    "c": sampled(6, seed=1),
}


def test_values_without_scale_are_those_that_are_computed() -> None:
    names = [value.name for value in values_without_scale(model_of(GRAPH, **CONSTANTS))]
    assert names == ["l", "g", "y"]


def test_constants_get_integers_and_the_bias_the_scale_of_the_products() -> None:
    model = model_of(GRAPH, **CONSTANTS)
    x = sampled(2, 8)
    exact = run(model, x)
    quantize_values(model, {name: QParams(0.04, 0) for name in ("l", "g", "y")})
    quantize_constants(model)
    check_model(model)
    dtypes = {
        value.const_value.dtype.numpy()
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        for value in node.inputs[:1]
        if value is not None and value.const_value is not None
    }
    assert dtypes == {np.dtype(np.int8), np.dtype(np.int32)}
    bias = next(v for name, v in model.graph.initializers.items() if name.endswith("bias_scale"))
    weight = model.graph.initializers["p_weight_scale"]
    assert bias.const_value is not None
    assert weight.const_value is not None
    np.testing.assert_array_equal(
        bias.const_value.numpy(), CONSTANTS["s"] * weight.const_value.numpy()
    )
    # Three roundings of half a step, the others multiplied by at most 2; and 8 inputs' own.
    np.testing.assert_allclose(run(model, x), exact, rtol=0, atol=0.2)


def test_edges_of_a_node_share_a_scale() -> None:
    model = model_of("g (float[2] a, float[3] b) => (float[5] y) { y = Concat<axis=0>(a, b) }")
    (node,) = model.graph
    quantize_edges(node, QParams(0.5, 1))
    check_model(model)
    assert ops(model) == {"QuantizeLinear": 2, "DequantizeLinear": 2, "Concat": 1}
    a, b = np.array([0.6, -1], "f"), np.array([0, 1.3, 90], "f")
    np.testing.assert_array_equal(run(model, a, b), [0.5, -1, 0, 1.5, 63])
