"""The lowered ONNX graph as a list of kernel calls.

Each product, convolution, normalization, filter or mean takes along the cheap nodes that follow it
(bias, GELU, residual, quantization), so that element-wise work rides on a kernel that is there
anyway: `matchers` says how, operator by operator. What no schedule class covers goes through Relax,
a run of neighbouring nodes at a time (`generic.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import onnx_ir as ir

from gfcompile.targets.onnx_values import VIEWS, constant, is_standard, operator_of
from gfcompile.targets.tvm import generic
from gfcompile.targets.tvm.kernel import Dense
from gfcompile.targets.tvm.matchers.attention import attention
from gfcompile.targets.tvm.matchers.convolutions import convolution
from gfcompile.targets.tvm.matchers.filters import FORMS, global_filter
from gfcompile.targets.tvm.matchers.normalization import layer_norm, softmax
from gfcompile.targets.tvm.matchers.products import linear
from gfcompile.targets.tvm.matchers.quantization import dequantize, quantize
from gfcompile.targets.tvm.matchers.state import State
from gfcompile.targets.tvm.matchers.tokens import token_mean, top_k
from gfcompile.targets.tvm.program import Call, Program, Selection, Tensor

__all__ = ["Call", "Program", "Selection", "Tensor", "partition"]

# Who makes calls of which operators. Each goes over the whole graph before the next one does:
# first who takes the most nodes along, last who takes what the others left.
_MATCHERS: tuple[tuple[Callable[[State, ir.Node], None], tuple[str, ...]], ...] = (
    (attention, ("Softmax",)),
    (top_k, ("TopK",)),
    (linear, ("MatMul",)),
    (convolution, ("Conv",)),
    (layer_norm, ("LayerNormalization",)),
    (token_mean, ("ReduceMean",)),
    (global_filter, tuple(FORMS)),
    (softmax, ("Softmax",)),
    (quantize, ("QuantizeLinear",)),
    (dequantize, ("DequantizeLinear",)),
)

_HEAVY = ("Conv", "MatMul", "Gemm")  # what takes time wherever it stands


def partition(model: ir.Model) -> Program:
    """The kernel calls that compute `model`, in an order that respects their data flow.

    Args:
        model: a canonical lowered graph: static shapes, `MatMul` + `Add` for linear layers, filters
            as `gfcompile` functions, QDQ pairs around quantized products.

    Raises:
        CompileError: a node that neither a schedule class nor Relax can take.
    """
    nodes = [
        node for node in model.graph if any(constant(output) is None for output in node.outputs)
    ]
    state = State()
    for matcher, operators in _MATCHERS:
        for node in nodes:
            if node not in state.claimed and operator_of(node) in operators:
                matcher(state, node)
    inputs = tuple(state.tensor(value) for value in model.graph.inputs)
    outputs = tuple(state.tensor(value) for value in model.graph.outputs)
    leftovers = [
        node for node in nodes if node not in state.claimed and not is_standard(node, *VIEWS)
    ]
    calls = _in_order(state, nodes, set(leftovers))
    if any(tensor.dtype == "int8" for tensor in state.tensors.values()):
        calls = [_in_fixed_point(call) for call in calls]
    return Program(
        inputs=inputs,
        outputs=outputs,
        tensors=state.tensors,
        calls=_live(calls, outputs),
        stored_in=state.stored_in,
        selections=tuple(state.selections),
        unscheduled=tuple(
            sorted({node.op_type for node in leftovers if is_standard(node, *_HEAVY)})
        ),
    )


def _in_order(state: State, nodes: list[ir.Node], leftovers: set[ir.Node]) -> list[Call]:
    """All calls in the order of the graph, with those of neighbouring `leftovers` between them."""
    calls: list[Call] = []
    run: list[ir.Node] = []
    for node in nodes:
        if node in leftovers:
            if any(_is_view_into(state, run, value) for value in node.inputs):
                calls += _lowered(state, run)
                run = []
            run.append(node)
        elif node in state.calls:
            calls += [*_lowered(state, run), *state.calls[node]]
            run = []
    return calls + _lowered(state, run)


def _is_view_into(state: State, run: list[ir.Node], value: ir.Value | None) -> bool:
    """Whether `value` is another name for what a node of `run` gives."""
    return (
        value is not None and state.root(value) is not value and state.root(value).producer() in run
    )


def _lowered(state: State, run: list[ir.Node]) -> list[Call]:
    """The calls for nodes that no schedule class takes, lowered by Relax."""

    def named(operands: Mapping[str, ir.Value | str]) -> dict[str, str]:
        return {
            argument: value if isinstance(value, str) else state.tensor(value)
            for argument, value in operands.items()
        }

    calls = []
    for lowered in generic.lower(run) if run else ():
        for name, (dtype, shape) in lowered.temporaries.items():
            state.tensors[name] = Tensor(name=name, dtype=dtype, shape=shape)
        calls.append(
            Call(
                kernel=lowered.kernel,
                label=lowered.label,
                reads=named(lowered.reads),
                writes=named(lowered.writes),
                constants=lowered.constants,
            )
        )
    return calls


def _in_fixed_point(call: Call) -> Call:
    """A call beside int8 ones: who asked for these lets float products be as exact otherwise."""
    if not isinstance(call.kernel, Dense) or call.kernel.x != "float32":
        return call
    return replace(call, kernel=replace(call.kernel, fixed_point=True))


def _live(calls: list[Call], outputs: tuple[str, ...]) -> tuple[Call, ...]:
    """The calls whose results are used, in order."""
    needed = set(outputs)
    live = []
    for call in reversed(calls):
        if needed & set(call.writes.values()):
            needed.update(call.reads.values())
            live.append(call)
    return tuple(reversed(live))
