"""Constants of a graph as the arguments of kernels."""

import numpy as np
import onnx_ir as ir

from gfcompile.targets.onnx_values import (
    constant,
    input_of,
    is_standard,
    is_stored_in_halves,
    quantization,
)
from gfcompile.targets.tvm.kernel import Array, Half


def stored(value: ir.Value, array: Array) -> tuple[Half, Array]:
    """How a float constant is to be stored, and its bits: halves where the graph has halves."""
    if is_stored_in_halves(value):
        return "float16", array.astype(np.float16).view(np.uint16)
    return "float32", array.astype(np.float32)


def float_bias(array: Array | None, n: int) -> Array:
    """A bias of n columns, which may be none."""
    return np.zeros(n, np.float32) if array is None else array.reshape(-1).astype(np.float32)


def int8_weights(value: ir.Value) -> tuple[Array, Array, int] | None:
    """The int8 constant that `value` dequantizes, its scales and their axis, which may be negative.

    None where it is anything else, or has a zero point other than 0.
    """
    node = value.producer()
    if node is None or not is_standard(node, "DequantizeLinear"):
        return None
    data = constant(input_of(node, 0))
    scale, zero_point, axis = quantization(node)
    if data is None or data.dtype != np.int8 or zero_point.any():
        return None
    return data, scale, axis
