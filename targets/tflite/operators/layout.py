"""What moves numbers about and does not change them: integers stay integers, of the same scale."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.targets.onnx_values import VIEWS, constant, dtype_of, input_of, shape_of
from gfcompile.targets.tflite.emitter import (
    Emitter,
    channels_last,
    lowers,
    to_channels_first,
    to_channels_last,
)
from gfcompile.targets.tflite.model_file import Tensor


@lowers(*sorted(VIEWS))
def lower_view(emit: Emitter, node: ir.Node) -> None:
    x, y = input_of(node, 0), node.outputs[0]
    old, shape = shape_of(x), shape_of(y)
    if emit.is_image(x) and len(shape) > 2 and old[:2] == shape[:2]:
        # Rows and columns become one axis, or the other way round: channels can stay last.
        image = emit.reshape(emit.image(x), channels_last(shape), str(y.name))
        emit.hold(y, image, as_image=True)
        return
    emit.hold(y, emit.reshape(emit.stored(x), shape, str(y.name)))


@lowers("Transpose")
def lower_transpose(emit: Emitter, node: ir.Node) -> None:
    x, y = input_of(node, 0), node.outputs[0]
    perm = tuple(node.attributes.get_ints("perm", tuple(reversed(range(len(shape_of(x)))))))
    if perm == to_channels_last(len(perm)) and emit.is_image(x):
        emit.hold(y, emit.image(x))  # the same numbers in the same places
    elif perm == to_channels_first(len(perm)) and len(perm) == 4:
        emit.hold(y, emit.stored(x), as_image=True)
    else:
        emit.hold(y, emit.transpose(emit.stored(x), perm, str(y.name)))


@lowers("Slice")
def lower_slice(emit: Emitter, node: ir.Node) -> None:
    x, y = input_of(node, 0), node.outputs[0]
    starts, ends, axes, steps = (_integers(emit, node, index) for index in (1, 2, 3, 4))
    assert starts is not None
    assert ends is not None
    axes = list(range(len(starts))) if axes is None else axes
    if steps is not None and any(step != 1 for step in steps):
        raise emit.refuse(node, f"steps {steps}; 1 alone")
    shape = shape_of(x)
    begin = [0] * len(shape)
    for axis, start in zip(axes, starts, strict=True):
        size = shape[axis]
        begin[axis] = min(max(start + size if start < 0 else start, 0), size)
    if emit.is_image(x):
        part = emit.slice(
            emit.image(x), channels_last(begin), channels_last(shape_of(y)), str(y.name)
        )
        emit.hold(y, part, as_image=True)
    else:
        emit.hold(y, emit.slice(emit.stored(x), begin, shape_of(y), str(y.name)))


@lowers("Split")
def lower_split(emit: Emitter, node: ir.Node) -> None:
    x = input_of(node, 0)
    rank = len(shape_of(x))
    axis = node.attributes.get_int("axis", 0) % rank
    source = emit.stored(x)
    shapes = [shape_of(y) for y in node.outputs]
    if len(set(shapes)) == 1:
        parts = [
            emit.file.tensor(str(y.name), source.dtype, shape, source.quantization)
            for y, shape in zip(node.outputs, shapes, strict=True)
        ]
        options = schema.SplitOptionsT()
        options.numSplits = len(parts)
        place = emit.file.constant("axis", np.array(axis, np.int32))
        emit.operator("SPLIT", [place, source], parts, options)
    else:
        parts, begin = [], [0] * rank
        for y, shape in zip(node.outputs, shapes, strict=True):
            parts.append(emit.slice(source, begin, shape, str(y.name)))
            begin[axis] += shape[axis]
    for y, part in zip(node.outputs, parts, strict=True):
        emit.hold(y, part)


@lowers("Concat")
def lower_concat(emit: Emitter, node: ir.Node) -> None:
    y = node.outputs[0]
    rank = len(shape_of(y))
    axis = node.attributes.get_int("axis") % rank
    if all(map(emit.is_image, node.inputs)):
        images = _of_one_kind(emit, [emit.image(value) for value in node.inputs])
        axis = to_channels_last(rank).index(axis)
        emit.hold(y, emit.concatenate(images, axis, str(y.name)), as_image=True)
        return
    integers = dtype_of(y) == "float32" and all(map(emit.is_quantized, node.inputs))
    tensors = [emit.integers(v) if integers else emit.stored(v) for v in node.inputs]
    emit.hold(y, emit.concatenate(_of_one_kind(emit, tensors), axis, str(y.name)))


@lowers("Expand")
def lower_expand(emit: Emitter, node: ir.Node) -> None:
    x, y = input_of(node, 0), node.outputs[0]
    source, shape = emit.stored(x), shape_of(y)
    if source.shape == shape:
        emit.hold(y, source)
        return
    result = emit.file.tensor(str(y.name), source.dtype, shape, source.quantization)
    emit.operator(
        "BROADCAST_TO", [source, emit.indices(shape)], [result], schema.BroadcastToOptionsT()
    )
    emit.hold(y, result)


def _of_one_kind(emit: Emitter, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors as they are if they are integers of one scale, or else all real."""
    first = tensors[0].quantization
    if first is not None and all(first.equals(tensor.quantization) for tensor in tensors):
        return tensors
    return [emit.dequantized(tensor) for tensor in tensors]


def _integers(emit: Emitter, node: ir.Node, index: int) -> list[int] | None:
    """Constant input `index` as integers; None if it is left out."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return None
    array: Any = constant(node.inputs[index])
    if array is None:
        raise emit.refuse(node, "places that are known only when it runs; Gather takes those")
    return [int(value) for value in array.reshape(-1)]
