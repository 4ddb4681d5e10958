"""A DFT that belongs to no global filter becomes one matrix product along its axis.

    x -> DFT(axis) -> y

becomes

    x -> Transpose (axis last but one) -> Reshape -> MatMul(constant) -> Reshape -> Transpose -> y
"""

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from gfcompile.compile.passes.dft import dft_tensor
from gfcompile.compile.passes.graph import Builder, input_of, replace, shape_of
from gfcompile.compile.passes.linear import dft_settings

# Beyond this many elements (64 MiB) a matrix product is no sensible way to transform.
_MAX_ELEMENTS = 1 << 24


def lower_lone_dfts(
    model: ir.Model, keep: Collection[ir.Node], refuse: Callable[[str], None]
) -> bool:
    """Replaces every DFT node of `model` but those in `keep`; whether there were any."""
    modified = False
    for node in list(model.graph):
        if node.op_type != "DFT" or node.domain != "" or node in keep:
            continue
        axis, length, inverse, onesided = dft_settings(node)
        x, y = input_of(node, 0), node.outputs[0]
        size, parts = shape_of(x)[axis], shape_of(x)[-1]
        if 4 * size * length > _MAX_ELEMENTS:
            refuse(f"{y.name}: a DFT of length {length} is too long for a matrix product")
            continue
        tensor = dft_tensor(size, parts, length, inverse=inverse, onesided=onesided)
        _lower(node, axis, tensor.astype(np.float32))
        modified = True
    return modified


def _lower(
    node: ir.Node, axis: int, tensor: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> None:
    x, y = input_of(node, 0), node.outputs[0]
    rank = len(shape_of(x))
    size, parts, out_size, out_parts = tensor.shape
    perm = (*(a for a in range(rank - 1) if a != axis), axis, rank - 1)
    build, stem = Builder(node), f"{y.name}_dft"
    value = build.transpose(x, perm, stem=f"{stem}_in")
    rest = shape_of(value)[:-2]
    value = build.reshape(value, (*rest, size * parts), stem=f"{stem}_rows")
    matrix = build.constant(f"{stem}_matrix", tensor.reshape(size * parts, out_size * out_parts))
    shape = (*rest, out_size * out_parts)
    value = build.node("MatMul", [value, matrix], shape, stem=stem)
    value = build.reshape(value, (*rest, out_size, out_parts), stem=f"{stem}_parts")
    back = tuple(int(a) for a in np.argsort(perm))
    value = build.transpose(value, back, stem=f"{stem}_out")
    replace(y, value)
