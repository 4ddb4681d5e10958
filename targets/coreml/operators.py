"""The operators of the canonical graph in MIL, one function for each or for a family."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from gfcompile.targets.coreml.emitter import Emitter, refuse
from gfcompile.targets.coreml.filters import emit_filter
from gfcompile.targets.coreml.linear import emit_conv, emit_matmul, product_axes, product_operand
from gfcompile.targets.coreml.values import (
    MAX_RANK,
    Template,
    UnfitError,
    Value,
    arrange_array,
    natural,
    order_of,
    reshaped_order,
    transposed,
)
from gfcompile.targets.onnx_values import (
    constant,
    dtype_of,
    is_standard,
    scalar_quantization,
    shape_of,
)

Operator = Callable[[Emitter, ir.Node], None]

_BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "real_div"}
_UNARY = {
    "Relu": "relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Exp": "exp",
    "Sqrt": "sqrt",
    "Erf": "erf",
    "Abs": "abs",
}
_REDUCTIONS = {"ReduceMean": "reduce_mean", "ReduceMax": "reduce_max", "ReduceSum": "reduce_sum"}
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


def emit_node(emitter: Emitter, node: ir.Node) -> None:
    """Emits the MIL for `node`, whose operands are there already.

    Raises:
        CompileError: nothing in MIL does what it does.
    """
    if node.domain == "gfcompile":
        emit: Operator | None = emit_filter
    else:
        emit = OPERATORS.get(node.op_type) if is_standard(node, node.op_type) else None
    if emit is None:
        raise refuse(node, f"no such operator there (known: {', '.join(sorted(OPERATORS))})")
    try:
        emit(emitter, node)
    except UnfitError as error:
        raise refuse(node, error.why, error.remedy) from None


def _name(node: ir.Node) -> str:
    return str(node.outputs[0].name)


def _axis(node: ir.Node, rank: int, default: int) -> int:
    return node.attributes.get_int("axis", default) % rank


def _ints(node: ir.Node, index: int) -> list[int] | None:
    """An operand that must be known now; None where it is left out."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return None
    array = constant(node.inputs[index])
    if array is None:
        raise refuse(node, f"operand {index} is computed while the model runs")
    return [int(number) for number in array.reshape(-1)]


# Element by element


def _emit_binary(emitter: Emitter, node: ir.Node) -> None:
    dims = shape_of(node.outputs[0])
    rank = len(dims)
    known = [constant(operand) for operand in node.inputs]
    values = [
        None if array is not None else emitter.value(operand).padded(rank)
        for operand, array in zip(node.inputs, known, strict=True)
    ]
    template = _common_template(emitter, [v for v in values if v is not None], dims)
    operands: list[Any] = []
    for value, array in zip(values, known, strict=True):
        if value is not None:
            operands.append(emitter.lay_out(value, template))
        else:
            assert array is not None
            operands.append(_arranged(emitter, array, template))
    var = emitter.op(_BINARY[node.op_type], _name(node), x=operands[0], y=operands[1])
    emitter.define(node.outputs[0], var, order_of(template, dims))


def _arranged(emitter: Emitter, array: Any, template: Template) -> Any:
    """A constant operand beside a tensor arranged as `template`."""
    array = emitter.stored(array)
    if array.size == 1:
        return array.reshape(())[()]
    rank = max(axis for axis in template if axis is not None) + 1
    return arrange_array(array.reshape((1,) * (rank - array.ndim) + array.shape), template)


def _common_template(emitter: Emitter, values: list[Value], dims: tuple[int, ...]) -> Template:
    """An arrangement for operands of a broadcast, that moves as few of them as can be."""
    whole = [value for value in values if value.dims == dims]
    if whole:
        template = emitter.arrangement(whole[0])
        if all(value.order == order_of(template, value.dims) for value in values):
            return template
    return emitter.preferred(dims)


