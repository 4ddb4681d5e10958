"""Finds self-attention and token selection in a graph, whatever the exporter made of them.

Exporters write the moves between a qkv product and the heads in many ways. They are not matched
one by one: each operand is followed back to the product, the moves are applied to an array of
indices, and the result is compared with the layout that the kernel has.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from gfcompile.targets.onnx_values import (
    constant,
    dtype_of,
    is_standard,
    scalar_quantization,
    shape_of,
)
from gfcompile.targets.tvm.kernel import Array

_MOVES = ("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Gather", "Identity")


@dataclass(frozen=True, kw_only=True)
class Operand:
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
class AttentionMatch:
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
    q: Operand
    k: Operand
    v: Operand
    covered: tuple[ir.Node, ...]

    @property
    def is_int8(self) -> bool:
        return self.q.quantize is not None


def match_attention(softmax: ir.Node) -> AttentionMatch | None:
    """The self-attention around a Softmax node, if it is one that the kernel computes."""
    if not is_standard(softmax, "Softmax") or softmax.attributes.get_int("axis", -1) not in (-1, 3):
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
    dim = shape_of(_operand(product, 0))[3]

    # After the softmax: quantization with its fixed scale, the product with v, heads side by side.
    node, value = _only_reader(softmax.outputs[0]), softmax.outputs[0]
    quantized = node is not None and is_standard(node, "QuantizeLinear")
    if quantized:
        assert node is not None
        scale_of_p, zero_point = scalar_quantization(node)
        if (scale_of_p, zero_point) != (1 / 256, -128):
            return None
        covered.append(node)
        dequantize = _only_reader(node.outputs[0])
        if dequantize is None or not is_standard(dequantize, "DequantizeLinear"):
            return None
        covered.append(dequantize)
        value = dequantize.outputs[0]
        node = _only_reader(value)
    if node is None or not is_standard(node, "MatMul") or node.inputs[0] is not value:
        return None
    covered.append(node)
    q, k = _operand_of(_operand(product, 0)), _operand_of(_operand(product, 1))
    v = _operand_of(_operand(node, 1))
    if q is None or k is None or v is None or not q.source is k.source is v.source:
        return None
    if any((operand.quantize is not None) != quantized for operand in (q, k, v)):
        return None
    index = np.arange(batch * tokens * 3 * heads * dim).reshape(batch, tokens, 3, heads, dim)
    if math.prod(shape_of(q.source)) != index.size:
        return None
    wanted = [index[:, :, part].transpose(0, 2, 1, 3) for part in range(3)]
    wanted[1] = wanted[1].transpose(0, 1, 3, 2)
    uses = (_operand(product, 0), _operand(product, 1), _operand(node, 1))
    for use, places in zip(uses, wanted, strict=True):
        if not np.array_equal(layout(use, q.source), places):
            return None
    transpose = _only_reader(node.outputs[0])
    if transpose is None or not is_standard(transpose, "Transpose"):
        return None
    if tuple(transpose.attributes.get_ints("perm")) != (0, 2, 1, 3):
        return None
    covered = [*q.nodes, *k.nodes, *v.nodes, *covered]
    # What else reads one of these values would miss it.
    covered = [*dict.fromkeys(covered), transpose]
    outputs = [output for replaced in covered[:-1] for output in replaced.outputs]
    if any(use not in covered for output in outputs for use in output.consumers()):
        return None
    return AttentionMatch(
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


@dataclass(frozen=True, kw_only=True)
class SelectionMatch:
    """Rows gathered by the best of their scores.

    Attributes:
        scores: (batch, tokens).
        rows: what is gathered from: (batch, all tokens, n) in memory.
        leading: how many rows are always kept, first.
        offset: of the first scored row.
        covered: from TopK to Gather.
    """

    batch: int
    tokens: int
    kept: int
    all_tokens: int
    leading: int
    offset: int
    scores: ir.Value
    rows: ir.Value
    covered: tuple[ir.Node, ...]


def match_selection(top: ir.Node) -> SelectionMatch | None:
    """The selection that a TopK node begins, up to the Gather that reads its indices."""
    if not is_standard(top, "TopK") or len(top.outputs) != 2 or top.outputs[0].consumers():
        return None
    scores = _operand(top, 0)
    if len(shape_of(scores)) != 2 or top.attributes.get_int("axis", -1) not in (-1, 1):
        return None
    if top.attributes.get_int("largest", 1) != 1:
        return None
    (batch, tokens), (_, kept) = shape_of(scores), shape_of(top.outputs[1])
    chain: list[ir.Node] = []
    value = top.outputs[1]
    while True:
        node = _only_reader(value)
        if node is None:
            return None
        if is_standard(node, "Gather"):
            break
        if any(constant(x) is None for x in node.inputs if x is not None and x is not value):
            return None
        chain.append(node)
        value = node.outputs[0]
    rows = _operand(node, 0)
    if node.inputs[1] is not value or node.attributes.get_int("axis", 0) != 0:
        return None
    if len(shape_of(rows)) != 2 or shape_of(rows)[0] % batch:
        return None
    all_tokens = shape_of(rows)[0] // batch
    gathered = math.prod(shape_of(value)) // batch
    leading = gathered - kept
    # What the chain makes of any indices: that of each image's own rows, moved by an offset.
    generator = np.random.default_rng(0)
    offset = None
    for _ in range(2):
        chosen = generator.integers(0, tokens, (batch, kept))
        made = _evaluate(chain, top.outputs[1], chosen).reshape(batch, gathered)
        made = made - np.arange(batch)[:, None] * all_tokens
        offsets = np.unique(made[:, leading:] - chosen)
        same = offsets.size == 1 and offset in (None, int(offsets[0]))
        if not same or not (made[:, :leading] == np.arange(leading)).all():
            return None
        offset = int(offsets[0])
    assert offset is not None
    if offset < 0 or offset + tokens > all_tokens:
        return None
    return SelectionMatch(
        batch=batch,
        tokens=tokens,
        kept=kept,
        all_tokens=all_tokens,
        leading=leading,
        offset=offset,
        scores=scores,
        rows=rows,
        covered=(top, *chain, node),
    )


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _operand_of(use: ir.Value) -> Operand | None:
    """Follows an operand of attention back through moves and at most one QDQ pair."""
    nodes: list[ir.Node] = []
    quantize = None
    value = use
    while True:
        node = value.producer()
        if node is None or not is_standard(node, *_MOVES, "DequantizeLinear"):
            return Operand(source=value, nodes=tuple(nodes), quantize=quantize)
        if is_standard(node, "DequantizeLinear"):
            source = _operand(node, 0).producer()
            if quantize is not None or source is None or not is_standard(source, "QuantizeLinear"):
                return None
            if dtype_of(source.outputs[0]) != "int8":
                return None
            quantize = source
            nodes += [node, source]
            value = _operand(source, 0)
        else:
            nodes.append(node)
            value = _operand(node, 0)


def layout(use: ir.Value, source: ir.Value) -> Array:
    """Where each element of `use` lies in `source`, as flat indices."""
    shape = shape_of(source)
    if use is source:
        return np.arange(math.prod(shape)).reshape(shape)
    node = use.producer()
    assert node is not None
    moved = layout(_operand(node, 0), source)
    if is_standard(node, "QuantizeLinear", "DequantizeLinear"):
        return moved
    return _evaluate([node], _operand(node, 0), moved, use)


def _evaluate(
    nodes: list[ir.Node], given: ir.Value, array: Array, result: ir.Value | None = None
) -> Array:
    """What `nodes` make of `array` in place of `given`, all else being constant."""
    if not nodes:
        return array
    result = result or nodes[-1].outputs[0]
    constants = {
        str(value.name): constant(value)
        for node in nodes
        for value in node.inputs
        if value is not None and value is not given and constant(value) is not None
    }
    element = onnx.TensorProto.INT64
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "moves",
        [onnx.helper.make_tensor_value_info(str(given.name), element, array.shape)],
        [onnx.helper.make_tensor_value_info(str(result.name), element, None)],
        [
            onnx.numpy_helper.from_array(np.asarray(value), name)
            for name, value in constants.items()
        ],
    )
    owner = nodes[0].graph
    version = owner.opset_imports[""] if owner is not None else 20
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])
    (made,) = ReferenceEvaluator(model).run(None, {str(given.name): array.astype(np.int64)})
    return np.asarray(made)
