"""The arguments that decide what shapes a model's kernels have."""

import argparse

from gfcompile.compile.models import KeepRatio


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of the commands that make kernels to `parser`."""
    parser.add_argument("--image-size", type=int, metavar="N", help="default: the model's own")
    parser.add_argument("--num-classes", type=int, metavar="N", help="default: the model's own")
    add_keep_ratio(parser)
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="images per inference (default: 1)"
    )


def add_keep_ratio(parser: argparse.ArgumentParser) -> None:
    """Adds --keep-ratio to `parser`."""
    parser.add_argument(
        "--keep-ratio",
        type=_keep_ratio,
        metavar="R[,R...]",
        help="share of the patches that a pruning model keeps, or one share per pruning stage "
        "(default: as published)",
    )


def _keep_ratio(text: str) -> KeepRatio:
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        message = f"{text!r} is no number, nor numbers with commas between"
        raise argparse.ArgumentTypeError(message) from None
    return ratios[0] if len(ratios) == 1 else ratios
