"""The least time that a kernel can take: its operations at the peak, or its bytes at the bandwidth.

Peaks are those that the bundle's manifest has of its target, its maker's figures. The estimate of a
kernel's time knows the instructions of its schedule as well; it is an estimate, never a result.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    flops: int | None = None
    bytes: int | None = None
    arithmetic: Literal["float32", "float16", "int8"] = "float32"
    issue_us: float | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The time of one call, estimated, and what it waits for."""

    us: float
    bound: Bound


def estimate(peaks: Peaks, cost: KernelCost, threads: int = 1) -> Estimate | None:
    """The time of one call with so many threads; None where too little is known.

    The roofline's time, or that of the kernel's instructions if they take longer: polynomials,
    conversions and lanes without work keep a unit as busy as products do.
    """
    if cost.bytes is None or (cost.flops is None and cost.issue_us is None):
        return None
    us, bound = peaks.least_us(cost.flops or 0, cost.bytes, cost.arithmetic, threads)
    if cost.issue_us is not None:
        issue_us = cost.issue_us / min(threads or peaks.cores, peaks.cores)
        if issue_us > us:
            us, bound = issue_us, "compute"
    return Estimate(us=us + peaks.call_us, bound=bound) if math.isfinite(us) else None


def target_peaks(manifest: Manifest, level: int = 0) -> Peaks | None:
    """The roofline of the bundle's target; None for bundles that do not have it.

    Args:
        level: of the CPU, see `Target.levels`; 0 is the least one.
    """
    values, levels = manifest.extra.get("peaks"), manifest.extra.get("level_peaks")
    if isinstance(levels, list | tuple) and 0 <= level < len(levels):
        values = levels[level]
    try:
        return from_json(Peaks, values)
    except ValueError:
        return None


def kernel_levels(manifest: Manifest) -> Mapping[str, int]:
    """The level of the CPU that each kernel is for, by the name that a plan has for it."""
    found = (record for record in manifest.kernels if isinstance(record, Mapping))
    return {
        _name_in_plan(record): level if isinstance(level := record.get("level", 0), int) else 0
        for record in found
    }


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
