"""Packages from graphs, evaluated, against ONNX Runtime on the same graphs."""

import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mil import DESCRIPTION
from onnx_models import model_of, run, sampled
from quantized_graphs import OUTPUT_SCALE, quantized_graphs

from gfcompile.compile.passes.filter_functions import filter_function, function_name
from gfcompile.runtime.errors import CompileError
from gfcompile.targets.coreml.emit import Emitted, emit
from gfcompile.targets.coreml.evaluate import Evaluator
from gfcompile.targets.coreml.options import CoremlOptions, Layout
from gfcompile.targets.coreml.program import MilProgram, read_program
from gfcompile.targets.coreml.statistics import measure

Array = np.ndarray[Any, Any]
LAYOUTS: tuple[Layout, ...] = ("ane", "plain")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Two float32 evaluations of a handful of nodes over axes of at most 64: some 30 roundings of 6e-8
# of the largest value.
TOLERANCE = 3e-6
# The same in float16, where a rounding is 5e-4 at most; rarely do more than 20 add up.
HALF_TOLERANCE = 1e-2

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def package_of(
    folder: Path,
    model: ir.Model,
    *,
    half: bool = False,
    labels: tuple[str, ...] = (),
    group_size: int | None = None,
    **options: Any,
) -> tuple[MilProgram, Emitted]:
    package = folder / f"{len(list(folder.iterdir()))}.mlpackage"
    emitted = emit(
        model,
        package,
        options=CoremlOptions(**{"input": "tensor", **options}),
        half=half,
        mean=MEAN,
        std=STD,
        labels=labels,
        description=DESCRIPTION,
        group_size=group_size,
    )
    return read_program(package), emitted


def kinds(program: MilProgram) -> Counter[str]:
    return Counter(op.kind for op in program.operations)


def assert_same(program: MilProgram, model: ir.Model, x: Array, *, tolerance: float) -> None:
    expected = run(model, x)
    result = Evaluator(program).run({"image": x})["logits"]
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, atol=tolerance * max(1, np.abs(expected).max()))


def check(folder: Path, model: ir.Model, *shape: int, **options: Any) -> dict[Layout, MilProgram]:
    """Emits in both layouts and in both precisions, compares each, and returns those in float32."""
    x = sampled(*shape, seed=9)
    programs: dict[Layout, MilProgram] = {}
    for layout in LAYOUTS:
        programs[layout], _ = package_of(folder, model, layout=layout, **options)
        assert_same(programs[layout], model, x, tolerance=TOLERANCE)
        half, _ = package_of(folder, model, half=True, layout=layout, **options)
        assert_same(half, model, x, tolerance=HALF_TOLERANCE)
    return programs


# Operators, one graph each: text, input shape, constants.

