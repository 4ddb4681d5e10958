"""A .tflite file, run here by LiteRT against its graph."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

import gfcompile
from gfcompile.compile.agreement import notes_on, patches_in_common, recompute, run_given
from gfcompile.compile.emission import Emission, EmissionRequest
from gfcompile.compile.emitters.tflite_graph import fitted_graph
from gfcompile.compile.ledger import LedgerEntry, compare, compare_int8, demand
from gfcompile.compile.prune import selections
from gfcompile.compile.spread import allow_for_ties
from gfcompile.compile.trace import OUTPUT, rounding_tolerance
from gfcompile.runtime.bundle import TensorSpec
from gfcompile.runtime.images import dequantize, encode
from gfcompile.runtime.tflite import TfliteInterpreter
from gfcompile.targets.onnx_values import constant, is_standard
from gfcompile.targets.target import ModelFormat
from gfcompile.targets.tflite.emit import Normalization, TfliteModel, emit
from gfcompile.targets.tflite.emitter import to_channels_first
from gfcompile.targets.tflite.metadata import ModelInfo
from gfcompile.targets.tflite.model_file import Tensor
from gfcompile.targets.tflite.options import TfliteOptions

Array = npt.NDArray[Any]


def emit_tflite(request: EmissionRequest, target: ModelFormat, options: TfliteOptions) -> Emission:
    """The file for `target`, and what LiteRT makes of the golden images with it.

    Raises:
        CompileError: a node that the target cannot take, or a file whose numbers are wrong.
    """
    int8 = request.precision == "int8"
    with request.progress.stage("fit the graph to the target"):
        model, ledger = fitted_graph(request, target)
    with request.progress.stage("write the .tflite file"):
        transform = request.transform
        keywords: dict[str, Any] = {
            "target": target.name,
            "integer_only": target.integer_only,
            "options": options,
            "normalization": Normalization(mean=transform.mean, std=transform.std),
        }
        made = emit(model, info=_info(request, options), **keywords)
        library = f"{request.model}.tflite"
        (request.folder / library).write_bytes(made.content)
    (source,), (result,) = made.inputs.values(), made.outputs.values()
    input_spec = _spec("image", source, pixels=options.input == "uint8-image")
    output_spec = _spec(OUTPUT, result)
    with request.progress.stage("verify the artifact"):
        images = [encode(pixels, transform, input_spec) for pixels in request.golden.pixels]
        interpreter = TfliteInterpreter(made.content)
        logits = [
            dequantize(next(iter(interpreter.run(image).values())), output_spec) for image in images
        ]
        entry = _verified(
            request,
            model,
            made,
            lambda names: emit(model, also=names, **keywords),
            images,
            logits,
            against=ledger[-1].stage if ledger else "lowered",
            how=interpreter.package,
            integer_only=target.integer_only,
        )
    delegation = interpreter.delegation()
    return Emission(
        kind="tflite",
        storage=_storage(request, target),
        compute=target.int8_compute if int8 else "float32",
        arch="any",
        inputs=(input_spec,),
        outputs=(output_spec,),
        library=library,
        ledger=(*ledger, entry),
        notes=(*_notes(request), *notes_on(entry)),
        extra={
            "operators": dict(sorted(delegation.operators.items())),
            "not_delegated": dict(sorted(delegation.left.items())),
            "delegated_share": delegation.share,
            "partitions": delegation.partitions,
            "interface": options.interface,
        },
    )


def _verified(
    request: EmissionRequest,
    model: ir.Model,
    made: TfliteModel,
    watched: Callable[[Sequence[str]], TfliteModel],
    images: Sequence[Array],
    logits: Sequence[Array],
    *,
    against: str,
    how: str,
    integer_only: bool,
) -> LedgerEntry:
    """The ledger's entry for a file that gave these logits.

    Args:
        watched: the same file with further outputs, by names of the graph's values.
        images: as the file takes them.
        against, how: see `LedgerEntry`.
        integer_only: whether nothing is computed in floating point.

    Raises:
        CompileError: the file computes something else than `model`.
    """
    inputs = request.golden.inputs
    int8 = request.precision == "int8"
    agreement = None
    tokens: tuple[float, ...] = ()
    activations = _activations(model, made) if int8 else []
    chosen = selections(model)
    traces = _traces(watched([*activations, *chosen]), [*activations, *chosen], images)
    # A score on the edge may fall to either side, and another patch is kept: logits are held
    # against those of the same patches.
    places = [{name: trace[name] for name in chosen} for trace in traces]
    expected = run_given(model, places, inputs)
    if chosen and request.pruning is not None:
        kept = [list(choice.values()) for choice in places]
        tokens = patches_in_common(model, chosen, kept, inputs, request.pruning)
    if int8:
        wanted = recompute(model, traces, inputs)
        got = [{name: trace[name] for name in wanted[0]} for trace in traces]
        agreement = compare_int8(
            wanted,
            got,
            expected,
            logits,
            logits_step=_step_of_logits(made),
            logits_limit=_max_logit_steps(len(activations), integer_only=integer_only),
        )
        evaluate = partial(run_given, given=places, images=inputs)
        agreement = allow_for_ties(agreement, model, evaluate, expected)
    entry = compare(
        "artifact",
        against,
        expected,
        logits,
        how=how,
        # Two float evaluations of the same graph, in other orders of summation.
        tolerance=None if int8 else rounding_tolerance(model) * float(np.abs(expected).max()),
        int8=agreement,
    )
    demand(entry, expected, logits)
    return replace(entry, tokens_kept=tokens)


def _info(request: EmissionRequest, options: TfliteOptions) -> ModelInfo:
    """What Android's tools are told; to them pixels are 0 to 255 and normalized by the app."""
    mean, std = request.transform.mean, request.transform.std
    low = min(-m / s for m, s in zip(mean, std, strict=True))
    high = max((1 - m) / s for m, s in zip(mean, std, strict=True))
    takes_pixels = options.input == "uint8-image"
    return ModelInfo(
        name=request.model,
        description=f"{request.model}, {request.precision}, by gfcompile {gfcompile.__version__}",
        version=gfcompile.__version__,
        mean=(0.0,) if takes_pixels else [255 * m for m in mean],
        std=(1.0,) if takes_pixels else [255 * s for s in std],
        low=0.0 if takes_pixels else low,
        high=255.0 if takes_pixels else high,
        labels=request.labels,
    )


