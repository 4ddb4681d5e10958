"""Products with constant matrices: linear layers, and what rides on them.

Bias, GELU and residual, in the order that a Dense kernel has them, and quantization. A product is
one of integers where both operands and the bias are quantized.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gfcompile.targets.onnx_values import (
    constant,
    dtype_of,
    input_of,
    is_along_last_axis,
    is_standard,
    quantization,
    scalar_quantization,
    shape_of,
)
from gfcompile.targets.tvm.kernel import Act, Array, Dense, Half
from gfcompile.targets.tvm.matchers.constants import float_bias, int8_weights, stored
from gfcompile.targets.tvm.matchers.state import State, label
from gfcompile.targets.tvm.program import Call


@dataclass
class Product:
    """x @ w on the way to a Dense call: the nodes that it covers so far, and its operands."""

    covered: list[ir.Node]
    m: int
    n: int
    k: int
    act: Act
    constants: dict[str, Array]

    @property
    def result(self) -> ir.Value:
        return self.covered[-1].outputs[0]


def linear(state: State, node: ir.Node) -> None:
    """MatMul by a constant matrix, with bias, GELU and residual."""
    x, w = input_of(node, 0), input_of(node, 1)
    weight = constant(w)
    if weight is None or weight.ndim != 2:
        return
    covered = [node]
    bias = None
    add = state.follower(node.outputs[0], "Add")
    if add is not None:
        operand = state.other_input(add, node.outputs[0])
        array = constant(operand)
        if array is not None and array.size == array.shape[-1] == weight.shape[1]:
            bias = operand
            covered.append(add)
    source = state.dequantized(x)
    product = product_of(covered, source, w, bias)
    if product.act == "int8":
        assert source is not None
        x = input_of(source, 0)
    if not _split(state, product, state.tensor(x)):
        dense(state, product, state.tensor(x))


def product_of(
    covered: Sequence[ir.Node], source: ir.Node | None, w: ir.Value, bias: ir.Value | None
) -> Product:
    """x @ w + bias, in integers where x, w and bias are quantized, in float otherwise.

    Args:
        covered: the nodes that compute it.
        source: the DequantizeLinear behind x, if there is one.
        w: (k, n) or, of a convolution, (n, ...).
        bias: (n,) or None.
    """
    weight = constant(w)
    assert weight is not None
    matrix = _matrix(weight)
    k, n = matrix.shape
    m = math.prod(shape_of(covered[-1].outputs[0])) // n
    integers = None if source is None else _integer_operands(source, w, bias)
    if integers is not None:
        return Product([*covered], m, n, k, "int8", integers)
    constants: dict[str, Array] = {
        "w": np.ascontiguousarray(matrix, np.float32),
        "bias": float_bias(constant(bias), n),
    }
    return Product([*covered], m, n, k, "float32", constants)


def dense(state: State, product: Product, x: str, before: Call | None = None) -> None:
    """Adds the call of `product`, with the GELU and the residual that follow it."""
    m, n = product.m, product.n
    reads = {"x": x}
    gelu = _take_gelu(state, product)
    residual_rows, residual_first = 0, False
    residual_dtype: Half = "float32"
    add = state.follower(product.result, "Add")
    operand = None if add is None else state.other_input(add, product.result)
    if add is not None and operand is not None:
        array = constant(operand)
        size = math.prod(shape_of(operand))
        whole = math.prod(shape_of(add.outputs[0])) == m * n and dtype_of(operand) == "float32"
        if whole and array is not None and shape_of(operand)[-1] == n and m % (size // n) == 0:
            residual_rows = size // n
            residual_dtype, product.constants["residual"] = stored(operand, array.reshape(-1, n))
        elif whole and array is None and size in (m * n, n) and shape_of(operand)[-1] == n:
            residual_rows = size // n  # all rows, or one that is added to each
            reads["residual"] = state.tensor(operand)
        if residual_rows:
            product.covered.append(add)
            if not gelu:
                gelu = residual_first = _take_gelu(state, product)
    grouped = state.grouped.get(product.result)
    state.add(
        product.covered,
        lambda out: Dense(
            m=m,
            n=n,
            k=product.k,
            x=product.act,
            gelu=gelu,
            residual_rows=residual_rows,
            residual_dtype=residual_dtype,
            residual_first=residual_first,
            out=out,
            out_groups=3 if grouped else 1,
        ),
        reads,
        product.constants,
        before,
        grouped,
    )


def _split(state: State, product: Product, x: str) -> bool:
    """Adds a call for each part that a Split makes of the columns of `product`, if one does.

    Else every part would be copied, as its rows are not contiguous.
    """
    gelu = _gelu_after(state, product)
    node = state.follower(product.result if gelu is None else gelu.outputs[0], "Split")
    if node is None:
        return False
    sizes = [shape_of(part)[-1] for part in node.outputs]
    rank = len(shape_of(node.outputs[0]))
    if not is_along_last_axis(node, rank, default=0) or sum(sizes) != product.n:
        return False
    covered = [*product.covered, *([] if gelu is None else [gelu]), node]
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    calls = [
        Call(
            kernel=Dense(m=product.m, n=size, k=product.k, x=product.act, gelu=gelu is not None),
            label=f"{label(*covered)}/{i}",
            reads={"x": x},
            writes={"y": state.tensor(node.outputs[i])},
            constants={
                name: np.ascontiguousarray(array[..., start : start + size])
                for name, array in product.constants.items()
            },
        )
        for i, (size, start) in enumerate(zip(sizes, first, strict=True))
    ]
    state.cover(covered, *calls)
    return True


def _take_gelu(state: State, product: Product) -> bool:
    """Whether the GELU that follows `product` is now part of it."""
    node = _gelu_after(state, product)
    if node is None:
        return False
    product.covered.append(node)
    return True


def _gelu_after(state: State, product: Product) -> ir.Node | None:
    """The GELU that alone reads `product`, if it is exact, as that of Dense is."""
    node = state.follower(product.result, "Gelu")
    if node is None or node.attributes.get_string("approximate", "none") != "none":
        return None
    return node


def _matrix(weight: Array) -> Array:
    """(k, n): a matrix as it is, and of a convolution's weights (n, ...) the transposed rows."""
    return weight if weight.ndim == 2 else weight.reshape(weight.shape[0], -1).T


