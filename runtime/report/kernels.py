"""Kernels of a bundle with their estimates and, where it was validated, their times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.ranking import rank_correlation
from gfcompile.runtime.report.html import figure, records
from gfcompile.runtime.results import ValidationResult
from gfcompile.runtime.roofline import (
    Estimate,
    KernelCost,
    Peaks,
    estimate,
    kernel_costs,
    roofline,
    target_peaks,
)

_MOST = 1e15  # operations, bytes or microseconds of one call
_KINDS = {
    "dense": "product",
    "layer_norm": "layer norm",
    "dft_filter": "global filter, DFT",
    "circular_filter": "global filter, circular",
    "patchify": "patches",
    "token_mean": "mean of tokens",
    "attention": "attention",
    "select": "token selection",
    "gather": "token gather",
    "inverse_permutation": "token order",
    "softmax": "softmax",
    "quantize": "quantize",
    "dequantize": "dequantize",
}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A compiled function: all calls of one inference together, times in microseconds.

    Attributes:
        estimate: of one call.
        measured_us: of all calls.
        roofline_us: the least time of one call by operations and bytes alone.
    """

    name: str
    calls: int
    cost: KernelCost = field(default_factory=KernelCost)
    estimate: Estimate | None = None
    roofline_us: float | None = None
    measured_us: float | None = None

    @property
    def kind(self) -> str:
        """What it computes, in words; "" for what Relax named."""
        return next((text for stem, text in _KINDS.items() if self.name.startswith(stem)), "")

    @property
    def estimate_us(self) -> float | None:
        """Of all calls."""
        return None if self.estimate is None else self.calls * self.estimate.us

    @property
    def ratio(self) -> float | None:
        """Measured over estimated."""
        if self.measured_us is None or not self.estimate_us:
            return None
        return self.measured_us / self.estimate_us

    def rate(self, amount: int | None) -> float | None:
        """So much per call, in giga per second."""
        if amount is None or not self.measured_us:
            return None
        return amount * self.calls / self.measured_us / 1e3


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Those of a bundle, the longest first.

    Attributes:
        measured: whether their times were taken; if not, there are estimates alone.
    """

    all: tuple[Kernel, ...]
    peaks: Peaks | None
    measured: bool

    @property
    def estimate_us(self) -> float | None:
        """Of one inference; None if a kernel has none."""
        times = [kernel.estimate_us for kernel in self.all]
        known = [time for time in times if time is not None]
        return sum(known) if known and len(known) == len(times) else None

    @property
    def measured_us(self) -> float | None:
        times = [kernel.measured_us for kernel in self.all if kernel.measured_us is not None]
        return sum(times) if times else None

    @property
    def rank_correlation(self) -> float | None:
        """How well estimates put the kernels in the order of their times, per call."""
        pairs = [
            (k.measured_us / k.calls, k.estimate.us)
            for k in self.all
            if k.measured_us is not None and k.estimate is not None
        ]
        return rank_correlation(*zip(*pairs, strict=True)) if pairs else None


def kernels_of(manifest: Manifest, result: ValidationResult | None) -> Kernels:
    """The kernels of a bundle, or of a result of its validation."""
    costs, peaks = kernel_costs(manifest), target_peaks(manifest)
    threads = result.protocol.threads if result is not None and result.protocol is not None else 1
    if result is not None and result.kernels:
        found = _measured(result, costs)
    else:
        found = _counted(manifest, costs)
    kernels = [_estimated(kernel, peaks, threads) for kernel in found]
    measured = bool(result is not None and result.kernels)
    kernels.sort(key=lambda k: (-((k.measured_us if measured else k.estimate_us) or 0.0), k.name))
    return Kernels(all=tuple(kernels), peaks=peaks, measured=measured)


def _measured(result: ValidationResult, costs: Mapping[str, KernelCost]) -> Sequence[Kernel]:
    times: dict[str, list[float]] = {}
    known: dict[str, KernelCost] = {}
    for step in result.kernels:
        times.setdefault(step.kernel, []).append(figure(step.median_us) or 0.0)
        known[step.kernel] = KernelCost(
            flops=step.flops,
            bytes=step.bytes,
            arithmetic=step.arithmetic,
            issue_us=costs.get(step.kernel, KernelCost()).issue_us,
            peak_gops=costs.get(step.kernel, KernelCost()).peak_gops,
        )
    return [
        Kernel(name=name, calls=len(of_name), cost=known[name], measured_us=sum(of_name))
        for name, of_name in times.items()
    ]


def _counted(manifest: Manifest, costs: Mapping[str, KernelCost]) -> Sequence[Kernel]:
    kernels = []
    # Those for the best CPU, where a library has kernels for several.
    best = max(map(_level, records(manifest.kernels)), default=0)
    for record in records(manifest.kernels):
        if _level(record) != best:
            continue
        calls = figure(record.get("calls"))
        if calls is not None and 1 <= calls < _MOST:
            name = str(record.get("symbol", record.get("name", "")))
            kernels.append(Kernel(name=name, calls=int(calls), cost=costs.get(name, KernelCost())))
    return kernels


def _level(record: Mapping[str, Any]) -> float:
    return figure(record.get("level")) or 0


def _estimated(kernel: Kernel, peaks: Peaks | None, threads: int) -> Kernel:
    cost = kernel.cost
    known = (cost.flops, cost.bytes, cost.issue_us, cost.peak_gops)
    if any(x is not None and not _sane(x) for x in known):
        return replace(kernel, cost=KernelCost())
    if peaks is None or not _positive(peaks):
        return kernel
    least = roofline(peaks, cost, threads)
    return replace(
        kernel,
        estimate=estimate(peaks, cost, threads),
        roofline_us=None if least is None else least.us,
    )


def _sane(amount: float) -> bool:
    number = figure(amount)
    return number is not None and 0 <= number < _MOST


def _positive(peaks: Peaks) -> bool:
    rates = (peaks.float32_gflops, peaks.float16_gflops, peaks.int8_gops, peaks.bandwidth_gb_s)
    return all((figure(rate) or 0) > 0 for rate in rates) and peaks.cores >= 1
