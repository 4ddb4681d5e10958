"""A bundle on a device: numbers against its golden data, latency against a budget."""

import dataclasses
import hashlib
import platform
import re
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.bench import BENCH_NAME
from gfcompile.runtime.bench_report import BenchReport
from gfcompile.runtime.bundle import MANIFEST_NAME, Manifest, check_bundle
from gfcompile.runtime.device.gfrt import MAX_THREADS
from gfcompile.runtime.devices import Device, open_device, unfit
from gfcompile.runtime.devices.base import full_disk, looks_full
from gfcompile.runtime.devices.board import SCRIPT, Board, cautions, read_board
from gfcompile.runtime.devices.qemu import QemuDevice
from gfcompile.runtime.errors import BundleError, NoVerdictError, UserError
from gfcompile.runtime.exactness import max_abs_error, sqnr_db, top1_agreement
from gfcompile.runtime.golden import Golden, read_golden
from gfcompile.runtime.results import (
    TIMER_KERNELS,
    TIMER_WHOLE,
    Budget,
    BundleIdentity,
    DeviceReport,
    Numbers,
    Protocol,
    ValidationResult,
    Verdict,
    history_folder,
    write_result,
)
from gfcompile.runtime.roofline import kernel_costs
from gfcompile.runtime.verdict import compared_with, judge
from gfcompile.runtime.version import VERSION

SINGLE_STREAM_RUNS, SINGLE_STREAM_S = 1024, 60
_FOR_PROGRAMMERS = ("gfrt.h", "gfrt.py", "labels.txt")  # gfbench needs every other file
_IMAGES, _OUTPUTS = "golden.u8", "outputs.f32"
_QEMU_IMAGES = 2  # of the golden ones: an emulated inference takes seconds
_NO_DEMANDS = Budget()
_NOT_EXECUTED, _NOT_FOUND = 126, 127  # a shell's exit status
NO_LATENCY_UNDER_QEMU = "QEMU shows what a device computes, not how fast"


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """What to validate, where, and what is demanded.

    Attributes:
        device: an address, see `devices.ADDRESSES`.
        against: see `verdict.compared_with`.
        runs: to time; None is MLPerf's single-stream rule.
        warmup: runs before; None goes on until times are stable.
        threads: 0 is one for each big CPU.
        pin: "big" for the fastest CPUs, or a list such as "0,2-3".
        kernels_only: whether copies of input and output are left out of the time.
        timeout_s: for what should take seconds; timed runs get what they need on top.
    """

    bundle: Path
    device: str = "local"
    budget: Budget = _NO_DEMANDS
    against: str | None = None
    runs: int | None = None
    warmup: int | None = None
    threads: int = 1
    pin: str | None = None
    kernels_only: bool = False
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        budget = self.budget
        checks = [
            ("--runs", self.runs, 1, 1_000_000),
            ("--warmup", self.warmup, 0, 1_000_000),
            ("--threads", self.threads, 0, MAX_THREADS),
            ("--timeout", self.timeout_s, 1, 1e6),
            ("--percentile", budget.percentile, 1, 100),
            ("--min-agreement", budget.min_agreement, 0, 1),
            ("--max-latency-ms", budget.max_latency_ms, 1e-6, 1e9),
            (
                "--max-regression",
                None if budget.max_regression is None else 100 * budget.max_regression,
                0,
                1e6,
            ),
        ]
        for name, value, least, most in checks:
            if value is not None and not least <= value <= most:
                raise UserError(f"{name} {value:g}: it takes {least:g} to {most:g}")
        if self.pin is not None and not re.fullmatch(r"big|\d+(-\d+)?(,\d+(-\d+)?)*", self.pin):
            raise UserError(f"--pin {self.pin}: it takes big, or CPUs such as 0,2-3")

    def refuse_demands_on_time(self, reason: str) -> None:
        """To be called where no time can be taken: a demand on it must not pass unheard.

        Raises:
            UserError: there is one.
        """
        if self.budget.max_latency_ms is not None:
            raise UserError(f"--max-latency-ms: {reason}")
        if self.against is not None:
            raise UserError(f"--against: {reason}")


Say = Callable[[str], None]


