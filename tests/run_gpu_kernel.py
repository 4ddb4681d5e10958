"""Runs Scheduled kernels for a GPU: compiled by NVIDIA's tools, run behind the stand-in driver.

The driver is opened by a process of its own, which is this file run as a program: it loads the
cubin, gives every tensor its own device memory, so that an access out of bounds is caught, and
launches the kernels as the manifest says.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gfcompile.targets.target import Gpu
    from gfcompile.targets.tvm.kernel import Scheduled

Array = npt.NDArray[Any]


class LaunchFailed(Exception):  # noqa: N818 - it is what a test waits for
    """The driver refused or stopped a launch: the error code, and what it printed."""


def run_gpu_kernels(
    cases: Sequence[tuple["Scheduled", Mapping[str, Array]]],
    gpu: "Gpu",
    *,
    order: Literal["forward", "reverse"] = "forward",
    edit: Callable[[str], str] = lambda source: source,
) -> list[dict[str, Array]]:
    """What every tensor of each kernel holds after its steps ran, by name.

    Args:
        cases: kernels with their arguments by name, constants in the raw layout (they are packed
            here) and the outputs as arrays to be overwritten.
        gpu: what they were scheduled for.
        order: in which the stand-in runs the threads of a block.
        edit: changes the CUDA C that the stand-in runs, to break it on purpose.
    """
    from gfcompile.targets.tvm.cuda import compile_cuda
    from gfcompile.targets.tvm.standin import build_standin

    funcs, tensors, steps = {}, {}, []
    for case, (scheduled, args) in enumerate(cases):
        named = dict(args) | dict(scheduled.consts)
        named |= {name: pack(dict(args)) for name, pack in scheduled.pack.items()}
        for name, (dtype, shape) in scheduled.temps.items():
            assert name not in named, f"{name} is an argument and a temporary"
            named[name] = np.full(np.prod(shape) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        tensors |= {f"{case}.{name}": np.ascontiguousarray(named[name]) for name in named}
        for number, step in enumerate(scheduled.steps):
            funcs[f"case{case}_step{number}"] = step.func
            steps.append((f"case{case}_step{number}", [f"{case}.{name}" for name in step.args]))
    module = compile_cuda(funcs, gpu)
    launches = [
        {
            "symbol": module.kernels[name].symbol,
            "tensors": [args[index] for index in module.kernels[name].args],
            "grid": module.kernels[name].grid,
            "block": module.kernels[name].block,
        }
        for name, args in steps
    ]
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        build_standin(edit(module.source), gpu, "x86_64", folder)
        (folder / "image").write_bytes(module.cubin)
        (folder / "launches.json").write_text(json.dumps(launches))
        np.savez(folder / "in.npz", **tensors)
        done = subprocess.run(
            [sys.executable, __file__, folder],
            env={**os.environ, "GFCOMPILE_STANDIN_ORDER": order},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise LaunchFailed(f"exit {done.returncode}: {done.stderr[-2000:]}")
        with np.load(folder / "out.npz") as file:
            results: list[dict[str, Array]] = [{} for _ in cases]
            for key in file.files:
                case_number, name = key.split(".", 1)
                results[int(case_number)][name] = file[key]
        return results


def _main(folder: Path) -> None:
    driver = ctypes.CDLL(str(folder / "libcuda.so.1"))

    def call(name: str, *arguments: Any) -> None:
        if status := getattr(driver, name)(*arguments):
            text = ctypes.c_char_p()
            driver.cuGetErrorName(status, ctypes.byref(text))
            sys.exit(f"{name}: {status} {(text.value or b'').decode()}")

    handle, pointer = ctypes.c_void_p, ctypes.c_uint64
    context, module = handle(), handle()
    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxPushCurrent_v2", context)
    call("cuModuleLoadData", ctypes.byref(module), (folder / "image").read_bytes())
    with np.load(folder / "in.npz") as file:
        tensors = {name: file[name] for name in file.files}
    memory = {}
    for name, array in tensors.items():
        memory[name] = pointer()
        size = ctypes.c_size_t(array.nbytes)
        call("cuMemAlloc_v2", ctypes.byref(memory[name]), size)
        call("cuMemcpyHtoD_v2", memory[name], array.ctypes.data_as(handle), size)
    for launch in json.loads((folder / "launches.json").read_text()):
        function = handle()
        call("cuModuleGetFunction", ctypes.byref(function), module, launch["symbol"].encode())
        places = [ctypes.addressof(memory[name]) for name in launch["tensors"]]
        params = (handle * len(places))(*places)
        call("cuLaunchKernel", function, *launch["grid"], *launch["block"], 0, None, params, None)
    call("cuCtxSynchronize")
    for name, array in tensors.items():
        size = ctypes.c_size_t(array.nbytes)
        call("cuMemcpyDtoH_v2", array.ctypes.data_as(handle), memory[name], size)
    np.savez(folder / "out.npz", **tensors)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