OPERATORS: dict[str, tuple[str, tuple[int, ...], dict[str, Array]]] = {
    "linear": ("y = MatMul(x, w)  logits = Add(y, b)", (1, 5, 8), {"w": (8, 6), "b": (6,)}),
    "linear of a vector": ("logits = MatMul(x, w)", (1, 8), {"w": (8, 6)}),
    "linear to one": ("logits = MatMul(x, w)", (1, 5, 8), {"w": (8, 1)}),
    "linear of a grid": ("logits = MatMul(x, w)", (2, 3, 4, 8), {"w": (8, 6)}),
    "linear of five axes": ("logits = MatMul(x, w)", (2, 3, 2, 4, 8), {"w": (8, 6)}),
    "linear with a residual": ("y = MatMul(x, w)  logits = Add(y, x)", (1, 5, 8), {"w": (8, 8)}),
    "batches": ("y = MatMul(x, w)  logits = Add(y, b)", (3, 5, 8), {"w": (8, 6), "b": (6,)}),
    "activations": (
        "t = Transpose <perm = [0, 2, 1]> (x)  logits = MatMul(x, t)", (2, 5, 8), {}
    ),
    "attention": (
        """all = MatMul (x, qkv)
        q, k, v = Split <axis = 2, num_outputs = 3> (all)
        qs = Reshape(q, heads)  ks = Reshape(k, heads)  vs = Reshape(v, heads)
        qh = Transpose <perm = [0, 2, 1, 3]> (qs)
        kh = Transpose <perm = [0, 2, 3, 1]> (ks)
        vh = Transpose <perm = [0, 2, 1, 3]> (vs)
        scores = MatMul(qh, kh)
        shares = Softmax <axis = -1> (scores)
        z = MatMul(shares, vh)
        zt = Transpose <perm = [0, 2, 1, 3]> (z)
        joined = Reshape(zt, tokens)
        logits = MatMul(joined, w)""",
        (1, 5, 8),
        {
            "qkv": (8, 24),
            "heads": np.array([1, 5, 2, 4]),
            "tokens": np.array([1, 5, 8]),
            "w": (8, 8),
        },
    ),
    "patches": (
        """c = Conv <strides = [2, 2], kernel_shape = [2, 2]> (x, w, b)
        r = Reshape(c, tokens)
        t = Transpose <perm = [0, 2, 1]> (r)
        logits = Add(t, p)""",
        (1, 3, 4, 6),
        {"w": (8, 3, 2, 2), "b": (8,), "tokens": np.array([1, 8, 6]), "p": (1, 6, 8)},
    ),
    "padded convolution": (
        "logits = Conv <pads = [1, 0, 2, 1], dilations = [1, 2], group = 2> (x, w)",
        (1, 4, 6, 7),
        {"w": (6, 2, 3, 2)},
    ),
    "layer norm": (
        "logits = LayerNormalization <epsilon = 1e-6> (x, g, b)", (1, 5, 8), {"g": (8,), "b": (8,)}
    ),
    "layer norm of a grid": (
        "logits = LayerNormalization (x, g)", (1, 2, 3, 8), {"g": (8,)}
    ),
    "gelu": ("logits = Gelu (x)", (1, 5, 8), {}),
    "gelu by tanh": ('logits = Gelu <approximate = "tanh"> (x)', (1, 5, 8), {}),
    "relu": ("logits = Relu (x)", (1, 5, 8), {}),
    "sigmoid": ("logits = Sigmoid (x)", (1, 5, 8), {}),
    "tanh": ("logits = Tanh (x)", (1, 5, 8), {}),
    "erf": ("logits = Erf (x)", (1, 5, 8), {}),
    "exp": ("logits = Exp (x)", (1, 5, 8), {}),
    "root of the size": ("a = Abs (x)  logits = Sqrt (a)", (1, 5, 8), {}),
    "difference": ("logits = Sub (c, x)", (1, 5, 8), {"c": (5, 8)}),
    "quotient": ("e = Exp (x)  logits = Div (x, e)", (1, 5, 8), {}),
    "broadcast in the middle": (
        """m = ReduceMean <keepdims = 1> (x, axes)
        logits = Mul (x, m)""",
        (1, 5, 8),
        {"axes": np.array([1])},
    ),
    "two that are not whole": (
        """a = ReduceMean <keepdims = 1> (x, rows)
        b = ReduceMax <keepdims = 1> (x, columns)
        logits = Add (a, b)""",
        (2, 5, 8),
        {"rows": np.array([1]), "columns": np.array([2])},
    ),
    "a scalar": ("logits = Mul (x, c)", (1, 5, 8), {"c": np.array(0.3, np.float32)}),
    "softmax over tokens": ("logits = Softmax <axis = 1> (x)", (1, 5, 8), {}),
    "mean of tokens": (
        "logits = ReduceMean <keepdims = 0> (x, axes)", (1, 5, 8), {"axes": np.array([1])}
    ),
    "sum of all": ("logits = ReduceSum <keepdims = 1> (x)", (2, 5, 8), {}),
    "class token": (
        "c = Concat <axis = 1> (t, x)  logits = LayerNormalization (c, g)",
        (1, 5, 8),
        {"t": (1, 1, 8), "g": (8,)},
    ),
    "joined channels": ("r = Relu (x)  logits = Concat <axis = -1> (x, r)", (1, 5, 8), {}),
    "slice": (
        "logits = Slice (x, b, e, a, s)",
        (1, 9, 8),
        {
            "b": np.array([1, -6]),
            "e": np.array([2**62, -1]),
            "a": np.array([1, 2]),
            "s": np.array([2, 3]),
        },
    ),
    "unequal parts": (
        "a, b = Split <axis = 1> (x, sizes)  logits = Concat <axis = 1> (b, a)",
        (1, 5, 8),
        {"sizes": np.array([2, 3])},
    ),
    "one token": ("logits = Gather <axis = 1> (x, i)", (1, 5, 8), {"i": np.array(-1)}),
    "some tokens": ("logits = Gather <axis = 1> (x, i)", (1, 5, 8), {"i": np.array([3, 0, 3])}),
    "a table of tokens": (
        "logits = Gather <axis = 1> (x, i)", (1, 5, 8), {"i": np.array([[3, 0], [1, 1]])}
    ),
    "kept tokens": (
        """scores = MatMul (x, w)
        flat = Squeeze (scores, last)
        values, indices = TopK <axis = 1, largest = 1, sorted = 1> (flat, k)
        shifted = Add (indices, one)
        all = Concat <axis = 1> (zero, shifted)
        row = Reshape (all, minus)
        rows = Reshape (x, tokens)
        kept = Gather <axis = 0> (rows, row)
        logits = Reshape (kept, back)""",
        (1, 7, 8),
        {
            "w": (8, 1),
            "last": np.array([-1]),
            "k": np.array([3]),
            "one": np.array(-1),
            "zero": np.array([[5]]),
            "minus": np.array([-1]),
            "tokens": np.array([7, 8]),
            "back": np.array([1, 4, 8]),
        },
    ),
    "an order and its inverse": (
        """scores = ReduceMean <keepdims = 0> (x, axes)
        v, i = TopK <axis = 1, largest = 1, sorted = 1> (scores, k)
        u, j = TopK <axis = 1, largest = 0, sorted = 1> (i, k)
        floats = Cast <to = 1> (j)
        logits = Add (floats, v)""",
        (1, 7, 8),
        {"axes": np.array([2]), "k": np.array([7])},
    ),
    "expanded": ("logits = Expand (x, s)", (1, 1, 8), {"s": np.array([2, 5, 8])}),
    "views": (
        """a = Unsqueeze (x, axes)  b = Flatten <axis = 2> (a)
        c = Identity (b)  logits = Reshape (c, shape)""",
        (2, 5, 8),
        {"axes": np.array([0]), "shape": np.array([5, 4, 4])},
    ),
    "windows": (
        """w = Reshape (x, six)
        t = Transpose <perm = [0, 1, 3, 2, 4, 5]> (w)
        r = Reshape (t, windows)
        logits = LayerNormalization (r, g)""",
        (1, 24, 8),
        {
            "six": np.array([1, 2, 2, 3, 2, 8]),
            "windows": np.array([6, 4, 8]),
            "g": (8,),
        },
    ),
}  # fmt: skip


