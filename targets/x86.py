"""x86-64 by psABI level: SSE4.2, AVX2 with FMA, AVX-512 with VNNI, and AMX.

`x86-64` has kernels for all of them in one library; the others are for one level alone.

A level is an instruction set, not a device, so clock, cores and bandwidth are those of a nominal
machine of its class; peaks are that clock times what the execution ports retire per cycle (Intel's
optimization manual): without FMA one 4-lane multiply and one add; with AVX2 two 8-lane FMAs; with
AVX-512 two 16-lane FMAs. int8 without VNNI runs as int16 multiply-add pairs (pmaddwd), which is
exact for any int8 values, where pmaddubsw saturates.
"""

import dataclasses

from gfcompile.targets.target import Cpu, Target, register_target

INT8_PMADDWD = "int8 widened to int16, pairwise multiply-add into int32 (pmaddwd)"
INT8_AMX = "int8 x int8 -> int32 in tiles of 16 x 16 x 64 (tdpbusd)"
INT8_VNNI = "int8 x int8 -> int32, four products per lane (vpdpbusd)"

# glibc 2.27, as for the boards: what Ubuntu 18.04 had, and older than every distribution that is
# still maintained for x86-64.
SSE = Cpu(
    arch="x86_64",
    mcpu="x86-64-v2",
    vector_bytes=16,
    vector_registers=16,
    int8_dot=None,
    cores=4,
    clock_ghz=2.0,
    fp32_gflops=2.0 * 8,
    int8_gops=2.0 * 16,
)
AVX2 = Cpu(
    arch="x86_64",
    mcpu="x86-64-v3",
    vector_bytes=32,
    vector_registers=16,
    int8_dot=None,
    cores=4,
    clock_ghz=3.0,
    fp32_gflops=3.0 * 32,
    int8_gops=3.0 * 64,
)
# LLVM tunes x86-64-v4 for the first AVX-512 parts, which slowed down under 512-bit vectors; those
# with VNNI and two 512-bit ports no longer pay for them.
AVX512 = Cpu(
    arch="x86_64",
    mcpu="x86-64-v4",
    features=("-prefer-256-bit",),
    vector_bytes=64,
    vector_registers=32,
    int8_dot=None,
    cores=4,
    clock_ghz=3.0,
    fp32_gflops=3.0 * 64,
    int8_gops=3.0 * 128,
)
AVX512_VNNI = Cpu(
    arch="x86_64",
    mcpu="x86-64-v4",
    features=("+avx512vnni", "-prefer-256-bit"),
    vector_bytes=64,
    vector_registers=32,
    int8_dot="vnni",
    cores=4,
    clock_ghz=3.0,
    fp32_gflops=3.0 * 64,
    int8_gops=3.0 * 256,
)
# The kernel lends the tiles to a process that asks: a library for this CPU asks when it is loaded.
AVX512_AMX = dataclasses.replace(
    AVX512_VNNI,
    features=("+avx512vnni", "+amx-tile", "+amx-int8", "-prefer-256-bit"),
    amx=True,
    int8_gops=3.0 * 2048,
)

X86_64 = register_target(
    Target(
        name="x86-64",
        description="any x86 since 2009, by the best that it has of SSE4.2, AVX2, VNNI and AMX "
        "(2 GHz, DDR3)",
        cpu=SSE,
        levels=(AVX2, AVX512_VNNI, AVX512_AMX),
        bandwidth_gb_s=21.3,
        int8_compute="the best that the CPU has of pmaddwd, vpdpbusd and tdpbusd, all exact",
        int8_note="a quarter of the weights' memory; products at up to twice fp32's rate",
    )
)
X86_64_V3 = register_target(
    Target(
        name="x86-64-v3",
        description="x86-64-v3: Haswell, Zen and later, AVX2, FMA (nominal 3 GHz, 2 x DDR4-2400)",
        cpu=AVX2,
        bandwidth_gb_s=38.4,
        int8_compute=INT8_PMADDWD,
        int8_note="a quarter of the weights' memory; products at up to twice fp32's rate",
    )
)
X86_64_V4 = register_target(
    Target(
        name="x86-64-v4",
        description="x86-64-v4 with VNNI: Ice Lake, Zen 4 and later (nominal 3 GHz, 2 x DDR4-3200)",
        cpu=AVX512_VNNI,
        bandwidth_gb_s=51.2,
        int8_compute=INT8_VNNI,
        int8_note="a quarter of the weights' memory; products at up to four times fp32's rate",
    )
)
