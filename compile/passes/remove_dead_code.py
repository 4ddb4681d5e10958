"""Removes what no output depends on: nodes, initializers, functions, opset imports."""

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    IdentityEliminationPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)


def remove_dead_code(model: ir.Model) -> bool:
    """Removes Identity nodes and all that is unused from `model`; whether there was anything."""
    result = Sequential(
        IdentityEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        RemoveUnusedOpsetsPass(),
    )(model)
    return bool(result.modified)
