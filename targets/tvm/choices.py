"""What the schedules leave open: for each kernel a design space, and values in it by name.

A schedule has a rule that chooses tile sizes and loop orders. What the rule chooses is a value, a
frozen dataclass, and another value of the same space may take its place: one that a search found.
A value that comes from a file is accepted if it is in the space of its kernel, and only then.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gfcompile.targets.target import Cpu, Gpu
from gfcompile.targets.tvm.kernel import Attention, Dense, DftFilter, Generic, Kernel
from gfcompile.targets.tvm.schedules import (
    cpu_amx,
    cpu_amx_attention,
    cpu_amx_float,
    cpu_attention,
    cpu_dense,
    cpu_filter,
    cpu_in_order,
    gpu_dense,
)
from gfcompile.targets.tvm.schedules.generic import GeneratedSchedule

Choice = (
    cpu_dense.DenseChoice
    | cpu_filter.FilterTile
    | cpu_attention.AttentionChoice
    | gpu_dense.Tile
    | GeneratedSchedule
)


@dataclass(frozen=True, kw_only=True)
class Space:
    """The choices of one kernel class on CPUs or on GPUs.

    Attributes:
        schedule: the schedule's name and its version on that architecture, which goes up when a
            change of the schedule makes old measurements there meaningless.
        choices: those of a kernel on a device, the rule's own one first; empty where it has no
            choice. None where they cannot be listed: MetaSchedule generates them.
    """

    schedule: str
    choices: Callable[[Any, Any], Sequence[Choice]] | None


def _cpu_spaces(
    *, dense: int, dft_filter: int, attention: int, generic: int
) -> Mapping[type, Space]:
    """The spaces on one architecture, whose schedules have these versions there."""
    return {
        Dense: Space(schedule=f"cpu_dense/{dense}", choices=cpu_dense.dense_choices),
        DftFilter: Space(
            schedule=f"cpu_dft_filter/{dft_filter}", choices=cpu_filter.dft_filter_choices
        ),
        Attention: Space(
            schedule=f"cpu_attention/{attention}", choices=cpu_attention.attention_choices
        ),
        Generic: Space(schedule=f"cpu_generic/{generic}", choices=None),
    }


# What changes on ARM leaves what was measured on x86, and the other way round.
_ON_CPU: Mapping[str, Mapping[type, Space]] = {
    "x86_64": _cpu_spaces(dense=2, dft_filter=3, attention=1, generic=1),
    "aarch64": _cpu_spaces(dense=2, dft_filter=2, attention=1, generic=1),
}
_ON_GPU: dict[type, Space] = {
    Dense: Space(schedule="gpu_dense/1", choices=gpu_dense.dense_choices),
}


def space_of(kernel: Kernel, device: Cpu | Gpu) -> Space | None:
    """The design space that `kernel` belongs to on `device`; None if its schedule has no choice."""
    if isinstance(device, Gpu):
        return _ON_GPU.get(type(kernel))
    amx = (cpu_amx, cpu_amx_float) if device.amx else ()
    if isinstance(kernel, Dense) and any(schedule.takes(kernel) for schedule in amx):
        return None
    if isinstance(kernel, Attention) and device.amx and cpu_amx_attention.takes(kernel):
        return None
    if isinstance(kernel, Dense) and cpu_in_order.takes(kernel, device):
        return None
    return _ON_CPU[device.arch].get(type(kernel))


def choices(kernel: Kernel, device: Cpu | Gpu) -> Sequence[Choice]:
    """The values to choose from, the rule's own one first; empty where they cannot be listed."""
    space = space_of(kernel, device)
    if space is None or space.choices is None:
        return ()
    return space.choices(kernel, device)


def parse_choice(kernel: Kernel, device: Cpu | Gpu, values: Mapping[str, object]) -> Choice:
    """The choice that `to_json` made `values` of.

    Raises:
        ValueError: `values` are no choice of that kernel on that device.
    """
    if isinstance(kernel, Generic):
        return GeneratedSchedule.parse(values)
    for choice in choices(kernel, device):
        # 1 == 1.0 == True, but of these only the integer may stand in a file.
        if to_json(choice) == values and all(type(v) in (int, str) for v in values.values()):
            return choice
    raise ValueError(f"{dict(values)} is not in the design space")


def to_json(choice: Choice) -> Mapping[str, object]:
    """The choice as a JSON object."""
    return dataclasses.asdict(choice)


def kernel_key(kernel: Kernel) -> str:
    """What the kernel computes, in one line; equal kernels have equal keys.

    Fields at their defaults are left out, so that a field that is added later changes no key.
    """
    if isinstance(kernel, Generic):
        return f"Generic({kernel.name} {kernel.key})"
    given = [
        f"{field.name}={getattr(kernel, field.name)}"
        for field in dataclasses.fields(kernel)
        if getattr(kernel, field.name) != field.default
    ]
    return f"{type(kernel).__name__}({', '.join(given)})"


def device_key(device: Cpu | Gpu) -> str:
    """What code is generated for, in one line: not a board's name, its clock or its cores."""
    if isinstance(device, Gpu):
        return f"cuda {device.arch} {device.sms} SM"
    # Kernels that multiply by AMX have no choice, and it changes no others.
    features = [name for name in device.features if not name.startswith("+amx")]
    int8 = [device.int8_dot] if device.int8_dot else []
    return " ".join([device.arch, device.mcpu, *features, *int8])
