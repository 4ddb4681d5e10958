"""Model files for phones: ours beside litert-torch's and coremltools' own, in one table each.

    python benchmarks/phones.py [--models gfnet_xs ...] [--litert-torch PYTHON] [--quick]
                                [--json FILE]

.tflite files run in LiteRT on one thread, in turn, round after round, and are timed in CPU time of
that thread. litert-torch (2.1 GB) lives in an environment of its own: that of the Python given, or
one in the user's cache, made when it is missing; where neither can be had its rows are left out.
It refuses rfft2, so it is given GFNet's filters as matrix products; coremltools refuses it as well,
and is given the rfftn that it has. Exits with 1 if a bound that it prints is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from cpu import describe_machine, versions
from peer_filters import MatrixFilter, RfftnFilter, with_filters

import gfcompile
from gfcompile.compile import command_line
from gfcompile.compile.models import LoadedModel, load_model
from gfcompile.compile.progress import SilentProgress
from gfcompile.compile.prune import freeze
from gfcompile.runtime.exactness import sqnr_db, top1_agreement
from gfcompile.runtime.images import preprocess, stand_in_photos
from gfcompile.runtime.tflite import TfliteInterpreter

MODELS = ("gfnet_xs", "gfnet_h_ti", "dynamicvit_deit_s")  # the last one as published, at 0.7
BOUND = "gfnet_xs"
MAX_STEPS = 3
MIN_FASTER_CONVERSION = 5.0
MAX_PACKAGE_MB = 18.0
MIN_FEWER_OPERATIONS = 3.0
# Below this a file is another classifier, not a smaller or faster one of the same.
MIN_SQNR_DB = 20.0

LITERT_TORCH = "0.10.0"
PACKAGES = ("gfcompile", "ai-edge-litert", "coremltools", "torch", "numpy")
OURS = "gfcompile"

Array = npt.NDArray[Any]
Precision = Literal["float32", "float16", "int8"]


@dataclass(frozen=True, kw_only=True)
class TfliteRow:
    """One .tflite file.

    Attributes:
        delegated: the share of its operators that XNNPACK has taken.
        off_contract: how far it is from the graph that it must reproduce: int8 activations in
            steps, logits of a float file relative to the largest; None where there is no contract.
        sqnr_db, top1: its logits beside those of the torch model, over four photos.
        median_ms, min_ms: see `interleave`.
        convert_s: CPU time from a program that has its scales to a file; ours from the quantized
            graph, litert-torch's from the quantized torch program.
        all_s: CPU time from the torch module to a file, quantization included; in ours every
            stage is verified in that time, too.
    """

    model: str
    precision: Precision
    made_by: str
    size_mb: float
    operators: int
    delegated: float
    off_contract: float | None
    sqnr_db: float
    top1: float
    median_ms: float
    min_ms: float
    convert_s: float
    all_s: float


@dataclass(frozen=True, kw_only=True)
class PackageRow:
    """One .mlpackage.

    Attributes:
        operations: that are executed.
        own_operations: the same of coremltools' own path, in float16; None if it converts nothing.
        fp16_error: what float16 costs: the logits' largest distance from the graph's over the
            largest logit.
        steps: how far int8 activations are from the graph's, in steps; None without int8.
    """

    model: str
    precision: Precision
    size_mb: float
    operations: int
    own_operations: int | None
    fp16_error: float
    steps: int | None
    convert_s: float


@dataclass(frozen=True, kw_only=True)
class File:
    """A .tflite file, and what is known of it before it runs."""

    precision: Precision
    made_by: str
    content: bytes
    convert_s: float
    all_s: float
    off_contract: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    rounds, repeats = (6, 2) if options.quick else (20, 3)
    models = options.models or ([BOUND] if options.quick else MODELS)
    machine = describe_machine()
    peer = peer_python(options.litert_torch)
    files: list[TfliteRow] = []
    packages: list[PackageRow] = []
    for name in models:
        model = load_model(name, checkpoint=None, image_size=None, num_classes=None, seed=0)
        files += compare_files(name, model, peer, rounds, repeats)
        packages += compare_packages(name, model)
    print(f"{machine['cpu']}, 1 thread, batch 1; load before {machine['load']:.1f}")
    print_files(files)
    print_packages(packages)
    missed = [*missed_by_files(files), *missed_by_packages(packages)]
    if options.json:
        report = {
            "benchmark": "phones",
            "machine": machine,
            "versions": {
                **versions(PACKAGES),
                "litert-torch": LITERT_TORCH if peer else None,
            },
            "bounds": {
                "max_steps": MAX_STEPS,
                "min_faster_conversion": MIN_FASTER_CONVERSION,
                "max_package_mb": MAX_PACKAGE_MB,
                "min_fewer_operations": MIN_FEWER_OPERATIONS,
                "min_sqnr_db": MIN_SQNR_DB,
            },
            "tflite": [asdict(row) for row in files],
            "coreml": [asdict(row) for row in packages],
            "missed": missed,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


# .tflite


def compare_files(
    name: str, model: LoadedModel, peer: Path | None, rounds: int, repeats: int
) -> list[TfliteRow]:
    """Our files and litert-torch's of one model, measured together."""
    images = [preprocess(photo, model.transform) for photo in stand_in_photos()]
    with torch.no_grad():
        expected = [model.module(torch.from_numpy(image)).numpy() for image in images]
    with tempfile.TemporaryDirectory() as folder:
        files = [our_file(name, precision, Path(folder)) for precision in PRECISIONS]
        if peer is not None:
            files += peer_files(model, images, peer, Path(folder))
    runners = [Runner(file) for file in files]
    times = interleave([runner.run for runner in runners], images[0], rounds, repeats)
    rows = []
    for taken, runner in zip(times, runners, strict=True):
        delegation = runner.interpreter.delegation()
        logits = [runner.run(image) for image in images]
        rows.append(
            TfliteRow(
                model=name,
                precision=runner.file.precision,
                made_by=runner.file.made_by,
                size_mb=len(runner.file.content) / 1e6,
                operators=sum(delegation.operators.values()),
                delegated=delegation.share,
                off_contract=runner.file.off_contract,
                sqnr_db=sqnr_db(expected, logits),
                top1=top1_agreement(expected, logits),
                median_ms=statistics.median(taken) * 1e3,
                min_ms=min(taken) * 1e3,
                convert_s=runner.file.convert_s,
                all_s=runner.file.all_s,
            )
        )
    return rows


PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")


class Runner:
    """A file in LiteRT, for images (1, 3, H, W) and float logits, whatever it takes and gives."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.interpreter = TfliteInterpreter(file.content)
        inner = self.interpreter._interpreter
        (self._source,), (self._result,) = inner.get_input_details(), inner.get_output_details()

    def run(self, image: Array) -> Array:
        image = np.ascontiguousarray(image.transpose(0, 2, 3, 1))
        if self._source["dtype"] != np.float32:
            scale, zero_point = self._source["quantization"]
            image = np.clip(np.rint(image / scale) + zero_point, -128, 127).astype(np.int8)
        (logits,) = self.interpreter.run(image).values()
        if logits.dtype == np.float32:
            return logits
        scale, zero_point = self._result["quantization"]
        real: Array = (logits.astype(np.float32) - zero_point) * np.float32(scale)
        return real


def interleave(
    runs: Sequence[Callable[[Array], Array]], image: Array, rounds: int, repeats: int
) -> list[list[float]]:
    """Seconds of each run: `repeats` of each in turn, `rounds` times.

    They are CPU seconds of the thread, the only one that computes: on a core of its own that is
    the latency, and what others do on the machine meanwhile moves it by a few percent, not twofold.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, times, strict=True):
            run(image)  # brings its code and weights back into the caches
            for _ in range(repeats):
                start = time.thread_time()
                run(image)
                taken.append(time.thread_time() - start)
    return times


def our_file(name: str, precision: Precision, folder: Path) -> File:
    stages = CpuTimes()
    bundle = compiled(name, "tflite", precision, folder / precision, stages)
    entry = artifact_entry(bundle.manifest.ledger)
    largest = float(np.abs(np.fromfile(bundle.path / "golden" / "logits.f32", "<f4")).max())
    return File(
        precision=precision,
        made_by=OURS,
        content=(bundle.path / bundle.manifest.library).read_bytes(),
        convert_s=stages.seconds["write the .tflite file"],
        all_s=sum(stages.seconds.values()),
        off_contract=entry["int8"]["max_steps"]
        if precision == "int8"
        else entry["max_abs_error"] / largest,
    )


