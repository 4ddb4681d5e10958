"""Folds a constant factor per channel into the product before it.

    Mul(Add(MatMul(x, W), b), gamma)  ->  Add(MatMul(x, W * gamma), b * gamma)

In a QDQ graph the int8 weights and the int32 bias keep their values and the scales take the
factor (its sign goes to the values: they are symmetric, so negation is exact):

    W: DequantizeLinear(w, s)  ->  DequantizeLinear(w * sign(gamma), s * abs(gamma))
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from gfcompile.compile.passes.graph import (
    Array,
    Builder,
    attribute,
    constant,
    input_of,
    is_constant,
    only_consumer,
    replace,
    shape_of,
)


class _Layer(NamedTuple):
    """A linear layer whose result is multiplied by a constant per channel."""

    product: ir.Node  # MatMul
    bias: ir.Value | None
    factor: Array  # (N,) float64


def fold_layer_scale(model: ir.Model) -> bool:
    """Folds every constant Mul of `model` that follows a linear layer; whether there was one."""
    modified = False
    for node in list(model.graph):
        if node.op_type != "Mul" or node.domain != "":
            continue
        layer = _match(node)
        if layer is not None:
            _rewrite(node, layer)
            modified = True
    return modified


def _match(scale: ir.Node) -> _Layer | None:
    gamma, value = _constant_operand(scale)
    factor = constant(gamma)
    if factor is None or value is None:
        return None
    consumer, node = scale, value.producer()
    bias: ir.Value | None = None
    if node is not None and node.op_type == "Add":
        if only_consumer(value) is not consumer:
            return None
        bias, value = _constant_operand(node)
        if bias is None or value is None:
            return None
        consumer, node = node, value.producer()
    if node is None or node.op_type != "MatMul" or only_consumer(value) is not consumer:
        return None
    weight = input_of(node, 1)
    channels = shape_of(value)[-1]
    if factor.size not in (1, channels) or factor.shape[-1:] not in ((), (1,), (channels,)):
        return None
    if shape_of(scale.outputs[0]) != shape_of(value) or len(shape_of(weight)) != 2:
        return None
    if not _can_scale(weight, channels) or (bias and not _can_scale(bias, channels)):
        return None
    per_channel = np.broadcast_to(factor.reshape(-1), (channels,)).astype(np.float64)
    return _Layer(node, bias, per_channel)


def _constant_operand(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The operand of a commutative node that is constant, perhaps dequantized, and the other."""
    first, second = input_of(node, 0), input_of(node, 1)
    if is_constant(first):
        return first, second
    return (second, first) if is_constant(second) else (None, None)


def _can_scale(value: ir.Value, channels: int) -> bool:
    """Whether the constant `value`, its channels last, can take a factor per channel."""
    if not is_constant(value) or shape_of(value)[-1:] not in ((channels,), (1,)):
        return False
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return True
    quantized, scale = constant(node.inputs[0]), constant(node.inputs[1])
    zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    assert quantized is not None
    assert scale is not None
    rank = len(shape_of(value))
    per_channel = scale.ndim == 0 or attribute(node, "axis", 1) % rank == rank - 1
    symmetric = zero_point is None or not zero_point.any()
    # The lowest integer has no negative.
    negatable = quantized.size == 0 or quantized.min() > np.iinfo(quantized.dtype).min
    return per_channel and symmetric and negatable and not attribute(node, "block_size", 0)


def _rewrite(scale: ir.Node, layer: _Layer) -> None:
    build, y = Builder(scale), scale.outputs[0]
    activation, weight = input_of(layer.product, 0), input_of(layer.product, 1)
    new_weight, weight_scale = _scaled(build, weight, layer.factor)
    shape = shape_of(layer.product.outputs[0])
    name = f"{y.name}_matmul"
    result = build.node("MatMul", [activation, new_weight], shape, stem=name)
    if layer.bias is not None:
        exact = None
        source = activation.producer()
        if source is not None and source.op_type == "DequantizeLinear":
            activation_scale = constant(source.inputs[1])
            if activation_scale is not None and weight_scale is not None:
                # A quantized bias counts in steps of the product: exactly x's times w's.
                exact = activation_scale.astype(np.float32) * weight_scale
        new_bias, _ = _scaled(build, layer.bias, layer.factor, exact)
        result = build.node("Add", [result, new_bias], shape, stem=f"{y.name}_add")
    replace(y, result)


def _scaled(
    build: Builder, value: ir.Value, factor: Array, scale: Array | None = None
) -> tuple[ir.Value, Array | None]:
    """`value` times `factor` along its last axis, and its new scale if it is dequantized.

    `scale`, when given, is what the new scale shall be.
    """
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        array = constant(value)
        assert array is not None
        scaled = (array * factor).astype(array.dtype)
        return build.constant(f"{value.name}_scaled", scaled), None
    quantized, old_scale = constant(node.inputs[0]), constant(node.inputs[1])
    assert quantized is not None
    assert old_scale is not None
    # Zero is no scale: a channel that gamma switches off keeps its scale and loses its values.
    magnitude = np.where(factor == 0, 1.0, np.abs(factor))
    if scale is None:
        scale = (old_scale * magnitude).astype(np.float32)
    values = (quantized * np.sign(factor)).astype(quantized.dtype)
    inputs = [
        build.constant(f"{value.name}_scaled", values),
        build.constant(f"{value.name}_scale", scale),
    ]
    result = build.node(
        "DequantizeLinear",
        inputs,
        values.shape,
        stem=f"{value.name}_dq",
        axis=values.ndim - 1,
    )
    return result, scale
