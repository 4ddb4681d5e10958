"""What a user can choose of a .tflite file."""

from dataclasses import dataclass
from typing import Literal

Interface = Literal["float32", "int8", "uint8"]


@dataclass(frozen=True, kw_only=True)
class TfliteOptions:
    """How a .tflite file takes its image and gives its logits.

    Attributes:
        interface: the dtype of input and output; the integer ones need int8 precision.
        input: "uint8-image" takes pixels (N, H, W, 3), normalizes them itself; "tensor" takes
            them normalized, in the dtype of the interface.
    """

    interface: Interface = "float32"
    input: Literal["tensor", "uint8-image"] = "tensor"
