"""Quantizes values of a graph that were float.

    v  ->  DequantizeLinear(QuantizeLinear(v, scale, zero_point), scale, zero_point)

For targets whose integer operators write integers where the QDQ graph has float.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from gfcompile.compile.passes.graph import Array, Builder, shape_of
from gfcompile.quantize.qparams import QParams


def quantize_values(model: ir.Model, scales: Mapping[str, QParams]) -> None:
    """Puts a pair of QuantizeLinear and DequantizeLinear behind each value named in `scales`.

    Everything that read the value then reads the pair's result. A graph output keeps its name.
    """
    graph = model.graph
    values = {str(value.name): value for node in graph for value in node.outputs}
    for name, parameters in scales.items():
        value = values[name]
        producer = value.producer()
        assert producer is not None
        shape = shape_of(value)
        stem = name.replace("/", "_")
        scale = _initializer(graph, f"{stem}_scale", np.array(parameters.scale, np.float32))
        zero = _initializer(graph, f"{stem}_zero_point", np.array(parameters.zero_point, np.int8))
        stored = ir.val(f"{stem}_int8", dtype=ir.DataType.INT8, shape=shape)
        result = ir.val(f"{stem}_rounded", dtype=ir.DataType.FLOAT, shape=shape)
        value.replace_all_uses_with(result, replace_graph_outputs=True)
        if result.is_graph_output():
            value.name, result.name = f"{stem}_exact", name
        pair = [
            ir.node("QuantizeLinear", [value, scale, zero], outputs=[stored], name=f"{stem}_q"),
            ir.node("DequantizeLinear", [stored, scale, zero], outputs=[result], name=f"{stem}_dq"),
        ]
        graph.insert_after(producer, pair)


def quantize_edges(node: ir.Node, parameters: QParams) -> None:
    """Puts a pair in front of every input of `node`, for it alone."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    build = Builder(node)
    for index, value in enumerate(node.inputs):
        assert value is not None
        stem = f"{node.outputs[0].name}_input{index}"
        shape = shape_of(value)
        scale = build.constant(f"{stem}_scale", np.array(parameters.scale, np.float32))
        zero = build.constant(f"{stem}_zero_point", np.array(parameters.zero_point, np.int8))
        stored = build.node(
            "QuantizeLinear", [value, scale, zero], shape, stem=stem, dtype=ir.DataType.INT8
        )
        node.replace_input_with(
            index, build.node("DequantizeLinear", [stored, scale, zero], shape, stem=f"{stem}_real")
        )


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
