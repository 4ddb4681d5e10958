"""An .mlpackage, for Core ML on iPhone, iPad and Mac; checked here by evaluating what was saved."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

import gfcompile
from gfcompile.compile.agreement import notes_on, patches_in_common, recompute
from gfcompile.compile.emission import Emission, EmissionRequest, Pruning
from gfcompile.compile.graph import run
from gfcompile.compile.ledger import (
    MAX_LOGIT_STEPS,
    MIN_EQUAL_ACTIVATIONS,
    LedgerEntry,
    compare,
    compare_int8,
    demand,
)
from gfcompile.compile.prune import selections
from gfcompile.compile.spread import allow_for_ties
from gfcompile.compile.trace import rounding_tolerance
from gfcompile.runtime.bundle import TensorSpec
from gfcompile.targets.coreml.emit import LOGITS, Emitted, Place, emit
from gfcompile.targets.coreml.evaluate import Evaluator
from gfcompile.targets.coreml.options import CoremlOptions
from gfcompile.targets.coreml.package import Description
from gfcompile.targets.coreml.program import MilProgram, read_program
from gfcompile.targets.coreml.statistics import measure
from gfcompile.targets.onnx_values import constant, dtype_of, is_standard, scalar_quantization

Array = npt.NDArray[Any]

EVALUATED = "evaluated, not Apple's runtime"
# Two products a layer: of rounded weights with rounded values, and what it gives is rounded.
_HALF_ROUNDING = 2.0**-11 / np.sqrt(12)
_HALF_ROUNDINGS_PER_OPERATION = 2
# An activation of 100 steps is rounded by up to a twentieth of one, some times over.
_HALF_MIN_EQUAL = 0.9
_HALF_MAX_LOGIT_STEPS = 3.0


def emit_coreml(request: EmissionRequest, options: CoremlOptions) -> Emission:
    """The package, and its numbers beside those of the graph.

    It is evaluated twice: as it is, and as it would be in float32, where nothing but the order of
    summation may differ from the graph. So what float16 costs stands alone in the ledger.

    Raises:
        CompileError: an operator that Core ML does not have, or wrong numbers.
    """
    half = request.precision != "float32"
    reference, stages, notes = _reference(request, options)
    graph = reference.graph
    name = f"{request.model}.mlpackage"
    with request.progress.stage("write the package"):
        emitted = _emit(request, graph, request.folder / name, options, half=half)
        program = read_program(request.folder / name)
    with request.progress.stage("evaluate the package"):
        if half:
            with tempfile.TemporaryDirectory(prefix="gfcompile-") as twin:
                package = Path(twin) / name
                single = _emit(request, graph, package, options, half=False)
                stages.append(_verify(reference, read_program(package), single, "in float32"))
        stages.append(_verify(reference, program, emitted, "artifact", half=half))
    other = dataclasses.replace(options, layout="plain" if options.layout == "ane" else "ane")
    return Emission(
        kind="coreml",
        storage=_storage(request, options, program),
        compute="float16" if half else "float32",
        arch="any",
        inputs=(_input(emitted),),
        outputs=(TensorSpec(name=LOGITS, dtype="float32", shape=emitted.logits_shape),),
        library=name,
        ledger=tuple(stages),
        notes=(*notes, *notes_on(stages[-1])),
        extra={
            "coreml": {
                **dataclasses.asdict(options),
                "opset": program.opset,
                "classifies": emitted.classifies,
                "statistics": {
                    options.layout: measure(program).to_dict(),
                    other.layout: _statistics_of(request, graph, other, half=half),
                },
            },
        },
    )


def _emit(
    request: EmissionRequest,
    graph: ir.Model,
    package: Path,
    options: CoremlOptions,
    *,
    half: bool,
) -> Emitted:
    weights = request.weights
    return emit(
        graph,
        package,
        options=options,
        half=half,
        mean=request.transform.mean,
        std=request.transform.std,
        labels=request.labels,
        description=Description(
            text=f"Image classifier {request.model}; weights: {weights}",
            author=f"gfcompile {gfcompile.__version__}",
            version=gfcompile.__version__,
            license=options.license or f"not stated; that of the weights ({weights})",
        ),
        group_size=request.graph.group_size,
    )


def _statistics_of(
    request: EmissionRequest, graph: ir.Model, options: CoremlOptions, *, half: bool
) -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gfcompile-") as folder:
        package = Path(folder) / "other.mlpackage"
        _emit(request, graph, package, options, half=half)
        return measure(read_program(package)).to_dict()


def _input(emitted: Emitted) -> TensorSpec:
    batch, channels, height, width = emitted.input_shape
    if not emitted.takes_pixels:
        return TensorSpec(name="image", dtype="float32", shape=emitted.input_shape)
    return TensorSpec(
        name="image",
        dtype="uint8",
        shape=(batch, height, width, channels),
        layout="nhwc",
        pixels=True,
    )


def _storage(request: EmissionRequest, options: CoremlOptions, program: MilProgram) -> str:
    if request.precision != "int8":
        return request.precision
    if options.ios == 15:
        return "float16, on the grid of int8"
    stored = {kind.dtype for op in program.operations for kind in op.literal_types.values()}
    weights = " and ".join(name for name in ("int4", "int8") if name in stored) + " weights"
    return f"{weights}, int8 activations, float16" if options.ios >= 17 else f"{weights}, float16"


# What the package is held against


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """A graph, and what it makes of the golden images.

    Attributes:
        stage: its name in the ledger.
        pixels, images, logits: one each per batch.
        pruning: of a model that prunes.
    """

    stage: str
    graph: ir.Model
    pixels: Sequence[Array]
    images: Sequence[Array]
    logits: Sequence[Array]
    pruning: Pruning | None


def _reference(
    request: EmissionRequest, options: CoremlOptions
) -> tuple[_Reference, list[LedgerEntry], list[str]]:
    """The graph that the package is to compute, a stage for what it left out, and notes."""
    model, golden = request.graph.model, request.golden
    logits = run(model, golden.inputs)
    stage = "quantized" if request.precision == "int8" else "lowered"
    entries, notes = [], []
    batch = len(golden.inputs[0])
    if batch > 1:
        notes.append(
            "Core ML takes an image, and names classes, one at a time: at batch "
            f"{batch} the package takes normalized values and gives logits"
        )
    if request.precision == "int8" and options.ios < 17:
        model, stage = weights_only(model), "weights only"
        reduced = run(model, golden.inputs)
        entries = [compare(stage, "quantized", logits, reduced, how="ONNX Runtime")]
        logits = reduced
        notes += [
            f"iOS {options.ios} has no int8 activations: weights alone are quantized; --ios 17 "
            "has both"
        ]
        if options.ios == 15:
            notes.append(
                "iOS 15 stores no int8 in a program: the weights are the int8 values in float16, "
                "so the package is no smaller than in float16; --ios 16 stores them in int8"
            )
    if request.graph.has_int4 and options.ios < 18:
        notes.append(
            f"iOS {options.ios} stores no int4, so weights of 4 bits take 8; --ios 18 does"
        )
    reference = _Reference(
        stage=stage,
        graph=model,
        pixels=golden.pixels,
        images=golden.inputs,
        logits=logits,
        pruning=request.pruning,
    )
    return reference, entries, notes


def weights_only(model: ir.Model) -> ir.Model:
    """A QDQ graph without the quantization of its activations."""
    reduced = model.clone()
    for node in list(reduced.graph):
        if not is_standard(node, "QuantizeLinear"):
            continue
        (source, *_), (quantized,) = node.inputs, node.outputs
        assert source is not None
        for reader in list(quantized.consumers()):
            assert is_standard(reader, "DequantizeLinear"), reader.op_type
            reader.outputs[0].replace_all_uses_with(source)
            reduced.graph.remove(reader, safe=True)
        reduced.graph.remove(node, safe=True)
    return reduced


# Comparison


def _verify(
    reference: _Reference,
    program: MilProgram,
    emitted: Emitted,
    stage: str,
    *,
    half: bool = False,
) -> LedgerEntry:
    """The ledger's entry for a package.

    Raises:
        CompileError: it computes something else than the graph.
    """
    graph, expected = reference.graph, reference.logits
    feeds = [
        pixels.transpose(0, 3, 1, 2) if emitted.takes_pixels else values
        for pixels, values in zip(reference.pixels, reference.images, strict=True)
    ]
    evaluator = Evaluator(program)
    chosen = selections(graph) if reference.pruning is not None else ()
    watched = _watched(graph, emitted, chosen)
    actual, traces = [], []
    for feed in feeds:
        logits, trace = _evaluate(evaluator, feed, watched)
        actual.append(logits)
        traces.append(trace)
    int8 = None
    tokens: tuple[float, ...] = ()
    if any(array.dtype == np.int8 for array in traces[0].values()):
        wanted = recompute(graph, traces, reference.images)
        got = [{name: trace[name] for name in wanted[0]} for trace in traces]
        int8 = compare_int8(
            wanted,
            got,
            expected,
            actual,
            logits_step=_last_scale(graph),
            logits_limit=_HALF_MAX_LOGIT_STEPS if half else MAX_LOGIT_STEPS,
        )
        int8 = allow_for_ties(int8, graph, partial(run, images=reference.images), expected)
    if reference.pruning is not None:
        places = [[trace[name] for name in chosen] for trace in traces]
        tokens = patches_in_common(graph, chosen, places, reference.images, reference.pruning)
    largest = float(max(np.abs(logits).max() for logits in expected))
    tolerance = rounding_tolerance(graph) * largest
    if half:
        tolerance += _half_tolerance(program) * largest
    entry = compare(
        stage,
        reference.stage,
        expected,
        actual,
        how=EVALUATED,
        tolerance=None if int8 else tolerance,
        int8=int8,
        tokens_kept=tokens,
    )
    demand(entry, expected, actual, min_equal=_HALF_MIN_EQUAL if half else MIN_EQUAL_ACTIVATIONS)
    return entry


@dataclass(frozen=True, kw_only=True)
class _Watched:
    """A value of the graph that is read from the package, and its dtype there."""

    place: Place
    dtype: str


def _watched(graph: ir.Model, emitted: Emitted, chosen: Sequence[str]) -> dict[str, _Watched]:
    """Int8 activations, and what several nodes read: between those the graph computes itself.

    Args:
        chosen: further values of the graph, by name.
    """
    return {
        str(value.name): _Watched(place=emitted.places[str(value.name)], dtype=dtype_of(value))
        for node in graph.graph
        for value in node.outputs
        if str(value.name) in emitted.places
        and (dtype_of(value) == "int8" or len(value.consumers()) > 1 or str(value.name) in chosen)
    }


def _evaluate(
    evaluator: Evaluator, feed: Array, watched: Mapping[str, _Watched]
) -> tuple[Array, dict[str, Array]]:
    """The logits, and the watched values in the graph's shapes."""
    results: dict[str, Array] = {}
    needed = {value.place.name for value in watched.values()}

    def observe(op: Any, values: Sequence[Any]) -> None:
        for (name, _), value in zip(op.outputs, values, strict=True):
            if name in needed:
                results[name] = value.numpy()

    logits = evaluator.run({"image": feed}, observe)[LOGITS]
    return logits, {
        name: value.place.restore(results[value.place.name]).astype(value.dtype)
        for name, value in watched.items()
        if value.place.name in results
    }


def _last_scale(graph: ir.Model) -> float:
    """The scale of the last int8 activation."""
    scales = [
        scalar_quantization(node)[0]
        for node in graph.graph
        if is_standard(node, "QuantizeLinear") and constant(node.inputs[0]) is None
    ]
    return scales[-1]


def _half_tolerance(program: MilProgram) -> float:
    """How far float16 may lie from float32, relative to the largest logit: as in
    `rounding_tolerance`, with one rounding of the result and one of the weights per operation.
    """
    roundings = len(program.operations) * _HALF_ROUNDINGS_PER_OPERATION
    return float(4 * _HALF_ROUNDING * roundings)
