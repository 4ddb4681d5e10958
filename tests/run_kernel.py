"""Runs a Scheduled kernel for a CPU: natively where this machine can, else under qemu.

The kernel is compiled to an object and linked with run_kernel.c into a program, so that
nothing of TVM's runtime takes part and a read or write out of bounds is caught. Where AMX alone
is what a machine lacks, amx_in_software.c does its instructions.
"""

import functools
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gfcompile.targets.arm64 import ARM64
from gfcompile.targets.host import cpu_level
from gfcompile.targets.jetson import CARMEL
from gfcompile.targets.raspberry_pi import CORTEX_A53, CORTEX_A72, CORTEX_A76
from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import Array, Scheduled
from gfcompile.targets.x86 import AVX2, AVX512, AVX512_AMX, AVX512_VNNI, SSE
from tools import need

_X86_LEVELS = {
    "sse": SSE,
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": AVX512_VNNI,
    "avx512_amx": AVX512_AMX,
}
_ARM_CORES = {"a53": CORTEX_A53, "a72": CORTEX_A72, "a76": CORTEX_A76, "carmel": CARMEL}
CPUS: Mapping[str, Cpu] = {**_X86_LEVELS, **_ARM_CORES}
# Those that share a library, and so the layout of its weights: of int8, of float16.
ARM_LEVELS: Mapping[str, Cpu] = dict(
    zip(("armv8", "dotprod", "i8mm"), (ARM64.cpu, *ARM64.levels), strict=True)
)
_HALVES = ARM64.for_float16()
HALF_LEVELS: Mapping[str, Cpu] = {"armv8": _HALVES.cpu, "float16": _HALVES.levels[0]}

_HARNESS = Path(__file__).with_suffix(".c")
_AMX_IN_SOFTWARE = Path(__file__).with_name("amx_in_software.c")
_TYPE_CODES = {"i": 0, "u": 1, "f": 2}


def host_cpu() -> Cpu:
    """The Cpu of ours that this machine is."""
    return cpu_level(platform.machine(), Path("/proc/cpuinfo").read_text(encoding="utf-8"))


def cpus_here() -> dict[str, Cpu]:
    """This machine and, where it has the rest of the level, one with AMX, which software does."""
    here = host_cpu()
    return {"host": here} | ({"avx512_amx": AVX512_AMX} if here == AVX512_VNNI else {})


