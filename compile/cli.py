"""The `gfcompile` command: arguments in, a bundle or one clear line out.

The only place that prints and exits.
"""

import argparse
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gfcompile import __version__
from gfcompile.compile import interruption
from gfcompile.compile.device_commands import (
    profile_arguments,
    profile_command,
    validate_arguments,
    validate_command,
)
from gfcompile.compile.pruning_options import add_keep_ratio
from gfcompile.compile.report_commands import (
    compare_arguments,
    compare_command,
    report_arguments,
    report_command,
)
from gfcompile.compile.tables import print_table
from gfcompile.compile.training_options import (
    add_finetuning_arguments,
    add_quantization_arguments,
    add_training_arguments,
    check_training_arguments,
    finetune_config,
    quantize_config,
)
from gfcompile.compile.tuning_options import add_tuning_arguments, tune_config
from gfcompile.runtime.errors import GfcompileError, UserError

if TYPE_CHECKING:
    from gfcompile.compile.bundle import Bundle
    from gfcompile.compile.progress import Progress
    from gfcompile.compile.quantization import Quantized
    from gfcompile.compile.training_job import TrainingJob
    from gfcompile.runtime.bundle import Manifest
    from gfcompile.targets.target import AnyTarget, Target

_EPILOG = """\
examples:
  gfcompile --model gfnet_xs --target jetson-tx2 --int8
  gfcompile --model gfnet_xs --target host --checkpoint gfnet-xs.pth --output classifier
  gfcompile run classifier photo.jpg
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    0 done, 1 it could not be done or a demand was missed, 2 it was asked for wrongly, 3 a device
    could not be asked, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        with interruption.ending_by_signal():
            options = _parse(arguments)
            code: int | None = options.command(options)
            sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt as interrupt:
        return _interrupted(str(interrupt))
    except GfcompileError as error:
        _raise_again_if(debug)
        _complain(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has enough; Python must not complain again while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError) as error:
        _raise_again_if(debug)
        _complain(f"error: {_system_failure(error)}")
        return 1
    except Exception as error:
        _raise_again_if(debug)
        if interruption.came():  # a library has made an error of it
            return _interrupted("")
        _complain(
            f"internal error: {type(error).__name__}: {_one_line(str(error))} "
            "(--debug shows where; please report it)"
        )
        return 1


def _interrupted(what_is_left: str) -> int:
    """Says so, and returns the exit code."""
    _complain(f"interrupted; {what_is_left or 'nothing was written'}")
    return 128 + (interruption.came() or signal.SIGINT)


def _compile(options: argparse.Namespace) -> None:
    # Light until it compiles: a mistake in the arguments is answered before torch and TVM load.
    from gfcompile.compile.pipeline import CompileConfig, check_batch, compile_model
    from gfcompile.compile.progress import ConsoleProgress, SilentProgress
    from gfcompile.targets.coreml.options import CoremlOptions
    from gfcompile.targets.target import find_target
    from gfcompile.targets.tflite.options import TfliteOptions

    started = time.perf_counter()
    quiet = options.quiet or not _is_first_process()
    progress = SilentProgress() if quiet else ConsoleProgress()
    check_training_arguments(options)
    check_batch(options.batch)
    if options.train_data is not None:
        find_target(options.target)
        options.checkpoint = _train(options, progress, output=None).path
        if not _is_first_process():
            return
        # As the checkpoint says.
        options.weight_bits, options.group_size = 8, None
        options.keep_float, options.int8_filters = [], []
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
    bundle = compile_model(config, progress)
    took = time.perf_counter() - started
    if options.quiet:
        print(bundle.path)
    else:
        notes = progress.notes if isinstance(progress, ConsoleProgress) else []
        _print_bundle(bundle, find_target(options.target), notes, took)


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
    count = len(manifest.files) + 1
    print(f"\n{bundle.path}: {bundle.size_bytes / 1e6:.1f} MB in {count} files, {took:.1f} s")
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
            f"{_count(kernel.calls, 'call')}, bound by {kernel.estimate.bound}"
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
                f"{_count(int8['max_steps'], 'step')} at most; "
                f"logits by {int8['logits_max_steps']:.2f} steps at most"
            )


def _next_step(bundle: "Bundle", target: "AnyTarget") -> str:
    import platform

    from gfcompile.targets.target import ModelFormat

    if isinstance(target, ModelFormat):
        return f"gfcompile run {bundle.path} PHOTO"
    if target.gpu is not None:
        return f"gfcompile validate {bundle.path} --device ssh://USER@BOARD"
    if target.cpu.android_api is not None:
        return f"gfcompile validate {bundle.path} --device adb://SERIAL"
    if target.cpu.arch == platform.machine():
        return f"gfcompile run {bundle.path} PHOTO"
    return f"gfcompile run {bundle.path} PHOTO --device qemu"


def _quantize(options: argparse.Namespace) -> None:
    from gfcompile.compile.progress import ConsoleProgress, SilentProgress

    quiet = options.quiet or not _is_first_process()
    progress = SilentProgress() if quiet else ConsoleProgress()
    if options.analyze:
        _analyze(options, progress)
        return
    quantized = _train(options, progress, output=options.output)
    if not _is_first_process():
        return
    if options.quiet:
        print(quantized.path)
        return
    for name, reason in quantized.kept_float:
        print(f"  kept in float: {name}: {reason}")
    for note in progress.notes if isinstance(progress, ConsoleProgress) else ():
        print(f"  note: {note}")
    if quantized.float_top1 is not None and quantized.top1 is not None:
        print(f"  top-1: float {quantized.float_top1:.2%}, quantized {quantized.top1:.2%}")
    print(f"{quantized.path}: {quantized.path.stat().st_size / 1e6:.1f} MB")
    print(
        f"next: gfcompile --model {options.model} --target TARGET --int8 "
        f"--checkpoint {quantized.path}"
    )


def _train(
    options: argparse.Namespace, progress: "Progress", *, output: Path | None
) -> "Quantized":
    """Trains for int8 and writes the quantized checkpoint."""
    from gfcompile.compile.quantization import quantize_model
    from gfcompile.compile.training_progress import ConsoleTraining

    config = quantize_config(options, output)
    shown = None if options.quiet else ConsoleTraining(config.training.epochs)
    with _resumable(config):
        return quantize_model(config, progress, shown)


def _finetune(options: argparse.Namespace) -> None:
    from gfcompile.compile.finetuning import finetune_model
    from gfcompile.compile.progress import ConsoleProgress, SilentProgress
    from gfcompile.compile.training_progress import ConsoleTraining

    quiet = options.quiet or not _is_first_process()
    progress = SilentProgress() if quiet else ConsoleProgress()
    config = finetune_config(options)
    shown = None if options.quiet else ConsoleTraining(config.training.epochs)
    with _resumable(config):
        finetuned = finetune_model(config, progress, shown)
    if not _is_first_process():
        return
    if options.quiet:
        print(finetuned.path)
        return
    for note in progress.notes if isinstance(progress, ConsoleProgress) else ():
        print(f"  note: {note}")
    if finetuned.teacher_top1 is not None and finetuned.top1 is not None:
        print(f"  top-1: teacher {finetuned.teacher_top1:.2%}, pruned {finetuned.top1:.2%}")
    print(f"{finetuned.path}: {finetuned.path.stat().st_size / 1e6:.1f} MB")
    print(
        f"next: gfcompile --model {options.model} --target TARGET --checkpoint {finetuned.path}, "
        "or gfcompile quantize with it"
    )


def _tune(options: argparse.Namespace) -> None:
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


@contextmanager
def _resumable(job: "TrainingJob") -> Iterator[None]:
    """An interrupted training says how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if not job.state_path.exists():
            raise
        raise KeyboardInterrupt(f"the same command goes on from {job.state_path}") from None


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


