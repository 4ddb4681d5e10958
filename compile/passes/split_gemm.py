"""Gemm becomes MatMul and Add, the one way to write a linear layer that comes later.

Gemm(x, W, b, transB=1)  ->  Add(MatMul(x, Transpose(W)), b)
"""

from collections.abc import Callable

import onnx_ir as ir

from gfcompile.compile.passes.graph import Builder, attribute, input_of, replace, shape_of


def split_gemm(model: ir.Model, refuse: Callable[[str], None]) -> bool:
    """Rewrites every plain Gemm of `model`; whether there was one.

    One whose product or addend is scaled (alpha, beta) is left alone.
    """
    modified = False
    for node in list(model.graph):
        if node.op_type != "Gemm" or node.domain != "":
            continue
        y = node.outputs[0]
        if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
            refuse(f"{y.name}: Gemm with alpha or beta other than 1 stays as it is")
            continue
        build = Builder(node)
        operands = []
        for index, flag in enumerate(("transA", "transB")):
            value = input_of(node, index)
            perm = (1, 0) if attribute(node, flag, 0) else (0, 1)
            operands.append(build.transpose(value, perm, stem=f"{value.name}_t"))
        result = build.node("MatMul", operands, shape_of(y), stem=f"{y.name}_matmul")
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            result = build.node("Add", [result, bias], shape_of(y), stem=f"{y.name}_add")
        replace(y, result)
        modified = True
    return modified
