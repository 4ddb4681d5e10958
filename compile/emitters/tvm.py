"""A static plan of kernels, which the C runtime of this project executes."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gfcompile.compile.emission import Emission, EmissionRequest, Pruning, RequestedPrecision
from gfcompile.compile.verify import verify
from gfcompile.runtime.bundle import TensorSpec
from gfcompile.targets.target import Cpu, Gpu, Target, peaks
from gfcompile.targets.tvm.blocked import in_blocks
from gfcompile.targets.tvm.emit import emit
from gfcompile.targets.tvm.halves import in_halves
from gfcompile.targets.tvm.kernel import Kernel, SelectTokens
from gfcompile.targets.tvm.levels import Tuned
from gfcompile.targets.tvm.partition import partition
from gfcompile.targets.tvm.program import Program
from gfcompile.targets.tvm.schedules.cpu_dot import HalfNeon
from gfcompile.targets.tvm.tuning import database

if TYPE_CHECKING:
    from gfcompile.compile.graph import Graph


def emit_plan(
    request: EmissionRequest, target: Target, tuning_db: Path | Literal["shipped", "none"]
) -> Emission:
    """Kernels, plan and weights for `target`, run here against the graph if this machine can.

    Args:
        tuning_db: see `CompileConfig`.

    Raises:
        CompileError: a node that nothing takes, or an artifact whose numbers are wrong.
        UserError: a tuning database that is none.
    """
    graph, transform = request.graph, request.transform
    int8, half = request.precision == "int8", request.precision == "float16"
    if half:
        target = target.for_float16()
    with request.progress.stage("compile the kernels"):
        program = program_of(graph, request.precision, target)
        library = f"lib{request.model}.so"
        tuning = _Tuning(tuning_db)
        artifact = emit(
            program,
            target,
            request.folder,
            library=library,
            mean=transform.mean,
            std=transform.std,
            group_size=graph.group_size,
            tuning=tuning,
        )
    with request.progress.stage("verify the artifact"):
        entry, notes = verify(
            graph.model,
            program,
            artifact,
            target,
            request.folder,
            request.golden.inputs,
            request.pruning,
        )
    notes += tuning.notes()
    if program.unscheduled:
        operators = ", ".join(program.unscheduled)
        notes.append(
            f"{operators}: some have no schedule of gfcompile's own yet and run several times "
            "slower than they could"
        )
    inputs = [program.tensors[name] for name in program.inputs]
    outputs = [program.tensors[name] for name in program.outputs]
    storage, compute = "float32", "float32"
    if int8:
        storage, compute = _storage(graph, artifact.plan.packed_bytes), target.int8_compute
    elif half:
        storage, compute = (
            "float16 weights, and activations that products read",
            _half_compute(target),
        )
    return Emission(
        kind="gfrt",
        storage=storage,
        compute=compute,
        arch=target.cpu.arch,
        inputs=tuple(TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in inputs),
        outputs=tuple(TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in outputs),
        device=artifact.plan.device,
        library=library,
        cpu_features=artifact.plan.cpu_features,
        compute_capability=target.gpu.compute_capability if target.gpu else None,
        kernels=artifact.kernels,
        ledger=() if entry is None else (entry,),
        notes=tuple(notes),
        extra={
            "mcpu": target.cpu.mcpu,
            "qemu_cpu": target.cpu.qemu_cpu,
            "peaks": asdict(peaks(target)),
            "pruning": _pruning(request.pruning, program),
            "arena_bytes": artifact.arena.size_bytes,
            "arena_lower_bound_bytes": artifact.arena.lower_bound_bytes,
            "tuned_kernels": dict(
                Counter(kernel["tuned"] for kernel in artifact.kernels if "tuned" in kernel)
            ),
        },
    )


def program_of(graph: "Graph", precision: RequestedPrecision, target: Target) -> Program:
    """The kernel calls that compute `graph` on `target`, in float16 if that is asked for.

    Raises:
        CompileError: a node that nothing takes, or a weight that float16 cannot hold.
    """
    program = partition(graph.model)
    if precision == "float16":
        program = in_halves(program)
    # ARM's cores have not been measured; a GPU has no use for it.
    has_use = target.gpu is None and target.cpu.arch == "x86_64"
    return in_blocks(program) if has_use else program


def _half_compute(target: Target) -> str:
    """What products compute in, by the float16 arithmetic that CPUs have."""
    elsewhere = "" if target.cpu.float16 else " where the CPU has float16 arithmetic, else float32"
    return f"products in float16, {HalfNeon.span} at a time, these sums in float32{elsewhere}"


def _pruning(pruning: Pruning | None, program: Program) -> Mapping[str, Any]:
    """How a report finds the patches that were kept, in a trace of the bundle; JSON values."""
    if pruning is None:
        return {}
    chooses = {
        call.writes["y"]: call.kernel.tokens
        for call in program.calls
        if isinstance(call.kernel, SelectTokens)
    }
    return {
        "patches": chooses[program.selections[0].tensor],
        "kept": list(pruning.kept),
        "chosen_anew": pruning.chosen_anew,
        "selections": [
            {"tensor": s.tensor, "leading": s.leading, "offset": s.offset}
            for s in program.selections
        ],
    }


class _Tuning:
    """What the databases know of kernels; a user's own comes before the shipped one.

    Args:
        tuning_db: see `CompileConfig`.
    """

    def __init__(self, tuning_db: Path | Literal["shipped", "none"]) -> None:
        self._databases = [] if tuning_db == "none" else [database.shipped()]
        if isinstance(tuning_db, Path):
            self._databases.append(database.load(tuning_db))
        self._left_out: list[dict[database.Key, str]] = [{} for _ in self._databases]

    def __call__(self, kernels: Iterable[Kernel], device: Cpu | Gpu) -> Mapping[Kernel, Tuned]:
        kernels = list(kernels)
        tuned: dict[Kernel, Tuned] = {}
        for known, left_out in zip(self._databases, self._left_out, strict=True):
            found = known.tuned(kernels, device)
            tuned |= found
            left_out |= known.left_out([k for k in kernels if k not in found], device)
        return tuned

    def notes(self) -> list[str]:
        """What took no effect, a line for each database, after all kernels were asked for."""
        return [
            known.describe(left_out)
            for known, left_out in zip(self._databases, self._left_out, strict=True)
            if left_out
        ]


def _storage(graph: "Graph", packed_bytes: int) -> str:
    """What an int8 bundle holds."""
    if graph.has_int4 and packed_bytes and graph.group_size is not None:
        weights = (
            f"int4 weights in groups of {graph.group_size} (expanded to int8 when loaded), "
            "int8 activations"
        )
    elif graph.has_int4 and packed_bytes:
        weights = "int4 weights (expanded to int8 when loaded), int8 activations"
    elif graph.has_int4:
        weights = "weights of 4 bits as int8, int8 activations"
    else:
        weights = "int8 products"
    return f"{weights}, float16 filters"
