"""Small ONNX models as text, and what tests ask of a model."""

import re
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfcompile.compile.passes.infer_shapes import check_model, infer_shapes
from gfcompile.compile.trace import session

Array = npt.NDArray[Any]


def model_of(text: str, **initializers: Array) -> ir.Model:
    """A valid model of `text`, without its header; initializers that it does not name are left."""
    header = '<ir_version: 10, opset_import: ["": 20]> '
    named = set(re.findall(r"\w+", text))
    tensors = [ir.tensor(a, name=name) for name, a in initializers.items() if name in named]
    model = ir.from_onnx_text(header + text, initializers=tensors)
    infer_shapes(model)
    check_model(model)
    return model


def run(model: ir.Model, *inputs: Array, optimize: bool = False) -> Array:
    """The output of `model` in ONNX Runtime."""
    feeds = {value.name: array for value, array in zip(model.graph.inputs, inputs, strict=True)}
    (output,) = session(model, optimize=optimize, threads=1).run(None, feeds)
    assert isinstance(output, np.ndarray)
    return output


def ops(model: ir.Model) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in model.graph)


def node_of(model: ir.Model, op: str) -> ir.Node:
    """The only node of that operator."""
    (node,) = (node for node in model.graph if node.op_type == op)
    return node


def sampled(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Normal random numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
