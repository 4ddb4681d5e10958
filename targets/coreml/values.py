"""Tensors whose transposes and reshapes have not been carried out yet.

A transpose only renames axes, and a reshape that splits or joins axes that lie side by side only
renames them too. So both are kept as notes on a tensor, and an operation that wants its operand
in a certain arrangement asks for it: most never do, and neighbouring reshapes become one.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.onnx_values import OTHER_TARGET

Array = npt.NDArray[Any]
MAX_RANK = 5
Dims = tuple[int, ...]
# For each axis of an arrangement the graph's axis that it holds, or None for one of size 1.
Template = tuple[int | None, ...]


class UnfitError(CompileError):
    """A node cannot be had in Core ML; whoever knows which one names it (`operators.emit_node`).

    Attributes:
        why, remedy: as in `emitter.refuse`.
    """

    def __init__(self, why: str, remedy: str = OTHER_TARGET) -> None:
        super().__init__(f"Core ML: {why}; {remedy}")
        self.why, self.remedy = why, remedy


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph, and how it lies in memory.

    Attributes:
        var: a MIL tensor of any shape with the same elements in some order.
        dims: the shape that the graph gives it.
        order: the graph's axes of more than one element, from the outermost to the innermost, as
            `var` holds them. Axes of one element can be anywhere.
        arranged: what `Arranger.lay_out` has made of it.
    """

    var: Any
    dims: Dims
    order: tuple[int, ...]
    arranged: dict[tuple[tuple[int, ...], Dims], Any] = field(default_factory=dict)

    @property
    def memory_dims(self) -> Dims:
        return tuple(self.dims[axis] for axis in self.order)

    def template(self) -> Template | None:
        """What the axes of `var` hold; None if it has joined or split axes."""
        if not self.has_own_axes():
            return None
        axes = iter(self.order)
        return tuple(next(axes) if size > 1 else None for size in self.var.shape)

    def has_own_axes(self) -> bool:
        return tuple(size for size in self.var.shape if size > 1) == self.memory_dims

    def padded(self, rank: int) -> "Value":
        """With axes of one element in front, as broadcasting adds them."""
        added = rank - len(self.dims)
        if not added:
            return self
        order = tuple(axis + added for axis in self.order)
        return Value(self.var, (1,) * added + self.dims, order)


def natural(dims: Sequence[int]) -> tuple[int, ...]:
    """The order of a row-major array."""
    return tuple(axis for axis, size in enumerate(dims) if size > 1)


def order_of(template: Template, dims: Sequence[int]) -> tuple[int, ...]:
    """The order of a tensor arranged like `template`."""
    return tuple(axis for axis in template if axis is not None and dims[axis] > 1)


def shape_of_template(template: Template, dims: Sequence[int]) -> Dims:
    return tuple(1 if axis is None else dims[axis] for axis in template)


def transposed(value: Value, perm: Sequence[int]) -> Value:
    """`value` with its axes renamed as ONNX's Transpose does."""
    dims = tuple(value.dims[axis] for axis in perm)
    return Value(value.var, dims, tuple(list(perm).index(axis) for axis in value.order))


def reshaped_order(dims: Dims, order: tuple[int, ...], new_dims: Dims) -> tuple[int, ...] | None:
    """The order of a tensor after a reshape; None if that has to move elements.

    The axes are cut into the shortest runs of equal sizes on both sides:
    (1, 14, 14, 384) -> (1, 196, 384) are [14, 14] -> [196] and [384] -> [384]. A run that lies in
    memory in one piece and in its own order stays where it is.
    """
    pieces: dict[int, tuple[int, ...]] = {}  # first axis of a run -> the new axes in its place
    replaced: dict[int, tuple[int, ...]] = {}  # the same -> all its old axes
    old, new = list(natural(dims)), list(natural(new_dims))
    while old or new:
        run, new_run = [old.pop(0)], [new.pop(0)]
        size, new_size = dims[run[0]], new_dims[new_run[0]]
        while size != new_size:
            if size < new_size:
                run.append(old.pop(0))
                size *= dims[run[-1]]
            else:
                new_run.append(new.pop(0))
                new_size *= new_dims[new_run[-1]]
        pieces[run[0]], replaced[run[0]] = tuple(new_run), tuple(run)
    result: list[int] = []
    rest = list(order)
    while rest:
        run_here = replaced.get(rest[0])
        if run_here is None or tuple(rest[: len(run_here)]) != run_here:
            return None
        result += pieces[rest[0]]
        del rest[: len(run_here)]
    return tuple(result)


