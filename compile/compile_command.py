"""`gfcompile compile`, the command where none is named: a model in, a bundle out."""

import argparse
import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfcompile.compile.command_line import (
    console_progress,
    count,
    is_first_process,
    print_table,
    seed_int,
)
from gfcompile.compile.shape_options import add_shape_arguments
from gfcompile.compile.training_commands import train_for_int8
from gfcompile.compile.training_options import (
    add_quantization_arguments,
    add_training_arguments,
    check_training_arguments,
)

if TYPE_CHECKING:
    from gfcompile.compile.bundle import Bundle
    from gfcompile.runtime.bundle import Manifest
    from gfcompile.targets.target import AnyTarget


def compile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="one of `gfcompile models`")
    parser.add_argument("--target", required=True, help="one of `gfcompile targets`")
    precision = parser.add_mutually_exclusive_group()
    for flag, value, text in (
        ("--int8", "int8", "quantize to int8"),
        (
            "--fp16",
            "float16",
            "float16 weights, and products where the CPU has such (ARM, model formats)",
        ),
        ("--fp32", "float32", "store and compute in float32 (the default but for coreml)"),
    ):
        precision.add_argument(flag, dest="precision", action="store_const", const=value, help=text)
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="trained weights (default: random)"
    )
    add_shape_arguments(parser)
    parser.add_argument(
        "--fft",
        choices=("auto", "dft", "circular"),
        default="auto",
        help="form of the global filters (default: the cheapest on the target, per layer)",
    )
    parser.add_argument(
        "--calibration-data",
        type=Path,
        metavar="DIR",
        help="images to calibrate int8 on, up to 512 of them (default: four photos, as a stand-in)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: MODEL-TARGET-PRECISION[-batchN]"
    )
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write each stage's ONNX there")
    parser.add_argument(
        "--seed", type=seed_int, default=0, metavar="N", help="of random weights, and of a training"
    )
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names, one per line")
    tflite = parser.add_argument_group("tflite")
    tflite.add_argument(
        "--interface",
        choices=("float32", "int8", "uint8"),
        default="float32",
        help="dtype of input and output; the integer ones go with --int8 (default: float32)",
    )
    tflite.add_argument(
        "--input",
        choices=("tensor", "uint8-image"),
        help="uint8-image: the model takes pixels and normalizes them (default: tensor; for "
        "coreml uint8-image, of one image at a time)",
    )
    coreml = parser.add_argument_group("coreml")
    coreml.add_argument(
        "--ios",
        type=int,
        choices=(15, 16, 17, 18),
        default=17,
        help="the oldest system that is to load the package, or its macOS (default: 17)",
    )
    coreml.add_argument(
        "--layout",
        choices=("ane", "plain"),
        default="ane",
        help="ane: channels first, as the Neural Engine likes it; plain: as the graph is",
    )
    coreml.add_argument("--license", default="", metavar="TEXT", help="for the licence field")
    parser.add_argument(
        "--tuning-db",
        type=_tuning_db,
        default="shipped",
        metavar="FILE",
        help="what `gfcompile tune` found, used before what gfcompile ships; none: neither",
    )
    parser.add_argument("--no-cache", action="store_true", help="build everything, keep nothing")
    parser.add_argument("--quiet", action="store_true", help="print only the bundle's path")
    add_quantization_arguments(parser)
    add_training_arguments(parser, required=False)


def _tuning_db(text: str) -> Path | str:
    return text if text in ("shipped", "none") else Path(text)


def compile_command(options: argparse.Namespace) -> None:
    """Compiles, after a training if images for one are given, and prints what came of it."""
    # Light until it compiles: a mistake in the arguments is answered before torch and TVM load.
    from gfcompile.compile.pipeline import CompileConfig, check_config, compile_model
    from gfcompile.targets.coreml.options import CoremlOptions
    from gfcompile.targets.target import find_target
    from gfcompile.targets.tflite.options import TfliteOptions

    started = time.perf_counter()
    progress = console_progress(quiet=options.quiet)
    check_training_arguments(options)
    is_coreml = options.target == "coreml"
    # Core ML takes an image one at a time; asked for in so many words, that is refused.
    takes_tensor = options.input == "tensor" or (options.input is None and options.batch > 1)
    config = CompileConfig(
        model=options.model,
        target=options.target,
        precision=options.precision,
        checkpoint=options.checkpoint,
        image_size=options.image_size,
        num_classes=options.num_classes,
        keep_ratio=options.keep_ratio,
        batch=options.batch,
        fft=options.fft,
        calibration_data=options.calibration_data,
        weight_bits=options.weight_bits,
        group_size=options.group_size,
        keep_float=tuple(options.keep_float),
        int8_filters=tuple(options.int8_filters),
        output=options.output,
        dump=options.dump,
        labels=options.labels,
        seed=options.seed,
        tflite=TfliteOptions(
            interface=options.interface, input="tensor" if is_coreml else options.input or "tensor"
        ),
        coreml=CoremlOptions(
            ios=options.ios,
            layout=options.layout,
            input="tensor" if is_coreml and takes_tensor else "image",
            license=options.license,
        ),
        tuning_db=options.tuning_db,
        cache=not options.no_cache,
    )
    if options.train_data is not None:
        check_config(config)  # what is wrong with it is better said before hours of training
        checkpoint = train_for_int8(options, progress, output=None).path
        if not is_first_process():
            return
        # The rest is as the checkpoint says.
        config = dataclasses.replace(
            config,
            checkpoint=checkpoint,
            weight_bits=8,
            group_size=None,
            keep_float=(),
            int8_filters=(),
        )
    bundle = compile_model(config, progress)
    took = time.perf_counter() - started
    if options.quiet:
        print(bundle.path)
    else:
        _print_bundle(bundle, find_target(options.target), progress.notes, took)


