"""Puts the constant operand of a commutative node second.

Add(b, x) -> Add(x, b)        Mul(gamma, x) -> Mul(x, gamma)
"""

import onnx_ir as ir

from gfcompile.compile.passes.graph import input_of, is_constant

_COMMUTATIVE = frozenset(("Add", "Mul"))


def order_operands(model: ir.Model) -> bool:
    """Orders the operands of every Add and Mul of `model`; whether one was out of order."""
    modified = False
    for node in model.graph:
        if node.op_type not in _COMMUTATIVE or node.domain != "":
            continue
        first, second = input_of(node, 0), input_of(node, 1)
        if is_constant(first) and not is_constant(second):
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
            modified = True
    return modified
