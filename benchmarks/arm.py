"""Instructions that an inference retires on ARM: our bundles beside other runtimes.

    python benchmarks/arm.py [--quick] [--json FILE]

Everything runs under QEMU as Cortex-A53, A72 and A76, so what is counted is exact and the same on
any machine, but it is no time: which instructions they are, and what memory costs, is not in it.
One inference is what a process with two retires, less one with one. Ours run by gfbench; the peers
run by their own arm64 wheels in an arm64 CPython, kept in the user's cache: LiteRT on our .tflite,
ONNX Runtime on the graph that our kernels were compiled from, its int8 activations signed and
unsigned, and in float32 MNN on that graph and ncnn on the module, both converted here, which needs
the environment of requirements-peers.txt. In float16, on the A76 alone, LiteRT has float16 weights
and widens them. What fails is left out, and a line says why. Of our hot loops llvm-mca says how
many cycles they take on its model of the core, beside those that their multiplications alone take
(see hot_loops.py). Exits with 1 if a bound is missed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from cpu import EXACT, Check, cosine, describe_machine
from environments import LITERT_WHEELS, Arm64Python, CannotBeMadeError, Environments
from hot_loops import HotLoop, NoModelError, hot_loops
from mobile_peers import RUNTIMES, converted
from onnx import inliner
from peers import SAME_GRAPH, UNSIGNED, Array, onnx_runtime, unsigned

from gfcompile.compile import command_line
from gfcompile.compile.bundle import Bundle
from gfcompile.compile.cache import open_cache
from gfcompile.compile.pipeline import (
    CompileConfig,
    RequestedPrecision,
    compile_model,
    lowered_graph,
)
from gfcompile.compile.progress import SilentProgress
from gfcompile.runtime.bench import BENCH_NAME
from gfcompile.runtime.devices.qemu import QemuDevice
from gfcompile.runtime.errors import DeviceError, GfcompileError
from gfcompile.runtime.images import Transform, preprocess, stand_in_photos

MODEL, CLASSES = "gfnet_xs", 1000
TARGETS: Mapping[str, str] = {
    "cortex-a53": "raspberry-pi-3",
    "cortex-a72": "raspberry-pi-4",
    "cortex-a76": "raspberry-pi-5",
}
Precision = RequestedPrecision
PRECISIONS: Mapping[str, tuple[Precision, ...]] = {
    "cortex-a53": ("float32", "int8"),
    "cortex-a72": ("float32", "int8"),
    "cortex-a76": ("float32", "float16", "int8"),  # the others have no float16 arithmetic
}
OURS, LITERT, MNN, NCNN = "gfcompile", "LiteRT", "MNN", "ncnn"
# Of our instructions over those of the best peer but MNN; one counts if its logits are as exact.
BOUNDS: Mapping[tuple[str, Precision], float] = {
    ("cortex-a53", "float32"): 0.90,
    ("cortex-a72", "float32"): 0.90,
    ("cortex-a76", "float32"): 0.90,
    ("cortex-a72", "int8"): 0.88,
    ("cortex-a76", "int8"): 0.80,
}
# What MNN retired when this bound was set, and 5% on top.
MAX_FLOAT_GIGA = 0.836 * 1.05
# Of the modelled bound, by the slowest of our hot loops.
LEAST_OF_BOUND = 0.90

ONNX_RUNTIME_WHEELS = ("onnxruntime==1.31.1", "packaging")
MOBILE_WHEELS = ("MNN==3.6.1", "ncnn==1.0.20261020", "numpy==2.4.*")
ENVIRONMENTS = Environments("gfcompile-benchmarks")
# One thread throughout, and nothing that differs from one start of Python to the next.
SETTINGS = {"OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
PEER_SCRIPT = Path(__file__).with_name("arm_peer.py").resolve()
TIMEOUT_S = 3600.0  # only against what hangs: a busy machine is slow


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program that computes one image's logits a number of times, under QEMU.

    Attributes:
        qemu: how QEMU is called; empty for programs that need arm64's C library alone.
        once, twice: the command that computes them so often and writes them to logits.f32.
    """

    cpu: str
    precision: Precision
    contender: str
    qemu: tuple[str, ...] = ()
    once: tuple[str, ...]
    twice: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contender on one CPU.

    Attributes:
        instructions: retired by one inference.
        ratio: ours over this one's; below 1 we retire fewer.
        cosine: of its logits with those of the float graph.
    """

    cpu: str
    precision: Precision
    contender: str
    instructions: int
    ratio: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Modelled:
    """One of our hot loops, on one CPU."""

    cpu: str
    precision: Precision
    loop: HotLoop


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    cpus = list(TARGETS)[-1:] if options.quick else list(TARGETS)
    machine = describe_machine()
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = compare(cpus, Path(folder), absent)
        except GfcompileError as error:
            print(f"arm.py: {error}", file=sys.stderr)
            return error.exit_code
        loops = model_loops(cpus, Path(folder), absent)
    checks = [*judge(results), *judge_loops(loops)]
    print_table(results)
    print()
    print_loops(loops)
    print()
    for name, reason in absent.items():
        print(f"left out: {name}: {reason}")
    for check in checks:
        verdict = "pass" if check.passed else "MISSED"
        print(f"{verdict}: {check.what}: {check.value:.3f}, at most {check.bound:.3f}")
    if options.json:
        report = {
            "benchmark": "arm",
            "machine": machine,
            "versions": versions(),
            "model": MODEL,
            "absent": absent,
            "results": [asdict(result) for result in results],
            "hot_loops": [asdict(modelled) for modelled in loops],
            "checks": [{**asdict(check), "passed": check.passed} for check in checks],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(check.passed for check in checks) else 1


def compare(cpus: Sequence[str], folder: Path, absent: dict[str, str]) -> list[Result]:
    """All contenders on these CPUs; those that cannot take part go into `absent`."""
    files = make_files(folder)
    mobile = list(convert_mobile(files, absent))
    jobs = [
        job
        for cpu in cpus
        for precision in PRECISIONS[cpu]
        for job in (
            our_job(cpu, precision, files),
            *peer_jobs(cpu, precision, files, absent),
            *(mobile_jobs(cpu, mobile, files, absent) if precision == "float32" else ()),
        )
    ]
    # Counts do not depend on what else runs, so all cores may be used.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = zip(jobs, pool.map(attempt, jobs), strict=True)
        measured = []
        for job, outcome in outcomes:
            if isinstance(outcome, str):
                absent[f"{job.contender}, {job.cpu} {job.precision}"] = outcome
            else:
                measured.append((job, *outcome))
    ours = {
        (job.cpu, job.precision): instructions
        for job, instructions, _ in measured
        if job.contender == OURS
    }
    return [
        Result(
            cpu=job.cpu,
            precision=job.precision,
            contender=job.contender,
            instructions=instructions,
            ratio=ours[job.cpu, job.precision] / instructions,
            cosine=cosine(logits, files.expected),
        )
        for job, instructions, logits in measured
    ]


@dataclass(frozen=True, kw_only=True)
class Files:
    """What the peers run, and the image for all.

    Attributes:
        image, two_images, channels_last: the same pixels as NCHW, twice that, and as NHWC.
        expected: the logits of the float graph.
    """

    folder: Path
    image: Path
    two_images: Path
    channels_last: Path
    expected: Array

    def tflite(self, precision: Precision) -> Path:
        return self.folder / f"{precision}.tflite"

    def onnx(self, precision: Precision, *, signed: bool = True) -> Path:
        return self.folder / f"{precision}{'' if signed else '-unsigned'}.onnx"

    def mobile(self, package: str) -> Path:
        """The folder that MNN or ncnn reads its model from."""
        return self.folder / package


def make_files(folder: Path) -> Files:
    """The peers' models, with the weights and scales of our bundles, and the image."""
    files = Files(
        folder=folder,
        image=folder / "image.f32",
        two_images=folder / "two-images.f32",
        channels_last=folder / "image-nhwc.f32",
        expected=np.empty(0),
    )
    graphs = {}
    for precision in PRECISIONS["cortex-a76"]:
        if precision != "float16":
            # The targets choose the same form for the filters, so this is the graph of all of them.
            config = CompileConfig(model=MODEL, target=TARGETS["cortex-a76"], precision=precision)
            with open_cache() as cache:
                lowered = lowered_graph(config, cache, SilentProgress())
            graphs[precision] = onnx_ir.to_proto(lowered.model)
            files.onnx(precision).write_bytes(graphs[precision].SerializeToString())
        bundle = compiled("tflite", precision, folder / f"tflite-{precision}")
        shutil.copyfile(bundle.path / bundle.manifest.library, files.tflite(precision))
        transform = Transform.from_dict(dict(bundle.manifest.transform or {}))
    turned = unsigned(graphs["int8"]).SerializeToString()
    files.onnx("int8", signed=False).write_bytes(turned)
    image = preprocess(stand_in_photos()[0], transform)
    image.tofile(files.image)
    np.concatenate([image, image]).tofile(files.two_images)
    np.ascontiguousarray(image.transpose(0, 2, 3, 1)).tofile(files.channels_last)
    expected = onnx_runtime("", graphs["float32"], 1).run(image)
    return replace(files, expected=expected)


