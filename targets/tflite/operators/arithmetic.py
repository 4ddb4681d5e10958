"""Element by element: sums, products, and what is written with them."""

from typing import Any

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.targets.onnx_values import dtype_of, input_of, only_reader
from gfcompile.targets.tflite.emitter import Emitter, lowers

_BINARY: dict[str, tuple[str, Any]] = {
    "Add": ("ADD", schema.AddOptionsT),
    "Sub": ("SUB", schema.SubOptionsT),
    "Mul": ("MUL", schema.MulOptionsT),
    "Div": ("DIV", schema.DivOptionsT),
    "Max": ("MAXIMUM", schema.MaximumMinimumOptionsT),
    "Min": ("MINIMUM", schema.MaximumMinimumOptionsT),
}
_UNARY: dict[str, tuple[str, Any]] = {
    "Abs": ("ABS", schema.AbsOptionsT),
    "Exp": ("EXP", schema.ExpOptionsT),
    "Log": ("LOG", None),
    "Neg": ("NEG", schema.NegOptionsT),
}


@lowers(*_BINARY)
def lower_binary(emit: Emitter, node: ir.Node) -> None:
    name, options = _BINARY[node.op_type]
    if len(node.inputs) != 2:
        raise emit.refuse(node, f"{len(node.inputs)} operands; two, one after the other")
    # Quotients of integers have no kernel; indices are no quantized values.
    quantized = name != "DIV" and emit.runs_in_integers(node)
    read = emit.integers if quantized else emit.real
    operands = [read(value) for value in node.inputs]
    result = emit.result(node, quantized=quantized)
    emit.operator(name, operands, [result], options())


@lowers("Sqrt")
def lower_square_root(emit: Emitter, node: ir.Node) -> None:
    """A root, or one over it, which is an operator of its own."""
    x, root = input_of(node, 0), node.outputs[0]
    reciprocal = only_reader(root, "Reciprocal")
    if reciprocal is not None:
        value = reciprocal.outputs[0]
        emit.done.add(reciprocal)
        quantized = emit.is_quantized(x) and emit.quantizer_of(value) is not None
        source = emit.integers(x) if quantized else emit.real(x)
        emit.operator("RSQRT", [source], [emit.result(node, value=value, quantized=quantized)])
    else:
        emit.operator("SQRT", [emit.real(x)], [emit.result(node)])


@lowers(*_UNARY)
def lower_unary(emit: Emitter, node: ir.Node) -> None:
    name, options = _UNARY[node.op_type]
    operands = [emit.real(node.inputs[0])]
    emit.operator(name, operands, [emit.result(node)], options() if options else None)


@lowers("Reciprocal")
def lower_reciprocal(emit: Emitter, node: ir.Node) -> None:
    one = emit.file.constant("one", np.ones((), np.dtype(dtype_of(node.outputs[0]))))
    operands = [one, emit.real(node.inputs[0])]
    emit.operator("DIV", operands, [emit.result(node)], schema.DivOptionsT())


@lowers("Pow")
def lower_power(emit: Emitter, node: ir.Node) -> None:
    operands = [emit.real(value) for value in node.inputs]
    emit.operator("POW", operands, [emit.result(node)], schema.PowOptionsT())
