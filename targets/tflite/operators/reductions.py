"""Means, sums and extremes along axes."""

from typing import Any

import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.targets.onnx_values import constant, input_of, shape_of
from gfcompile.targets.tflite.emitter import Emitter, lowers

_REDUCTIONS = {
    "ReduceMean": "MEAN",
    "ReduceSum": "SUM",
    "ReduceMax": "REDUCE_MAX",
    "ReduceMin": "REDUCE_MIN",
}


@lowers(*_REDUCTIONS)
def lower_reduction(emit: Emitter, node: ir.Node) -> None:
    x = input_of(node, 0)
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.size == 0:
        raise emit.refuse(node, "constant axes")
    rank = len(shape_of(x))
    quantized = node.op_type == "ReduceMean" and emit.runs_in_integers(node, x)
    source = emit.integers(x) if quantized else emit.real(x)
    result = emit.result(node, quantized=quantized)
    options: Any = schema.ReducerOptionsT()
    options.keepDims = bool(node.attributes.get_int("keepdims", 1))
    places = emit.indices(sorted(int(axis) % rank for axis in axes.reshape(-1)))
    emit.operator(_REDUCTIONS[node.op_type], [source, places], [result], options)
