"""Which values of a QDQ graph need a scale that the graph does not give them.

TFLite's integer products write integers, while a QDQ graph leaves the results of its products in
float. So the result of every integer product is to be quantized as well.
"""

import onnx_ir as ir

from gfcompile.targets.onnx_values import constant, is_standard
from gfcompile.targets.tflite.emitter import integer_weights


def results_without_scale(model: ir.Model) -> list[ir.Value]:
    """The results of products of integers, their bias included, that nothing quantizes."""
    values = []
    for node in model.graph:
        if not is_standard(node, "MatMul", "Conv") or integer_weights(node.inputs[1]) is None:
            continue
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is None or not is_standard(source, "DequantizeLinear"):
            continue
        value = node.outputs[0]
        readers = value.consumers()
        if len(readers) == 1 and is_standard(readers[0], "Add") and not value.is_graph_output():
            others = [x for x in readers[0].inputs if x is not value]
            bias = constant(others[0]) if len(others) == 1 else None
            if bias is not None and bias.size == bias.shape[-1]:
                value = readers[0].outputs[0]
        readers = value.consumers()
        if not (len(readers) == 1 and is_standard(readers[0], "QuantizeLinear")):
            values.append(value)
    return values
