"""Stores the kernels of circular filters in int8 where their input is int8.

    GlobalFilterCircular(DequantizeLinear(x), kernel)
becomes
    GlobalFilterCircular(DequantizeLinear(x), DequantizeLinear(kernel', scale))

Nothing is rounded here: the scheme says which filters are computed in integers, and their kernels
were rounded in the model. Any other kernel is no multiple of a scale and stays.
"""

import numpy as np
import onnx_ir as ir

from gfcompile.compile.passes.filter_functions import DOMAIN, parse_function_name
from gfcompile.compile.passes.graph import Array, Builder, constant, input_of
from gfcompile.quantize.qparams import symmetric_scales
from gfcompile.quantize.scheme import FILTER_KERNEL

_VIEWS = frozenset(("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"))
# In steps; transforms in float32 leave a thousandth.
_ON_THE_GRID = 0.02


def quantize_filter_kernels(model: ir.Model) -> bool:
    """Rewrites all such filters of `model`; whether there was any."""
    found = False
    for node in list(model.graph):
        parsed = parse_function_name(node.op_type) if node.domain == DOMAIN else None
        if parsed is None or parsed[0] != "circular" or not _is_dequantized(input_of(node, 0)):
            continue
        kernel = constant(input_of(node, 1))  # (h, w, C)
        if kernel is not None and kernel.dtype == np.float32:
            found |= _store(node, kernel)
    return found


def _is_dequantized(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and node.domain == "" and node.op_type in _VIEWS:
        node = input_of(node, 0).producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _store(node: ir.Node, kernel: Array) -> bool:
    scales = symmetric_scales(kernel, 2, FILTER_KERNEL)
    steps = kernel / scales
    integers = np.rint(steps)
    if np.abs(steps - integers).max() > _ON_THE_GRID:
        return False
    build = Builder(node)
    stem = f"{node.outputs[0].name}_kernel"
    operands = [
        build.constant(stem, integers.astype(np.int8)),
        build.constant(f"{stem}_scale", scales),
    ]
    stored = build.node("DequantizeLinear", operands, kernel.shape, stem=f"{stem}_real", axis=2)
    node.replace_input_with(1, stored)
    return True
