"""GELU, the logistic function and their kin."""

from typing import Any

import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.targets.onnx_values import (
    input_of,
    is_along_last_axis,
    scalar_quantization,
    shape_of,
)
from gfcompile.targets.tflite.emitter import Emitter, lowers
from gfcompile.targets.tflite.results import PROBABILITIES


@lowers("Gelu")
def lower_gelu(emit: Emitter, node: ir.Node) -> None:
    options = schema.GeluOptionsT()
    options.approximate = node.attributes.get_string("approximate", "none") == "tanh"
    if emit.integer_only:
        _unary(emit, node, "GELU", options)
    else:
        # XNNPACK takes it in floating point alone, and is faster so than the table of integers
        # that runs outside of it: 8.5 against 9.1 ms for gfnet_xs.
        emit.operator("GELU", [emit.real(node.inputs[0])], [emit.result(node)], options)


@lowers("Relu")
def lower_relu(emit: Emitter, node: ir.Node) -> None:
    _unary(emit, node, "RELU", None)


@lowers("Tanh")
def lower_tanh(emit: Emitter, node: ir.Node) -> None:
    emit.operator("TANH", [emit.real(node.inputs[0])], [emit.result(node)])


@lowers("Sigmoid")
def lower_sigmoid(emit: Emitter, node: ir.Node) -> None:
    _unary(emit, node, "LOGISTIC", None, fixed=PROBABILITIES["Sigmoid"])


@lowers("Softmax")
def lower_softmax(emit: Emitter, node: ir.Node) -> None:
    options = schema.SoftmaxOptionsT()
    options.beta = 1.0
    _require_last_axis(emit, node)
    _unary(emit, node, "SOFTMAX", options, fixed=PROBABILITIES["Softmax"])


@lowers("LogSoftmax")
def lower_log_softmax(emit: Emitter, node: ir.Node) -> None:
    _require_last_axis(emit, node)
    operands = [emit.real(node.inputs[0])]
    emit.operator("LOG_SOFTMAX", operands, [emit.result(node)], schema.LogSoftmaxOptionsT())


def _unary(
    emit: Emitter,
    node: ir.Node,
    name: str,
    options: Any,
    *,
    fixed: tuple[float, int] | None = None,
) -> None:
    """An activation; in integers where the graph has them (and the scale is the `fixed` one)."""
    x = input_of(node, 0)
    quantized = emit.runs_in_integers(node)
    if quantized and fixed is not None:
        quantize = emit.quantizer_of(node.outputs[0])
        assert quantize is not None
        quantized = scalar_quantization(quantize) == fixed
    as_image = emit.is_image(x)
    source = emit.image(x) if as_image else emit.stored(x)
    if not quantized:
        source = emit.dequantized(source)
    result = emit.result(node, quantized=quantized, as_image=as_image)
    emit.operator(name, [source], [result], options)


def _require_last_axis(emit: Emitter, node: ir.Node) -> None:
    rank = len(shape_of(node.outputs[0]))
    if not is_along_last_axis(node, rank):
        raise emit.refuse(node, "the last axis alone; transpose before and after")
