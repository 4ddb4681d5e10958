"""Which patches a pruning model kept, and how far two runs of it agree on that."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.integer[Any]]


def places_in_grid(
    selections: Sequence[Indices], kept: Sequence[int], *, chosen_anew: bool
) -> tuple[Indices, ...]:
    """Where in the grid of patches those are that each pruning stage kept, ascending, (B, kept).

    Patch number i is in row i // columns of the grid, and in column i % columns.

    Args:
        selections: of each stage that drops any, indices (B, K) into the patches that it was
            given, of which the first kept[stage] are kept.
        kept: how many patches each stage keeps.
        chosen_anew: whether each stage was given all patches, in the order of the grid; otherwise
            those that the stage before kept, in its order.
    """
    places: list[Indices] = []
    alive: Indices | None = None
    for selection, count in zip(selections, kept, strict=True):
        chosen = selection[:, :count]
        if not chosen_anew:
            chosen = chosen if alive is None else np.take_along_axis(alive, chosen, axis=1)
            alive = chosen
        places.append(np.sort(chosen, axis=1))
    return tuple(places)


def overlap(one: Indices, other: Indices) -> float:
    """The share of kept patches that two runs have in common, over all images of (B, kept)."""
    common = sum(len(np.intersect1d(a, b)) for a, b in zip(one, other, strict=True))
    return common / one.size