def graph_of(case: str) -> tuple[ir.Model, tuple[int, ...]]:
    body, shape, constants = OPERATORS[case]
    arrays = {
        name: sampled(*value, seed=index) if isinstance(value, tuple) else value
        for index, (name, value) in enumerate(constants.items())
    }
    dims = ", ".join(str(size) for size in shape)
    return model_of(f"f (float[{dims}] x) => (logits) {{ {body} }}", **arrays), shape


@pytest.mark.parametrize("case", OPERATORS)
def test_operator_is_what_onnx_runtime_says(case: str, tmp_path: Path) -> None:
    model, shape = graph_of(case)
    check(tmp_path, model, *shape)


# Layouts


def test_attention_needs_no_transpose_with_channels_first(tmp_path: Path) -> None:
    model, shape = graph_of("attention")
    programs = check(tmp_path, model, *shape)
    assert kinds(programs["ane"])["transpose"] == 2  # of input and output, which have them last
    assert kinds(programs["plain"])["transpose"] == 4


def test_layouts_choose_how_a_linear_layer_is_written(tmp_path: Path) -> None:
    model, shape = graph_of("linear")
    programs = check(tmp_path, model, *shape)
    assert kinds(programs["ane"])["conv"] == 1
    assert kinds(programs["plain"]) == {"linear": 1, "identity": 1}  # the bias inside
    (conv,) = (op for op in programs["ane"].operations if op.kind == "conv")
    assert conv.outputs[0][1].shape == (1, 6, 1, 5)  # tokens last: an axis of one would be padded


def test_queries_keys_and_values_are_reshaped_before_they_are_split(tmp_path: Path) -> None:
    model, shape = graph_of("attention")
    program = check(tmp_path, model, *shape)["plain"]
    (split,) = (op for op in program.operations if op.kind == "split")
    assert split.outputs[0][1].shape == (1, 5, 2, 4)


# Filters


