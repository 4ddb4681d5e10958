"""The compiled artifact against its graph, wherever this machine can run it.

x86-64 artifacts run natively; arm64 ones under QEMU; those for a Jetson's GPU behind a stand-in
for the CUDA driver that runs the same kernel source on this CPU. What cannot run here is not
verified, and the bundle says so.
"""

import dataclasses
import math
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfcompile.compile.agreement import (
    notes_on,
    patches_in_common,
    recompute,
    run_with_ties_of,
)
from gfcompile.compile.emission import Pruning
from gfcompile.compile.graph import run
from gfcompile.compile.ledger import LedgerEntry, compare, compare_int8, demand
from gfcompile.compile.spread import allow_for_ties
from gfcompile.compile.trace import rounding_tolerance
from gfcompile.runtime.bench import qemu_command, run_bench
from gfcompile.runtime.device.gfrt import TensorInfo, TraceRecord
from gfcompile.runtime.errors import CompileError, DeviceError
from gfcompile.runtime.trace import logical_values
from gfcompile.targets.host import cpu_flags
from gfcompile.targets.target import Gpu, Target
from gfcompile.targets.tvm import link
from gfcompile.targets.tvm.emit import Artifact
from gfcompile.targets.tvm.kernel import Attention, Dense
from gfcompile.targets.tvm.program import Program, Tensor
from gfcompile.targets.tvm.schedules.cpu_dot import HalfNeon
from gfcompile.targets.tvm.standin.twin import make_twin

Array = npt.NDArray[Any]

# Rounding to nearest in float16, as a standard deviation relative to the value.
_HALF_ROUNDING = 2.0**-11 / math.sqrt(12)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where an artifact runs: a bundle's folder and how to start its gfbench."""

    folder: Path
    how: str
    images: int  # how many it is worth waiting for
    prefix: Sequence[str] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


def verify(
    model: ir.Model,
    program: Program,
    artifact: Artifact,
    target: Target,
    folder: Path,
    images: Sequence[Array],
    pruning: Pruning | None = None,
) -> tuple[LedgerEntry | None, list[str]]:
    """The ledger's entry for the artifact in `folder`, and notes; no entry if it cannot run here.

    Args:
        model: the graph that was emitted.
        images: golden inputs (batch, 3, H, W); emulated targets take the first one or two.
        pruning: of a model that prunes.

    Raises:
        CompileError: the artifact computes something else than the graph.
    """
    try:
        with _place(artifact, target, folder) as place:
            few = _inferences(images, place, program)
            entry = _verify_at(place, model, program, few, pruning)
        for place in _places_of_levels(artifact, target, folder):
            _verify_at(place, model, program, _inferences(images, place, program), pruning)
            entry = dataclasses.replace(entry, how=f"{entry.how}, {place.how}")
    except DeviceError as error:
        return None, [f"the artifact was not verified on this machine: {error}"]
    return entry, [*notes_on(entry), *_not_run(artifact, target)]


