"""Validation of model files that a runtime of others executes."""

import dataclasses
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.devices import open_device
from gfcompile.runtime.devices.board import SCRIPT, Board, cautions, read_board
from gfcompile.runtime.errors import DeviceError, NoVerdictError, UserError
from gfcompile.runtime.golden import read_golden
from gfcompile.runtime.images import dequantize
from gfcompile.runtime.placement import Placement
from gfcompile.runtime.results import (
    TIMER_WHOLE,
    DeviceReport,
    KernelTime,
    Latencies,
    Protocol,
    ValidationResult,
    Verdict,
)
from gfcompile.runtime.session import Session, load
from gfcompile.runtime.validate import (
    SINGLE_STREAM_RUNS,
    SINGLE_STREAM_S,
    Say,
    ValidateConfig,
    hold_against,
    identify,
    now,
    versions,
)
from gfcompile.runtime.verdict import compared_with, judge

_WINDOW, _WINDOWS, _CLOSE = 8, 3, 0.02
_WARMUP_S = 10.0
_PROFILE_RUNS = 20


def validate_format(config: ValidateConfig, manifest: Manifest, say: Say) -> ValidationResult:
    """As `validate.validate`, for a .tflite or .mlpackage bundle.

    Raises:
        UserError: a device that cannot run them, or an option that the runtime does not have.
        NoVerdictError: no such runtime is installed.
    """
    if config.pin is not None or config.kernels_only:
        raise UserError(f"--pin and --kernels-only are not for bundles of kind {manifest.kind!r}")
    if manifest.kind == "tflite" and config.device.startswith("adb:"):
        from gfcompile.runtime.litert_benchmark import validate_on_android

        return validate_on_android(config, manifest, say)
    if config.device != "local":
        also = ", or adb://serial" if manifest.kind == "tflite" else ""
        raise UserError(
            f"--device {config.device}: bundles of kind {manifest.kind!r} are validated with "
            f"--device local, by what is installed here{also}"
        )
    date = now()
    with open_device("local") as device:
        before = read_board(device.script(SCRIPT))
        say("load the model")
        start = perf_counter()
        try:
            session = load(config.bundle, threads=config.threads)
        except DeviceError as error:
            raise NoVerdictError(str(error)) from error
        load_ms = 1e3 * (perf_counter() - start)
        with session:
            if session.stand_in:
                config.refuse_demands_on_time(f"this bundle is {session.stand_in} here")
            result = _numbers(session, config, manifest, date, before, say)
            result = dataclasses.replace(result, placements=_placements(session, say))
            if session.stand_in:
                result = dataclasses.replace(
                    result, no_latency=session.stand_in, stand_in=session.stand_in
                )
            else:
                result = dataclasses.replace(result, load_ms=load_ms)
                result = _with_latency(result, session, config, say)
        after = read_board(device.script(SCRIPT))
    latencies, protocol = result.latencies, result.protocol
    budget = config.budget
    if config.against is not None and latencies is not None:
        budget = compared_with(
            budget,
            config.against,
            config.bundle,
            device="local",
            threads=config.threads,
            batch=manifest.batch,
        )
    return dataclasses.replace(
        result,
        budget=budget,
        verdict=judge(budget, result.numbers, latencies),
        device=dataclasses.replace(result.device, after=after.state),
        cautions=()
        if latencies is None or protocol is None
        else tuple(
            cautions(
                before,
                after,
                latencies.samples_us,
                stable=protocol.stable or config.warmup is not None,
                cv=latencies.cv,
            )
        ),
    )


def _numbers(
    session: Session,
    config: ValidateConfig,
    manifest: Manifest,
    date: str,
    before: Board,
    say: Say,
) -> ValidationResult:
    """The result as far as it takes no time: numbers, and where they come from."""
    golden = read_golden(config.bundle, manifest)
    numbers = None
    if golden is not None:
        say("hold its numbers against the golden data")
        golden = golden.in_whole_batches(session.batch)
        logits = dequantize(session.run(session.encode(*golden.images)), session.outputs[0])
        numbers = hold_against(golden, logits.reshape(golden.logits.shape))
    return ValidationResult(
        date=date,
        bundle=identify(config.bundle, manifest),
        device=DeviceReport(
            url="local",
            kind="evaluator" if session.stand_in else "local",
            name=before.name,
            arch=before.arch,
            cpu_model=before.cpu_model,
            processor=session.device_name,
            memory_mb=before.memory_mb,
            versions=before.versions,
            before=before.state,
        ),
        budget=config.budget,
        verdict=Verdict(passed=False, reasons=()),
        numbers=numbers,
        versions=versions(manifest),
    )


def _placements(session: Session, say: Say) -> tuple[Placement, ...]:
    try:
        return tuple(session.placements())
    except DeviceError as error:  # systems before macOS 14.4 keep it to themselves
        say(f"no compute units: {error}")
        return ()


def _with_latency(
    result: ValidationResult, session: Session, config: ValidateConfig, say: Say
) -> ValidationResult:
    image = _sample(session, config)
    runs = SINGLE_STREAM_RUNS if config.runs is None else config.runs
    seconds = SINGLE_STREAM_S if config.runs is None else 0
    first_ms = _run_us(session, image) / 1e3
    say(f"measure: {runs} runs" + (f" and {seconds} s at least" if seconds else ""))
    warmup_runs, stable = _warm_up(lambda: _run_us(session, image), config.warmup)
    samples: list[float] = []
    start = perf_counter()
    while len(samples) < runs or perf_counter() - start < seconds:
        samples.append(_run_us(session, image))
    duration_s = perf_counter() - start
    steps = session.profile(image, runs=min(runs, _PROFILE_RUNS))
    return dataclasses.replace(
        result,
        first_inference_ms=first_ms,
        latencies=Latencies.of(samples),
        protocol=Protocol(
            tool=session.device_name,
            rule="single-stream" if config.runs is None else "runs",
            timer=TIMER_WHOLE,
            threads=config.threads,
            warmup="until the medians of three windows of 8 runs are within 2%, 10 s at most"
            if config.warmup is None
            else "a fixed number of runs",
            warmup_runs=warmup_runs,
            stable=stable,
            runs=len(samples),
            duration_s=duration_s,
        ),
        kernels=tuple(
            KernelTime(
                label=step.label, kernel=step.kernel, median_us=1e6 * step.seconds / step.calls
            )
            for step in steps
        ),
    )


def _sample(session: Session, config: ValidateConfig) -> npt.NDArray[Any]:
    golden = read_golden(config.bundle, session.manifest)
    if golden is not None:
        return session.encode(*golden.images[: session.batch])
    spec = session.inputs[0]
    return np.zeros(spec.shape, spec.dtype)


def _run_us(session: Session, image: npt.NDArray[Any]) -> float:
    start = perf_counter()
    session.run(image)
    return 1e6 * (perf_counter() - start)


def _warm_up(run_us: Callable[[], float], fixed: int | None) -> tuple[int, bool]:
    """How many runs it took, and whether times got stable; the rule is gfbench's."""
    if fixed is not None:
        for _ in range(fixed):
            run_us()
        return fixed, False
    medians: list[float] = []
    end = perf_counter() + _WARMUP_S
    while perf_counter() < end:
        medians.append(float(np.median([run_us() for _ in range(_WINDOW)])))
        last = medians[-_WINDOWS:]
        if len(last) == _WINDOWS and max(last) <= (1 + _CLOSE) * min(last):
            return _WINDOW * len(medians), True
    return _WINDOW * len(medians), False