def filter_model(form: Literal["dft", "circular"], batch: int, h: int, w: int, c: int) -> ir.Model:
    """A filter call between two views; the kernel is drawn as real numbers on the grid."""
    kernel = sampled(h, w, c, seed=1) / math.sqrt(h * w)
    if form == "circular":
        constants = {"kernel": kernel}
    else:
        # y = irfft2(rfft2(x) * rfft2(kernel)), with the factor that orthonormal transforms miss.
        spectrum = np.fft.rfft2(kernel, axes=(0, 1))
        constants = {
            "k_re": spectrum.real.astype(np.float32),
            "k_im": spectrum.imag.astype(np.float32),
        }
    values = [
        ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in constants.items()
    ]
    x = ir.val("x", ir.DataType.FLOAT, (batch, h, w, c))
    attributes = [ir.AttrInt64("channels", c)] if form == "circular" else []
    call = ir.Node("gfcompile", function_name(form, h, w), [x, *values], attributes)
    (y,) = call.outputs
    y.name, y.type, y.shape = "logits", ir.TensorType(ir.DataType.FLOAT), x.shape
    graph = ir.Graph(
        [x], [y], nodes=[call], initializers=values, opset_imports={"": 20, "gfcompile": 1}
    )
    return ir.Model(graph, ir_version=10, functions=[filter_function(form, h, w, 20)])


@pytest.mark.parametrize("form", ["dft", "circular"])
@pytest.mark.parametrize("grid", [(1, 4, 4, 3), (2, 5, 6, 2), (1, 1, 7, 2), (1, 18, 16, 2)])
def test_filter_is_its_function(
    form: Literal["dft", "circular"], grid: tuple[int, int, int, int], tmp_path: Path
) -> None:
    check(tmp_path, filter_model(form, *grid), *grid)


def test_a_small_filter_is_three_operations(tmp_path: Path) -> None:
    """Beside what takes its input, and gives its output, with channels last."""
    program = check(tmp_path, filter_model("dft", 1, 14, 14, 4), 1, 14, 14, 4)["plain"]
    assert kinds(program) == {"reshape": 2, "matmul": 2, "mul": 1, "identity": 1}


def test_a_large_filter_is_seven_operations(tmp_path: Path) -> None:
    program = check(tmp_path, filter_model("dft", 1, 28, 28, 4), 1, 28, 28, 4)["ane"]
    assert kinds(program) == {
        "transpose": 2, "matmul": 4, "mul": 1, "reshape": 2, "identity": 1,
    }  # fmt: skip


