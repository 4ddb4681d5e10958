"""What pruning gains: a DynamicViT against its parent, ours and ONNX Runtime's, in one process.

    python benchmarks/pruning.py [--model dynamicvit_deit_s] [--ratios 0.9 0.8 0.7 0.5] [--quick]
                                 [--json FILE]

For each precision all contenders take turns, parent and pruned, our bundles and ONNX Runtime on
the same graphs, so that speed-ups and ratios are of one run. Where the CPU has AMX, which makes all
of an int8 model faster but its predictors, that which it gains by VNNI alone is told as well. "at
peak" is what pruning would gain if either model took nothing but its products, at the rate that the
core reached on nothing else just before: the predictors' share of an int8 model is in it, as they
stay in float32. "undisturbed" is as in `cpu.py`, and what pruning gains by it. Exits with 1 if
pruning at 0.7 gains less than `MIN_SPEED_UP` in our bundle, or the bundle is slower than ONNX
Runtime on its graph.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from cpu import (
    PACKAGES,
    Contender,
    Precision,
    core_peaks,
    describe_machine,
    interleave,
    onnx_runtime,
    undisturbed,
    versions,
)

import gfcompile
from gfcompile.compile.models import ModelSpec, model_spec
from gfcompile.compile.pruning_gain import estimated_gain
from gfcompile.runtime import Session, load
from gfcompile.runtime.images import preprocess, stand_in_photos
from gfcompile.runtime.roofline import Peaks
from gfcompile.targets.host import host_target

Array = npt.NDArray[np.generic]

VNNI_TARGET = "x86-64-v4"
MIN_SPEED_UP = 1.45  # at a keep ratio of 0.7
REQUIRED_AT = 0.7
PREDICTOR = "score_predictor"
# Beside AMX predictors are integers in digits: as many products as there are of digits.
DIGIT_PRODUCTS = 8


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model at one keep ratio; `keep_ratio` is None for the parent.

    Attributes:
        predictors: the share of our time, by our profile, that goes into choosing tokens.
        speed_up, ort_speed_up: the parent's median over this one's, ours and ONNX Runtime's.
        at_peak: what `speed_up` would be at the core's peak; None where that is not known.
        ratio: our median over ONNX Runtime's for the same graph.
        undisturbed_ms: ours, each kernel's fastest of many runs, added up.
        undisturbed_gain: the parent's over this one's.
    """

    model: str
    keep_ratio: float | None
    precision: Precision
    target: str
    macs: int
    median_ms: float
    predictors: float
    ort_median_ms: float
    speed_up: float
    at_peak: float | None
    ort_speed_up: float
    ratio: float
    undisturbed_ms: float
    undisturbed_gain: float


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    ratios: list[float] = [REQUIRED_AT] if options.quick else options.ratios
    rounds, repeats = (6, 2) if options.quick else (20, 3)
    peaks = core_peaks(1)
    results = [
        result
        for precision, target in _cases()
        for result in compare(options.model, ratios, precision, target, rounds, repeats, peaks)
    ]
    machine = describe_machine()
    print(f"{machine['cpu']}, 1 thread; batch 1; load {machine['load']:.1f}")
    print("peak, G operations/s:", *(f"{k} {v:.0f}" for k, v in peaks.items()), "\n")
    print_table(results)
    if options.json:
        report = {
            "benchmark": "pruning",
            "machine": machine,
            "versions": versions(PACKAGES),
            "min_speed_up": MIN_SPEED_UP,
            "peak_gops": peaks,
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    missed = [
        f"{r.precision} for {r.target}: pruned to {r.keep_ratio} it is {r.speed_up:.2f} times as "
        f"fast as its parent and takes {r.ratio:.2f} times as long as ONNX Runtime"
        for r in results
        if r.keep_ratio == REQUIRED_AT and (r.speed_up < MIN_SPEED_UP or r.ratio > 1)
    ]
    for line in missed:
        print(f"missed: {line}; {MIN_SPEED_UP} and 1 are required", file=sys.stderr)
    return 1 if missed else 0


def _cases() -> list[tuple[Precision, str]]:
    """The precisions, and the targets to compile for."""
    cases: list[tuple[Precision, str]] = [("float32", "host"), ("int8", "host")]
    has_amx = any(level.amx for level in host_target().levels)
    return [*cases, ("int8", VNNI_TARGET)] if has_amx else cases


def compare(
    model: str,
    ratios: Sequence[float],
    precision: Precision,
    target: str,
    rounds: int,
    repeats: int,
    peaks: Mapping[str, float],
) -> list[Result]:
    """The parent of `model` and `model` at each keep ratio, measured together."""
    parent = model_spec(model).parent
    assert parent is not None, f"{model} has no unpruned parent"
    cases = [(parent, None), *((model, ratio) for ratio in ratios)]
    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders, sessions = [], []
        for name, ratio in cases:
            folder = made / f"{name}-{ratio}"
            bundle = gfcompile.compile_model(
                gfcompile.CompileConfig(
                    model=name,
                    target=target,
                    precision=precision,
                    keep_ratio=ratio,
                    output=folder / "bundle",
                    dump=folder / "dump",
                )
            )
            session = stack.enter_context(load(bundle.path, threads=1))
            sessions.append(session)
            graph = onnx.load(max((folder / "dump").glob("*.onnx")))
            contenders.append(Contender(name=f"ours {ratio}", run=session.run))
            contenders.append(onnx_runtime(f"ort {ratio}", graph, 1))
        image = preprocess(stand_in_photos()[0], model_spec(model).transform)
        times = interleave(contenders, image, rounds, repeats)
        predictors = [predictor_share(session, image) for session in sessions]
        fastest = [undisturbed(session, image) for session in sessions]
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    return [
        Result(
            model=name,
            keep_ratio=ratio,
            precision=precision,
            target=target,
            macs=model_spec(name, ratio).macs,
            median_ms=medians[f"ours {ratio}"],
            predictors=share,
            ort_median_ms=medians[f"ort {ratio}"],
            speed_up=medians["ours None"] / medians[f"ours {ratio}"],
            at_peak=gain_at_peak(
                model_spec(name, ratio), model_spec(parent), precision, target, peaks
            ),
            ort_speed_up=medians["ort None"] / medians[f"ort {ratio}"],
            ratio=medians[f"ours {ratio}"] / medians[f"ort {ratio}"],
            undisturbed_ms=alone,
            undisturbed_gain=fastest[0] / alone,
        )
        for (name, ratio), share, alone in zip(cases, predictors, fastest, strict=True)
    ]


def gain_at_peak(
    spec: ModelSpec,
    parent: ModelSpec,
    precision: Precision,
    target: str,
    peaks: Mapping[str, float],
) -> float | None:
    """How many times as fast as `parent` the model would be if products alone took time."""
    if "float32" not in peaks:
        return None
    integers, floats = peaks.get("vnni", peaks["float32"]), peaks["float32"]
    if "amx" in peaks and target != VNNI_TARGET:
        integers, floats = peaks["amx"], max(floats, peaks["amx"] / DIGIT_PRODUCTS)
    products = Peaks(
        float32_gflops=floats,
        float16_gflops=floats,
        int8_gops=integers,
        bandwidth_gb_s=float("inf"),
    )
    return estimated_gain(spec, parent, products, int8=precision == "int8")


def predictor_share(session: Session, image: Array) -> float:
    """Of a session's time, that of the steps that score tokens."""
    steps = session.profile(image, runs=50)
    scoring = sum(step.seconds for step in steps if PREDICTOR in step.label)
    return scoring / sum(step.seconds for step in steps)


def print_table(results: Sequence[Result]) -> None:
    print(
        f"{'':20} {'keep':>5} {'':8} {'':9} {'GMAC':>5} {'ms':>7} {'gain':>6} {'at peak':>7}",
        end="",
    )
    print(f" {'undisturbed':>11} {'gain':>6}", end="")
    print(f" {'predictors':>10} {'ORT ms':>7} {'gain':>6} {'ours/ORT':>9}")
    for r in results:
        keep = "all" if r.keep_ratio is None else f"{r.keep_ratio:g}"
        at_peak = "" if r.at_peak is None else f"{r.at_peak:.2f}x"
        print(
            f"{r.model:20} {keep:>5} {r.precision:8} {r.target:9} {r.macs / 1e9:5.2f} "
            f"{r.median_ms:7.2f} {r.speed_up:5.2f}x {at_peak:>7} "
            f"{r.undisturbed_ms:11.2f} {r.undisturbed_gain:5.2f}x {r.predictors:10.1%} "
            f"{r.ort_median_ms:7.2f} {r.ort_speed_up:5.2f}x {r.ratio:9.2f}"
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="dynamicvit_deit_s", metavar="NAME")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.5])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="0.7 alone, and fewer runs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
