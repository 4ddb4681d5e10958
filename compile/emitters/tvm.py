"""A static plan of kernels, which the C runtime of this project executes."""

from gfcompile.compile.emission import Emission, EmissionRequest
from gfcompile.compile.verify import verify
from gfcompile.runtime.bundle import TensorSpec
from gfcompile.targets.target import Target
from gfcompile.targets.tvm.emit import emit
from gfcompile.targets.tvm.partition import partition


def emit_plan(request: EmissionRequest, target: Target) -> Emission:
    """Kernels, plan and weights for `target`, run here against the graph if this machine can.

    Raises:
        CompileError: a node that nothing takes, or an artifact whose numbers are wrong.
    """
    graph, transform = request.graph, request.transform
    with request.progress.stage("compile the kernels"):
        program = partition(graph.model)
        library = f"lib{request.model}.so"
        artifact = emit(
            program,
            target,
            request.folder,
            library=library,
            mean=transform.mean,
            std=transform.std,
        )
    with request.progress.stage("verify the artifact"):
        entry, notes = verify(
            graph.model, program, artifact, target, request.folder, request.golden.inputs
        )
    inputs = [program.tensors[name] for name in program.inputs]
    outputs = [program.tensors[name] for name in program.outputs]
    int8 = request.precision == "int8"
    return Emission(
        kind="gfrt",
        storage="int8 products, float16 filters" if int8 else "float32",
        compute=target.int8_compute if int8 else "float32",
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
            "arena_bytes": artifact.arena.size_bytes,
            "arena_lower_bound_bytes": artifact.arena.lower_bound_bytes,
        },
    )