@pytest.mark.slow
def test_our_filter_takes_a_tenth_of_the_operations_of_coremltools_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from gfcompile.targets.coreml.tools import coremltools, quiet

    class Filter(torch.nn.Module):
        """As GFNet writes it; the converter has rfftn, and no rfft2 and no complex product."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spectrum = torch.fft.rfftn(x, dim=(1, 2), norm="ortho")
            gain = torch.ones(14, 8, 4)
            spectrum = torch.complex(
                spectrum.real * gain - spectrum.imag * gain,
                spectrum.real * gain + spectrum.imag * gain,
            )
            return torch.fft.irfftn(spectrum, s=(14, 14), dim=(1, 2), norm="ortho")

    traced = torch.jit.trace(Filter().eval(), torch.zeros(1, 14, 14, 4))
    ct = coremltools()
    with quiet():
        model = ct.convert(
            traced,
            inputs=[ct.TensorType(name="x", shape=(1, 14, 14, 4))],
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
        )
    function = model.get_spec().mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    own = sum(op.type not in ("const", "cast") for op in block.operations)
    program, _ = package_of(tmp_path, filter_model("dft", 1, 14, 14, 4), layout="plain")
    ours = sum(count for kind, count in kinds(program).items() if kind in ("matmul", "mul"))
    with capsys.disabled():
        print(f"\n14x14 filter: {ours} operations, coremltools' own lowering of rfftn {own}")
    assert own >= 10 * ours


# Int8


def quantized_model(*, bits: int = 8) -> ir.Model:
    """Two quantized layers with GELU between, weights (8, 16) and (16, 4)."""
    generator = np.random.default_rng(3)
    top = 2 ** (bits - 1) - 1
    arrays: dict[str, Array] = {}
    for name, (k, n) in {"one": (8, 16), "two": (16, 4)}.items():
        arrays[f"w_{name}"] = generator.integers(-top, top + 1, (k, n)).astype(np.int8)
        arrays[f"ws_{name}"] = (generator.uniform(0.5, 1.5, n) / top / math.sqrt(k)).astype(
            np.float32
        )
        arrays[f"wz_{name}"] = np.zeros(n, np.int8)
        arrays[f"s_{name}"] = np.array({"one": 0.031, "two": 0.017}[name], np.float32)
        arrays[f"z_{name}"] = np.array({"one": 3, "two": -101}[name], np.int8)
        arrays[f"b_{name}"] = generator.integers(-3000, 3000, n).astype(np.int32)
        arrays[f"bs_{name}"] = arrays[f"s_{name}"] * arrays[f"ws_{name}"]
        arrays[f"bz_{name}"] = np.zeros(n, np.int32)
    layer = """
        q_{1} = QuantizeLinear ({0}, s_{1}, z_{1})
        d_{1} = DequantizeLinear (q_{1}, s_{1}, z_{1})
        m_{1} = DequantizeLinear <axis = 1> (w_{1}, ws_{1}, wz_{1})
        p_{1} = MatMul (d_{1}, m_{1})
        c_{1} = DequantizeLinear <axis = 0> (b_{1}, bs_{1}, bz_{1})
        {2} = Add (p_{1}, c_{1})"""
    body = layer.format("x", "one", "y") + "  g = Gelu (y)" + layer.format("g", "two", "logits")
    return model_of(f"f (float[1, 5, 8] x) => (logits) {{ {body} }}", **arrays)


QUANTIZED_INPUT = sampled(1, 5, 8, seed=11)


@both_layouts
@pytest.mark.parametrize("ios", [17, 18])
def test_int8_scales_and_values_are_those_of_the_graph(
    layout: Layout, ios: int, tmp_path: Path
) -> None:
    model = quantized_model()
    program, emitted = package_of(tmp_path, model, layout=layout, ios=ios)
    arrays = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    weights = [op for op in program.operations if op.kind.startswith("constexpr_")]
    assert len(weights) == 2
    for op, name in zip(weights, ("one", "two"), strict=True):
        data = op.literals["quantized_data" if ios == 17 else "data"]
        np.testing.assert_array_equal(data.reshape(data.shape[:2]), arrays[f"w_{name}"].T)
        np.testing.assert_array_equal(op.literals["scale"].reshape(-1), arrays[f"ws_{name}"])
    for op in program.operations:
        if op.kind in ("quantize", "dequantize"):
            name = op.outputs[0][0].split("_")[1]
            assert program.constants[op.inputs["scale"][0]] == arrays[f"s_{name}"]
            assert program.constants[op.inputs["zero_point"][0]] == arrays[f"z_{name}"]
    # Between quantize, dequantize and product there is nothing: that is how W8A8 is recognised.
    made = {name: op for op in program.operations for name, _ in op.outputs}
    for op in program.operations:
        if op.kind in ("conv", "linear"):
            dequantize = made[op.inputs["x"][0]]
            assert dequantize.kind == "dequantize"
            assert made[dequantize.inputs["input"][0]].kind == "quantize"
            assert made[op.inputs["weight"][0]].kind.startswith("constexpr_")
    assert_same(program, model, QUANTIZED_INPUT, tolerance=TOLERANCE)
    assert emitted.places["q_one"].name == "q_one"


def test_int8_values_can_be_read_back_in_the_graphs_shape(tmp_path: Path) -> None:
    program, emitted = package_of(tmp_path, quantized_model(), layout="ane")
    place = emitted.places["q_one"]
    seen: list[Array] = []
    Evaluator(program).run(
        {"image": QUANTIZED_INPUT},
        lambda op, results: (
            seen.append(results[0].numpy()) if op.outputs[0][0] == place.name else None
        ),
    )
    expected = np.clip(np.rint(QUANTIZED_INPUT / np.float32(0.031)) + 3, -128, 127)
    np.testing.assert_array_equal(place.restore(seen[0]), expected)


def test_ios_16_quantizes_weights_alone(tmp_path: Path) -> None:
    from gfcompile.compile.emitters.coreml import weights_only

    model = quantized_model()
    program, _ = package_of(tmp_path, model, ios=16, layout="plain")
    assert kinds(program) == {
        "constexpr_affine_dequantize": 2, "linear": 2, "gelu": 1, "identity": 1,
    }  # fmt: skip
    assert_same(program, weights_only(model), QUANTIZED_INPUT, tolerance=TOLERANCE)


def test_ios_15_stores_the_values_of_int8_weights(tmp_path: Path) -> None:
    from gfcompile.compile.emitters.coreml import weights_only

    model = quantized_model()
    program, _ = package_of(tmp_path, model, ios=15, layout="plain")
    assert kinds(program) == {"linear": 2, "gelu": 1, "identity": 1}
    assert program.opset == "CoreML5"
    assert_same(program, weights_only(model), QUANTIZED_INPUT, tolerance=TOLERANCE)


def test_four_bit_weights_are_stored_as_such_from_ios_18(tmp_path: Path) -> None:
    model = quantized_model(bits=4)
    program, _ = package_of(tmp_path, model, ios=18)
    proto = program.spec.mlProgram.functions["main"].block_specializations["CoreML8"]
    (first, *_) = (op for op in proto.operations if op.type.startswith("constexpr"))
    from coremltools.proto import MIL_pb2

    stored = first.inputs["data"] if "data" in first.inputs else first.attributes["data"]
    assert MIL_pb2.INT4 in _data_types(stored)
    # Half a byte for each of 256 weights; scales, biases and what quantizes beside them.
    eight, _ = package_of(tmp_path, quantized_model(), ios=18)
    sizes = [measure(made).weights_bytes for made in (program, eight)]
    assert sizes[1] - sizes[0] == (8 * 16 + 16 * 4) // 2
    assert_same(program, model, QUANTIZED_INPUT, tolerance=TOLERANCE)


@both_layouts
def test_groups_of_four_bit_weights_have_scales_of_their_own(
    layout: Layout, tmp_path: Path
) -> None:
    model = quantized_model(bits=4)
    rng = np.random.default_rng(0)
    weight = model.graph.initializers["w_two"]
    assert weight.const_value is not None
    codes = weight.const_value.numpy()  # (16, 4): two groups of eight to a channel
    integers = codes * rng.integers(5, 19, (2, 4)).repeat(8, axis=0).astype(np.int8)
    weight.const_value = ir.tensor(integers.astype(np.int8), name="w_two")
    for half in (False, True):
        program, _ = package_of(tmp_path, model, ios=18, layout=layout, group_size=8, half=half)
        tolerance = HALF_TOLERANCE if half else TOLERANCE
        assert_same(program, model, QUANTIZED_INPUT, tolerance=tolerance)
        proto = program.spec.mlProgram.functions["main"].block_specializations["CoreML8"]
        stored = [op for op in proto.operations if op.type.startswith("constexpr_blockwise")]
        from coremltools.proto import MIL_pb2

        assert len(stored) == 2
        for op in stored:
            data = op.inputs["data"] if "data" in op.inputs else op.attributes["data"]
            assert MIL_pb2.INT4 in _data_types(data)


def _data_types(message: Any) -> set[int]:
    """The data types of every tensor type inside a message."""
    if message.DESCRIPTOR.name == "TensorType":
        return {message.dataType}
    found: set[int] = set()
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            parts = value if field.is_repeated else [value]
            for part in parts:
                found |= _data_types(part)
    return found


# Images, classes, descriptions


def classifier(*, padded: bool = False) -> ir.Model:
    pads = "pads = [1, 1, 1, 1], " if padded else ""
    size = 4 if padded else 3
    return model_of(
        f"""f (float[1, 3, 6, 6] x) => (logits) {{
            c = Conv <{pads}strides = [2, 2]> (x, w, b)
            r = Reshape (c, rows)
            logits = MatMul (r, h)
        }}""",
        w=sampled(4, 3, 2, 2, seed=1),
        b=sampled(4, seed=2),
        rows=np.array([1, 4 * size * size]),
        h=sampled(4 * size * size, 3, seed=3),
    )


@both_layouts
@pytest.mark.parametrize("padded", [False, True])
def test_pixels_are_normalized_inside(layout: Layout, padded: bool, tmp_path: Path) -> None:
    model = classifier(padded=padded)
    program, emitted = package_of(tmp_path, model, layout=layout, input="image")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 6, 6)).astype(np.uint8)
    mean, std = (np.reshape(v, (1, 3, 1, 1)) for v in (MEAN, STD))
    expected = run(model, ((pixels / 255 - mean) / std).astype(np.float32))
    result = Evaluator(program).run({"image": pixels})
    # Pixels are up to 255 times larger than what they are weighted with expects.
    np.testing.assert_allclose(result["logits"], expected, atol=1e-4)
    assert emitted.takes_pixels
    # A border of zeros is not black: normalization cannot move behind it.
    assert kinds(program)["add"] == padded
    image = program.spec.description.input[0].type.imageType
    assert (image.width, image.height) == (6, 6)


def test_classes_and_descriptions_are_filled_in(tmp_path: Path) -> None:
    program, emitted = package_of(
        tmp_path, classifier(), input="image", labels=("cat", "dog", "mat")
    )
    result = Evaluator(program).run({"image": np.zeros((1, 3, 6, 6))})
    assert emitted.classifies
    logits = result["logits"][0]
    assert result["classLabel"] == ("cat", "dog", "mat")[logits.argmax()]
    powers = np.exp(logits - logits.max())
    assert list(result["classLabel_probs"].values()) == pytest.approx(powers / powers.sum())
    description = program.spec.description
    assert description.predictedFeatureName == "classLabel"
    assert description.predictedProbabilitiesName == "classLabel_probs"
    metadata = description.metadata
    fields = (metadata.shortDescription, metadata.author, metadata.versionString, metadata.license)
    assert fields == ("a test", "tests", "1", "none")
    assert all(f.shortDescription for f in (*description.input, *description.output))


def test_classes_without_names_are_numbered(tmp_path: Path) -> None:
    program, _ = package_of(tmp_path, classifier(), input="image")
    result = Evaluator(program).run({"image": np.zeros((1, 3, 6, 6))})
    assert list(result["classLabel_probs"]) == ["class 0", "class 1", "class 2"]


def test_no_package_stays_in_the_folder_of_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """coremltools keeps a package of its own there until the process ends, if it is let."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    package_of(tmp_path, classifier(), input="image")
    assert not list(temporary.glob("*.mlpackage"))


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    for _ in range(2):
        package_of(tmp_path, classifier(), input="image", half=True)
    one, other = (
        {path.relative_to(package): path.read_bytes() for path in package.rglob("*.*")
         if path.is_file()}
        for package in sorted(tmp_path.iterdir())
    )  # fmt: skip
    assert one == other


