"""The graph that a .tflite file is to reproduce: the lowered one, fitted to what TFLite takes."""

import onnx_ir as ir

from gfcompile.compile.emission import EmissionRequest
from gfcompile.compile.graph import run
from gfcompile.compile.ledger import LedgerEntry, compare
from gfcompile.compile.passes.convolve_global_filters import convolve_global_filters
from gfcompile.compile.passes.expand_layer_norms import expand_layer_norms
from gfcompile.compile.passes.halve_constants import halve_constants
from gfcompile.compile.passes.infer_shapes import check_model, infer_shapes
from gfcompile.compile.passes.merge_layout_changes import merge_layout_changes
from gfcompile.compile.passes.quantize_constants import quantize_constants
from gfcompile.compile.passes.quantize_values import quantize_edges, quantize_values
from gfcompile.compile.passes.remove_dead_code import remove_dead_code
from gfcompile.compile.value_ranges import value_scales
from gfcompile.quantize.qparams import QParams
from gfcompile.targets.onnx_values import is_standard
from gfcompile.targets.target import ModelFormat
from gfcompile.targets.tflite.results import (
    PROBABILITIES,
    results_without_scale,
    values_without_scale,
)


def fitted_graph(
    request: EmissionRequest, target: ModelFormat
) -> tuple[ir.Model, list[LedgerEntry]]:
    """The graph for `target`, and how far it is from the one requested.

    Raises:
        CompileError: an operator that cannot be had in integers where the target has no others.
    """
    model = request.graph.model.clone()
    if request.precision == "float32":
        return model, []
    if request.precision == "float16":
        halve_constants(model, request.progress.note, products=True)
        stages = ("halved", "lowered")
    else:
        if target.integer_only:
            _quantize_everything(model, request)
        else:
            names = [str(value.name) for value in results_without_scale(model)]
            quantize_values(model, value_scales(model, names, request.calibration()))
        stages = ("completed", "quantized")
    before = run(request.graph.model, request.golden.inputs)
    after = run(model, request.golden.inputs)
    return model, [compare(*stages, before, after, how="ONNX Runtime")]


def _quantize_everything(model: ir.Model, request: EmissionRequest) -> None:
    # First into operators that have integer kernels, then scales for what these compute.
    convolve_global_filters(model)
    expand_layer_norms(model)
    merge_layout_changes(model)
    remove_dead_code(model)
    infer_shapes(model)
    values = values_without_scale(model)
    fixed = {}
    for value in values:
        node = value.producer()
        if node is not None and is_standard(node, *PROBABILITIES):
            fixed[str(value.name)] = QParams(*PROBABILITIES[node.op_type])
    names = [str(value.name) for value in values if str(value.name) not in fixed]
    scales = value_scales(model, names, request.calibration()) | fixed
    quantize_values(model, scales)
    # Integers can be joined where they have one scale: that of the result.
    for node in list(model.graph):
        if is_standard(node, "Concat") and str(node.outputs[0].name) in scales:
            quantize_edges(node, scales[str(node.outputs[0].name)])
    quantize_constants(model)
    infer_shapes(model)
    check_model(model)
