"""A canonical graph -> an .mlpackage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.coreml.emitter import Emitter, Normalization
from gfcompile.targets.coreml.linear import quantized_weight, takes_pixels
from gfcompile.targets.coreml.operators import emit_node
from gfcompile.targets.coreml.options import CoremlOptions
from gfcompile.targets.coreml.package import Description, write_package
from gfcompile.targets.coreml.tools import coremltools, quiet
from gfcompile.targets.coreml.values import Array, natural
from gfcompile.targets.onnx_values import constant, shape_of

INPUT, LOGITS, PROBABILITIES = "image", "logits", "probabilities"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a package computes a value of the graph: see `Value`."""

    name: str
    dims: tuple[int, ...]
    order: tuple[int, ...]

    def restore(self, array: Array) -> Array:
        """The package's array in the graph's shape."""
        moved = array.reshape(tuple(self.dims[axis] for axis in self.order))
        return moved.transpose(np.argsort(self.order)).reshape(self.dims)


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """What a package takes and gives.

    Attributes:
        takes_pixels: whether its input is an image; its logits otherwise come from normalized
            values (1, 3, H, W).
        classifies: whether it names classes beside its logits.
        places: the graph's values that it computes, by name.
    """

    takes_pixels: bool
    classifies: bool
    input_shape: tuple[int, ...]
    logits_shape: tuple[int, ...]
    places: Mapping[str, Place]


def emit(
    model: ir.Model,
    package: Path,
    *,
    options: CoremlOptions,
    half: bool,
    mean: Sequence[float],
    std: Sequence[float],
    labels: Sequence[str] = (),
    description: Description,
    group_size: int | None = None,
) -> Emitted:
    """Writes `model` as the folder `package`; the same arguments give the same bytes.

    Args:
        model: lowered, float or QDQ.
        half: compute in float16 instead of float32.
        mean, std: of the normalization, in units of 0 to 1.
        labels: class names; without them classes are called by their numbers.
        group_size: how many weights of four bits share a factor; None where none do.

    Raises:
        CompileError: an operator that Core ML does not have.
    """
    (source,), (sink,) = model.graph.inputs, model.graph.outputs
    shape, logits_shape = shape_of(source), shape_of(sink)
    single = len(shape) == 4 and shape[:2] == (1, 3)
    as_image = options.input == "image"
    if as_image and not single:
        raise CompileError(
            f"Core ML: an image input takes one RGB image, this model's input is {shape}; "
            "compile with --input tensor"
        )
    classes = list(labels) or [f"class {i}" for i in range(logits_shape[-1])]
    classifies = logits_shape == (1, len(classes))
    with quiet():
        program, places = _program(
            model,
            options,
            half=half,
            mean=mean,
            std=std,
            classifies=classifies,
            group_size=group_size,
        )
        write_package(
            program,
            package,
            ios=options.ios,
            image_shape=shape if as_image else None,
            classes=classes if classifies else None,
            description=description,
        )
    return Emitted(
        takes_pixels=as_image,
        classifies=classifies,
        input_shape=shape,
        logits_shape=logits_shape,
        places=places,
    )


def _program(
    model: ir.Model,
    options: CoremlOptions,
    *,
    half: bool,
    mean: Sequence[float],
    std: Sequence[float],
    classifies: bool,
    group_size: int | None,
) -> tuple[Any, Mapping[str, Place]]:
    """The MIL program, and where it has the graph's values."""
    ct = coremltools()
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    (source,), (sink,) = model.graph.inputs, model.graph.outputs
    has_int8 = any(quantized_weight(value) for node in model.graph for value in node.outputs)
    emitter = Emitter(
        options, half=half, is_compact=has_int8 and options.ios >= 16, group_size=group_size
    )
    emitter.unique(INPUT)
    for name in (LOGITS, PROBABILITIES):  # the features that apps ask for: no other takes them
        emitter.unique(name)

    @Builder.program(  # type: ignore[untyped-decorator]
        input_specs=[Builder.TensorSpec(shape=shape_of(source), dtype=types.fp32)],
        opset_version=getattr(ct.target, f"iOS{options.ios}"),
    )
    def program(image: Any) -> Any:
        var = emitter.op("cast", "pixels", x=image, dtype="fp16") if half else image
        if options.input == "image":
            var = _normalize(emitter, source, var, mean, std)
        emitter.define(source, var, natural(shape_of(source)))
        for node in model.graph:
            if node in emitter.covered or all(constant(v) is not None for v in node.outputs):
                continue
            emit_node(emitter, node)
        result = emitter.lay_out(emitter.value(sink), tuple(range(len(shape_of(sink)))))
        # Without a Builder name of its own: `unique` holds these for the features.
        logits = (
            Builder.cast(x=result, dtype="fp32", name=LOGITS)
            if half
            else Builder.identity(x=result, name=LOGITS)
        )
        if not classifies:
            return logits
        return logits, Builder.softmax(x=logits, axis=-1, name=PROBABILITIES)

    places = {
        str(value.name): Place(name=emitted.var.name, dims=emitted.dims, order=emitted.order)
        for value, emitted in emitter.values.items()
        if value.producer() is not None and constant(value) is None
    }
    return program, places


def _normalize(
    emitter: Emitter, source: ir.Value, image: Any, mean: Sequence[float], std: Sequence[float]
) -> Any:
    """Pixels normalized, or as they are where the first convolution can take that along."""
    deviation = np.asarray(std, np.float64)
    folded = Normalization(
        scale=1 / (255 * deviation), shift=-np.asarray(mean, np.float64) / deviation
    )
    readers = source.consumers()
    if len(readers) == 1 and takes_pixels(readers[0]):
        emitter.normalizations[readers[0]] = folded
        return image
    scale, shift = (a.reshape(1, 3, 1, 1) for a in (folded.scale, folded.shift))
    scaled = emitter.op("mul", "scaled", x=image, y=scale)
    return emitter.op("add", "normalized", x=scaled, y=shift)
