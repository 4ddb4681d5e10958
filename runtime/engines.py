"""Engines that need more than NumPy, by the kind of bundle that they run.

The runtime stays light, so it cannot import them: the `gfcompile` package enters them here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gfcompile.runtime.bundle import Manifest
    from gfcompile.runtime.engine import ComputeUnits, Engine

Opener = Callable[[Path, "Manifest", int, "ComputeUnits"], "Engine"]

_OPENERS: dict[str, Opener] = {}


def register_engine(kind: str, opener: Opener) -> None:
    """Bundles of this kind are opened by `opener`, from folder, manifest, threads and units."""
    assert kind not in _OPENERS, f"bundles of kind {kind} have an engine"
    _OPENERS[kind] = opener


def find_opener(kind: str) -> Opener | None:
    """What opens bundles of this kind, if anything does."""
    return _OPENERS.get(kind)
