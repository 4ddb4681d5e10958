"""What the compiler knows of a device, and the registry of devices by name."""

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from gfcompile.runtime.errors import UserError
from gfcompile.runtime.roofline import Peaks


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """One CPU: what LLVM generates for, and what its kernels may use.

    Attributes:
        arch: "x86_64" or "aarch64", as `uname -m` says it.
        mcpu: LLVM's name of the CPU.
        features: further LLVM features, each "+name" or "-name".
        vector_bytes: width of a SIMD register.
        vector_registers: how many of them.
        int8_dot: the instruction that multiplies 4 int8 pairs into an int32, if there is one.
        i8mm: whether it multiplies 2 x 8 with 8 x 2 int8 at once (Arm's smmla).
        float16: whether it multiplies and adds vectors of float16 (Arm's FEAT_FP16).
        amx: whether it multiplies tiles of uint8 with int8 (x86 AMX), once the kernel allows it.
        shares_weights: whether a library has its kernels beside those for other CPUs, so that
            packed weights have to lie alike for all of them.
        in_order: whether instructions issue in program order (Cortex-A53).
        glibc: the oldest glibc that the library must load on, unless it is for Android.
        android_api: the oldest API level of Android that the library must load on; None for glibc.
        cores, clock_ghz: of the (big) cluster.
        fp32_gflops, int8_gops: peak of one core, multiply and add counted as two.
        qemu_cpu: what `qemu-aarch64 -cpu` calls it, where it can stand in.
    """

    arch: Literal["x86_64", "aarch64"]
    mcpu: str
    features: tuple[str, ...] = ()
    vector_bytes: int
    vector_registers: int
    int8_dot: Literal["vnni", "sdot"] | None
    i8mm: bool = False
    float16: bool = False
    amx: bool = False
    shares_weights: bool = False
    in_order: bool = False
    glibc: str = "2.27"
    android_api: int | None = None
    cores: int
    clock_ghz: float
    fp32_gflops: float
    int8_gops: float
    qemu_cpu: str | None = None

    @property
    def llvm_triple(self) -> str:
        if self.android_api is None:
            return f"{self.arch}-linux-gnu"
        # LLVM then leaves x18 alone, which Android keeps for itself; it does not understand the
        # name without its second part, and says nothing.
        return f"{self.arch}-unknown-linux-android{self.android_api}"

    @property
    def float_lanes(self) -> int:
        return self.vector_bytes // 4


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One CUDA GPU.

    Attributes:
        arch: "sm_62" and the like.
        ptx_isa: the newest PTX ISA version that the board's driver accepts.
        int8_dot: whether dp4a is one instruction there.
        sms, clock_ghz: streaming multiprocessors and their clock.
        fp32_tflops, fp16_tflops, int8_tops: peaks, multiply and add counted as two.
        shared_bytes_per_sm, registers_per_sm, threads_per_sm, blocks_per_sm: for occupancy.
    """

    arch: str
    ptx_isa: str
    int8_dot: bool
    sms: int
    clock_ghz: float
    fp32_tflops: float
    fp16_tflops: float
    int8_tops: float
    shared_bytes_per_sm: int
    registers_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int

    @property
    def compute_capability(self) -> tuple[int, int]:
        digits = self.arch.removeprefix("sm_")
        return int(digits[:-1]), int(digits[-1])


@dataclass(frozen=True, kw_only=True)
class _Named:
    """What every target has.

    Attributes:
        name: as given to --target.
        description: the device or the format in words.
        int8_compute: what int8 products are computed in there, for the manifest.
        int8_note: what --int8 buys there, in one sentence, for `gfcompile targets`.
    """

    name: str
    description: str
    int8_compute: str
    int8_note: str


@dataclass(frozen=True, kw_only=True)
class Target(_Named):
    """A device that gfcompile compiles kernels for, which its own C runtime runs.

    Attributes:
        cpu: the CPU that the library runs on; the least one, where there are `levels`.
        levels: better CPUs of its kind, from worse to better, that the library has kernels for as
            well; it takes the best that it finds itself on.
        float16_levels: the same for kernels in float16. Those for a CPU without float16 arithmetic
            widen what is stored so.
        gpu: the GPU that the kernels run on; None where they run on the CPU.
        bandwidth_gb_s: peak memory bandwidth.
    """

    cpu: Cpu
    levels: tuple[Cpu, ...] = ()
    float16_levels: tuple[Cpu, ...] = ()
    gpu: Gpu | None = None
    bandwidth_gb_s: float

    @property
    def has_float16(self) -> bool:
        """Whether a CPU that it is for, or a level of it, has float16 arithmetic."""
        return self.gpu is None and (self.cpu.float16 or bool(self.float16_levels))

    def for_float16(self) -> "Target":
        """The target with the levels that kernels in float16 are for."""
        assert self.has_float16, f"{self.name} has no float16 arithmetic"
        cpu = replace(self.cpu, shares_weights=bool(self.float16_levels))
        return replace(self, cpu=cpu, levels=self.float16_levels)


@dataclass(frozen=True, kw_only=True)
class ModelFormat(_Named):
    """A model file that a runtime of others executes, on whatever device it finds.

    Attributes:
        emitter: which emitter writes it, and the kind of its bundles: "tflite" or "coreml".
        integer_only: whether every operator must be an integer one.
    """

    emitter: Literal["tflite", "coreml"]
    integer_only: bool = False


AnyTarget = Target | ModelFormat

# Short names for what most users of a format want.
ALIASES = {"tflite": "tflite-xnnpack"}

# Between two dependent kernels of one stream: an estimate, not measured on a board.
GPU_LAUNCH_US = 5.0

_TARGETS: dict[str, AnyTarget] = {}


_Registered = TypeVar("_Registered", Target, ModelFormat)


def peaks(target: Target) -> Peaks:
    """The roofline of the processor that the target's kernels run on."""
    if target.gpu is not None:
        return Peaks(
            float32_gflops=1e3 * target.gpu.fp32_tflops,
            float16_gflops=1e3 * target.gpu.fp16_tflops,
            int8_gops=1e3 * target.gpu.int8_tops,
            bandwidth_gb_s=target.bandwidth_gb_s,
            call_us=GPU_LAUNCH_US,
        )
    return Peaks(
        float32_gflops=target.cpu.fp32_gflops,
        # Twice the lanes; elsewhere float16 is storage, never arithmetic.
        float16_gflops=target.cpu.fp32_gflops * (2 if target.cpu.float16 else 1),
        int8_gops=target.cpu.int8_gops,
        bandwidth_gb_s=target.bandwidth_gb_s,
        cores=target.cpu.cores,
    )


def register_target(target: _Registered) -> _Registered:
    """Adds `target` to the registry; a name can be taken once."""
    assert target.name not in _TARGETS, f"target {target.name} is registered twice"
    _TARGETS[target.name] = target
    return target


def find_target(name: str) -> AnyTarget:
    """The target called `name`; "host" is looked up on this machine.

    Raises:
        UserError: there is none of that name.
    """
    import difflib

    if name == "host":
        from gfcompile.targets.host import host_target

        return host_target()
    _import_all()
    name = ALIASES.get(name, name)
    if name in _TARGETS:
        return _TARGETS[name]
    names = ["host", *ALIASES, *sorted(_TARGETS)]
    known = ", ".join(names)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown target {name!r}{hint} (known: {known})")


def all_targets() -> tuple[AnyTarget, ...]:
    """Every registered target in the order of registration; `host` is a name for one of its own."""
    _import_all()
    return tuple(_TARGETS.values())


def _import_all() -> None:
    from gfcompile.targets import (  # noqa: F401 - they register
        android,
        arm64,
        jetson,
        phones,
        raspberry_pi,
        x86,
    )
