"""Type and static shape of every value, by ONNX's own inference."""

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from gfcompile.runtime.errors import CompileError


def infer_shapes(model: ir.Model) -> bool:
    """Fills in what `model` does not say of its values; whether anything was missing.

    Raises:
        CompileError: a value's shape depends on the input, or is not known.
    """
    result = ShapeInferencePass()(model)
    for value in _values(model.graph):
        dims = None if value.shape is None else tuple(value.shape)
        if value.dtype is None or dims is None or not all(isinstance(d, int) for d in dims):
            raise CompileError(
                f"the shape of {value.name} is not static ({dims}): "
                "gfcompile compiles for one input shape"
            )
    return bool(result.modified)


def check_model(model: ir.Model) -> None:
    """Asserts that `model` is valid ONNX."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]
