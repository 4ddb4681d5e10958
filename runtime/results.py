"""What a validation found: one file per validation, kept and compared with later ones.

A number without its protocol is worthless, so the file holds the protocol, the state of the
board before and after, and every sample beside the verdict.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from gfcompile.runtime.bundle import MANIFEST_NAME
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.placement import Placement
from gfcompile.runtime.records import from_json, parse_json, to_json

SCHEMA = "gfcompile-result"
SCHEMA_VERSION = 1
MAX_SAMPLES = 20_000  # kept in a file; the statistics are always of all

TIMER_WHOLE = "input copied in, to output available"
TIMER_KERNELS = "kernels alone, copies of input and output left out"


@dataclass(frozen=True, kw_only=True)
class BundleIdentity:
    """Which bundle was validated.

    Attributes:
        name: of its folder.
        kind: "gfrt", "tflite" or "coreml".
        requested, storage, compute: see `bundle.Precision`.
        batch: how many images one inference takes.
        manifest_sha256: of manifest.json, which holds the hashes of all other files.
    """

    name: str
    model: str
    target: str
    kind: str
    requested: str
    storage: str
    compute: str
    weights: str
    arch: str
    size_bytes: int
    manifest_sha256: str
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class CoreState:
    """One logical CPU; a frequency is None where the system does not say.

    Attributes:
        min_mhz, max_mhz: what it can do.
        limit_mhz: the highest that it is allowed at the moment.
    """

    index: int
    mhz: float | None = None
    min_mhz: float | None = None
    max_mhz: float | None = None
    limit_mhz: float | None = None
    governor: str = ""


@dataclass(frozen=True, kw_only=True)
class BoardState:
    """What the board said of itself at one moment.

    Attributes:
        temperatures_c: by sensor.
        throttling: each way in which the board says that it is, or was, slowed down.
        throttle_events: counters of the kernel by name; a higher one after the run says that it
            was slowed down meanwhile.
        power_mode: of nvpmodel, such as "MAXN" or "MODE_5W"; "" off a Jetson.
        clocks_mhz: of GPU and memory, by name.
        load_1min: mean number of running processes.
        memory_free_mb: that programs can still have.
        others: processes of others that use the CPU most, as "name percent%".
    """

    cores: tuple[CoreState, ...] = ()
    temperatures_c: Mapping[str, float] = field(default_factory=dict)
    throttling: tuple[str, ...] = ()
    throttle_events: Mapping[str, int] = field(default_factory=dict)
    power_mode: str = ""
    clocks_mhz: Mapping[str, float] = field(default_factory=dict)
    load_1min: float | None = None
    memory_free_mb: float | None = None
    others: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """Where it ran.

    Attributes:
        url: as given to --device, without a password.
        kind: "local", "ssh", "adb", "qemu", "rpc", or "evaluator" where no device was involved.
        name: of the board or machine, as it calls itself.
        processor: "cpu", or "cuda: " and the GPU's name; "" where nothing ran.
        versions: kernel, L4T, CUDA, Android and the like.
        before, after: None where the device does not say, as under QEMU.
    """

    url: str
    kind: Literal["local", "ssh", "adb", "qemu", "rpc", "evaluator"]
    name: str
    arch: str
    cpu_model: str = ""
    processor: str = ""
    memory_mb: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    before: BoardState | None = None
    after: BoardState | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the time was taken.

    Attributes:
        tool: what measured, with its version.
        rule: "runs" is a fixed number of them; "single-stream" is that of MLPerf's scenario, at
            least 1024 runs and at least 60 seconds, whose result is the 90th percentile.
        timer: what lies between start and stop of the clock: TIMER_WHOLE or TIMER_KERNELS.
        pinned_cpus: that the threads were bound to; empty where the system chose.
        warmup: how it was decided that the device is warm, in words.
        stable: whether the warm-up ended because times were stable, not because of its limit.
    """

    tool: str
    rule: Literal["runs", "single-stream"]
    timer: str
    threads: int
    pinned_cpus: tuple[int, ...] = ()
    warmup: str
    warmup_runs: int
    stable: bool
    runs: int
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Time of one inference, in microseconds, over all runs; of all images of its batch together.

    Attributes:
        samples_us: in order of time; every `sample_every`-th run's.
        cv: standard deviation over mean.
    """

    samples_us: tuple[float, ...]
    sample_every: int = 1
    min_us: float
    median_us: float
    mean_us: float
    p90_us: float
    p99_us: float
    max_us: float
    cv: float

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> Self:
        """The statistics of all samples, of which at most MAX_SAMPLES are kept."""
        ordered = sorted(samples_us)
        mean = math.fsum(ordered) / len(ordered)
        variance = math.fsum((x - mean) ** 2 for x in ordered) / len(ordered)
        every = math.ceil(len(ordered) / MAX_SAMPLES)
        return cls(
            samples_us=tuple(samples_us[::every]),
            sample_every=every,
            min_us=ordered[0],
            median_us=percentile(ordered, 50),
            mean_us=mean,
            p90_us=percentile(ordered, 90),
            p99_us=percentile(ordered, 99),
            max_us=ordered[-1],
            cv=math.sqrt(variance) / mean if mean > 0 else 0.0,
        )

    def at(self, percent: float) -> float:
        """The percentile in microseconds; from the kept samples unless it is a stored one."""
        stored = {0.0: self.min_us, 50.0: self.median_us, 90.0: self.p90_us, 99.0: self.p99_us}
        if percent in stored:
            return stored[percent]
        if not self.samples_us:  # the next higher of what is known
            return next((stored[p] for p in sorted(stored) if p >= percent), self.max_us)
        return self.max_us if percent >= 100 else percentile(sorted(self.samples_us), percent)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest of the ascending values that `percent` of them do not exceed (nearest rank).

    A measured value, as MLPerf has it; only the median of an even number is a mean of two.
    """
    if percent == 50:
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """One step of the plan, in order.

    Attributes:
        label: the layer that it serves.
        median_us: of one call, profiled in runs apart from the latency's; on a GPU between events.
        flops, bytes: of one call, from the manifest; None where unknown. Bytes are those of the
            operands, each moved once.
        arithmetic: which of the target's peaks counts: "float32", "float16" or "int8".
    """

    label: str
    kernel: str
    median_us: float
    flops: int | None = None
    bytes: int | None = None
    arithmetic: Literal["float32", "float16", "int8"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The device's outputs against the bundle's golden ones.

    Attributes:
        reference: what the golden outputs are.
        inferences: of one image each.
        top1_agreement: over them; None for outputs that are no logits.
        max_abs_error: None if an output holds NaN or infinity.
        tolerance: that max_abs_error may have; None where it cannot be told, as with models that
            prune, where a score on the edge may keep another patch.
    """

    reference: str
    inferences: int
    top1_agreement: float | None
    max_abs_error: float | None
    sqnr_db: float | None
    tolerance: float | None
    within: bool


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What was demanded; None is no demand.

    Attributes:
        percentile: of the latency that must not exceed max_latency_ms.
        against: the result file that the latency was compared with, and max_regression by how
            much it may be slower, as a fraction.
    """

    max_latency_ms: float | None = None
    percentile: float = 90.0
    min_agreement: float | None = None
    against: str = ""
    against_us: float | None = None
    max_regression: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the demands were met.

    Attributes:
        reasons: one line for each demand, met or missed.
        latency_us: at the budget's percentile; None where no latency was taken.
    """

    passed: bool
    reasons: tuple[str, ...]
    latency_us: float | None = None


@dataclass(frozen=True, kw_only=True)
class Caution:
    """What makes the number unfair, and the command that mends it ("" where there is none)."""

    text: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """One validation of one bundle on one device.

    Attributes:
        date: when it began, ISO 8601 with time zone.
        protocol, latencies: None where no latency was taken; `no_latency` says why.
        instructions: retired per inference, under QEMU with its counting plugin.
        peak_memory_mb: resident set of the process that ran the model.
        runtime_memory_mb: of it, what the model's own context and weights take, where known.
        stand_in: what stands in for the device's own runtime; "" where nothing does.
        placements: which unit runs each operation, where the runtime of a model format says so.
        commands: that were run, as typed in a shell.
        versions: of gfcompile, the runtime and what else took part here.
    """

    date: str
    bundle: BundleIdentity
    device: DeviceReport
    budget: Budget
    verdict: Verdict
    numbers: Numbers | None = None
    protocol: Protocol | None = None
    latencies: Latencies | None = None
    no_latency: str = ""
    load_ms: float | None = None
    first_inference_ms: float | None = None
    peak_memory_mb: float | None = None
    runtime_memory_mb: float | None = None
    instructions: int | None = None
    kernels: tuple[KernelTime, ...] = ()
    cautions: tuple[Caution, ...] = ()
    stand_in: str = ""
    placements: tuple[Placement, ...] = ()
    commands: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What json.dump takes."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **to_json(self)}

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: not a result, one of a newer version, or one that is damaged.
        """
        if not isinstance(values, Mapping) or values.get("schema") != SCHEMA:
            raise ValueError("it is no result of gfcompile validate")
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"its schema version is {version!r}, this gfcompile reads {SCHEMA_VERSION}"
            )
        return from_json(cls, values)


