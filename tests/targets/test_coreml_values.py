"""Tensors in arrangements of their own, against NumPy on the same arrays."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfcompile.targets.coreml.values import (
    Arranger,
    Value,
    arrange_array,
    natural,
    order_of,
    reshaped_order,
    transposed,
)


class Tensor:
    """What a MIL tensor has that `Arranger` asks for, with its array."""

    def __init__(self, array: np.ndarray[Any, Any], name: str = "x") -> None:
        self.array, self.name = array, name
        self.shape, self.rank = array.shape, array.ndim


class Machine:
    """Carries out transposes and reshapes on arrays, and counts them."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.arranger = Arranger(self.op)

    def op(self, kind: str, name: str, *, x: Tensor, **arguments: Any) -> Tensor:
        self.done.append(kind)
        if kind == "transpose":
            return Tensor(x.array.transpose(arguments["perm"]), name)
        return Tensor(x.array.reshape(arguments["shape"]), name)


def counted(*dims: int) -> np.ndarray[Any, Any]:
    return np.arange(math.prod(dims)).reshape(dims)


def value_of(array: np.ndarray[Any, Any]) -> Value:
    return Value(Tensor(array), array.shape, natural(array.shape))


sizes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@st.composite
def steps(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]]:
    """A shape, and transposes and reshapes that fit one after the other."""
    dims = tuple(draw(sizes))
    first, made = dims, []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            perm = tuple(draw(st.permutations(range(len(dims)))))
            made.append(("transpose", perm))
            dims = tuple(dims[axis] for axis in perm)
        else:
            rest, shape = math.prod(dims), []
            while rest > 1 and len(shape) < 3:
                shape.append(draw(st.sampled_from([d for d in (1, 2, 3, 4) if rest % d == 0])))
                rest //= shape[-1]
            dims = (*shape, rest)
            made.append(("reshape", dims))
    return first, made


@given(steps())
def test_any_chain_of_views_is_what_numpy_makes_of_it(
    chain: tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]],
) -> None:
    dims, made = chain
    machine = Machine()
    array = counted(*dims)
    value = value_of(array)
    for kind, argument in made:
        if kind == "transpose":
            array, value = array.transpose(argument), transposed(value, argument)
            continue
        array = array.reshape(argument)
        order = reshaped_order(value.dims, value.order, argument)
        if order is None:
            moved = machine.arranger.lay_out_flat(value, natural(value.dims), argument)
            value = Value(moved, argument, natural(argument))
        else:
            value = Value(value.var, argument, order)
    template = tuple(reversed(range(array.ndim)))
    np.testing.assert_array_equal(machine.arranger.lay_out(value, template).array, array.T)


def test_tokens_become_a_grid_and_back_without_an_operation() -> None:
    grid = transposed(value_of(counted(1, 8, 4, 4)), (0, 2, 3, 1))
    order = reshaped_order(grid.dims, grid.order, (1, 16, 8))
    assert order == (2, 1)  # channels still come first
    assert reshaped_order((1, 16, 8), order, (1, 4, 4, 8)) == (3, 1, 2)


def test_an_axis_that_is_split_across_memory_has_to_move() -> None:
    heads = Value(Tensor(counted(6, 5, 8)), (1, 5, 6, 8), (2, 1, 3))
    assert reshaped_order(heads.dims, heads.order, (1, 5, 48)) is None


def test_one_transpose_at_most_and_none_twice() -> None:
    machine = Machine()
    value = value_of(counted(1, 6, 4))
    for _ in range(2):
        laid = machine.arranger.lay_out(value, (0, 2, None, 1))
    np.testing.assert_array_equal(laid.array[:, :, 0], counted(1, 6, 4).transpose(0, 2, 1))
    assert machine.done.count("transpose") == 1


def test_neighbours_move_together_where_axes_are_many() -> None:
    machine = Machine()
    array = counted(2, 2, 3, 2, 3, 2)
    value = transposed(value_of(array), (3, 4, 5, 0, 1, 2))
    flat = machine.arranger.lay_out_flat(value, natural(value.dims), (array.size,))
    np.testing.assert_array_equal(flat.array, array.transpose(3, 4, 5, 0, 1, 2).reshape(-1))
    assert machine.done == ["reshape", "transpose", "reshape"]


@given(sizes, st.randoms())
def test_constants_are_arranged_as_tensors_are(dims: list[int], random: Any) -> None:
    template: list[int | None] = list(range(len(dims)))
    template.append(None)
    random.shuffle(template)
    array = counted(*dims)
    arranged = arrange_array(array, tuple(template))
    machine = Machine()
    laid = machine.arranger.lay_out(value_of(array), tuple(template))
    np.testing.assert_array_equal(arranged, laid.array)


def test_order_leaves_axes_of_one_element_out() -> None:
    assert order_of((0, 2, None, 1), (1, 6, 4)) == (2, 1)
    assert order_of((0, 2, None, 1), (3, 1, 4)) == (0, 2)


def test_more_than_five_axes_are_refused() -> None:
    machine = Machine()
    value = value_of(counted(64))
    with pytest.raises(Exception, match="6 axes"):
        machine.arranger.lay_out_flat(value, (0,), (2,) * 6)
