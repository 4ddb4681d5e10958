"""`gfcompile validate` and `gfcompile profile`: arguments in, a verdict or a table out."""

import argparse
import json
import sys
from pathlib import Path

from gfcompile.compile.command_line import print_table
from gfcompile.runtime.devices import ADDRESSES
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.placement import placement_lines
from gfcompile.runtime.results import Budget, KernelTime, ValidationResult

MISSED = 1  # exit code where a budget or the numbers were missed
DEFAULT_REGRESSION = 5  # per cent
PROFILE_RUNS = 50
_SINGLE_STREAM = "as MLPerf's single stream, 1024 and 60 seconds at least"


def validate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    _device_arguments(parser, runs=_SINGLE_STREAM)
    demands = parser.add_argument_group("demands")
    demands.add_argument("--max-latency-ms", type=float, metavar="X")
    demands.add_argument(
        "--percentile", type=float, default=90, metavar="P", help="of the latency (default: 90)"
    )
    demands.add_argument(
        "--min-agreement",
        type=float,
        metavar="F",
        help="the share of golden images that must have the same top class, such as 0.99",
    )
    demands.add_argument(
        "--against",
        metavar="last|FILE",
        help="an earlier result that must not be slower; last: of this bundle on this device",
    )
    demands.add_argument(
        "--max-regression",
        type=float,
        metavar="PERCENT",
        help=f"by how much it may be slower than --against (default: {DEFAULT_REGRESSION})",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print the verdict alone")


def profile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    _device_arguments(parser, runs=str(PROFILE_RUNS))
    parser.add_argument("--json", action="store_true", help="print JSON")


def _device_arguments(parser: argparse.ArgumentParser, *, runs: str) -> None:
    parser.add_argument(
        "--device", default="local", metavar="D", help=f"{ADDRESSES} (default: local)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="0: one for each big CPU (default: 1)"
    )
    parser.add_argument("--pin", metavar="big|LIST", help="the big CPUs, or such as 0,2-3")
    parser.add_argument(
        "--runs",
        type=int,
        metavar="N",
        help=f"runs to time (default: {runs})",
    )
    parser.add_argument(
        "--warmup", type=int, metavar="N", help="runs before (default: until times are stable)"
    )
    parser.add_argument(
        "--kernels-only", action="store_true", help="leave copies of input and output out"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=300,
        metavar="S",
        help="for what should take seconds on the device (default: 300)",
    )


def validate_command(options: argparse.Namespace) -> int:
    """Validates, keeps result and report, prints the result, and returns the exit code."""
    from gfcompile.compile.report_commands import write_validation_report
    from gfcompile.runtime.validate import keep

    regression = options.max_regression
    if regression is None:
        regression = DEFAULT_REGRESSION
    elif options.against is None:
        raise UserError("--max-regression is for --against; add it")
    budget = Budget(
        max_latency_ms=options.max_latency_ms,
        percentile=options.percentile,
        min_agreement=options.min_agreement,
        max_regression=None if options.against is None else regression / 100,
    )
    result = _validated(options, budget, options.against, quiet=options.quiet or options.json)
    path = keep(result, options.bundle)
    report = path.with_suffix(".html")
    write_validation_report(result, options.bundle, report)
    if options.json:
        print(json.dumps(result.to_dict(), indent=1, allow_nan=False))
    else:
        print_result(result, brief=options.quiet)
        if options.against == "last" and result.budget.against_us is None:
            _tell("note: the first result of this bundle by as many threads on this device")
        print(f"{path}: the result\n{report}: the report" if not options.quiet else path)
    return 0 if result.verdict.passed else MISSED


def profile_command(options: argparse.Namespace) -> int:
    """Prints the kernels, the slowest first."""
    from gfcompile.runtime.bundle import read_manifest
    from gfcompile.runtime.roofline import KernelCost, kernel_costs, roofline, target_peaks
    from gfcompile.runtime.validate import NO_LATENCY_UNDER_QEMU

    if options.device.startswith("qemu:"):
        raise UserError(f"--device {options.device}: no profile, as {NO_LATENCY_UNDER_QEMU}")
    options.runs = PROFILE_RUNS if options.runs is None else options.runs
    result = _validated(options, Budget(), None, quiet=options.json)
    if not result.kernels:
        raise UserError(f"--device {options.device}: no profile, as {result.no_latency}")
    kernels = sorted(result.kernels, key=lambda kernel: -kernel.median_us)
    if options.json:
        print(json.dumps([_kernel_json(kernel) for kernel in kernels], indent=1))
        return 0
    manifest = read_manifest(options.bundle)
    peaks, costs = target_peaks(manifest), kernel_costs(manifest)
    total_us = sum(kernel.median_us for kernel in kernels)
    rows: list[tuple[str, ...]] = []
    for kernel in kernels:
        cost = costs.get(kernel.kernel, KernelCost())
        least = None if peaks is None else roofline(peaks, cost, options.threads)
        share = "-" if least is None else f"{_ratio(least.us, kernel.median_us):.0%}"
        roof = share if least is None else f"{share} of {least.bound}"
        rows.append(
            (
                kernel.label,
                kernel.kernel,
                f"{kernel.median_us:.1f}",
                f"{_ratio(kernel.median_us, total_us):.1%}",
                _rate(kernel.flops, kernel.median_us),
                _rate(kernel.bytes, kernel.median_us),
                roof,
            )
        )
    header = ("layer", "kernel", "us", "share", "GFLOP/s", "GB/s", "roofline")
    print_table(header, rows, right={2, 3, 4, 5, 6})
    print(
        f"\n{total_us / 1e3:.3f} ms in {len(kernels)} kernels"
        f"{_per_image(result, f'{total_us / result.bundle.batch / 1e3:.3f} ms')} "
        f"on {result.device.name} "
        f"({result.device.processor}); the roofline is that of {result.bundle.target}"
    )
    _print_cautions(result)
    return 0


def print_result(result: ValidationResult, *, brief: bool = False) -> None:
    """A validation for people, the verdict last."""
    if not brief:
        device = result.device
        described = ", ".join(
            part for part in (device.cpu_model, device.processor) if part and part != "cpu"
        )
        print(f"{result.bundle.name} on {device.name}" + (f" ({described})" if described else ""))
        for name, version in device.versions.items():
            print(f"  {name:<12} {version}")
        _print_state(result)
        _print_latency(result)
        _print_numbers(result)
        for line in placement_lines(result.placements):
            print(f"  {line}")
    _print_cautions(result)
    for reason in result.verdict.reasons:
        print(f"  {reason}")
    print("PASSED" if result.verdict.passed else "FAILED")


def _validated(
    options: argparse.Namespace, budget: Budget, against: str | None, *, quiet: bool
) -> ValidationResult:
    from gfcompile.runtime.validate import ValidateConfig, validate

    config = ValidateConfig(
        bundle=options.bundle,
        device=options.device,
        budget=budget,
        against=against,
        runs=options.runs,
        warmup=options.warmup,
        threads=options.threads,
        pin=options.pin,
        kernels_only=options.kernels_only,
        timeout_s=options.timeout,
    )
    return validate(config, _quiet if quiet else _tell)


def _tell(text: str) -> None:
    print(f"  {text}", file=sys.stderr)


def _quiet(_text: str) -> None:
    pass


def _print_state(result: ValidationResult) -> None:
    state = result.device.before
    if state is None:
        return
    governors = dict.fromkeys(core.governor for core in state.cores if core.governor)
    clocks = [core.mhz for core in state.cores if core.mhz is not None]
    parts = [f"{len(state.cores)} cores"]
    parts += [f"{min(clocks):.0f} to {max(clocks):.0f} MHz"] if clocks else []
    parts += [f"governor {', '.join(governors)}"] if governors else []
    parts += [f"power mode {state.power_mode}"] if state.power_mode else []
    parts += [f"{max(state.temperatures_c.values()):.0f} C"] if state.temperatures_c else []
    parts += [] if state.load_1min is None else [f"load {state.load_1min:.2f}"]
    print(f"  {'board':<12} {', '.join(parts)}")


def _print_latency(result: ValidationResult) -> None:
    times, protocol = result.latencies, result.protocol
    if times is None or protocol is None:
        print(f"  {'latency':<12} none: {result.no_latency}")
        if result.instructions is not None:
            each = _per_image(result, f"{result.instructions / result.bundle.batch / 1e9:.4f} G")
            print(
                f"  {'instructions':<12} {result.instructions / 1e9:.4f} G retired per inference"
                f"{each}"
            )
        return
    shown = [("min", times.min_us), ("median", times.median_us), ("p90", times.p90_us)]
    shown += [("p99", times.p99_us)]
    numbers = ", ".join(f"{name} {us / 1e3:.3f} ms" for name, us in shown)
    print(f"  {'latency':<12} {numbers}, CV {times.cv:.1%}")
    if result.bundle.batch > 1:
        each = ", ".join(f"{name} {us / result.bundle.batch / 1e3:.3f} ms" for name, us in shown)
        print(f"  {'per image':<12} {each}; {result.bundle.batch} images per inference")
    chosen = (
        "a thread for each big CPU"
        if result.bundle.kind == "gfrt"
        else "threads as the runtime chooses"
    )
    threads = f"threads {protocol.threads}" if protocol.threads else chosen
    pinned = f" on CPUs {', '.join(map(str, protocol.pinned_cpus))}" if protocol.pinned_cpus else ""
    print(
        f"  {'protocol':<12} {protocol.rule}: {protocol.runs} runs in {protocol.duration_s:.1f} s "
        f"after {protocol.warmup_runs} to warm up, {threads}{pinned}; {protocol.timer}"
    )
    others = [("load", result.load_ms), ("first inference", result.first_inference_ms)]
    parts = [f"{name} {ms:.1f} ms" for name, ms in others if ms is not None]
    parts += [] if result.peak_memory_mb is None else [f"{result.peak_memory_mb:.1f} MB at most"]
    print(f"  {'beside':<12} {', '.join(parts)}")


def _per_image(result: ValidationResult, amount: str) -> str:
    """What one of several images takes, to follow what they take together."""
    batch = result.bundle.batch
    return "" if batch == 1 else f" of {batch} images, {amount} per image"


def _print_numbers(result: ValidationResult) -> None:
    numbers = result.numbers
    if numbers is None:
        print(f"  {'numbers':<12} not checked, for want of golden data or of outputs")
        return
    sqnr = "equal" if numbers.sqnr_db is None else f"SQNR {numbers.sqnr_db:.1f} dB"
    agreement = f"same class {numbers.top1_agreement or 0:.0%} of {numbers.inferences}, "
    error = "not finite" if numbers.max_abs_error is None else f"{numbers.max_abs_error:.3g}"
    print(f"  {'numbers':<12} {agreement}max error {error}, {sqnr}, against {numbers.reference}")


def _print_cautions(result: ValidationResult) -> None:
    for caution in result.cautions:
        print(f"  caution: {caution.text}" + (f"; {caution.fix}" if caution.fix else ""))


def _kernel_json(kernel: KernelTime) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(kernel)


def _rate(amount: int | None, us: float) -> str:
    return "-" if amount is None or us <= 0 else f"{amount / us / 1e3:.1f}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
