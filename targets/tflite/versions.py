"""Which version of an operator a use of it needs: a runtime that lacks it then says so."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gfcompile.targets.tflite.model_file import Tensor

# The version that brought int8, where it is not the first one.
_INT8 = {
    "ADD": 2,
    "BATCH_MATMUL": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "DEQUANTIZE": 2,
    "FULLY_CONNECTED": 5,
    "GATHER": 2,
    "GELU": 2,
    "LOGISTIC": 2,
    "MAXIMUM": 2,
    "MEAN": 2,
    "MUL": 2,
    "PAD": 2,
    "REDUCE_MAX": 2,
    "RELU": 2,
    "RSQRT": 2,
    "SLICE": 2,
    "SOFTMAX": 2,
    "SPLIT": 2,
    "SQUARED_DIFFERENCE": 2,
    "SUB": 3,
    "TOPK_V2": 2,
    "TRANSPOSE": 2,
}
# What uses a feature of a later version in every one of our uses.
_ALWAYS = {
    "FULLY_CONNECTED": 5,  # keep_num_dims
    "GELU": 1,
    "BROADCAST_TO": 2,
}


def operator_version(
    name: str, inputs: "Sequence[Tensor | None]", outputs: "Sequence[Tensor]"
) -> int:
    """The least version of the operator `name` that takes these tensors."""
    present = [tensor for tensor in (*inputs, *outputs) if tensor is not None]
    version = _ALWAYS.get(name, 1)
    first = present[0]
    if name == "DEQUANTIZE" and first.dtype == "float16":
        return 3
    if name == "QUANTIZE" and first.dtype != "float32":
        return 2  # from one scale to another
    if any(tensor.dtype == "int8" for tensor in present):
        version = max(version, _INT8.get(name, 1))
    if name == "TRANSPOSE" and len(first.shape) > 4:
        version = max(version, 5)
    if name == "SLICE" and len(first.shape) > 4:
        version = max(version, 5)
    if name in ("ADD", "SUB", "MUL") and any(len(tensor.shape) > 4 for tensor in present):
        version = max(version, {"ADD": 4, "SUB": 5, "MUL": 5}[name])
    return version
