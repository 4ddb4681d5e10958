"""A kernel-call program as the files that the device runtime runs: library, plan, weights."""

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm

import gfcompile.runtime.device as runtime_device
from gfcompile.runtime.bench import BENCH_NAME
from gfcompile.runtime.errors import CompileError
from gfcompile.runtime.roofline import KernelCost, estimate
from gfcompile.targets.target import Cpu, Target, peaks
from gfcompile.targets.tvm import cuda, link
from gfcompile.targets.tvm.choices import to_json
from gfcompile.targets.tvm.cost import costs
from gfcompile.targets.tvm.instructions import count_instructions, issue_us
from gfcompile.targets.tvm.kernel import Generic, Kernel
from gfcompile.targets.tvm.levels import Function, Level, Tuning, levels_of
from gfcompile.targets.tvm.memory import Arena, align
from gfcompile.targets.tvm.plan import Plan, PlanIO, serialize
from gfcompile.targets.tvm.plan_builder import PlanBuilder, Weights
from gfcompile.targets.tvm.program import Program


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What was written into the bundle's folder.

    Attributes:
        plan: as serialized in plan.bin.
        better_plans: those of the target's levels that gain by it, in plan-1.bin, plan-2.bin, ...
        arena: how activations share memory.
        kernels: one record per compiled function, for the manifest; none unless asked for.
        cuda_source: what NVRTC compiled, for a stand-in driver; "" on a CPU.
    """

    plan: Plan
    arena: Arena
    kernels: tuple[Mapping[str, Any], ...]
    cuda_source: str = ""
    better_plans: tuple[Plan, ...] = ()


def emit(
    program: Program,
    target: Target,
    folder: Path,
    *,
    library: str,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    group_size: int | None = None,
    tuning: Tuning | None = None,
    describe: bool = True,
) -> Artifact:
    """Writes `library`, plan.bin, weights.bin and, for a GPU, kernels.ptx and kernels.cubin.

    Args:
        folder: exists; the files are written into it.
        library: file name of the shared library.
        mean, std: the normalization of the image input, if it is one.
        group_size: how many weights of four bits share a factor; None where none do.
        tuning: a tuning database's choices; without it the schedules' own rules choose.
        describe: whether to say of each kernel what it costs, which takes a fifth of the time.

    Raises:
        CompileError: a kernel that cannot be compiled for the target.
    """
    levels = levels_of(program, target, tuning or (lambda _kernels, _device: {}))
    base = levels[0]
    module = None
    objects = []
    if target.gpu is None:
        for i, level in enumerate(levels):
            assert isinstance(level.device, Cpu)
            objects.append(_compile_cpu(level.functions, level.device, folder / f"kernels{i}.o"))
    else:
        module = cuda.compile_cuda(
            {f.name: f.func for steps in base.functions.values() for f in steps}, target.gpu
        )
        (folder / "kernels.ptx").write_bytes(module.ptx)
        (folder / "kernels.cubin").write_bytes(module.cubin)
    weights = Weights()
    builders = [PlanBuilder(program, level, module, weights, group_size) for level in levels]
    built = [builder.build() for builder in builders]
    stored = weights.stored()
    (folder / "weights.bin").write_bytes(stored)
    used = list(dict.fromkeys(step.kernel for steps, _ in built for step in steps))
    library_id = _library_id(objects, used)
    link.link_library(
        objects,
        used if target.gpu is None else [],
        target.cpu,
        folder / library,
        library_id=library_id,
        cuda=target.gpu is not None,
    )
    if target.cpu.android_api is None:
        link.link_bench(target.cpu, folder / BENCH_NAME)
    else:
        link.link_static_bench(
            objects, used, target.cpu, folder / BENCH_NAME, library_id=library_id
        )
    for compiled in objects:
        compiled.unlink()
    for name in ("gfrt.h", "gfrt.py"):  # all that a device needs to use the library
        shutil.copy(Path(runtime_device.__file__).parent / name, folder)
    plans = []
    for level, builder, (steps, arena) in zip(levels, builders, built, strict=True):
        cpu = level.device if isinstance(level.device, Cpu) else None
        plan = Plan(
            device="cpu" if cpu else "cuda",
            arch=target.cpu.arch,
            library=library,
            library_id=library_id,
            cpu_features=link.cpu_features(cpu) if cpu else (),
            compute_capability=target.gpu.compute_capability if target.gpu else (0, 0),
            tensors=builder.tensors(),
            steps=steps,
            inputs=tuple(
                PlanIO(name=name, tensor=builder.index_of[name], mean=mean, std=std)
                for name in program.inputs
            ),
            outputs=tuple(
                PlanIO(name=name, tensor=builder.index_of[name]) for name in program.outputs
            ),
            arena_bytes=arena.size_bytes,
            workspace_bytes=_workspace_bytes(level.functions),
            weights_bytes=weights.plain_bytes + len(weights.packed.data),
            packed_bytes=len(weights.packed.data),
            grouped=builder.grouped(),
            weights_sha256=hashlib.sha256(stored).hexdigest(),
        )
        plans.append(plan)
        (folder / _plan_name(len(plans) - 1)).write_bytes(serialize(plan))
    return Artifact(
        plan=plans[0],
        arena=built[0][1],
        kernels=tuple(
            record
            for number, (level, builder) in enumerate(
                zip(levels, builders, strict=True) if describe else ()
            )
            for record in _kernel_records(builder.uses, level, number, module, target)
        ),
        cuda_source="" if module is None else module.source,
        better_plans=tuple(plans[1:]),
    )


def _plan_name(level: int) -> str:
    """The file of a level's plan; 0 is the least one."""
    return f"plan-{level}.bin" if level else "plan.bin"


