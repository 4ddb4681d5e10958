"""Products with constant matrices, convolutions, and the weights that they read."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfcompile.quantize.int4 import factored, fits_int4
from gfcompile.targets.coreml.emitter import Emitter, refuse
from gfcompile.targets.coreml.values import Array, Template, Value, natural, order_of
from gfcompile.targets.onnx_values import constant, is_standard, only_reader, quantization, shape_of


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """Integers, symmetric, with a scale per output channel.

    Attributes:
        data: int8; output channels along `axis`.
        scale: (channels,).
    """

    data: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    axis: int


def quantized_weight(value: ir.Value | None) -> QuantizedWeight | None:
    """The integers behind a constant, if a DequantizeLinear makes it of such."""
    node = None if value is None else value.producer()
    if node is None or not is_standard(node, "DequantizeLinear"):
        return None
    data = constant(node.inputs[0])
    if data is None:
        return None
    scale, zero_point, axis = quantization(node)
    if data.dtype.name not in ("int8", "int4") or zero_point.any() or scale.ndim != 1:
        return None
    return QuantizedWeight(data=data.astype(np.int8), scale=scale, axis=axis % data.ndim)


def product_axes(emitter: Emitter, rank: int) -> tuple[int, ...]:
    """In which order a product with a constant matrix has the axes of its operand and result."""
    if not emitter.is_channels_first or rank < 2:
        return tuple(range(rank))
    return (1, 0) if rank == 2 else (0, rank - 1, *range(1, rank - 1))


def product_operand(emitter: Emitter, x: Value) -> Any:
    """`x` as a product with a constant matrix reads it."""
    dims, rank = x.dims, len(x.dims)
    shape = dims
    if emitter.is_channels_first and rank > 1:
        batch = 1 if rank == 2 else dims[0]
        shape = (batch, dims[-1], 1, math.prod(dims[:-1]) // batch)
    elif rank > 3:  # Core ML's `linear` takes up to two axes of rows
        shape = (dims[0], math.prod(dims[1:-1]), dims[-1])
    return emitter.arranger.lay_out_flat(x, order_of(product_axes(emitter, rank), dims), shape)


def weight_operand(emitter: Emitter, value: ir.Value, arrange: Any) -> Any:
    """A constant weight: integers with their scales where they are stored as such, else floats.

    Args:
        arrange: moves the axes of an array of the graph's shape; `arrange(data)` has the output
            channels first.
    """
    name = str(value.name)
    quantized = quantized_weight(value)
    if quantized is None or emitter.options.ios < 16:
        array = constant(value)
        assert array is not None
        return arrange(array)
    data = arrange(quantized.data)
    scale = emitter.rounded(quantized.scale)
    if emitter.options.ios < 18:
        return emitter.op(
            "constexpr_affine_dequantize",
            name,
            quantized_data=data,
            scale=scale,
            zero_point=np.int8(0),
            axis=np.int32(0),
        )
    scale = scale.reshape(-1, *[1] * (data.ndim - 1))
    codes: npt.NDArray[Any] | None = data if fits_int4(data) else None
    if codes is None and emitter.group_size is not None:
        split = _split_groups(data, emitter.group_size)
        if split is not None:
            codes, factors = split
            scale = emitter.rounded(quantized.scale.reshape(scale.shape) * factors)
    if codes is not None:
        from coremltools.converters.mil.mil import types

        data = codes.astype(types.nptype_from_builtin(types.int4))
    return emitter.op("constexpr_blockwise_shift_scale", name, data=data, scale=scale)


def _split_groups(
    data: npt.NDArray[np.int8], group_size: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint8]] | None:
    """Codes of four bits, and factors whose axes are as many times shorter as a block is long.

    None where a channel's groups are no blocks, or the values not of four bits.
    """
    block, left = [1] * data.ndim, group_size
    for axis in reversed(range(1, data.ndim)):
        block[axis] = math.gcd(left, data.shape[axis])
        left //= block[axis]
        if block[axis] < data.shape[axis]:
            break
    if left > 1:
        return None
    shape = [
        size
        for extent, length in zip(data.shape, block, strict=True)
        for size in (extent // length, length)
    ]
    found = factored(data.reshape(shape), axes=tuple(range(1, 2 * data.ndim, 2)))
    if found is None:
        return None
    codes, factors = found
    return codes.reshape(data.shape), factors.reshape(shape[::2])


def emit_matmul(emitter: Emitter, node: ir.Node) -> None:
    left, right = node.inputs
    assert left is not None
    assert right is not None
    if constant(right) is not None and len(shape_of(right)) == 2 and constant(left) is None:
        _emit_linear(emitter, node, emitter.value(left), right)
    else:
        _emit_product(emitter, node, emitter.operand(left), emitter.operand(right))


def _emit_linear(emitter: Emitter, node: ir.Node, x: Value, weight: ir.Value) -> None:
    """x @ W + bias: `linear`, or a 1x1 convolution over channels that come first."""
    channels = shape_of(weight)[1]
    arguments: dict[str, Any] = {}
    last = node
    add = only_reader(node.outputs[0], "Add")
    if add is not None:
        others = [operand for operand in add.inputs if operand is not node.outputs[0]]
        bias = constant(others[0]) if len(others) == 1 else None
        if bias is not None and bias.size == bias.shape[-1] == channels:
            arguments["bias"] = bias.reshape(-1)
            emitter.covered.add(add)
            last = add
    name = str(last.outputs[0].name)
    operand = product_operand(emitter, x)
    if operand.rank == 4:
        kernel = weight_operand(emitter, weight, lambda w: _copy(w.T[:, :, None, None]))
        var = emitter.op("conv", name, x=operand, weight=kernel, pad_type="valid", **arguments)
    else:
        matrix = weight_operand(emitter, weight, lambda w: _copy(w.T))
        var = emitter.op("linear", name, x=operand, weight=matrix, **arguments)
    emitter.define(last.outputs[0], var, product_axes(emitter, len(x.dims)))


def takes_pixels(node: ir.Node) -> bool:
    """Whether a convolution can normalize its input: no padding, which would be black, not zero."""
    if not is_standard(node, "Conv") or len(node.inputs) < 2:
        return False
    pads = node.attributes.get_ints("pads", [0, 0, 0, 0])
    weight = node.inputs[1]
    return (
        not any(pads)
        and node.attributes.get_int("group", 1) == 1
        and constant(weight) is not None
        and quantized_weight(weight) is None
    )


def _emit_product(emitter: Emitter, node: ir.Node, a: Value, b: Value) -> None:
    """Activations times activations, batch by batch, without transposing what lies transposed."""
    name, dims = str(node.outputs[0].name), shape_of(node.outputs[0])
    rank = len(dims)
    if len(a.dims) < 2 or len(b.dims) < 2:
        raise refuse(node, "operands of at least two axes are needed")
    a, b = a.padded(rank), b.padded(rank)
    x, x_turned = _matrices(emitter, a)
    y, y_turned = _matrices(emitter, b)
    if emitter.is_channels_first and y_turned and not x_turned:
        # (A B)^T = B^T A^T: what follows wants channels before tokens, as B has them.
        var = emitter.op("matmul", name, x=y, y=x, transpose_x=False, transpose_y=True)
        emitter.define(node.outputs[0], var, (*range(rank - 2), rank - 1, rank - 2))
        return
    var = emitter.op("matmul", name, x=x, y=y, transpose_x=x_turned, transpose_y=y_turned)
    emitter.define(node.outputs[0], var, tuple(range(rank)))


def _matrices(emitter: Emitter, value: Value) -> tuple[Any, bool]:
    """`value` as a batch of matrices, and whether they are transposed."""
    rank = len(value.dims)
    turned: Template = (*range(rank - 2), rank - 1, rank - 2)
    if value.order == order_of(turned, value.dims) != natural(value.dims):
        return emitter.lay_out(value, turned), True
    return emitter.lay_out(value, tuple(range(rank))), False


def emit_conv(emitter: Emitter, node: ir.Node) -> None:
    x, weight = node.inputs[0], node.inputs[1]
    assert x is not None
    assert weight is not None
    kernel = constant(weight)
    if kernel is None:
        raise refuse(node, "its weight is computed while the model runs")
    if kernel.ndim != 4:
        raise refuse(node, f"it has {kernel.ndim - 2} spatial axes, only two are supported")
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise refuse(node, "auto_pad is not supported, explicit pads are")
    top, left, bottom, right = node.attributes.get_ints("pads", [0, 0, 0, 0])
    bias = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant(node.inputs[2])
        if bias is None:
            raise refuse(node, "its bias is computed while the model runs")
    normalization = emitter.normalizations.get(node)
    operand: Any
    if normalization is None:
        operand = weight_operand(emitter, weight, _copy)
    else:
        scale, shift = (a.reshape(-1, 1, 1) for a in (normalization.scale, normalization.shift))
        added = (kernel.astype(np.float64) * shift).sum(axis=(1, 2, 3))
        operand = kernel.astype(np.float64) * scale
        bias = added if bias is None else bias.astype(np.float64) + added
    arguments = {} if bias is None else {"bias": bias}
    var = emitter.op(
        "conv",
        str(node.outputs[0].name),
        x=emitter.lay_out(emitter.value(x), (0, 1, 2, 3)),
        weight=operand,
        strides=list(node.attributes.get_ints("strides", [1, 1])),
        pad_type="custom" if any((top, left, bottom, right)) else "valid",
        pad=[top, bottom, left, right],
        dilations=list(node.attributes.get_ints("dilations", [1, 1])),
        groups=node.attributes.get_int("group", 1),
        **arguments,
    )
    emitter.define(node.outputs[0], var, (0, 1, 2, 3))


def _copy(array: Array) -> Array:
    return np.ascontiguousarray(array)