def _is_first_process() -> bool:
    """Under torchrun, whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def _run(options: argparse.Namespace) -> None:
    from gfcompile.runtime.session import load

    results = []
    with load(
        options.bundle,
        device=options.device,
        threads=options.threads,
        compute_units=options.compute_units,
    ) as session:
        weights = session.manifest.weights
        if weights.startswith("random"):
            _complain(f"note: weights are {weights}, the classes mean nothing")
        batch = session.batch
        for start in range(0, len(options.images), batch):
            photos = options.images[start : start + batch]
            tops = session.classify_all(photos, top=options.top)
            timed: dict[str, Any] = {}
            if session.stand_in:
                took = session.stand_in
                timed["stand_in"] = session.stand_in
            elif options.device == "qemu":
                took = "under qemu: what the device computes, not how fast"
            else:
                # The images' own values: what they are can matter to the time, as zeros do.
                latency = session.benchmark(session.encode(*photos))
                each = "" if batch == 1 else f" per image, {latency.median_ms:.2f} ms for {batch}"
                took = (
                    f"{latency.median_ms / batch:.2f} ms{each}, median of {latency.runs} runs "
                    f"on {_count(options.threads, 'thread')}"
                )
                timed |= {
                    "median_ms": latency.median_ms,
                    "median_ms_per_image": latency.median_ms / batch,
                    "runs": latency.runs,
                }
            for image, top in zip(photos, tops, strict=True):
                results.append(
                    {
                        "image": str(image),
                        "weights": weights,
                        "device": options.device,
                        "batch": batch,
                        "top": [
                            {"index": i, "label": label, "probability": p} for i, label, p in top
                        ],
                        **timed,
                    }
                )
                if not options.json:
                    print(f"{image}: {took}")
                    for index, label, probability in top:
                        print(f"  {probability:6.1%}  {index:4d}  {label}")
    if options.json:
        print(json.dumps(results, indent=2))


def _models(options: argparse.Namespace) -> None:
    from gfcompile.compile.models import model_names, model_spec

    specs = [model_spec(name) for name in model_names()]
    if options.json:
        sizes = ("name", "image_size", "num_classes", "parameters", "macs", "top1_percent")
        keys = (*sizes, "keep_ratios", "kept_patches", "parent")
        rows = [{key: getattr(s, key) for key in keys} | {"paper": str(s.paper)} for s in specs]
        print(json.dumps(rows, indent=2))
        return
    print_table(
        ("model", "size", "parameters", "MACs", "patches kept", "top-1 as published"),
        [
            (
                spec.name,
                str(spec.image_size),
                f"{spec.parameters / 1e6:.2f} M",
                f"{spec.macs / 1e9:.2f} G",
                " ".join(map(str, spec.kept_patches)) or "all",
                "-" if spec.top1_percent is None else f"{spec.top1_percent:.1f}%",
            )
            for spec in specs
        ],
        right={1, 2, 3, 4, 5},
    )
    for paper in dict.fromkeys(str(spec.paper) for spec in specs):
        print(f"\n{paper}")


def _targets(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from gfcompile.targets.target import AnyTarget, all_targets, find_target

    targets: list[AnyTarget] = list(all_targets())
    try:
        targets.insert(0, find_target("host"))
    except UserError as error:  # not a machine that we compile for; the others are listed
        _complain(f"note: {error}")
    if options.json:
        print(json.dumps([asdict(target) for target in targets], indent=2))
        return
    for target in targets:
        print(_describe_target(target))


def _describe_target(target: "AnyTarget") -> str:
    from gfcompile.targets.target import Target

    machine = f"    {_describe_machine(target)}\n" if isinstance(target, Target) else ""
    return (
        f"{target.name}\n"
        f"    {target.description}\n"
        f"{machine}"
        f"    --int8: {target.int8_compute};\n"
        f"            {target.int8_note}"
    )


def _describe_machine(target: "Target") -> str:
    cpu, gpu = target.cpu, target.gpu
    isa = " ".join([cpu.arch, cpu.mcpu, *(f for f in cpu.features if f.startswith("+"))])
    if gpu is not None:
        isa = f"{gpu.arch}, PTX {gpu.ptx_isa}; {isa}"
        peaks = (
            f"{gpu.sms} SM at {gpu.clock_ghz:.2f} GHz: fp32 {gpu.fp32_tflops:.2f} TFLOP/s, "
            f"int8 {gpu.int8_tops:.2f} TOP/s"
        )
    else:
        peaks = (
            f"{cpu.cores} cores at {cpu.clock_ghz:.2f} GHz: fp32 {cpu.fp32_gflops:.0f} GFLOP/s, "
            f"int8 {cpu.int8_gops:.0f} GOP/s each"
        )
    return f"{isa}\n    {peaks}; memory {target.bandwidth_gb_s:.1f} GB/s"


class _Parser(argparse.ArgumentParser):
    """One line per mistake, by the same way out as every other error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{_one_line(message)}; see {self.prog} --help")


