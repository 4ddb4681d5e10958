"""Partitions compute what the graph computes (ONNX Runtime), and fuse what they should."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
from reference_kernels import run_program

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.onnx_values import NAME_SCOPES
from gfcompile.targets.tvm.kernel import (
    Attention,
    Conv,
    Dense,
    Dequantize,
    GatherRows,
    Generic,
    InversePermutation,
    LayerNorm,
    Patchify,
    Quantize,
    SelectTokens,
    Softmax,
    TokenMean,
)
from gfcompile.targets.tvm.partition import partition
from gfcompile.targets.tvm.program import Program

Array = npt.NDArray[Any]
rng = np.random.default_rng(0)

HEADER = '<ir_version: 9, opset_import: ["" : 20]>'


def model_of(graph: str, **constants: Array) -> ir.Model:
    """The graph, with initializers of these values and with all shapes inferred."""
    model = ir.from_onnx_text(f"{HEADER} {graph}")
    for name, array in constants.items():
        tensor = ir.tensor(array, name=name)
        for node in model.graph:
            for value in node.inputs:
                if value is not None and value.name == name:
                    value.const_value = tensor
                    value.shape, value.dtype = ir.Shape(array.shape), tensor.dtype
                    model.graph.initializers[name] = value
    from onnx import shape_inference

    return ir.from_proto(shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True))


def check(model: ir.Model, *, tolerance: float = 1e-5) -> Program:
    """The partition of `model`, run by the reference and equal to ONNX Runtime."""
    feeds = {
        str(value.name): rng.standard_normal(value.shape.numpy()).astype(np.float32)
        for value in model.graph.inputs
        if value.shape is not None and value.name not in model.graph.initializers
    }
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    names = [str(output.name) for output in model.graph.outputs]
    expected = dict(zip(names, session.run(names, feeds), strict=True))
    program = partition(model)
    actual = run_program(program, feeds)
    for name in names:
        holder = [n for n in program.outputs if n == name] or [*program.outputs]
        got = actual[holder[0]].reshape(expected[name].shape)
        assert np.abs(got - expected[name]).max() <= tolerance * max(1, np.abs(got).max())
    return program


def classes(program: Program) -> list[type]:
    return [type(call.kernel) for call in program.calls]


def f32(*shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def test_bias_gelu_and_residual_ride_on_a_product() -> None:
    graph = """g (float[1,6,8] x, float[1,6,4] r) => (float[1,6,4] y) {
        a = MatMul(x, w)  b = Add(a, c)  d = Gelu(b)  y = Add(d, r) }"""
    program = check(model_of(graph, w=f32(8, 4), c=f32(4)))
    assert classes(program) == [Dense]
    kernel = program.calls[0].kernel
    assert kernel == Dense(m=6, n=4, k=8, gelu=True, residual_rows=6)


def test_a_call_is_named_after_the_torch_module_that_it_came_from() -> None:
    """As the exporter of torch 2.13 writes scopes: the outermost first, the operator last."""
    model = model_of(
        "g (float[5, 8] x) => (float[5, 6] y) { p = MatMul (x, w) s = Add (p, b) y = Gelu (s) }",
        w=f32(8, 6),
        b=f32(6),
    )
    product, bias, gelu = model.graph
    product.name = "node_MatMul_7"
    assert [call.label for call in partition(model).calls] == ["node_MatMul_7"]
    bias.metadata_props[NAME_SCOPES] = "['', 'blocks.0', 'blocks.0.mlp.fc1', 'linear']"
    gelu.metadata_props[NAME_SCOPES] = "['', 'blocks.0', 'blocks.0.mlp.act', 'gelu']"
    assert [call.label for call in partition(model).calls] == ["blocks.0.mlp.fc1"]
    product.metadata_props[NAME_SCOPES] = bias.metadata_props[NAME_SCOPES] = "['', 'linear']"
    gelu.metadata_props.clear()
    assert [call.label for call in partition(model).calls] == ["node_MatMul_7"]


def test_a_product_with_two_readers_takes_nothing_along() -> None:
    graph = """g (float[1,6,8] x) => (float[1,6,4] y, float[1,6,4] b) {
        b = MatMul(x, w)  y = Add(b, c) }"""
    program = partition(model_of(graph, w=f32(8, 4), c=f32(4)))
    assert classes(program) == [Dense, Generic]


def test_rows_of_a_position_embedding_are_added_to_each_image_of_a_batch() -> None:
    graph = """g (float[2,6,8] x) => (float[2,6,4] y) { a = MatMul(x, w)  y = Add(a, c) }"""
    program = check(model_of(graph, w=f32(8, 4), c=f32(1, 6, 4)))
    assert program.calls[0].kernel == Dense(m=12, n=4, k=8, residual_rows=6)


QDQ = """g (float[1,6,8] x) => (float[1,6,4] y) {
    n = LayerNormalization <axis=-1, epsilon=1e-6> (x, gamma, beta)
    q = QuantizeLinear(n, s, z)  d = DequantizeLinear(q, s, z)
    w = DequantizeLinear <axis=1> (wq, ws)
    b = DequantizeLinear <axis=0> (bq, bs)
    m = MatMul(d, w)  a = Add(m, b)  g = Gelu(a)
    q2 = QuantizeLinear(g, s2, z2)  d2 = DequantizeLinear(q2, s2, z2)
    w2 = DequantizeLinear <axis=1> (wq2, ws2)
    m2 = MatMul(d2, w2)  y = Add(m2, x4) }"""


def qdq_constants() -> dict[str, Array]:
    s, ws = np.float32(0.03), rng.uniform(0.001, 0.01, 5).astype(np.float32)
    return {
        "gamma": f32(8),
        "beta": f32(8),
        "s": np.array(s),
        "z": np.array(7, np.int8),
        "wq": rng.integers(-127, 128, (8, 5), dtype=np.int8),
        "ws": ws,
        "bq": rng.integers(-9999, 9999, 5, dtype=np.int32),
        "bs": s * ws,
        "s2": np.array(0.02, np.float32),
        "z2": np.array(-100, np.int8),
        "wq2": rng.integers(-127, 128, (5, 4), dtype=np.int8),
        "ws2": rng.uniform(0.001, 0.01, 4).astype(np.float32),
        "x4": f32(1, 6, 4),
    }


def test_a_qdq_chain_is_three_kernels_with_int8_between_them() -> None:
    program = check(model_of(QDQ, **qdq_constants()), tolerance=1e-4)
    assert [call.kernel for call in program.calls] == [
        LayerNorm(rows=6, n=8, eps=pytest.approx(1e-6), out="int8"),
        Dense(m=6, n=5, k=8, x="int8", gelu=True, out="int8"),
        Dense(m=6, n=4, k=5, x="int8", residual_rows=6),
    ]
    q = program.tensors["q"]
    assert (q.dtype, q.scale, q.zero_point) == ("int8", pytest.approx(0.03), 7)


def norm_of_a_slice(*bounds: int, rest: str = "") -> ir.Model:
    """Of (2, 6, 8) the slice [start:end] along an axis, normalized; `rest` may read it too."""
    start, end, axis, step = bounds
    shape = list(
        np.zeros((2, 6, 8))[(slice(None),) * (axis % 3) + (slice(start, end, step),)].shape
    )
    graph = f"""g (float[2,6,8] x) => (float{shape} y) {{
        c = Slice(x, start, end, axis, step)
        n = LayerNormalization <axis=-1, epsilon=1e-6> (c, gamma, beta)
        y = {rest or "Identity(n)"} }}"""
    names = ("start", "end", "axis", "step")
    constants = {name: np.array([b], np.int64) for name, b in zip(names, bounds, strict=True)}
    return model_of(graph, **constants, gamma=f32(shape[-1]), beta=f32(shape[-1]))


@pytest.mark.parametrize("bounds", [(1, 6, 1, 1), (2, 2**31 - 1, -2, 1)])
def test_a_layer_norm_skips_rows_that_are_cut_off_the_front(bounds: tuple[int, ...]) -> None:
    program = check(norm_of_a_slice(*bounds), tolerance=1e-4)
    rows, eps = 2 * (6 - bounds[0]), pytest.approx(1e-6)
    norm = LayerNorm(rows=rows, n=8, eps=eps, images=2, leading=bounds[0])
    assert [call.kernel for call in program.calls] == [norm]


@pytest.mark.parametrize(
    "bounds", [(0, 5, 1, 1), (1, -1, 1, 1), (1, 8, 2, 1), (1, 2, 0, 1), (1, 6, 1, 2)]
)
def test_any_other_slice_is_a_copy(bounds: tuple[int, ...]) -> None:
    assert classes(partition(norm_of_a_slice(*bounds))) == [Generic, LayerNorm]


def test_rows_that_something_else_reads_too_are_a_copy() -> None:
    program = partition(norm_of_a_slice(1, 6, 1, 1, rest="Add(n, c)"))
    assert classes(program) == [Generic, LayerNorm, Generic]


def test_a_float_bias_on_an_int8_product_is_still_right() -> None:
    constants = qdq_constants()
    graph = QDQ.replace("b = DequantizeLinear <axis=0> (bq, bs)", "b = Identity(bf)")
    constants["bf"] = constants.pop("bq").astype(np.float32) * constants.pop("bs")
    check(model_of(graph, **constants), tolerance=1e-4)


def test_a_float_product_beside_int8_ones_may_be_in_fixed_point() -> None:
    beside = QDQ.replace("y = Add(m2, x4)", "f = Add(m2, x4)  y = MatMul(f, w3)")
    program = check(model_of(beside, **qdq_constants(), w3=f32(4, 4)), tolerance=1e-4)
    kernels = [call.kernel for call in program.calls if isinstance(call.kernel, Dense)]
    assert [(kernel.x, kernel.fixed_point) for kernel in kernels] == [
        ("int8", False),
        ("int8", False),
        ("float32", True),
    ]


def test_a_quantized_value_that_is_also_read_as_float_is_both() -> None:
    graph = """g (float[2,8] x) => (float[2,8] y, float[2,4] p) {
        q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z)
        w = DequantizeLinear <axis=1> (wq, ws)  p = MatMul(y, w) }"""
    constants = qdq_constants()
    program = check(
        model_of(
            graph,
            s=constants["s"],
            z=constants["z"],
            wq=rng.integers(-127, 128, (8, 4), dtype=np.int8),
            ws=constants["ws2"],
        )
    )
    assert set(classes(program)) == {Quantize, Dequantize, Dense}


def test_patch_convolution_is_patches_and_a_product() -> None:
    graph = """g (float[2,3,8,12] x) => (float[2,6,5] y) {
        c = Conv <strides=[4,4], kernel_shape=[4,4]> (x, w, b)
        r = Reshape(c, shape)  t = Transpose <perm=[0,2,1]> (r)  y = Add(t, pos) }"""
    program = check(
        model_of(graph, w=f32(5, 3, 4, 4), b=f32(5), pos=f32(1, 6, 5), shape=np.array([2, 5, 6]))
    )
    assert classes(program) == [Patchify, Dense]
    assert program.calls[1].kernel == Dense(m=12, n=5, k=48, residual_rows=6)


def test_int8_patch_convolution_on_channels_last_quantizes_while_it_cuts() -> None:
    graph = """g (float[1,4,6,3] x) => (float[1,2,3,5] y) {
        t = Transpose <perm=[0,3,1,2]> (x)
        q = QuantizeLinear(t, s, z)  d = DequantizeLinear(q, s, z)
        w = DequantizeLinear <axis=0> (wq, ws)  b = DequantizeLinear <axis=0> (bq, bs)
        c = Conv <strides=[2,2], kernel_shape=[2,2]> (d, w, b)
        y = Transpose <perm=[0,2,3,1]> (c) }"""
    constants = qdq_constants()
    wq = rng.integers(-127, 128, (5, 3, 2, 2), dtype=np.int8)
    program = check(
        model_of(graph, **{k: constants[k] for k in ("s", "z", "ws", "bq", "bs")}, wq=wq),
        tolerance=1e-4,
    )
    assert classes(program) == [Patchify, Dense]
    assert program.tensors["q"].shape == (6, 12)


def test_an_int8_patch_convolution_leaves_its_image_to_other_readers() -> None:
    graph = """g (float[1,3,4,6] x) => (float[1,2,3,5] y, float[1,3,4,6] r) {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
        w = DequantizeLinear <axis=0> (wq, ws)  b = DequantizeLinear <axis=0> (bq, bs)
        c = Conv <strides=[2,2], kernel_shape=[2,2]> (d, w, b)
        y = Transpose <perm=[0,2,3,1]> (c)  r = Relu(d) }"""
    constants = qdq_constants()
    wq = rng.integers(-127, 128, (5, 3, 2, 2), dtype=np.int8)
    program = partition(
        model_of(graph, **{k: constants[k] for k in ("s", "z", "ws", "bq", "bs")}, wq=wq)
    )
    assert set(classes(program)) == {Patchify, Dense, Quantize, Dequantize, Generic}
    assert program.tensors["q"].shape == (1, 3, 4, 6)
    assert not program.stored_in


@pytest.mark.parametrize(
    "graph",
    [
        """g (float[1,3,8,8] x) => (float[1,6,6,4] y, float[1,4,6,6] also) {
            also = Conv (x, w)  r = Relu(also)  y = Transpose <perm=[0,2,3,1]> (r) }""",
        """g (float[1,8,8,3] x) => (float[1,6,6,4] y, float[1,3,8,8] also) {
            also = Transpose <perm=[0,3,1,2]> (x)  c = Conv (also, w)
            y = Transpose <perm=[0,2,3,1]> (c) }""",
    ],
    ids=["convolution", "image"],
)
def test_what_a_graph_returns_is_computed_though_a_kernel_could_do_without(graph: str) -> None:
    program = partition(model_of(graph, w=f32(4, 3, 3, 3)))
    assert "also" in program.outputs
    assert "also" in {name for call in program.calls for name in call.writes.values()}


def test_scores_that_a_graph_returns_are_not_left_out() -> None:
    """No kernel gives them, and Relax has none either."""
    graph = "g (float[2,8] x) => (float[2,3] values, int64[2,3] y) { values, y = TopK (x, k) }"
    with pytest.raises(CompileError, match="topk"):
        partition(model_of(graph, k=np.array([3])))


def test_a_stem_of_convolutions_keeps_channels_last() -> None:
    graph = """g (float[2,3,16,16] x) => (float[2,4,5] y) {
        a = Conv <strides=[2,2], pads=[1,1,1,1], kernel_shape=[3,3]> (x, w1, b1)
        r = Relu(a)
        c = Conv <pads=[1,1,1,1], kernel_shape=[3,3]> (r, w2)
        s = Relu(c)
        p = Conv <strides=[4,4], kernel_shape=[4,4]> (s, w3, b3)
        f = Reshape(p, shape)  y = Transpose <perm=[0,2,1]> (f) }"""
    program = check(
        model_of(
            graph,
            w1=f32(6, 3, 3, 3),
            b1=f32(6),
            w2=f32(7, 6, 3, 3),
            w3=f32(5, 7, 4, 4),
            b3=f32(5),
            shape=np.array([2, 5, 4]),
        ),
        tolerance=1e-4,
    )
    assert classes(program) == [Conv, Conv, Patchify, Dense]
    assert [getattr(call.kernel, "relu", None) for call in program.calls[:2]] == [True, True]
    # What has the name of a value of the graph has its layout, too.
    assert not {"r", "s"} & set(program.tensors)


def test_depthwise_convolution_between_transposes_and_after_a_patch_convolution() -> None:
    graph = """g (float[1,8,6,3] x) => (float[1,4,3,5] y) {
        t = Transpose <perm=[0,3,1,2]> (x)
        p = Conv <strides=[2,2], kernel_shape=[2,2]> (t, w1, b1)
        q = Transpose <perm=[0,2,3,1]> (p)
        d = Conv <pads=[1,1,1,1], group=5, kernel_shape=[3,3]> (p, w2, b2)
        e = Transpose <perm=[0,2,3,1]> (d)
        m = MatMul(e, w3)  y = Add(q, m) }"""
    program = check(
        model_of(
            graph,
            w1=f32(5, 3, 2, 2),
            b1=f32(5),
            w2=f32(5, 1, 3, 3),
            b2=f32(5),
            w3=f32(5, 5),
        ),
        tolerance=1e-4,
    )
    assert classes(program) == [Patchify, Dense, Conv, Dense]
    assert program.calls[2].kernel.depthwise  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "conv",
    [
        "Conv <pads=[1,1,1,1], dilations=[2,2], kernel_shape=[3,3]> (x, w)",
        "Conv <pads=[0,0,1,1], kernel_shape=[3,3]> (x, w)",
        "Conv <pads=[1,1,1,1], kernel_shape=[3,3]> (x, w)",  # channels stay second
    ],
)
def test_other_convolutions_go_through_relax(conv: str) -> None:
    text = f"g (float[1,4,8,8] x) => (float[1,6,a,b] y) {{ c = {conv}  y = Sigmoid(c) }}"
    program = partition(model_of(text, w=f32(6, 4, 3, 3)))
    assert Conv not in classes(program)
    assert program.unscheduled == ("Conv",)


def test_a_residual_before_the_gelu_rides_on_the_product() -> None:
    graph = """g (float[1,6,8] x, float[1,1,4] r) => (float[1,6,4] y) {
        p = MatMul(x, w)  a = Add(p, b)  s = Add(a, r)  y = Gelu(s) }"""
    program = check(model_of(graph, w=f32(8, 4), b=f32(4)))
    assert [call.kernel for call in program.calls] == [
        Dense(m=6, n=4, k=8, gelu=True, residual_rows=1, residual_first=True)
    ]


def test_columns_that_are_split_are_products_of_their_own() -> None:
    graph = """g (float[2,6,8] x) => (float[2,6,3] y, float[2,6,5] z) {
        p = MatMul(x, w)  a = Add(p, b)  g = Gelu(a)
        y, z = Split <axis=2> (g, sizes) }"""
    program = check(model_of(graph, w=f32(8, 8), b=f32(8), sizes=np.array([3, 5])))
    assert [call.kernel for call in program.calls] == [
        Dense(m=12, n=n, k=8, gelu=True) for n in (3, 5)
    ]


def test_mean_over_tokens_takes_a_quantizer_along() -> None:
    graph = """g (float[1,6,8] x) => (float[1,8] y) {
        m = ReduceMean <keepdims=0> (x, axes)  q = QuantizeLinear(m, s, z)
        y = DequantizeLinear(q, s, z) }"""
    constants = qdq_constants()
    program = check(
        model_of(graph, axes=np.array([1]), s=constants["s"], z=constants["z"]),
        # Reductions in another order may fall to the other side of a rounding tie.
        tolerance=0.031,
    )
    assert program.calls[0].kernel == TokenMean(batch=1, tokens=6, n=8, out="int8")


def test_views_cost_nothing() -> None:
    graph = """g (float[1,4,6] x) => (float[4,3] y) {
        a = Reshape(x, s1)  y = MatMul(a, w) }"""
    program = check(model_of(graph, s1=np.array([4, 6]), w=f32(6, 3)))
    assert classes(program) == [Dense]


def test_other_operators_go_through_relax_in_order() -> None:
    graph = """g (float[1,4,8] x) => (float[1,8,4] y) {
        a = MatMul(x, w)  s = Sigmoid(a)  m = Mul(s, c)
        y = Transpose <perm=[0,2,1]> (m) }"""
    program = partition(model_of(graph, w=f32(8, 8), c=f32(8)))
    assert classes(program)[0] is Dense
    assert set(classes(program)[1:]) == {Generic}
    written = set(program.inputs)
    for call in program.calls:
        assert set(call.reads.values()) <= written
        written.update(call.writes.values())
    assert set(program.outputs) <= written


def test_an_operator_that_nobody_takes_is_named() -> None:
    graph = "g (float[4,4] x) => (float y) { y = Det(x) }"
    with pytest.raises(CompileError, match="Det"):
        partition(model_of(graph))


ATTENTION = """g (float[2,5,24] x) => (float[2,5,8] y) {
    q0, k0, v0 = Split <axis=2, num_outputs=3> (x)
    q1 = Reshape(q0, s)  q = Transpose <perm=[0,2,1,3]> (q1)
    k1 = Reshape(k0, s)  k = Transpose <perm=[0,2,3,1]> (k1)
    v1 = Reshape(v0, s)  v = Transpose <perm=[0,2,1,3]> (v1)
    a = MatMul(q, k)  b = Mul(a, f)  p = Softmax <axis=-1> (b)
    o = MatMul(p, v)  t = Transpose <perm=[0,2,1,3]> (o)  y = Reshape(t, r) }"""
SHAPES = {"s": np.array([2, 5, 2, 4]), "r": np.array([2, 5, 8]), "f": np.array(0.5, np.float32)}


def test_attention_between_moves_is_one_kernel() -> None:
    program = check(model_of(ATTENTION, **SHAPES))
    assert [call.kernel for call in program.calls] == [Attention(batch=2, tokens=5, heads=2, dim=4)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("k = Transpose <perm=[0,2,3,1]> (k1)", "k2 = Reshape(k0, c)  k = Identity(k2)"),
        ("v = Transpose <perm=[0,2,1,3]> (v1)", "v = Transpose <perm=[0,2,1,3]> (k1)"),
    ],
    ids=["scrambled heads", "no values"],
)
def test_what_only_looks_like_attention_is_left_alone(old: str, new: str) -> None:
    graph = ATTENTION.replace(old, new)
    assert graph != ATTENTION
    shapes = {**SHAPES, **({"c": np.array([2, 2, 4, 5])} if "c)" in new else {})}
    program = partition(model_of(graph, **shapes))
    assert Attention not in classes(program)
    assert Softmax in classes(program)


def test_kept_rows_are_a_selection_and_a_gather() -> None:
    graph = """g (float[2,6,4] x, float[2,5] scores) => (float[2,4,4] y) {
        v, i = TopK <axis=1> (scores, k)
        j = Add(i, one)  l = Concat <axis=1> (zero, j)  b = Add(l, base)
        f = Reshape(b, flat)  r = Reshape(x, rows)  g = Gather <axis=0> (r, f)
        y = Reshape(g, shape) }"""
    program = check(
        model_of(
            graph,
            k=np.array([3]),
            one=np.array(1),
            zero=np.zeros((2, 1), np.int64),
            base=np.array([[0], [6]]),
            flat=np.array([8]),
            rows=np.array([12, 4]),
            shape=np.array([2, 4, 4]),
        )
    )
    assert [call.kernel for call in program.calls] == [
        SelectTokens(batch=2, tokens=5, kept=3, offset=1, leading=1),
        GatherRows(batch=2, tokens=6, kept=4, n=4),
    ]


def test_the_order_of_all_and_its_inverse_are_kernels() -> None:
    graph = """g (float[2,5] scores) => (int64[2,5] y) {
        v, i = TopK <axis=1> (scores, k)  w, y = TopK <axis=1, largest=0> (i, k) }"""
    program = check(model_of(graph, k=np.array([5])))
    assert classes(program) == [SelectTokens, InversePermutation]
