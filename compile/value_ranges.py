"""Scales for values of a graph, from what they are on images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from gfcompile.compile.trace import INPUT, session
from gfcompile.quantize import QuantScheme
from gfcompile.quantize.observers import ActivationObserver
from gfcompile.quantize.qparams import QParams

# Each further image costs an inference in ONNX Runtime and moves scales by less and less.
_MAX_IMAGES = 64


def value_scales(
    model: ir.Model, names: Sequence[str], images: Sequence[npt.NDArray[Any]]
) -> dict[str, QParams]:
    """Scale and zero point of each value named, by the rule that calibration has for activations.

    Raises:
        CompileError: a value is not finite, or zero on all images.
    """
    scheme = QuantScheme()
    observed = model.clone()
    values = {str(value.name): value for node in observed.graph for value in node.outputs}
    for name in names:
        if not values[name].is_graph_output():
            observed.graph.outputs.append(values[name])
    runner = session(observed)
    observers = {
        name: ActivationObserver(scheme.activation, scheme.activation_range) for name in names
    }
    stride = -(-len(images) // _MAX_IMAGES)
    for image in images[::stride]:
        for name, value in zip(names, runner.run(list(names), {INPUT: image}), strict=True):
            observers[name](torch.from_numpy(np.asarray(value)))
    return {name: observer.settle(name) for name, observer in observers.items()}
