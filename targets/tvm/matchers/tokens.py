"""Tokens: which are chosen, by the best of their scores, their rows, and the mean of all."""

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gfcompile.targets.onnx_values import (
    constant,
    input_of,
    is_along_last_axis,
    is_standard,
    only_reader,
    shape_of,
)
from gfcompile.targets.tvm.kernel import (
    GatherRows,
    InversePermutation,
    SelectTokens,
    TokenMean,
)
from gfcompile.targets.tvm.matchers.moves import evaluate
from gfcompile.targets.tvm.matchers.state import State, label
from gfcompile.targets.tvm.program import Call, Selection, Tensor


@dataclass(frozen=True, kw_only=True)
class _Rows:
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


def top_k(state: State, node: ir.Node) -> None:
    """TopK of which only the indices are wanted, by what becomes of them."""
    values = node.outputs[0]
    if values.consumers() or values.is_graph_output():
        return
    rows = _match_rows(node)
    if rows is not None:
        _select_rows(state, node, rows)
    elif _is_inversion(node):
        _invert(state, node)
    elif _chooses_largest(node):
        _select(state, node)


def _select_rows(state: State, node: ir.Node, match: _Rows) -> None:
    """TopK, whatever moves its indices, and the Gather of the rows that they name."""
    gather = match.covered[-1]
    chosen = f"{node.outputs[1].name}_rows"
    kept = match.leading + match.kept
    state.tensors[chosen] = Tensor(name=chosen, dtype="int32", shape=(match.batch, kept))
    state.selections.append(
        Selection(
            graph_value=str(node.outputs[1].name),
            tensor=chosen,
            leading=match.leading,
            offset=match.offset,
        )
    )
    select = Call(
        kernel=SelectTokens(
            batch=match.batch,
            tokens=match.tokens,
            kept=match.kept,
            offset=match.offset,
            leading=match.leading,
        ),
        label=label(node),
        reads={"scores": state.tensor(match.scores)},
        writes={"y": chosen},
    )
    rows = Call(
        kernel=GatherRows(
            batch=match.batch,
            tokens=match.all_tokens,
            kept=kept,
            n=shape_of(match.rows)[-1],
        ),
        label=label(gather),
        reads={"x": state.tensor(match.rows), "indices": chosen},
        writes={"y": state.tensor(gather.outputs[0])},
    )
    state.cover(match.covered, select, rows)


def _select(state: State, node: ir.Node) -> None:
    """TopK whose indices go elsewhere than into one Gather of rows."""
    scores, indices = input_of(node, 0), node.outputs[1]
    *outer, tokens = shape_of(scores)
    name = str(indices.name)
    state.selections.append(Selection(graph_value=name, tensor=name, leading=0, offset=0))
    call = Call(
        kernel=SelectTokens(
            batch=math.prod(outer), tokens=tokens, kept=shape_of(indices)[-1], index="int64"
        ),
        label=label(node),
        reads={"scores": state.tensor(scores)},
        writes={"y": state.tensor(indices)},
    )
    state.cover([node], call)


def _invert(state: State, node: ir.Node) -> None:
    """TopK as the inverse of the permutation that it puts into order."""
    order = input_of(node, 0)
    *outer, n = shape_of(order)
    call = Call(
        kernel=InversePermutation(batch=math.prod(outer), n=n),
        label=label(node),
        reads={"x": state.tensor(order)},
        writes={"y": state.tensor(node.outputs[1])},
    )
    state.cover([node], call)


def token_mean(state: State, node: ir.Node) -> None:
    """The mean of each image's tokens."""
    x = input_of(node, 0)
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if (
        axes is None
        or axes.size != 1
        or int(axes.reshape(-1)[0]) not in (1, -2)
        or len(shape_of(x)) != 3
    ):
        return
    batch, tokens, n = shape_of(x)
    state.add(
        [node],
        lambda out: TokenMean(batch=batch, tokens=tokens, n=n, out=out),
        {"x": state.tensor(x)},
        {},
    )


def _chooses_largest(top: ir.Node) -> bool:
    """Whether a TopK takes the largest along the last axis."""
    rank = len(shape_of(input_of(top, 0)))
    return is_along_last_axis(top, rank) and top.attributes.get_int("largest", 1) == 1


def _is_inversion(top: ir.Node) -> bool:
    """Whether a TopK puts all of another TopK's indices into order: their inverse."""
    order = input_of(top, 0)
    source = order.producer()
    return (
        source is not None
        and is_standard(source, "TopK")
        and order is source.outputs[1]
        and shape_of(order) == shape_of(input_of(source, 0)) == shape_of(top.outputs[1])
        and top.attributes.get_int("largest", 1) == 0
        and is_along_last_axis(top, len(shape_of(order)))
    )


def _match_rows(top: ir.Node) -> _Rows | None:
    """The selection that a TopK node begins, up to the Gather that reads its indices."""
    scores = input_of(top, 0)
    if len(shape_of(scores)) != 2 or not _chooses_largest(top):
        return None
    (batch, tokens), (_, kept) = shape_of(scores), shape_of(top.outputs[1])
    chain: list[ir.Node] = []
    value = top.outputs[1]
    while True:
        node = only_reader(value)
        if node is None:
            return None
        if is_standard(node, "Gather"):
            break
        if any(constant(x) is None for x in node.inputs if x is not None and x is not value):
            return None
        chain.append(node)
        value = node.outputs[0]
    rows = input_of(node, 0)
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
        made = evaluate(chain, top.outputs[1], chosen).reshape(batch, gathered)
        made = made - np.arange(batch)[:, None] * all_tokens
        offsets = np.unique(made[:, leading:] - chosen)
        same = offsets.size == 1 and offset in (None, int(offsets[0]))
        if not same or not (made[:, :leading] == np.arange(leading)).all():
            return None
        offset = int(offsets[0])
    assert offset is not None
    if offset < 0 or offset + tokens > all_tokens:
        return None
    return _Rows(
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