def llvm_target(cpu: Cpu) -> tvm.target.Target:
    """TVM's description of `cpu`."""
    options: dict[str, Any] = {
        "kind": "llvm",
        "mtriple": cpu.llvm_triple,
        "mcpu": cpu.mcpu,
        "num-cores": cpu.cores,
    }
    if cpu.features:
        options["mattr"] = list(cpu.features)
    return tvm.target.Target(options)


def _compile_cpu(functions: Mapping[Kernel, Sequence[Function]], cpu: Cpu, output: Path) -> Path:
    module = tvm.IRModule({f.name: f.func for steps in functions.values() for f in steps})
    # TVM's checks of every argument's shape and dtype are half of a kernel's code. The plan was
    # made from these very functions, and the runtime compares library and plan.
    context = tvm.transform.PassContext(config={"tirx.disable_assert": True})
    try:
        with context:
            compiled = tvm.compile(module, llvm_target(cpu))
        compiled.mod.write_to_file(str(output))
    except (RuntimeError, ValueError) as error:
        raise CompileError(f"TVM cannot compile the kernels for {cpu.mcpu}: {error}") from error
    return output


def _library_id(objects: Sequence[Path], kernels: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(kernels).encode())
    for built in objects:
        digest.update(built.read_bytes())
    return digest.hexdigest()[:32]


def _workspace_bytes(functions: Mapping[Kernel, Sequence[Function]]) -> int:
    """Scratch that TVM takes at run time; only what Relax lowered may need any."""
    most = 0
    for kernel, steps in functions.items():
        if isinstance(kernel, Generic):
            for function in steps:
                buffers = function.func.body.block.alloc_buffers
                sizes = (
                    align(int(np.prod([int(dim) for dim in buffer.shape])) * 8)
                    for buffer in buffers
                )
                most = max(most, sum(sizes))
    return most


def _kernel_records(
    uses: Mapping[str, int],
    level: Level,
    number: int,
    module: cuda.CudaModule | None,
    target: Target,
) -> tuple[Mapping[str, Any], ...]:
    records = []
    if isinstance(level.device, Cpu):
        target = dataclasses.replace(target, cpu=level.device, levels=())
    for kernel, steps in level.functions.items():
        scheduled = level.scheduled[kernel]
        for function, cost in zip(steps, costs(kernel, scheduled, target), strict=True):
            instructions = count_instructions(function.func, target)
            issued_us = round(issue_us(instructions, target), 4)
            known = KernelCost(**dataclasses.asdict(cost), issue_us=issued_us)
            record: dict[str, Any] = {
                "name": function.name,
                "calls": uses[function.name],
                **dataclasses.asdict(cost),
                "issue_us": issued_us,
            }
            if (guess := estimate(peaks(target), known)) is not None:
                record |= {"estimate_us": round(guess.us, 4), "bound": guess.bound}
            if number:  # a better CPU than the one whose peaks the manifest has
                record |= {"level": number, "peak_gops": peaks(target).rate(cost.arithmetic)}
            if module is not None:
                record |= dataclasses.asdict(module.kernels[function.name])
            if kernel in level.tuned:
                record["tuned"] = level.tuned[kernel].how
                record["choice"] = to_json(level.tuned[kernel].choice)
            records.append(record)
    return tuple(records)
