"""`host`: the CPU that this process runs on, as the Linux kernel describes it."""

import dataclasses
import os
import platform
from pathlib import Path

from gfcompile.runtime.errors import UserError
from gfcompile.targets.arm64 import ARMV8_FLOAT16, ARMV8_I8MM, in_one_library
from gfcompile.targets.raspberry_pi import (
    CORTEX_A53,
    CORTEX_A72,
    CORTEX_A76,
    INT8_SDOT,
    INT8_SMMLA,
    INT8_SMULL,
)
from gfcompile.targets.target import Cpu, Target
from gfcompile.targets.x86 import (
    AVX2,
    AVX512,
    AVX512_AMX,
    AVX512_VNNI,
    INT8_AMX,
    INT8_PMADDWD,
    INT8_VNNI,
    SSE,
)

# What makes an x86-64 level usable; the levels' other members come with these.
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AMX = {"avx512_vnni", "amx_tile", "amx_int8"}
_AVX2 = {"avx2", "fma", "f16c", "bmi2"}
_SSE = {"sse4_2", "ssse3", "popcnt"}

_CPUINFO = Path("/proc/cpuinfo")
_MAX_FREQUENCY_KHZ = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")


def host_target() -> Target:
    """The target called `host`: nearest level of instructions, and the real core count and clock.

    Raises:
        UserError: this machine is neither x86-64 nor arm64 Linux.
    """
    if not _CPUINFO.exists():
        raise UserError(
            f"target host needs Linux, this is {platform.system()}; name a target instead"
        )
    cpuinfo = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    level = cpu_level(platform.machine(), cpuinfo)
    cores = len(os.sched_getaffinity(0))
    clock_ghz = _clock_ghz(cpuinfo) or level.clock_ghz

    def here(level: Cpu) -> Cpu:
        return dataclasses.replace(
            level,
            cores=cores,
            clock_ghz=clock_ghz,
            fp32_gflops=level.fp32_gflops / level.clock_ghz * clock_ghz,
            int8_gops=level.int8_gops / level.clock_ghz * clock_ghz,
        )

    cpu = here(level)
    features = cpu_flags() if cpu.arch == "aarch64" else set()
    halves = "asimdhp" in features and not cpu.float16
    name = _field(cpuinfo, "model name") or f"{cpu.arch} CPU"
    compute = {
        ("x86_64", "vnni"): INT8_VNNI,
        ("x86_64", None): INT8_PMADDWD,
        ("aarch64", "sdot"): INT8_SDOT,
        ("aarch64", None): INT8_SMULL,
    }[cpu.arch, cpu.int8_dot]
    compute = INT8_AMX if cpu.amx else INT8_SMMLA if cpu.i8mm else compute
    times = round(cpu.int8_gops / cpu.fp32_gflops)
    return Target(
        name="host",
        description=f"this machine: {name}, {cores} cores (bandwidth nominal, not measured)",
        # The kernel may refuse AMX's tiles to a process: then it runs without.
        cpu=here(AVX512_VNNI) if cpu.amx else cpu,
        levels=(cpu,) if cpu.amx else (),
        float16_levels=in_one_library(here(ARMV8_FLOAT16)) if halves else (),
        bandwidth_gb_s=51.2 if cpu.vector_bytes == 64 else 38.4 if cpu.vector_bytes == 32 else 12.8,
        int8_compute=compute,
        int8_note=f"a quarter of the weights' memory; products at up to {times}x fp32's rate",
    )


def cpu_level(machine: str, cpuinfo: str) -> Cpu:
    """The best Cpu of ours whose instructions a machine has.

    Args:
        machine: as `uname -m` says it.
        cpuinfo: the text of /proc/cpuinfo.
    """
    if machine in ("x86_64", "AMD64"):
        flags = set(_field(cpuinfo, "flags").split())
        if flags >= _AVX512 | _AVX2:
            if "avx512_vnni" not in flags:
                return AVX512
            return AVX512_AMX if flags >= _AMX else AVX512_VNNI
        if flags >= _AVX2:
            return AVX2
        if flags >= _SSE:
            return SSE
        raise UserError("target host: this CPU has no SSE4.2, which every x86 target needs")
    if machine in ("aarch64", "arm64"):
        features = set(_field(cpuinfo, "Features").split())
        if features >= {"asimddp", "i8mm"}:
            return ARMV8_I8MM
        if "asimddp" in features:
            return CORTEX_A76
        return CORTEX_A53 if _field(cpuinfo, "CPU part") == "0xd03" else CORTEX_A72
    raise UserError(f"target host: no support for {machine}; x86_64 and aarch64 are supported")


def cpu_flags() -> set[str]:
    """What /proc/cpuinfo says that this machine's CPUs can do."""
    lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    return {
        flag
        for line in lines
        if line.startswith(("flags", "Features"))
        for flag in line.partition(":")[2].split()
    }


def _clock_ghz(cpuinfo: str) -> float | None:
    """The fastest clock that the kernel tells of; None if it tells none."""
    try:
        return int(_MAX_FREQUENCY_KHZ.read_text(encoding="ascii")) / 1e6
    except (OSError, ValueError):
        mhz = _field(cpuinfo, "cpu MHz")
        return round(float(mhz) / 1000, 2) if mhz else None


def _field(cpuinfo: str, name: str) -> str:
    """The first value of a /proc/cpuinfo field, empty if there is none."""
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""