def _print_bundle(bundle: "Bundle", target: "AnyTarget", notes: Sequence[str], took: float) -> None:
    from gfcompile.compile.format_summary import format_summary

    manifest = bundle.manifest
    precision = manifest.precision
    print(f"\n{manifest.model} for {target.name}: {target.description}")
    print(f"  weights    {manifest.weights}")
    print(f"  precision  requested {precision.requested}, stored as {precision.storage},")
    print(f"             computed as {precision.compute}")
    for note in dict.fromkeys([*manifest.notes, *notes]):
        print(f"  note       {note}")
    if manifest.batch > 1:
        print(f"  batch      {manifest.batch} images per inference")
    _print_estimate(manifest)
    if manifest.ledger:
        print()
        _print_ledger(manifest.ledger)
    for line in format_summary(manifest):
        print(line)
    files = len(manifest.files) + 1
    print(f"\n{bundle.path}: {bundle.size_bytes / 1e6:.1f} MB in {files} files, {took:.1f} s")
    print(f"next: {_next_step(bundle, target)}")


def _print_estimate(manifest: "Manifest") -> None:
    """What an inference would take, and the kernels that would take the most of it."""
    from gfcompile.runtime.report.html import duration
    from gfcompile.runtime.report.kernels import kernels_of

    kernels = kernels_of(manifest, None)
    if kernels.estimate_us is None:
        return
    each = duration(kernels.estimate_us / manifest.batch)
    several = "" if manifest.batch == 1 else f", {each} per image"
    print(
        f"  estimate   {duration(kernels.estimate_us)} per inference{several}, not measured; of it"
    )
    for kernel in kernels.all[:3]:
        assert kernel.estimate is not None
        print(
            f"             {duration(kernel.estimate_us):>8}  {kernel.name}, "
            f"{count(kernel.calls, 'call')}, bound by {kernel.estimate.bound}"
        )


def _print_ledger(ledger: Sequence[Mapping[str, Any]]) -> None:
    print_table(
        ("stage", "against", "max abs error", "SQNR dB", "same top-1", "images", "run by"),
        [
            (
                str(entry["stage"]),
                str(entry["against"]),
                f"{entry['max_abs_error']:.3g}",
                "equal" if entry["sqnr_db"] is None else f"{entry['sqnr_db']:.1f}",
                f"{entry['top1_agreement']:.0%}",
                str(entry["images"]),
                str(entry["how"]),
            )
            for entry in ledger
        ],
        right={2, 3, 4, 5},
    )
    for entry in ledger:
        int8 = entry.get("int8")
        if int8 is not None:
            # A count: 8 of ten million would round to 100%.
            other = round((1 - int8["equal"]) * int8["values"])
            print(
                f"{entry['stage']}: {other:,} of {int8['values']:,} int8 activations differ, by "
                f"{count(int8['max_steps'], 'step')} at most; "
                f"logits by {int8['logits_max_steps']:.2f} steps at most"
            )


def _next_step(bundle: "Bundle", target: "AnyTarget") -> str:
    import platform

    from gfcompile.targets.target import ModelFormat

    path = shlex.quote(str(bundle.path))
    if isinstance(target, ModelFormat):
        return f"gfcompile run {path} PHOTO"
    if target.gpu is not None:
        return f"gfcompile validate {path} --device ssh://USER@BOARD"
    if target.cpu.android_api is not None:
        return f"gfcompile validate {path} --device adb://SERIAL"
    if target.cpu.arch == platform.machine():
        return f"gfcompile run {path} PHOTO"
    return f"gfcompile run {path} PHOTO --device qemu"
