"""The least time that a kernel can take: its operations at the peak, or its bytes at the bandwidth.

Peaks are those that the bundle's manifest has of its target, its maker's figures. The estimate of a
kernel's time knows the instructions of its schedule as well; it is an estimate, never a result.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.records import from_json

Bound = Literal["compute", "memory"]


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What a processor can do at best, a multiplication and an addition counted as two.

    Attributes:
        float32_gflops, float16_gflops, int8_gops: of one core, or of the whole GPU.
        cores: that threads can use; 1 for a GPU.
        call_us: between two kernels that wait for each other.
    """

    float32_gflops: float
    float16_gflops: float
    int8_gops: float
    bandwidth_gb_s: float
    cores: int = 1
    call_us: float = 0.0

    def rate(self, arithmetic: str, threads: int = 1) -> float:
        """Giga-operations per second of so many threads (0: one for each core)."""
        rates = {
            "float32": self.float32_gflops,
            "float16": self.float16_gflops,
            "int8": self.int8_gops,
        }
        return rates[arithmetic] * min(threads or self.cores, self.cores)

    def least_us(
        self, flops: int, moved_bytes: int, arithmetic: str, threads: int = 1
    ) -> tuple[float, Bound]:
        """The roofline's time of a kernel, and which of the two bounds it."""
        compute_us = flops / (self.rate(arithmetic, threads) * 1e3)
        memory_us = moved_bytes / (self.bandwidth_gb_s * 1e3)
        return (compute_us, "compute") if compute_us >= memory_us else (memory_us, "memory")


@dataclass(frozen=True, kw_only=True)
class KernelCost:
    """What one call of a kernel takes, as the manifest has it; None where it is not known.

    Attributes:
        issue_us: the least time to issue its instructions, of one core or of the whole GPU.
        peak_gops: of one core in its arithmetic, where the kernel is for a better CPU than the
            target's least one; None is the target's.
    """

    flops: int | None = None
    bytes: int | None = None
    arithmetic: Literal["float32", "float16", "int8"] = "float32"
    issue_us: float | None = None
    peak_gops: float | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The time of one call, estimated, and what it waits for."""

    us: float
    bound: Bound


def roofline(peaks: Peaks, cost: KernelCost, threads: int = 1) -> Estimate | None:
    """The least time of one call with so many threads; None where too little is known."""
    if cost.flops is None or cost.bytes is None:
        return None
    if cost.peak_gops is not None and cost.peak_gops > 0:
        peaks = replace(
            peaks,
            float32_gflops=cost.peak_gops,
            float16_gflops=cost.peak_gops,
            int8_gops=cost.peak_gops,
        )
    us, bound = peaks.least_us(cost.flops, cost.bytes, cost.arithmetic, threads)
    return Estimate(us=us, bound=bound) if math.isfinite(us) else None


def estimate(peaks: Peaks, cost: KernelCost, threads: int = 1) -> Estimate | None:
    """The time of one call with so many threads; None where too little is known.

    The roofline's time, or that of the kernel's instructions if they take longer: polynomials,
    conversions and lanes without work keep a unit as busy as products do.
    """
    if cost.bytes is None or (cost.flops is None and cost.issue_us is None):
        return None
    least = roofline(peaks, replace(cost, flops=cost.flops or 0), threads)
    if least is None:
        return None
    us, bound = least.us, least.bound
    if cost.issue_us is not None:
        issue_us = cost.issue_us / min(threads or peaks.cores, peaks.cores)
        if issue_us > us:
            us, bound = issue_us, "compute"
    return Estimate(us=us + peaks.call_us, bound=bound) if math.isfinite(us) else None


def target_peaks(manifest: Manifest) -> Peaks | None:
    """The roofline of the bundle's target; None for bundles that do not have it."""
    try:
        return from_json(Peaks, manifest.extra.get("peaks"))
    except ValueError:
        return None


def kernel_costs(manifest: Manifest) -> Mapping[str, KernelCost]:
    """By the name that a plan has for the kernel."""
    found = (record for record in manifest.kernels if isinstance(record, Mapping))
    return {_name_in_plan(record): _cost(record) for record in found}


def _name_in_plan(record: Mapping[str, Any]) -> str:
    return str(record.get("symbol", record.get("name", "")))  # a GPU's kernels have both


def _cost(record: Mapping[str, Any]) -> KernelCost:
    try:
        return from_json(KernelCost, record)
    except ValueError:
        return KernelCost()
