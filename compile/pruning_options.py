"""The argument of the commands that take a pruning model."""

import argparse

from gfcompile.compile.models import KeepRatio


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
