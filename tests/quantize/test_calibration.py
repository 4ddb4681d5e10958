import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import fx, nn

from gfcompile.quantize import Calibrated, QuantScheme, calibrate
from gfcompile.runtime.errors import CompileError, UserError
from gfcompile.runtime.exactness import sqnr_db

Images = Callable[..., torch.Tensor]
Ops = torch.ops.quantized_decomposed


def run(module: nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return module(x).numpy()


def to_onnx(calibrated: Calibrated, example: torch.Tensor) -> onnx.ModelProto:
    program = torch.onnx.export(
        torch.export.export(calibrated.module, (example,)),
        dynamo=True,
        opset_version=20,
        input_names=["image"],
        output_names=["logits"],
        verbose=False,
    )
    return program.model_proto


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options)


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every quantized activation."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: list[np.ndarray] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target == Ops.quantize_per_tensor.default:
            self.seen.append(result.numpy())
        return result


class Quantized:
    """A layer as it stands in the ONNX graph: what feeds its three inputs."""

    def __init__(self, model: onnx.ModelProto, node: onnx.NodeProto, bias: str) -> None:
        self.constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
        self.producers = {o: n for n in model.graph.node for o in n.output}
        self.activation = self.producers[node.input[0]]
        self.weight = self.producers[node.input[1]]
        if self.weight.op_type == "Transpose":
            self.weight = self.producers[self.weight.input[0]]
        self.bias = self.producers[bias]

    def integers(self, dequantize: onnx.NodeProto) -> tuple[np.ndarray, ...]:
        return tuple(self.constants[name] for name in dequantize.input)


def onnx_layers(model: onnx.ModelProto) -> list[Quantized]:
    layers = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            layers.append(Quantized(model, node, node.input[2]))
        elif node.op_type == "MatMul":
            (add,) = [n for n in model.graph.node if node.output[0] in n.input]
            (bias,) = [name for name in add.input if name != node.output[0]]
            layers.append(Quantized(model, node, bias))
    return layers


@pytest.fixture
def calibrated(mini_gfnet: nn.Module, images: Images) -> Calibrated:
    return calibrate(mini_gfnet, [images(8)])


def test_quantization_noise_is_that_of_eight_bits(
    mini_gfnet: nn.Module, calibrated: Calibrated, images: Images
) -> None:
    x = images(1, seed=7)
    # Each layer adds noise at about -40 dB; seven of them, uncorrelated, make -31 dB.
    assert sqnr_db(run(mini_gfnet, x), run(calibrated.module, x)) > 28


def test_every_layer_is_reported(calibrated: Calibrated, mini_layers: tuple[str, ...]) -> None:
    assert tuple(layer.name for layer in calibrated.layers) == mini_layers
    assert calibrated.images == 8
    assert calibrated.kept_float == ()
    for layer in calibrated.layers:
        assert layer.activation_low < layer.activation_high
        assert 0 <= layer.clipped_fraction < 0.01
        assert layer.activation_sqnr_db > 35
        assert layer.weight_sqnr_db > 40


def test_the_spectral_path_norms_and_residuals_stay_in_float(calibrated: Calibrated) -> None:
    graph = calibrated.module.graph
    layers = {torch.ops.aten.linear.default, torch.ops.aten.conv2d.default}
    dequantized = [n for n in graph.nodes if "dequantize" in str(n.target)]
    assert len(dequantized) == 3 * len(calibrated.layers)
    for node in dequantized:
        assert {user.target for user in node.users} <= layers
    for node in graph.nodes:
        if "fft" in str(node.target):
            assert not any("quantize" in str(source.target) for source in node.all_input_nodes)


def test_a_tensor_that_feeds_a_layer_and_the_filter_reaches_the_filter_in_float() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spectrum = torch.fft.irfft2(0.5 * torch.fft.rfft2(x), s=(6, 8))
            return self.one(x) + self.other(x) + spectrum

    torch.manual_seed(0)
    result = calibrate(Both().eval(), [torch.randn(3, 6, 8)])
    quantizers = [
        n for n in result.module.graph.nodes if n.target == Ops.quantize_per_tensor.default
    ]
    assert len(quantizers) == 1  # the two layers share one
    (transform,) = [n for n in result.module.graph.nodes if "rfft2" in str(n.target)][:1]
    assert transform.args[0] is quantizers[0].args[0]


