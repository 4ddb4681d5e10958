"""The options of trainings, which several commands share."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from gfcompile.compile.command_line import natural_int, positive_int
from gfcompile.quantize import TrainConfig
from gfcompile.quantize.train_config import Augment
from gfcompile.runtime.errors import UserError

if TYPE_CHECKING:
    from gfcompile.compile.finetuning import FinetuneConfig
    from gfcompile.compile.quantization import QuantizeConfig

_LOOP = (
    ("epochs", int, "over the training images"),
    ("batch_size", int, "over all processes"),
    ("lr", float, "highest learning rate"),
    ("warmup", float, "fraction of steps until it is reached"),
    ("weight_decay", float, "of AdamW"),
    ("label_smoothing", float, "of the cross-entropy"),
    ("mixup", float, "parameter of its beta distribution; 0 is off"),
    ("ema", float, "decay of the average of weights"),
)
_INT8 = (
    ("range_epochs", float, "fraction of epochs before ranges are frozen"),
    ("distill", float, "share of the loss that the float model's logits have"),
    ("temperature", float, "of the distillation"),
    ("calibration_images", int, "training images that ranges are calibrated on"),
)
_PRUNING = (
    ("ratio_weight", float, "of the share of patches kept, in the loss"),
    ("distill", float, "weight of the teacher's classes, and again of its tokens"),
    ("own_rate", float, "part of --lr for what comes from the teacher"),
    ("own_since", float, "fraction of epochs before that is trained"),
    ("depth_rate", float, "of stochastic depth, in the last block"),
)
_SWITCHES = ("augment", "amp")
_TRAINING = (*(name for name, _, _ in (*_LOOP, *_INT8)), "learn_scales", *_SWITCHES)
_FLAGS = {"amp": "--no-amp", "threads": "--data-threads"}
_OTHERS = ("val_data", "device", "max_corrupt", "threads", "tensorboard")


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what calibration and training have in common."""
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--weight-bits", type=int, default=8, metavar="8|4", help="of weights (default: 8)"
    )
    group.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="of 4 bits: so many weights share a factor of their channel's scale (default: all)",
    )
    group.add_argument(
        "--keep-float",
        action="append",
        default=[],
        metavar="NAME|auto:K",
        help="a layer to leave in float, or the K that int8 alone hurts most; may be repeated",
    )
    group.add_argument(
        "--int8-filter",
        dest="int8_filters",
        action="append",
        default=[],
        metavar="NAME|auto",
        help="a global filter to compute in int8, as a circular convolution, or those that bear it "
        "where that form is the faster one; may be repeated (default: none)",
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
    for name, kind, text in (*_LOOP, *_INT8):
        text = f"{text}; 0 calibrates only" if name == "epochs" else text
        _add_number(group, name, kind, f"{text} (default: {getattr(default, name)})")
    group.add_argument(
        "--learn-scales",
        action="store_true",
        default=None,
        help="learned step sizes (LSQ) for every range",
    )
    _add_common(group)


def add_finetuning_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of fine-tuning, which are as published where they are not given."""
    from gfcompile.compile.finetuning import published_values

    group = parser.add_argument_group("training (defaults are those published with the model)")
    group.add_argument(
        "--train-data",
        type=Path,
        metavar="DIR|CSV",
        required=True,
        help="a folder of images per class, or a CSV of paths and labels",
    )
    group.add_argument("--val-data", type=Path, metavar="DIR|CSV", help="to report top-1 on")
    for name, kind, text in (*_LOOP, *_PRUNING):
        by_model = " or ".join(f"{value:.4g}" for value in published_values(name))
        default = "1e-3 for 1024 images a batch" if name == "lr" else by_model
        _add_number(group, name, kind, f"{text} (default: {default})")
    _add_common(group)


def _add_number(
    group: "argparse._ArgumentGroup", name: str, kind: type[int] | type[float], text: str
) -> None:
    group.add_argument(
        f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=text
    )


def _add_common(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--augment",
        choices=get_args(Augment),
        help=f"random crops, and mirror images (default: {TrainConfig().augment})",
    )
    group.add_argument(
        "--device", metavar="auto|cpu|cuda", help="to train on (default: a GPU if there is one)"
    )
    group.add_argument(
        "--no-amp",
        dest="amp",
        action="store_false",
        default=None,
        help="float32 on a GPU, not bfloat16",
    )
    group.add_argument(
        "--max-corrupt",
        type=natural_int,
        metavar="N",
        help="unreadable images to pass over (default: 10)",
    )
    group.add_argument(
        "--data-threads",
        dest="threads",
        type=positive_int,
        metavar="N",
        help="that read images (default: 4)",
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
    elif getattr(options, "precision", "int8") != "int8":
        raise UserError("--train-data trains for --int8; add it")
    elif getattr(options, "calibration_data", None) is not None:
        raise UserError("--train-data calibrates on its own images; leave out --calibration-data")


def quantize_config(options: argparse.Namespace, output: Path | None) -> "QuantizeConfig":
    """What the options ask for."""
    from gfcompile.compile.quantization import QuantizeConfig

    return QuantizeConfig(
        model=options.model,
        checkpoint=options.checkpoint,
        train_data=options.train_data,
        output=output,
        image_size=options.image_size,
        num_classes=options.num_classes,
        keep_ratio=options.keep_ratio,
        weight_bits=options.weight_bits,
        group_size=options.group_size,
        keep_float=tuple(options.keep_float),
        int8_filters=tuple(options.int8_filters),
        training=TrainConfig(seed=options.seed, **_given(options, _TRAINING)),  # type: ignore[arg-type]
        **_given(options, _OTHERS),  # type: ignore[arg-type]
    )


def finetune_config(options: argparse.Namespace) -> "FinetuneConfig":
    """What the options ask for.

    Raises:
        UserError: the model prunes nothing, or an option cannot be.
    """
    from gfcompile.compile.finetuning import FinetuneConfig, published_training

    names = [name for name, _, _ in (*_LOOP, *_PRUNING)]
    changes = _given(options, (*names, *_SWITCHES))
    return FinetuneConfig(
        model=options.model,
        teacher=options.teacher,
        train_data=options.train_data,
        output=options.output,
        image_size=options.image_size,
        num_classes=options.num_classes,
        keep_ratio=options.keep_ratio,
        training=published_training(options.model, seed=options.seed, **changes),
        **_given(options, _OTHERS),  # type: ignore[arg-type]
    )


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, object]:
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
