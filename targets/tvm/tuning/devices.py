"""Where candidates run: a runner for each kind of --device."""

import platform
from pathlib import Path

from gfcompile.runtime.errors import DeviceError, UserError
from gfcompile.targets.host import cpu_flags, host_target
from gfcompile.targets.target import Cpu, Target
from gfcompile.targets.tvm import link
from gfcompile.targets.tvm.tuning.runners import (
    CudaRunner,
    GfbenchRunner,
    InstructionRunner,
    Runner,
    build_plugin,
)


def find_runner(device: str | None, target: Target, scratch: Path) -> Runner:
    """What measures, or estimates, the kernels of `target`.

    Args:
        device: as given to --device; None for this machine where it runs the target's code, and
            for an estimate where it does not.
        scratch: an empty folder, for what has to be compiled.

    Raises:
        UserError: no such device.
        DeviceError: it cannot be used, or there is no estimate for the target.
    """
    kind, _, rest = (device or "").partition(":")
    if device is None:
        if target.gpu is not None:
            return CudaRunner(target.gpu)
        if not _lacks(target.cpu):
            return _local(target)
        if target.cpu.qemu_cpu is not None:
            return InstructionRunner(target.cpu.qemu_cpu, build_plugin(scratch))
        raise DeviceError(f"this machine lacks {_lacks(target.cpu)}; give --device")
    if device == "local":
        if lacks := _lacks(target.cpu):
            raise DeviceError(f"--device local: this machine lacks {lacks}")
        return _local(target)
    if kind == "qemu":
        if target.gpu is not None or target.cpu.arch != "aarch64":
            raise UserError(f"--device {device}: QEMU stands in for arm64 CPUs, not {target.name}")
        cpu = rest or target.cpu.qemu_cpu
        if cpu is None:
            raise UserError(
                f"--device qemu: say which CPU, such as qemu:cortex-a72, for {target.name}"
            )
        return InstructionRunner(cpu, build_plugin(scratch))
    raise UserError(
        f"--device {device!r}: accepted are local, ssh://USER@HOST, rpc://TRACKER:PORT/KEY and "
        "qemu:CPU"
    )


def _local(target: Target) -> Runner:
    return GfbenchRunner(host_target().description if target.gpu is None else target.name)


def _lacks(cpu: Cpu) -> str:
    """What this machine lacks to run code for `cpu`; empty if it lacks nothing."""
    if platform.machine() != cpu.arch:
        return f"an {cpu.arch} CPU"
    return ", ".join(sorted(set(link.cpu_features(cpu)) - cpu_flags()))
