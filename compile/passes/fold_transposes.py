"""Turns a weight the way its product reads it, once, here: also when it is quantized.

    Transpose(DequantizeLinear(w, scale, zp, axis=0), perm=(1, 0))
      ->  DequantizeLinear(w', scale, zp, axis=1)        w' = w transposed, still int8

Likewise for Reshape, Squeeze, Unsqueeze and Flatten that leave the quantized axis whole. (For
constants that are not quantized `fold_constants` does it.)
"""

import math
from typing import Any

import onnx_ir as ir

from gfcompile.compile.passes.graph import (
    RESHAPING,
    Array,
    Builder,
    attribute,
    constant,
    replace,
    shape_of,
)


def fold_transposes(model: ir.Model) -> bool:
    """Moves transposes and reshapes of dequantized constants of `model` into the constants."""
    modified = False
    for node in list(model.graph):
        if node.op_type not in RESHAPING | {"Transpose"} or node.inputs[0] is None:
            continue
        source = node.inputs[0].producer()
        if source is None or source.op_type != "DequantizeLinear":
            continue
        weight = constant(source.inputs[0])
        scale = constant(source.inputs[1])
        if weight is None or scale is None or attribute(source, "block_size", 0):
            continue
        axis = attribute(source, "axis", 1) % max(weight.ndim, 1) if scale.ndim else None
        moved = _moved(node, weight, axis)
        if moved is None:
            continue
        _rewrite(node, source, *moved)
        modified = True
    return modified


def _moved(node: ir.Node, weight: Array, axis: int | None) -> tuple[Array, int | None] | None:
    """`weight` as `node` turns it, and where the quantized axis goes; None if it is torn."""
    if node.op_type == "Transpose":
        perm = attribute(node, "perm", tuple(reversed(range(weight.ndim))))
        return weight.transpose(perm), None if axis is None else list(perm).index(axis)
    shape = shape_of(node.outputs[0])
    if axis is None:
        return weight.reshape(shape), None
    before = math.prod(weight.shape[:axis])
    for place, size in enumerate(shape):
        if size == weight.shape[axis] and math.prod(shape[:place]) == before:
            return weight.reshape(shape), place
    return None


def _rewrite(node: ir.Node, source: ir.Node, weight: Array, axis: int | None) -> None:
    build, y = Builder(node), node.outputs[0]
    old = source.inputs[0]
    assert old is not None
    folded = build.constant(f"{old.name}_t", weight)
    settings: dict[str, Any] = {} if axis is None else {"axis": axis}
    result = build.node(
        "DequantizeLinear",
        [folded, *source.inputs[1:]],
        weight.shape,
        stem=f"{y.name}_dq",
        dtype=y.dtype or ir.DataType.FLOAT,
        **settings,
    )
    replace(y, result)
