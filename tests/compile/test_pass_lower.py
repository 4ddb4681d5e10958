"""The passes together: from what the exporter writes to what the emitters read."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_models import Array, check_model, ops, run
from torch import Tensor, nn

from gfcompile.compile.models import load_model
from gfcompile.compile.passes import FftForm, Lowered, lower
from gfcompile.compile.trace import rounding_tolerance, save, session, trace
from gfcompile.quantize import calibrate


class Filter(nn.Module):
    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.complex_weight = nn.Parameter(0.3 * torch.randn(side, side // 2 + 1, dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        x = torch.fft.rfft2(x.view(b, self.side, self.side, c), dim=(1, 2), norm="ortho")
        x = x * torch.view_as_complex(self.complex_weight)
        x = torch.fft.irfft2(x, s=(self.side, self.side), dim=(1, 2), norm="ortho")
        return x.reshape(b, n, c)


class Block(nn.Module):
    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.filter = Filter(dim, side)
        self.fc1, self.fc2 = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)
        self.gamma = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(self.norm2(self.filter(self.norm1(x))))
        return x + self.gamma * self.fc2(nn.functional.gelu(y))


class Pyramid(nn.Module):
    """Two stages on 32x32 images: 8x8 tokens of 64, 4x4 tokens of 96."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 4, 4)
        self.pos = nn.Parameter(torch.randn(1, 64, 64))
        self.stage1, self.stage2 = Block(64, 8), Block(96, 4)
        self.down = nn.Conv2d(64, 96, 2, 2)
        self.norm, self.head = nn.LayerNorm(96), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.patch(x).flatten(2).transpose(1, 2) + self.pos)
        x = self.down(x.reshape(-1, 8, 8, 64).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.stage2(x)).mean(1))


IMAGE = torch.from_numpy(
    np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
)


@pytest.fixture(scope="module")
def pyramid() -> nn.Module:
    torch.manual_seed(0)
    return Pyramid().eval()


@pytest.fixture(scope="module")
def traced(pyramid: nn.Module) -> ir.Model:
    return trace(pyramid, IMAGE)


@pytest.fixture(scope="module")
def traced_int8(pyramid: nn.Module) -> ir.Model:
    images = torch.cat([IMAGE, IMAGE.flip(3)])
    return trace(calibrate(pyramid, [images]).module, IMAGE)


def lowered(model: ir.Model, fft: FftForm = "dft", *, half: bool = False) -> Lowered:
    return lower(model, fft=fft, choose_form=lambda *_: "dft", half_constants=half)