def read_result(path: Path) -> ValidationResult:
    """The result in a file.

    Raises:
        UserError: it cannot be read, or is no result.
    """
    try:
        return ValidationResult.from_dict(parse_json(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # JSON and Unicode errors are of this class
        raise UserError(f"{path} cannot be used: {error}") from error


def write_result(result: ValidationResult, path: Path) -> None:
    """Writes `path` whole or not at all."""
    text = json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
    made = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with made.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def history_folder(bundle: Path) -> Path:
    """Where the results of a bundle are kept: beside it, so that the bundle itself is unchanged."""
    bundle = bundle.absolute()
    return bundle.with_name(f"{bundle.name}-results")


def history(bundle: Path) -> list[Path]:
    """The files of earlier validations of the bundle in this folder, oldest first."""
    return sorted(history_folder(bundle).glob("*.json"))


def newest(bundle: Path) -> ValidationResult | None:
    """The newest result of the bundle in this folder; None if there is none of it as it is now."""
    digest = manifest_sha256(bundle)
    for path in reversed(history(bundle)):
        result = read_result(path)
        if result.bundle.manifest_sha256 == digest:
            return result
    return None


def manifest_sha256(bundle: Path) -> str:
    """What tells the bundle from every other one."""
    return hashlib.sha256((bundle / MANIFEST_NAME).read_bytes()).hexdigest()
