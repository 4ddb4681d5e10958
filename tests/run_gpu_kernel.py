"""Runs Scheduled kernels for a GPU: compiled by NVIDIA's tools, run behind the stand-in driver.

run_gpu_kernel.c opens the driver in a process of its own. It loads the image, gives every tensor
its own device memory, so that an access out of bounds is caught, and launches the kernels.
"""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gfcompile.targets.jetson import JETSON_NANO, JETSON_ORIN, JETSON_TX2, JETSON_XAVIER
from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.cuda import CudaModule, compile_cuda
from gfcompile.targets.tvm.kernel import ActStorage, Scheduled, quant_args
from gfcompile.targets.tvm.standin import build_standin
from tools import qemu_aarch64

Array = npt.NDArray[Any]
Arch = Literal["x86_64", "aarch64"]
Args = Mapping[str, Array]

GPUS: Mapping[str, Gpu] = {
    target.gpu.arch: target.gpu
    for target in (JETSON_NANO, JETSON_TX2, JETSON_XAVIER, JETSON_ORIN)
    if target.gpu
}
TX2 = GPUS["sm_62"]

# A kernel, its arguments but y, and what y should be (float64, or int8).
Case = tuple[Scheduled, Args, Array]
STORAGE = ActStorage()


class LaunchFailed(Exception):  # noqa: N818 - it is what a test waits for
    """The driver refused or stopped a launch: the error code, and what it printed."""


def run_cases(cases: Sequence[Case], gpu: Gpu, **options: Any) -> list[Array]:
    """y of each case, all compiled as one module."""
    ready = []
    for scheduled, args, expected in cases:
        dtype = expected.dtype if expected.dtype == np.int8 else np.float32
        ready.append((scheduled, {**args, "y": np.zeros(expected.shape, dtype)}))
    return [result["y"] for result in run_scheduled(ready, gpu, **options)]


def quantized(value: Array, quant: Array) -> Array:
    """What a kernel with int8 output should give for the float result `value`."""
    inverse, low, high, zero_point = quant
    scaled = np.clip(value.astype(np.float32) * inverse, low, high)
    return (np.rint(scaled) + zero_point).astype(np.int8)


QUANT = quant_args(0.02, -3)


def run_scheduled(
    cases: Sequence[tuple[Scheduled, Args]],
    gpu: Gpu,
    *,
    order: Literal["forward", "reverse"] = "forward",
    arch: Arch = "x86_64",
    image: Callable[[CudaModule], bytes] = lambda module: module.cubin,
    edit: Callable[[str], str] = lambda source: source,
    resize: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda grid: grid,
) -> list[dict[str, Array]]:
    """What every tensor of each kernel holds after its steps ran, by name.

    Args:
        cases: kernels with their arguments by name, constants in the raw layout (they are packed
            here) and the outputs as arrays to be overwritten.
        gpu: what they were scheduled for.
        order: in which the stand-in runs the threads of a block.
        arch: of the stand-in; aarch64 runs under qemu.
        image: what is loaded as a module.
        edit: changes the CUDA C that the stand-in runs, to break it on purpose.
        resize: changes each kernel's grid, to break it on purpose.
    """
    funcs, steps = {}, []
    tensors: dict[tuple[int, str], Array] = {}
    for case, (scheduled, args) in enumerate(cases):
        named = dict(args) | dict(scheduled.consts)
        named |= {name: pack(dict(args)) for name, pack in scheduled.pack.items()}
        for name, (dtype, shape) in scheduled.temps.items():
            assert name not in named, f"{name} is an argument and a temporary"
            named[name] = np.zeros(shape, dtype)
            named[name].view(np.uint8)[...] = 0xFF  # not a number
        tensors |= {(case, name): np.ascontiguousarray(named[name]) for name in named}
        for number, step in enumerate(scheduled.steps):
            funcs[f"case{case}_step{number}"] = step.func
            steps.append((f"case{case}_step{number}", [(case, name) for name in step.args]))
    module = compile_cuda(funcs, gpu)
    numbers = {key: number for number, key in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        build_standin(edit(module.source), gpu, arch, folder)
        (folder / "image").write_bytes(image(module))
        script = []
        for key, array in tensors.items():
            array.tofile(folder / str(numbers[key]))
            script.append(f"tensor {folder / str(numbers[key])}")
        for name, keys in steps:
            kernel = module.kernels[name]
            places = [numbers[keys[index]] for index in kernel.args]
            words = [kernel.symbol, *resize(kernel.grid), *kernel.block, len(places), *places]
            script.append(" ".join(["launch", *map(str, words)]))
        (folder / "script").write_text("\n".join(script))
        _launch(folder, order, arch)
        results: list[dict[str, Array]] = [{} for _ in cases]
        for (case, name), array in tensors.items():
            data = np.fromfile(folder / str(numbers[case, name]), array.dtype)
            results[case][name] = data.reshape(array.shape)
        return results


def _launch(folder: Path, order: str, arch: Arch) -> None:
    settings = {"GFCOMPILE_STANDIN_ORDER": order, "LD_LIBRARY_PATH": str(folder)}
    command = [str(_program(arch)), str(folder / "image"), str(folder / "script")]
    if arch == "aarch64":  # the settings are for the program, not for qemu
        given = [word for name, value in settings.items() for word in ("-E", f"{name}={value}")]
        command, settings = [*qemu_aarch64("cortex-a57"), *given, *command], {}
    done = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise LaunchFailed(f"exit {done.returncode}: {done.stderr[-2000:]}")


@functools.cache
def _program(arch: Arch) -> Path:
    """run_gpu_kernel.c, compiled; the folder lives as long as the process."""
    holder = _folders.setdefault(arch, tempfile.TemporaryDirectory())
    program = Path(holder.name) / "run_gpu_kernel"
    source = Path(__file__).with_suffix(".c")
    command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-gnu.2.27", "-O1"]
    subprocess.run([*command, "-Wall", "-Wextra", str(source), "-o", str(program)], check=True)
    return program


_folders: dict[str, tempfile.TemporaryDirectory[str]] = {}