def weight_of(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def assert_canonical(model: ir.Model) -> None:
    check_model(model)
    for node in model.graph:
        assert node.op_type not in ("Gemm", "Constant", "Identity", "Dropout")
        for value in node.outputs:
            assert value.dtype is not None, value.name
            assert value.shape is not None, value.name
            assert all(isinstance(dim, int) for dim in value.shape), value.name
        if node.op_type == "Transpose":
            source = node.inputs[0].producer()  # type: ignore[union-attr]
            assert source is not None, "a constant is transposed"
            assert source.op_type != "DequantizeLinear"
    assert not ops(model)["Mul"], "the layer scale is folded"


def close(model: ir.Model, actual: Array, expected: Array) -> None:
    tolerance = rounding_tolerance(model) * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("fft", ["dft", "circular"])
@pytest.mark.parametrize("optimize", [False, True])
def test_the_canonical_float_graph(traced: ir.Model, fft: FftForm, optimize: bool) -> None:
    result = lowered(traced, fft)
    assert_canonical(result.model)
    assert not result.refusals
    name = {"dft": "GlobalFilterDft", "circular": "GlobalFilterCircular"}[fft]
    assert [(f.name, f.h, f.w, f.c, f.form) for f in result.filters] == [
        ("stage1.filter", 8, 8, 64, fft),
        ("stage2.filter", 4, 4, 96, fft),
    ]
    counts = ops(result.model)
    assert counts[f"{name}_8x8"] == counts[f"{name}_4x4"] == 1
    assert counts["MatMul"] == counts["LayerNormalization"] == 5
    assert counts["Gelu"] == counts["Conv"] == 2
    assert counts["Add"] == 5 + 2 + 1  # biases, residuals, position embedding
    image = IMAGE.numpy()
    close(traced, run(result.model, image, optimize=optimize), run(traced, image))


def test_every_linear_layer_is_matmul_and_add_with_constants_as_they_are_read(
    traced: ir.Model,
) -> None:
    model = lowered(traced).model
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        weight = weight_of(node.inputs[1])
        assert weight.ndim == 2
        (add,) = (use.node for use in node.outputs[0].uses())
        assert add.op_type == "Add"
        assert add.inputs[0] is node.outputs[0]
        assert weight_of(add.inputs[1]).shape == weight.shape[1:]


def test_native_keeps_the_transforms(traced: ir.Model) -> None:
    result = lowered(traced, "native")
    assert ops(result.model)["DFT"] == 8
    assert [f.form for f in result.filters] == ["native", "native"]
    check_model(result.model)
    image = IMAGE.numpy()
    close(traced, run(result.model, image), run(traced, image))


def test_auto_asks_for_the_form_of_each_filter(traced: ir.Model) -> None:
    asked = []

    def choose(h: int, w: int, c: int) -> FftForm:
        asked.append((h, w, c))
        return "circular" if h < 8 else "dft"

    result = lower(traced, fft="auto", choose_form=choose, half_constants=False)
    assert asked == [(8, 8, 64), (4, 4, 96)]
    assert [f.form for f in result.filters] == ["dft", "circular"]
    assert_canonical(result.model)


def test_the_traced_model_stays_as_it_is(traced: ir.Model) -> None:
    before = ir.to_proto(traced).SerializeToString(deterministic=True)
    lowered(traced, half=True)
    assert ir.to_proto(traced).SerializeToString(deterministic=True) == before


def test_the_same_model_gives_the_same_bytes(traced: ir.Model) -> None:
    first, second = (
        ir.to_proto(lowered(traced).model).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


def test_every_stage_is_a_valid_file_that_runs(traced_int8: ir.Model, tmp_path: Path) -> None:
    stages = []

    def dump(name: str, model: ir.Model) -> None:
        stages.append(name)
        save(model, tmp_path / f"{name}.onnx")

    lower(traced_int8, fft="dft", choose_form=lambda *_: "dft", half_constants=True, on_stage=dump)
    assert stages == ["folded", "spectral", "canonical", "halved"]
    for name in stages:
        path = tmp_path / f"{name}.onnx"
        onnx.checker.check_model(path, full_check=True)
        assert run(ir.load(path), IMAGE.numpy()).shape == (1, 10)


# -- int8 ---------------------------------------------------------------------------------------


def dequantized(value: ir.Value | None) -> tuple[Array, Array, int]:
    """The integers, scale and axis behind a dequantized constant."""
    node = value.producer() if value is not None else None
    assert node is not None
    assert node.op_type == "DequantizeLinear"
    axis = node.attributes["axis"].as_int()
    return weight_of(node.inputs[0]), weight_of(node.inputs[1]), axis


def test_the_quantized_graph_keeps_the_contract(traced_int8: ir.Model) -> None:
    model = lowered(traced_int8, half=True).model
    assert_canonical(model)
    layers = 0
    for node in model.graph:
        if node.op_type not in ("MatMul", "Conv"):
            continue
        layers += 1
        x = node.inputs[0].producer()  # type: ignore[union-attr]
        assert x is not None
        assert x.op_type == "DequantizeLinear"
        assert x.inputs[0].producer().op_type == "QuantizeLinear"  # type: ignore[union-attr]
        x_scale = weight_of(x.inputs[1])
        assert x_scale.shape == ()
        values, scale, axis = dequantized(node.inputs[1])
        assert values.dtype == np.int8
        assert values.min() >= -127
        if node.op_type == "Conv":
            assert axis == 0
            bias = node.inputs[2]
        else:
            assert axis == 1
            (add,) = (use.node for use in node.outputs[0].uses())
            assert add.op_type == "Add"
            bias = add.inputs[1]
        assert scale.shape == (values.shape[axis],)
        bias_values, bias_scale, _ = dequantized(bias)
        assert bias_values.dtype == np.int32
        np.testing.assert_array_equal(bias_scale, x_scale * scale)
    assert layers == 7


def test_large_float_constants_of_the_quantized_graph_are_halved(traced_int8: ir.Model) -> None:
    model = lowered(traced_int8, half=True).model
    for value in model.graph.initializers.values():
        size = math.prod(weight_of(value).shape)
        assert value.dtype != ir.DataType.FLOAT or size < 4096
    # pos_embed only: 8*5*64 and 4*3*96 spectra are too small to matter.
    assert ops(model)["Cast"] == 1


def test_quantized_activations_keep_name_and_value(traced_int8: ir.Model) -> None:
    """Equal but for rounding ties: one that falls to the other side reaches every token through
    the second filter, and there makes a few percent of the others fall, by one step."""

    def activations(model: ir.Model) -> dict[str, npt.NDArray[np.int8]]:
        model = model.clone()
        nodes = [node for node in model.graph if node.op_type == "QuantizeLinear"]
        model.graph.outputs.extend(node.outputs[0] for node in nodes)
        values = session(model).run(None, {"image": IMAGE.numpy()})
        return {
            value.name or "": np.asarray(array)
            for value, array in zip(model.graph.outputs, values, strict=True)
            if value.name != "logits"
        }

    before, after = activations(traced_int8), activations(lowered(traced_int8).model)
    assert before.keys() == after.keys()
    assert len(before) == 7
    steps = [np.abs(before[name].astype(int) - after[name]) for name in before]
    assert max(step.max() for step in steps) <= 1
    assert np.mean(np.concatenate([step.ravel() for step in steps])) < 0.05


# -- the zoo ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "grids"),
    [
        ("gfnet_ti", {(14, 14, 256): 12}),
        ("gfnet_h_ti", {(56, 56, 64): 3, (28, 28, 128): 3, (14, 14, 256): 10, (7, 7, 512): 3}),
    ],
)
def test_the_zoos_models(name: str, grids: dict[tuple[int, int, int], int]) -> None:
    model = load_model(name)
    torch.manual_seed(0)
    image = torch.randn(1, 3, model.image_size, model.image_size)
    traced = trace(model.module, image)
    result = lowered(traced)
    assert_canonical(result.model)
    assert not result.refusals
    found = [(f.h, f.w, f.c) for f in result.filters]
    assert {grid: found.count(grid) for grid in found} == grids
    with torch.no_grad():
        expected = model.module(image).numpy()
    close(traced, run(result.model, image.numpy()), expected)
