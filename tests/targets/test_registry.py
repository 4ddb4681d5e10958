"""The table of targets: complete, consistent, and known to LLVM and qemu."""

import re
import subprocess

import pytest

from gfcompile.runtime.errors import UserError
from gfcompile.targets.host import cpu_level
from gfcompile.targets.target import Cpu, Target, all_targets, find_target
from tools import need

NAMES = [
    *("x86-64", "x86-64-v3", "x86-64-v4"),
    "arm64",
    *("raspberry-pi-3", "raspberry-pi-4", "raspberry-pi-5"),
    *("android-arm64", "android-arm64-dotprod"),
    *("jetson-nano", "jetson-tx2", "jetson-xavier", "jetson-orin"),
    *("jetson-nano-cpu", "jetson-tx2-cpu", "jetson-xavier-cpu", "jetson-orin-cpu"),
    *("tflite-xnnpack", "tflite-int-only", "coreml"),
]
DEVICES = [target for target in all_targets() if isinstance(target, Target)]
CPUS = [(target.name, cpu) for target in DEVICES for cpu in (target.cpu, *target.levels)]

# What a row of /proc/cpuinfo looks like on machines of each kind, shortened.
SKYLAKE_X = (
    "flags\t: sse4_2 ssse3 popcnt avx2 fma f16c bmi2 avx512f avx512bw avx512cd avx512dq avx512vl"
)
ICE_LAKE = SKYLAKE_X + " avx512_vnni"
SAPPHIRE_RAPIDS = ICE_LAKE + " amx_bf16 amx_tile amx_int8"
HASWELL = "flags\t: sse4_2 ssse3 popcnt avx2 fma f16c bmi2"
NEHALEM = "flags\t: sse4_2 ssse3 popcnt"
PI_5 = "CPU part\t: 0xd0b\nFeatures\t: fp asimd fphp asimdhp asimddp"
PI_4 = "CPU part\t: 0xd08\nFeatures\t: fp asimd crc32"
GRAVITON_3 = "CPU part\t: 0xd40\nFeatures\t: fp asimd fphp asimdhp asimddp i8mm bf16"
PI_3 = "CPU part\t: 0xd03\nFeatures\t: fp asimd crc32"


def test_every_promised_target_is_registered() -> None:
    assert {target.name for target in all_targets()} == set(NAMES)


def test_unknown_target_names_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match=r"'jetson-tx3'; did you mean jetson-tx2\?") as caught:
        find_target("jetson-tx3")
    assert all(name in str(caught.value) for name in ("host", *NAMES))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cpu", [pytest.param(cpu, id=f"{name}-{cpu.mcpu}") for name, cpu in CPUS])
def test_cpu_figures_agree_with_each_other(cpu: Cpu) -> None:
    # The peak is a whole number of operations per cycle, a multiple of two per float lane.
    per_cycle = cpu.fp32_gflops / cpu.clock_ghz
    assert per_cycle % (2 * cpu.float_lanes) == pytest.approx(0, abs=1e-9)
    # A four-way dot product does four times what float lanes do, at the same issue rate.
    assert (cpu.int8_gops / cpu.fp32_gflops >= 4) == (cpu.int8_dot is not None)
    assert tuple(map(int, cpu.glibc.split("."))) <= (2, 27)
    if cpu.arch == "aarch64":
        assert cpu.qemu_cpu is not None


@pytest.mark.parametrize(
    "target", [t for t in DEVICES if t.gpu is not None], ids=lambda target: target.name
)
def test_gpu_figures_agree_with_each_other(target: Target) -> None:
    gpu = target.gpu
    assert gpu is not None
    # Lanes per multiprocessor: 128 on Maxwell, Pascal GP10B and Ampere GA10B, 64 on Volta.
    lanes = 64 if gpu.arch == "sm_72" else 128
    assert gpu.fp32_tflops == pytest.approx(2 * lanes * gpu.sms * gpu.clock_ghz / 1000, rel=0.01)
    major, minor = gpu.compute_capability
    assert gpu.arch == f"sm_{major}{minor}"
    # dp4a came with sm_61, but sm_62 emulates it.
    assert gpu.int8_dot == ((major, minor) >= (7, 0))
    # JetPack 4.6 is CUDA 10.2; Orin needs JetPack 5, CUDA 11.4.
    assert gpu.ptx_isa == ("7.4" if gpu.arch == "sm_87" else "6.5")


