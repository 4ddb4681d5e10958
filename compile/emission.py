"""What an emitter is asked for, and what it hands back: the seam between pipeline and targets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from gfcompile.compile.progress import Progress
from gfcompile.runtime.bundle import TensorSpec
from gfcompile.runtime.images import Transform

if TYPE_CHECKING:
    from gfcompile.compile.graph import Graph
    from gfcompile.compile.ledger import LedgerEntry

RequestedPrecision = Literal["float32", "float16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """The inputs that the ledger is taken over."""

    pixels: Sequence[npt.NDArray[np.uint8]]  # (batch, H, W, 3) each
    inputs: Sequence[npt.NDArray[np.float32]]  # (batch, 3, H, W) each


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How a model prunes: patches kept by each stage that drops any; see `places_in_grid`."""

    kept: tuple[int, ...]
    chosen_anew: bool


@dataclass(frozen=True, kw_only=True)
class EmissionRequest:
    """A lowered graph that is to become an artifact.

    Attributes:
        model: its name, for file names and descriptions.
        weights: where they come from.
        graph: float, or QDQ where precision is int8.
        transform: how an image becomes the graph's input.
        golden: the inputs to verify the artifact on.
        calibration: the graph's inputs for whatever else must be calibrated, (batch, 3, H, W) each;
            read from the disk when it is called.
        labels: class names; empty where none were given.
        pruning: of a model that prunes.
        folder: where the artifact's files go; other files of the bundle come beside them.
    """

    model: str
    precision: RequestedPrecision
    weights: str
    graph: "Graph"
    transform: Transform
    golden: Golden
    calibration: Callable[[], Sequence[npt.NDArray[np.float32]]]
    labels: Sequence[str]
    folder: Path
    progress: Progress
    pruning: Pruning | None = None


@dataclass(frozen=True, kw_only=True)
class Emission:
    """An artifact, as the manifest describes it; the fields are those of `Manifest`.

    Attributes:
        storage, compute: see `Precision`.
        library: the file or folder that is the artifact.
        ledger: the artifact's entry, and those of stages that the emitter added before it.
        extra: what else is to be told, JSON values.
    """

    kind: Literal["gfrt", "tflite", "coreml"]
    storage: str
    compute: str
    arch: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device: Literal["cpu", "cuda"] = "cpu"
    library: str = ""
    cpu_features: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    kernels: tuple[Mapping[str, Any], ...] = ()
    ledger: "tuple[LedgerEntry, ...]" = ()
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
