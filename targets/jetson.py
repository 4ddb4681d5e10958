"""NVIDIA Jetson Nano, TX2, AGX Xavier and AGX Orin: their GPUs, and as `-cpu` their CPUs.

Sources: clocks, cores and memory from NVIDIA's module data sheets, at the fastest power mode;
limits per multiprocessor from the table of compute capabilities in the CUDA C++ programming guide;
PTX versions from the PTX ISA's release table (CUDA 10.2 reads up to 6.5, CUDA 11.4 up to 7.4).
GPU peaks are those of the CUDA cores, which is what our kernels use; tensor cores are not counted.
JetPack 4.6 (Nano, TX2, Xavier) is Ubuntu 18.04 with glibc 2.27, and Orin's is newer.
"""

from gfcompile.targets.raspberry_pi import INT8_SDOT, INT8_SMULL
from gfcompile.targets.target import Cpu, Gpu, Target, register_target

INT8_DP4A = "int8 x int8 -> int32, four products per instruction (dp4a)"
# |x w| <= 128 * 127 = 2**14 - 128, so a float's 24 bits hold the sum of 1024 products exactly;
# longer sums continue in int32.
INT8_FFMA = "float32 FFMA on the int8 values, in sums short enough to be exact"

CORTEX_A57_NANO = Cpu(
    arch="aarch64",
    mcpu="cortex-a57",
    vector_bytes=16,
    vector_registers=32,
    int8_dot=None,
    cores=4,
    clock_ghz=1.43,
    fp32_gflops=1.43 * 8,  # one 4-lane FMLA a cycle
    int8_gops=1.43 * 16,
    qemu_cpu="cortex-a57",
)
# Two Denver 2 and four Cortex-A57 share the system. Both are plain ARMv8.0, and threads move
# between the clusters, so the code is scheduled for the A57.
CORTEX_A57_TX2 = Cpu(
    arch="aarch64",
    mcpu="cortex-a57",
    vector_bytes=16,
    vector_registers=32,
    int8_dot=None,
    cores=4,
    clock_ghz=2.0,
    fp32_gflops=2.0 * 8,
    int8_gops=2.0 * 16,
    qemu_cpu="cortex-a57",
)
# ARMv8.2 with fp16 and without the dot product. NVIDIA publishes no throughput of Carmel's vector
# units; two 4-lane FMLA a cycle are assumed. qemu has no Carmel; the A76 runs all it can.
CARMEL = Cpu(
    arch="aarch64",
    mcpu="carmel",
    vector_bytes=16,
    vector_registers=32,
    int8_dot=None,
    float16=True,
    cores=8,
    clock_ghz=2.26,
    fp32_gflops=2.26 * 16,
    int8_gops=2.26 * 16,
    qemu_cpu="cortex-a76",
)
CORTEX_A78AE = Cpu(
    arch="aarch64",
    mcpu="cortex-a78ae",
    vector_bytes=16,
    vector_registers=32,
    int8_dot="sdot",
    float16=True,
    cores=12,
    clock_ghz=2.2,
    fp32_gflops=2.2 * 16,  # two 4-lane FMLA a cycle
    int8_gops=2.2 * 64,  # two sdot of 16 products a cycle
    qemu_cpu="cortex-a76",  # qemu has no A78AE; both are ARMv8.2 with dot product
)

