"""What a candidate costs: measured on a device, or estimated where there is none."""

import json
import os
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gfcompile.runtime.bench import BENCH_NAME
from gfcompile.runtime.devices import Device
from gfcompile.runtime.devices.qemu import QemuDevice
from gfcompile.runtime.errors import DeviceError, NoVerdictError
from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.tuning.builders import Built, CandidateError
from gfcompile.targets.tvm.tuning.database import How, Unit

_BUNDLE = ("plan.bin", "weights.bin", "kernels.ptx", "kernels.cubin", BENCH_NAME)
_SETUP_S = 60.0
# Besides its inferences, gfbench takes some 310,000 instructions, 10,000 more for a kernel of two
# functions. Of a kernel of so many that is 0.2%.
_MANY_INSTRUCTIONS = 5_000_000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run of a candidate.

    Attributes:
        cost: of one inference of its bundle, in the runner's unit.
        outputs: the bytes of its outputs; None where nothing was computed.
    """

    cost: float
    outputs: bytes | None


class Runner(ABC):
    """Runs a candidate and says what it costs.

    Attributes:
        device: in words, as the database records it.

    Class attributes:
        how, unit: as the database records them.
        computes: whether a run gives outputs.
        blind_to: fields of choices whose effect it cannot see; those stay at their defaults.
    """

    how: ClassVar[How]
    unit: ClassVar[Unit]
    computes: ClassVar[bool] = True
    blind_to: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, device: str) -> None:
        self.device = device

    @abstractmethod
    def run(self, built: Built, inputs: bytes, *, runs: int, limit_s: float) -> Outcome:
        """What the candidate costs, over `runs` runs.

        Raises:
            CandidateError: it fails, or takes longer than `limit_s`.
            DeviceError, NoVerdictError: the device cannot be used any more.
        """

    def forget(self, built: Built) -> None:  # noqa: B027 - most keep nothing
        """The candidate will not be run again."""


class MeasuringRunner(Runner):
    """Measures on a device, by gfbench: nothing but a C library is needed there.

    Each candidate keeps a folder of its own on the device, so that it can take turns with others
    without being copied again.
    """

    how = "measured"
    unit = "ms"

    def __init__(self, device: Device, name: str) -> None:
        super().__init__(name)
        self._device = device
        self._folders: dict[Path, str] = {}
        self._count = 0

    def run(self, built: Built, inputs: bytes, *, runs: int, limit_s: float) -> Outcome:
        folder = self._folders.get(built.folder)
        if folder is None:
            folder = self._folders[built.folder] = self._place(built, inputs)
        command = [f"./{folder}/{BENCH_NAME}", folder, "--json", "--threads", "1"]
        command += ["--input", f"{folder}/in", "--output", "out"]
        command += ["--runs", str(runs), "--warmup", "1"]
        report = _run(self._device, command, limit_s)
        return Outcome(cost=_median(report), outputs=self._device.fetch("out"))

    def forget(self, built: Built) -> None:
        folder = self._folders.pop(built.folder, None)
        if folder is not None:
            self._device.run(("rm", "-rf", folder), timeout_s=_SETUP_S)

    def _place(self, built: Built, inputs: bytes) -> str:
        """Copies the candidate to the device; the folder's name there."""
        self._count += 1
        folder = f"candidate{self._count}"
        files = _files(built, inputs)
        self._device.send(files)
        for command in (("mkdir", folder), ("mv", *files, folder)):
            done = self._device.run(command, timeout_s=_SETUP_S)
            if done.status:
                raise DeviceError(f"{self._device.url}: {done.reason}")
        return folder


