"""The global filter as ONNX local functions, whose bodies are standard operators."""

import re
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from gfcompile.compile.passes.dft import (
    Matrix,
    dft_matrix,
    inverse_real_dft_matrices,
    real_dft_matrices,
)

DOMAIN = "gfcompile"
FilterForm = Literal["dft", "circular"]
_NAMES: dict[FilterForm, str] = {"dft": "GlobalFilterDft", "circular": "GlobalFilterCircular"}
_NAME_PATTERN = re.compile(r"(GlobalFilterDft|GlobalFilterCircular)_(\d+)x(\d+)")


def function_name(form: FilterForm, h: int, w: int) -> str:
    """What the function of an (h, w) filter in this form is called, within `DOMAIN`."""
    return f"{_NAMES[form]}_{h}x{w}"


def parse_function_name(name: str) -> tuple[FilterForm, int, int] | None:
    """The form, h and w that `function_name` made `name` of; None for any other name."""
    match = _NAME_PATTERN.fullmatch(name)
    if match is None:
        return None
    form: FilterForm = "dft" if match[1] == _NAMES["dft"] else "circular"
    return form, int(match[2]), int(match[3])


def filter_function(form: FilterForm, h: int, w: int, opset: int) -> ir.Function:
    """The function of an (h, w) filter, for any batch and any number of channels.

    dft: (x, k_re, k_im) -> y, with x and y (B, h, w, C), and k_* (h, w // 2 + 1, C) the
    spectrum of orthonormal transforms.
    circular: (x, kernel) -> y, with kernel (h, w, C):
    y[i, j] = sum over p, q of kernel[p, q] * x[(i - p) % h, (j - q) % w].
    It has an attribute, `channels` = C, because a depthwise Conv must be told.
    """
    return _dft_function(h, w, opset) if form == "dft" else _circular_function(h, w, opset)


class _Body:
    """The nodes of a function, in order."""

    def __init__(self) -> None:
        self.tape = tape.Tape()

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.tape.op(kind, inputs, attributes)

    def ints(self, *values: int) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.array(values, np.int64)))

    def matrix(self, array: Matrix) -> ir.Value:
        return self.op("Constant", value=ir.tensor(array.astype(np.float32)))

    def function(
        self,
        name: str,
        opset: int,
        inputs: list[ir.Value],
        output: ir.Value,
        attributes: list[ir.Attr],
    ) -> ir.Function:
        """The finished function, its nodes and values named in order."""
        for index, node in enumerate(self.tape.nodes):
            node.name = f"{node.op_type}_{index}"
            for part, value in enumerate(node.outputs):
                value.name = f"{node.op_type.lower()}_{index}_{part}"
        output.name = "y"
        graph = ir.Graph(inputs, [output], nodes=self.tape.nodes, opset_imports={"": opset})
        return ir.Function(DOMAIN, name, graph=graph, attributes=attributes)


def _dft_function(h: int, w: int, opset: int) -> ir.Function:
    half = w // 2 + 1
    x, k_re, k_im = (ir.val(name) for name in ("x", "k_re", "k_im"))
    body = _Body()
    op = body.op

    def along_h(re: ir.Value, im: ir.Value, transform: Matrix) -> tuple[ir.Value, ir.Value]:
        if h == 1:
            return re, im
        # Real over imaginary part, (B, 2 * h, half * C), so that one product does both.
        flat, grid = body.ints(0, 0, -1), body.ints(0, 0, half, -1)
        stacked = op("Concat", op("Reshape", re, flat), op("Reshape", im, flat), axis=1)
        product = op("MatMul", body.matrix(transform), stacked)
        re, im = body.tape.op_multi_out(
            "Split", [product, body.ints(h, h)], {"axis": 1}, num_outputs=2
        )
        return op("Reshape", re, grid), op("Reshape", im, grid)  # each (B, h, half, C)

    to_re, to_im = real_dft_matrices(w)
    re, im = (op("MatMul", body.matrix(m), x) for m in (to_re, to_im))  # each (B, h, half, C)
    re, im = along_h(re, im, dft_matrix(h))
    re, im = (
        op("Sub", op("Mul", re, k_re), op("Mul", im, k_im)),
        op("Add", op("Mul", re, k_im), op("Mul", im, k_re)),
    )
    re, im = along_h(re, im, dft_matrix(h).T)
    from_re, from_im = inverse_real_dft_matrices(w)
    y = op(
        "Add",
        op("MatMul", body.matrix(from_re), re),
        op("MatMul", body.matrix(from_im), im),
    )
    return body.function(function_name("dft", h, w), opset, [x, k_re, k_im], y, [])


def _circular_function(h: int, w: int, opset: int) -> ir.Function:
    x, kernel = ir.val("x"), ir.val("kernel")
    body = _Body()
    op, ints = body.op, body.ints

    # Conv correlates: with the kernel turned around, tap m of it is kernel[h - 1 - m], and meets
    # x[(i - (h - 1 - m)) % h] when the grid is continued to the front by h - 1 rows.
    wrapped = op("Transpose", x, perm=[0, 3, 1, 2])  # (B, C, h, w)
    for axis, size in ((2, h), (3, w)):
        if size > 1:
            tail = op("Slice", wrapped, ints(1), ints(size), ints(axis))
            wrapped = op("Concat", tail, wrapped, axis=axis)
    last, before_first = ints(-1, -1), ints(-h - 1, -w - 1)
    turned = op("Slice", kernel, last, before_first, ints(0, 1), ints(-1, -1))
    weight = op("Unsqueeze", op("Transpose", turned, perm=[2, 0, 1]), ints(1))  # (C, 1, h, w)
    group = ir.RefAttr("group", "channels", ir.AttributeType.INT)
    y = op("Conv", wrapped, weight, kernel_shape=[h, w], group=group)
    y = op("Transpose", y, perm=[0, 2, 3, 1])
    channels = ir.Attr("channels", ir.AttributeType.INT, None)
    return body.function(function_name("circular", h, w), opset, [x, kernel], y, [channels])