def test_int8_is_said_as_it_is_computed() -> None:
    assert "FFMA" in find_target("jetson-tx2").int8_compute
    assert "dp4a" in find_target("jetson-orin").int8_compute
    for target in DEVICES:
        if target.gpu is None:
            word = {"vnni": "vpdpbusd", "sdot": "sdot"}.get(target.cpu.int8_dot or "")
            assert word is None or word in target.int8_compute


def test_llvm_knows_every_cpu_and_feature() -> None:
    from tvm.target import Target as TvmTarget
    from tvm.target import codegen

    for name, cpu in CPUS:
        tvm_target = TvmTarget({"kind": "llvm", "mtriple": cpu.llvm_triple})
        assert cpu.mcpu in set(codegen.llvm_get_cpu_archlist(tvm_target)), name
        with_features = TvmTarget(
            {
                "kind": "llvm",
                "mtriple": cpu.llvm_triple,
                "mcpu": cpu.mcpu,
                "mattr": list(cpu.features),
            }
        )
        wanted = {"vnni": {"avx512vnni"}, "sdot": {"dotprod"}, None: set()}[cpu.int8_dot]
        wanted |= {"i8mm"} if cpu.i8mm else set()
        features = set(codegen.llvm_get_cpu_features(with_features))
        assert wanted <= features, (name, sorted(features))


def test_qemu_knows_every_stand_in() -> None:
    listed = subprocess.run(
        [need("qemu-aarch64"), "-cpu", "help"], capture_output=True, text=True
    )  # it exits with 1 after help
    known = set(re.findall(r"^\s+(\S+)$", listed.stdout, re.MULTILINE))
    for name, cpu in CPUS:
        if cpu.qemu_cpu is not None:
            assert cpu.qemu_cpu in known, name


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "mcpu", "int8_dot"),
    [
        ("x86_64", SAPPHIRE_RAPIDS, "x86-64-v4", "vnni"),
        ("x86_64", ICE_LAKE, "x86-64-v4", "vnni"),
        ("x86_64", SKYLAKE_X, "x86-64-v4", None),
        ("x86_64", HASWELL, "x86-64-v3", None),
        ("x86_64", NEHALEM, "x86-64-v2", None),
        ("aarch64", GRAVITON_3, "cortex-a55", "sdot"),
        ("aarch64", PI_5, "cortex-a76", "sdot"),
        ("aarch64", PI_4, "cortex-a72", None),
        ("aarch64", PI_3, "cortex-a53", None),
    ],
)
def test_host_is_recognised_by_its_flags(
    machine: str, cpuinfo: str, mcpu: str, int8_dot: str | None
) -> None:
    cpu = cpu_level(machine, cpuinfo)
    assert (cpu.mcpu, cpu.int8_dot) == (mcpu, int8_dot)
    assert cpu.amx == ("amx_int8" in cpuinfo)
    assert cpu.i8mm == ("i8mm" in cpuinfo)


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "words"),
    [("x86_64", "flags\t: sse2", "SSE4.2"), ("riscv64", "", "riscv64")],
)
def test_host_that_no_library_runs_on_is_refused(machine: str, cpuinfo: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        cpu_level(machine, cpuinfo)


def test_host_peaks_follow_its_clock() -> None:
    host = find_target("host")
    level = next(t.cpu for t in DEVICES if t.cpu.mcpu == host.cpu.mcpu)
    assert host.cpu.cores >= 1
    assert host.cpu.fp32_gflops / host.cpu.clock_ghz == pytest.approx(
        level.fp32_gflops / level.clock_ghz
    )