def compiled(target: str, precision: Precision, output: Path) -> Bundle:
    print(f"compiling {MODEL} for {target}, {precision}", file=sys.stderr)
    return compile_model(
        CompileConfig(model=MODEL, target=target, precision=precision, output=output)
    )


def bundle_folder(folder: Path, cpu: str, precision: Precision) -> Path:
    return folder / f"{cpu}-{precision}"


def our_job(cpu: str, precision: Precision, files: Files) -> Job:
    bundle = compiled(TARGETS[cpu], precision, bundle_folder(files.folder, cpu, precision)).path
    once, twice = (
        (str(bundle / BENCH_NAME), str(bundle), "--input", str(image), "--output", "logits.f32")
        for image in (files.image, files.two_images)
    )
    return Job(cpu=cpu, precision=precision, contender=OURS, once=once, twice=twice)


def convert_mobile(files: Files, absent: dict[str, str]) -> Iterator[str]:
    """Converts for MNN and ncnn; the packages of those for which that works."""
    graph = inliner.inline_local_functions(onnx.load(files.onnx("float32")))
    for runtime in RUNTIMES:
        if runtime.package not in (MNN, NCNN):
            continue
        print(f"converting {MODEL} for {runtime.package}", file=sys.stderr)
        place = files.mobile(runtime.package)
        place.mkdir()
        onnx.save(graph, place / "graph.onnx")
        if reason := converted(runtime, MODEL, "float32", place):
            absent[runtime.package] = reason
        else:
            yield runtime.package


