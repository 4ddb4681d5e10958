"""Which unit of a device runs each operation of a model, where its runtime says so."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one operation runs.

    Attributes:
        kind: the operation, as the model's format calls it.
        name: its first result; empty where the runtime names none.
        unit: "CPU", "GPU", "Neural Engine", or the delegate's name.
        share: of the model's time, as the runtime estimates it; None where it does not.
    """

    kind: str
    name: str
    unit: str
    share: float | None = None


@runtime_checkable
class PlacingEngine(Protocol):
    """An engine that says where operations run."""

    def placements(self) -> list[Placement]: ...


def placement_lines(placements: Sequence[Placement]) -> list[str]:
    """One line for each unit, then one for each operation; none if nothing is known.

    Where the runtime has no shares to tell, operations of the most frequent unit go without a line.
    """
    if not placements:
        return []
    units = Counter(p.unit for p in placements)
    lines = [_summary(unit, [p for p in placements if p.unit == unit]) for unit in units]
    listed = list(placements)
    if all(p.share is None for p in placements):
        (most, _), *_ = units.most_common(1)
        listed = [p for p in placements if p.unit != most]
    kinds = max((len(p.kind) for p in listed), default=0)
    width = max(map(len, units))
    for p in listed:
        share = "" if p.share is None else f"{p.share:6.1%}"
        lines.append(f"  {p.kind:{kinds}}  {p.unit:{width}}  {share:>6}  {p.name}".rstrip())
    return lines


def _summary(unit: str, placements: Sequence[Placement]) -> str:
    count = len(placements)
    operations = f"{count} operation" if count == 1 else f"{count} operations"
    shares = [p.share for p in placements if p.share is not None]
    time = f", {sum(shares):.1%} of the time that is estimated" if shares else ""
    return f"{unit}: {operations}{time}"
