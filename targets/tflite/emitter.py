"""The state of an emission: which tensor of the file holds which value of the graph.

Operators are lowered one at a time, in the graph's order, by the functions that `lowers` has
registered. A quantized value is held as its integers; who needs the real ones asks for `real`,
which dequantizes once. Images are held channels last where a convolution wants them so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.onnx_values import (
    OTHER_TARGET,
    constant,
    dtype_of,
    is_standard,
    is_stored_in_halves,
    only_reader,
    quantization,
    scalar_quantization,
    shape_of,
)
from gfcompile.targets.tflite.model_file import Array, ModelFile, Quantization, Tensor


def to_channels_last(rank: int) -> tuple[int, ...]:
    """The permutation (N, C, ...) -> (N, ..., C)."""
    return (0, *range(2, rank), 1)


def to_channels_first(rank: int) -> tuple[int, ...]:
    """The permutation (N, ..., C) -> (N, C, ...)."""
    return (0, rank - 1, *range(1, rank - 1))


def channels_last(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape (N, ..., C) of what the graph has as (N, C, ...)."""
    return tuple(shape[axis] for axis in to_channels_last(len(shape)))


@dataclass(kw_only=True)
class Emitter:
    """What operator lowerings read and write.

    Attributes:
        file: where operators go.
        target: its name, for messages.
        integer_only: refuses operators on real values.
        done: nodes that a lowering of another one has covered.
        current: the node that is being lowered; None before the first and after the last one.
    """

    file: ModelFile
    target: str
    integer_only: bool = False
    done: set[ir.Node] = field(default_factory=set)
    current: ir.Node | None = None
    _held: dict[ir.Value, Tensor] = field(default_factory=dict)
    _last: dict[ir.Value, Tensor] = field(default_factory=dict)  # images, channels last
    _real: dict[int, Tensor] = field(default_factory=dict)  # by index of the quantized tensor

    # Reading

    def stored(self, value: ir.Value | None) -> Tensor:
        """The tensor of `value` as it is held, integers if it is quantized."""
        assert value is not None
        if value not in self._held:
            if value in self._last:
                last = self._last[value]
                held = self.transpose(last, to_channels_first(len(last.shape)), str(value.name))
            else:
                held = self._constant(value)
            self._held[value] = held
        return self._held[value]

    def real(self, value: ir.Value | None) -> Tensor:
        """The tensor of `value` in floating point (or of integers that are indices)."""
        return self.dequantized(self.stored(value))

    def image(self, value: ir.Value | None) -> Tensor:
        """The tensor of an image (N, C, ...), held as (N, ..., C)."""
        assert value is not None
        if value not in self._last:
            stored = self.stored(value)
            self._last[value] = self.transpose(
                stored, to_channels_last(len(stored.shape)), f"{value.name}/channels_last"
            )
        return self._last[value]

    def is_image(self, value: ir.Value | None) -> bool:
        """Whether `value` is held channels last, and no other way yet."""
        return value in self._last and value not in self._held

    def integers(self, value: ir.Value | None) -> Tensor:
        """The tensor of a quantized value, which may be a constant, as integers."""
        weights = integer_weights(value)
        if value in self._held or weights is None:
            tensor = self.stored(value)
        else:
            data, scales = weights
            assert value is not None
            tensor = self.file.constant(str(value.name), data, scales)
            self._held[value] = tensor
        assert tensor.quantization is not None
        return tensor

    def is_quantized(self, value: ir.Value | None) -> bool:
        """Whether `value` is held as integers with a scale, or is such a constant."""
        if value is None or constant(value) is not None:
            return integer_weights(value) is not None
        tensor = self._held.get(value) or self._last.get(value)
        return tensor is not None and tensor.quantization is not None

    def dequantized(self, tensor: Tensor) -> Tensor:
        """`tensor` in floating point."""
        if tensor.quantization is None:
            return tensor
        if tensor.index not in self._real:
            result = self.file.tensor(f"{tensor.name}/real", "float32", tensor.shape)
            self.operator("DEQUANTIZE", [tensor], [result], schema.DequantizeOptionsT())
            self._real[tensor.index] = result
        return self._real[tensor.index]

    def held(self) -> dict[str, tuple[Tensor, bool]]:
        """The tensor of each value by its name, and whether its channels are last there."""
        last = {str(value.name): (tensor, True) for value, tensor in self._last.items()}
        return last | {str(value.name): (tensor, False) for value, tensor in self._held.items()}

    # Writing

    def hold(self, value: ir.Value, tensor: Tensor, *, as_image: bool = False) -> None:
        """Makes `tensor` the one that holds `value`; an image has its channels last there."""
        (self._last if as_image else self._held)[value] = tensor

    def result(
        self,
        node: ir.Node,
        *,
        value: ir.Value | None = None,
        quantized: bool = False,
        as_image: bool = False,
    ) -> Tensor:
        """A new tensor that holds the result of `node`, for an operator to write.

        Args:
            value: the result, where it is that of a later node which is covered too.
            quantized: whether the operator can write integers: it does where the graph
                quantizes the result and nothing else reads it.
        """
        value = node.outputs[0] if value is None else value
        shape = shape_of(value)
        if as_image:
            shape = channels_last(shape)
        quantize = self.quantizer_of(value) if quantized else None
        if quantize is None:
            tensor = self.file.tensor(str(value.name), held_dtype(value), shape)
            self.hold(value, tensor, as_image=as_image)
            return tensor
        stored = quantize.outputs[0]
        tensor = self.file.tensor(
            str(stored.name),
            dtype_of(stored),
            shape,
            Quantization.per_tensor(*scalar_quantization(quantize)),
        )
        self.done.add(quantize)
        self.hold(stored, tensor, as_image=as_image)
        return tensor

    def quantizer_of(self, value: ir.Value) -> ir.Node | None:
        """The QuantizeLinear that alone reads `value`, if there is one."""
        return only_reader(value, "QuantizeLinear")

    def runs_in_integers(self, node: ir.Node, *inputs: ir.Value | None) -> bool:
        """Whether all inputs of `node` (or those given) are quantized, and its result will be."""
        return self.quantizer_of(node.outputs[0]) is not None and all(
            self.is_quantized(value) for value in inputs or node.inputs
        )

    # Operators

    def operator(
        self,
        name: str,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        options: Any = None,
    ) -> None:
        """Appends an operator.

        Raises:
            CompileError: it computes real values and the target takes integers alone.
        """
        real = any(tensor.dtype == "float32" for tensor in outputs)
        if self.integer_only and self.current is not None and real:
            raise self.refuse(
                self.current,
                "it takes integer operators alone, and this would run in floating point",
                "compile for tflite-xnnpack, which takes both",
            )
        self.file.operator(name, inputs, outputs, options)

    def transpose(self, tensor: Tensor, perm: Sequence[int], name: str) -> Tensor:
        """`tensor` with its axes in another order."""
        result = self.file.tensor(
            name, tensor.dtype, [tensor.shape[axis] for axis in perm], tensor.quantization
        )
        self.operator(
            "TRANSPOSE", [tensor, self.indices(perm)], [result], schema.TransposeOptionsT()
        )
        return result

    def reshape(self, tensor: Tensor, shape: Sequence[int], name: str) -> Tensor:
        """`tensor` as another shape of the same number of elements."""
        if tensor.shape == tuple(shape):
            return tensor
        result = self.file.tensor(name, tensor.dtype, shape, tensor.quantization)
        options = schema.ReshapeOptionsT()
        options.newShape = np.array(shape, np.int32)
        self.operator("RESHAPE", [tensor, self.indices(shape)], [result], options)
        return result

    def slice(
        self, tensor: Tensor, begin: Sequence[int], shape: Sequence[int], name: str
    ) -> Tensor:
        """The part of `tensor` that begins at `begin` and has this shape."""
        if tensor.shape == tuple(shape):
            return tensor
        result = self.file.tensor(name, tensor.dtype, shape, tensor.quantization)
        operands = [tensor, self.indices(begin), self.indices(shape)]
        self.operator("SLICE", operands, [result], schema.SliceOptionsT())
        return result

    def concatenate(self, tensors: Sequence[Tensor], axis: int, name: str) -> Tensor:
        """Tensors of one kind and scale, one after the other along `axis`."""
        first = tensors[0]
        shape = list(first.shape)
        shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
        result = self.file.tensor(name, first.dtype, shape, first.quantization)
        options = schema.ConcatenationOptionsT()
        options.axis = axis
        self.operator("CONCATENATION", tensors, [result], options)
        return result

    def binary(self, operator: str, a: Tensor, b: Tensor, name: str) -> Tensor:
        """An ADD, SUB or MUL of real tensors, each broadcast to the other's shape."""
        result = self.file.tensor(name, "float32", np.broadcast_shapes(a.shape, b.shape))
        options = getattr(schema, f"{operator.title()}OptionsT")()
        self.operator(operator, [a, b], [result], options)
        return result

    def indices(self, values: Sequence[int]) -> Tensor:
        """A constant of int32, as operators take shapes, axes and permutations."""
        return self.file.constant("indices", np.array(values, np.int32))

    def weights(self, name: str, values: Array) -> Tensor:
        """A constant of real numbers; float16 ones are stored so and widened by an operator."""
        tensor = self.file.constant(name, values)
        if tensor.dtype != "float16":
            return tensor
        if tensor.index not in self._real:
            widened = self.file.tensor(f"{name}/float32", "float32", tensor.shape)
            self.operator("DEQUANTIZE", [tensor], [widened], schema.DequantizeOptionsT())
            self._real[tensor.index] = widened
        return self._real[tensor.index]

    def refuse(self, node: ir.Node, reason: str, remedy: str = OTHER_TARGET) -> CompileError:
        """The error that says which node the target cannot take, and what can be done."""
        return CompileError(
            f"{self.target} cannot take {node.op_type} (node {node.name or node.outputs[0].name}): "
            f"{reason}; {remedy}"
        )

    def _constant(self, value: ir.Value) -> Tensor:
        array = constant(value)
        if array is None:
            raise AssertionError(f"{value.name} is read before it is written")
        if array.dtype == np.int64:
            array = array.astype(np.int32)  # indices and shapes; they fit
        return self.weights(str(value.name), stored_array(value, array))


