"""What a candidate costs: measured on a device, or estimated where there is none."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gfcompile.runtime.bench import BENCH_NAME, qemu_command
from gfcompile.runtime.errors import DeviceError
from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.tuning.builders import Built, CandidateError
from gfcompile.targets.tvm.tuning.database import How, Unit

_PLUGIN_SOURCE = Path(__file__).with_name("count_instructions.c")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run of a candidate.

    Attributes:
        cost: of one inference of its bundle, in the runner's unit.
        outputs: the bytes of its outputs; None where nothing was computed.
    """

    cost: float
    outputs: bytes | None


class Runner(Protocol):
    """Runs a candidate and says what it costs.

    Attributes:
        how, unit, device: as the database records them.
    """

    how: How
    unit: Unit
    device: str

    def run(self, built: Built, inputs: bytes, *, runs: int, limit_s: float) -> Outcome:
        """What the candidate costs, over `runs` runs.

        Raises:
            CandidateError: it fails, or takes longer than `limit_s`.
            DeviceError: the device cannot be used at all.
        """

    def computes(self) -> bool:
        """Whether `run` gives outputs; a GPU's kernels are run behind a stand-in if it does not."""


class GfbenchRunner:
    """Measures on this machine, by the candidate's own gfbench in a process of its own."""

    how: How = "measured"
    unit: Unit = "ms"

    def __init__(self, device: str) -> None:
        self.device = device

    def computes(self) -> bool:
        return True

    def run(self, built: Built, inputs: bytes, *, runs: int, limit_s: float) -> Outcome:
        report, outputs, _ = run_gfbench(
            (), built.folder, inputs, runs=runs, warmup=1, limit_s=limit_s
        )
        return Outcome(cost=float(report["median_ms"]), outputs=outputs)


class InstructionRunner:
    """Counts the instructions that an arm64 candidate retires under QEMU: an estimate of time.

    The count is exact and the same in every run, but says nothing of caches, of latencies, or of
    instructions that take longer than others.
    """

    how: How = "static"
    unit: Unit = "instructions"

    def __init__(self, cpu: str, plugin: Path) -> None:
        self.device = f"qemu {cpu}"
        command = qemu_command(cpu=cpu, env={})
        self._prefix = [*command, "-plugin", str(plugin), "-d", "plugin"]

    def computes(self) -> bool:
        return True

    def run(self, built: Built, inputs: bytes, *, runs: int, limit_s: float) -> Outcome:  # noqa: ARG002
        counts = []
        for timed in (0, 1):
            _, outputs, log = run_gfbench(
                self._prefix, built.folder, inputs, runs=timed, warmup=0, limit_s=limit_s
            )
            found = re.search(r"instructions: (\d+)", log)
            if found is None:
                raise DeviceError(f"QEMU does not count instructions: {log.strip()[-200:]}")
            counts.append(int(found[1]))
        return Outcome(cost=float(counts[1] - counts[0]), outputs=outputs)


class CudaRunner:
    """Estimates a GPU's cycles from the PTX of a candidate and what ptxas says of it."""

    how: How = "static"
    unit: Unit = "cycles"

    def __init__(self, gpu: Gpu) -> None:
        self.device = f"{gpu.arch}, instructions and occupancy"
        self._gpu = gpu

    def computes(self) -> bool:
        return False

    def run(self, built: Built, inputs: bytes, *, runs: int, limit_s: float) -> Outcome:  # noqa: ARG002
        from gfcompile.targets.tvm.tuning.ptx import estimate_cycles

        ptx = (built.folder / "kernels.ptx").read_text()
        try:
            cost = sum(estimate_cycles(ptx, record, self._gpu) for record in built.kernels)
        except ValueError as error:
            raise CandidateError(f"cannot be estimated: {error}") from error
        return Outcome(cost=cost, outputs=None)


def run_gfbench(
    prefix: Sequence[str], folder: Path, inputs: bytes, *, runs: int, warmup: int, limit_s: float
) -> tuple[dict[str, Any], bytes, str]:
    """gfbench's report, the outputs' bytes, and what was printed besides.

    Raises:
        CandidateError: it crashes, fails, or takes longer than `limit_s`.
    """
    with tempfile.TemporaryDirectory(prefix="gfcompile-tune-") as scratch:
        source, target = Path(scratch, "in"), Path(scratch, "out")
        source.write_bytes(inputs)
        command = [*prefix, str(folder / BENCH_NAME), str(folder), "--json", "--threads", "1"]
        command += ["--input", str(source), "--output", str(target)]
        command += ["--runs", str(runs), "--warmup", str(warmup)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise CandidateError(f"did not end within {limit_s:.0f} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise CandidateError(f"failed (exit status {done.returncode}): {lines[-1][:300]}")
        return json.loads(done.stdout), target.read_bytes(), done.stderr


def run_behind_stand_in(built: Built, inputs: bytes, limit_s: float) -> bytes:
    """The outputs of a GPU's kernels, computed on this machine's CPU.

    Raises:
        CandidateError: see `run_gfbench`; the stand-in also sees accesses out of bounds.
    """
    prefix = ("env", f"LD_LIBRARY_PATH={built.driver}")
    return run_gfbench(prefix, built.folder, inputs, runs=0, warmup=0, limit_s=limit_s)[1]


def build_plugin(folder: Path) -> Path:
    """The QEMU plugin that counts instructions, compiled for this machine.

    Raises:
        DeviceError: the C compiler fails.
    """
    plugin = folder / "count_instructions.so"
    # QEMU itself has the functions that the plugin calls.
    command = [
        *(sys.executable, "-m", "ziglang", "cc", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra"),
        *("-fvisibility=hidden", "-Wl,-z,undefs", str(_PLUGIN_SOURCE), "-o", str(plugin)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeviceError(f"the QEMU plugin cannot be compiled: {done.stderr.strip()[-300:]}")
    return plugin
