"""64-bit ARM by what its CPUs can multiply: Armv8.0 NEON, the dot product, the matrix product.

`arm64` has kernels for all of them in one library, for any Linux with glibc; `android` has the same
for Android's libc. A level is an instruction set, not a device: clocks and cores are those of a
phone of its class (Qualcomm's product briefs: Snapdragon 625, 855 and 8 Gen 1); operations per
cycle as in `raspberry_pi`, and two smmla of 32 products on the Cortex-A710 (Arm's optimization
guide).
"""

from dataclasses import replace

from gfcompile.targets.target import Cpu, Target, register_target

INT8_BEST = "the best that the CPU has of smull with sadalp, sdot and smmla, all exact"

# Armv8.0-A without its options, which every 64-bit CPU has. Scheduled for the Cortex-A53, as cores
# that reorder need it least. 8 of them.
ARMV8 = Cpu(
    arch="aarch64",
    mcpu="cortex-a53",
    features=("-crc",),
    vector_bytes=16,
    vector_registers=32,
    int8_dot=None,
    in_order=True,
    cores=8,
    clock_ghz=2.0,
    fp32_gflops=2.0 * 8,
    int8_gops=2.0 * 8,
    qemu_cpu="cortex-a53",
)
# Armv8.2-A with float16 arithmetic, but without the dot product, which came later. 4 Cortex-A75 and
# 4 A55 of a Snapdragon 845.
ARMV8_FLOAT16 = replace(
    ARMV8,
    mcpu="cortex-a55",
    features=("-dotprod", "-rcpc"),
    float16=True,
    cores=4,
    clock_ghz=2.8,
    fp32_gflops=2.8 * 16,
    int8_gops=2.8 * 32,
    qemu_cpu="cortex-a76",
)
# Armv8.2-A with the dot product: Cortex-A55 and what stands beside it. 4 Cortex-A76 and 4 A55.
ARMV8_DOTPROD = replace(
    ARMV8,
    mcpu="cortex-a55",
    features=("-fullfp16", "-rcpc"),
    int8_dot="sdot",
    cores=4,
    clock_ghz=2.4,
    fp32_gflops=2.4 * 16,
    int8_gops=2.4 * 64,
    qemu_cpu="cortex-a76",
)
# Armv8.6-A: Cortex-A510 and what stands beside it, Graviton 3. LLVM's own entry for the A510 is of
# Armv9 and would bring SVE. 3 Cortex-A710. No named CPU of qemu has the matrix product yet.
ARMV8_I8MM = replace(
    ARMV8_DOTPROD,
    features=("-fullfp16", "-rcpc", "+i8mm"),
    i8mm=True,
    cores=3,
    clock_ghz=2.5,
    fp32_gflops=2.5 * 16,
    int8_gops=2.5 * 128,
    qemu_cpu="max",
)


def in_one_library(*cpus: Cpu) -> tuple[Cpu, ...]:
    """The CPUs with their weights laid out alike, so that a library for all has them once."""
    return tuple(replace(cpu, shares_weights=True) for cpu in cpus)


_LEAST, *_BETTER = in_one_library(ARMV8, ARMV8_DOTPROD, ARMV8_I8MM)
_FLOAT16 = in_one_library(ARMV8_FLOAT16)

ARM64 = register_target(
    Target(
        name="arm64",
        description="any 64-bit ARM Linux, by its best of NEON, sdot, smmla (8 Cortex-A53, LPDDR3)",
        cpu=_LEAST,
        levels=tuple(_BETTER),
        float16_levels=_FLOAT16,
        bandwidth_gb_s=7.5,  # 32 bit at 1866 MT/s
        int8_compute=INT8_BEST,
        int8_note="a quarter of the weights' memory; sdot and smmla where the CPU has them",
    )
)
