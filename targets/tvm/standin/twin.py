"""A Jetson's bundle made again for this machine, to run its kernels on the CPU."""

import dataclasses
import shutil
from pathlib import Path

from gfcompile.runtime.bench import BENCH_NAME
from gfcompile.targets.host import host_target
from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm import link
from gfcompile.targets.tvm.emit import Artifact
from gfcompile.targets.tvm.plan import serialize
from gfcompile.targets.tvm.standin.build import build_standin


def make_twin(artifact: Artifact, gpu: Gpu, folder: Path, twin: Path) -> Path:
    """Makes the bundle in `folder` again in `twin`, for this machine's CPU and a stand-in driver.

    Only the runtime is another build; plan, weights, PTX and machine code are the bundle's.

    Returns:
        The folder with the driver, for LD_LIBRARY_PATH.
    """
    cpu = host_target().cpu
    for name in ("weights.bin", "kernels.ptx", "kernels.cubin"):
        shutil.copy(folder / name, twin)
    plan = dataclasses.replace(artifact.plan, arch=cpu.arch)
    (twin / "plan.bin").write_bytes(serialize(plan))
    link.link_library([], [], cpu, twin / plan.library, library_id=plan.library_id, cuda=True)
    link.link_bench(cpu, twin / BENCH_NAME)
    return build_standin(artifact.cuda_source, gpu, cpu.arch, twin / "driver")
