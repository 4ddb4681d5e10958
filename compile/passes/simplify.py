"""Lets onnxsim simplify a float graph: it knows many a decomposed operator by sight.

A hand-written layer norm or GELU becomes one node, batch normalization moves into its
convolution, what is computed twice is computed once.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxsim

from gfcompile.compile.passes.graph import shape_of
from gfcompile.compile.trace import rounding_tolerance, session
from gfcompile.targets.onnx_values import NAME_SCOPES

# They would undo the canonical form: MatMul and Add, nothing transposed.
_SKIPPED = [
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_transpose_into_gemm",
]
_QUANTIZED = frozenset(("QuantizeLinear", "DequantizeLinear"))


def simplify(model: ir.Model, refuse: Callable[[str], None]) -> ir.Model:
    """`model` as onnxsim simplifies it; `model` itself where that is no gain.

    QDQ graphs stay as they are: folding would turn their int8 weights into float. What comes
    back has fewer nodes and was run against `model`.
    """
    if any(node.op_type in _QUANTIZED for node in model.graph):
        return model
    proto, _ = onnxsim.simplify(ir.to_proto(model), skipped_optimizers=_SKIPPED)
    simplified: ir.Model = ir.from_proto(proto)
    if simplified.graph.num_nodes() >= model.graph.num_nodes():
        return model
    if set(simplified.functions) != set(model.functions):
        refuse("onnxsim's simplification is left out: it inlines the filters")
        return model
    if not _agrees(model, simplified):
        refuse("onnxsim's simplification is left out: it changes the result")
        return model
    _restore_modules(model, simplified)
    return simplified


def _restore_modules(model: ir.Model, simplified: ir.Model) -> None:
    """onnxsim forgets the torch modules that nodes came from; values keep their names."""
    scopes = {
        value.name: node.metadata_props[NAME_SCOPES]
        for node in model.graph
        if NAME_SCOPES in node.metadata_props
        for value in node.outputs
    }
    for node in simplified.graph:
        known = [scopes[value.name] for value in node.outputs if value.name in scopes]
        if known:
            node.metadata_props[NAME_SCOPES] = known[0]


def _agrees(model: ir.Model, simplified: ir.Model) -> bool:
    (image,) = model.graph.inputs
    signal = np.random.default_rng(0).standard_normal(shape_of(image)).astype(np.float32)
    outputs = []
    for candidate in (model, simplified):
        outputs.extend(session(candidate).run(None, {image.name: signal}))
    expected, actual = outputs
    tolerance = rounding_tolerance(model) * np.abs(expected).max()
    return actual.shape == expected.shape and bool(np.abs(actual - expected).max() <= tolerance)