def mobile_jobs(
    cpu: str, packages: Sequence[str], files: Files, absent: dict[str, str]
) -> Iterator[Job]:
    """MNN and ncnn on this CPU; none, and a line that says why, without a Python for them."""
    if not packages:
        return
    try:
        python = ENVIRONMENTS.arm64_python(cpu, "arm64-mobile", MOBILE_WHEELS, SETTINGS)
    except CannotBeMadeError as error:
        absent |= dict.fromkeys(packages, str(error))
        return
    for package in packages:
        model = files.mobile(package)
        yield peer_job(cpu, "float32", package, python, package.lower(), model, files.image)


def peer_jobs(
    cpu: str, precision: Precision, files: Files, absent: dict[str, str]
) -> Iterator[Job]:
    """The peers on this CPU; none, and a line that says why, without a Python for them."""
    wheels = (*LITERT_WHEELS, *ONNX_RUNTIME_WHEELS)
    try:
        python = ENVIRONMENTS.arm64_python(cpu, "arm64-peers", wheels, SETTINGS)
    except CannotBeMadeError as error:
        absent |= dict.fromkeys((LITERT, "ONNX Runtime"), str(error))
        return
    contenders = {LITERT: ("litert", files.tflite(precision), files.channels_last)}
    if precision != "float16":
        contenders[SAME_GRAPH] = ("onnxruntime", files.onnx(precision), files.image)
    if precision == "int8":
        contenders[UNSIGNED] = ("onnxruntime", files.onnx("int8", signed=False), files.image)
    for name, (peer, model, image) in contenders.items():
        yield peer_job(cpu, precision, name, python, peer, model, image)


def peer_job(
    cpu: str,
    precision: Precision,
    contender: str,
    python: Arm64Python,
    peer: str,
    model: Path,
    image: Path,
) -> Job:
    command = (python.program, str(PEER_SCRIPT), peer, str(model), str(image))
    return Job(
        cpu=cpu,
        precision=precision,
        contender=contender,
        qemu=python.qemu,
        once=(*command, "1"),
        twice=(*command, "2"),
    )


