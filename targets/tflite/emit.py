"""The lowered ONNX graph as the bytes of a .tflite file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from gfcompile.targets.onnx_values import constant, operator_of
from gfcompile.targets.tflite import operators  # noqa: F401 - they register
from gfcompile.targets.tflite.emitter import LOWERINGS, Emitter
from gfcompile.targets.tflite.interface import add_input, add_output, add_pixels
from gfcompile.targets.tflite.metadata import (
    METADATA_NAME,
    ModelInfo,
    append_labels,
    model_metadata,
)
from gfcompile.targets.tflite.model_file import ModelFile, Operator, Tensor
from gfcompile.targets.tflite.options import TfliteOptions


@dataclass(frozen=True, kw_only=True)
class TfliteModel:
    """A .tflite file and what is in it.

    Attributes:
        content: the file's bytes.
        inputs, outputs: by their names in the signature.
        operators: in the order of execution.
        values: the tensor that holds each value of the graph, and whether it holds it with the
            channels last.
    """

    content: bytes
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    operators: tuple[Operator, ...]
    values: Mapping[str, tuple[Tensor, bool]]


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """(pixel / 255 - mean) / std is what a graph's image input takes."""

    mean: Sequence[float]
    std: Sequence[float]


def emit(
    model: ir.Model,
    *,
    target: str = "tflite",
    integer_only: bool = False,
    options: TfliteOptions | None = None,
    normalization: Normalization | None = None,
    info: ModelInfo | None = None,
    also: Sequence[str] = (),
) -> TfliteModel:
    """The file that computes `model`, whose image input it takes as (N, H, W, C).

    Args:
        model: a canonical lowered graph, float or QDQ.
        target: its name, for messages.
        integer_only: refuse what would not be computed in integers.
        normalization: needed where `options.input` is "uint8-image".
        info: for Android's tools.
        also: values of the graph to give out beside its outputs, as they are stored.

    Raises:
        CompileError: a node that the target cannot take.
    """
    options = options or TfliteOptions()
    file = ModelFile(info.description if info else "gfcompile")
    emitter = Emitter(file=file, target=target, integer_only=integer_only)
    inputs = {}
    for value in model.graph.inputs:
        if options.input == "uint8-image":
            assert normalization is not None
            tensor = add_pixels(emitter, value, normalization.mean, normalization.std)
        else:
            tensor = add_input(emitter, value, options.interface)
        inputs[str(value.name)] = tensor
    for node in model.graph:
        if node in emitter.done or all(constant(value) is not None for value in node.outputs):
            continue
        lowering = LOWERINGS.get(operator_of(node))
        if lowering is None:
            raise emitter.refuse(node, "no TFLite operators are known for it")
        emitter.current = node
        lowering(emitter, node)
    emitter.current = None
    outputs = {
        str(value.name): add_output(emitter, value, options.interface)
        for value in model.graph.outputs
    }
    held = emitter.held()
    outputs |= {name: held[name][0] for name in also}
    if info is not None:
        file.metadata(METADATA_NAME, model_metadata(info))
    content = file.serialize(inputs, outputs)
    if info is not None and info.labels:
        content = append_labels(content, info.labels)
    return TfliteModel(
        content=content,
        inputs=inputs,
        outputs=outputs,
        operators=tuple(file.operators),
        values=held,
    )
