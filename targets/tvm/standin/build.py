"""Builds the stand-in driver and the kernels behind it, for x86-64 or arm64, with zig."""

import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.target import Gpu

_HERE = Path(__file__).resolve().parent
_GLIBC = "2.27"
# The driver that a PTX ISA version came with.
_DRIVER_VERSIONS = {"6.5": 10020, "7.4": 11040}
_SIGNATURE = re.compile(
    r'^extern "C" __global__ void __launch_bounds__\((\d+), 1\) (\w+)\(([^)]*)\) \{$', re.MULTILINE
)


def build_standin(source: str, gpu: Gpu, arch: Literal["x86_64", "aarch64"], folder: Path) -> Path:
    """The folder to put on LD_LIBRARY_PATH: libcuda.so.1 and kernels.so, which it opens.

    Only for a process of its own: NVRTC, too, opens libcuda.so.1, and crashes in this one.

    Args:
        source: `CudaModule.source`.
        gpu: the GPU to stand in for.
        arch: of the program that will open it.
        folder: is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kernels = folder / "kernels.cpp"
    kernels.write_text(_library_source(source))
    capability = "".join(str(part) for part in gpu.compute_capability)
    driver_options = [
        f"-DGF_CAPABILITY={capability}",
        f"-DGF_MULTIPROCESSORS={gpu.sms}",
        f"-DGF_CLOCK_KHZ={round(gpu.clock_ghz * 1e6)}",
        f"-DGF_PTX_ISA={gpu.ptx_isa.replace('.', '')}",
        f"-DGF_DRIVER_VERSION={_DRIVER_VERSIONS[gpu.ptx_isa]}",
        "-Wl,-soname,libcuda.so.1",
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [
            pool.submit(_compile, kernels, folder / "kernels.so", arch, []),
            pool.submit(
                _compile, _HERE / "driver.cpp", folder / "libcuda.so.1", arch, driver_options
            ),
        ]
        for job in jobs:
            job.result()
    return folder


def _library_source(source: str) -> str:
    """The kernels between what they need and what runs them, and the table of their names."""
    calls, rows = [], []
    for threads, name, parameters in _SIGNATURE.findall(source):
        types = [re.sub(r"\s*__restrict__\s+\w+$", "", part) for part in parameters.split(", ")]
        arguments = ", ".join(f"*({kind}*)a[{index}]" for index, kind in enumerate(types))
        calls.append(f"static void run_{name}(void** a) {{ {name}({arguments}); }}")
        rows.append(f'    {{"{name}", {len(types)}, {threads}, run_{name}}},')
    hidden = source.replace('extern "C" __global__', "static")
    return "\n".join(
        [
            '#include "cuda_shim.h"',
            hidden,
            '#include "fibers.h"',
            *calls,
            'extern "C" __attribute__((visibility("default"))) const GfKernel gf_kernels[] = {',
            *rows,
            "    {nullptr, 0, 0, nullptr},",
            "};",
            'extern "C" __attribute__((visibility("default"))) int gf_launch_kernel(',
            "    const GfKernel* kernel, void** arguments, const unsigned* grid,",
            "    const unsigned* block) {",
            "    return gf_launch(kernel->name, kernel->run, arguments, grid, block);",
            "}",
            "",
        ]
    )


def _compile(source: Path, output: Path, arch: str, options: list[str]) -> None:
    # Fused multiply-adds as on the GPU, where this machine has them.
    cpu = "native" if arch == platform.machine() else "baseline"
    command = [
        *(sys.executable, "-m", "ziglang", "cc", "-x", "c++", "-std=c++17", "-O2"),
        *("-target", f"{arch}-linux-gnu.{_GLIBC}", f"-mcpu={cpu}", "-ffp-contract=fast"),
        # TVM reads floats through pointers to int and the like.
        *("-fno-exceptions", "-fno-rtti", "-fno-strict-aliasing", "-fvisibility=hidden"),
        *("-fPIC", "-shared", "-s", "-w", f"-I{_HERE}", *options),
        *(str(source), "-o", str(output), "-lm", "-ldl", "-lpthread"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        raise CompileError(f"stand-in driver: {source.name}: {(lines or [done.stderr])[0]}")