def validate(config: ValidateConfig, say: Say = lambda _: None) -> ValidationResult:
    """What the device computed, how fast, and whether that is what was demanded.

    Args:
        say: is told what is done next.

    Raises:
        BundleError: the bundle is damaged.
        UserError: the device cannot answer what was asked.
        NoVerdictError: the device is unreachable, lost, full, hung, or not the bundle's target.
    """
    manifest = check_bundle(config.bundle, local=False)
    if manifest.kind == "gfrt":
        return _ResultOf(config, manifest, say).on_device()
    from gfcompile.runtime.validate_formats import validate_format

    return validate_format(config, manifest, say)


def keep(result: ValidationResult, bundle: Path) -> Path:
    """Writes the result among those of the bundle, beside it, and returns the file."""
    folder = history_folder(bundle)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.fromisoformat(result.date).strftime("%Y%m%dT%H%M%S.%fZ")
    device = re.sub(r"[^A-Za-z0-9.]+", "-", result.device.url).strip("-")
    path = folder / f"{stamp}-{device}.json"
    write_result(result, path)
    return path


def identify(bundle: Path, manifest: Manifest) -> BundleIdentity:
    """Which bundle it is."""
    text = (bundle / MANIFEST_NAME).read_bytes()
    return BundleIdentity(
        name=bundle.resolve().name,
        model=manifest.model,
        target=manifest.target,
        kind=manifest.kind,
        requested=manifest.precision.requested,
        storage=manifest.precision.storage,
        compute=manifest.precision.compute,
        weights=manifest.weights,
        arch=manifest.arch,
        batch=manifest.batch,
        size_bytes=sum(entry.size_bytes for entry in manifest.files.values()) + len(text),
        manifest_sha256=hashlib.sha256(text).hexdigest(),
    )


def now() -> str:
    """The date of a result."""
    return datetime.now(UTC).isoformat()


def versions(manifest: Manifest) -> dict[str, str]:
    """Of what took part on this machine, and of what the bundle was made with."""
    return {
        "gfcompile": VERSION,
        "bundle by": manifest.created_by,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
    }


def hold_against(golden: Golden, logits: npt.NDArray[np.float32]) -> Numbers:
    """Logits of the golden images against what they should be."""
    wanted = golden.logits
    error = max_abs_error(wanted, logits)
    finite = bool(np.isfinite(error))
    return Numbers(
        reference="the compiled graph in ONNX Runtime",
        inferences=len(logits),
        top1_agreement=top1_agreement(wanted, logits),
        max_abs_error=error if finite else None,
        sqnr_db=sqnr_db(wanted, logits),
        tolerance=golden.tolerance,
        within=finite and (golden.tolerance is None or error <= golden.tolerance),
    )


