"""LayerNormalization, which TFLite has no operator for."""

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.targets.onnx_values import constant, shape_of
from gfcompile.targets.tflite.emitter import Emitter, input_of, lowers
from gfcompile.targets.tflite.model_file import Tensor


@lowers("LayerNormalization")
def lower_layer_norm(emit: Emitter, node: ir.Node) -> None:
    """Centre, mean square, reciprocal root, scale, shift: as the standard defines it."""
    x = input_of(node, 0)
    shape = shape_of(x)
    if node.attributes.get_int("axis", -1) % len(shape) != len(shape) - 1:
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

    centred, squared = real("centred", shape), real("squared", shape)
    emit.operator("SUB", [source, mean(source, "mean")], [centred], schema.SubOptionsT())
    emit.operator("MUL", [centred, centred], [squared], schema.MulOptionsT())
    shifted, root = real("shifted", one_per_row), real("root", one_per_row)
    epsilon = np.float32(node.attributes.get_float("epsilon", 1e-5))
    small = emit.file.constant(f"{name}/epsilon", np.array(epsilon))
    emit.operator("ADD", [mean(squared, "variance"), small], [shifted], schema.AddOptionsT())
    emit.operator("RSQRT", [shifted], [root])
    steps = [("MUL", schema.MulOptionsT, root)]
    for operator, options, value in zip(
        ("MUL", "ADD"), (schema.MulOptionsT, schema.AddOptionsT), node.inputs[1:], strict=False
    ):
        array = constant(value)
        if array is None:
            raise emit.refuse(node, "constant weights alone")
        assert value is not None
        steps.append((operator, options, emit.file.constant(str(value.name), array)))
    current = centred
    for number, (operator, options, operand) in enumerate(steps):
        is_last = number == len(steps) - 1
        result = emit.result(node) if is_last else real(f"step{number}", shape)
        emit.operator(operator, [current, operand], [result], options())
        current = result
