"""Where each tensor of a straight line of kernel calls lives in one arena."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ALIGNMENT = 64  # a cache line, and what TVM's kernels assume of every pointer


@dataclass(frozen=True, kw_only=True)
class Lifetime:
    """A tensor from the step that first writes it to the step that last reads it, inclusive."""

    name: str
    size_bytes: int
    first: int
    last: int

    def overlaps(self, other: "Lifetime") -> bool:
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True, kw_only=True)
class Arena:
    """Offsets in bytes by name, the arena's size, and the most that is alive at any step."""

    offsets: Mapping[str, int]
    size_bytes: int
    lower_bound_bytes: int


def align(size: int, to: int = ALIGNMENT) -> int:
    return -(-size // to) * to


def plan_arena(lifetimes: Iterable[Lifetime]) -> Arena:
    """Offsets such that tensors alive at the same step never overlap.

    Largest first, each into the tightest gap that is free for its whole life (Pisarchyk and Lee,
    arXiv:2001.03288, "greedy by size").
    """
    placed: list[tuple[int, Lifetime]] = []
    tensors = sorted(lifetimes, key=lambda t: (-t.size_bytes, t.first, t.name))
    for tensor in tensors:
        taken = sorted(
            (offset, offset + align(other.size_bytes))
            for offset, other in placed
            if tensor.overlaps(other)
        )
        best_offset, best_gap, end = None, None, 0
        for start, stop in taken:
            gap = start - end
            if gap >= align(tensor.size_bytes) and (best_gap is None or gap < best_gap):
                best_offset, best_gap = end, gap
            end = max(end, stop)
        placed.append((end if best_offset is None else best_offset, tensor))
    steps = range(max((t.last for t in tensors), default=-1) + 1)
    return Arena(
        offsets={tensor.name: offset for offset, tensor in placed},
        size_bytes=max((offset + align(t.size_bytes) for offset, t in placed), default=0),
        lower_bound_bytes=max(
            (sum(align(t.size_bytes) for t in tensors if t.first <= s <= t.last) for s in steps),
            default=0,
        ),
    )
