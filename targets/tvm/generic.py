"""Nodes that no schedule class takes, lowered by TVM's Relax to TIR functions."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.onnx_values import constant, name_of, shape_of
from gfcompile.targets.tvm.kernel import Array, Generic
from gfcompile.targets.tvm.subgraph import model_of


@dataclass(frozen=True, kw_only=True)
class GenericCall:
    """One TIR function and its operands.

    Attributes:
        kernel, label: as in a Call of the partitioner.
        reads, writes: argument -> a value of the graph, or the name of one of `temporaries`.
        constants: argument -> array.
        temporaries: name -> dtype and shape of what is neither a value of the graph nor constant.
    """

    kernel: Generic
    label: str
    reads: Mapping[str, ir.Value | str]
    writes: Mapping[str, ir.Value | str]
    constants: Mapping[str, Array]
    temporaries: Mapping[str, tuple[str, tuple[int, ...]]]


def lower(nodes: Sequence[ir.Node]) -> Iterator[GenericCall]:
    """The TIR functions that compute `nodes`, fused by Relax, in order.

    Args:
        nodes: in topological order; what they read from elsewhere, views included, is an input.

    Raises:
        CompileError: TVM cannot take one of the operators.
    """
    # A dict for its order: the functions, and so the bundle, are the same every time.
    produced = dict.fromkeys(output for node in nodes for output in node.outputs)
    inputs: dict[str, ir.Value] = {}
    constants: dict[str, ir.Value] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value not in produced:
                known = constant(value) is not None
                (constants if known else inputs)[str(value.name)] = value
    inside = set(nodes)
    outputs = {
        str(value.name): value
        for value in produced
        if value.is_graph_output() or any(use not in inside for use in value.consumers())
    }
    module = _relax_module(nodes, inputs, constants, outputs)

    main = module["main"]
    known_values: dict[relax.Var, ir.Value | str] = dict(
        zip(main.params, inputs.values(), strict=True)
    )
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    result = main.body.body
    # Several results are a tuple, which is bound to a variable before it is returned.
    tuples = {b.var: b.value for b in bindings if isinstance(b.value, tvm.ir.Tuple)}
    result = tuples.get(result, result)
    fields = list(result.fields) if isinstance(result, tvm.ir.Tuple) else [result]
    for var, value in zip(fields, outputs.values(), strict=True):
        known_values[var] = value
    stem = name_of(nodes[0])
    for binding in bindings:
        if binding.var not in tuples:
            yield _call(module, binding, known_values, stem)


def _relax_module(
    nodes: Sequence[ir.Node],
    inputs: Mapping[str, ir.Value],
    constants: Mapping[str, ir.Value],
    outputs: Mapping[str, ir.Value],
) -> tvm.IRModule:
    ops = ", ".join(sorted({node.op_type for node in nodes}))
    arrays = {name: np.asarray(constant(value)) for name, value in constants.items()}
    protos = [proto for node in nodes for proto in _plain(node, arrays)]
    part = model_of(
        protos,
        [_value_info(value) for value in inputs.values()],
        [_value_info(value) for value in outputs.values()],
        arrays,
        nodes[0].graph,
    )
    try:
        return relax.get_pipeline("zero")(_SafeTake.rewrite(from_onnx(part)))
    except Exception as error:
        # TVM raises whatever its front end meets: KeyError, InternalError, OpNotImplemented.
        reason = str(error).strip().splitlines()
        raise CompileError(
            f"TVM cannot lower one of these operators: {ops} ({reason[-1] if reason else error!r})"
        ) from error


@relax.expr_functor.mutator
class _SafeTake(relax.PyExprMutator):  # type: ignore[misc]
    """Gathers that clamp an index out of bounds: TVM's default reads whatever lies there."""

    @staticmethod
    def rewrite(module: tvm.IRModule) -> tvm.IRModule:
        mutator = _SafeTake(module)
        main = mutator.visit_expr(module["main"])
        mutator.builder_.update_func(module.get_global_var("main"), main)
        return mutator.builder_.get()

    def visit_call_(self, call: tvm.ir.Call) -> tvm.ir.Call:
        call = self.visit_expr_post_order(call)
        if getattr(call.op, "name", "") != "relax.take":
            return call
        return relax.op.take(call.args[0], call.args[1], call.attrs.axis, mode="clip")


def _plain(node: ir.Node, arrays: dict[str, Array]) -> list[onnx.NodeProto]:
    """The node; what takes whole ranges out of a tensor as Slice and Reshape.

    Relax makes a tuple of a Split, which is no kernel, and guards a Gather of one constant index
    against indices out of bounds.

    Args:
        arrays: constants that the replacement needs are added here.
    """
    axis = node.attributes.get_int("axis", 0)
    source = node.inputs[0]
    index = constant(node.inputs[1]) if node.op_type == "Gather" else None
    if source is None or not (node.op_type == "Split" or (index is not None and index.size == 1)):
        return [ir.to_proto(node)]
    if index is None:
        sizes = [shape_of(output)[axis] for output in node.outputs]
    else:
        at = int(index.reshape(-1)[0]) % shape_of(source)[axis]
        sizes = [1]
    protos = []
    for i, output in enumerate(node.outputs):
        start = sum(sizes[:i]) if index is None else at
        name = str(output.name)
        values = {"start": [start], "end": [start + sizes[i]], "axis": [axis]}
        values["shape"] = list(shape_of(output))
        arrays |= {f"{name}/{key}": np.array(value, np.int64) for key, value in values.items()}
        bounds = [f"{name}/{key}" for key in ("start", "end", "axis")]
        make = onnx.helper.make_node
        protos.append(make("Slice", [str(source.name), *bounds], [f"{name}/range"]))
        protos.append(make("Reshape", [f"{name}/range", f"{name}/shape"], [name]))
    return protos


def _value_info(value: ir.Value) -> onnx.ValueInfoProto:
    assert value.dtype is not None
    return onnx.helper.make_tensor_value_info(
        str(value.name), int(value.dtype), list(shape_of(value))
    )


def _call(
    module: tvm.IRModule,
    binding: relax.Binding,
    values: dict[relax.Var, ir.Value | str],
    stem: str,
) -> GenericCall:
    call = binding.value
    if not (isinstance(call, tvm.ir.Call) and getattr(call.op, "name", "") == "relax.call_tir"):
        raise CompileError(f"{stem}: Relax left {call} unlowered")
    global_var, operands = call.args[0], call.args[1]
    func = module[global_var]
    params = [str(param.name) for param in func.params]
    reads: dict[str, ir.Value | str] = {}
    constants: dict[str, Array] = {}
    for name, operand in zip(params, operands, strict=False):
        if isinstance(operand, tvm.ir.GenericConst):
            constants[name] = operand.value.numpy()
        else:
            reads[name] = values[operand]
    temporaries = {}
    if binding.var not in values:
        buffer = func.params[-1]
        name = (
            f"{stem}/{binding.var.name_hint if hasattr(binding.var, 'name_hint') else len(values)}"
        )
        values[binding.var] = name
        temporaries[name] = (str(buffer.dtype), tuple(int(dim) for dim in buffer.shape))
    return GenericCall(
        kernel=Generic(
            name=str(global_var.name_hint),
            key=hashlib.sha256(func.script().encode()).hexdigest()[:12],
            func=func,
        ),
        label=f"{stem}/{global_var.name_hint}",
        reads=reads,
        writes={params[-1]: values[binding.var]},
        constants=constants,
        temporaries=temporaries,
    )