def test_the_exported_graph_is_the_qdq_contract(calibrated: Calibrated, images: Images) -> None:
    model = to_onnx(calibrated, images(1))
    layers = onnx_layers(model)
    assert len(layers) == len(calibrated.layers)
    for layer, record in zip(layers, calibrated.layers, strict=True):
        assert layer.activation.op_type == "DequantizeLinear"
        quantizer = layer.producers[layer.activation.input[0]]
        assert quantizer.op_type == "QuantizeLinear"
        scale, zero_point = (layer.constants[name] for name in quantizer.input[1:])
        assert (scale.dtype, scale.shape) == (np.float32, ())
        assert (zero_point.dtype, zero_point.shape) == (np.int8, ())
        assert (float(scale), int(zero_point)) == (
            record.activation_scale,
            record.activation_zero_point,
        )
        weight, weight_scale, weight_zero = layer.integers(layer.weight)
        channels = weight.shape[0]
        assert (weight.dtype, weight_scale.dtype) == (np.int8, np.float32)
        assert weight_scale.shape == (channels,)
        assert weight.min() >= -127
        assert not weight_zero.any()
        bias, bias_scale, bias_zero = layer.integers(layer.bias)
        assert (bias.dtype, bias.shape) == (np.int32, (channels,))
        assert np.array_equal(bias_scale, scale * weight_scale)  # bit for bit
        assert not bias_zero.any()
        for node in (layer.weight, layer.bias):
            assert [a.i for a in node.attribute if a.name == "axis"] == [0]


def test_weights_and_biases_are_the_float_ones_to_half_a_step(
    mini_gfnet: nn.Module, calibrated: Calibrated, images: Images
) -> None:
    layers = onnx_layers(to_onnx(calibrated, images(1)))
    for layer, record in zip(layers, calibrated.layers, strict=True):
        source = mini_gfnet.get_submodule(record.name)
        for wanted, node in ((source.weight, layer.weight), (source.bias, layer.bias)):
            integers, scale, _ = layer.integers(node)
            steps = scale.reshape(-1, *[1] * (integers.ndim - 1)).astype(np.float64)
            error = np.abs(integers * steps - wanted.detach().numpy())
            # float32 holds the quotient to 2^-24 of itself; a bias may be 2^20 steps.
            assert (error <= steps * (0.5 + 1e-4) + 2.0**-22 * np.abs(integers * steps)).all()


def test_onnx_runtime_computes_what_torch_computes_up_to_ties(
    calibrated: Calibrated, images: Images
) -> None:
    x = images(1, seed=5)
    recorder = Recorder(calibrated.module)
    with torch.no_grad():
        logits = recorder.run(x).numpy()
    model = to_onnx(calibrated, x)
    quantized = [n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    for name in quantized:
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT8, None)
        )
    outputs = session(model).run(None, {"image": x.numpy()})
    different = total = 0
    for ours, theirs in zip(recorder.seen, outputs[1:], strict=True):
        steps = np.abs(ours.astype(np.int32) - theirs.astype(np.int32))
        assert steps.max() <= 1
        different, total = different + np.count_nonzero(steps), total + steps.size
    # torch multiplies by the inverse scale, ONNX Runtime divides, and their transforms round
    # differently: 1e-6 of a value of up to 128 steps decides one tie in several thousand.
    assert different <= 1e-2 * total
    assert np.abs(logits - outputs[0]).max() <= 2 * calibrated.layers[-1].activation_scale


def test_the_same_images_give_the_same_bits_in_any_order_batching_and_thread_count(
    mini_gfnet: nn.Module, images: Images
) -> None:
    pictures = images(6)
    one = calibrate(mini_gfnet, [pictures])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        other = calibrate(mini_gfnet, [pictures[3:], pictures[1:3], pictures[:1]])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert one.layers == other.layers
    state = other.module.state_dict()
    for name, tensor in one.module.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_the_float_module_is_left_as_it_was(mini_gfnet: nn.Module, images: Images) -> None:
    x = images(1)
    before = run(mini_gfnet, x)
    state = {name: tensor.clone() for name, tensor in mini_gfnet.state_dict().items()}
    calibrate(mini_gfnet, [images(2)])
    assert np.array_equal(run(mini_gfnet, x), before)
    for name, tensor in mini_gfnet.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_the_module_is_in_eval_mode_and_stays_usable(calibrated: Calibrated) -> None:
    assert not any(m.training for m in calibrated.module.modules())
    calibrated.module.eval()