_COMMANDS: dict[str, tuple[str, Callable[[argparse.Namespace], int | None]]] = {
    "compile": ("compile a model to a bundle (what is done if no command is named)", _compile),
    "quantize": ("train a model for int8, and write a quantized checkpoint", _quantize),
    "finetune": ("train a model to drop patches, from its parent's weights", _finetune),
    "tune": ("search for faster kernels on a device, into a tuning database", _tune),
    "run": ("classify images with a bundle", _run),
    "validate": ("measure a bundle on a device, against a budget", validate_command),
    "profile": ("time each kernel of a bundle on a device", profile_command),
    "report": ("write a page about a bundle, measured or estimated", report_command),
    "compare": ("put bundles and results side by side", compare_command),
    "models": ("list the models", _models),
    "targets": ("list the targets, and what int8 means there", _targets),
}


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="gfcompile",
        description="Compiles spectral and token-pruned vision models for edge devices.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gfcompile {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (text, function) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(command=function)
        _ADD_ARGUMENTS[name](command)
    if not arguments:
        arguments = ["--help"]
    elif arguments[0] not in (*_COMMANDS, "--version", "-h", "--help"):
        # `gfcompile --model ...` is the main use and goes without a command; but a lone word was
        # meant as one.
        if not arguments[0].startswith("-"):
            raise UserError(_unknown_command(arguments[0]))
        arguments = ["compile", *arguments]
    return parser.parse_args(arguments)


