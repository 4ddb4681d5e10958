"""Matrix products and convolutions.

A product by a constant is a FULLY_CONNECTED, which delegates pack once; a BATCH_MATMUL would be
packed in every inference.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.targets.onnx_values import constant, input_of, only_reader, shape_of
from gfcompile.targets.tflite.emitter import (
    Emitter,
    attributes_of,
    integer_weights,
    lowers,
    stored_array,
)
from gfcompile.targets.tflite.model_file import Array, Quantization, Tensor


@lowers("MatMul")
def lower_matmul(emit: Emitter, node: ir.Node) -> None:
    x, w = input_of(node, 0), input_of(node, 1)
    weight = constant(w)
    if weight is not None and weight.ndim == 2 and len(shape_of(x)) >= 2:
        _fully_connected(emit, node, x, w, weight)
    else:
        _batch_matmul(emit, node, x, w)


def _fully_connected(emit: Emitter, node: ir.Node, x: ir.Value, w: ir.Value, weight: Array) -> None:
    """x @ w, with the bias that is added next."""
    value, bias = node.outputs[0], None
    add = _bias_add(value, weight.shape[1])
    if add is not None:
        emit.done.add(add)
        bias = input_of(add, 1 if add.inputs[0] is value else 0)
        value = add.outputs[0]
    integers = integer_weights(w)
    quantized = (
        integers is not None
        and emit.is_quantized(x)
        and emit.quantizer_of(value) is not None
        and (bias is None or integer_weights(bias) is not None)
    )
    operands: list[Tensor | None]
    if quantized:
        assert integers is not None
        data, scales = integers
        operands = [
            emit.stored(x),
            _integer_constant(emit, f"{w.name}/rows", data.T, scales, axis=1 - scales.axis),
            None if bias is None else _integer_bias(emit, bias),
        ]
    else:
        operands = [
            emit.real(x),
            emit.weights(f"{w.name}/rows", np.ascontiguousarray(stored_array(w, weight).T)),
            None if bias is None else _real_bias(emit, bias),
        ]
    result = emit.result(node, value=value, quantized=quantized)
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    emit.operator("FULLY_CONNECTED", operands, [result], options)


def _batch_matmul(emit: Emitter, node: ir.Node, a: ir.Value, b: ir.Value) -> None:
    if min(len(shape_of(a)), len(shape_of(b))) < 2:
        raise emit.refuse(node, "a product with a vector; reshape it to a matrix")
    quantized = emit.runs_in_integers(node)
    read = emit.integers if quantized else emit.real
    operands = [read(a), read(b)]
    result = emit.result(node, quantized=quantized)
    emit.operator("BATCH_MATMUL", operands, [result], schema.BatchMatMulOptionsT())


@lowers("Conv")
def lower_conv(emit: Emitter, node: ir.Node) -> None:
    x, w = input_of(node, 0), input_of(node, 1)
    weight = constant(w)
    attributes = attributes_of(node)
    groups = int(attributes.get("group", 1))
    if weight is None or weight.ndim != 4:
        raise emit.refuse(node, "convolutions of images by constant weights alone")
    out_channels, group_channels = weight.shape[:2]
    depthwise = groups > 1 and group_channels == 1 and out_channels == groups
    if groups > 1 and not depthwise:
        raise emit.refuse(node, f"{groups} groups; 1, or one per channel")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    integers = integer_weights(w)
    quantized = (
        integers is not None
        and emit.is_quantized(x)
        and emit.quantizer_of(node.outputs[0]) is not None
        and (bias is None or integer_weights(bias) is not None)
    )
    # (O, I, H, W) -> (O, H, W, I); one filter per channel: (C, 1, H, W) -> (1, H, W, C)
    perm = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
    image = emit.image(x)
    if quantized:
        assert integers is not None
        data, scales = integers
        filters = _integer_constant(
            emit, f"{w.name}/hwc", data.transpose(perm), scales, axis=perm.index(scales.axis)
        )
        offsets = _integer_bias(emit, bias) if bias is not None else None
    else:
        image = emit.dequantized(image)
        filters = emit.weights(
            f"{w.name}/hwc", np.ascontiguousarray(stored_array(w, weight).transpose(perm))
        )
        offsets = _real_bias(emit, bias) if bias is not None else None
    if offsets is None:
        offsets = _no_bias(emit, image, filters, out_channels)
    pads = [int(n) for n in attributes.get("pads", (0, 0, 0, 0))]
    strides = [int(n) for n in attributes.get("strides", (1, 1))]
    dilations = [int(n) for n in attributes.get("dilations", (1, 1))]
    same = _is_same_padding(image.shape[1:3], weight.shape[2:], strides, dilations, pads)
    if any(pads) and not same:
        image = _pad(emit, image, pads, f"{node.outputs[0].name}/padded")
    result = emit.result(node, quantized=quantized, as_image=True)
    options: Any = schema.DepthwiseConv2DOptionsT() if depthwise else schema.Conv2DOptionsT()
    options.padding = schema.Padding.SAME if same else schema.Padding.VALID
    options.strideH, options.strideW = strides
    options.dilationHFactor, options.dilationWFactor = dilations
    if depthwise:
        options.depthMultiplier = 1
    emit.operator(
        "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D",
        [image, filters, offsets],
        [result],
        options,
    )


def _is_same_padding(
    size: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int],
    pads: list[int],
) -> bool:  # fmt: skip
    """Whether `pads` (top, left, bottom, right) are what TFLite's SAME puts there."""
    if not any(pads):
        return False
    for axis in (0, 1):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        outputs = -(-size[axis] // strides[axis])
        total = max((outputs - 1) * strides[axis] + reach - size[axis], 0)
        if (pads[axis], pads[axis + 2]) != (total // 2, total - total // 2):
            return False
    return True


def _pad(emit: Emitter, image: Tensor, pads: list[int], name: str) -> Tensor:
    """`image` with zeros around it; the zero of its own scale."""
    top, left, bottom, right = pads
    around = np.array([(0, 0), (top, bottom), (left, right), (0, 0)], np.int32)
    shape = [n + int(a + b) for n, (a, b) in zip(image.shape, around, strict=True)]
    result = emit.file.tensor(name, image.dtype, shape, image.quantization)
    emit.operator(
        "PAD", [image, emit.file.constant("padding", around)], [result], schema.PadOptionsT()
    )
    return result


def _bias_add(value: ir.Value, channels: int) -> ir.Node | None:
    """The node that alone reads `value` and adds a constant of one number per channel."""
    add = only_reader(value, "Add")
    if add is None:
        return None
    for operand in add.inputs:
        array = constant(operand) if operand is not value else None
        if array is not None and array.ndim >= 1 and array.size == array.shape[-1] == channels:
            return add
    return None


def _integer_constant(
    emit: Emitter, name: str, data: Array, quantization: Quantization, *, axis: int
) -> Tensor:
    """Quantized weights in TFLite's order, whose channels are along `axis` there."""
    if quantization.scale.size == 1:
        axis = 0
    return emit.file.constant(
        name,
        np.ascontiguousarray(data),
        Quantization(scale=quantization.scale, zero_point=quantization.zero_point, axis=axis),
    )


def _integer_bias(emit: Emitter, bias: ir.Value) -> Tensor:
    integers = integer_weights(bias)
    assert integers is not None
    data, quantization = integers
    return emit.file.constant(str(bias.name), data.reshape(-1), quantization)


def _real_bias(emit: Emitter, bias: ir.Value) -> Tensor:
    array = constant(bias)
    assert array is not None
    return emit.file.constant(str(bias.name), array.astype(np.float32).reshape(-1))


def _no_bias(emit: Emitter, image: Tensor, filters: Tensor, channels: int) -> Tensor:
    """Zeros, which convolutions of integers cannot do without."""
    if image.quantization is None or filters.quantization is None:
        return emit.file.constant("no_bias", np.zeros(channels, np.float32))
    scale = np.broadcast_to(image.quantization.scale * filters.quantization.scale, (channels,))
    return emit.file.constant(
        "no_bias",
        np.zeros(channels, np.int32),
        Quantization(scale=np.array(scale), zero_point=np.zeros(channels, np.int64)),
    )