Lowering = Callable[[Emitter, ir.Node], None]
LOWERINGS: dict[str, Lowering] = {}


def lowers(*op_types: str) -> Callable[[Lowering], Lowering]:
    """Registers a function that lowers these operators; each can be registered once."""

    def register(function: Lowering) -> Lowering:
        for op_type in op_types:
            assert op_type not in LOWERINGS, f"{op_type} has two lowerings"
            LOWERINGS[op_type] = function
        return function

    return register


def stored_array(value: ir.Value, array: Array) -> Array:
    """A real constant in the precision that the graph stores it in."""
    return array.astype(np.float16) if is_stored_in_halves(value) else array


def integer_weights(value: ir.Value | None) -> tuple[Array, Quantization] | None:
    """The int8 (or int32) constant behind a DequantizeLinear, and its scales."""
    node = value.producer() if value is not None else None
    if node is None or not is_standard(node, "DequantizeLinear"):
        return None
    data = constant(node.inputs[0])
    if data is None or data.dtype not in (np.int8, np.int32):
        return None
    scale, zero_point, axis = quantization(node)
    return data, Quantization(
        scale=scale.reshape(-1),
        zero_point=zero_point.reshape(-1).astype(np.int64),
        axis=axis % data.ndim if scale.size > 1 else 0,
    )


def attributes_of(node: ir.Node) -> Mapping[str, Any]:
    """The attributes of `node` as Python values."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def held_dtype(value: ir.Value) -> str:
    """What a value is stored as where it is not quantized; indices need no 64 bits."""
    dtype = dtype_of(value)
    return "int32" if dtype == "int64" else dtype
