"""Finds the convolutions that kernels compute with channels last, in a graph that has them second.

A convolution's result is stored with channels last where everything that reads it either wants it
so (a Transpose there) or is a convolution of the same kind. No value is ever transposed for that.
"""

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from gfcompile.targets.onnx_values import (
    constant,
    dtype_of,
    input_of,
    is_standard,
    only_reader,
    shape_of,
)

_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1)}  # by rank: the Transpose to channels last
_FIRST = (0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class ConvMatch:
    """A convolution, and the nodes around it that its kernel stands for.

    Attributes:
        kind: "patches" if it cuts its input into patches that do not overlap.
        relu: the Relu that alone reads it; never with "patches".
        views: what turns the result to channels last.
    """

    node: ir.Node
    kind: Literal["patches", "dense", "depthwise"]
    relu: ir.Node | None
    views: tuple[ir.Node, ...]

    @property
    def result(self) -> ir.Value:
        """What the kernel computes, (batch, n, h, w) in the graph."""
        return (self.relu or self.node).outputs[0]


def match_conv(node: ir.Node) -> ConvMatch | None:
    """How a Conv node is computed with channels last; None where it cannot be."""
    match = _giving_channels_last(node)
    if match is not None and match.kind == "depthwise":
        # It has no way to read channels that are not last.
        x = input_of(node, 0)
        if channels_last_source(x) is None and _convolution_behind(x) is None:
            return None
    return match


def channels_last_source(value: ir.Value) -> ir.Value | None:
    """What `value` (batch, c, h, w) is the Transpose of, if that has channels last."""
    node = value.producer()
    if node is None or not is_standard(node, "Transpose"):
        return None
    return node.inputs[0] if tuple(node.attributes.get_ints("perm")) == _FIRST else None


def _convolution_behind(value: ir.Value) -> ConvMatch | None:
    """The convolution that gives `value` with channels last."""
    node = value.producer()
    if node is not None and is_standard(node, "Relu") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    match = None if node is None else match_conv(node)
    return match if match is not None and match.result is value else None


def _giving_channels_last(node: ir.Node) -> ConvMatch | None:
    """The match of a Conv node, but for what its input must be."""
    kind = _kind(node)
    if kind is None:
        return None
    relu = only_reader(node.outputs[0], "Relu")
    if relu is not None and kind == "patches":
        kind = "dense"
    result = (relu or node).outputs[0]
    views = _views(result)
    if views is None:
        return None
    return ConvMatch(node=node, kind=kind, relu=relu, views=views)


def _views(result: ir.Value) -> tuple[ir.Node, ...] | None:
    """The nodes that turn `result` to channels last, if other readers are convolutions alone."""
    if result.is_graph_output():
        return None
    views: list[ir.Node] = []
    for reader in result.consumers():
        if _reads_channels_last(reader):
            continue
        flat = reader.outputs[0]
        if _is_transpose_to_last(reader):
            views.append(reader)
        elif (
            is_standard(reader, "Reshape")
            and shape_of(flat)[:2] == shape_of(result)[:2]
            and len(shape_of(flat)) == 3
            and not flat.is_graph_output()
            and all(_is_transpose_to_last(node) for node in flat.consumers())
        ):
            views += [reader, *flat.consumers()]
        else:
            return None
    return tuple(views)


def _reads_channels_last(reader: ir.Node) -> bool:
    """Whether a reader is a convolution of ours, or what quantizes the image for one."""
    if is_standard(reader, "QuantizeLinear", "DequantizeLinear"):
        uses = reader.outputs[0].consumers()
        return (
            bool(uses)
            and all(
                is_standard(use, "DequantizeLinear")
                if is_standard(reader, "QuantizeLinear")
                else _kind(use) == "patches"
                for use in uses
            )
            and all(_reads_channels_last(use) for use in uses)
        )
    return _kind(reader) is not None and _giving_channels_last(reader) is not None


def _is_transpose_to_last(node: ir.Node) -> bool:
    if not is_standard(node, "Transpose"):
        return False
    perm = tuple(node.attributes.get_ints("perm"))
    return perm == _LAST.get(len(perm))


def _kind(node: ir.Node) -> Literal["patches", "dense", "depthwise"] | None:
    """What sort of convolution a node is, if kernels have it."""
    if not is_standard(node, "Conv"):
        return None
    x, weight = input_of(node, 0), constant(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or weight.ndim != 4 or (bias is not None and constant(bias) is None):
        return None
    attributes = node.attributes
    pads = tuple(attributes.get_ints("pads", (0, 0, 0, 0)))
    if (
        dtype_of(x) != "float32"
        or attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        or tuple(attributes.get_ints("dilations", (1, 1))) != (1, 1)
        or pads[:2] != pads[2:]
    ):
        return None
    n, per_group, *patch = weight.shape
    strides = tuple(attributes.get_ints("strides", (1, 1)))
    (_, channels, height, width), (_, _, grid_h, grid_w) = shape_of(x), shape_of(node.outputs[0])
    group = attributes.get_int("group", 1)
    if group != 1:
        return "depthwise" if group == channels == n and per_group == 1 else None
    whole = (height, width) == (grid_h * patch[0], grid_w * patch[1])
    return "patches" if whole and strides == tuple(patch) and not any(pads) else "dense"
