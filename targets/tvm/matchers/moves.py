"""What nodes that only move elements make of an array of indices: where each element comes from."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from gfcompile.targets.onnx_values import constant
from gfcompile.targets.tvm.kernel import Array
from gfcompile.targets.tvm.subgraph import model_of


def evaluate(
    nodes: Sequence[ir.Node], given: ir.Value, array: Array, result: ir.Value | None = None
) -> Array:
    """What `nodes` make of `array` in place of `given`, all else being constant.

    Args:
        result: the value asked for; the first of the last node if None.
    """
    if not nodes:
        return array
    result = result or nodes[-1].outputs[0]
    constants = {
        str(value.name): np.asarray(known)
        for node in nodes
        for value in node.inputs
        if value is not None and value is not given and (known := constant(value)) is not None
    }
    element = onnx.TensorProto.INT64
    model = model_of(
        [ir.to_proto(node) for node in nodes],
        [onnx.helper.make_tensor_value_info(str(given.name), element, array.shape)],
        [onnx.helper.make_tensor_value_info(str(result.name), element, None)],
        constants,
        nodes[0].graph,
    )
    (made,) = ReferenceEvaluator(model).run(None, {str(given.name): array.astype(np.int64)})
    return np.asarray(made)
