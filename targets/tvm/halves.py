"""A program of kernel calls in float16: weights, and what products read.

Products and filters take float16 operands. Whatever writes for them alone stores float16. All else,
the residual stream and every normalization above all, stays float32, and so does what a kernel
computes beside its products: sums, softmax, GELU.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.tvm.kernel import (
    Array,
    Attention,
    CircularFilter,
    Dense,
    DftFilter,
    LayerNorm,
    Patchify,
    TokenMean,
)
from gfcompile.targets.tvm.program import Call, Program, Tensor

_READERS = (Attention, Dense, DftFilter)  # what can compute in it
_WRITERS = (Attention, Dense, LayerNorm, Patchify, TokenMean)  # what can store float16


def in_halves(program: Program) -> Program:
    """The float32 `program` in float16.

    Raises:
        CompileError: a weight is beyond the range of float16.
    """
    calls = [_with_half_constants(call) for call in program.calls]
    halved = _read_by_products_alone(calls) - {*program.inputs, *program.outputs}
    halved &= {call.writes["y"] for call in calls if _can_store_half(call)}
    tensors = {
        name: replace(tensor, dtype="float16") if name in halved else tensor
        for name, tensor in program.tensors.items()
    }
    return replace(program, tensors=tensors, calls=tuple(_typed(call, tensors) for call in calls))


def _with_half_constants(call: Call) -> Call:
    kernel = call.kernel
    if isinstance(kernel, Dense) and kernel.x == "float32":
        weights = {"w": _halved(call, "w")}
        return replace(
            call, kernel=replace(kernel, w="float16"), constants={**call.constants, **weights}
        )
    if isinstance(kernel, DftFilter | CircularFilter):
        bits = {name: _halved(call, name).view(np.uint16) for name in call.constants}
        return replace(call, kernel=replace(kernel, k_dtype="float16"), constants=bits)
    return call


def _halved(call: Call, name: str) -> Array:
    array = call.constants[name]
    if array.dtype == np.uint16:  # it was before
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        largest = float(np.abs(array).max())
        raise CompileError(
            f"{call.label}: a weight of {largest:.3g} is beyond float16, which ends at 65504; "
            "compile without --fp16"
        )
    return half


def _read_by_products_alone(calls: list[Call]) -> set[str]:
    uses: dict[str, list[bool]] = defaultdict(list)
    for call in calls:
        for argument, tensor in call.reads.items():
            uses[tensor].append(isinstance(call.kernel, _READERS) and argument == "x")
    return {tensor for tensor, by_products in uses.items() if all(by_products)}


def _can_store_half(call: Call) -> bool:
    return isinstance(call.kernel, _WRITERS) and call.kernel.out == "float32"


def _typed(call: Call, tensors: Mapping[str, Tensor]) -> Call:
    """The call with the dtypes that its tensors have now."""
    kernel = call.kernel
    if _can_store_half(call) and tensors[call.writes["y"]].dtype == "float16":
        kernel = replace(cast(Dense, kernel), out="float16")
    if isinstance(kernel, _READERS) and tensors[call.reads["x"]].dtype == "float16":
        kernel = replace(kernel, x="float16")
    return replace(call, kernel=kernel)
