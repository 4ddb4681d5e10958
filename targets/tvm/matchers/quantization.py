"""QuantizeLinear and DequantizeLinear of activations that no other kernel took along."""

import math

import numpy as np
import onnx_ir as ir

from gfcompile.targets.onnx_values import input_of, scalar_quantization, shape_of
from gfcompile.targets.tvm.kernel import Dequantize, Quantize, quant_args
from gfcompile.targets.tvm.matchers.state import State


def quantize(state: State, node: ir.Node) -> None:
    x = input_of(node, 0)
    kernel = Quantize(size=math.prod(shape_of(x)))
    state.replace(node, kernel, x, {"quant": quant_args(*scalar_quantization(node))})


def dequantize(state: State, node: ir.Node) -> None:
    """The call is dropped later if integer products alone read the values."""
    x = input_of(node, 0)
    kernel = Dequantize(size=math.prod(shape_of(x)))
    dequant = np.array(scalar_quantization(node), np.float32)
    state.replace(node, kernel, x, {"dequant": dequant})