def _compile_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--image-size", type=int, metavar="N", help="default: the model's own")
    parser.add_argument("--num-classes", type=int, metavar="N", help="default: the model's own")
    add_keep_ratio(parser)
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="images per inference (default: 1)"
    )
    parser.add_argument(
        "--fft",
        choices=("auto", "native", "dft", "circular"),
        default="auto",
        help="form of the global filters (default: the cheapest on the target, per layer)",
    )
    parser.add_argument(
        "--calibration-data",
        type=Path,
        metavar="DIR",
        help="images to calibrate int8 on (default: four photos, as a stand-in)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: MODEL-TARGET-PRECISION"
    )
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write each stage's ONNX there")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights")
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


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of order and crops")
    parser.add_argument("--quiet", action="store_true", help="print only the checkpoint's path")
    add_quantization_arguments(parser)
    add_training_arguments(parser, required=True)


def _finetune_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of whatever is random")
    parser.add_argument("--quiet", action="store_true", help="print only the checkpoint's path")
    add_finetuning_arguments(parser)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument(
        "--device",
        choices=("local", "qemu"),
        default="local",
        help="qemu runs an arm64 bundle here, to see what it computes and not how fast",
    )
    parser.add_argument("--top", type=_positive, default=5, metavar="N", help="classes to print")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--compute-units",
        choices=("all", "cpu", "cpu-gpu", "cpu-ane"),
        default="all",
        help="what Core ML may use, on a Mac (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


_ADD_ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "compile": _compile_arguments,
    "quantize": _quantize_arguments,
    "finetune": _finetune_arguments,
    "tune": add_tuning_arguments,
    "run": _run_arguments,
    "validate": validate_arguments,
    "profile": profile_arguments,
    "report": report_arguments,
    "compare": compare_arguments,
    "models": _list_arguments,
    "targets": _list_arguments,
}


def _tuning_db(text: str) -> Path | str:
    return text if text in ("shipped", "none") else Path(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _unknown_command(word: str) -> str:
    import difflib

    near = difflib.get_close_matches(word, _COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown command {word!r}{hint} (known: {', '.join(_COMMANDS)})"


def _system_failure(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; nothing was written"
    where = f": {error.filename}" if error.filename is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; nothing was written"
    return f"{error.strerror or _one_line(str(error))}{where}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _complain(text: str) -> None:
    print(f"gfcompile: {text}", file=sys.stderr)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _raise_again_if(debug: bool) -> None:
    if debug:
        raise