def _inferences(images: Sequence[Array], place: _Place, program: Program) -> list[Array]:
    """As many batches as have the images that it is worth waiting for in that place."""
    halves = any(tensor.dtype == "float16" for tensor in program.tensors.values())
    # QEMU computes float16 in software: gfnet_xs takes it more than a minute.
    wanted = 1 if place.prefix and halves else place.images
    return list(images[: -(-wanted // len(images[0]))])


def _verify_at(
    place: _Place,
    model: ir.Model,
    program: Program,
    images: Sequence[Array],
    pruning: Pruning | None,
) -> LedgerEntry:
    int8 = any(tensor.dtype == "int8" for tensor in program.tensors.values())
    infos = [_tensor_info(program.tensors[name]) for name in program.outputs]
    try:
        result = run_bench(
            place.folder,
            images,
            infos,
            prefix=place.prefix,
            env=place.env,
            trace=int8 or pruning is not None,
        )
    except DeviceError as error:
        raise CompileError(
            f"the compiled artifact does not run ({place.how}): {error}; please report this"
        ) from error
    actual = [values[0] for values in result.outputs]
    expected = run(model, images)
    traces = [_values(program, records) for records in result.trace]
    agreement = None
    if int8:
        wanted = recompute(model, traces, images)
        got = [{name: trace[name] for name in wanted[0]} for trace in traces]
        agreement = compare_int8(wanted, got, expected, actual, logits_step=_last_scale(program))
        agreement = allow_for_ties(
            agreement,
            model,
            partial(run, images=images),
            expected,
            same_ties=partial(run_with_ties_of, model, wanted, got, images),
        )
    entry = compare(
        "artifact",
        "quantized" if int8 else "lowered",
        expected,
        actual,
        how=place.how,
        tolerance=None
        if int8
        else _float_tolerance(model, program) * float(np.abs(expected).max()),
        int8=agreement,
        tokens_kept=()
        if pruning is None
        else _tokens_kept(model, program, traces, images, pruning),
    )
    demand(entry, expected, actual)
    return entry


def _float_tolerance(model: ir.Model, program: Program) -> float:
    """How far `program` may be from its graph, relative to the largest logit.

    Two float evaluations of a graph differ by their order of summation. What is in float16 adds,
    as in `rounding_tolerance`, for each product a rounding of either operand and those of a sum of
    so many terms as are summed up in float16, and for each filter that of its spectrum.
    """
    roundings = 0.0
    for call in program.calls:
        if isinstance(call.kernel, Dense) and call.kernel.w == "float16":
            roundings += 2 + math.sqrt(min(call.kernel.k, HalfNeon.span) / 2)
        elif isinstance(call.kernel, Attention) and call.kernel.x == "float16":
            roundings += 2 * (2 + math.sqrt(HalfNeon.span / 2))
        elif getattr(call.kernel, "k_dtype", "float32") == "float16":
            roundings += 1
    return rounding_tolerance(model) + 4 * _HALF_ROUNDING * roundings


@contextmanager
def _place(artifact: Artifact, target: Target, folder: Path) -> Iterator[_Place]:
    """Where the artifact of `target` can run.

    Raises:
        DeviceError: nowhere on this machine.
    """
    cpu = target.cpu
    if target.gpu is not None:
        with tempfile.TemporaryDirectory(prefix="gfcompile-") as twin:
            yield _behind_stand_in(artifact, target.gpu, folder, Path(twin))
    elif cpu.arch == platform.machine():
        missing = set(artifact.plan.cpu_features) - cpu_flags()
        if missing:
            raise DeviceError(f"this CPU lacks {', '.join(sorted(missing))}")
        yield _Place(folder=folder, how="native", images=4)
    else:
        # An Android library needs Android's loader: the same objects run in the bundle's gfbench.
        what = "library" if cpu.android_api is None else "runner"
        yield _Place(
            folder=folder,
            how=f"{cpu.arch} {what} under qemu -cpu {cpu.qemu_cpu}",
            images=2,
            prefix=qemu_command(cpu=cpu.qemu_cpu, env={}),
        )


def _places_of_levels(artifact: Artifact, target: Target, folder: Path) -> Iterator[_Place]:
    """Where levels above the least one run emulated; a machine's own CPU takes its best level."""
    if target.cpu.arch == platform.machine():
        return
    emitted = {plan.cpu_features for plan in artifact.better_plans}
    for cpu in target.levels:
        if cpu.qemu_cpu is not None and link.cpu_features(cpu) in emitted:
            yield _Place(
                folder=folder,
                how=f"and {cpu.qemu_cpu}",
                images=1,
                prefix=qemu_command(cpu=cpu.qemu_cpu, env={}),
            )


def _not_run(artifact: Artifact, target: Target) -> list[str]:
    """A note if the library has kernels for better CPUs than this machine's."""
    if target.cpu.arch != platform.machine():
        return []
    needed = {feature for plan in artifact.better_plans for feature in plan.cpu_features}
    missing = ", ".join(sorted(needed - cpu_flags()))
    return [f"kernels for {missing} were not verified: this CPU lacks that"] if missing else []


def _behind_stand_in(artifact: Artifact, gpu: Gpu, folder: Path, twin: Path) -> _Place:
    driver = make_twin(artifact, gpu, folder, twin)
    return _Place(
        folder=twin,
        how=f"{gpu.arch} kernels on the CPU, behind a stand-in driver",
        images=1,
        env={"LD_LIBRARY_PATH": str(driver)},
    )


def _tensor_info(tensor: Tensor) -> TensorInfo:
    size = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
    return TensorInfo(tensor.name, tensor.dtype, tensor.shape, size, 0.0, 0, 0)


def _values(program: Program, records: Sequence[TraceRecord]) -> dict[str, Array]:
    """What one run wrote and recorded, by the name of the graph's value and in its layout."""
    values = {
        record.tensor.name: logical_values(record)
        for record in records
        if record.tensor.name in program.tensors
    }
    stored = {
        name: values[tensor].reshape(-1)[places]
        for name, (tensor, places) in program.stored_in.items()
        if tensor in values
    }
    return values | stored


def _tokens_kept(
    model: ir.Model,
    program: Program,
    traces: Sequence[Mapping[str, Array]],
    images: Sequence[Array],
    pruning: Pruning,
) -> tuple[float, ...]:
    """The share of kept patches that the graph and its artifact have in common, per stage."""
    chosen = [
        [trace[s.tensor][:, s.leading :] - s.offset for s in program.selections] for trace in traces
    ]
    names = [selection.graph_value for selection in program.selections]
    return patches_in_common(model, names, chosen, images, pruning)


def _last_scale(program: Program) -> float:
    """The scale of the last int8 activation that a product reads."""
    scales = [
        program.tensors[call.reads["x"]].scale
        for call in program.calls
        if isinstance(call.kernel, Dense) and call.kernel.x == "int8"
    ]
    return scales[-1]
