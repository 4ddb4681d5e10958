"""Host bundles against ONNX Runtime: the same model, the same graph, the same input, one process.

    python benchmarks/cpu.py [--models gfnet_xs ...] [--threads 1] [--quick] [--json FILE]

Each contender runs a few times in turn, round after round, so that a machine that slows down or
is shared slows all of them alike: the ratios are what counts, the times are of this machine.
Exits with 1 if a bundle takes more than `MAX_RATIO` times what ONNX Runtime takes for its graph.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import numpy_helper

import gfcompile
from gfcompile.runtime import load
from gfcompile.runtime.images import Transform, preprocess, stand_in_photos

MAX_RATIO = 1.5
PACKAGES = ("gfcompile", "onnxruntime", "apache-tvm", "torch", "numpy")

Array = npt.NDArray[Any]
Precision = Literal["float32", "int8"]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that computes the logits of one image."""

    name: str
    run: Callable[[Array], Array]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contender on one model.

    Attributes:
        ratio: our median over this one's; above 1 this one is faster.
        difference: largest difference of its logits from those of ONNX Runtime on the graph,
            over the largest of those.
    """

    model: str
    precision: Precision
    contender: str
    median_ms: float
    min_ms: float
    runs: int
    ratio: float
    difference: float


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    rounds, repeats = (8, 3) if options.quick else (30, 5)
    machine = describe_machine()  # its load before we add ours
    results: list[Result] = []
    for model in options.models:
        for precision in ("float32", "int8"):
            results += compare(model, precision, options.threads, rounds, repeats)
    print(f"{machine['cpu']}; {options.threads} thread(s), batch 1")
    print(f"load before: {machine['load']:.1f}\n")
    print_table(results)
    print(
        f"\nratio: our median over the contender's; at most {MAX_RATIO} over the same graph's.\n"
        "Our int8 graph has signed activations; ONNX Runtime advises unsigned ones on x86, so it\n"
        "runs that variant as well."
    )
    if options.json:
        report = {
            "benchmark": "cpu",
            "machine": machine,
            "versions": {package: metadata.version(package) for package in PACKAGES},
            "threads": options.threads,
            "rounds": rounds,
            "repeats": repeats,
            "max_ratio": MAX_RATIO,
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    missed = [r for r in results if r.contender == SAME_GRAPH and r.ratio > MAX_RATIO]
    for result in missed:
        print(
            f"missed: {result.model} {result.precision} takes {result.ratio:.2f} times as long as "
            f"{SAME_GRAPH}, {MAX_RATIO} are allowed",
            file=sys.stderr,
        )
    return 1 if missed else 0


OURS = "gfcompile"
SAME_GRAPH = "ONNX Runtime, same graph"
UNSIGNED = "ONNX Runtime, unsigned"


def compare(
    model: str, precision: Precision, threads: int, rounds: int, repeats: int
) -> list[Result]:
    """Compiles `model` for this machine and measures it beside ONNX Runtime."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        bundle = gfcompile.compile_model(
            gfcompile.CompileConfig(
                model=model,
                target="host",
                precision=precision,
                output=folder / "bundle",
                dump=folder / "dump",
            )
        )
        # Stages are numbered; the last one is what the kernels were compiled from.
        graph = onnx.load(max((folder / "dump").glob("*.onnx")))
        assert bundle.manifest.transform is not None
        transform = Transform.from_dict(dict(bundle.manifest.transform))
        image = preprocess(stand_in_photos()[0], transform)
        with load(bundle.path, threads=threads) as session:
            contenders = [
                Contender(name=OURS, run=session.run),
                onnx_runtime(SAME_GRAPH, graph, threads),
            ]
            if precision == "int8":
                contenders.append(onnx_runtime(UNSIGNED, unsigned(graph), threads))
            times = interleave(contenders, image, rounds, repeats)
            expected = contenders[1].run(image)
            medians = {name: statistics.median(values) for name, values in times.items()}
            return [
                Result(
                    model=model,
                    precision=precision,
                    contender=contender.name,
                    median_ms=medians[contender.name] * 1e3,
                    min_ms=min(times[contender.name]) * 1e3,
                    runs=len(times[contender.name]),
                    ratio=medians[OURS] / medians[contender.name],
                    difference=float(
                        np.abs(contender.run(image) - expected).max() / np.abs(expected).max()
                    ),
                )
                for contender in contenders
            ]


def onnx_runtime(name: str, graph: onnx.ModelProto, threads: int) -> Contender:
    """ONNX Runtime as a user would run it: all optimizations on."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3
    session = ort.InferenceSession(
        graph.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    return Contender(
        name=name, run=lambda image: np.asarray(session.run(None, {"image": image})[0])
    )


def unsigned(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The same QDQ graph with activations in uint8: every zero point moved by 128."""
    moved = onnx.ModelProto()
    moved.CopyFrom(graph)
    initializers = {tensor.name: tensor for tensor in moved.graph.initializer}
    quantized = {n.output[0] for n in moved.graph.node if n.op_type == "QuantizeLinear"}
    for node in moved.graph.node:
        if node.op_type == "QuantizeLinear" or (
            node.op_type == "DequantizeLinear" and node.input[0] in quantized
        ):
            signed = numpy_helper.to_array(initializers[node.input[2]])
            # A weight may share the signed one, so that one stays.
            name = f"{node.input[2]}_unsigned"
            if name not in initializers:
                value = (signed.astype(np.int16) + 128).astype(np.uint8)
                initializers[name] = moved.graph.initializer.add()
                initializers[name].CopyFrom(numpy_helper.from_array(value, name))
            node.input[2] = name
    del moved.graph.value_info[:]  # inferred anew, with the new types
    return moved


def interleave(
    contenders: Sequence[Contender], image: Array, rounds: int, repeats: int
) -> Mapping[str, list[float]]:
    """Seconds of each run, by contender: `repeats` of each in turn, `rounds` times."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        for _ in range(3):
            contender.run(image)
    for _ in range(rounds):
        for contender in contenders:
            contender.run(image)  # brings its code and weights back into the caches
            for _ in range(repeats):
                started = time.perf_counter()
                contender.run(image)
                times[contender.name].append(time.perf_counter() - started)
    return times


def print_table(results: Sequence[Result]) -> None:
    header = ("model", "precision", "", "median ms", "min ms", "ratio", "difference")
    rows = [
        (
            result.model,
            result.precision,
            result.contender,
            f"{result.median_ms:.2f}",
            f"{result.min_ms:.2f}",
            "" if result.contender == OURS else f"{result.ratio:.2f}",
            f"{result.difference:.1e}",
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def describe_machine() -> Mapping[str, Any]:
    from gfcompile.targets.target import find_target

    host = find_target("host")
    return {
        "cpu": host.description,
        "arch": host.cpu.arch,
        "mcpu": " ".join([host.cpu.mcpu, *host.cpu.features]),
        "cores": host.cpu.cores,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["gfnet_xs"], metavar="NAME")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="fewer runs, for a first look")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
