"""What a file takes and gives: images and logits, real or as integers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.onnx_values import is_standard, scalar_quantization, shape_of
from gfcompile.targets.tflite.emitter import Emitter, channels_last, held_dtype
from gfcompile.targets.tflite.model_file import Quantization, Tensor
from gfcompile.targets.tflite.options import Interface

# A pixel of 255 is 1.
_PIXELS = (1.0 / 255, 0)
_UINT8_OFFSET = 128


def add_input(emit: Emitter, value: ir.Value, interface: Interface) -> Tensor:
    """The input tensor for `value`: an image as (N, H, W, C), anything else as the graph has it.

    Raises:
        CompileError: integers are wanted of a value that the graph does not quantize at once.
    """
    is_image = len(shape_of(value)) == 4
    shape = channels_last(shape_of(value)) if is_image else shape_of(value)
    if interface == "float32":
        tensor = emit.file.tensor(str(value.name), held_dtype(value), shape)
        emit.hold(value, tensor, as_image=is_image)
        return tensor
    quantize = _only_quantizer(emit, value)
    stored = quantize.outputs[0]
    scale, zero_point = scalar_quantization(quantize)
    signed = Quantization.per_tensor(scale, zero_point)
    emit.done.add(quantize)
    if interface == "int8":
        tensor = emit.file.tensor(str(value.name), "int8", shape, signed)
        emit.hold(stored, tensor, as_image=is_image)
        return tensor
    unsigned = Quantization.per_tensor(scale, zero_point + _UINT8_OFFSET)
    tensor = emit.file.tensor(str(value.name), "uint8", shape, unsigned)
    shifted = emit.file.tensor(str(stored.name), "int8", shape, signed)
    emit.operator("QUANTIZE", [tensor], [shifted], schema.QuantizeOptionsT())
    emit.hold(stored, shifted, as_image=is_image)
    return tensor


def add_pixels(
    emit: Emitter, value: ir.Value, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """An input of pixels for `value`, which is (pixel / 255 - mean) / std of them."""
    shape = channels_last(shape_of(value))
    name = str(value.name)
    pixels = emit.file.tensor(name, "uint8", shape, Quantization.per_tensor(*_PIXELS))
    if emit.integer_only:
        _normalize_integers(emit, value, pixels, mean, std)
        return pixels
    scaled = emit.dequantized(pixels)
    centre = emit.file.constant(f"{name}/mean", np.array(mean, np.float32))
    spread = emit.file.constant(f"{name}/std", (1 / np.array(std, np.float64)).astype(np.float32))
    centred = emit.binary("SUB", scaled, centre, f"{name}/centred")
    normalized = emit.binary("MUL", centred, spread, f"{name}/normalized")
    emit.hold(value, normalized, as_image=True)
    return pixels


def add_output(emit: Emitter, value: ir.Value, interface: Interface) -> Tensor:
    """The output tensor for `value`.

    Raises:
        CompileError: integers are wanted of a value that the graph does not quantize.
    """
    stored = emit.stored(value)
    if interface == "float32":
        return emit.dequantized(stored)
    if stored.quantization is None:
        raise CompileError(f"output {value.name} is not quantized, it cannot be {interface}")
    if interface == "int8":
        return stored
    scale, zero_point = stored.quantization.scale[0], int(stored.quantization.zero_point[0])
    shifted = emit.file.tensor(
        f"{value.name}/uint8",
        "uint8",
        stored.shape,
        Quantization.per_tensor(scale, zero_point + _UINT8_OFFSET),
    )
    emit.operator("QUANTIZE", [stored], [shifted], schema.QuantizeOptionsT())
    return shifted


def _only_quantizer(emit: Emitter, value: ir.Value) -> ir.Node:
    quantize = emit.quantizer_of(value)
    if quantize is None or not is_standard(quantize, "QuantizeLinear"):
        raise CompileError(
            f"input {value.name} is not quantized at once: the first layer is in float "
            "(--keep-float?), so --interface float32 it is"
        )
    return quantize


def _normalize_integers(
    emit: Emitter, value: ir.Value, pixels: Tensor, mean: Sequence[float], std: Sequence[float]
) -> None:
    """The normalization as a convolution of integers with one weight per channel.

    The weight is 127 with a scale of its own for each channel, so none is rounded.
    """
    quantize = _only_quantizer(emit, value)
    stored = quantize.outputs[0]
    scale, zero_point = _PIXELS
    signed = Quantization.per_tensor(scale, zero_point - _UINT8_OFFSET)
    shifted = emit.file.tensor(f"{value.name}/int8", "int8", pixels.shape, signed)
    emit.operator("QUANTIZE", [pixels], [shifted], schema.QuantizeOptionsT())
    channels = pixels.shape[-1]
    none = np.zeros(channels, np.int64)
    weight_scale = (1 / (127 * np.array(std, np.float64))).astype(np.float32)
    bias_scale = np.float32(scale) * weight_scale
    bias = np.rint(-np.array(mean) / np.array(std) / bias_scale).astype(np.int32)
    result = emit.file.tensor(
        str(stored.name),
        "int8",
        pixels.shape,
        Quantization.per_tensor(*scalar_quantization(quantize)),
    )
    options: Any = schema.DepthwiseConv2DOptionsT()
    options.padding = schema.Padding.VALID
    options.strideH = options.strideW = options.depthMultiplier = 1
    operands = [
        shifted,
        emit.file.constant(
            "normalization",
            np.full((1, 1, 1, channels), 127, np.int8),
            Quantization(scale=weight_scale, zero_point=none, axis=3),
        ),
        emit.file.constant(
            "normalization/bias", bias, Quantization(scale=bias_scale, zero_point=none)
        ),
    ]
    emit.operator("DEPTHWISE_CONV_2D", operands, [result], options)
    emit.done.add(quantize)
    emit.hold(stored, result, as_image=True)
