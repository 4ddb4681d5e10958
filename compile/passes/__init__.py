"""Rewrites of the traced graph into the canonical one that the emitters read.

One rewrite per file; here is their order, and why it is this one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from gfcompile.compile.passes.fold_constants import fold_constants
from gfcompile.compile.passes.fold_layer_scale import fold_layer_scale
from gfcompile.compile.passes.fold_transposes import fold_transposes
from gfcompile.compile.passes.halve_constants import halve_constants
from gfcompile.compile.passes.infer_shapes import check_model, infer_shapes
from gfcompile.compile.passes.lower_lone_dfts import lower_lone_dfts
from gfcompile.compile.passes.merge_layout_changes import merge_layout_changes
from gfcompile.compile.passes.order_operands import order_operands
from gfcompile.compile.passes.quantize_filter_kernels import quantize_filter_kernels
from gfcompile.compile.passes.recognise_global_filters import (
    FftForm,
    GlobalFilter,
    recognise_global_filters,
)
from gfcompile.compile.passes.remove_dead_code import remove_dead_code
from gfcompile.compile.passes.simplify import simplify
from gfcompile.compile.passes.split_gemm import split_gemm

__all__ = ["FftForm", "GlobalFilter", "Lowered", "lower"]


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What `lower` made of a model.

    Attributes:
        model: in canonical form.
        filters: its global filters, in order.
        refusals: what a pass could have rewritten and did not, and why; one sentence each.
    """

    model: ir.Model
    filters: tuple[GlobalFilter, ...]
    refusals: tuple[str, ...]


def lower(
    model: ir.Model,
    *,
    fft: FftForm | Literal["auto"],
    choose_form: Callable[[int, int, int], FftForm],
    half_constants: bool,
    on_stage: Callable[[str, ir.Model], None] | None = None,
) -> Lowered:
    """The canonical form of a traced `model`, which itself stays as it is.

    Linear layers are MatMul (constant (K, N)) and Add (constant (N,)); global filters are calls
    of local functions in the domain `gfcompile` (see `filter_functions`) or stay DFT nodes; every
    value has a known type and static shape. The graph is valid ONNX after every stage, and ONNX
    Runtime runs it.

    Args:
        fft: the form of every global filter; "auto" asks `choose_form`. "native" leaves all DFT
            nodes alone.
        choose_form: the form of a filter of (h, w, channels).
        half_constants: store large float constants in float16 (for int8 models).
        on_stage: told the name and the model after each stage.

    Raises:
        CompileError: a shape is not static.
    """
    model = model.clone()
    refusals: list[str] = []

    def choose(h: int, w: int, c: int) -> FftForm:
        return choose_form(h, w, c) if fft == "auto" else fft

    # What is constant must be seen as such by all that follows, the filters' K above all.
    infer_shapes(model)
    fold_constants(model)
    _finish("folded", model, on_stage)

    # While the spectra are as the exporter wrote them. Whole filters first: a DFT is only lone if
    # no filter claims it.
    found, native = recognise_global_filters(model, choose, refusals.append)
    if fft != "native":
        lower_lone_dfts(model, native, refusals.append)
    _finish("spectral", model, on_stage)

    # After the filters, whose chains it would rearrange, and without which it has less to do.
    model = simplify(model, refusals.append)
    split_gemm(model, refusals.append)
    order_operands(model)
    # Constants take their final layout (Gemm has just left transposes behind), and only then the
    # layer scale, which wants the channels last.
    fold_transposes(model)
    fold_constants(model)
    fold_layer_scale(model)
    merge_layout_changes(model)
    fold_constants(model)
    # Once nothing folds a kernel's float32 any more, and before it is halved.
    quantize_filter_kernels(model)
    _finish("canonical", model, on_stage)

    if half_constants:
        # Last: folding would turn the constants back into float32.
        halve_constants(model, refusals.append)
        _finish("halved", model, on_stage)
    check_model(model)
    return Lowered(model=model, filters=tuple(found), refusals=tuple(refusals))


def _finish(stage: str, model: ir.Model, on_stage: Callable[[str, ir.Model], None] | None) -> None:
    remove_dead_code(model)
    infer_shapes(model)
    if on_stage is not None:
        check_model(model)
        on_stage(stage, model)
