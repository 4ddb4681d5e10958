"""What every pass needs of a graph: constants, shapes, fresh names, replacing a value."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

# What changes the shape and nothing else.
RESHAPING = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten"))


def constant(value: ir.Value | None) -> Array | None:
    """The array that `value` always holds, or None where it depends on the input."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_constant(value: ir.Value) -> bool:
    """Whether `value` never changes: a constant, or a quantized one dequantized."""
    node = value.producer()
    if node is not None and node.op_type == "DequantizeLinear":
        return all(constant(part) is not None for part in node.inputs if part is not None)
    return constant(value) is not None


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The static shape of `value`, which must be known."""
    assert value.shape is not None, f"{value.name} has no shape"
    dims = tuple(value.shape)
    assert all(isinstance(dim, int) for dim in dims), f"{value.name} has a dynamic shape {dims}"
    return tuple(int(dim) for dim in dims)  # type: ignore[arg-type]


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute of `node`, or ONNX's default for it."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The single node that reads `value`, if nothing else does."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def input_of(node: ir.Node, index: int) -> ir.Value:
    """The input of `node` at `index`, which must be there."""
    value = node.inputs[index]
    assert value is not None, f"{node.name} lacks input {index}"
    return value


def before_reshapes(value: ir.Value) -> ir.Value:
    """What `value` is a reshape of, however many times."""
    *_, first = _reshapes(value)
    return first


def _reshapes(value: ir.Value) -> Iterator[ir.Value]:
    """`value`, what it was reshaped from, and so on."""
    yield value
    node = value.producer()
    while node is not None and node.op_type in RESHAPING and node.domain == "":
        value = input_of(node, 0)
        yield value
        node = value.producer()


class Builder:
    """Puts new nodes in front of `anchor` and new constants into its graph.

    Shapes are given with each node: a pass leaves every value with a known type.
    """

    def __init__(self, anchor: ir.Node) -> None:
        graph = anchor.graph
        assert isinstance(graph, ir.Graph)
        self._graph = graph
        self._anchor = anchor
        self._names = set(graph.initializers)
        self._names.update(value.name or "" for value in graph.inputs)
        self._names.update(value.name or "" for node in graph for value in node.outputs)

    def constant(self, stem: str, array: Array) -> ir.Value:
        """A new initializer; equal stems get numbers."""
        name = self._fresh(stem)
        # A copy in row-major order: what was transposed must not keep its source alive.
        tensor = ir.tensor(np.array(array, order="C"), name=name)
        value = ir.val(name, const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def node(
        self,
        op: str,
        inputs: Iterable[ir.Value | None],
        shape: tuple[int, ...],
        *,
        stem: str,
        dtype: ir.DataType = ir.DataType.FLOAT,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node."""
        name = self._fresh(stem)
        output = ir.val(name, dtype=dtype, shape=shape)
        node = ir.node(
            op, list(inputs), attributes, domain=domain, outputs=[output], name=f"node_{name}"
        )
        self._graph.insert_before(self._anchor, node)
        return output

    def reshape(self, value: ir.Value, shape: tuple[int, ...], *, stem: str) -> ir.Value:
        """`value` in another shape; itself, or what it was reshaped from, if that has it."""
        old = shape_of(value)
        for same in _reshapes(value):
            if shape_of(same) == shape:
                return same
        assert math.prod(old) == math.prod(shape), (old, shape)
        target = self.constant(f"{stem}_shape", np.array(shape, np.int64))
        dtype = value.dtype or ir.DataType.FLOAT
        return self.node("Reshape", [value, target], shape, stem=stem, dtype=dtype)

    def transpose(self, value: ir.Value, perm: tuple[int, ...], *, stem: str) -> ir.Value:
        """`value` with its axes permuted; itself if that changes nothing."""
        if perm == tuple(range(len(perm))):
            return value
        old = shape_of(value)
        shape = tuple(old[axis] for axis in perm)
        dtype = value.dtype or ir.DataType.FLOAT
        return self.node("Transpose", [value], shape, stem=stem, dtype=dtype, perm=list(perm))

    def _fresh(self, stem: str) -> str:
        name, count = stem, 0
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name


def replace(old: ir.Value, new: ir.Value) -> None:
    """Lets every reader of `old` read `new` instead, which takes over the old name.

    `new` must be the output of a node that was made for this. What computed `old` is left
    behind, for `remove_dead_code`.
    """
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = f"{name}_replaced"
    new.name = name