def _integer_operands(
    source: ir.Node, w: ir.Value, bias: ir.Value | None
) -> dict[str, Array] | None:
    """w, scale and bias of an exact integer product; None where the graph does not allow one.

    The int32 bias of the result already holds minus the activation's zero point times the weight's
    column sums.
    """
    x_scale, x_zero_point = scalar_quantization(source)
    weights = int8_weights(w)
    if weights is None:
        return None
    data, w_scale, axis = weights
    channel_axis = 1 if data.ndim == 2 else 0
    if w_scale.size > 1 and axis % data.ndim != channel_axis:
        return None
    matrix = _matrix(data)
    n = matrix.shape[1]
    scale = np.broadcast_to(np.float32(x_scale) * w_scale.reshape(-1), (n,))
    bias_data: Array | None = np.zeros(n, np.int32)
    if bias is not None:
        node = bias.producer()
        if node is None or not is_standard(node, "DequantizeLinear"):
            return None
        bias_data = constant(input_of(node, 0))
        bias_scale = quantization(node)[0]
        if bias_data is None or bias_data.dtype != np.int32:
            return None
        if not np.allclose(bias_scale, scale, rtol=1e-6, atol=0):
            return None
    assert bias_data is not None
    sums = matrix.astype(np.int64).sum(axis=0)
    folded = bias_data.reshape(-1).astype(np.int64) - x_zero_point * sums
    return {
        "w": np.ascontiguousarray(matrix),
        "scale": np.ascontiguousarray(scale, np.float32),
        "bias": folded.astype(np.int32),
    }
