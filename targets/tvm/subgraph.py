"""Some nodes of a graph as an ONNX model of their own."""

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from gfcompile.targets.tvm.kernel import Array


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Mapping[str, Array],
    graph: ir.Graph | ir.Function | None,
) -> onnx.ModelProto:
    """A model of `nodes`, in the version of the operators that `graph`, theirs, has."""
    part = onnx.helper.make_graph(
        nodes,
        "part",
        inputs,
        outputs,
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    version = graph.opset_imports[""] if graph is not None else 20
    return onnx.helper.make_model(part, opset_imports=[onnx.helper.make_opsetid("", version)])