class ContenderDevice(QemuDevice):
    """Where a contender runs: a peer's Python brings its own file system, not the C library's."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"qemu:{job.cpu}", job.cpu)
        if job.qemu:
            self._command = list(job.qemu)


def attempt(job: Job) -> tuple[int, Array] | str:
    """What `measure` returns; of a peer that fails, why.

    Raises:
        DeviceError: our own bundle fails.
    """
    try:
        return measure(job)
    except DeviceError as error:
        if job.contender == OURS:
            raise
        return str(error)


def measure(job: Job) -> tuple[int, Array]:
    """What one inference retires, and its logits.

    Raises:
        DeviceError: the program failed, or this QEMU takes no plugins.
    """
    print(f"counting {job.cpu} {job.precision}: {job.contender}", file=sys.stderr)
    with ContenderDevice(job) as device:
        counts = []
        for command in (job.once, job.twice):
            count = device.count_instructions(command, timeout_s=TIMEOUT_S)
            if count is None:
                done = device.run(command, timeout_s=TIMEOUT_S)
                reason = done.reason if done.status else "this QEMU takes no plugins"
                raise DeviceError(f"{job.contender} as {job.cpu} was not counted: {reason}")
            counts.append(count)
        logits = np.frombuffer(device.fetch("logits.f32"), np.float32)[:CLASSES]
    once, twice = counts
    return twice - once, logits


def model_loops(cpus: Sequence[str], folder: Path, absent: dict[str, str]) -> list[Modelled]:
    """What llvm-mca says of our hot loops; nothing, and a line that says why, without it."""
    try:
        return [
            Modelled(cpu=cpu, precision=precision, loop=loop)
            for cpu in cpus
            for precision in PRECISIONS[cpu]
            for library in bundle_folder(folder, cpu, precision).glob("*.so")
            for loop in hot_loops(library, cpu)
        ]
    except NoModelError as error:
        absent["cycles of hot loops"] = str(error)
        return []


def judge_loops(loops: Sequence[Modelled]) -> list[Check]:
    """For each CPU and precision, the hot loop that is the furthest from its bound."""
    worst: dict[tuple[str, Precision], HotLoop] = {}
    for modelled in loops:
        key = (modelled.cpu, modelled.precision)
        worst[key] = min(worst.get(key, modelled.loop), modelled.loop, key=lambda loop: loop.share)
    return [
        Check(
            what=f"{cpu} {precision}: modelled cycles of a hot loop over its bound",
            value=1 / loop.share,
            bound=1 / LEAST_OF_BOUND,
        )
        for (cpu, precision), loop in worst.items()
    ]


def judge(results: Sequence[Result]) -> list[Check]:
    """The bounds that these results allow to be checked."""
    checks: list[Check] = []
    for own in results:
        if own.contender != OURS:
            continue
        rivals = [
            r
            for r in results
            if (r.cpu, r.precision) == (own.cpu, own.precision)
            and r.contender not in (OURS, MNN)
            and r.cosine >= EXACT
        ]
        what = f"{own.cpu} {own.precision}"
        bound = BOUNDS.get((own.cpu, own.precision))
        if rivals and bound is not None:
            best = min(rivals, key=lambda r: r.instructions)
            checks.append(
                Check(
                    what=f"{what}: instructions over those of {best.contender}",
                    value=best.ratio,
                    bound=bound,
                )
            )
        if own.precision == "float32":
            checks.append(
                Check(
                    what=f"{what}: G instructions",
                    value=own.instructions / 1e9,
                    bound=MAX_FLOAT_GIGA,
                )
            )
    return checks


def print_loops(loops: Sequence[Modelled]) -> None:
    if not loops:
        return
    print("our hot loops on llvm-mca's models, by round: products, instructions, cycles, bound")
    header = ("CPU", "precision", "", "products", "instr.", "cycles", "bound", "of bound")
    rows = [
        (
            modelled.cpu,
            modelled.precision,
            "",
            str(modelled.loop.products),
            str(modelled.loop.instructions),
            f"{modelled.loop.cycles:.1f}",
            f"{modelled.loop.bound:.1f}",
            f"{modelled.loop.share:.1%}",
        )
        for modelled in loops
    ]
    command_line.print_table(header, rows, right=set(range(3, len(header))))


def print_table(results: Sequence[Result]) -> None:
    print(f"{MODEL}, 1 thread, batch 1: retired instructions per inference, in G")
    header = ("CPU", "precision", "", "G", "our ratio", "cos")
    rows = [
        (
            r.cpu,
            r.precision,
            r.contender,
            f"{r.instructions / 1e9:.4f}",
            "" if r.contender == OURS else f"{r.ratio:.3f}",
            f"{r.cosine:.5f}",
        )
        for r in results
    ]
    command_line.print_table(header, rows, right=set(range(3, len(header))))


def versions() -> Mapping[str, str]:
    """Of what was compared, and of what played the CPUs."""
    peers = (LITERT_WHEELS[0], ONNX_RUNTIME_WHEELS[0], *MOBILE_WHEELS[:2])
    wheels = dict(wheel.split("==") for wheel in peers)
    qemu = subprocess.run(
        ["qemu-aarch64", "--version"], capture_output=True, text=True, check=False
    ).stdout
    own = {name: metadata.version(name) for name in ("gfcompile", "apache-tvm")}
    return own | wheels | {"qemu": qemu.split("\n")[0]}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="Cortex-A76 alone")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
