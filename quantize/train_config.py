"""How to train, as plain data: read without torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from gfcompile.runtime.errors import UserError

__all__ = ["Augment", "LoopConfig", "TrainConfig"]

Augment = Literal["none", "crop", "crop-flip"]
Bounds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to train, whatever is trained.

    Attributes:
        batch_size: of all processes together.
        lr: the highest learning rate; `warmup` is the fraction of all steps that lead up to it, a
            cosine leads down again.
        mixup: the parameter of its beta distribution; 0 mixes nothing.
        ema: what the average of weights, which is the result, keeps of itself at each step.
        amp: bfloat16 on a GPU that has it.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    ema: float = 0.998
    augment: Augment = "crop-flip"
    amp: bool = True
    seed: int = 0

    BOUNDS: ClassVar[Bounds] = {
        "epochs": (0, math.inf),
        "batch_size": (1, math.inf),
        "lr": (0, math.inf),
        "warmup": (0, 1),
        "weight_decay": (0, math.inf),
        "label_smoothing": (0, 1),
        "mixup": (0, math.inf),
        "ema": (0, 1),
    }

    def __post_init__(self) -> None:
        for name, (least, most) in self.BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {value} is not in [{least}, {most}]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """How to train for int8; ranges and rounding stay in float32 where the rest is bfloat16.

    Attributes:
        range_epochs: the fraction of epochs that begin with a new calibration of ranges; from then
            on they are frozen.
        learn_scales: learned step sizes instead; ranges are calibrated once, then trained.
        distill: how much of the loss is the distance from the float model's logits.
        temperature: that logits are divided by for it.
        calibration_images: how many of the training images the ranges are calibrated on.
    """

    range_epochs: float = 0.5
    learn_scales: bool = False
    distill: float = 0.9
    temperature: float = 2.0
    calibration_images: int = 256

    BOUNDS: ClassVar[Bounds] = {
        **LoopConfig.BOUNDS,
        "range_epochs": (0, 1),
        "distill": (0, 1),
        "temperature": (0.01, 100),  # at 0 or infinity there is no distance left to learn from
        "calibration_images": (1, math.inf),
    }
