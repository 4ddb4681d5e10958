"""Self-attention, whatever the exporter made of it.

Exporters write the moves between a qkv product and the heads in many ways. They are not matched
one by one: each operand is followed back to the product, the moves are applied to an array of
indices, and the result is compared with the layout that the kernel has.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gfcompile.targets.onnx_values import (
    constant,
    dtype_of,
    input_of,
    is_along_last_axis,
    is_standard,
    only_reader,
    scalar_quantization,
    shape_of,
)
from gfcompile.targets.tvm.kernel import Act, Array, Attention, quant_args
from gfcompile.targets.tvm.matchers.moves import evaluate
from gfcompile.targets.tvm.matchers.state import State
from gfcompile.targets.tvm.program import Tensor

_MOVES = ("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Gather", "Identity")


@dataclass(frozen=True, kw_only=True)
class _Operand:
    """q, k or v: the value it comes from, and its quantization if it has one.

    Attributes:
        source: the qkv product's result.
        nodes: between source and use, in no order.
        quantize: the QuantizeLinear on the way.
    """

    source: ir.Value
    nodes: tuple[ir.Node, ...]
    quantize: ir.Node | None


@dataclass(frozen=True, kw_only=True)
class _Match:
    """One self-attention: its sizes, its operands and the nodes that it replaces.

    Attributes:
        scale: what the products of q and k are multiplied by.
        covered: from the operands' moves to the last node, which gives (batch, tokens, channels).
    """

    batch: int
    tokens: int
    heads: int
    dim: int
    scale: float
    q: _Operand
    k: _Operand
    v: _Operand
    covered: tuple[ir.Node, ...]

    @property
    def is_int8(self) -> bool:
        return self.q.quantize is not None


def attention(state: State, node: ir.Node) -> None:
    """Softmax between two products of activations, with all the moves around them."""
    match = _match(node)
    if match is None:
        return
    s_scale, o_scale, zeros = match.scale, 1.0, [0, 0, 0]
    x = None
    if match.is_int8:
        pairs = []
        x = f"{match.q.source.name}_int8"
        for operand in (match.q, match.k, match.v):
            assert operand.quantize is not None
            pairs.append(scalar_quantization(operand.quantize))
            value = operand.quantize.outputs[0]
            state.stored_in[str(value.name)] = x, _layout(value, operand.source)
        shape = (match.batch * match.tokens, 3 * match.heads * match.dim)
        state.tensors[x] = Tensor(name=x, dtype="int8", shape=shape)
        state.grouped[match.q.source] = x, np.stack([quant_args(*pair) for pair in pairs])
        s_scale *= pairs[0][0] * pairs[1][0]
        o_scale = pairs[2][0] / 256
        zeros = [zero_point for _, zero_point in pairs]
    act: Act = "int8" if match.is_int8 else "float32"
    state.add(
        match.covered,
        lambda out: Attention(
            batch=match.batch,
            tokens=match.tokens,
            heads=match.heads,
            dim=match.dim,
            x=act,
            out=out,
        ),
        {"x": x or state.tensor(match.q.source)},
        {"params": np.array([s_scale, *zeros, o_scale], np.float32)},
    )


def _match(softmax: ir.Node) -> _Match | None:
    """The self-attention around a Softmax node, if it is one that the kernel computes."""
    if not is_along_last_axis(softmax, rank=4):
        return None
    scores, covered, scale = softmax.inputs[0], [softmax], 1.0
    product = None if scores is None else scores.producer()
    if product is not None and is_standard(product, "Mul"):
        factor = next((c for c in map(constant, product.inputs) if c is not None), None)
        data = next((x for x in product.inputs if constant(x) is None), None)
        if factor is None or factor.size != 1 or data is None:
            return None
        scale = float(factor.reshape(-1)[0])
        covered.append(product)
        product = data.producer()
    if product is None or not is_standard(product, "MatMul"):
        return None
    covered.append(product)
    shape = shape_of(product.outputs[0])
    if len(shape) != 4 or shape[2] != shape[3]:
        return None
    batch, heads, tokens, _ = shape
    dim = shape_of(input_of(product, 0))[3]

    # After the softmax: quantization with its fixed scale, the product with v, heads side by side.
    node, value = only_reader(softmax.outputs[0]), softmax.outputs[0]
    quantized = node is not None and is_standard(node, "QuantizeLinear")
    if quantized:
        assert node is not None
        scale_of_p, zero_point = scalar_quantization(node)
        if (scale_of_p, zero_point) != (1 / 256, -128):
            return None
        covered.append(node)
        dequantize = only_reader(node.outputs[0], "DequantizeLinear")
        if dequantize is None:
            return None
        covered.append(dequantize)
        value = dequantize.outputs[0]
        node = only_reader(value)
    if node is None or not is_standard(node, "MatMul") or node.inputs[0] is not value:
        return None
    covered.append(node)
    q, k = _operand_of(input_of(product, 0)), _operand_of(input_of(product, 1))
    v = _operand_of(input_of(node, 1))
    if q is None or k is None or v is None or not q.source is k.source is v.source:
        return None
    if any((operand.quantize is not None) != quantized for operand in (q, k, v)):
        return None
    index = np.arange(batch * tokens * 3 * heads * dim).reshape(batch, tokens, 3, heads, dim)
    if math.prod(shape_of(q.source)) != index.size:
        return None
    wanted = [index[:, :, part].transpose(0, 2, 1, 3) for part in range(3)]
    wanted[1] = wanted[1].transpose(0, 1, 3, 2)
    uses = (input_of(product, 0), input_of(product, 1), input_of(node, 1))
    for use, places in zip(uses, wanted, strict=True):
        if not np.array_equal(_layout(use, q.source), places):
            return None
    transpose = only_reader(node.outputs[0], "Transpose")
    if transpose is None:
        return None
    if tuple(transpose.attributes.get_ints("perm")) != (0, 2, 1, 3):
        return None
    covered = [*q.nodes, *k.nodes, *v.nodes, *covered]
    # What else reads one of these values would miss it.
    covered = [*dict.fromkeys(covered), transpose]
    outputs = [output for replaced in covered[:-1] for output in replaced.outputs]
    if any(use not in covered for output in outputs for use in output.consumers()):
        return None
    return _Match(
        batch=batch,
        tokens=tokens,
        heads=heads,
        dim=dim,
        scale=scale,
        q=q,
        k=k,
        v=v,
        covered=tuple(covered),
    )


def _operand_of(use: ir.Value) -> _Operand | None:
    """Follows an operand of attention back through moves and at most one QDQ pair."""
    nodes: list[ir.Node] = []
    quantize = None
    value = use
    while True:
        node = value.producer()
        if node is None or not is_standard(node, *_MOVES, "DequantizeLinear"):
            return _Operand(source=value, nodes=tuple(nodes), quantize=quantize)
        if is_standard(node, "DequantizeLinear"):
            source = input_of(node, 0).producer()
            if quantize is not None or source is None or not is_standard(source, "QuantizeLinear"):
                return None
            if dtype_of(source.outputs[0]) != "int8":
                return None
            quantize = source
            nodes += [node, source]
            value = input_of(source, 0)
        else:
            nodes.append(node)
            value = input_of(node, 0)


def _layout(use: ir.Value, source: ir.Value) -> Array:
    """Where each element of `use` lies in `source`, as flat indices."""
    shape = shape_of(source)
    if use is source:
        return np.arange(math.prod(shape)).reshape(shape)
    node = use.producer()
    assert node is not None
    moved = _layout(input_of(node, 0), source)
    if is_standard(node, "QuantizeLinear", "DequantizeLinear"):
        return moved
    return evaluate([node], input_of(node, 0), moved, use)
