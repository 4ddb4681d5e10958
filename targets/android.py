"""Android phones and tablets of 64 bits, by what their smallest core can execute.

One bundle runs on every phone that has its instructions; what `gfcompile targets` prints are the
figures of one such phone. Clocks and memory are those of Qualcomm's product briefs; operations per
cycle as in `raspberry_pi`.
"""

from dataclasses import replace

from gfcompile.targets.raspberry_pi import INT8_SDOT, INT8_SMULL
from gfcompile.targets.target import Cpu, Target, register_target

# Armv8.0-A without its options, which every 64-bit phone has, so that no core meets an instruction
# that it does not know. Scheduled for the Cortex-A53, as cores that reorder need it least.
# Snapdragon 625: 8 of them.
ARMV8 = Cpu(
    arch="aarch64",
    mcpu="cortex-a53",
    features=("-crc",),
    vector_bytes=16,
    vector_registers=32,
    int8_dot=None,
    in_order=True,
    android_api=21,
    cores=8,
    clock_ghz=2.0,
    fp32_gflops=2.0 * 8,
    int8_gops=2.0 * 8,
    qemu_cpu="cortex-a53",
)
# Armv8.2-A with the dot product: Cortex-A55 and what stands beside it. Snapdragon 855: 4 Cortex-A76
# and 4 Cortex-A55.
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

ANDROID_ARM64 = register_target(
    Target(
        name="android-arm64",
        description="any 64-bit phone, Android 5 or later; figures of a Snapdragon 625",
        cpu=ARMV8,
        bandwidth_gb_s=7.5,  # 32 bit at 1866 MT/s
        int8_compute=INT8_SMULL,
        int8_note="a quarter of the weights' memory; no sdot, as the smallest cores have none",
    )
)
ANDROID_ARM64_DOTPROD = register_target(
    Target(
        name="android-arm64-dotprod",
        description="phones from about 2018 on, whose cores have sdot; figures of a Snapdragon 855",
        cpu=ARMV8_DOTPROD,
        bandwidth_gb_s=34.1,  # 64 bit at 4266 MT/s
        int8_compute=INT8_SDOT,
        int8_note="a quarter of the weights' memory; products at up to four times fp32's rate",
    )
)
