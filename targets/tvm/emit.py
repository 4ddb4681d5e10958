"""A kernel-call program as the files that the device runtime runs: library, plan, weights."""

import dataclasses
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import tvm
import tvm_ffi

import gfcompile.runtime.device as runtime_device
from gfcompile.quantize.int4 import fits_int4, pack_int4
from gfcompile.runtime.bench import BENCH_NAME
from gfcompile.runtime.errors import CompileError
from gfcompile.runtime.roofline import KernelCost, estimate
from gfcompile.targets.target import Cpu, Gpu, Target, peaks
from gfcompile.targets.tvm import cuda, link
from gfcompile.targets.tvm.choices import Choice, to_json
from gfcompile.targets.tvm.cost import costs
from gfcompile.targets.tvm.grouped import GroupedRows, find_rows
from gfcompile.targets.tvm.instructions import count_instructions, issue_us
from gfcompile.targets.tvm.kernel import (
    ActStorage,
    Array,
    Attention,
    CircularFilter,
    Conv,
    Dense,
    Dequantize,
    DftFilter,
    GatherRows,
    Generic,
    InversePermutation,
    Kernel,
    LayerNorm,
    Patchify,
    Quantize,
    Scheduled,
    SelectTokens,
    Softmax,
    TokenMean,
)
from gfcompile.targets.tvm.memory import Arena, Lifetime, align, plan_arena
from gfcompile.targets.tvm.plan import (
    DType,
    Plan,
    PlanGrouped,
    PlanIO,
    PlanStep,
    PlanTensor,
    serialize,
)
from gfcompile.targets.tvm.program import Call, Program
from gfcompile.targets.tvm.schedule import act_storage, schedule


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
class _Function:
    """A compiled function: its TIR, and the names of its parameters in TIR order."""

    name: str
    func: Any
    args: tuple[str, ...]


@dataclass
class _Part:
    """A part of weights.bin as it grows: aligned, equal arrays once."""

    data: bytearray = field(default_factory=bytearray)
    offsets: dict[tuple[str, bytes], int] = field(default_factory=dict)

    def add(self, array: Array, belongs_to: bytes = b"") -> int:
        """Where it lies; what belongs to something else is another array."""
        raw = np.ascontiguousarray(array).tobytes()
        key = (str(array.dtype), hashlib.sha256(raw + belongs_to).digest())
        if key not in self.offsets:
            self.data.extend(bytes(align(len(self.data)) - len(self.data)))
            self.offsets[key] = len(self.data)
            self.data.extend(raw)
        return self.offsets[key]


@dataclass
class _Weights:
    """weights.bin as it grows, for every level of a target together.

    Attributes:
        whole: what is stored as it is.
        packed: what comes after it, in four bits each.
    """

    whole: _Part = field(default_factory=_Part)
    packed: _Part = field(default_factory=_Part)

    @property
    def plain_bytes(self) -> int:
        """The size of the weights that are stored as they are."""
        return align(len(self.whole.data)) if self.packed.data else len(self.whole.data)

    def stored(self) -> bytes:
        """What weights.bin holds."""
        plain = bytes(self.whole.data).ljust(self.plain_bytes, b"\0")
        return plain + pack_int4(np.frombuffer(self.packed.data, np.int8)).tobytes()


@dataclass(frozen=True, kw_only=True)
class _Level:
    """The kernels for one CPU or GPU."""

    device: Cpu | Gpu
    storage: ActStorage
    scheduled: Mapping[Kernel, Scheduled]
    functions: Mapping[Kernel, Sequence[_Function]]
    tuned: Mapping[Kernel, Tuned]


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
    levels = _levels(program, target, tuning or (lambda _kernels, _device: {}))
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
    weights = _Weights()
    builders = [_PlanBuilder(program, level, module, weights, group_size) for level in levels]
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