def arrange_array(array: Array, template: Template) -> Array:
    """A constant in the arrangement `template`; axes of one element that it lacks are dropped."""
    axes = [axis for axis in template if axis is not None]
    missing = [axis for axis in range(array.ndim) if axis not in axes]
    assert all(array.shape[axis] == 1 for axis in missing)
    moved = array.transpose([*missing, *axes])
    return np.ascontiguousarray(moved.reshape(shape_of_template(template, array.shape)))


def _common_runs(order: tuple[int, ...], other: tuple[int, ...]) -> list[tuple[int, ...]]:
    """`order` cut where the neighbours are not neighbours in `other` as well."""
    runs: list[tuple[int, ...]] = []
    for axis in order:
        if runs and (runs[-1][-1], axis) in itertools.pairwise(other):
            runs[-1] = (*runs[-1], axis)
        else:
            runs.append((axis,))
    return runs


class Arranger:
    """Carries transposes and reshapes out, where they are asked for.

    Args:
        op: emits a MIL operation: its type, a name to start from, its arguments.
    """

    def __init__(self, op: Any) -> None:
        self._op = op

    def lay_out(self, value: Value, template: Template) -> Any:
        """A MIL tensor that holds `value` as `template` says."""
        return self.lay_out_flat(
            value, order_of(template, value.dims), shape_of_template(template, value.dims)
        )

    def lay_out_flat(self, value: Value, order: tuple[int, ...], shape: Sequence[int]) -> Any:
        """A MIL tensor of `shape` with the elements of `value` in `order`."""
        shape = tuple(shape)
        assert math.prod(shape) == math.prod(value.dims), (shape, value.dims)
        key = (order, shape)
        if key not in value.arranged:
            value.arranged[key] = self._arrange(value, order, shape)
        return value.arranged[key]

    def _arrange(self, value: Value, order: tuple[int, ...], shape: Dims) -> Any:
        if order == value.order:
            return self._reshape(value.var, shape)
        if tuple(size for size in shape if size > 1) == tuple(value.dims[axis] for axis in order):
            return self._transpose_into(value, order, shape)
        # The shape joins or splits axes: those that stay neighbours move as one.
        runs = _common_runs(value.order, order)
        var = self._reshape(
            value.var, tuple(math.prod(value.dims[axis] for axis in run) for run in runs)
        )
        perm = sorted(range(len(runs)), key=lambda run: order.index(runs[run][0]))
        return self._reshape(self._transpose(var, perm), shape)

    def _transpose_into(self, value: Value, order: tuple[int, ...], shape: Dims) -> Any:
        """`shape` has the axes of `order`, and some of one element."""
        source = value.var
        if not value.has_own_axes() or source.rank != len(shape):
            source = self._reshape(source, (1,) * (len(shape) - len(order)) + value.memory_dims)
        places = [place for place, size in enumerate(source.shape) if size > 1]
        units = iter([place for place, size in enumerate(source.shape) if size == 1])
        axes = iter([places[value.order.index(axis)] for axis in order])
        return self._transpose(source, [next(axes) if size > 1 else next(units) for size in shape])

    def _transpose(self, var: Any, perm: list[int]) -> Any:
        return self._op("transpose", f"{var.name}_moved", x=var, perm=perm)

    def _reshape(self, var: Any, shape: Dims) -> Any:
        if tuple(var.shape) == shape:
            return var
        if len(shape) > MAX_RANK:
            raise UnfitError(f"it would need {len(shape)} axes, tensors have up to {MAX_RANK}")
        return self._op("reshape", f"{var.name}_as", x=var, shape=list(shape))