def test_apples_tools_read_the_package(tmp_path: Path) -> None:
    from coremltools.models.utils import load_spec

    program, _ = package_of(tmp_path, classifier(), input="image")
    (package,) = tmp_path.iterdir()
    assert load_spec(str(package)) == program.spec


# Refusals


def test_an_operator_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = model_of("f (float[2, 3] x) => (logits) { logits = CumSum (x, a) }", a=np.array(0))
    model.graph[0].name = "sums"
    with pytest.raises(
        CompileError, match=r"CumSum \(node sums\): no such operator.*another|change"
    ):
        package_of(tmp_path, model)


@pytest.mark.parametrize(
    ("body", "constants", "why"),
    [
        (
            "logits = Slice (x, b, e, a, s)",
            {"b": [-1], "e": [-(2**62)], "a": [1], "s": [-1]},
            "backwards",
        ),
        ("logits = LayerNormalization <axis = 1> (x, g)", {"g": [[1.0] * 4] * 3}, "last axis"),
        ("logits = Conv (y, x)  ", {}, "while the model runs"),
    ],
)
def test_what_an_operator_cannot_do_is_said(
    body: str, constants: dict[str, Any], why: str, tmp_path: Path
) -> None:
    arrays = {
        name: np.array(value, np.float32 if name == "g" else np.int64)
        for name, value in constants.items()
    }
    shape = "2, 3, 4"
    if "Conv" in body:
        body, shape = "y = Relu (x)  " + body, "3, 3, 4, 4"
    model = model_of(f"f (float[{shape}] x) => (logits) {{ {body} }}", **arrays)
    with pytest.raises(CompileError, match=why):
        package_of(tmp_path, model)