JETSON_NANO = register_target(
    Target(
        name="jetson-nano",
        description="Jetson Nano: Tegra X1, Maxwell GPU with 128 cores, JetPack 4.6",
        cpu=CORTEX_A57_NANO,
        gpu=Gpu(
            arch="sm_53",
            ptx_isa="6.5",
            int8_dot=False,
            sms=1,
            clock_ghz=0.9216,
            fp32_tflops=0.236,
            fp16_tflops=0.472,
            int8_tops=0.236,  # computed as fp32
            shared_bytes_per_sm=64 * 1024,
            registers_per_sm=64 * 1024,
            threads_per_sm=2048,
            blocks_per_sm=32,
        ),
        bandwidth_gb_s=25.6,  # 64-bit LPDDR4-3200
        int8_compute=INT8_FFMA,
        int8_note="a quarter of the memory, no faster products: sm_53 has no dp4a",
    )
)
JETSON_TX2 = register_target(
    Target(
        name="jetson-tx2",
        description="Jetson TX2: Pascal GP10B GPU with 256 cores, Denver 2 and Cortex-A57, "
        "JetPack 4.6",
        cpu=CORTEX_A57_TX2,
        gpu=Gpu(
            arch="sm_62",
            ptx_isa="6.5",
            # ptxas turns one dp4a into 8 BFE + 4 XMAD here, into one IDP.4A for sm_61.
            int8_dot=False,
            sms=2,
            clock_ghz=1.302,
            fp32_tflops=0.67,
            fp16_tflops=1.33,
            int8_tops=0.67,  # computed as fp32
            shared_bytes_per_sm=64 * 1024,
            registers_per_sm=64 * 1024,
            threads_per_sm=2048,
            blocks_per_sm=32,
        ),
        bandwidth_gb_s=59.7,  # 128-bit LPDDR4-3733
        int8_compute=INT8_FFMA,
        int8_note="a quarter of the memory, no faster products: sm_62 emulates dp4a",
    )
)
JETSON_XAVIER = register_target(
    Target(
        name="jetson-xavier",
        description="Jetson AGX Xavier: Volta GV10B GPU with 512 cores, 8 Carmel, JetPack 4.6",
        cpu=CARMEL,
        gpu=Gpu(
            arch="sm_72",
            ptx_isa="6.5",
            int8_dot=True,
            sms=8,
            clock_ghz=1.377,
            fp32_tflops=1.41,
            fp16_tflops=2.82,
            int8_tops=5.64,  # dp4a issues as often as FFMA
            shared_bytes_per_sm=96 * 1024,
            registers_per_sm=64 * 1024,
            threads_per_sm=2048,
            blocks_per_sm=32,
        ),
        bandwidth_gb_s=136.5,  # 256-bit LPDDR4X-4266
        int8_compute=INT8_DP4A,
        int8_note="a quarter of the memory; products at up to four times fp32's rate",
    )
)
JETSON_ORIN = register_target(
    Target(
        name="jetson-orin",
        description="Jetson AGX Orin: Ampere GA10B GPU with 2048 cores, 12 Cortex-A78AE, JetPack 5",
        cpu=CORTEX_A78AE,
        gpu=Gpu(
            arch="sm_87",
            ptx_isa="7.4",
            int8_dot=True,
            sms=16,
            clock_ghz=1.3,
            fp32_tflops=5.32,
            # Not published for the CUDA cores; as on the other GA10x, paired halves at half the
            # lanes come out at fp32's rate.
            fp16_tflops=5.32,
            int8_tops=10.6,  # dp4a on 64 of a multiprocessor's 128 lanes
            shared_bytes_per_sm=164 * 1024,
            registers_per_sm=64 * 1024,
            threads_per_sm=1536,
            blocks_per_sm=16,
        ),
        bandwidth_gb_s=204.8,  # 256-bit LPDDR5-6400
        int8_compute=INT8_DP4A,
        int8_note="a quarter of the memory; products at up to twice fp32's rate",
    )
)

JETSON_NANO_CPU = register_target(
    Target(
        name="jetson-nano-cpu",
        description="Jetson Nano without its GPU: 4 Cortex-A57",
        cpu=CORTEX_A57_NANO,
        bandwidth_gb_s=JETSON_NANO.bandwidth_gb_s,
        int8_compute=INT8_SMULL,
        int8_note="a quarter of the weights' memory; products at up to twice fp32's rate; no sdot",
    )
)
JETSON_TX2_CPU = register_target(
    Target(
        name="jetson-tx2-cpu",
        description="Jetson TX2 without its GPU: 4 Cortex-A57, 2 Denver 2",
        cpu=CORTEX_A57_TX2,
        bandwidth_gb_s=JETSON_TX2.bandwidth_gb_s,
        int8_compute=INT8_SMULL,
        int8_note="a quarter of the weights' memory; products at up to twice fp32's rate; no sdot",
    )
)
JETSON_XAVIER_CPU = register_target(
    Target(
        name="jetson-xavier-cpu",
        description="Jetson AGX Xavier without its GPU: 8 Carmel",
        cpu=CARMEL,
        bandwidth_gb_s=JETSON_XAVIER.bandwidth_gb_s,
        int8_compute=INT8_SMULL,
        int8_note="a quarter of the weights' memory; products at about fp32's rate; no sdot",
    )
)
JETSON_ORIN_CPU = register_target(
    Target(
        name="jetson-orin-cpu",
        description="Jetson AGX Orin without its GPU: 12 Cortex-A78AE",
        cpu=CORTEX_A78AE,
        bandwidth_gb_s=JETSON_ORIN.bandwidth_gb_s,
        int8_compute=INT8_SDOT,
        int8_note="a quarter of the weights' memory; products at up to four times fp32's rate",
    )
)
