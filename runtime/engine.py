"""What executes a bundle's model: the same few verbs for every kind of bundle."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.device.gfrt import StepProfile, TraceRecord

Array = npt.NDArray[Any]
# What Core ML may use on a Mac.
ComputeUnits = Literal["all", "cpu", "cpu-gpu", "cpu-ane"]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one inference, from input to output."""

    median_ms: float
    min_ms: float
    p90_ms: float
    runs: int


class Engine(Protocol):
    """What runs a bundle's model; `batches` and `batch` have the shape of its one input.

    Attributes:
        stand_in: see `Session.stand_in`.
    """

    stand_in: str

    @property
    def device_name(self) -> str: ...

    def run(self, batches: list[Array]) -> list[list[Array]]:
        """The outputs for each batch."""

    def trace(self, batches: list[Array]) -> list[list[TraceRecord]]:
        """What each step wrote, for each batch."""

    def profile(self, batch: Array, runs: int) -> list[StepProfile]: ...

    def benchmark(self, batch: Array, runs: int, warmup: int) -> Latency: ...

    def close(self) -> None: ...


def measure(run: Callable[[], object], runs: int, warmup: int) -> Latency:
    """Time of `run`, which is called `warmup` times before it counts."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(runs):
        start = perf_counter()
        run()
        times.append(1e3 * (perf_counter() - start))
    return Latency(
        median_ms=float(np.median(times)),
        min_ms=min(times),
        p90_ms=sorted(times)[runs * 9 // 10],
        runs=runs,
    )
