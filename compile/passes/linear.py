"""Which nodes are linear in the signal that flows through them, and what they compute.

A global filter can be written in many ways. They have in common that every node between the real
input and the real output is linear: so the chain is proven linear node by node, and then known
completely by what it does to an impulse.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from gfcompile.compile.passes.dft import dft_tensor
from gfcompile.compile.passes.graph import Array, attribute, constant, input_of

Signal = npt.NDArray[np.float64]

# Linear in their first input, the others being constants.
_SHAPING = frozenset(
    ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Expand")
)
_IN_FIRST = _SHAPING | {"DFT", "Div", "Neg", "Gather", "Pad", "Split", "ReduceSum"}
# Linear in either input, the other being a constant.
_IN_EITHER = frozenset(("Mul", "MatMul"))
# Linear in all inputs together; a constant among them must be zero.
_IN_ALL = frozenset(("Add", "Sub", "Sum", "Concat"))


class NotLinearError(Exception):
    """Says which node is not linear, and why."""


def may_be_linear(node: ir.Node) -> bool:
    """Whether there is a linear use of this kind of node."""
    return node.domain == "" and node.op_type in _IN_FIRST | _IN_EITHER | _IN_ALL


def signal_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs through which the signal flows, of a node that is linear in them.

    Raises:
        NotLinearError: the node is not linear in its varying inputs.
    """
    varying = [
        (index, value)
        for index, value in enumerate(node.inputs)
        if value is not None and constant(value) is None
    ]
    if not may_be_linear(node):
        raise NotLinearError(f"{_label(node)} is not linear")
    if node.op_type in _IN_FIRST and [index for index, _ in varying] != [0]:
        raise NotLinearError(f"{_label(node)} depends on the input in more than its first operand")
    if node.op_type in _IN_EITHER and len(varying) != 1:
        raise NotLinearError(f"{_label(node)} multiplies two values that both depend on the input")
    if node.op_type in _IN_ALL:
        constants = [array for value in node.inputs if (array := constant(value)) is not None]
        if any(array.any() for array in constants):
            raise NotLinearError(f"{_label(node)} adds a constant")
    if node.op_type == "Pad" and not _pads_with_zeros(node):
        raise NotLinearError(f"{_label(node)} does not pad with zeros")
    return [value for _, value in varying]


def evaluate(
    nodes: Sequence[ir.Node], source: ir.Value, signal: Signal, result: ir.Value
) -> Signal:
    """What `result` is when `source` is `signal`, in float64, by way of `nodes` in order."""
    known: dict[ir.Value, Array] = {source: signal}
    for node in nodes:
        outputs = _evaluate_node(node, known)
        known.update(zip(node.outputs, outputs, strict=True))
    return known[result]


def _evaluate_node(node: ir.Node, known: Mapping[ir.Value, Array]) -> Sequence[Array]:
    inputs: list[Array | None] = []
    for value in node.inputs:
        array = known.get(value) if value is not None else None
        if array is None:
            array = constant(value)
        if array is not None and array.dtype == np.float32:
            array = array.astype(np.float64)
        inputs.append(array)
    if node.op_type == "DFT":
        return [_dft(node, inputs)]
    proto = onnx.NodeProto()
    proto.CopyFrom(ir.to_proto(node))
    feeds = {
        name: array for name, array in zip(proto.input, inputs, strict=True) if array is not None
    }
    return list(ReferenceEvaluator(proto).run(None, feeds))


def _dft(node: ir.Node, inputs: Sequence[Array | None]) -> Signal:
    x = inputs[0]
    assert x is not None
    axis, length, inverse, onesided = dft_settings(node)
    tensor = dft_tensor(x.shape[axis], x.shape[-1], length, inverse=inverse, onesided=onesided)
    x = np.moveaxis(x, axis, -2)
    y = np.tensordot(x, tensor, axes=2)
    return np.moveaxis(y, -2, axis)


def dft_settings(node: ir.Node) -> tuple[int, int, bool, bool]:
    """(axis, length of the transform, inverse, onesided) of a DFT node; axis is not negative."""
    x = input_of(node, 0)
    assert x.shape is not None
    rank = len(x.shape)
    length = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axis_input = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    axis = (-2 if axis_input is None else int(axis_input.item())) % rank
    inverse = bool(attribute(node, "inverse", 0))
    onesided = bool(attribute(node, "onesided", 0))
    if length is not None:
        return axis, int(length.item()), inverse, onesided
    size = x.shape[axis]
    assert isinstance(size, int)
    return axis, 2 * (size - 1) if inverse and onesided else size, inverse, onesided


def _pads_with_zeros(node: ir.Node) -> bool:
    fill = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    mode: Any = attribute(node, "mode", "constant")
    return mode == "constant" and (fill is None or not fill.any())


def _label(node: ir.Node) -> str:
    return f"{node.op_type} ({node.outputs[0].name})"