def test_a_constant_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    model = model_of(
        "f (float[1, 3] x) => (logits) { logits = Mul (x, c) }", c=np.array([1e5], np.float32)
    )
    package_of(tmp_path, model)
    with pytest.raises(CompileError, match=r"Mul \(node .*65504; compile with --fp32"):
        package_of(tmp_path, model, half=True)


def test_a_tensor_of_too_many_axes_is_refused_by_its_node(tmp_path: Path) -> None:
    model = model_of(
        """f (float[8, 12] x) => (logits) {
            r = Reshape (x, six)  t = Transpose <perm = [5, 4, 3, 2, 1, 0]> (r)
            y = Softmax <axis = 1> (t)  logits = Flatten (y)
        }""",
        six=np.array([2, 2, 2, 3, 2, 2]),
    )
    model.graph[2].name = "shares"
    with pytest.raises(CompileError, match=r"Softmax \(node shares\): .*6 axes.*change the model"):
        package_of(tmp_path, model)


def test_an_image_input_of_two_images_is_refused(tmp_path: Path) -> None:
    model = model_of("f (float[2, 3, 4, 4] x) => (logits) { logits = Relu (x) }")
    with pytest.raises(CompileError, match="--input tensor"):
        package_of(tmp_path, model, input="image")


# Random graphs


