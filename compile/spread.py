"""How far evaluations of one int8 graph lie apart for no other reason than rounding."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfcompile.compile.ledger import Int8Agreement
from gfcompile.targets.onnx_values import constant

Array = npt.NDArray[Any]

_SEEDS = 4


class Evaluate(Protocol):
    """The logits of the same images by a graph, as it is written or optimized by ONNX Runtime."""

    def __call__(self, model: ir.Model, *, optimize: bool = False) -> list[Array]: ...


def allow_for_ties(
    agreement: Int8Agreement,
    model: ir.Model,
    evaluate: Evaluate,
    reference: Sequence[Array],
    *,
    same_ties: Callable[[], Sequence[Array]] | None = None,
) -> Int8Agreement:
    """The agreement, with what ties do to `model` where it needs that to be one.

    Args:
        reference: the logits of `model` as it is written.
        same_ties: makes those it has where activations that an artifact rounded otherwise are the
            artifact's. A single one may carry far, and others moved at random tell nothing of it.
    """
    if agreement.logits_agree:
        return agreement
    others = other_evaluations(model, evaluate, flipped=1 - agreement.equal)
    with_same = [] if same_ties is None else [same_ties()]
    return agreement.with_own_spread(reference, [*others, *with_same])


def other_evaluations(
    model: ir.Model, evaluate: Evaluate, *, flipped: float
) -> Iterator[list[Array]]:
    """Logits of `model` that are as right as those it has as it is written.

    A value next to a rounding tie may fall to either side, and a whole step then goes on from
    there. ONNX Runtime's optimized form rounds elsewhere; and so does an artifact, whose
    approximations are good to a small part of a step. As many values as it moved to the other side
    are moved here, but others.

    Args:
        flipped: the share of int8 activations that an artifact has on the other side.
    """
    yield evaluate(model, optimize=True)
    for seed in range(_SEEDS if flipped else 0):
        yield evaluate(with_flips(model, flipped, seed))


def with_flips(model: ir.Model, flipped: float, seed: int) -> ir.Model:
    """A copy of `model` that rounds about a share `flipped` of its activations the other way.

    Noise of up to +-a steps before it is rounded moves a share a / 2 of values that lie anywhere
    between two steps.
    """
    rng = np.random.default_rng(seed)
    noisy = model.clone()
    for node in [node for node in noisy.graph if node.op_type == "QuantizeLinear"]:
        value, scale = node.inputs[0], constant(node.inputs[1])
        assert value is not None
        assert value.shape is not None
        assert scale is not None
        noise = rng.uniform(-2 * flipped, 2 * flipped, value.shape.numpy()) * scale.astype(
            np.float32
        )
        name = f"{node.outputs[0].name}/noise"
        source = ir.Value(name=name, const_value=ir.tensor(noise.astype(np.float32), name=name))
        noisy.graph.register_initializer(source)
        added = ir.node("Add", [value, source])
        noisy.graph.insert_before(node, added)
        node.replace_input_with(0, added.outputs[0])
    return noisy
