"""What a user can choose of an .mlpackage."""

from dataclasses import dataclass
from typing import Literal

Ios = Literal[15, 16, 17, 18]
Layout = Literal["ane", "plain"]


@dataclass(frozen=True, kw_only=True)
class CoremlOptions:
    """How an .mlpackage is written.

    Attributes:
        ios: the oldest system that is to load it. Weights are stored in int8 from 16, activations
            from 17, weights of 4 bits as such from 18.
        layout: "ane" has channels first and 1x1 convolutions for linear layers, as the Neural
            Engine likes it; "plain" follows the graph.
        input: "image" takes an RGB image and normalizes it; "tensor" takes the graph's own input.
        license: for the package's licence field; empty where it is not known.
    """

    ios: Ios = 17
    layout: Layout = "ane"
    input: Literal["image", "tensor"] = "image"
    license: str = ""
