"""Quantizes the real constants that operators on quantized values read.

Weights of products get a scale for each output channel, and their bias the integers that an
integer product adds; any other operand of an operation gets one scale.
"""

import numpy as np
import onnx_ir as ir

from gfcompile.compile.passes.graph import Array, Builder, input_of
from gfcompile.quantize.qparams import from_range, quantize, symmetric_scales
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.targets.onnx_values import constant, is_standard, scalar_quantization
from gfcompile.targets.tflite.emitter import integer_weights
from gfcompile.targets.tflite.results import MOVES

_ELEMENTWISE = ("Add", "Sub", "Mul", "Max", "Min", "Concat")


def quantize_constants(model: ir.Model) -> None:
    """Quantizes in place; `model` has scales for its activations already."""
    for node in list(model.graph):
        if is_standard(node, "Conv"):
            _quantize_product(node, axis=0)
        elif is_standard(node, "MatMul") and constant(node.inputs[1]) is not None:
            _quantize_product(node, axis=1)
        elif is_standard(node, *_ELEMENTWISE) and node.outputs[0].dtype == ir.DataType.FLOAT:
            for index, value in enumerate(node.inputs):
                array = constant(value)
                if array is not None and integer_weights(value) is None:
                    _quantize_operand(node, index, array)


def _quantize_product(node: ir.Node, *, axis: int) -> None:
    """Weights of a product, and the bias behind it."""
    scheme = QuantScheme()
    weight = constant(node.inputs[1])
    source = _dequantizer(input_of(node, 0))
    if weight is None or source is None:
        return
    build = Builder(node)
    stem = str(node.outputs[0].name)
    known = integer_weights(node.inputs[1])
    if known is None:
        scales = symmetric_scales(weight.astype(np.float32), axis, scheme.weight)
        shape = [1] * weight.ndim
        shape[axis] = -1
        integers = quantize(weight.astype(np.float32), scales.reshape(shape), 0, scheme.weight)
        node.replace_input_with(
            1, _dequantized(build, f"{stem}_weight", integers.astype(np.int8), scales, axis)
        )
    else:
        scales = known[1].scale
    scale, _ = scalar_quantization(source)
    reader = node
    if is_standard(node, "Conv"):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
    else:
        readers = node.outputs[0].consumers()
        if len(readers) != 1 or not is_standard(readers[0], "Add"):
            return
        reader = readers[0]
        bias = next((v for v in reader.inputs if constant(v) is not None), None)
    array = constant(bias)
    if array is None or integer_weights(bias) is not None or array.size != array.shape[-1]:
        return
    bias_scales = np.asarray(np.float32(scale) * scales, np.float32)
    steps = np.rint(array.reshape(-1).astype(np.float64) / bias_scales)
    limit = scheme.bias_limit
    stored = np.clip(steps, -limit, limit).astype(np.int32)
    replacement = _dequantized(Builder(reader), f"{stem}_bias", stored, bias_scales, 0)
    reader.replace_input_with(list(reader.inputs).index(bias), replacement)


def _dequantizer(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear whose values `value` holds, perhaps in other places."""
    node = value.producer()
    while node is not None and is_standard(node, *MOVES):
        node = input_of(node, 0).producer()
    return node if node is not None and is_standard(node, "DequantizeLinear") else None


def _quantize_operand(node: ir.Node, index: int, array: Array) -> None:
    scheme = QuantScheme().activation
    values = array.astype(np.float32)
    parameters = from_range(float(values.min()), float(values.max()), scheme)
    integers = quantize(values, parameters.scale, parameters.zero_point, scheme)
    stem = f"{node.outputs[0].name}_operand"
    build = Builder(node)
    operands = [
        build.constant(stem, integers.astype(np.int8)),
        build.constant(f"{stem}_scale", np.array(parameters.scale, np.float32)),
        build.constant(f"{stem}_zero_point", np.array(parameters.zero_point, np.int8)),
    ]
    node.replace_input_with(
        index, build.node("DequantizeLinear", operands, array.shape, stem=f"{stem}_real")
    )


def _dequantized(build: Builder, stem: str, integers: Array, scales: Array, axis: int) -> ir.Value:
    operands = [
        build.constant(stem, integers),
        build.constant(f"{stem}_scale", np.asarray(scales, np.float32)),
    ]
    return build.node("DequantizeLinear", operands, integers.shape, stem=f"{stem}_real", axis=axis)
