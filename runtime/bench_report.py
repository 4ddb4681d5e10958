"""What `gfbench --json` prints, checked: it comes from a device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from gfcompile.runtime.records import from_json, parse_json
from gfcompile.runtime.results import KernelTime, Latencies
from gfcompile.runtime.roofline import KernelCost


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step of the plan, in order."""

    kernel: str
    label: str
    median_us: float


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """A run of gfbench; without samples where nothing was timed.

    Attributes:
        device: "cpu", or "cuda: " and the GPU's name.
        runtime: its version.
        first_ms: the first inference.
    """

    device: str
    runtime: str
    pinned: tuple[int, ...]
    load_ms: float
    first_ms: float
    warmup_runs: int
    stable: bool
    runs: int
    duration_s: float
    peak_memory_mb: float
    samples_us: tuple[float, ...] = ()
    profile: tuple[StepReport, ...] = ()

    @classmethod
    def read(cls, text: str) -> Self:
        """What was printed.

        Raises:
            ValueError: something else.
        """
        report = from_json(cls, parse_json(text))
        if report.runs != len(report.samples_us):
            raise ValueError(f"{len(report.samples_us)} samples of {report.runs} runs")
        return report

    @property
    def latencies(self) -> Latencies:
        return Latencies.of(self.samples_us)

    def kernel_times(self, costs: Mapping[str, KernelCost]) -> tuple[KernelTime, ...]:
        """The profile, with what the manifest knows of its kernels."""
        times = []
        for step in self.profile:
            cost = costs.get(step.kernel, KernelCost())
            times.append(
                KernelTime(
                    label=step.label,
                    kernel=step.kernel,
                    median_us=step.median_us,
                    flops=cost.flops,
                    bytes=cost.bytes,
                    arithmetic=cost.arithmetic,
                )
            )
        return tuple(times)
