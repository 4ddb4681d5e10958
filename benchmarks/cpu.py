"""Host bundles against other runtimes: the same model, weights, scales and input, one process.

    python benchmarks/cpu.py [--models gfnet_xs,...] [--threads 1,2] [--priority 50] [--quick]
                             [--json FILE]

Each contender runs a few times in turn, round after round, so that a machine that slows down or
is shared slows all of them alike: the ratios are what counts, the times are of this machine.
Where neighbours come and go within milliseconds, "undisturbed" holds to two percent on one thread
when medians move by ten: of ours, each kernel's fastest of many runs, added up. On two threads both
cores must be left alone at once, and it holds less. No bound is on it.
Peers that are not installed are named; benchmarks/requirements-peers.txt brings them. Exits with
1 if a bound of `BOUNDS` is missed, or one on threads, memory or loading.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from peers import Absent, Array, Contender, Precision, onnx_runtime, peers, quiet

import gfcompile
from gfcompile.compile import command_line
from gfcompile.compile.bundle import Bundle
from gfcompile.compile.models import model_spec
from gfcompile.runtime import Session, load
from gfcompile.runtime.bench import BENCH_NAME
from gfcompile.runtime.images import Transform, preprocess, stand_in_photos
from gfcompile.targets.host import host_target

__all__ = [
    "PACKAGES",
    "Contender",
    "Precision",
    "cosine",
    "describe_machine",
    "interleave",
    "onnx_runtime",
    "undisturbed",
    "versions",
]

MODELS = ("gfnet_xs", "gfnet_h_ti", "deit_small", "dynamicvit_deit_s")
PACKAGES = ("gfcompile", "onnxruntime", "ai-edge-litert", "apache-tvm", "torch", "numpy")
PEERS = ("openvino", "executorch", "MNN", "ncnn", "pnnx")
OURS, OURS_VNNI = "gfcompile", "gfcompile, VNNI alone"
# Of our median over that of the best peer, one thread; a peer counts if its logits are as exact.
# That of gfnet_xs in int8 is by AMX; `VNNI_BOUND` is by VNNI alone.
BOUNDS: Mapping[tuple[str, Precision], float] = {
    ("gfnet_xs", "int8"): 0.70,
    ("deit_small", "int8"): 0.80,
    ("dynamicvit_deit_s", "int8"): 0.80,
    ("gfnet_h_ti", "int8"): 1.0,
    ("gfnet_xs", "float32"): 0.95,
    ("deit_small", "float32"): 0.95,
    ("dynamicvit_deit_s", "float32"): 0.95,
    ("gfnet_h_ti", "float32"): 1.0,
}
VNNI_BOUND = 1.05
EXACT = 0.999  # cosine with the float model's logits
SCALING: Mapping[Precision, float] = {"float32": 1.75, "int8": 1.6}  # on two cores
# A runtime's workers look for more work for a fifth of a second, on a core that others need.
REST_S = 0.25
MAX_PEAK_MB = 30.0  # of the whole process, gfnet_xs int8
MAX_FIRST_MS = 40.0  # from a warm page cache to the first logits


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contender on one model.

    Attributes:
        ratio: our median over this one's; below 1 we are faster.
        cosine: of its logits with those of the float graph.
        of_peak: the share of the core's peak, of multiplications and additions, that it reaches.
        undisturbed_ms: see `undisturbed`; None for peers.
    """

    model: str
    precision: Precision
    threads: int
    contender: str
    median_ms: float
    min_ms: float
    runs: int
    ratio: float
    cosine: float
    of_peak: float
    undisturbed_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Check:
    """A bound: what it is on, the figure, and the most (or least) that is allowed."""

    what: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    quiet()
    rounds, repeats = (8, 3) if options.quick else (30, 5)
    machine = describe_machine()  # its load before we add ours
    with at_priority(options.priority):
        peaks = {count: core_peaks(count) for count in dict.fromkeys([1, *options.threads])}
    results: list[Result] = []
    checks: list[Check] = []
    footprints: list[str] = []
    absent: dict[str, list[str]] = {}
    for model in options.models:
        for precision in ("float32", "int8"):
            comparison = Comparison(model, precision, peaks, options.priority)
            made = comparison.measure(options.threads, rounds, repeats)
            for line in comparison.absent:
                absent.setdefault(line, []).append(f"{model} {precision}")
            results += made
            checks += judge(made, amx="amx" in peaks[1])
            checks += comparison.footprint_checks
            footprints.append(comparison.footprint_line)
    print(f"{machine['cpu']}; batch 1; load before: {machine['load']:.1f}")
    for count, reached in peaks.items():
        print(
            f"peak of {count} cores, G operations/s:", *(f"{k} {v:.0f}" for k, v in reached.items())
        )
    print()
    print_table(results)
    print()
    print(*footprints, "", sep="\n")
    for line, where in absent.items():
        print(f"left out: {line} ({', '.join(where)})")
    for r in results:
        if r.cosine < EXACT:
            print(f"not counted: {r.contender}: cosine {r.cosine:.5f} ({r.model} {r.precision})")
    for check in checks:
        relation = "at least" if check.at_least else "at most"
        verdict = "pass" if check.passed else "MISSED"
        print(f"{verdict}: {check.what}: {check.value:.2f}, {relation} {check.bound:g}")
    if options.json:
        report = {
            "benchmark": "cpu",
            "machine": machine,
            "versions": versions([*PACKAGES, *PEERS]),
            "peak_gops": peaks,
            "footprints": footprints,
            "rounds": rounds,
            "repeats": repeats,
            "absent": absent,
            "results": [asdict(result) for result in results],
            "checks": [{**asdict(check), "passed": check.passed} for check in checks],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(check.passed for check in checks) else 1


class Comparison:
    """One model in one precision, compiled for this machine, beside its peers."""

    def __init__(
        self,
        model: str,
        precision: Precision,
        peaks: Mapping[int, Mapping[str, float]],
        priority: int,
    ) -> None:
        self.model = model
        self.precision = precision
        self.peaks = peaks
        self.priority = priority
        self.absent: dict[str, None] = {}  # in order, and once for all numbers of threads
        self.footprint_checks: list[Check] = []
        self.footprint_line = ""
        self.macs = model_spec(model).macs

    def measure(self, threads: Sequence[int], rounds: int, repeats: int) -> list[Result]:
        """The results of each number of threads, each measured in one interleaved run."""
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            bundle = self.compile("host", folder / "bundle", dump=folder / "dump")
            # Stages are numbered; the last one is what the kernels were compiled from.
            graph = onnx.load(max((folder / "dump").glob("*.onnx")))
            plain = onnx.load(max((folder / "dump").glob("*canonical.onnx"), key=_is_float))
            transform = Transform.from_dict(dict(bundle.manifest.transform or {}))
            image = preprocess(stand_in_photos()[0], transform)
            exact = onnx_runtime("", plain, 1).run(image)
            self.footprint(bundle)
            # Multi-threaded runs have our single-threaded session beside them: for the scaling.
            return [
                result
                for count in threads
                for result in self.compare(
                    bundle.path, graph, plain, image, exact, count, rounds, repeats, folder
                )
            ]

    def compile(self, target: str, output: Path, dump: Path | None = None) -> Any:
        return gfcompile.compile_model(
            gfcompile.CompileConfig(
                model=self.model, target=target, precision=self.precision, output=output, dump=dump
            )
        )

    def compare(
        self,
        bundle: Path,
        graph: onnx.ModelProto,
        plain: onnx.ModelProto,
        image: Array,
        exact: Array,
        threads: int,
        rounds: int,
        repeats: int,
        folder: Path,
    ) -> list[Result]:
        with ExitStack() as stack:
            sessions = {OURS: stack.enter_context(load(bundle, threads=threads))}
            amx = self.precision == "int8" and "amx" in self.peaks[1]
            if threads > 1:
                sessions[f"{OURS}, 1 thread"] = stack.enter_context(load(bundle, threads=1))
            elif amx:
                other = self.compile("x86-64-v4", folder / "vnni")
                sessions[OURS_VNNI] = stack.enter_context(load(other.path, threads=threads))
            contenders = [Contender(name=name, run=ours.run) for name, ours in sessions.items()]
            for peer in peers(self.model, self.precision, graph, plain, threads, folder):
                if isinstance(peer, Absent):
                    self.absent[f"{peer.name}: {peer.reason}"] = None
                else:
                    contenders.append(peer)
            with at_priority(self.priority):
                times = interleave(
                    contenders, image, rounds, repeats, rest_s=REST_S if threads > 1 else 0.0
                )
                fastest = {name: undisturbed(ours, image) for name, ours in sessions.items()}
            medians = {name: statistics.median(values) for name, values in times.items()}
            reached = self.peaks[threads]
            peak = reached.get("float32", 0.0)
            if self.precision == "int8":
                peak = reached.get("amx", reached.get("vnni", peak))
            return [
                Result(
                    model=self.model,
                    precision=self.precision,
                    threads=threads,
                    contender=contender.name,
                    median_ms=medians[contender.name] * 1e3,
                    min_ms=min(times[contender.name]) * 1e3,
                    runs=len(times[contender.name]),
                    ratio=medians[OURS] / medians[contender.name],
                    cosine=cosine(contender.run(image), exact),
                    of_peak=2e-9 * self.macs / medians[contender.name] / peak if peak else 0.0,
                    undisturbed_ms=fastest.get(contender.name),
                )
                for contender in contenders
            ]

    def footprint(self, bundle: Bundle) -> None:
        """Memory, and the time to the first logits, of a process of its own."""
        folder = str(bundle.path)
        command = [f"{folder}/{BENCH_NAME}", folder, "--runs", "1", "--warmup", "0", "--json"]
        # The first one warms the page cache; of the others the fastest was disturbed least.
        told = min(
            (
                json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
                for _ in range(6)
            ),
            key=lambda told: told["load_ms"] + told["first_ms"],
        )
        what = f"{self.model} {self.precision}"
        first_ms, peak_mb = told["load_ms"] + told["first_ms"], told["peak_memory_mb"]
        arena, least = (bundle.manifest.extra[f"arena_{of}bytes"] for of in ("", "lower_bound_"))
        self.footprint_line = (
            f"{what}: arena {arena / 1e6:.2f} MB, {arena / least:.3f} of what is alive at once; "
            f"peak memory {peak_mb:.1f} MB; loaded and run in {first_ms:.1f} ms"
        )
        if (self.model, self.precision) == ("gfnet_xs", "int8"):
            self.footprint_checks += [
                Check(what=f"{what}: peak memory, MB", value=peak_mb, bound=MAX_PEAK_MB),
                Check(
                    what=f"{what}: loading and the first inference, ms",
                    value=first_ms,
                    bound=MAX_FIRST_MS,
                ),
            ]


def judge(results: Sequence[Result], *, amx: bool) -> list[Check]:
    """The checks that one model in one precision allows on a CPU with or without AMX."""
    checks: list[Check] = []
    first = results[0]
    what = f"{first.model} {first.precision}"
    single = [r for r in results if r.threads == 1]
    rivals = [
        r
        for r in single
        if not r.contender.startswith(OURS)
        and not (first.precision == "float32" and "bfloat16" in r.contender)
        and r.cosine >= EXACT
    ]
    if rivals and (bound := BOUNDS.get((first.model, first.precision))) is not None:
        best = min(rivals, key=lambda r: r.median_ms)
        bounds = {OURS: bound}
        if (first.model, first.precision) == ("gfnet_xs", "int8"):
            bounds = {OURS: bound, OURS_VNNI: VNNI_BOUND} if amx else {OURS: VNNI_BOUND}
        checks += [
            Check(
                what=f"{what}: time of {r.contender} over that of {best.contender}",
                value=r.median_ms / best.median_ms,
                bound=bounds[r.contender],
            )
            for r in single
            if r.contender in bounds
        ]
    for result in results:
        if result.contender == f"{OURS}, 1 thread" and result.threads == 2:
            checks.append(
                Check(
                    what=f"{what}: speed on 2 cores over that on 1",
                    value=1 / result.ratio,
                    bound=SCALING[first.precision],
                    at_least=True,
                )
            )
    return checks


def interleave(
    contenders: Sequence[Contender],
    image: Array,
    rounds: int,
    repeats: int,
    *,
    rest_s: float = 0.0,
) -> Mapping[str, list[float]]:
    """Seconds of each run, by contender: `repeats` of each in turn, `rounds` times.

    Args:
        rest_s: of quiet before each turn.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        for _ in range(3):
            contender.run(image)
    for _ in range(rounds):
        for contender in contenders:
            time.sleep(rest_s)
            contender.run(image)  # brings its code and weights back into the caches
            for _ in range(repeats):
                started = time.perf_counter()
                contender.run(image)
                times[contender.name].append(time.perf_counter() - started)
    return times


def undisturbed(session: Session, image: Array, runs: int = 100) -> float:
    """Milliseconds of an inference if nobody disturbs it: each kernel's fastest run, added up."""
    profiles = [[step.seconds for step in session.profile(image, runs=1)] for _ in range(runs)]
    fastest: list[float] = [min(times) for times in zip(*profiles, strict=True)]
    return 1e3 * sum(fastest)


@contextmanager
def at_priority(priority: int) -> Iterator[None]:
    """Real-time priority for every thread of this process, if one is asked for and permitted."""
    if priority == 0:
        yield
        return
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    try:
        for thread in threads:
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(priority))
    except PermissionError:
        print("--priority needs the right to set it; measured without", file=sys.stderr)
    try:
        yield
    finally:
        for task in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))


