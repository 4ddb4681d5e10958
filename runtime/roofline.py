"""The least time that a kernel can take: its operations at the peak, or its bytes at the bandwidth.

Peaks are those that the bundle's manifest has of its target, its maker's figures.
"""

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
    """

    float32_gflops: float
    float16_gflops: float
    int8_gops: float
    bandwidth_gb_s: float
    cores: int = 1

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
    """What one call of a kernel takes, as the manifest has it; None where it is not known."""

    flops: int | None = None
    bytes: int | None = None
    arithmetic: Literal["float32", "float16", "int8"] = "float32"


def target_peaks(manifest: Manifest) -> Peaks | None:
    """The roofline of the bundle's target; None for bundles that do not have it."""
    try:
        return from_json(Peaks, manifest.extra.get("peaks"))
    except ValueError:
        return None


def kernel_costs(manifest: Manifest) -> Mapping[str, KernelCost]:
    """By the name that a plan has for the kernel."""
    return {_name_in_plan(record): _cost(record) for record in manifest.kernels}


def _name_in_plan(record: Mapping[str, Any]) -> str:
    return str(record.get("symbol", record.get("name", "")))  # a GPU's kernels have both


def _cost(record: Mapping[str, Any]) -> KernelCost:
    try:
        return from_json(KernelCost, record)
    except ValueError:
        return KernelCost()