def _levels(program: Program, target: Target, tuning: Tuning) -> list[_Level]:
    """The kernels for the target's least CPU, or for its GPU, and for each level above it.

    A level is left out where its extra instructions serve nothing: same functions, same vectors.
    """
    levels: list[_Level] = []
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
            _Level(
                device=device,
                storage=storage,
                scheduled=scheduled,
                functions=functions,
                tuned=tuned,
            )
        )
    return levels


def _gains_nothing(below: _Level, device: Cpu | Gpu, scheduled: Mapping[Kernel, Scheduled]) -> bool:
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


def kernel_name(kernel: Kernel) -> str:
    """A C identifier that says what the kernel computes; equal kernels have equal names."""
    out = getattr(kernel, "out", "float32")
    suffix = "" if out == "float32" else f"_{_short(out)}"
    match kernel:
        case Dense():
            operands = _short(kernel.x)
            if kernel.w == "float16":
                operands = "f16" if kernel.x == "float16" else f"{operands}xf16"
            parts = [f"dense_{kernel.m}x{kernel.n}x{kernel.k}", operands]
            parts += ["fixed"] * kernel.fixed_point
            added = f"add{kernel.residual_rows}_{_short(kernel.residual_dtype)}"
            epilogue = ["gelu"] * kernel.gelu + [added] * bool(kernel.residual_rows)
            parts += reversed(epilogue) if kernel.residual_first else epilogue
            suffix += f"x{kernel.out_groups}" if kernel.out_groups > 1 else ""
            return "_".join(parts) + suffix
        case Conv():
            size = f"{kernel.kernel_h}x{kernel.kernel_w}"
            if (strides := (kernel.stride_h, kernel.stride_w)) != (1, 1):
                size += "_stride{}x{}".format(*strides)
            if (pads := (kernel.pad_h, kernel.pad_w)) != (0, 0):
                size += "_pad{}x{}".format(*pads)
            shape = f"{kernel.batch}x{kernel.h}x{kernel.w}x{kernel.c}_{kernel.layout}"
            form = "depthwise" if kernel.depthwise else f"conv{kernel.n}"
            return f"{form}_{shape}_{size}" + "_relu" * kernel.relu
        case LayerNorm():
            # Layers that differ in eps alone are rare, but must not share a name.
            eps = re.sub(r"\W", "_", f"{kernel.eps:.6g}")
            skips = f"_skips{kernel.leading}of{kernel.images}" if kernel.leading else ""
            blocks = "_from_blocks" * kernel.x_in_blocks + "_to_blocks" * kernel.y_in_blocks
            return f"layer_norm_{kernel.rows}x{kernel.n}_eps{eps}{skips}{blocks}{suffix}"
        case DftFilter() | CircularFilter():
            form = "dft" if isinstance(kernel, DftFilter) else "circular"
            shape = f"{kernel.batch}x{kernel.h}x{kernel.w}x{kernel.c}"
            operands = _short(kernel.k_dtype) if kernel.x != "int8" else "i8"
            operands += "_x16" if kernel.x == "float16" else ""
            operands += "_blocks" * (isinstance(kernel, DftFilter) and kernel.in_blocks)
            return f"{form}_filter_{shape}_{operands}"
        case Patchify():
            grid = f"{kernel.batch}x{kernel.grid_h}x{kernel.grid_w}"
            patch = f"{kernel.channels}x{kernel.patch_h}x{kernel.patch_w}"
            return f"patchify_{grid}_{patch}{suffix}"
        case TokenMean():
            return f"token_mean_{kernel.batch}x{kernel.tokens}x{kernel.n}{suffix}"
        case Attention():
            shape = f"{kernel.batch}x{kernel.tokens}x{kernel.heads}x{kernel.dim}"
            return f"attention_{shape}_{_short(kernel.x)}{suffix}"
        case SelectTokens():
            # Leading rows and their offset are part of what is computed.
            extra = f"{kernel.leading}_{kernel.offset}_{kernel.index}"
            return f"select_{kernel.batch}x{kernel.tokens}to{kernel.kept}_{extra}"
        case InversePermutation():
            return f"inverse_permutation_{kernel.batch}x{kernel.n}"
        case GatherRows():
            return f"gather_{kernel.batch}x{kernel.tokens}to{kernel.kept}x{kernel.n}"
        case Softmax():
            return f"softmax_{kernel.rows}x{kernel.n}"
        case Quantize():
            return f"quantize_{kernel.size}"
        case Dequantize():
            return f"dequantize_{kernel.size}"
        case Generic():
            return f"{re.sub(r'[^0-9A-Za-z_]', '_', kernel.name)}_{kernel.key}"


