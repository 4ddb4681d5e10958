"""Which values of a graph need a scale that the graph does not give them.

TFLite's integer products write integers, while a QDQ graph leaves the results of its products in
float. And where a target takes integers alone, every value needs a scale.
"""

from collections.abc import Iterator

import onnx_ir as ir

from gfcompile.targets.onnx_values import (
    VIEWS,
    constant,
    dtype_of,
    is_standard,
    only_reader,
    scalar_quantization,
)
from gfcompile.targets.tflite.emitter import integer_weights

# Results that hold the integers of their operands, or none at all.
MOVES = VIEWS | {"Transpose", "Slice", "Split", "Expand", "Gather", "GatherElements", "TopK"}
# What integer kernels write whatever the file says: probabilities in 256 steps.
PROBABILITIES = {"Softmax": (1.0 / 256, -128), "Sigmoid": (1.0 / 256, -128)}


def results_without_scale(model: ir.Model) -> list[ir.Value]:
    """The results of products of integers, their bias included, that nothing quantizes."""
    values = []
    for node in model.graph:
        if not is_standard(node, "MatMul", "Conv") or integer_weights(node.inputs[1]) is None:
            continue
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is not None and is_standard(source, "DequantizeLinear"):
            values.append(_with_bias(node))
    return [value for value in values if not _is_quantized(value)]


def values_without_scale(model: ir.Model) -> list[ir.Value]:
    """Every real value that is computed and that nothing quantizes."""
    return [value for value in _computed(model) if not _is_quantized(value)]


def _computed(model: ir.Model) -> Iterator[ir.Value]:
    covered: set[ir.Value] = set()
    for node in model.graph:
        value = node.outputs[0]
        if value in covered or constant(value) is not None or dtype_of(value) != "float32":
            continue
        if is_standard(node, "DequantizeLinear", *MOVES):
            continue
        if is_standard(node, "MatMul") and constant(node.inputs[1]) is not None:
            value = _with_bias(node)
            covered.add(value)
        elif is_standard(node, "Sqrt") and only_reader(value, "Reciprocal") is not None:
            continue  # one operator for both
        yield value


def _with_bias(node: ir.Node) -> ir.Value:
    """The result of a product, or of the addition of its bias."""
    value = node.outputs[0]
    add = only_reader(value, "Add")
    if add is not None:
        others = [x for x in add.inputs if x is not value]
        bias = constant(others[0]) if len(others) == 1 else None
        if bias is not None and bias.size == bias.shape[-1]:
            return add.outputs[0]
    return value


def _is_quantized(value: ir.Value) -> bool:
    """Whether a QuantizeLinear alone reads the value, with a scale that its operator can write."""
    quantize = only_reader(value, "QuantizeLinear")
    if quantize is None:
        return False
    node = value.producer()
    if node is not None and is_standard(node, *PROBABILITIES):
        return scalar_quantization(quantize) == PROBABILITIES[node.op_type]
    return True
