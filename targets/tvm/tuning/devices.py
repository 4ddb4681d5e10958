"""Where candidates run: a runner for each kind of --device."""

import dataclasses
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from gfcompile.runtime.devices import Device, open_device
from gfcompile.runtime.devices.qemu import QemuDevice
from gfcompile.runtime.errors import DeviceError, UserError
from gfcompile.targets.host import cpu_flags, host_target
from gfcompile.targets.target import Cpu, Target
from gfcompile.targets.tvm import link
from gfcompile.targets.tvm.tuning.runners import (
    CudaRunner,
    InstructionRunner,
    MeasuringRunner,
    Runner,
)


@contextmanager
def open_runner(address: str | None, target: Target) -> Iterator[Runner]:
    """What measures, or estimates, the kernels of `target`.

    Args:
        address: as given to --device; None for this machine where it runs the target's code, and
            for an estimate where it does not.

    Raises:
        UserError: no such device.
        DeviceError, NoVerdictError: it cannot be used, or there is no estimate for the target.
    """
    if address is None and target.gpu is not None:
        yield CudaRunner(target.gpu)
        return
    with open_device(address or _default(target)) as device:
        yield _runner(device, target)


def _default(target: Target) -> str:
    missing = lacks(target.cpu)
    if not missing:
        return "local"
    if target.cpu.qemu_cpu is not None:
        return f"qemu:{target.cpu.qemu_cpu}"
    raise DeviceError(
        f"this machine lacks {missing}, and nothing estimates code for {target.name}: give --device"
    )


def _runner(device: Device, target: Target) -> Runner:
    if isinstance(device, QemuDevice):
        if target.gpu is not None or target.cpu.arch != "aarch64":
            raise UserError(
                f"--device {device.url}: it stands in for arm64 CPUs, not {target.name}"
            )
        return InstructionRunner(device)
    if device.kind != "local":
        return MeasuringRunner(device, device.name)
    if missing := lacks(target.cpu):
        raise DeviceError(f"--device local: this machine lacks {missing}")
    name = host_target().description.removeprefix("this machine: ").partition(" (")[0]
    return MeasuringRunner(device, name)


def one_level(target: Target, *, float16: bool = False) -> Target:
    """The target with the kernels of one CPU: the best that this machine runs, or the least.

    Args:
        float16: of those alone that kernels in float16 are for and that compute in it; the others
            only widen what they load.
    """
    if float16:
        target = target.for_float16()
    cpus = [cpu for cpu in (target.cpu, *target.levels) if cpu.float16 or not float16]
    able = [cpu for cpu in cpus if not lacks(cpu)] or [cpus[0]]
    return dataclasses.replace(target, cpu=able[-1], levels=())


def lacks(cpu: Cpu) -> str:
    """What this machine lacks to run code for `cpu`; empty if it lacks nothing."""
    if platform.machine() != cpu.arch:
        return f"an {cpu.arch} CPU"
    return ", ".join(sorted(set(link.cpu_features(cpu)) - cpu_flags()))
