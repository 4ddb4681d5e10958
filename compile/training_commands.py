"""`gfcompile quantize` and `gfcompile finetune`: weights and images in, a checkpoint out."""

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gfcompile.compile.command_line import (
    console_progress,
    is_first_process,
    print_table,
    seed_int,
)
from gfcompile.compile.shape_options import add_keep_ratio
from gfcompile.compile.training_options import (
    add_finetuning_arguments,
    add_quantization_arguments,
    add_training_arguments,
    finetune_config,
    quantize_config,
)

if TYPE_CHECKING:
    from gfcompile.compile.progress import Progress
    from gfcompile.compile.quantization import Quantized
    from gfcompile.compile.training_job import TrainingJob


def quantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="one of `gfcompile models`")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="trained float weights")
    add_keep_ratio(parser)
    parser.add_argument("--image-size", type=int, metavar="N", help="default: the checkpoint's")
    parser.add_argument("--num-classes", type=int, metavar="N", help="default: the checkpoint's")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: MODEL-intBITS.safetensors"
    )
    parser.add_argument(
        "--analyze", action="store_true", help="only show what int8 costs, layer by layer"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="of --analyze (default: MODEL-sensitivity.svg)"
    )
    parser.add_argument("--seed", type=seed_int, default=0, metavar="N", help="of order and crops")
    parser.add_argument("--quiet", action="store_true", help="print only the checkpoint's path")
    add_quantization_arguments(parser)
    add_training_arguments(parser, required=True)


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="one of `gfcompile models` that does not keep all patches"
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        metavar="FILE",
        required=True,
        help="trained weights of the model that prunes nothing, which is what training starts from",
    )
    add_keep_ratio(parser)
    parser.add_argument("--image-size", type=int, metavar="N", help="default: the teacher's")
    parser.add_argument("--num-classes", type=int, metavar="N", help="default: the teacher's")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: MODEL-pruned.safetensors"
    )
    parser.add_argument(
        "--seed", type=seed_int, default=0, metavar="N", help="of whatever is random"
    )
    parser.add_argument("--quiet", action="store_true", help="print only the checkpoint's path")
    add_finetuning_arguments(parser)


def quantize_command(options: argparse.Namespace) -> None:
    """Writes the checkpoint, or only the costs of int8, and prints what they are."""
    progress = console_progress(quiet=options.quiet)
    if options.analyze:
        _analyze(options, progress)
        return
    quantized = train_for_int8(options, progress, output=options.output)
    if not is_first_process():
        return
    if options.quiet:
        print(quantized.path)
        return
    for name, reason in quantized.kept_float:
        print(f"  kept in float: {name}: {reason}")
    for note in progress.notes:
        print(f"  note: {note}")
    if quantized.float_top1 is not None and quantized.top1 is not None:
        print(f"  top-1: float {quantized.float_top1:.2%}, quantized {quantized.top1:.2%}")
    print(f"{quantized.path}: {quantized.path.stat().st_size / 1e6:.1f} MB")
    print(
        f"next: gfcompile --model {options.model} --target TARGET --int8 "
        f"--checkpoint {shlex.quote(str(quantized.path))}"
    )


def finetune_command(options: argparse.Namespace) -> None:
    """Writes the checkpoint and prints what it is worth."""
    from gfcompile.compile.finetuning import finetune_model
    from gfcompile.compile.training_progress import ConsoleTraining

    progress = console_progress(quiet=options.quiet)
    config = finetune_config(options)
    shown = None if options.quiet else ConsoleTraining(config.training.epochs)
    with _resumable(config):
        finetuned = finetune_model(config, progress, shown)
    if not is_first_process():
        return
    if options.quiet:
        print(finetuned.path)
        return
    for note in progress.notes:
        print(f"  note: {note}")
    if finetuned.teacher_top1 is not None and finetuned.top1 is not None:
        print(f"  top-1: teacher {finetuned.teacher_top1:.2%}, pruned {finetuned.top1:.2%}")
    print(f"{finetuned.path}: {finetuned.path.stat().st_size / 1e6:.1f} MB")
    print(
        f"next: gfcompile --model {options.model} --target TARGET "
        f"--checkpoint {shlex.quote(str(finetuned.path))}, or gfcompile quantize with it"
    )


def train_for_int8(
    options: argparse.Namespace, progress: "Progress", *, output: Path | None
) -> "Quantized":
    """Trains for int8 and writes the quantized checkpoint."""
    from gfcompile.compile.quantization import quantize_model
    from gfcompile.compile.training_progress import ConsoleTraining

    config = quantize_config(options, output)
    shown = None if options.quiet else ConsoleTraining(config.training.epochs)
    with _resumable(config):
        return quantize_model(config, progress, shown)


def _analyze(options: argparse.Namespace, progress: "Progress") -> None:
    from gfcompile.compile.quantization import ANALYSED_IMAGES, analyze_model
    from gfcompile.quantize.sensitivity_plot import plot

    results = analyze_model(quantize_config(options, options.output), progress)
    print_table(
        ("quantized alone", "what", "SQNR dB", "loss", "same top-1"),
        [
            (r.name, r.kind, f"{r.sqnr_db:.1f}", f"{r.loss:.2e}", f"{r.top1_agreement:.1%}")
            for r in results
        ],
        right={2, 3, 4},
    )
    path = options.plot or Path(f"{options.model}-sensitivity.svg")
    path.write_text(plot(results, title=f"{options.model}: loss of quantizing one layer alone"))
    print(
        f"\nover up to {ANALYSED_IMAGES} images; filters stay in float unless --int8-filter makes "
        f"circular int8 of them\n{path}: the plot"
    )


@contextmanager
def _resumable(job: "TrainingJob") -> Iterator[None]:
    """An interrupted training says how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if not job.state_path.exists():
            raise
        raise KeyboardInterrupt(f"the same command goes on from {job.state_path}") from None
