"""Weights of four bits with factors for groups, as they are stored: codes, and the factors.

A schedule packs its weights as its loops read them. Whatever that order is, they lie in panels of
rows: a row has some neighbours along k of each of its columns, the next row the neighbours that
follow, and a panel all of k. So the factors of a group are those of some rows in common.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gfcompile.quantize.int4 import factored
from gfcompile.targets.tvm.kernel import Array

Int8Array = npt.NDArray[np.int8]


@dataclass(frozen=True, kw_only=True)
class GroupedRows:
    """Packed weights as panels of rows; see `plan.PlanGrouped`."""

    row_bytes: int
    rows: int
    shared: int
    run: int

    def split(self, packed: Int8Array) -> tuple[Int8Array, npt.NDArray[np.uint8]] | None:
        """Codes in the order of `packed`, and factors; None if they are not of four bits."""
        row = (self.row_bytes // self.run, self.run)
        panels = packed.reshape(-1, self.rows, *row)
        missing = -self.rows % self.shared
        filled = np.pad(panels, ((0, 0), (0, missing), (0, 0), (0, 0)))
        groups = filled.reshape(len(panels), -1, self.shared, *row)
        found = factored(groups, axes=(2, 4))
        if found is None:
            return None
        codes, factors = found
        stored = codes.reshape(filled.shape)[:, : self.rows].reshape(packed.shape)
        return np.ascontiguousarray(stored), factors


def find_rows(
    pack: Callable[[Array], Array], k: int, n: int, group_size: int
) -> GroupedRows | None:
    """How `pack` lays out a matrix (k, n) whose groups lie along k; None if not in rows.

    Args:
        pack: of int8 values, perhaps four to a word; what it adds is 0.
    """
    row_of, column_of = _places(pack, k, n)
    if row_of.size == 0 or row_of[0] != 0:
        return None
    run = _first(column_of != column_of[0])
    depth = int(row_of[:run].max()) + 1  # how far along k a row goes
    row_bytes = _first(row_of >= depth)
    rows = _first(row_of[::row_bytes] == 0, start=1)
    if row_bytes % run or row_of.size % (row_bytes * rows) or group_size % depth:
        return None
    found = GroupedRows(row_bytes=row_bytes, rows=rows, shared=group_size // depth, run=run)
    return found if _is_right(found, row_of, column_of, group_size) else None


def _is_right(found: GroupedRows, row_of: Array, column_of: Array, group_size: int) -> bool:
    """Whether what shares a factor is of one column and one group."""
    at = np.arange(row_of.size)
    panel, row = np.divmod(at // found.row_bytes, found.rows)
    group = panel * -(-found.rows // found.shared) + row // found.shared
    runs = found.row_bytes // found.run
    factor = group * runs + at % found.row_bytes // found.run
    real = row_of >= 0  # what the packing added is 0, whatever its factor
    wanted = column_of[real] * (1 + int(row_of.max()) // group_size) + row_of[real] // group_size
    pairs = np.unique(np.stack([factor[real], wanted]), axis=1)
    return bool(len(np.unique(pairs[0])) == pairs.shape[1])


def _places(pack: Callable[[Array], Array], k: int, n: int) -> tuple[Array, Array]:
    """For each packed byte the row and column of the matrix that it is from; -1 if from none."""

    def packed(index: Array) -> Array:
        # Through int8, a digit of base 100 at a time, each plus one.
        place = np.zeros(0, np.int64)
        for digit in range(3):
            digits = (index // 100**digit % 100 + 1).astype(np.int8)
            part = np.ascontiguousarray(pack(digits)).view(np.int8).reshape(-1).astype(np.int64)
            if digit == 0:
                place = np.where(part > 0, 0, -1)
            place = np.where(part > 0, place + (part - 1) * 100**digit, -1)
        return place

    rows, columns = np.indices((k, n))
    return packed(rows), packed(columns)


def _first(condition: Array, start: int = 0) -> int:
    """The first index from `start` on at which it holds; the length if it never does."""
    found = np.flatnonzero(condition[start:])
    return int(found[0]) + start if len(found) else len(condition)
