"""Global filters: functions of gfcompile, with their weights in the form that the graph has."""

import numpy as np
import onnx_ir as ir

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.onnx_values import (
    constant,
    input_of,
    operator_of,
    scalar_quantization,
    shape_of,
)
from gfcompile.targets.tvm.kernel import Array, CircularFilter, DftFilter, Half
from gfcompile.targets.tvm.matchers.constants import int8_weights, stored
from gfcompile.targets.tvm.matchers.state import State

FORMS: dict[str, type[DftFilter | CircularFilter]] = {
    "GlobalFilterDft": DftFilter,
    "GlobalFilterCircular": CircularFilter,
}


def global_filter(state: State, node: ir.Node) -> None:
    """A filter in the form that its function has; a circular one in integers where it can be.

    Raises:
        CompileError: its weights are computed.
    """
    kernel_class = FORMS[operator_of(node)]
    x = input_of(node, 0)
    batch, h, w, c = shape_of(x)
    names = ("k_re", "k_im") if kernel_class is DftFilter else ("kernel",)
    dtypes: set[Half] = set()
    constants: dict[str, Array] = {}
    for index, name in enumerate(names, start=1):
        value = input_of(node, index)
        array = constant(value)
        if array is None:
            raise CompileError(f"{node.name}: the filter's weights must be constants")
        dtype, constants[name] = stored(value, array)
        dtypes.add(dtype)
    (k_dtype,) = dtypes  # the passes store all of a filter alike
    kernel: DftFilter | CircularFilter
    kernel = kernel_class(batch=batch, h=h, w=w, c=c, k_dtype=k_dtype)
    source = state.dequantized(x)
    integers = None
    if source is not None and isinstance(kernel, CircularFilter):
        integers = _integer_filter(source, input_of(node, 1))
    if source is not None and integers is not None and CircularFilter.exact_in_float(h, w):
        kernel = CircularFilter(batch=batch, h=h, w=w, c=c, x="int8")
        constants, x = integers, input_of(source, 0)
    state.replace(node, kernel, x, constants)


def _integer_filter(source: ir.Node, kernel: ir.Value) -> dict[str, Array] | None:
    """The constants of a circular filter in integers; None where the graph has none."""
    x_scale, x_zero_point = scalar_quantization(source)
    weights = int8_weights(kernel)
    if weights is None:
        return None
    data, scale, axis = weights
    if axis % data.ndim != 2:
        return None
    return {
        "kernel": data,
        "scale": np.asarray(np.float32(x_scale) * scale, np.float32),
        "zero_point": np.array([x_zero_point], np.float32),
    }
