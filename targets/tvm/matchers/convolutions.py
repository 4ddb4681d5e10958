"""Convolutions: of patches that do not overlap as products, all others by a kernel of their own.

Their images have channels last wherever `channels_last.py` finds that possible.
"""

from typing import Literal

import numpy as np
import onnx_ir as ir

from gfcompile.targets.onnx_values import (
    constant,
    input_of,
    is_standard,
    only_reader,
    scalar_quantization,
    shape_of,
)
from gfcompile.targets.tvm.kernel import Array, Conv, Patchify, quant_args
from gfcompile.targets.tvm.matchers.channels_last import (
    ConvMatch,
    channels_last_source,
    match_conv,
)
from gfcompile.targets.tvm.matchers.constants import float_bias
from gfcompile.targets.tvm.matchers.products import Product, dense, product_of
from gfcompile.targets.tvm.matchers.state import State, label
from gfcompile.targets.tvm.program import Call, Tensor


def convolution(state: State, node: ir.Node) -> None:
    """A convolution, its image and its result with channels last."""
    match = match_conv(node)
    if match is None:
        return
    final = [view.outputs[0] for view in match.views if is_standard(view, "Transpose")]
    patches = match.kind == "patches"
    if patches and len(final) == len(match.result.consumers()) == 1:
        _patch_product(state, node, [node, *match.views])
        return
    # All that turns it to channels last is another name for the same memory.
    state.claimed.update(match.views)
    place = final[0] if final else match.result
    state.same.update((value, place) for value in (match.result, *final) if value is not place)
    state.channels_last.add(match.result)
    y = state.tensor(place)
    if patches:
        _patch_product(state, node, [node])
    else:
        _convolve(state, match, y)


def _convolve(state: State, match: ConvMatch, y: str) -> None:
    """The call of a convolution, and of the Relu after it, whose result is `y`."""
    node = match.node
    x, layout = _image(state, input_of(node, 0))
    weight = constant(node.inputs[1])
    assert weight is not None
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    (batch, c, h, w), n = shape_of(input_of(node, 0)), weight.shape[0]
    stride_h, stride_w = node.attributes.get_ints("strides", (1, 1))
    pad_h, pad_w = node.attributes.get_ints("pads", (0, 0))[:2]
    kernel = Conv(
        batch=batch,
        h=h,
        w=w,
        c=c,
        n=n,
        kernel_h=weight.shape[2],
        kernel_w=weight.shape[3],
        stride_h=stride_h,
        stride_w=stride_w,
        pad_h=pad_h,
        pad_w=pad_w,
        depthwise=match.kind == "depthwise",
        relu=match.relu is not None,
        layout=layout,
    )
    rows = weight.transpose(2, 3, 1, 0).reshape(-1, n)
    call = Call(
        kernel=kernel,
        label=label(node),
        reads={"x": x},
        writes={"y": y},
        constants={"w": np.ascontiguousarray(rows, np.float32), "bias": float_bias(bias, n)},
    )
    state.cover([node] if match.relu is None else [node, match.relu], call)


def _image(state: State, value: ir.Value) -> tuple[str, Literal["nhwc", "nchw"]]:
    """The tensor that holds an image, (batch, c, h, w) in the graph, and how."""
    if value in state.channels_last:
        return state.tensor(value), "nhwc"
    source = channels_last_source(value)
    if source is None:
        return state.tensor(value), "nchw"
    to_first = value.producer()
    if to_first is not None and only_reader(value) is not None:
        state.claimed.add(to_first)
    return state.tensor(source), "nhwc"


def _patch_product(state: State, node: ir.Node, covered: list[ir.Node]) -> None:
    """A convolution whose patches do not overlap: patches as rows, then a product."""
    x, w = input_of(node, 0), input_of(node, 1)
    source = state.dequantized(x)
    quantize = None if source is None else state.root(input_of(source, 0)).producer()
    if quantize is None or not is_standard(quantize, "QuantizeLinear"):
        source = None  # integers, but not of an image that could be quantized as it is cut
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    product = product_of(covered, source, w, bias)

    quant: dict[str, Array] = {}
    alone = False
    name, scale, zero_point = f"{node.outputs[0].name}_patches", 0.0, 0
    if product.act == "int8":
        # Patches are cut and quantized in one go. If this alone reads the integers, they keep the
        # name of the QuantizeLinear's output, whose values they are, in another order.
        assert source is not None
        assert quantize is not None
        scale, zero_point = scalar_quantization(quantize)
        quant["quant"] = quant_args(scale, zero_point)
        x = input_of(quantize, 0)
        alone = all(only_reader(pair.outputs[0]) is not None for pair in (quantize, source))
        if alone:
            name = str(quantize.outputs[0].name)
            state.claimed.update((quantize, source))
    image, layout = _image(state, x)
    batch, c, height, width = shape_of(x)
    _, _, grid_h, grid_w = shape_of(node.outputs[0])
    patch_h, patch_w = height // grid_h, width // grid_w
    state.tensors[name] = Tensor(
        name=name,
        dtype=product.act,
        shape=(product.m, product.k),
        scale=scale,
        zero_point=zero_point,
    )
    # Pixel (b, c, y, x) lies in row (b, y // patch_h, x // patch_w) of patches.
    pixels = np.arange(product.m * product.k)
    if layout == "nchw":
        pixels = pixels.reshape(batch, grid_h, grid_w, c, patch_h, patch_w)
        pixels = pixels.transpose(0, 3, 1, 4, 2, 5)
    else:
        pixels = pixels.reshape(batch, grid_h, grid_w, patch_h, patch_w, c)
        pixels = pixels.transpose(0, 5, 1, 3, 2, 4)
        _put_channels_last(product, c, patch_h, patch_w)
    if alone:
        state.stored_in[name] = name, pixels.reshape(batch, c, height, width)
    patches = Call(
        kernel=Patchify(
            batch=batch,
            # With channels last, a line of a patch is one run of all channels.
            channels=c if layout == "nchw" else 1,
            grid_h=grid_h,
            grid_w=grid_w,
            patch_h=patch_h,
            patch_w=patch_w if layout == "nchw" else patch_w * c,
            out=product.act,
        ),
        label=f"{label(node)}/patches",
        reads={"x": image},
        writes={"y": name},
        constants=quant,
    )
    dense(state, product, name, before=patches)


def _put_channels_last(product: Product, c: int, patch_h: int, patch_w: int) -> None:
    """Sorts the rows of the weights as patches (patch_h, patch_w, c) are."""
    weights = product.constants["w"].reshape(c, patch_h, patch_w, product.n)
    product.constants["w"] = np.ascontiguousarray(
        weights.transpose(1, 2, 0, 3).reshape(product.k, product.n)
    )
