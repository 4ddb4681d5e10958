"""A .tflite bundle on Android, by LiteRT's own benchmark where that is on the device.

It runs on noise and prints statistics, no samples and no outputs, so the numbers are not checked
there.
"""

import dataclasses
import re

from gfcompile.runtime.bundle import Manifest, model_file
from gfcompile.runtime.devices import Device, open_device, unfit
from gfcompile.runtime.devices.board import SCRIPT, Board, cautions, read_board
from gfcompile.runtime.errors import NoVerdictError, UserError
from gfcompile.runtime.results import (
    TIMER_KERNELS,
    Caution,
    DeviceReport,
    Latencies,
    Protocol,
    ValidationResult,
)
from gfcompile.runtime.validate import (
    SINGLE_STREAM_RUNS,
    SINGLE_STREAM_S,
    Say,
    ValidateConfig,
    identify,
    now,
    versions,
)
from gfcompile.runtime.verdict import compared_with, judge

PROGRAM = "/data/local/tmp/benchmark_model"
_DOWNLOAD = "https://ai.google.dev/edge/litert/models/measurement"
_MODEL = "model.tflite"
_WARMUP_RUNS = 10
_WARMUP_S = 1
_MOST_S = 3600

_NUMBER = r"([\d.]+(?:e\+?\d+)?)"
_STATISTIC = re.compile(rf"(count|min|max|avg|std|median|p95)={_NUMBER}")
_TIMINGS = re.compile(rf"Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}")
_MEMORY = re.compile(rf"emory footprint .*overall={_NUMBER}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkOutput:
    """What the benchmark prints.

    Attributes:
        latencies: without samples. Where it gives no 90th and 99th percentile, the next higher
            statistic stands for them: its 95th or the maximum.
        memory_mb: that the model added, by its own account.
    """

    latencies: Latencies
    runs: int
    warmup_runs: int
    init_ms: float
    first_ms: float
    memory_mb: float | None

    @classmethod
    def read(cls, text: str) -> "BenchmarkOutput":
        """What was printed.

        Raises:
            ValueError: no such output.
        """
        phases = [
            {name: float(value) for name, value in _STATISTIC.findall(line)}
            for line in text.splitlines()
            if "count=" in line
        ]
        timings, memory = _TIMINGS.search(text), _MEMORY.search(text)
        if timings is None or not phases:
            raise ValueError("there are no timings in it")
        last = phases[-1]
        average = last.get("avg", last.get("median", float(timings.group(2))))
        most = last.get("max", average)
        high = last.get("p95", most)
        return cls(
            latencies=Latencies(
                samples_us=(),
                min_us=last.get("min", average),
                median_us=last.get("median", average),
                mean_us=average,
                p90_us=high,
                p99_us=most,
                max_us=most,
                cv=last.get("std", 0.0) / average if average > 0 else 0.0,
            ),
            runs=int(last["count"]),
            warmup_runs=int(phases[0]["count"]) if len(phases) > 1 else 0,
            init_ms=float(timings.group(1)) / 1e3,
            first_ms=float(timings.group(2)) / 1e3,
            memory_mb=None if memory is None else float(memory.group(1)),
        )


def validate_on_android(config: ValidateConfig, manifest: Manifest, say: Say) -> ValidationResult:
    """The latency of a .tflite bundle on an Android device.

    Raises:
        UserError: a demand that the benchmark cannot answer.
        NoVerdictError: no device, or no benchmark on it.
    """
    if config.budget.min_agreement is not None:
        raise UserError(
            "--min-agreement: LiteRT's benchmark returns no outputs; use --device local"
        )
    date = now()
    say(f"connect to {config.device}")
    with open_device(config.device) as device:
        before = read_board(device.script(SCRIPT))
        if "yes" not in device.script(f"[ -x {PROGRAM} ] && echo yes"):
            raise unfit(
                device.url,
                f"it has no {PROGRAM}; get android_aarch64_benchmark_model from {_DOWNLOAD}, "
                f"then adb push it to {PROGRAM} and adb shell chmod 755 {PROGRAM}",
            )
        say("copy the model there")
        device.send({_MODEL: model_file(config.bundle, manifest)})
        say("measure")
        output = _run(device, config)
        after = read_board(device.script(SCRIPT))
        commands = tuple(device.commands)
    budget = config.budget
    if config.against is not None:
        budget = compared_with(
            budget,
            config.against,
            config.bundle,
            device=device.url,
            threads=config.threads,
            batch=manifest.batch,
        )
    return ValidationResult(
        date=date,
        bundle=identify(config.bundle, manifest),
        device=_describe(device, before, after),
        budget=budget,
        verdict=judge(budget, None, output.latencies),
        protocol=Protocol(
            tool="LiteRT benchmark_model",
            rule="single-stream" if config.runs is None else "runs",
            timer=TIMER_KERNELS,
            threads=config.threads,
            warmup="a fixed number of runs",
            warmup_runs=output.warmup_runs,
            stable=False,
            runs=output.runs,
            duration_s=output.runs * output.latencies.mean_us / 1e6,
        ),
        latencies=output.latencies,
        load_ms=output.init_ms,
        first_inference_ms=output.first_ms,
        peak_memory_mb=output.memory_mb,
        cautions=(
            Caution(
                text="LiteRT's benchmark returns no outputs and no samples: numbers are unchecked, "
                "and its 95th percentile stands for the 90th",
                fix=f"gfcompile validate {config.bundle.name} --device local",
            ),
            *cautions(before, after, (), stable=True, cv=output.latencies.cv),
        ),
        commands=commands,
        versions=versions(manifest),
    )


def _run(device: Device, config: ValidateConfig) -> BenchmarkOutput:
    runs = SINGLE_STREAM_RUNS if config.runs is None else config.runs
    seconds = SINGLE_STREAM_S if config.runs is None else 0
    warmup = _WARMUP_RUNS if config.warmup is None else config.warmup
    command = [PROGRAM, f"--graph={_MODEL}", f"--num_runs={runs}", f"--min_secs={seconds}"]
    command += [f"--max_secs={_MOST_S}", f"--warmup_runs={max(warmup, 1)}"]
    command += [f"--warmup_min_secs={_WARMUP_S if config.warmup is None else 0}"]
    command += [f"--num_threads={config.threads or -1}", "--use_xnnpack=true"]
    done = device.run(command, timeout_s=config.timeout_s + 10 * seconds)
    if done.status != 0:
        raise NoVerdictError(f"LiteRT's benchmark failed on {device.url}: {done.reason}")
    try:
        return BenchmarkOutput.read(done.stdout + done.stderr)
    except ValueError as error:
        raise NoVerdictError(f"LiteRT's benchmark on {device.url}: {error}") from error


def _describe(device: Device, before: Board, after: Board) -> DeviceReport:
    return DeviceReport(
        url=device.url,
        kind=device.kind,
        name=before.name or device.name,
        arch=before.arch,
        cpu_model=before.cpu_model,
        processor="cpu, LiteRT",
        memory_mb=before.memory_mb,
        versions=before.versions,
        before=before.state,
        after=after.state,
    )