def peer_files(
    model: LoadedModel, images: Sequence[Array], python: Path, folder: Path
) -> list[File]:
    """What litert-torch makes of the model, one file for each of its ways."""
    module = with_filters(freeze(model.module), MatrixFilter)
    torch.export.save(
        torch.export.export(module, (torch.from_numpy(images[0]),)), folder / "model.pt2"
    )
    np.save(folder / "images.npy", np.concatenate(images))
    script = Path(__file__).with_name("litert_torch_convert.py")
    done = subprocess.run(
        [str(python), str(script), "model.pt2", "images.npy", "."],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"litert-torch failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return []
    files = []
    for way, result in json.loads(done.stdout).items():
        made_by = "litert-torch" if way == "float32" else f"litert-torch {way}"
        try:
            if "error" in result:
                raise gfcompile.runtime.errors.CompileError(result["error"])
            file = File(
                precision="float32" if way == "float32" else "int8",
                made_by=made_by,
                content=(folder / f"{way}.tflite").read_bytes(),
                convert_s=result["convert"],
                all_s=result["all"],
            )
            Runner(file)  # an exit code is no proof that a file can be loaded
        except gfcompile.runtime.errors.GfcompileError as error:
            print(f"{made_by}: {error}", file=sys.stderr)
            continue
        files.append(file)
    return files


def missed_by_files(rows: Sequence[TfliteRow]) -> list[str]:
    missed = [
        f"{r.model} {r.precision} is {r.off_contract} steps off its graph, {MAX_STEPS} are allowed"
        for r in rows
        if r.precision == "int8" and r.off_contract is not None and r.off_contract > MAX_STEPS
    ]
    ours = [r for r in rows if (r.model, r.precision, r.made_by) == (BOUND, "int8", OURS)]
    for own in ours:
        for other in rows:
            same = (other.model, other.precision) == (own.model, own.precision)
            if not same or other is own or other.sqnr_db < MIN_SQNR_DB:
                continue
            if own.median_ms > other.median_ms:
                missed.append(f"{own.model} int8 is slower than that of {other.made_by}")
            if own.size_mb > other.size_mb:
                missed.append(f"{own.model} int8 is larger than that of {other.made_by}")
            if own.convert_s * MIN_FASTER_CONVERSION > other.convert_s:
                missed.append(
                    f"{own.model} int8 is converted in {own.convert_s:.1f} s, by {other.made_by} "
                    f"in {other.convert_s:.1f} s"
                )
    return missed


def print_files(rows: Sequence[TfliteRow]) -> None:
    print_table(
        "\n.tflite",
        ("model", "precision", "made by", "MB", "ops", "delegated", "off", "SQNR dB", "top-1",
         "median ms", "min ms", "convert s", "all s"),
        [
            (
                r.model,
                r.precision,
                r.made_by,
                f"{r.size_mb:.2f}",
                str(r.operators),
                f"{r.delegated:.1%}",
                "" if r.off_contract is None
                else f"{r.off_contract:.0f} step" if r.precision == "int8"
                else f"{r.off_contract:.0e}",
                f"{r.sqnr_db:.1f}",
                f"{r.top1:.0%}",
                f"{r.median_ms:.2f}",
                f"{r.min_ms:.2f}",
                f"{r.convert_s:.2f}",
                f"{r.all_s:.1f}",
            )
            for r in rows
        ],
    )  # fmt: skip
    print(
        f"off: from the graph that it must reproduce; at most {MAX_STEPS} steps. SQNR, top-1: from "
        "torch's logits of four photos.\n"
        f"Bounds, {BOUND} in int8, beside files of at least {MIN_SQNR_DB:.0f} dB: no slower, no "
        f"larger, converted {MIN_FASTER_CONVERSION:.0f} times faster (CPU seconds, from the "
        "program with its scales)."
    )


# .mlpackage


def compare_packages(name: str, model: LoadedModel) -> list[PackageRow]:
    """Our packages of one model, beside the operations that coremltools' own path takes."""
    own = own_operations(model)
    rows = []
    precisions: tuple[Precision, ...] = ("float16", "int8")
    with tempfile.TemporaryDirectory() as folder:
        for precision in precisions:
            stages = CpuTimes()
            bundle = compiled(name, "coreml", precision, Path(folder) / precision, stages)
            package = bundle.path / bundle.manifest.library
            described = bundle.manifest.extra["coreml"]
            entry = artifact_entry(bundle.manifest.ledger)
            largest = np.abs(np.fromfile(bundle.path / "golden" / "logits.f32", "<f4")).max()
            rows.append(
                PackageRow(
                    model=name,
                    precision=precision,
                    size_mb=sum(f.stat().st_size for f in package.rglob("*") if f.is_file()) / 1e6,
                    operations=described["statistics"][described["layout"]]["count"],
                    own_operations=own,
                    fp16_error=entry["max_abs_error"] / float(largest),
                    steps=entry["int8"]["max_steps"] if entry["int8"] else None,
                    convert_s=stages.seconds["write the package"],
                )
            )
    return rows


def own_operations(model: LoadedModel) -> int | None:
    """The operations of what coremltools itself makes of the torch module, constants apart.

    None, and a line that says why, where it refuses the module.
    """
    from gfcompile.targets.coreml.tools import coremltools, quiet

    ct = coremltools()
    module = with_filters(freeze(model.module), RfftnFilter)
    size = model.transform.image_size
    try:
        with quiet(), torch.no_grad():
            image = torch.zeros(1, 3, size, size)
            traced = torch.jit.trace(module, image, check_trace=False)  # type: ignore[no-untyped-call]
            made = ct.convert(
                traced,
                inputs=[ct.TensorType(name="image", shape=(1, 3, size, size))],
                minimum_deployment_target=ct.target.iOS17,
                skip_model_load=True,
            )
    except Exception as error:  # whatever a converter raises is its result
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        print(f"coremltools' own path: {type(error).__name__}: {reason}", file=sys.stderr)
        return None
    function = made.get_spec().mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    return len([op for op in block.operations if op.type != "const"])


def missed_by_packages(rows: Sequence[PackageRow]) -> list[str]:
    missed = []
    for r in rows:
        if r.model != BOUND:
            continue
        if r.precision == "int8" and r.size_mb > MAX_PACKAGE_MB:
            missed.append(f"the .mlpackage has {r.size_mb:.1f} MB, {MAX_PACKAGE_MB} are allowed")
        if r.own_operations is not None and (
            r.own_operations < MIN_FEWER_OPERATIONS * r.operations
        ):
            missed.append(
                f"the {r.precision} .mlpackage has {r.operations} operations, coremltools' own "
                f"path {r.own_operations}"
            )
    return missed


def print_packages(rows: Sequence[PackageRow]) -> None:
    print_table(
        "\n.mlpackage, evaluated: no Mac is needed, and none was used",
        ("model", "precision", "MB", "ops", "coremltools' own", "fp16 error", "off", "convert s"),
        [
            (
                r.model,
                r.precision,
                f"{r.size_mb:.2f}",
                str(r.operations),
                "refused"
                if r.own_operations is None
                else f"{r.own_operations} ({r.own_operations / r.operations:.1f}x)",
                f"{r.fp16_error:.1e}",
                "" if r.steps is None else f"{r.steps} step",
                f"{r.convert_s:.2f}",
            )
            for r in rows
        ],
        left=2,
    )
    print(
        f"Bounds, {BOUND}: int8 at most {MAX_PACKAGE_MB:.0f} MB; coremltools' own path at least "
        f"{MIN_FEWER_OPERATIONS:.0f} times the operations."
    )


# Both


class CpuTimes(SilentProgress):
    """CPU seconds of each stage: what others do on the machine meanwhile does not count."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = time.process_time() - start


def compiled(name: str, target: str, precision: Precision, output: Path, progress: CpuTimes) -> Any:
    return gfcompile.compile_model(
        gfcompile.CompileConfig(
            model=name, target=target, precision=precision, output=output, cache=False
        ),
        progress,
    )


def artifact_entry(ledger: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(entry for entry in ledger if entry["stage"] == "artifact")


def peer_python(given: Path | None) -> Path | None:
    """The Python that has litert-torch; None, and a line that says why, where there is none."""
    if given is not None:
        return given if _imports_litert_torch(given) else None
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "gfcompile-benchmarks" / f"litert-torch-{LITERT_TORCH}"
    python = folder / "bin" / "python"
    if python.exists():
        return python if _imports_litert_torch(python) else None
    print(f"making {folder} for litert-torch: 2.1 GB, some minutes", file=sys.stderr)
    wanted = (f"litert-torch=={LITERT_TORCH}", "torch>=2.13,<2.14")
    # Made in place, since its scripts name their folder; gone again if it is not whole.
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
        pip = [str(python), "-m", "pip", "install", "-q", *wanted]
        subprocess.run(pip, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
        print(f"no rows of litert-torch: its environment cannot be made: {error}", file=sys.stderr)
        return None
    return python if _imports_litert_torch(python) else None


def _imports_litert_torch(python: Path) -> bool:
    try:
        done = subprocess.run(
            [str(python), "-c", "import importlib.metadata as m; print(m.version('litert-torch'))"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        print(f"no rows of litert-torch: {python} does not have it", file=sys.stderr)
        return False
    version = done.stdout.strip()
    if version != LITERT_TORCH:
        print(f"note: litert-torch {version}, not {LITERT_TORCH}", file=sys.stderr)
    return True


def print_table(
    title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, left: int = 3
) -> None:
    print(title)
    command_line.print_table(header, rows, right=set(range(left, len(header))))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", metavar="NAME")
    parser.add_argument(
        "--litert-torch", type=Path, metavar="PYTHON", help="of an environment that has it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help=f"{BOUND} alone, and fewer runs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