class _ResultOf:
    """One validation of a bundle with kernels of our own, by its gfbench."""

    def __init__(self, config: ValidateConfig, manifest: Manifest, say: Say) -> None:
        self.config, self.manifest, self.say = config, manifest, say
        self.golden = read_golden(config.bundle, manifest)

    def golden_for(self, device: Device) -> Golden | None:
        """The golden data that it is worth running there."""
        if self.golden is None:
            return None
        most = None if device.measures else _QEMU_IMAGES
        return self.golden.in_whole_batches(self.manifest.batch, most)

    def on_device(self) -> ValidationResult:
        config = self.config
        date = now()
        self.say(f"connect to {config.device}")
        with open_device(config.device) as device:
            if not device.measures:
                config.refuse_demands_on_time(f"{NO_LATENCY_UNDER_QEMU}; use a device")
            budget = config.budget
            if config.against is not None:
                budget = compared_with(
                    budget,
                    config.against,
                    config.bundle,
                    device=device.url,
                    threads=config.threads,
                    batch=self.manifest.batch,
                )
            before = self.look(device)
            self.check_target(device, before)
            self.say("copy the bundle there")
            with self.files(device) as files:
                device.send(files)
            self.say("hold its numbers against the golden data")
            first, numbers = self.numbers(device)
            result = ValidationResult(
                date=date,
                bundle=identify(config.bundle, self.manifest),
                device=_describe(device, before, self.manifest, first),
                budget=budget,
                verdict=Verdict(passed=False, reasons=()),
                numbers=numbers,
                versions={**versions(self.manifest), "gfrt": first.runtime},
            )
            if device.measures:
                result = self.with_latency(result, device, before, first)
            else:
                result = self.with_instructions(result, device)
            return dataclasses.replace(
                result,
                verdict=judge(budget, numbers, result.latencies),
                commands=tuple(device.commands),
            )

    def look(self, device: Device) -> Board | None:
        """The state of the board; None of one that QEMU imitates."""
        return read_board(device.script(SCRIPT)) if device.measures else None

    def check_target(self, device: Device, board: Board | None) -> None:
        """Raises NoVerdictError unless the device is what the bundle is for."""
        manifest = self.manifest
        arch = "aarch64" if board is None else board.arch
        if arch != manifest.arch:
            raise unfit(
                device.url,
                f"it is {arch or 'unknown'}, the bundle is for {manifest.arch} "
                f"({manifest.target}); compile for another --target",
            )
        missing = set(manifest.cpu_features) - set(board.cpu_flags if board else ())
        if board is not None and board.cpu_flags and missing:
            raise unfit(
                device.url,
                f"its CPU lacks {', '.join(sorted(missing))}, which {manifest.target} has; "
                "compile for an older --target",
            )

    @contextmanager
    def files(self, device: Device) -> Any:
        """What the device needs, by its name there."""
        bundle, manifest = self.config.bundle, self.manifest
        files = {
            name: bundle / name
            for name in manifest.files
            if "/" not in name and name not in _FOR_PROGRAMMERS
        }
        if BENCH_NAME not in files:
            raise BundleError(f"{bundle} has no {BENCH_NAME}; compile it again")
        with tempfile.TemporaryDirectory(prefix="gfcompile-") as folder:
            golden = self.golden_for(device)
            if golden is not None:
                files[_IMAGES] = Path(folder) / _IMAGES
                files[_IMAGES].write_bytes(b"".join(image.tobytes() for image in golden.images))
            yield files

    def bench(self, device: Device, *options: str, timeout_s: float) -> BenchReport:
        """What gfbench reports."""
        command = self.command(*options)
        done = device.run(command, timeout_s=timeout_s)
        if done.status == 3:
            raise unfit(device.url, done.reason.removeprefix("gfbench: "))
        if done.status == _NOT_FOUND:
            # It was copied there: what is not found is the loader that it names.
            raise unfit(
                device.url,
                f"it does not start gfbench ({done.reason}); the bundle needs a 64-bit system with "
                "glibc, and uname tells of its kernel alone",
            )
        if done.status == _NOT_EXECUTED and "permission denied" in done.reason.lower():
            raise NoVerdictError(
                f"{device.url} executes nothing in its temporary folder ({done.reason}): is it "
                "mounted noexec? Set TMPDIR for that user"
            )
        if done.status != 0:
            if looks_full(done.stderr) or "disk full" in done.stderr:
                raise full_disk(device.url, "its temporary folder")
            raise NoVerdictError(f"gfbench failed on {device.url}: {_ending(done.status)}"
                                 f"{done.reason.removeprefix('gfbench: ')}")  # fmt: skip
        try:
            return BenchReport.read(done.stdout)
        except ValueError as error:
            raise NoVerdictError(f"gfbench on {device.url} printed no report: {error}") from error

    def command(self, *options: str) -> list[str]:
        config = self.config
        command = [f"./{BENCH_NAME}", ".", "--json", "--threads", str(config.threads)]
        command += ["--pin", config.pin] if config.pin else []
        return [*command, *options]

    def numbers(self, device: Device) -> tuple[BenchReport, Numbers | None]:
        """gfbench's report of the golden inferences, and how far their outputs are off."""
        options = ["--runs", "0", "--verify"]
        golden = self.golden_for(device)
        if golden is None:
            return self.bench(device, *options, timeout_s=self.config.timeout_s), None
        options += ["--image-u8", _IMAGES, "--output", _OUTPUTS]
        report = self.bench(device, *options, timeout_s=self.config.timeout_s)
        inferences = len(golden.images) // self.manifest.batch
        data = device.fetch(_OUTPUTS)
        # The logits are the first output of each inference; others may follow.
        if len(data) < golden.logits.nbytes or len(data) % (4 * inferences):
            raise NoVerdictError(f"{device.url} returned {len(data)} bytes of outputs")
        rows = np.frombuffer(data, "<f4").reshape(inferences, -1)
        logits = rows[:, : golden.logits.size // inferences]
        return report, hold_against(golden, logits.reshape(golden.logits.shape))

    def with_latency(
        self,
        result: ValidationResult,
        device: Device,
        before: Board | None,
        first: BenchReport,
    ) -> ValidationResult:
        """The result with everything that takes time."""
        config = self.config
        runs = SINGLE_STREAM_RUNS if config.runs is None else config.runs
        seconds = SINGLE_STREAM_S if config.runs is None else 0
        options = ["--single-stream"] if config.runs is None else ["--runs", str(runs)]
        options += [] if config.warmup is None else ["--warmup", str(config.warmup)]
        options += ["--kernels-only"] if config.kernels_only else []
        options += ["--image-u8", _IMAGES] if self.golden is not None else []
        # The first inference is the slowest; three times its time for every run is ample.
        expected_s = max(seconds, (runs + (config.warmup or 0)) * first.first_ms / 1e3)
        self.say(
            f"measure: {runs} runs"
            + (f" and {seconds} s at least" if seconds else "")
            + ", until stable before" * (config.warmup is None)
        )
        report = self.bench(
            device, *options, "--profile", timeout_s=config.timeout_s + 3 * expected_s
        )
        after = self.look(device)
        if not report.samples_us:
            raise NoVerdictError(f"gfbench on {device.url} printed no samples")
        latencies = report.latencies
        assert before is not None
        assert after is not None
        return dataclasses.replace(
            result,
            device=dataclasses.replace(result.device, before=before.state, after=after.state),
            protocol=_protocol(report, config),
            latencies=latencies,
            load_ms=report.load_ms,
            first_inference_ms=report.first_ms,
            peak_memory_mb=report.peak_memory_mb,
            kernels=report.kernel_times(kernel_costs(self.manifest)),
            cautions=tuple(
                cautions(
                    before,
                    after,
                    latencies.samples_us,
                    stable=report.stable or config.warmup is not None,
                    cv=latencies.cv,
                )
            ),
        )

    def with_instructions(self, result: ValidationResult, device: Device) -> ValidationResult:
        """The result with retired instructions per inference: two runs less one."""
        assert isinstance(device, QemuDevice)
        self.say("count instructions")
        counts = [
            device.count_instructions(
                self.command("--runs", str(runs), "--warmup", "0"), timeout_s=self.config.timeout_s
            )
            for runs in (1, 2)
        ]
        one, two = counts
        return dataclasses.replace(
            result,
            no_latency=NO_LATENCY_UNDER_QEMU,
            instructions=None if one is None or two is None else two - one,
        )


def _describe(
    device: Device, board: Board | None, manifest: Manifest, report: BenchReport
) -> DeviceReport:
    if board is None:
        return DeviceReport(
            url=device.url, kind=device.kind, name=device.name, arch=manifest.arch,
            processor=report.device,
        )  # fmt: skip
    return DeviceReport(
        url=device.url,
        kind=device.kind,
        name=board.name or device.name,
        arch=board.arch,
        cpu_model=board.cpu_model,
        processor=report.device,
        memory_mb=board.memory_mb,
        versions=board.versions,
        before=board.state,
    )


def _protocol(report: BenchReport, config: ValidateConfig) -> Protocol:
    return Protocol(
        tool=f"gfbench {report.runtime}",
        rule="single-stream" if config.runs is None else "runs",
        timer=TIMER_KERNELS if config.kernels_only else TIMER_WHOLE,
        threads=config.threads,
        pinned_cpus=report.pinned,
        warmup="until the medians of three windows of 8 runs are within 2%, 10 s at most"
        if config.warmup is None
        else "a fixed number of runs",
        warmup_runs=report.warmup_runs,
        stable=report.stable,
        runs=report.runs,
        duration_s=report.duration_s,
    )


def _ending(status: int) -> str:
    """What a shell's exit status says of a signal."""
    return {137: "killed, is its memory full? ", 139: "it crashed; ", -9: "killed; "}.get(
        status, ""
    )
