"""int8 attention in the lowered graph: its form, and what ONNX Runtime makes of it."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_models import ops
from pruning_cases import DEIT, LVVIT, SWIN, build, images
from torch import fx

from gfcompile.compile.models.spec import ModelSpec
from gfcompile.compile.passes import lower
from gfcompile.compile.prune import freeze
from gfcompile.compile.trace import INPUT, OUTPUT, session, trace
from gfcompile.quantize import Calibrated, QuantScheme, calibrate

pytestmark = pytest.mark.usefixtures("one_thread")

_EACH = pytest.mark.parametrize("spec", [DEIT, LVVIT, SWIN], ids=lambda spec: spec.name)


def quantized(spec: ModelSpec) -> Calibrated:
    module = freeze(build(spec))
    batches = [images(spec, count=4)]
    return calibrate(module, batches, QuantScheme(keep_float=spec.float_layers))


def lowered(calibrated: Calibrated, example: torch.Tensor) -> ir.Model:
    return lower(
        trace(calibrated.module, example),
        fft="auto",
        choose_form=lambda *_: "dft",
        half_constants=True,
    ).model


def before(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def after(node: ir.Node) -> ir.Node:
    (reader,) = node.outputs[0].consumers()
    return reader


def scalars(node: ir.Node) -> tuple[float, int]:
    values = [ir.convenience.get_const_tensor(x) for x in node.inputs[1:] if x is not None]
    scale, zero_point = (value.numpy().item() for value in values if value is not None)
    return float(scale), int(zero_point)


@_EACH
def test_the_lowered_graph_has_the_form_that_kernels_are_matched_to(spec: ModelSpec) -> None:
    calibrated = quantized(spec)
    model = lowered(calibrated, images(spec, count=1))
    records = [layer for layer in calibrated.layers if layer.op == "attention"]
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    assert len(records) == 3 * len(softmaxes) > 0
    for number, softmax in enumerate(softmaxes):
        product = before(softmax.inputs[0])
        if product.op_type == "Add":  # the bias of a window
            product = before(product.inputs[0])
        assert product.op_type == "MatMul"
        quantize = after(softmax)
        assert quantize.op_type == "QuantizeLinear"
        assert scalars(quantize) == (1 / 256, -128)
        dequantize = after(quantize)
        assert dequantize.op_type == "DequantizeLinear"
        mixing = after(dequantize)
        assert mixing.op_type == "MatMul"
        assert mixing.inputs[0] is dequantize.outputs[0]
        transposed = before(product.inputs[1])
        assert transposed.op_type == "Transpose"
        axes = transposed.attributes.get_ints("perm")
        assert list(axes or ()) == [0, 1, 3, 2]
        found = {
            "q": before(product.inputs[0]),
            "k": before(transposed.inputs[0]),
            "v": before(mixing.inputs[1]),
        }
        for (part, pair), record in zip(
            found.items(), records[3 * number : 3 * number + 3], strict=True
        ):
            assert record.name.endswith(f".{part}")
            assert pair.op_type == "DequantizeLinear"
            inner = before(pair.inputs[0])
            assert inner.op_type == "QuantizeLinear"
            assert inner.outputs[0].dtype == ir.DataType.INT8
            wanted = record.activation_scale, record.activation_zero_point
            assert scalars(inner) == scalars(pair) == wanted
    # Nothing else was rounded: one tensor per layer with weights, four per attention.
    weighted = {layer.activation_scale for layer in calibrated.layers if layer.op != "attention"}
    assert ops(model)["QuantizeLinear"] <= len(calibrated.layers) + len(softmaxes)
    assert ops(model)["QuantizeLinear"] >= len(weighted) + 4 * len(softmaxes)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps its rounded activations by shape."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, np.ndarray] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.target == torch.ops.quantized_decomposed.quantize_per_tensor.default:
            self.seen[f"{n.args[1]}"] = result.numpy()
        return result


@_EACH
def test_onnx_runtime_computes_what_torch_computes_up_to_ties(spec: ModelSpec) -> None:
    calibrated = quantized(spec)
    example = images(spec, count=1)
    assert isinstance(calibrated.module, fx.GraphModule)
    recorder = _Recorder(calibrated.module)
    with torch.no_grad():
        logits = recorder.run(example).numpy()
    model = lowered(calibrated, example)
    # Of each scale one tensor, which is all of them but for the softmaxes' common one.
    named = {}
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear" and scalars(node)[0] != 1 / 256:
            named[str(scalars(node)[0])] = node.outputs[0]
    model.graph.outputs.extend(named.values())
    names = [OUTPUT, *(str(value.name) for value in named.values())]
    outputs = session(model).run(names, {INPUT: example.numpy()})
    different = total = 0
    for scale, theirs in zip(named, outputs[1:], strict=True):
        steps = np.abs(recorder.seen[scale].astype(np.int32) - theirs.astype(np.int32))
        different, total = different + np.count_nonzero(steps), total + steps.size
    # A value within float32's rounding of a tie may fall to either side, and is a step off then.
    assert different <= 1e-2 * total
    assert np.abs(logits - outputs[0]).max() <= 4 * calibrated.layers[-1].activation_scale