@pytest.mark.parametrize("count", [2, 5])
def test_the_batch_size_is_fixed_as_asked_for_whatever_the_number_of_images(
    mini_gfnet: nn.Module, images: Images, count: int
) -> None:
    result = calibrate(mini_gfnet, [images(count)], batch_size=3)
    assert run(result.module, images(3)).shape == (3, 10)
    assert result.images == count


def test_layers_kept_in_float_are_float_in_the_graph(mini_gfnet: nn.Module, images: Images) -> None:
    result = calibrate(mini_gfnet, [images(2)], QuantScheme(keep_float=("head", "first.*")))
    assert [layer.name for layer in result.layers] == ["patch", "down", "second.fc1", "second.fc2"]
    assert {layer.name for layer in result.kept_float} == {"head", "first.fc1", "first.fc2"}
    weights = [p for p in result.module.state_dict().values() if p.dtype == torch.int8]
    assert len(weights) == 4


def test_min_max_calibration_clips_nothing(mini_gfnet: nn.Module, images: Images) -> None:
    result = calibrate(mini_gfnet, [images(4)], QuantScheme(activation_range="minmax"))
    assert all(layer.clipped_fraction == 0 for layer in result.layers)
    for layer in result.layers:
        span = layer.activation_high - min(layer.activation_low, 0)
        assert layer.activation_scale == pytest.approx(span / 255, rel=1e-6)


def test_layers_without_bias_and_layers_that_share_a_weight_work() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.free = nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.tanh(self.fc(x))) + self.free(x)

    torch.manual_seed(0)
    module = Shared().eval()
    x = torch.randn(16, 5, 8)
    result = calibrate(module, [x])
    assert [layer.name for layer in result.layers] == ["fc", "fc", "free"]
    assert sqnr_db(run(module, x[:1]), run(result.module, x[:1])) > 30


def test_a_bias_that_dwarfs_its_weights_is_not_saturated() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([[1.0] * 4, [0.0] * 4, [1e-9] * 4]))
        module[1].bias.copy_(torch.tensor([0.1, 5.0, -5.0]))
    x = torch.rand(8, 1, 2, 2)
    result = calibrate(module, [x])
    assert run(result.module, x[:1])[0, 1:] == pytest.approx([5.0, -5.0], rel=1e-6)


@pytest.mark.parametrize(
    ("parameter", "complaint"),
    [
        ("first.norm2.weight", "NaN or infinity at the input of first.fc1"),
        ("first.filter.weight", "NaN or infinity at the input of first.fc1"),
        ("head.weight", "the weight of head"),
        ("head.bias", "the bias of head"),
    ],
)
def test_nan_is_reported_by_the_name_of_the_layer(
    mini_gfnet: nn.Module, images: Images, parameter: str, complaint: str
) -> None:
    with torch.no_grad():
        mini_gfnet.get_parameter(parameter).view(-1)[0] = float("nan")
    with pytest.raises(CompileError, match=complaint):
        calibrate(mini_gfnet, [images(1)])


def test_a_dead_layer_is_reported_by_name(mini_gfnet: nn.Module, images: Images) -> None:
    with torch.no_grad():
        mini_gfnet.get_parameter("norm.weight").zero_()
        mini_gfnet.get_parameter("norm.bias").zero_()
    with pytest.raises(CompileError, match="only zeros at the input of head"):
        calibrate(mini_gfnet, [images(1)])
    calibrate(mini_gfnet, [images(1)], QuantScheme(keep_float=("head",)))


def test_what_cannot_be_calibrated_is_said(mini_gfnet: nn.Module, images: Images) -> None:
    with pytest.raises(UserError, match="at least one image"):
        calibrate(mini_gfnet, [])
    with pytest.raises(CompileError, match="no layer"):
        calibrate(nn.GELU().eval(), [images(1)])
    with pytest.raises(UserError, match="one shape"):
        calibrate(mini_gfnet, [images(1), images(1)[..., :8]])
    with pytest.raises(CompileError, match=r"torch\.export cannot follow MiniGfnet: .*"):
        calibrate(mini_gfnet, [images(1)[..., :8]])
    with pytest.raises(UserError, match="eval mode"):
        calibrate(mini_gfnet.train(), [images(1)])


def test_nothing_is_printed_not_even_when_the_export_fails() -> None:
    program = """
import torch
from gfcompile.quantize import calibrate
from gfcompile.runtime.errors import CompileError
linear = torch.nn.Linear(4, 4).eval()
calibrate(linear, [torch.rand(2, 4)])
try:
    calibrate(linear, [torch.rand(2, 5)])
except CompileError:
    raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"", b"")
