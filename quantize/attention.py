"""Finds attention in an exported graph: a softmax between two products of activations."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

__all__ = ["Attention", "Edge", "find_attentions", "module_name"]

aten = torch.ops.aten
Part = Literal["q", "k", "v"]

_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
_SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})
_MOVES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.expand.default,
        aten.dropout.default,  # of a module in evaluation mode
    }
)
# What lies between the first product and its softmax, one of whose operands is the product.
_SCORING = _MOVES | {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
}


@dataclass(frozen=True, kw_only=True)
class Edge:
    """Operand number `index` of `user`."""

    user: fx.Node
    index: int

    @property
    def source(self) -> fx.Node:
        source = self.user.args[self.index]
        assert isinstance(source, fx.Node), (self.user, self.index)
        return source


@dataclass(frozen=True, kw_only=True)
class Attention:
    """softmax(scale * q @ k.T + ...) @ v, whatever leads to q, k and v.

    Attributes:
        name: that of the module in which the softmax is.
        operands: where q, k and v enter; k before it is transposed for the product, so that all
            three have the layout (..., tokens, channels).
        softmax: its node.
        weights: where the softmax's result enters the second product.
    """

    name: str
    operands: dict[Part, Edge]
    softmax: fx.Node
    weights: Edge


def find_attentions(graph: fx.Graph) -> Iterator[Attention]:
    """Every attention of the graph, in the order in which they run, under names of their own."""
    names: set[str] = set()
    for node in graph.nodes:
        if node.target not in _SOFTMAXES:
            continue
        scores = _product_behind(node.args[0])
        weights = _product_ahead(node)
        if scores is None or weights is None or weights.index != 0:
            continue
        values = Edge(user=weights.user, index=1)
        if values.source.op == "get_attr":
            continue
        name = module_name(node)
        if name in names:
            name = f"{name}.{node.name}"
        names.add(name)
        yield Attention(
            name=name,
            operands={
                "q": Edge(user=scores, index=0),
                "k": _before_transposition(Edge(user=scores, index=1)),
                "v": values,
            },
            softmax=node,
            weights=weights,
        )


def _product_behind(value: object) -> fx.Node | None:
    """The product of activations that `value` is computed from, element by element."""
    if not isinstance(value, fx.Node):
        return None
    if value.target in _PRODUCTS:
        constant = any(operand.op == "get_attr" for operand in value.all_input_nodes)
        return None if constant else value
    if value.target in _SCORING:
        found = (_product_behind(operand) for operand in value.all_input_nodes)
        return next((product for product in found if product is not None), None)
    return None


def _product_ahead(value: fx.Node) -> Edge | None:
    """The product that `value` enters as it is, if there is one and no more."""
    products = []
    for user in value.users:
        if user.target in _PRODUCTS:
            products += [
                Edge(user=user, index=index) for index in (0, 1) if user.args[index] is value
            ]
        elif user.target in _MOVES:
            further = _product_ahead(user)
            products += [] if further is None else [further]
    return products[0] if len(products) == 1 else None


def _before_transposition(edge: Edge) -> Edge:
    """The operand before its last two axes were exchanged, if that was done for this use only."""
    node = edge.source
    if len(node.users) > 1:
        return edge
    rank = node.meta["val"].ndim
    order = list(range(rank))
    match node.target, node.args:
        case aten.transpose.int, (_, int(one), int(other)):
            order[one], order[other] = order[other], order[one]
        case aten.mT.default, _:
            order[-2:] = rank - 1, rank - 2
        case aten.permute.default, (_, [*axes]):
            order = [axis % rank for axis in axes if isinstance(axis, int)]
    exchanged = [*range(rank - 2), rank - 1, rank - 2]
    return Edge(user=node, index=0) if order == exchanged else edge


def module_name(node: fx.Node) -> str:
    """The name of the module whose code the node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return (paths[-1] if paths else "") or node.name
