"""Writes each LayerNormalization in operators that have integer kernels.

    x  ->  c = x - mean(x)  ->  c / sqrt(mean(c * c))  ->  * gamma + beta

Scale and shift are a depthwise 1x1 convolution: in integers, it rounds once, and its weights have
a scale for each channel. The epsilon is left out: it is far below the step of an 8-bit variance,
and a variance of zero steps gives the largest reciprocal there is.
"""

import numpy as np
import onnx_ir as ir

from gfcompile.compile.passes.graph import (
    Builder,
    attribute,
    constant,
    input_of,
    replace,
    shape_of,
)
from gfcompile.runtime.errors import CompileError


def expand_layer_norms(model: ir.Model) -> bool:
    """Expands all of `model`; whether there was any.

    Raises:
        CompileError: one that is not over the last axis, or without constant weights.
    """
    nodes = [node for node in model.graph if node.op_type == "LayerNormalization"]
    for node in nodes:
        _expand(node)
    return bool(nodes)


def _expand(node: ir.Node) -> None:
    x = input_of(node, 0)
    shape = shape_of(x)
    gamma = constant(node.inputs[1])
    beta = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if attribute(node, "axis", -1) % len(shape) != len(shape) - 1 or gamma is None:
        raise CompileError(f"{node.name}: a norm of the last axis with constant weights is needed")
    channels = shape[-1]
    stem = str(node.outputs[0].name)
    build = Builder(node)
    rows = (*shape[:-1], 1)
    axes = build.constant(f"{stem}_axes", np.array([-1], np.int64))

    def mean(value: ir.Value, name: str) -> ir.Value:
        return build.node("ReduceMean", [value, axes], rows, stem=f"{stem}_{name}", keepdims=1)

    centred = build.node("Sub", [x, mean(x, "mean")], shape, stem=f"{stem}_centred")
    squared = build.node("Mul", [centred, centred], shape, stem=f"{stem}_squared")
    root = build.node("Sqrt", [mean(squared, "variance")], rows, stem=f"{stem}_root")
    inverse = build.node("Reciprocal", [root], rows, stem=f"{stem}_inverse")
    normalized = build.node("Mul", [centred, inverse], shape, stem=f"{stem}_normalized")

    # (B, ..., C) as an image (B, C, n, 1), whose pixels the convolution takes one by one.
    batch = shape[0]
    pixels = int(np.prod(shape[1:-1], dtype=np.int64))
    image = build.reshape(normalized, (batch, pixels, 1, channels), stem=f"{stem}_pixels")
    image = build.transpose(image, (0, 3, 1, 2), stem=f"{stem}_image")
    weight = build.constant(f"{stem}_gamma", gamma.reshape(channels, 1, 1, 1))
    shift = np.zeros(channels, np.float32) if beta is None else beta.reshape(channels)
    bias = build.constant(f"{stem}_beta", shift)
    scaled = build.node(
        "Conv",
        [image, weight, bias],
        (batch, channels, pixels, 1),
        stem=f"{stem}_scaled",
        group=channels,
        kernel_shape=[1, 1],
    )
    tokens = build.transpose(scaled, (0, 2, 3, 1), stem=f"{stem}_tokens")
    target = build.constant(f"{stem}_shape", np.array(shape, np.int64))
    replace(node.outputs[0], build.node("Reshape", [tokens, target], shape, stem=stem))
