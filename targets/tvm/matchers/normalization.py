"""Rows that are normalized: Softmax and LayerNormalization."""

import math

import onnx_ir as ir

from gfcompile.targets.onnx_values import (
    constant,
    input_of,
    is_along_last_axis,
    is_standard,
    only_reader,
    shape_of,
)
from gfcompile.targets.tvm.kernel import LayerNorm, Softmax
from gfcompile.targets.tvm.matchers.state import State


def softmax(state: State, node: ir.Node) -> None:
    """A Softmax that no attention has taken along."""
    shape = shape_of(node.outputs[0])
    if is_along_last_axis(node, len(shape)):
        kernel = Softmax(rows=math.prod(shape[:-1]), n=shape[-1])
        state.replace(node, kernel, input_of(node, 0))


def layer_norm(state: State, node: ir.Node) -> None:
    """Layer normalization, with the Slice before it that takes rows off the front of images."""
    x = input_of(node, 0)
    shape = shape_of(x)
    gamma, beta = constant(node.inputs[1]), constant(node.inputs[2])
    if not is_along_last_axis(node, len(shape)) or gamma is None or beta is None:
        return
    eps = node.attributes.get_float("epsilon", 1e-5)
    rows, n = math.prod(shape[:-1]), shape[-1]
    images, leading = 1, 0
    cut = x.producer()
    if cut is not None and only_reader(x) is node:
        leading = _rows_cut_off(cut)
        if leading:
            state.claimed.add(cut)
            images, x = shape[0], input_of(cut, 0)
    state.add(
        [node],
        lambda out: LayerNorm(rows=rows, n=n, eps=eps, out=out, images=images, leading=leading),
        {"x": state.tensor(x)},
        {"gamma": gamma.reshape(-1), "beta": beta.reshape(-1)},
    )


def _rows_cut_off(node: ir.Node) -> int:
    """How many rows a Slice takes off the front of each image's; 0 if it does not do just that."""
    if not is_standard(node, "Slice"):
        return 0
    bounds = [constant(value) for value in node.inputs[1:]]
    before, after = (shape_of(value) for value in (input_of(node, 0), node.outputs[0]))
    if len(before) != 3 or len(bounds) < 3 or any(b is None or b.size != 1 for b in bounds):
        return 0
    start, end, axis, *step = (int(b.reshape(-1)[0]) for b in bounds if b is not None)
    if axis not in (1, -2) or end < before[1] or step not in ([], [1]):
        return 0
    return before[1] - after[1] if start > 0 else 0