class Sketch:
    """A random graph of tokens, in the making: every value is (1, tokens, channels)."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.lines: list[str] = []
        self.arrays: dict[str, Array] = {}
        self.values: list[tuple[str, tuple[int, ...]]] = []

    def constant(self, array: Array | tuple[int, ...]) -> str:
        name = f"c{len(self.arrays)}"
        drawn = isinstance(array, tuple)
        self.arrays[name] = sampled(*array, seed=len(self.arrays)) if drawn else array
        return name

    def add(self, line: str, shape: tuple[int, ...]) -> None:
        name = f"v{len(self.values)}"
        self.lines.append(f"{name} = {line}")
        self.values.append((name, shape))

    def pick(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def step(self) -> None:
        name, shape = self.pick(self.values[-3:])
        tokens, channels = shape[1:]
        kind = self.pick(
            ("linear", "norm", "gelu", "residual", "turn", "heads", "slice", "rows", "mean", "join")
        )
        ints = lambda *numbers: self.constant(np.array(numbers, np.int64))  # noqa: E731
        if kind == "linear":
            wide = self.pick((1, 4, 6))
            weight = self.constant((channels, wide))
            self.add(f"MatMul ({name}, {weight})", (1, tokens, wide))
        elif kind == "norm":
            self.add(f"LayerNormalization ({name}, {self.constant((channels,))})", shape)
        elif kind == "gelu":
            self.add(f"Gelu ({name})", shape)
        elif kind == "residual":
            others = [other for other, dims in self.values if dims == shape]
            self.add(f"Add ({name}, {self.pick(others)})", shape)
        elif kind == "turn":
            self.add(f"Transpose <perm = [0, 2, 1]> ({name})", (1, channels, tokens))
        elif kind == "heads" and channels % 2 == 0:
            # The tokens of one head after those of the other.
            heads, flat = ints(1, tokens, 2, channels // 2), ints(1, 2 * tokens, channels // 2)
            label = f"h{len(self.lines)}"
            self.lines.append(f"{label} = Reshape ({name}, {heads})")
            self.lines.append(f"{label}t = Transpose <perm = [0, 2, 1, 3]> ({label})")
            self.add(f"Reshape ({label}t, {flat})", (1, 2 * tokens, channels // 2))
        elif kind == "slice" and tokens > 1:
            cut = f"Slice ({name}, {ints(1)}, {ints(99)}, {ints(1)})"
            self.add(cut, (1, tokens - 1, channels))
        elif kind == "rows":
            rows = [self.pick(range(tokens)) for _ in range(3)]
            self.add(f"Gather <axis = 1> ({name}, {ints(*rows)})", (1, 3, channels))
        elif kind == "mean":
            self.lines.append(f"m{len(self.lines)} = ReduceMean ({name}, {ints(1)})")
            self.add(f"Sub ({name}, m{len(self.lines) - 1})", shape)
        elif kind == "join" and tokens < 20:
            self.add(f"Concat <axis = 1> ({name}, {name})", (1, 2 * tokens, channels))


@st.composite
def sketches(draw: st.DrawFn) -> ir.Model:
    sketch = Sketch(draw)
    sketch.add("Identity (x)", (1, 6, 4))
    for _ in range(draw(st.integers(2, 8))):
        sketch.step()
    last, _ = sketch.values[-1]
    body = "\n".join([*sketch.lines, f"logits = Relu ({last})"])
    return model_of(f"f (float[1, 6, 4] x) => (logits) {{ {body} }}", **sketch.arrays)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sketches(), st.sampled_from(LAYOUTS))
def test_random_graphs_are_what_onnx_runtime_says(
    tmp_path_factory: pytest.TempPathFactory, model: ir.Model, layout: Layout
) -> None:
    program, _ = package_of(tmp_path_factory.mktemp("random"), model, layout=layout)
    assert_same(program, model, sampled(1, 6, 4, seed=8), tolerance=10 * TOLERANCE)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(quantized_graphs(), st.sampled_from(LAYOUTS))
def test_random_quantized_graphs_are_what_onnx_runtime_says(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[ir.Model, Array], layout: Layout
) -> None:
    model, x = case
    program, _ = package_of(tmp_path_factory.mktemp("random"), model, layout=layout)
    result = Evaluator(program).run({"image": x})["logits"]
    np.testing.assert_allclose(result, run(model, x), rtol=0, atol=OUTPUT_SCALE * (1 + 1e-5))
