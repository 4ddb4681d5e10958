"""Builds a .tflite flatbuffer: tensors, constants, operators, signature, metadata.

The same calls give the same bytes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from gfcompile.targets.tflite.versions import operator_version

Array = npt.NDArray[Any]

FILE_IDENTIFIER = b"TFL3"
SIGNATURE_KEY = "serving_default"

_TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
    "int16": schema.TensorType.INT16,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
    "bool": schema.TensorType.BOOL,
}
# Kernels and delegates map constants from the file and read them with vector loads.
_DATA_ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantization:
    """real = (stored - zero_point) * scale; one of each per tensor, or per index along `axis`."""

    scale: npt.NDArray[np.float32]  # (1,) or (channels,)
    zero_point: npt.NDArray[np.int64]
    axis: int = 0

    @classmethod
    def per_tensor(cls, scale: float, zero_point: int) -> "Quantization":
        return cls(scale=np.array([scale], np.float32), zero_point=np.array([zero_point], np.int64))

    def equals(self, other: "Quantization | None") -> bool:
        return (
            other is not None
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
            and self.axis == other.axis
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensor:
    """A tensor of the file; `quantization` is None for real values and for indices."""

    index: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    quantization: Quantization | None = None


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator of the file, for tests and reports."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class ModelFile:
    """A .tflite file in the making: one subgraph, operators in the order of execution."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.tensors: list[Tensor] = []
        self.operators: list[Operator] = []
        self._names: dict[str, int] = {}
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[tuple[int, int], int] = {}
        self._buffers: list[Any] = [_Buffer()]  # buffer 0 is empty: no constant
        self._constants: dict[bytes, Tensor] = {}
        self._metadata: list[Any] = []

    def tensor(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int],
        quantization: Quantization | None = None,
    ) -> Tensor:
        """A new tensor that an operator or the caller writes."""
        return self._add(name, dtype, shape, quantization, buffer=0)

    def constant(
        self, name: str, values: Array, quantization: Quantization | None = None
    ) -> Tensor:
        """A tensor with these values; equal constants are stored once."""
        values = np.ascontiguousarray(values).reshape(values.shape)  # keeps a scalar's shape
        key = hashlib.sha256(values.tobytes())
        key.update(repr((values.dtype.name, values.shape)).encode())
        if quantization is not None:
            key.update(quantization.scale.tobytes() + quantization.zero_point.tobytes())
            key.update(repr(quantization.axis).encode())
        known = self._constants.get(key.digest())
        if known is None:
            self._buffers.append(_Buffer(values.tobytes()))
            known = self._add(
                name, values.dtype.name, values.shape, quantization, len(self._buffers) - 1
            )
            self._constants[key.digest()] = known
        return known

    def operator(
        self,
        name: str,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        options: Any = None,
    ) -> None:
        """Appends an operator.

        Args:
            name: as in the schema: "FULLY_CONNECTED".
            inputs: None for an optional one that is left out.
            options: the schema's object of options, which says its own type.
        """
        code = getattr(schema.BuiltinOperator, name)
        version = operator_version(name, inputs, outputs)
        record = schema.OperatorT()
        record.opcodeIndex = self._codes.setdefault((code, version), len(self._codes))
        record.inputs = np.array([-1 if x is None else x.index for x in inputs], np.int32)
        record.outputs = np.array([x.index for x in outputs], np.int32)
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            record.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            record.builtinOptions = options
        self._operators.append(record)
        self.operators.append(
            Operator(
                name=name,
                inputs=tuple(-1 if x is None else x.index for x in inputs),
                outputs=tuple(x.index for x in outputs),
            )
        )

    def metadata(self, name: str, data: bytes) -> None:
        """Attaches a named block of bytes that runtimes ignore and tools read."""
        self._buffers.append(_Buffer(data))
        record = schema.MetadataT()
        record.name, record.buffer = name, len(self._buffers) - 1
        self._metadata.append(record)

    def serialize(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> bytes:
        """The file's bytes; inputs and outputs by their names in the signature."""
        graph = schema.SubGraphT()
        graph.name = "main"
        graph.tensors, graph.operators = self._tensors, self._operators
        graph.inputs = np.array([tensor.index for tensor in inputs.values()], np.int32)
        graph.outputs = np.array([tensor.index for tensor in outputs.values()], np.int32)
        signature = schema.SignatureDefT()
        signature.signatureKey = SIGNATURE_KEY
        signature.inputs = [_tensor_map(name, tensor) for name, tensor in inputs.items()]
        signature.outputs = [_tensor_map(name, tensor) for name, tensor in outputs.items()]
        model = schema.ModelT()
        model.version = 3
        model.description = self.description
        model.operatorCodes = [_operator_code(*code) for code in self._codes]
        model.subgraphs = [graph]
        model.buffers = self._buffers
        model.signatureDefs = [signature]
        model.metadata = self._metadata
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), FILE_IDENTIFIER)
        return bytes(builder.Output())

    def _add(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int],
        quantization: Quantization | None,
        buffer: int,
    ) -> Tensor:
        name = self._unique(name)
        record = schema.TensorT()
        record.name, record.type, record.buffer = name, _TYPES[dtype], buffer
        record.shape = np.array(shape, np.int32)
        record.hasRank = True
        if quantization is not None:
            record.quantization = schema.QuantizationParametersT()
            record.quantization.scale = quantization.scale
            record.quantization.zeroPoint = quantization.zero_point
            record.quantization.quantizedDimension = quantization.axis
        self._tensors.append(record)
        tensor = Tensor(
            index=len(self.tensors),
            name=name,
            dtype=dtype,
            shape=tuple(int(n) for n in shape),
            quantization=quantization,
        )
        self.tensors.append(tensor)
        return tensor

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else self._unique(f"{name}_{count}")


class _Buffer(schema.BufferT):  # type: ignore[misc] # the schema is not typed
    """Constant data, aligned in the file; the generated class aligns bytes to one."""

    def __init__(self, data: bytes | None = None) -> None:
        super().__init__()
        self.content = data

    def Pack(self, builder: Any) -> Any:  # noqa: N802 - the generated class calls it so
        vector = None
        if self.content is not None:
            builder.StartVector(1, len(self.content), _DATA_ALIGNMENT)
            builder.head -= len(self.content)
            builder.Bytes[builder.head : builder.head + len(self.content)] = self.content
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


def _operator_code(code: int, version: int) -> Any:
    record = schema.OperatorCodeT()
    # Readers of the first schema have a signed byte for it.
    record.deprecatedBuiltinCode = min(code, 127)
    record.builtinCode, record.version = code, version
    return record


def _tensor_map(name: str, tensor: Tensor) -> Any:
    record = schema.TensorMapT()
    record.name, record.tensorIndex = name, tensor.index
    return record
