"""Puts the constant operand of a commutative node second.

Add(b, x) -> Add(x, b)        Mul(gamma, x) -> Mul(x, gamma)
"""

import onnx_ir as ir

from gfcompile.compile.passes.graph import constant, input_of

_COMMUTATIVE = frozenset(("Add", "Mul"))


def order_operands(model: ir.Model) -> bool:
    """Orders the operands of every Add and Mul of `model`; whether one was out of order."""
    modified = False
    for node in model.graph:
        if node.op_type not in _COMMUTATIVE or node.domain != "":
            continue
        first, second = input_of(node, 0), input_of(node, 1)
        if _is_constant(first) and not _is_constant(second):
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
            modified = True
    return modified


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None and node.op_type == "DequantizeLinear":
        return constant(node.inputs[0]) is not None
    return constant(value) is not None
