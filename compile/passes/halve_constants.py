"""Stores large float constants in float16.

    k (float32 initializer)  ->  Cast(k' (float16 initializer), to=float32)

What a quantized model keeps in float32 (the filters' spectra, the position embedding) would be
the larger part of its bundle. float16 keeps 65 dB of a filter.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from gfcompile.compile.passes.graph import Array, Builder, constant, shape_of

MIN_ELEMENTS = 4096
# The weights of products: int8 behind a DequantizeLinear, or left in float for exactness.
_WEIGHTS_OF = frozenset(("MatMul", "Conv", "Gemm", "DequantizeLinear", "QuantizeLinear"))
# float16 rounds to 2^-12, 72 dB; less means that values lie below its range.
_MIN_SQNR_DB = 60.0


def halve_constants(
    model: ir.Model, refuse: Callable[[str], None], *, products: bool = False
) -> bool:
    """Halves every large float32 constant of `model`, weights of products only if `products`.

    One that float16 cannot hold to 60 dB is left alone. Returns whether any was halved.
    """
    modified = False
    for value in list(model.graph.initializers.values()):
        array = constant(value)
        if array is None or array.dtype != np.float32 or array.size < MIN_ELEMENTS:
            continue
        readers = [use.node for use in value.uses()]
        if not readers or value.is_graph_output():
            continue
        if not products and any(
            node.op_type in _WEIGHTS_OF and node.domain == "" for node in readers
        ):
            continue
        with np.errstate(over="ignore"):
            halved = array.astype(np.float16)
        if not _keeps(array, halved):
            refuse(f"{value.name}: float16 cannot hold it, it stays in float32")
            continue
        _rewrite(model.graph, value, halved)
        modified = True
    return modified


def _keeps(array: Array, halved: Array) -> bool:
    noise = np.square(array.astype(np.float64) - halved).sum()
    signal = np.square(array.astype(np.float64)).sum()
    return bool(noise * 10 ** (_MIN_SQNR_DB / 10) <= signal)  # false for NaN, too


def _rewrite(graph: ir.Graph, value: ir.Value, halved: Array) -> None:
    name = value.name
    assert name is not None
    readers = {use.node for use in value.uses()}
    build = Builder(next(node for node in graph if node in readers))
    source = build.constant(f"{name}_f16", halved)
    result = build.node(
        "Cast", [source], shape_of(value), stem=f"{name}_f32", to=ir.DataType.FLOAT.value
    )
    value.replace_all_uses_with(result)
    del graph.initializers[name]