def _emit_unary(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    var = emitter.op(_UNARY[node.op_type], _name(node), x=x.var)
    emitter.define(node.outputs[0], var, x.order)


def _emit_gelu(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    exact = node.attributes.get_string("approximate", "none") == "none"
    mode = "EXACT" if exact else "TANH_APPROXIMATION"
    emitter.define(node.outputs[0], emitter.op("gelu", _name(node), x=x.var, mode=mode), x.order)


def _emit_cast(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    kinds = [np.dtype(dtype_of(v)).kind for v in (node.inputs[0], node.outputs[0]) if v]
    if kinds[0] == kinds[1]:  # float is one precision throughout, integers are int32
        emitter.define(node.outputs[0], x.var, x.order)
        return
    dtype = {"f": emitter.float_name, "i": "int32"}.get(kinds[1])
    if dtype is None:
        raise refuse(node, f"{dtype_of(node.outputs[0])} is not a type of Core ML's tensors here")
    emitter.define(node.outputs[0], emitter.op("cast", _name(node), x=x.var, dtype=dtype), x.order)


# Along an axis


def _emit_layer_norm(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    rank = len(x.dims)
    if _axis(node, rank, -1) != rank - 1:
        raise refuse(node, "only the last axis can be normalized")
    gamma, beta = (constant(v) for v in (*node.inputs[1:], None)[:2])
    if gamma is None:
        raise refuse(node, "its gain is computed while the model runs")
    template = emitter.preferred(x.dims)
    var = emitter.op(
        "layer_norm",
        _name(node),
        x=emitter.lay_out(x, template),
        axes=[template.index(rank - 1)],
        gamma=gamma.reshape(-1),
        beta=np.zeros_like(gamma) if beta is None else beta.reshape(-1),
        epsilon=emitter.float_type(node.attributes.get_float("epsilon", 1e-5)),
    )
    emitter.define(node.outputs[0], var, order_of(template, x.dims))


def _emit_softmax(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    template = emitter.arrangement(x)
    axis = template.index(_axis(node, len(x.dims), -1))
    var = emitter.op("softmax", _name(node), x=emitter.lay_out(x, template), axis=axis)
    emitter.define(node.outputs[0], var, order_of(template, x.dims))


def _emit_reduction(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    rank = len(x.dims)
    axes = _ints(node, 1)
    axes = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    template = emitter.arrangement(x)
    var = emitter.op(
        _REDUCTIONS[node.op_type],
        _name(node),
        x=emitter.lay_out(x, template),
        axes=sorted(template.index(axis) for axis in axes),
        keep_dims=True,
    )
    order: tuple[int, ...] = tuple(axis for axis in order_of(template, x.dims) if axis not in axes)
    if not node.attributes.get_int("keepdims", 1):
        order = tuple(axis - sum(gone < axis for gone in axes) for axis in order)
    emitter.define(node.outputs[0], var, order)


def _emit_top_k(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    counts = _ints(node, 1)
    assert counts is not None
    template = emitter.arrangement(x)
    operand = emitter.lay_out(x, template)
    name = _name(node)
    half = operand.dtype is not None and emitter.float_type is np.float16
    is_float = np.dtype(dtype_of(node.outputs[0])).kind == "f"
    if half and is_float and emitter.options.ios < 17:  # float16 is not taken before
        operand = emitter.op("cast", f"{name}_single", x=operand, dtype="fp32")
    values, indices = emitter.op(
        "topk",
        name,
        x=operand,
        k=counts[0],
        axis=template.index(_axis(node, len(x.dims), -1)),
        ascending=not node.attributes.get_int("largest", 1),
    )
    order = order_of(template, x.dims)
    if half and is_float and emitter.options.ios < 17 and node.outputs[0].consumers():
        values = emitter.op("cast", f"{name}_half", x=values, dtype="fp16")
    emitter.define(node.outputs[0], values, order)
    emitter.define(node.outputs[1], indices, order)


# Views


def _emit_view(emitter: Emitter, node: ir.Node) -> None:
    x, dims = emitter.value(node.inputs[0]), shape_of(node.outputs[0])
    order = reshaped_order(x.dims, x.order, dims)
    if order is not None:
        emitter.define(node.outputs[0], x.var, order)
        return
    shape = dims if len(dims) <= MAX_RANK else (math.prod(dims),)
    moved = emitter.arranger.lay_out_flat(x, natural(x.dims), shape)
    emitter.define(node.outputs[0], moved, natural(dims))


def _emit_transpose(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    perm = node.attributes.get_ints("perm", list(range(len(x.dims)))[::-1])
    moved = transposed(x, perm)
    emitter.define(node.outputs[0], moved.var, moved.order)


# Parts and wholes


def _emit_concat(emitter: Emitter, node: ir.Node) -> None:
    dims = shape_of(node.outputs[0])
    axis = _axis(node, len(dims), 0)
    values = [emitter.operand(operand) for operand in node.inputs]
    running = [
        value
        for operand, value in zip(node.inputs, values, strict=True)
        if constant(operand) is None
    ]
    template = emitter.arrangement(max(running, key=lambda value: value.dims[axis]))
    if any(value.order != order_of(template, value.dims) for value in running):
        template = emitter.preferred(dims)
    parts = [
        _arranged(emitter, array, template)
        if (array := constant(operand)) is not None and array.size > 1
        else emitter.lay_out(value, template)
        for operand, value in zip(node.inputs, values, strict=True)
    ]
    var = emitter.op("concat", _name(node), values=parts, axis=template.index(axis))
    emitter.define(node.outputs[0], var, order_of(template, dims))


def _emit_slice(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    rank = len(x.dims)
    starts, ends, axes, steps = (_ints(node, index) for index in range(1, 5))
    assert starts is not None
    assert ends is not None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if any(step < 1 for step in steps):
        raise refuse(node, "it goes backwards")
    bounds = {axis: (0, size, 1) for axis, size in enumerate(x.dims)}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        first, last, _ = slice(start, end).indices(x.dims[axis % rank])
        bounds[axis % rank] = (first, last, step)
    template = emitter.arrangement(x)
    begin, end_, stride = zip(
        *((0, 1, 1) if axis is None else bounds[axis] for axis in template), strict=True
    )
    var = emitter.op(
        "slice_by_index",
        _name(node),
        x=emitter.lay_out(x, template),
        begin=list(begin),
        end=list(end_),
        stride=list(stride),
    )
    emitter.define(node.outputs[0], var, order_of(template, x.dims))


def _emit_split(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    axis = _axis(node, len(x.dims), 0)
    if _emit_split_into_heads(emitter, node, x, axis):
        return
    template = emitter.arrangement(x)
    parts = emitter.op(
        "split",
        _name(node),
        x=emitter.lay_out(x, template),
        split_sizes=[shape_of(output)[axis] for output in node.outputs],
        axis=template.index(axis),
    )
    for output, part in zip(node.outputs, parts, strict=True):
        emitter.define(output, part, order_of(template, x.dims))


def _emit_split_into_heads(emitter: Emitter, node: ir.Node, x: Value, axis: int) -> bool:
    """Queries, keys and values: one reshape before the split in place of one after it for each.

    Split (.., 3 * H * D) -> 3 x Reshape (.., H, D)   becomes   Reshape (.., 3 * H, D) -> Split
    """
    views = [output.consumers() for output in node.outputs]
    if any(len(readers) != 1 or not is_standard(readers[0], "Reshape") for readers in views):
        return False
    heads = {shape_of(readers[0].outputs[0]) for readers in views}
    if len(heads) != 1 or axis != len(x.dims) - 1:
        return False
    (dims,) = heads
    if dims[:-2] != x.dims[:-1] or dims[-2] * dims[-1] * len(views) != x.dims[-1]:
        return False
    whole = (*dims[:-2], dims[-2] * len(views), dims[-1])
    order = reshaped_order(x.dims, x.order, whole)
    if order is None:
        return False
    joined = Value(x.var, whole, order)
    template = emitter.arrangement(joined)
    parts = emitter.op(
        "split",
        _name(node),
        x=emitter.lay_out(joined, template),
        num_splits=len(views),
        axis=template.index(axis),
    )
    for (view,), part in zip(views, parts, strict=True):
        emitter.covered.add(view)
        emitter.define(view.outputs[0], part, order_of(template, whole))
    return True


def _emit_gather(emitter: Emitter, node: ir.Node) -> None:
    x, indices = emitter.operand(node.inputs[0]), node.inputs[1]
    assert indices is not None
    rank = len(x.dims)
    axis = _axis(node, rank, 0)
    index_dims = shape_of(indices)
    template = emitter.arrangement(x)
    known = constant(indices)
    operand = emitter.lay_out(x, template)
    place = template.index(axis)
    if known is not None and known.size == 1:
        begin, end = [0] * len(template), list(operand.shape)
        begin[place] = int(known.reshape(())) % x.dims[axis]
        end[place] = begin[place] + 1
        var = emitter.op("slice_by_index", _name(node), x=operand, begin=begin, end=end)
    else:
        chosen: Any
        if known is not None:
            chosen = (known.reshape(-1) % x.dims[axis]).astype(np.int32)
        else:
            value = emitter.value(indices)
            order = tuple(i for i, size in enumerate(index_dims) if size > 1)
            chosen = emitter.arranger.lay_out_flat(value, order, (int(np.prod(index_dims)),))
        var = emitter.op("gather", _name(node), x=operand, indices=chosen, axis=place)
    # The indices' axes stand where the axis was.
    added = len(index_dims) - 1
    order = tuple(
        name
        for a in template
        if a is not None
        for name in (
            range(axis, axis + len(index_dims)) if a == axis else (a + added * (a > axis),)
        )
    )
    emitter.define(node.outputs[0], var, order)


def _emit_expand(emitter: Emitter, node: ir.Node) -> None:
    dims = shape_of(node.outputs[0])
    x = emitter.operand(node.inputs[0]).padded(len(dims))
    template = emitter.preferred(dims)
    reps = [1 if axis is None else dims[axis] // x.dims[axis] for axis in template]
    operand = emitter.lay_out(x, template)
    var = emitter.op("tile", _name(node), x=operand, reps=reps) if max(reps) > 1 else operand
    emitter.define(node.outputs[0], var, order_of(template, dims))


# Quantized activations


def _emit_quantize(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    if emitter.options.ios < 17:  # weights alone are quantized there
        emitter.define(node.outputs[0], x.var, x.order)
        return
    scale, zero_point = scalar_quantization(node)
    operand, order = x.var, x.order
    reader = _product_behind(node)
    if reader is not None and reader.op_type == "MatMul":
        # Arranged here for the product, so that nothing comes between it and its int8 operand.
        operand = product_operand(emitter, x)
        form = product_axes(emitter, len(x.dims))
        order = tuple(axis for axis in form if x.dims[axis] > 1)
    elif reader is not None:
        operand, order = emitter.lay_out(x, (0, 1, 2, 3)), (0, 1, 2, 3)
    var = emitter.op(
        "quantize",
        _name(node),
        input=operand,
        scale=emitter.float_type(scale),
        zero_point=np.int8(zero_point),
        output_dtype="int8",
    )
    emitter.define(node.outputs[0], var, order)


def _product_behind(node: ir.Node) -> ir.Node | None:
    """The product that reads a quantized activation, if there is just one."""
    readers = [
        reader
        for dequantize in node.outputs[0].consumers()
        for reader in dequantize.outputs[0].consumers()
    ]
    return readers[0] if len(readers) == 1 and is_standard(readers[0], "MatMul", "Conv") else None


def _emit_dequantize(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    if emitter.options.ios < 17:
        emitter.define(node.outputs[0], x.var, x.order)
        return
    scale, zero_point = scalar_quantization(node)
    var = emitter.op(
        "dequantize",
        _name(node),
        input=x.var,
        scale=emitter.float_type(scale),
        zero_point=np.int8(zero_point),
    )
    emitter.define(node.outputs[0], var, x.order)


OPERATORS: dict[str, Operator] = {
    **dict.fromkeys(_BINARY, _emit_binary),
    **dict.fromkeys(_UNARY, _emit_unary),
    **dict.fromkeys(_REDUCTIONS, _emit_reduction),
    **dict.fromkeys(_VIEWS, _emit_view),
    "Cast": _emit_cast,
    "Concat": _emit_concat,
    "Conv": emit_conv,
    "DequantizeLinear": _emit_dequantize,
    "Expand": _emit_expand,
    "Gather": _emit_gather,
    "Gelu": _emit_gelu,
    "LayerNormalization": _emit_layer_norm,
    "MatMul": emit_matmul,
    "QuantizeLinear": _emit_quantize,
    "Slice": _emit_slice,
    "Softmax": _emit_softmax,
    "Split": _emit_split,
    "TopK": _emit_top_k,
    "Transpose": _emit_transpose,
}
