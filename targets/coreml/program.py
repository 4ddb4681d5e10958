"""A saved .mlpackage as plain data: read from its bytes, not by the library that wrote them."""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.errors import BundleError
from gfcompile.targets.coreml.package import MODEL_FILE, WEIGHTS_FILE
from gfcompile.targets.coreml.tools import coremltools, quiet

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TensorType:
    """What the file says of a value.

    Attributes:
        dtype: MIL's name of it in lower case, such as "float16"; "dictionary" for those.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * _BITS.get(self.dtype, 0) / 8)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of the program.

    Attributes:
        inputs: by argument, the names of values; several where the argument is a list.
        outputs: name and type of each.
        literals: arguments whose values are in the operation itself.
        literal_types: their types in the file.
    """

    kind: str
    inputs: Mapping[str, Sequence[str]]
    outputs: Sequence[tuple[str, TensorType]]
    literals: Mapping[str, Any]
    literal_types: Mapping[str, TensorType]


@dataclass(frozen=True, kw_only=True)
class MilProgram:
    """The main function of an .mlpackage.

    Attributes:
        inputs: name and type of each, an image as (1, 3, H, W).
        operations: in order, without constants.
        constants: their values, by name; halves as float16, 4-bit integers as int8.
        constant_types: their types in the file.
        outputs: the names of what it returns.
        opset: such as "CoreML7".
        spec: the whole file, for its descriptions.
    """

    inputs: Sequence[tuple[str, TensorType]]
    operations: Sequence[Operation]
    constants: Mapping[str, Any]
    constant_types: Mapping[str, TensorType]
    outputs: Sequence[str]
    opset: str
    spec: Any


# DataType of MIL.proto: name and width. Widths below 8 are packed, the lowest bits first.
_NUMPY = {
    "float16": np.float16,
    "float32": np.float32,
    "int8": np.int8,
    "int32": np.int32,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "bool": np.bool_,
}
_BITS = {"float16": 16, "float32": 32, "int8": 8, "int32": 32, "uint8": 8, "uint16": 16, "int4": 4}
_BITS["bool"] = 8


def read_program(package: Path) -> MilProgram:
    """The program in an .mlpackage.

    Raises:
        BundleError: the folder is not one, or its program has parts that gfcompile never writes.
    """
    with quiet():
        coremltools()
        from coremltools.proto import MIL_pb2, Model_pb2
    spec = Model_pb2.Model()
    try:
        spec.ParseFromString((package / MODEL_FILE).read_bytes())
        weights = package / WEIGHTS_FILE
        blobs = weights.read_bytes() if weights.exists() else b""
    except Exception as error:  # protobuf's own class differs between its implementations
        raise BundleError(f"{package} is no .mlpackage that can be read: {error}") from error
    if spec.WhichOneof("Type") != "mlProgram":
        raise BundleError(f"{package} holds no ML program")
    try:
        return _main_function(spec, _Reader(MIL_pb2, blobs))
    except (LookupError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise BundleError(f"{package} has a damaged program: {error}") from error


def _main_function(spec: Any, reader: "_Reader") -> MilProgram:
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    constants: dict[str, Any] = {}
    constant_types: dict[str, TensorType] = {}
    operations = []
    for op in block.operations:
        outputs = [(o.name, reader.type(o.type)) for o in op.outputs]
        if op.type == "const":
            name = outputs[0][0]
            constants[name] = reader.value(op.attributes["val"])
            constant_types[name] = outputs[0][1]
            continue
        inputs: dict[str, list[str]] = {}
        values = {key: value for key, value in op.attributes.items() if key != "name"}
        for key, argument in op.inputs.items():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    inputs.setdefault(key, []).append(binding.name)
                else:
                    values[key] = binding.value
        operations.append(
            Operation(
                kind=op.type,
                inputs=inputs,
                outputs=outputs,
                literals={key: reader.value(value) for key, value in values.items()},
                literal_types={key: reader.type(value.type) for key, value in values.items()},
            )
        )
    return MilProgram(
        inputs=[(value.name, reader.type(value.type)) for value in function.inputs],
        operations=operations,
        constants=constants,
        constant_types=constant_types,
        outputs=list(block.outputs),
        opset=function.opset,
        spec=spec,
    )


class _Reader:
    def __init__(self, proto: Any, blobs: bytes) -> None:
        self._proto = proto
        self._blobs = blobs

    def dtype(self, number: int) -> str:
        return str(self._proto.DataType.Name(number)).lower()

    def type(self, value_type: Any) -> TensorType:
        if value_type.WhichOneof("type") != "tensorType":
            return TensorType(dtype="dictionary", shape=())
        tensor = value_type.tensorType
        shape = tuple(int(dim.constant.size) for dim in tensor.dimensions)
        return TensorType(dtype=self.dtype(tensor.dataType), shape=shape)

    def value(self, value: Any) -> Any:
        """A constant: an array, a scalar's array, a string, or a list of strings."""
        kind = self.type(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            return self._blob(value.blobFileValue.offset, kind)
        immediate = value.immediateValue
        if immediate.WhichOneof("value") == "list":
            return [self.value(item) for item in immediate.list.values]
        tensor = immediate.tensor
        field = tensor.WhichOneof("value")
        if field == "strings":
            texts = list(tensor.strings.values)
            return texts if kind.shape else texts[0]
        if field == "bytes":
            return self._array(tensor.bytes.values, kind)
        numbers = list(getattr(tensor, field).values)
        return np.array(numbers, _NUMPY[kind.dtype]).reshape(kind.shape)

    def _blob(self, offset: int, kind: TensorType) -> Array:
        """One record of weight.bin: a header of 64 bytes that says where its data lies."""
        sentinel, _, size, start = struct.unpack_from("<IIQQ", self._blobs, offset)
        if sentinel != 0xDEADBEEF or start + size > len(self._blobs):
            raise BundleError("weight.bin is damaged: a record is not where the model says")
        return self._array(self._blobs[start : start + size], kind)

    def _array(self, data: bytes, kind: TensorType) -> Array:
        if kind.dtype == "int4":
            packed = np.frombuffer(data, np.uint8)
            nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1).astype(np.int8)
            signed = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)
            return signed[: math.prod(kind.shape)].reshape(kind.shape)
        return np.frombuffer(data, _NUMPY[kind.dtype]).reshape(kind.shape)
