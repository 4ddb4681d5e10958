"""The options of a training for int8, which two commands share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from gfcompile.quantize import TrainConfig
from gfcompile.quantize.train_config import Augment
from gfcompile.runtime.errors import UserError

if TYPE_CHECKING:
    from gfcompile.compile.quantization import QuantizeConfig

_NUMBERS = (
    ("epochs", int, "0 calibrates only"),
    ("batch_size", int, "over all processes"),
    ("lr", float, "highest learning rate"),
    ("warmup", float, "fraction of steps until it is reached"),
    ("weight_decay", float, "of AdamW"),
    ("range_epochs", float, "fraction of epochs before ranges are frozen"),
    ("distill", float, "share of the loss that the float model's logits have"),
    ("temperature", float, "of the distillation"),
    ("label_smoothing", float, "of the rest of the loss"),
    ("mixup", float, "parameter of its beta distribution; 0 is off"),
    ("ema", float, "decay of the average of weights"),
    ("calibration_images", int, "training images that ranges are calibrated on"),
)
_TRAINING = (*(name for name, _, _ in _NUMBERS), "learn_scales", "augment", "amp")
_FLAGS = {"amp": "--no-amp", "threads": "--data-threads"}
_OTHERS = ("val_data", "device", "max_corrupt", "threads", "tensorboard")


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what calibration and training have in common."""
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--weight-bits", type=int, default=8, metavar="8|4", help="of weights (default: 8)"
    )
    group.add_argument(
        "--keep-float",
        action="append",
        default=[],
        metavar="NAME|auto:K",
        help="a layer to leave in float, or the K that int8 alone hurts most; may be repeated",
    )


def add_training_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds --train-data, and everything that needs it."""
    group = parser.add_argument_group("training for int8")
    group.add_argument(
        "--train-data",
        type=Path,
        metavar="DIR|CSV",
        required=required,
        help="a folder of images per class, or a CSV of paths and labels",
    )
    group.add_argument("--val-data", type=Path, metavar="DIR|CSV", help="to report top-1 on")
    default = TrainConfig()
    for name, kind, text in _NUMBERS:
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="N" if kind is int else "X",
            help=f"{text} (default: {getattr(default, name)})",
        )
    group.add_argument(
        "--learn-scales",
        action="store_true",
        default=None,
        help="learned step sizes (LSQ) for every range",
    )
    group.add_argument(
        "--augment",
        choices=get_args(Augment),
        help=f"random crops, and mirror images (default: {default.augment})",
    )
    group.add_argument("--device", metavar="auto|cpu|cuda")
    group.add_argument(
        "--no-amp",
        dest="amp",
        action="store_false",
        default=None,
        help="float32 on a GPU, not bfloat16",
    )
    group.add_argument(
        "--max-corrupt", type=int, metavar="N", help="unreadable images to pass over (default: 10)"
    )
    group.add_argument(
        "--data-threads", dest="threads", type=int, metavar="N", help="that read images"
    )
    group.add_argument("--tensorboard", type=Path, metavar="DIR", help="write a log there")


def check_training_arguments(options: argparse.Namespace) -> None:
    """Refuses options of training where there is none.

    Raises:
        UserError: it names the first one.
    """
    if options.train_data is None:
        for name in (*_TRAINING, *_OTHERS):
            if getattr(options, name) is not None:
                flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
                raise UserError(f"{flag} is for --train-data; add it")
    elif not getattr(options, "int8", True):
        raise UserError("--train-data trains for --int8; add it")


def quantize_config(options: argparse.Namespace, output: Path | None) -> "QuantizeConfig":
    """What the options ask for."""
    from gfcompile.compile.quantization import QuantizeConfig

    def given(names: tuple[str, ...]) -> dict[str, object]:
        values = {name: getattr(options, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    return QuantizeConfig(
        model=options.model,
        checkpoint=options.checkpoint,
        train_data=options.train_data,
        output=output,
        image_size=options.image_size,
        num_classes=options.num_classes,
        keep_ratio=options.keep_ratio,
        weight_bits=options.weight_bits,
        keep_float=tuple(options.keep_float),
        training=TrainConfig(seed=options.seed, **given(_TRAINING)),  # type: ignore[arg-type]
        **given(_OTHERS),  # type: ignore[arg-type]
    )
