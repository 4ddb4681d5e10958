"""Choosing by index: which tokens stay, and fetching them."""

from typing import Any

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.targets.onnx_values import constant, dtype_of, input_of, is_along_last_axis, shape_of
from gfcompile.targets.tflite.emitter import Emitter, lowers
from gfcompile.targets.tflite.model_file import Tensor


@lowers("TopK")
def lower_top_k(emit: Emitter, node: ir.Node) -> None:
    x, (values, places) = input_of(node, 0), node.outputs
    rank = len(shape_of(x))
    if not is_along_last_axis(node, rank):
        raise emit.refuse(node, "the last axis alone; transpose before and after")
    k = constant(node.inputs[1])
    if k is None:
        raise emit.refuse(node, "a constant number alone")
    count = emit.file.constant("count", np.array(int(k.reshape(-1)[0]), np.int32))
    source = emit.stored(x) if emit.integer_only else emit.real(x)
    smallest = not node.attributes.get_int("largest", 1)
    if smallest:
        source = _negated(emit, node, source, f"{values.name}/source")
    best = emit.file.tensor(
        f"{values.name}/largest" if smallest else str(values.name),
        source.dtype,
        shape_of(values),
        source.quantization,
    )
    where = emit.file.tensor(str(places.name), "int32", shape_of(places))
    emit.operator("TOPK_V2", [source, count], [best, where], schema.TopKV2OptionsT())
    emit.hold(values, _negated(emit, node, best, str(values.name)) if smallest else best)
    emit.hold(places, where)


def _negated(emit: Emitter, node: ir.Node, tensor: Tensor, name: str) -> Tensor:
    if tensor.quantization is not None:
        raise emit.refuse(node, "the largest of quantized values alone; negate them before")
    result = emit.file.tensor(name, tensor.dtype, tensor.shape)
    emit.operator("NEG", [tensor], [result], schema.NegOptionsT())
    return result


@lowers("Gather")
def lower_gather(emit: Emitter, node: ir.Node) -> None:
    x, places, y = input_of(node, 0), input_of(node, 1), node.outputs[0]
    axis = node.attributes.get_int("axis", 0) % len(shape_of(x))
    source = emit.stored(x)
    index: Any = constant(places)
    if index is not None:
        # TFLite does not count from the end.
        size = source.shape[axis]
        wrapped = np.where(index < 0, index + size, index).astype(np.int32)
        first = int(wrapped.flat[0])
        if np.array_equal(wrapped.flat, np.arange(first, first + wrapped.size)):
            # Neighbours are a slice, which XNNPACK takes.
            begin, part = [0] * len(source.shape), list(source.shape)
            begin[axis], part[axis] = first, wrapped.size
            taken = emit.slice(source, begin, part, f"{y.name}/part")
            emit.hold(y, emit.reshape(taken, shape_of(y), str(y.name)))
            return
        where = emit.file.constant("places", wrapped)
    else:
        where = emit.stored(places)
    result = emit.file.tensor(str(y.name), source.dtype, shape_of(y), source.quantization)
    options = schema.GatherOptionsT()
    options.axis = axis
    emit.operator("GATHER", [source, where], [result], options)
    emit.hold(y, result)


@lowers("GatherElements")
def lower_gather_elements(emit: Emitter, node: ir.Node) -> None:
    """Whole rows by index, (B, N, ...) and (B, K, ...) -> (B, K, ...), as pruning has it.

    The index must be the same along every axis after the one that is gathered: an Expand of
    (B, K, 1).
    """
    x, places, y = input_of(node, 0), input_of(node, 1), node.outputs[0]
    shape, rank = shape_of(x), len(shape_of(x))
    axis = node.attributes.get_int("axis", 0) % rank
    expand = places.producer()
    rows = shape_of(places)
    if any(n != 1 for n in rows[axis + 1 :]):
        if expand is None or expand.op_type != "Expand":
            raise emit.refuse(node, "whole rows alone: the index must be an Expand of (B, K, 1)")
        places = input_of(expand, 0)
        if any(n != 1 for n in shape_of(places)[axis + 1 :]):
            raise emit.refuse(node, "whole rows alone: the index must be an Expand of (B, K, 1)")
    if rows[:axis] != shape[:axis] or rows[axis + 1 :] != shape[axis + 1 :]:
        raise emit.refuse(node, "as many rows as the data has, of the same length")
    index = emit.reshape(emit.stored(places), shape_of(places)[: axis + 1], f"{places.name}/rows")
    source = emit.stored(x)
    result = emit.file.tensor(str(y.name), source.dtype, shape_of(y), source.quantization)
    options = schema.GatherOptionsT()
    options.axis = options.batchDims = axis
    emit.operator("GATHER", [source, index], [result], options)
    emit.hold(y, result)


@lowers("ArgMax")
def lower_arg_max(emit: Emitter, node: ir.Node) -> None:
    x, y = input_of(node, 0), node.outputs[0]
    rank = len(shape_of(x))
    axis = node.attributes.get_int("axis", 0) % rank
    if dtype_of(y) != "int64":
        raise emit.refuse(node, "indices of int64")
    kept = shape_of(y)
    shape = tuple(n for place, n in enumerate(shape_of(x)) if place != axis)
    flat = emit.file.tensor(f"{y.name}/flat", "int32", shape)
    options = schema.ArgMaxOptionsT()
    options.outputType = schema.TensorType.INT32
    place = emit.file.constant("axis", np.array(axis, np.int32))
    emit.operator("ARG_MAX", [emit.real(x), place], [flat], options)
    emit.hold(y, emit.reshape(flat, kept, str(y.name)))
