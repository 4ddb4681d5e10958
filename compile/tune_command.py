"""`gfcompile tune`: a model and a device in, a tuning database out."""

import argparse
import math
from pathlib import Path

from gfcompile.compile.command_line import positive_int, print_table, seed_int
from gfcompile.compile.shape_options import add_shape_arguments
from gfcompile.compile.tuning_config import DEFAULT_TRIALS, TuneConfig
from gfcompile.runtime.devices import ADDRESSES


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="one of `gfcompile models`")
    parser.add_argument("--target", required=True, help="one of `gfcompile targets`")
    precision = parser.add_mutually_exclusive_group()
    for flag, value in (("--int8", "int8"), ("--fp16", "float16")):
        precision.add_argument(
            flag,
            dest="precision",
            action="store_const",
            const=value,
            default="float32",
            help=f"tune the {value} kernels",
        )
    add_shape_arguments(parser)
    parser.add_argument(
        "--device",
        metavar="WHERE",
        help=f"{ADDRESSES}; qemu counts instructions (default: local if this machine runs the "
        "target's code, else an estimate)",
    )
    parser.add_argument(
        "--trials",
        type=positive_int,
        metavar="N",
        help=f"candidates to try, of all kernels together (default: {DEFAULT_TRIALS})",
    )
    parser.add_argument(
        "--minutes", type=_positive_float, metavar="M", help="how long to search at most"
    )
    parser.add_argument(
        "--tuning-db",
        type=Path,
        metavar="FILE",
        help="where findings go, and where an earlier search goes on (default: tuning-TARGET.json)",
    )
    parser.add_argument(
        "--seed", type=seed_int, default=0, metavar="N", help="of whatever is random"
    )
    parser.add_argument("--quiet", action="store_true", help="print only the database's path")


def tune_command(options: argparse.Namespace) -> None:
    """Searches, and prints each kernel's best."""
    from gfcompile.compile.progress import ConsoleProgress, SilentProgress
    from gfcompile.compile.tuning import tune_model
    from gfcompile.compile.tuning_progress import ConsoleTrials

    config = tune_config(options)
    progress = SilentProgress() if options.quiet else ConsoleProgress()
    with ConsoleTrials(quiet=options.quiet) as trials:
        try:
            tuned = tune_model(config, progress, trials)
        except KeyboardInterrupt:
            found = f"{config.path} has what" if config.path.exists() else "nothing better"
            raise KeyboardInterrupt(f"{found} was found; the same command goes on") from None
    if options.quiet:
        print(tuned.path)
        return
    estimated = "" if tuned.how == "measured" else " (static: an estimate, nothing was measured)"
    print(f"\n{config.model} for {config.target}, {tuned.how} on {tuned.device}{estimated}")
    print_table(
        ("kernel", "calls", "default", "best", "trials", "failed"),
        [
            (
                finding.name,
                str(finding.uses),
                f"{finding.default_cost:.4g} {finding.unit}",
                f"{finding.ratio:.3f}",
                str(finding.trials),
                str(finding.failed),
            )
            for finding in tuned.findings
        ],
        right={1, 2, 3, 4, 5},
    )
    print(f"all of them: {tuned.ratio:.3f} of the default's {tuned.findings[0].unit}")
    print(f"{tuned.path}")
    print(f"next: {config.next_command}")


def tune_config(options: argparse.Namespace) -> TuneConfig:
    """What the arguments ask for."""
    return TuneConfig(
        model=options.model,
        target=options.target,
        precision=options.precision,
        image_size=options.image_size,
        num_classes=options.num_classes,
        keep_ratio=options.keep_ratio,
        batch=options.batch,
        device=options.device,
        trials=options.trials,
        minutes=options.minutes,
        database=options.tuning_db,
        seed=options.seed,
    )


def _positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number