def run_kernel(
    scheduled: Scheduled,
    args: Mapping[str, Array],
    cpu: Cpu,
    *,
    threads: int = 1,
) -> dict[str, Array]:
    """What every tensor of the kernel holds after its steps ran, by name.

    Args:
        scheduled: the kernel.
        args: its arguments by name, constants in the raw layout (they are packed here) and the
            outputs as arrays to be overwritten; int8 activations as the target stores them.
        cpu: what the kernel was scheduled for.
        threads: into how many tasks parallel loops split.
    """
    tensors = dict(args) | dict(scheduled.consts)
    raw = dict(args)
    tensors |= {name: pack(raw) for name, pack in scheduled.pack.items()}
    for name, (dtype, shape) in scheduled.temps.items():
        assert name not in tensors, f"{name} is an argument and a temporary"
        tensors[name] = poison(shape, dtype)
    names = [name for name in tensors if any(name in step.args for step in scheduled.steps)]
    with tempfile.TemporaryDirectory() as folder:
        program = link(scheduled, names, cpu, Path(folder))
        source, result = Path(folder) / "in", Path(folder) / "out"
        with source.open("wb") as file:
            file.write(np.int32(len(names)).tobytes())
            for name in names:
                array = np.ascontiguousarray(tensors[name])
                head = (_TYPE_CODES[array.dtype.kind], array.itemsize * 8, array.ndim)
                file.write(np.array(head, np.int32).tobytes())
                file.write(np.array(array.shape, np.int64).tobytes())
                file.write(array.tobytes())
        command = [*emulator(cpu), str(program), str(source), str(result), "1", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
        return _read_back({name: tensors[name] for name in names}, result.read_bytes())


def poison(shape: tuple[int, ...], dtype: str) -> Array:
    """An array whose every byte is set: NaN as float32, so that a value left unwritten shows."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(b"\xff" * size, dtype).reshape(shape)


def compile_object(scheduled: Scheduled, cpu: Cpu, path: Path) -> None:
    """Writes the kernel's object code, the steps named step0, step1, ..."""
    import tvm

    functions = {
        f"step{i}": step.func.with_attr("global_symbol", f"step{i}")
        for i, step in enumerate(scheduled.steps)
    }
    module = tvm.compile(tvm.IRModule(functions), tvm_target(cpu)).mod
    module.write_to_file(str(path))


def tvm_target(cpu: Cpu) -> Any:
    """TVM's target for `cpu`."""
    import tvm

    description: dict[str, Any] = {
        "kind": "llvm",
        "mtriple": cpu.llvm_triple,
        "mcpu": cpu.mcpu,
        "num-cores": 1,
    }
    if cpu.features:
        description["mattr"] = list(cpu.features)
    return tvm.target.Target(description)


def link(scheduled: Scheduled, names: list[str], cpu: Cpu, folder: Path) -> Path:
    """The program that runs the kernel's steps over tensors in the order of `names`."""
    kernel, program = folder / "kernel.o", folder / "program"
    compile_object(scheduled, cpu, kernel)
    calls = "".join(
        f"STEP(__tvm_ffi_step{i},{','.join(str(names.index(arg)) for arg in step.args)})"
        for i, step in enumerate(scheduled.steps)
    )
    harness = _compile_harness(cpu.arch, calls)
    zig(cpu.arch, str(harness), str(kernel), "-o", str(program), "-lm")
    return program


def emulator(cpu: Cpu) -> list[str]:
    """What comes before a program's name, static for qemu, to run it here as on `cpu`."""
    if cpu.arch == "aarch64" and platform.machine() != "aarch64":
        assert cpu.qemu_cpu is not None
        return [need("qemu-aarch64"), "-cpu", cpu.qemu_cpu]
    levels = [(level.mcpu, level.features) for level in _X86_LEVELS.values()]
    here = host_cpu()
    if cpu.arch == here.arch == "x86_64" and levels.index((cpu.mcpu, cpu.features)) <= levels.index(
        (here.mcpu, here.features)
    ):
        return []
    if cpu.amx and here == AVX512_VNNI:
        return ["env", f"LD_PRELOAD={_amx_in_software()}"]
    pytest.skip(f"this machine cannot run code for {cpu.mcpu} {' '.join(cpu.features)}".rstrip())


@functools.cache
def _amx_in_software() -> Path:
    path = _scratch() / "amx_in_software.so"
    # TLS that exists before a signal asks for it.
    options = ("-O2", "-mcpu=x86_64_v4", "-shared", "-fPIC", "-ftls-model=initial-exec")
    zig("x86_64", *options, str(_AMX_IN_SOFTWARE), "-o", str(path))
    return path


@functools.cache
def _compile_harness(arch: str, calls: str) -> Path:
    digest = hashlib.sha256(calls.encode()).hexdigest()[:16]
    path = _scratch() / f"{arch}-{digest}.o"
    zig(arch, "-O1", f"-DSTEPS={calls}", "-c", str(_HARNESS), "-o", str(path))
    return path


@functools.cache
def _scratch() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="run_kernel-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def zig(arch: str, *args: str) -> None:
    """Runs `zig cc` for Linux on `arch`."""
    # Static for qemu, which then needs no arm64 libc; against the libc that is here otherwise,
    # which spares building zig's own.
    target = (
        [f"{arch}-linux-gnu"] if arch == platform.machine() else [f"{arch}-linux-musl", "-static"]
    )
    command = [sys.executable, "-m", "ziglang", "cc", "-target", *target, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def _read_back(tensors: Mapping[str, Array], raw: bytes) -> dict[str, Array]:
    after: dict[str, Array] = {}
    for name, array in tensors.items():
        data, raw = raw[: array.nbytes], raw[array.nbytes :]
        after[name] = np.frombuffer(data, array.dtype).reshape(array.shape)
    return after
