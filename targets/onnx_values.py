"""What an emitter asks of the values of an ONNX graph: constants, shapes, quantization."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfcompile.runtime.errors import CompileError

Array = npt.NDArray[np.generic]

# What a user can do about a node that a model format does not have.
OTHER_TARGET = "compile for a target of kernels (gfcompile targets), or change the model there"

# Where torch's exporter says which modules a node came from, the outermost first and '' for the
# model itself; the last scope is the operator. A list of strings as Python writes it.
NAME_SCOPES = "pkg.torch.onnx.name_scopes"

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether `node` is one of these operators of the ONNX standard."""
    return node.domain in ("", "ai.onnx") and node.op_type in op_types


def operator_of(node: ir.Node) -> str:
    """What tables of operators call `node`: a function of gfcompile lacks the sizes in its name."""
    if is_standard(node, node.op_type):
        return node.op_type
    if node.domain == "gfcompile":
        return node.op_type.split("_")[0]
    return f"{node.domain}.{node.op_type}"


def name_of(node: ir.Node) -> str:
    """The name of `node`, or of its first result where it has none."""
    return node.name or str(node.outputs[0].name)


def input_of(node: ir.Node, index: int) -> ir.Value:
    """A needed input of `node`."""
    value = node.inputs[index]
    assert value is not None, f"{node.name} lacks input {index}"
    return value


def only_reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The node that reads `value`, if nothing else does and the graph does not return it.

    None as well where it is not one of `op_types`, if there are any.
    """
    readers = value.consumers()
    if len(readers) != 1 or value.is_graph_output():
        return None
    return readers[0] if not op_types or is_standard(readers[0], *op_types) else None


def is_along_last_axis(node: ir.Node, rank: int, default: int = -1) -> bool:
    """Whether `node` works along the last of `rank` axes; `default` is its operator's own."""
    return node.attributes.get_int("axis", default) in (-1, rank - 1)


def module_path(node: ir.Node) -> str:
    """The path of the torch module that `node` came from; empty where none is known."""
    scopes = node.metadata_props.get(NAME_SCOPES, "").strip("[]").replace("'", "").split(", ")
    modules = [scope for scope in scopes[:-1] if scope]
    return modules[-1] if modules else ""


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The static shape of `value`.

    Raises:
        CompileError: it is unknown or has a symbolic axis.
    """
    if value.shape is None or not value.shape.is_static():
        raise CompileError(f"{value.name}: a static shape is needed, got {value.shape}")
    return tuple(int(dim) for dim in value.shape.numpy())


def dtype_of(value: ir.Value) -> str:
    """NumPy's name of the value's dtype."""
    if value.dtype is None:
        raise CompileError(f"{value.name}: its dtype is unknown")
    return value.dtype.numpy().name


def constant(value: ir.Value | None) -> Array | None:
    """The value as an array if it is known at compile time, dequantized or cast if need be."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None:
        return None
    if is_standard(node, "Constant"):
        return node.attributes["value"].as_tensor().numpy()
    if is_standard(node, "Cast", "Identity"):
        array = constant(node.inputs[0])
        return array if array is None else array.astype(dtype_of(value))
    if is_standard(node, "DequantizeLinear"):
        data = constant(node.inputs[0])
        if data is None:
            return None
        scale, zero_point, axis = quantization(node)
        shape = [1] * data.ndim
        if scale.size > 1:
            shape[axis] = -1
        shifted = data.astype(np.int32) - zero_point.reshape(shape)
        return shifted.astype(np.float32) * scale.reshape(shape)
    return None


def is_stored_in_halves(value: ir.Value) -> bool:
    """Whether a float constant is one of float16 in the graph, with a Cast behind it."""
    cast = value.producer()
    if cast is None or not is_standard(cast, "Cast"):
        return False
    return dtype_of(input_of(cast, 0)) == "float16"


def quantization(node: ir.Node) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], int]:
    """Scale, zero point and axis of a QuantizeLinear or DequantizeLinear.

    Raises:
        CompileError: they are not constants.
    """
    scale = constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    if scale is None:
        raise CompileError(f"{node.name}: the scale is not a constant")
    axis = node.attributes.get_int("axis", 1)
    return (
        scale.astype(np.float32),
        np.zeros(scale.shape, np.int32) if zero is None else zero.astype(np.int32),
        axis,
    )


def scalar_quantization(node: ir.Node) -> tuple[float, int]:
    """Scale and zero point of a per-tensor QuantizeLinear or DequantizeLinear.

    Raises:
        CompileError: it is per channel.
    """
    scale, zero_point, _ = quantization(node)
    if scale.size != 1:
        raise CompileError(f"{node.name}: activations are quantized per tensor, not per channel")
    return float(scale.reshape(-1)[0]), int(zero_point.reshape(-1)[0])