def _spec(name: str, tensor: Tensor, *, pixels: bool = False) -> TensorSpec:
    quantization = tensor.quantization
    return TensorSpec(
        name=name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        scale=0.0 if quantization is None or pixels else float(quantization.scale[0]),
        zero_point=0 if quantization is None or pixels else int(quantization.zero_point[0]),
        layout="nhwc" if len(tensor.shape) == 4 else "nchw",
        pixels=pixels,
    )


def _storage(request: EmissionRequest, target: ModelFormat) -> str:
    if request.precision != "int8":
        return {"float32": "float32", "float16": "float16 weights"}[request.precision]
    products = "weights of 4 bits as int8" if request.graph.has_int4 else "int8 products"
    return products if target.integer_only else f"{products}, float16 filters"


def _notes(request: EmissionRequest) -> Sequence[str]:
    if not request.graph.has_int4:
        return ()
    return ("weights of 4 bits are stored in 8 in this .tflite file",)


def _max_logit_steps(activations: int, *, integer_only: bool) -> float:
    """How many steps of their own scale logits may be off.

    Kernels round the product of an integer sum and its scale in different ways. Where the residual
    stream is in integers too, each of its steps that fell to the other side stays, and they add up
    as independent errors do.
    """
    return math.sqrt(activations) if integer_only else 3.0


def _activations(model: ir.Model, made: TfliteModel) -> list[str]:
    """The quantized values of the graph that operators of the file write, each tensor once."""
    inputs = {tensor.index for tensor in made.inputs.values()}
    names: dict[int, str] = {}
    for node in model.graph:
        name = str(node.outputs[0].name)
        if is_standard(node, "QuantizeLinear") and constant(node.outputs[0]) is None:
            tensor, _ = made.values[name]
            if tensor.index not in inputs:
                names.setdefault(tensor.index, name)
    return list(names.values())


def _traces(
    watched: TfliteModel, names: Sequence[str], images: Sequence[Array]
) -> list[dict[str, Array]]:
    """For each image the values named, in the graph's layout."""
    interpreter = TfliteInterpreter(watched.content)
    traces = []
    for image in images:
        results = interpreter.run(image)
        trace = {}
        for name in names:
            tensor, channels_last = watched.values[name]
            values = results[tensor.name]
            if channels_last:
                values = values.transpose(to_channels_first(values.ndim))
            # TFLite's indices have half the bits of ONNX's.
            trace[name] = values.astype(np.int64) if values.dtype == np.int32 else values
        traces.append(trace)
    return traces


def _step_of_logits(made: TfliteModel) -> float:
    """The scale that the last product wrote with: the logits, or what they are a float sum of."""
    written = [tensor.quantization for tensor, _ in made.values.values()]
    quantization = made.values[OUTPUT][0].quantization or next(filter(None, reversed(written)))
    return float(quantization.scale[0])