class InstructionRunner(Runner):
    """Counts the instructions that an arm64 candidate retires under QEMU: an estimate of time.

    The count is the same in every run, to a thousand or so, but says nothing of caches, of
    latencies, or of instructions that take longer than others. QEMU computes float16 in software,
    some 25 million products in a second: of a kernel that takes long, one inference has to do.
    """

    how = "static"
    unit = "instructions"
    blind_to = frozenset({"order"})  # it is for caches

    def __init__(self, device: QemuDevice) -> None:
        super().__init__(f"{device.name}, instructions")
        self._qemu = device
        self._besides: int | None = None  # what gfbench takes besides its inferences

    def run(self, built: Built, inputs: bytes, *, runs: int, limit_s: float) -> Outcome:  # noqa: ARG002
        twice = built.folder / "twice"
        twice.write_bytes(2 * inputs)
        self._qemu.send({**_files(built, inputs), "twice": twice})
        command = [f"./{BENCH_NAME}", ".", "--json", "--output", "out", "--input"]
        # Two inferences less one, nothing timed: printing a time takes more or fewer instructions.
        one = self._count([*command, "in"], limit_s)
        outputs = self._qemu.fetch("out")
        if self._besides is None or one < _MANY_INSTRUCTIONS:
            self._besides = 2 * one - self._count([*command, "twice"], limit_s)
        return Outcome(cost=float(one - self._besides), outputs=outputs)

    def _count(self, command: list[str], limit_s: float) -> int:
        """The instructions of a run of gfbench.

        Raises:
            CandidateError: it fails, or takes longer than `limit_s`.
        """
        try:
            count = self._qemu.count_instructions(command, timeout_s=limit_s)
        except NoVerdictError as error:
            raise CandidateError(str(error)) from error
        if count is None:
            _run(self._qemu, command, limit_s)  # it says why it fails
            raise DeviceError(f"{self._qemu.url} counts no instructions: it takes no plugins")
        return count


class CudaRunner(Runner):
    """Estimates a GPU's cycles from the PTX of a candidate and what ptxas says of it."""

    how = "static"
    unit = "cycles"
    computes = False

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(f"{gpu.arch}, instructions and occupancy")
        self._gpu = gpu

    def run(self, built: Built, inputs: bytes, *, runs: int, limit_s: float) -> Outcome:  # noqa: ARG002
        from gfcompile.targets.tvm.tuning.ptx import estimate_cycles

        ptx = (built.folder / "kernels.ptx").read_text()
        try:
            cost = sum(estimate_cycles(ptx, record, self._gpu) for record in built.kernels)
        except ValueError as error:
            raise CandidateError(f"cannot be estimated: {error}") from error
        return Outcome(cost=cost, outputs=None)


def run_behind_stand_in(built: Built, inputs: bytes, limit_s: float) -> bytes:
    """The outputs of a GPU's kernels, computed on this machine's CPU behind a stand-in driver.

    Raises:
        CandidateError: it fails, which an access out of bounds also makes it do.
    """
    source, target = built.folder / "in", built.folder / "out"
    source.write_bytes(inputs)
    command = [str(built.folder / BENCH_NAME), str(built.folder), "--json", "--runs", "0"]
    command += ["--input", str(source), "--output", str(target)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "LD_LIBRARY_PATH": str(built.driver)},
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CandidateError(f"did not end within {limit_s:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CandidateError(f"failed (exit status {done.returncode}): {lines[-1][:300]}")
    return target.read_bytes()


def _files(built: Built, inputs: bytes) -> dict[str, Path]:
    """What gfbench needs, by name; the inputs are called "in"."""
    source = built.folder / "in"
    source.write_bytes(inputs)
    paths = [source, *built.folder.glob("*.so"), *(built.folder / name for name in _BUNDLE)]
    return {path.name: path for path in paths if path.exists()}


def _run(device: Device, command: list[str], limit_s: float) -> str:
    """What gfbench prints.

    Raises:
        CandidateError: it fails, or takes longer than `limit_s`.
        NoVerdictError: the device is gone.
    """
    try:
        done = device.run(command, timeout_s=limit_s)
    except NoVerdictError as error:
        # A candidate that hangs was killed; a device that is gone has no answer to this either.
        if "alive" not in device.script("echo alive"):
            raise
        raise CandidateError(str(error)) from error
    if done.status:
        raise CandidateError(f"failed (exit status {done.status}): {done.reason[:300]}")
    return done.stdout


def _median(report: str) -> float:
    """The median of gfbench's report.

    Raises:
        CandidateError: it is no such report.
    """
    try:
        median = float(json.loads(report)["median_ms"])
    except (ValueError, KeyError, TypeError) as error:
        raise CandidateError(f"gfbench printed {report[:100]!r}") from error
    if not median > 0:
        raise CandidateError(f"gfbench measured {median} ms")
    return median
