"""What the matchers share: what is claimed, the calls so far, and which tensor holds which value.

Views (Reshape and its kin) cost nothing: their output is another name for the same memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from gfcompile.targets.onnx_values import (
    VIEWS,
    dtype_of,
    input_of,
    is_standard,
    module_path,
    name_of,
    only_reader,
    scalar_quantization,
    shape_of,
)
from gfcompile.targets.tvm.kernel import Act, Array, Kernel, quant_args
from gfcompile.targets.tvm.program import Call, Selection, Tensor


@dataclass
class State:
    """How far a graph has become calls.

    Attributes:
        claimed: the nodes that a call stands for, or that cost nothing.
        calls: by the last node that they stand for.
        tensors, stored_in, selections: as in a Program.
        same: values that are other names for one memory.
        channels_last: images that the graph has with channels second.
        grouped: qkv products whose q, k and v are int8 with a scale of their own: the tensor that
            holds all three, and its `quant`.
    """

    claimed: set[ir.Node] = field(default_factory=set)
    calls: dict[ir.Node, tuple[Call, ...]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    stored_in: dict[str, tuple[str, Array]] = field(default_factory=dict)
    selections: list[Selection] = field(default_factory=list)
    same: dict[ir.Value, ir.Value] = field(default_factory=dict)
    channels_last: set[ir.Value] = field(default_factory=set)
    grouped: dict[ir.Value, tuple[str, Array]] = field(default_factory=dict)

    # Values

    def root(self, value: ir.Value) -> ir.Value:
        """The value whose memory `value` is a view of."""
        node = value.producer()
        while value in self.same or (
            node is not None and is_standard(node, *VIEWS) and node not in self.claimed
        ):
            if value in self.same:
                value = self.same[value]
            else:
                assert node is not None
                value = input_of(node, 0)
            node = value.producer()
        return value

    def tensor(self, value: ir.Value) -> str:
        """The name of the tensor that holds `value`, from now on part of the program."""
        value = self.root(value)
        name, shape = str(value.name), shape_of(value)
        if value in self.channels_last:  # a tensor of the graph's name has the graph's layout
            name, shape = f"{name}_channels_last", (shape[0], *shape[2:], shape[1])
        if name not in self.tensors:
            producer = value.producer()
            scale, zero_point = 0.0, 0
            if producer is not None and is_standard(producer, "QuantizeLinear"):
                scale, zero_point = scalar_quantization(producer)
            self.tensors[name] = Tensor(
                name=name,
                dtype=dtype_of(value),
                shape=shape,
                scale=scale,
                zero_point=zero_point,
            )
        return name

    def follower(self, value: ir.Value, *op_types: str) -> ir.Node | None:
        """The node that alone reads `value`, through views, if it is one of `op_types`."""
        while True:
            reader = only_reader(value)
            if reader is None or reader in self.claimed:
                return None
            if is_standard(reader, *op_types):
                return reader
            if not is_standard(reader, *VIEWS):
                return None
            value = reader.outputs[0]

    def other_input(self, node: ir.Node, value: ir.Value) -> ir.Value | None:
        """The operand of a binary node that is not (a view of) `value`."""
        others = [x for x in node.inputs if x is not None and self.root(x) is not self.root(value)]
        return others[0] if len(others) == 1 else None

    def dequantized(self, value: ir.Value) -> ir.Node | None:
        """The DequantizeLinear that `value` comes from, if that is an int8 activation."""
        node = self.root(value).producer()
        if node is None or not is_standard(node, "DequantizeLinear"):
            return None
        return node if dtype_of(input_of(node, 0)) == "int8" else None

    # Calls

    def cover(self, nodes: Sequence[ir.Node], *calls: Call) -> None:
        """Puts `calls`, which stand for these nodes, where the last of the nodes is."""
        self.claimed.update(nodes)
        self.calls[nodes[-1]] = calls

    def replace(
        self,
        node: ir.Node,
        kernel: Kernel,
        x: ir.Value,
        constants: Mapping[str, Array] | None = None,
    ) -> None:
        """Puts a kernel that reads `x` in the place of `node`, and of nothing else."""
        call = Call(
            kernel=kernel,
            label=label(node),
            reads={"x": self.tensor(x)},
            writes={"y": self.tensor(node.outputs[0])},
            constants=constants or {},
        )
        self.cover([node], call)

    def add(
        self,
        covered: Sequence[ir.Node],
        kernel_of: Callable[[Act], Kernel],
        reads: Mapping[str, str],
        constants: Mapping[str, Array],
        before: Call | None = None,
        grouped: tuple[str, Array] | None = None,
    ) -> None:
        """Puts a call in the place of `covered`, and of the QuantizeLinear after them, if any.

        Args:
            covered: the nodes that the call stands for, in order.
            kernel_of: the kernel for a float32 or an int8 result.
            reads, constants: the call's arguments.
            before: a call that must come first.
            grouped: see `State`; of an int8 result whose columns have several scales.
        """
        out: Act = "float32"
        quantize = self.follower(covered[-1].outputs[0], "QuantizeLinear")
        if grouped is not None:
            out = "int8"
            constants = {**constants, "quant": grouped[1]}
        elif quantize is not None:
            covered, out = [*covered, quantize], "int8"
            constants = {**constants, "quant": quant_args(*scalar_quantization(quantize))}
        call = Call(
            kernel=kernel_of(out),
            label=label(*covered),
            reads=reads,
            writes={"y": grouped[0] if grouped else self.tensor(covered[-1].outputs[0])},
            constants=constants,
        )
        self.cover(covered, *([] if before is None else [before]), call)


def label(*nodes: ir.Node) -> str:
    """The torch module that these nodes came from, or the first node's name."""
    modules = filter(None, map(module_path, nodes))
    return next(modules, "") or name_of(nodes[0])
