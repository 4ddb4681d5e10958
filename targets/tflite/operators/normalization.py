"""LayerNormalization, which TFLite has no operator for."""

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.targets.onnx_values import constant, input_of, is_along_last_axis, shape_of
from gfcompile.targets.tflite.emitter import Emitter, lowers
from gfcompile.targets.tflite.model_file import Tensor


@lowers("LayerNormalization")
def lower_layer_norm(emit: Emitter, node: ir.Node) -> None:
    """Centre, mean square, reciprocal root, scale, shift: as the standard defines it."""
    x = input_of(node, 0)
    shape = shape_of(x)
    if not is_along_last_axis(node, len(shape)):
        raise emit.refuse(node, "the last axis alone; transpose before and after")
    name = str(node.outputs[0].name)
    source = emit.real(x)
    one_per_row = (*shape[:-1], 1)
    last = emit.indices([len(shape) - 1])

    def real(part: str, shape: tuple[int, ...]) -> Tensor:
        return emit.file.tensor(f"{name}/{part}", "float32", shape)

    def mean(of: Tensor, part: str) -> Tensor:
        result = real(part, one_per_row)
        options = schema.ReducerOptionsT()
        options.keepDims = True
        emit.operator("MEAN", [of, last], [result], options)
        return result

    centred = emit.binary("SUB", source, mean(source, "mean"), f"{name}/centred")
    squared = emit.binary("MUL", centred, centred, f"{name}/squared")
    epsilon = np.array(node.attributes.get_float("epsilon", 1e-5), np.float32)
    shifted = emit.binary(
        "ADD",
        mean(squared, "variance"),
        emit.file.constant(f"{name}/epsilon", epsilon),
        f"{name}/shifted",
    )
    root = real("root", one_per_row)
    emit.operator("RSQRT", [shifted], [root])
    result = emit.binary("MUL", centred, root, f"{name}/normalized")
    for operator, value in zip(("MUL", "ADD"), node.inputs[1:], strict=False):
        array = constant(value)
        if array is None:
            raise emit.refuse(node, "constant weights alone")
        operand = emit.file.constant(str(value.name), array)  # type: ignore[union-attr]
        result = emit.binary(operator, result, operand, f"{name}/{operator.lower()}")
    emit.hold(node.outputs[0], result)
