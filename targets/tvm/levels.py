"""The kernels of a program, scheduled for each CPU level of a target, or for its GPU."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tvm_ffi

from gfcompile.targets.target import Cpu, Gpu, Target
from gfcompile.targets.tvm.choices import Choice
from gfcompile.targets.tvm.kernel import ActStorage, Kernel, Scheduled
from gfcompile.targets.tvm.kernel_names import kernel_name
from gfcompile.targets.tvm.program import Program
from gfcompile.targets.tvm.schedule import act_storage, schedule


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a tuning database says of a kernel.

    Attributes:
        how: "measured" on a device, or "static": estimated without one.
    """

    choice: Choice
    how: Literal["measured", "static"]


# What is known of kernels on a CPU or GPU; the schedules' own rules serve those that it leaves out.
Tuning = Callable[[Iterable[Kernel], Cpu | Gpu], Mapping[Kernel, Tuned]]


@dataclass(frozen=True)
class Function:
    """A compiled function: its TIR, and the names of its parameters in TIR order."""

    name: str
    func: Any
    args: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Level:
    """The kernels for one CPU or GPU.

    Attributes:
        storage: how it stores int8 activations.
        scheduled, functions: of each kernel, its schedule, and what is compiled of that.
        tuned: what a tuning database had to say, of the kernels that it has.
    """

    device: Cpu | Gpu
    storage: ActStorage
    scheduled: Mapping[Kernel, Scheduled]
    functions: Mapping[Kernel, Sequence[Function]]
    tuned: Mapping[Kernel, Tuned]


def levels_of(program: Program, target: Target, tuning: Tuning) -> list[Level]:
    """The kernels for the target's least CPU, or for its GPU, and for each level above it.

    A level is left out where its extra instructions serve nothing: same functions, same vectors.
    """
    levels: list[Level] = []
    for device in (target.gpu or target.cpu, *target.levels):
        storage = act_storage(device)
        kernels = dict.fromkeys(call.kernel for call in program.calls)
        tuned = tuning(kernels, device)
        scheduled = {
            kernel: schedule(
                kernel, device, storage, tuned[kernel].choice if kernel in tuned else None
            )
            for kernel in kernels
        }
        suffix = f"_level{len(levels)}" if levels else ""
        functions = _functions(scheduled, suffix)
        if levels and _gains_nothing(levels[-1], device, scheduled):
            continue
        levels.append(
            Level(
                device=device,
                storage=storage,
                scheduled=scheduled,
                functions=functions,
                tuned=tuned,
            )
        )
    return levels


def _gains_nothing(below: Level, device: Cpu | Gpu, scheduled: Mapping[Kernel, Scheduled]) -> bool:
    """Whether kernels scheduled for `device` are those of the level below it."""
    if getattr(below.device, "vector_bytes", None) != getattr(device, "vector_bytes", None):
        return False
    return all(
        len(plan.steps) == len(below.scheduled[kernel].steps)
        and all(
            tvm_ffi.structural_equal(step.func, other.func)
            for step, other in zip(plan.steps, below.scheduled[kernel].steps, strict=True)
        )
        for kernel, plan in scheduled.items()
    )


def _functions(
    scheduled: Mapping[Kernel, Scheduled], suffix: str
) -> dict[Kernel, tuple[Function, ...]]:
    functions = {}
    for kernel, plan in scheduled.items():
        name = kernel_name(kernel) + suffix
        names = [name] if len(plan.steps) == 1 else [f"{name}_{i}" for i in range(len(plan.steps))]
        functions[kernel] = tuple(
            Function(n, step.func.with_attr("global_symbol", n), step.args)
            for n, step in zip(names, plan.steps, strict=True)
        )
    return functions
