"""How far evaluations of one graph lie apart for no other reason than rounding."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

_MOVED = 4  # graphs


class Evaluate(Protocol):
    """The logits of the same images by a graph, as it is written or optimized by ONNX Runtime."""

    def __call__(self, model: ir.Model, *, optimize: bool = False) -> list[Array]: ...


def other_evaluations(model: ir.Model, evaluate: Evaluate) -> Iterator[list[Array]]:
    """Logits of `model` that are as right as those it has as it is written.

    In an int8 graph a value next to a rounding tie may fall to either side, and a whole step then
    goes on from there. Which values do depends on how floats are rounded: ONNX Runtime's optimized
    form rounds elsewhere, and so does the same graph with its constants moved by a unit in the last
    place, which is what any of them may be off by.
    """
    yield evaluate(model, optimize=True)
    for seed in range(_MOVED):
        yield evaluate(moved_by_rounding(model, seed))


def moved_by_rounding(model: ir.Model, seed: int) -> ir.Model:
    """A copy of `model` with each float32 constant left alone or moved to a neighbouring float."""
    rng = np.random.default_rng(seed)
    moved = model.clone()
    for value in moved.graph.initializers.values():
        if value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
            continue
        array = value.const_value.numpy()
        towards = rng.choice(np.array([-np.inf, np.nan, np.inf], np.float32), array.shape)
        neighbour = np.where(np.isnan(towards) | (array == 0), array, np.nextafter(array, towards))
        value.const_value = ir.tensor(neighbour, name=value.name)
    return moved
