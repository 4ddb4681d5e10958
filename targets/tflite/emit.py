"""The lowered ONNX graph as the bytes of a .tflite file."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from gfcompile.targets.onnx_values import constant, dtype_of, is_standard, shape_of
from gfcompile.targets.tflite import operators  # noqa: F401 - they register
from gfcompile.targets.tflite.emitter import LOWERINGS, Emitter, channels_last
from gfcompile.targets.tflite.model_file import ModelFile, Operator, Tensor


@dataclass(frozen=True, kw_only=True)
class TfliteModel:
    """A .tflite file and what is in it.

    Attributes:
        content: the file's bytes.
        inputs, outputs: by their names in the signature.
        operators: in the order of execution.
    """

    content: bytes
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]


def emit(model: ir.Model, *, target: str = "tflite") -> TfliteModel:
    """The file that computes `model`, whose image input it takes as (N, H, W, C).

    Args:
        model: a canonical lowered graph, float or QDQ.
        target: its name, for messages.

    Raises:
        CompileError: a node that the target cannot take.
    """
    file = ModelFile(f"gfcompile {model.graph.name or 'model'}")
    emitter = Emitter(file=file, target=target)
    inputs = {}
    for value in model.graph.inputs:
        shape = shape_of(value)
        image = len(shape) == 4
        if image:
            shape = channels_last(shape)
        tensor = file.tensor(str(value.name), dtype_of(value), shape)
        emitter.hold(value, tensor, as_image=image)
        inputs[str(value.name)] = tensor
    for node in model.graph:
        if node in emitter.done or all(constant(value) is not None for value in node.outputs):
            continue
        kind = node.op_type.split("_")[0] if node.domain == "gfcompile" else node.op_type
        lowering = LOWERINGS.get(kind)
        if lowering is None or not (node.domain == "gfcompile" or is_standard(node, kind)):
            raise emitter.refuse(node, "no TFLite operators are known for it")
        lowering(emitter, node)
    outputs = {str(value.name): emitter.real(value) for value in model.graph.outputs}
    return TfliteModel(
        content=file.serialize(inputs, outputs),
        inputs=inputs,
        outputs=outputs,
        tensors=tuple(file.tensors),
        operators=tuple(file.operators),
    )