def core_peaks(threads: int) -> Mapping[str, float]:
    """G operations per second that cores reach on nothing but products, by their kind."""
    if platform.machine() != "x86_64":
        return {}
    source = Path(__file__).with_name("peak.c")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        target = ["-target", "x86_64-linux-gnu", "-mcpu=sapphirerapids", "-O2"]
        compiler = [sys.executable, "-m", "ziglang", "cc"]
        command = [*compiler, *target, str(source), "-lpthread", "-o", str(program)]
        subprocess.run(command, check=True)
        told = subprocess.run([program, str(threads)], capture_output=True, text=True, check=True)
    return {
        kind: float(value) for kind, value in (line.split() for line in told.stdout.splitlines())
    }


def print_table(results: Sequence[Result]) -> None:
    times = ("median ms", "min ms", "undisturbed")
    header = ("model", "precision", "threads", "", *times, "ratio", "of peak", "cos")
    rows = [
        (
            result.model,
            result.precision,
            str(result.threads),
            result.contender,
            f"{result.median_ms:.2f}",
            f"{result.min_ms:.2f}",
            "" if result.undisturbed_ms is None else f"{result.undisturbed_ms:.2f}",
            "" if result.contender == OURS else f"{result.ratio:.2f}",
            f"{result.of_peak:.0%}",
            f"{result.cosine:.5f}",
        )
        for result in results
    ]
    command_line.print_table(header, rows, right=set(range(4, len(header))))


def describe_machine() -> Mapping[str, Any]:
    host = host_target()
    best = host.levels[-1] if host.levels else host.cpu
    return {
        "cpu": host.description,
        "arch": best.arch,
        "mcpu": " ".join([best.mcpu, *best.features]),
        "cores": best.cores,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def versions(packages: Iterable[str]) -> Mapping[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _is_float(path: Path) -> bool:
    return "quantized" not in path.name


def cosine(a: Array, b: Array) -> float:
    """Of the angle between two arrays, taken as vectors."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--threads", type=_numbers, default=[1], metavar="N,N")
    parser.add_argument(
        "--priority", type=int, default=0, metavar="P", help="measure at real-time priority P"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="fewer runs, for a first look")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
