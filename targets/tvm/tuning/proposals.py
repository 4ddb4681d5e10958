"""What to try next in a design space.

Our own spaces hold a few dozen to a few hundred points, listed by a model of the device, likeliest
first. They are searched here: down the list, around the best so far, and at random.

MetaSchedule was tried as the driver for these as well, and does not serve. It searches by mutating
the recorded decisions of a schedule's transformations of one fixed function, and predicts cost from
that function's loops. A tile size of ours decides how a function is built in the first place, up to
the shapes of its arguments, for weights are packed by tile. A stand-in function that carries each
choice as an annotation can be driven (a ScheduleFn that samples, a Builder that decodes): but all
points of such a space have the same loops, its cost model has nothing to tell them apart by, and
what is left is a random walk. Where there is a function to be transformed, one that Relax lowered,
MetaSchedule does generate the space and search it: see `generated`.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from gfcompile.targets.tvm.choices import Choice

# Relative costs by choice: 1 is what the schedule's rule costs; None failed.
Tried = Mapping[Choice, float | None]


class Proposer(Protocol):
    """What to try next."""

    def propose(self, count: int, tried: Tried) -> list[Choice]:
        """Up to `count` choices that were not tried; none when the space is exhausted."""

    def learn(self, results: Tried) -> None:
        """Told what the proposed choices cost."""


class ListedProposer:
    """Of a space that is listed, likeliest first; its first choice is the rule's own."""

    def __init__(self, space: Sequence[Choice], rng: random.Random) -> None:
        self._space = space
        self._rng = rng

    def propose(self, count: int, tried: Tried) -> list[Choice]:
        left = [choice for choice in self._space[1:] if choice not in tried]
        costs = {choice: cost for choice, cost in tried.items() if cost is not None}
        best = min(costs, key=lambda choice: costs[choice]) if costs else None
        if best is None or costs[best] >= 1:
            best = self._space[0]
        near = [choice for choice in left if self._neighbours(choice, best)]
        self._rng.shuffle(near)
        # Half around the best, a quarter down the list, a quarter anywhere.
        picked = dict.fromkeys(near[: count // 2])
        for choice in left:
            if len(picked) >= count - count // 4:
                break
            picked.setdefault(choice)
        rest = [choice for choice in left if choice not in picked]
        picked |= dict.fromkeys(self._rng.sample(rest, min(len(rest), count - len(picked))))
        return list(picked)

    def learn(self, results: Tried) -> None:
        pass

    def _neighbours(self, a: Choice, b: Choice) -> bool:
        """Whether they differ in one field, and there by one step of the values that it takes."""
        fields = [f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)]
        if len(fields) != 1:
            return False
        values = self._values(fields[0])
        first, second = (values.index(getattr(choice, fields[0])) for choice in (a, b))
        return abs(first - second) == 1

    def _values(self, name: str) -> list[Any]:
        return sorted({getattr(choice, name) for choice in self._space})