def _short(dtype: str) -> str:
    return {"float32": "f32", "float16": "f16", "int8": "i8"}[dtype]


def _functions(
    scheduled: Mapping[Kernel, Scheduled], suffix: str
) -> dict[Kernel, tuple[_Function, ...]]:
    functions = {}
    for kernel, plan in scheduled.items():
        name = kernel_name(kernel) + suffix
        names = [name] if len(plan.steps) == 1 else [f"{name}_{i}" for i in range(len(plan.steps))]
        functions[kernel] = tuple(
            _Function(n, step.func.with_attr("global_symbol", n), step.args)
            for n, step in zip(names, plan.steps, strict=True)
        )
    return functions


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


def _compile_cpu(functions: Mapping[Kernel, Sequence[_Function]], cpu: Cpu, output: Path) -> Path:
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


def _workspace_bytes(functions: Mapping[Kernel, Sequence[_Function]]) -> int:
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
    level: _Level,
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


class _PlanBuilder:
    """Gives every operand of every step a place, and an index in the plan."""

    def __init__(
        self,
        program: Program,
        level: _Level,
        module: cuda.CudaModule | None,
        weights: _Weights,
        group_size: int | None,
    ) -> None:
        self.program = program
        self.scheduled = level.scheduled
        self.functions = level.functions
        self.storage = level.storage
        self.module = module
        self.weights = weights
        self.group_size = group_size
        self._packed_tensors: set[int] = set()
        self._grouped: dict[int, PlanGrouped] = {}  # by offset in `packed`
        self._rows: dict[Kernel, GroupedRows | None] = {}
        self.index_of: dict[str, int] = {}
        self.uses: Counter[str] = Counter()  # calls of each function
        self._tensors: list[PlanTensor] = []
        self._offsets: Mapping[str, int] = {}
        self._prepared: list[int] = []  # for each call, the one whose temporaries it reads
        calls = program.calls
        for position, call in enumerate(calls):
            shares = position > 0 and self._shares_temps(calls[position - 1], call)
            self._prepared.append(self._prepared[-1] if shares else position)

    def _shares_temps(self, before: Call, call: Call) -> bool:
        """Whether a product finds its x as the one before it has laid it out.

        That is what the first step does, if it does that alone; those after it only read it.
        """
        first, *rest = self.scheduled[call.kernel].steps
        return (
            isinstance(call.kernel, Dense)
            and call.kernel == before.kernel
            and call.reads["x"] == before.reads["x"]
            and bool(rest)
            and set(first.args) == {"x", *self.scheduled[call.kernel].temps}
        )

    def build(self) -> tuple[tuple[PlanStep, ...], Arena]:
        host = self._hosts()
        arena = plan_arena(self._lifetimes(host))
        guests = {name: arena.offsets[host[name]] for name in host}
        self._offsets = {**arena.offsets, **guests}
        for name in self.program.inputs:
            self._activation(name, self.program.tensors[name].shape)
        steps = [step for i, call in enumerate(self.program.calls) for step in self._steps(i, call)]
        for name in self.program.outputs:
            assert name in self.index_of, f"nothing writes the output {name}"
        return tuple(steps), arena

    def tensors(self) -> tuple[PlanTensor, ...]:
        """The plan's tensors, once the weights of every level are known."""
        placed = list(self._tensors)
        for index in self._packed_tensors:  # they come after the others
            offset = self.weights.plain_bytes + placed[index].offset
            placed[index] = dataclasses.replace(placed[index], offset=offset)
        return tuple(placed)

    def grouped(self) -> tuple[PlanGrouped, ...]:
        """The packed weights that have factors, once everything has its place."""
        return tuple(
            dataclasses.replace(grouped, offset=self.weights.plain_bytes + offset)
            for offset, grouped in self._grouped.items()
        )

    def _hosts(self) -> Mapping[str, str]:
        """For each tensor that takes the place of one before it: the first of that place."""
        program = self.program
        last = {
            name: i for i, call in enumerate(program.calls) for name in call.reads.values()
        } | dict.fromkeys(program.outputs, len(program.calls))
        host: dict[str, str] = {}
        for i, call in enumerate(program.calls):
            for result, argument in self.scheduled[call.kernel].in_place.items():
                if argument not in call.reads:
                    continue  # a constant
                name, before = call.writes[result], call.reads[argument]
                alone = [*call.reads.values()].count(before) == 1 and last[before] == i
                fits = self._size(name) == self._size(before)
                if alone and fits and before not in program.inputs:
                    host[name] = host.get(before, before)
        return host

    def _lifetimes(self, host: Mapping[str, str]) -> list[Lifetime]:
        first = dict.fromkeys(self.program.inputs, 0)
        last: dict[str, int] = {}
        sizes = {name: self._size(name) for name in self.program.tensors}
        temporaries = {}
        for i, call in enumerate(self.program.calls):
            for name in call.writes.values():
                first.setdefault(name, i)
                last[name] = i
            for name in call.reads.values():
                last[name] = i
            for temp, (dtype, shape) in self.scheduled[call.kernel].temps.items():
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                made = self._prepared[i]
                name = _temp_name(made, temp)
                temporaries[name] = Lifetime(name=name, size_bytes=size, first=made, last=i)
        for name in self.program.outputs:
            last[name] = len(self.program.calls)
        for name, of in host.items():  # in the order of the calls
            last[of] = last[name]
            del first[name]
        return [*temporaries.values()] + [
            Lifetime(name=name, size_bytes=sizes[name], first=first[name], last=last.get(name, 0))
            for name in first
        ]

    def _size(self, name: str) -> int:
        tensor = self.program.tensors[name]
        return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize

    def _steps(self, position: int, call: Call) -> list[PlanStep]:
        plan = self.scheduled[call.kernel]
        constants = {
            **plan.consts,
            **call.constants,
            **{name: pack(call.constants) for name, pack in plan.pack.items()},
        }
        steps = []
        made = self._prepared[position]
        for function in self.functions[call.kernel][made < position :]:
            self.uses[function.name] += 1
            operands = {}
            outputs = []
            params = function.func.params
            assert len(params) == len(function.args), (function.name, function.args)
            for param, arg in zip(params, function.args, strict=True):
                shape = tuple(int(dim) for dim in param.shape)
                dtype = str(param.dtype)
                if arg in call.writes:
                    operands[arg] = self._activation(call.writes[arg], shape, dtype)
                    outputs.append(operands[arg])
                elif arg in call.reads:
                    operands[arg] = self._activation(call.reads[arg], shape, dtype)
                elif arg in plan.temps:
                    name = _temp_name(made, arg)
                    operands[arg] = self._place(name, dtype, shape, "arena", self._offsets[name])
                else:
                    array = constants[arg]
                    assert array.size == np.prod(shape), f"{call.label}.{arg}: {array.shape}"
                    operands[arg] = (
                        self._weight(call.kernel, array, shape)
                        if isinstance(call.kernel, Dense) and arg == "w"
                        else self._constant(array, shape)
                    )
            if not outputs:  # it fills a scratch tensor; which one does not matter to the plan
                outputs = [operands[arg] for arg in function.args if arg in plan.temps]
            steps.append(self._step(function, call.label, operands, outputs))
        return steps

    def _step(
        self, function: _Function, label: str, operands: Mapping[str, int], outputs: list[int]
    ) -> PlanStep:
        order: Sequence[str] = function.args
        if self.module is None:
            return PlanStep(
                kernel=function.name,
                label=label,
                args=tuple(operands[arg] for arg in order),
                outputs=tuple(outputs),
            )
        launch = self.module.kernels[function.name]
        return PlanStep(
            kernel=launch.symbol,
            label=label,
            args=tuple(operands[order[i]] for i in launch.args),
            outputs=tuple(outputs),
            grid=launch.grid,
            block=launch.block,
        )

    def _activation(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> int:
        tensor = self.program.tensors[name]
        quantized = tensor.dtype == "int8"
        stored = self.storage.dtype if quantized else tensor.dtype
        # A kernel may read int8 values as words of four.
        size = int(np.prod(shape)) * np.dtype(dtype or stored).itemsize
        assert size == self._size(name), f"{name}: {tensor.shape} {stored} as {shape} {dtype}"
        return self._place(
            name,
            dtype or stored,
            shape,
            "arena",
            self._offsets[name],
            scale=tensor.scale,
            zero_point=tensor.zero_point,
            storage_offset=self.storage.offset if quantized else 0,
        )

    def _weight(self, kernel: Dense, array: Array, shape: tuple[int, ...]) -> int:
        """A matrix of weights: of four bits where they fit, as it is where they do not."""
        # Four may be in a word; of a float matrix, int8 ones are digits.
        if kernel.x == "float32" or array.dtype not in (np.int8, np.int32):
            return self._constant(array, shape)
        values = np.ascontiguousarray(array).view(np.int8).reshape(-1)
        if fits_int4(values):
            return self._packed(array, shape, self.weights.packed.add(array))
        rows = self._grouped_rows(kernel)
        split = None if rows is None else rows.split(values)
        if rows is None or split is None:
            return self._constant(array, shape)
        codes, factors = split
        # Equal codes with other factors become other weights.
        offset = self.weights.packed.add(codes, belongs_to=factors.tobytes())
        self._grouped[offset] = PlanGrouped(
            offset=0,  # known once all is placed
            size_bytes=len(codes),
            factors=self.weights.whole.add(factors),
            **dataclasses.asdict(rows),
        )
        return self._packed(array, shape, offset)

    def _grouped_rows(self, kernel: Dense) -> GroupedRows | None:
        if self.group_size is None:
            return None
        if kernel not in self._rows:
            pack = self.scheduled[kernel].pack.get("w")
            self._rows[kernel] = find_rows(
                lambda w: w if pack is None else pack({"w": w}),
                kernel.k,
                kernel.n,
                self.group_size,
            )
        return self._rows[kernel]

    def _packed(self, array: Array, shape: tuple[int, ...], offset: int) -> int:
        name = f"{array.dtype}@packed+{offset}"
        index = self._place(name, str(array.dtype), shape, "weights", offset)
        self._packed_tensors.add(index)
        return index

    def _constant(self, array: Array, shape: tuple[int, ...]) -> int:
        offset = self.weights.whole.add(array)
        return self._place(f"{array.dtype}@{offset}", str(array.dtype), shape, "weights", offset)

    def _place(
        self, name: str, dtype: str, shape: tuple[int, ...], space: Any, offset: int, **quant: Any
    ) -> int:
        """The index of the tensor, new or known; a second shape is a view under another name."""
        index = self.index_of.get(name)
        known = None if index is None else self._tensors[index]
        if known is not None and (known.shape, known.dtype) != (shape, dtype):
            name = f"{name}:{'x'.join(map(str, shape))}:{dtype}"
            index = self.index_of.get(name)
        if index is None:
            index = self.index_of[name] = len(self._tensors)
            self._tensors.append(
                PlanTensor(
                    name=name,
                    dtype=cast(DType, dtype),
                    shape=shape,
                    space=space,
                    offset=offset,
                    **quant,
                )
            )
        return index


def _temp_name(position: int, name: str) -> str:
    return f"step{position}.{name}"
