"""How the CPU kernels that are not dense products cut their loops into vectors and tasks."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

Expr = Any  # tvm.tirx.Expr, or a number where TVM accepts one

# Waking a pool of workers takes some microseconds; a core moves this many floats meanwhile.
_PARALLEL_ELEMENTS = 16384

_PAGE_BYTES = 4096


def span(start: Expr, lanes: int) -> Expr:
    """The index of `lanes` consecutive elements: a vector load or store when more than one."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def splat(value: Expr, lanes: int, dtype: str = "float32") -> Expr:
    """A scalar in every lane; a number becomes one of `dtype`."""
    scalar = tirx.const(value, dtype) if isinstance(value, int | float) else value
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def fitting_lanes(extent: int, lanes: int) -> int:
    """The widest vector, at most `lanes` and a power of two, that `extent` elements fill.

    Loops over `extent` then need no masked tail: the last vector starts at `extent - lanes` and
    overlaps the one before, which is harmless where a result depends on its own inputs only.
    """
    while lanes > extent:
        lanes //= 2
    return lanes


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def apart(rows: int, elements_per_row: int, dtype: str = "float32") -> int:
    """Rows of one worker's scratch: `rows`, and a page of nothing.

    A core fetches lines ahead of those that it works on, within a page of memory. Where they are
    another core's scratch, both wait for them all the time.
    """
    return rows + ceil_div(_PAGE_BYTES, elements_per_row * np.dtype(dtype).itemsize)


def tile_rows(count: int, most: int) -> int:
    """How many of `count` outputs a register tile takes, at most `most`.

    Tiles overlap at the end, so the cost is tiles times (rows + 1): the products, and the loads
    that every tile repeats.
    """
    return min(range(min(count, most), 0, -1), key=lambda rows: ceil_div(count, rows) * (rows + 1))


def sum_of_lanes(vector: Expr, lanes: int) -> Expr:
    """The sum of a float32 vector's lanes, by halves."""
    return fold_lanes(vector, lanes, operator.add)


def fold_lanes(
    vector: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr], dtype: str = "float32"
) -> Expr:
    """All lanes of a vector of `dtype` as one value, combined by halves."""
    while lanes > 2:
        lanes //= 2
        half = f"{dtype}x{lanes}"
        vector = T.bind(vector)
        vector = combine(T.vectorlow(vector, dtype=half), T.vectorhigh(vector, dtype=half))
    if lanes == 1:
        return vector
    vector = T.bind(vector)
    return combine(T.Shuffle([vector], [0]), T.Shuffle([vector], [1]))


def row_loop(rows: int, elements_per_row: int) -> Any:
    """A loop over rows, in parallel unless waking the workers would take longer than the work."""
    return T.parallel(rows) if rows * elements_per_row >= _PARALLEL_ELEMENTS else T.serial(rows)
