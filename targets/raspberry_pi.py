"""Raspberry Pi 3, 4 and 5 under a 64-bit system: Cortex-A53, A72 and A76.

Clocks and memory are those of raspberrypi.com's product pages. Peaks per core and cycle: the A53
and the A72 retire one 4-lane FMLA (8 operations), the A76 two (Arm's software optimization guides
of A72 and A76). int8 by smull/smlal2 is 8 products a cycle on the A72; the A53 needs two cycles for
a 128-bit one; the A76 retires two sdot of 16 products.
"""

from gfcompile.targets.target import Cpu, Target, register_target

INT8_SMULL = "int8 x int8 -> int16, pairs added into int32 (smull, smlal2, sadalp)"
INT8_SDOT = "int8 x int8 -> int32, four products per lane (sdot)"
INT8_SMMLA = "int8 x int8 -> int32 in tiles of 2 x 2 x 8 (smmla)"

# glibc 2.27 predates every 64-bit Raspberry Pi OS; Ubuntu 18.04 for the Pi has just that one.
CORTEX_A53 = Cpu(
    arch="aarch64",
    mcpu="cortex-a53",
    vector_bytes=16,
    vector_registers=32,
    int8_dot=None,
    in_order=True,
    cores=4,
    clock_ghz=1.4,
    fp32_gflops=1.4 * 8,
    int8_gops=1.4 * 8,
    qemu_cpu="cortex-a53",
)
CORTEX_A72 = Cpu(
    arch="aarch64",
    mcpu="cortex-a72",
    vector_bytes=16,
    vector_registers=32,
    int8_dot=None,
    cores=4,
    clock_ghz=1.8,
    fp32_gflops=1.8 * 8,
    int8_gops=1.8 * 16,
    qemu_cpu="cortex-a72",
)
CORTEX_A76 = Cpu(
    arch="aarch64",
    mcpu="cortex-a76",
    vector_bytes=16,
    vector_registers=32,
    int8_dot="sdot",
    float16=True,
    cores=4,
    clock_ghz=2.4,
    fp32_gflops=2.4 * 16,
    int8_gops=2.4 * 64,
    qemu_cpu="cortex-a76",
)

RASPBERRY_PI_3 = register_target(
    Target(
        name="raspberry-pi-3",
        description="Raspberry Pi 3 B+: BCM2837B0, 4 Cortex-A53 (in order), LPDDR2-900",
        cpu=CORTEX_A53,
        bandwidth_gb_s=3.6,  # 32 bit at 900 MT/s
        int8_compute=INT8_SMULL,
        int8_note="a quarter of the weights' memory, which is what its bus needs most; no sdot",
    )
)
RASPBERRY_PI_4 = register_target(
    Target(
        name="raspberry-pi-4",
        description="Raspberry Pi 4 B: BCM2711, 4 Cortex-A72, LPDDR4-3200",
        cpu=CORTEX_A72,
        bandwidth_gb_s=12.8,  # 32 bit at 3200 MT/s
        int8_compute=INT8_SMULL,
        int8_note="a quarter of the weights' memory; products at up to twice fp32's rate; no sdot",
    )
)
RASPBERRY_PI_5 = register_target(
    Target(
        name="raspberry-pi-5",
        description="Raspberry Pi 5: BCM2712, 4 Cortex-A76, LPDDR4X-4267",
        cpu=CORTEX_A76,
        bandwidth_gb_s=17.1,  # 32 bit at 4267 MT/s
        int8_compute=INT8_SDOT,
        int8_note="a quarter of the weights' memory; products at up to four times fp32's rate",
    )
)
