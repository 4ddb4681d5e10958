"""Which unit of a device runs each operation of a model, where its runtime says so."""

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
    """One line for each unit, then one for each operation; none if nothing is known."""
    if not placements:
        return []
    units = dict.fromkeys(p.unit for p in placements)
    lines = [_summary(unit, [p for p in placements if p.unit == unit]) for unit in units]
    kinds = max(len(p.kind) for p in placements)
    width = max(map(len, units))
    for p in placements:
        share = "" if p.share is None else f"{p.share:6.1%}"
        lines.append(f"  {p.kind:{kinds}}  {p.unit:{width}}  {share:>6}  {p.name}".rstrip())
    return lines


def _summary(unit: str, placements: Sequence[Placement]) -> str:
    count = len(placements)
    operations = f"{count} operation" if count == 1 else f"{count} operations"
    shares = [p.share for p in placements if p.share is not None]
    time = f", {sum(shares):.1%} of the time that is estimated" if shares else ""
    return f"{unit}: {operations}{time}"
