"""Runs a bundle by its own gfbench, in a process of its own: natively, or under QEMU."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.device.gfrt import StepProfile, TensorInfo, TraceRecord
from gfcompile.runtime.errors import BundleError, DeviceError
from gfcompile.runtime.trace import read_trace

BENCH_NAME = "gfbench"
_SYSROOT = Path("/usr/aarch64-linux-gnu")


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What one call of gfbench gave.

    Attributes:
        outputs: per inference, the outputs of the model.
        trace: per inference, the tensors in the order in which they were written.
        report: what `gfbench --json` printed.
    """

    outputs: list[list[npt.NDArray[Any]]]
    trace: list[list[TraceRecord]]
    report: Mapping[str, Any]

    @property
    def profile(self) -> list[StepProfile]:
        return [
            StepProfile(entry["kernel"], entry["label"], entry["calls"], entry["seconds"])
            for entry in self.report.get("profile", ())
        ]


def qemu_command(*, cpu: str | None, env: Mapping[str, str]) -> list[str]:
    """The command that runs an arm64 program here, `env` set for that program alone.

    Raises:
        DeviceError: QEMU or the arm64 C library is not installed.
    """
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    sysroot = Path(os.environ.get("GFCOMPILE_SYSROOT", _SYSROOT))
    if qemu is None or not (sysroot / "lib" / "libc.so.6").exists():
        raise DeviceError(
            "--device qemu needs QEMU and the C library of arm64: "
            "apt-get install qemu-user libc6-arm64-cross"
        )
    command = [qemu, "-L", str(sysroot)]
    if cpu is not None:
        command += ["-cpu", cpu]
    for name, value in env.items():
        command += ["-E", f"{name}={value}"]
    return command


def run_bench(
    bundle: Path,
    inputs: Sequence[npt.NDArray[Any]],
    outputs: Sequence[TensorInfo],
    *,
    prefix: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    threads: int = 1,
    trace: bool = False,
    profile: bool = False,
    runs: int = 0,
    warmup: int = 2,
) -> BenchResult:
    """Runs the bundle once for each of `inputs`, then `runs` times more to take the time.

    Args:
        inputs: each holds the bytes of all inputs of one inference.
        outputs: name, dtype and shape of the model's outputs.
        prefix: the command that gfbench is an argument of, such as QEMU.
        env: added to the environment.

    Raises:
        BundleError: the bundle has no gfbench.
        DeviceError: gfbench failed; its last line says why.
    """
    bench = bundle / BENCH_NAME
    if not bench.is_file():
        raise BundleError(f"{bench} is missing: copy the bundle again")
    with tempfile.TemporaryDirectory(prefix="gfbench-") as folder:
        source, target, traced = (Path(folder) / name for name in ("in", "out", "trace"))
        with source.open("wb") as file:
            for values in inputs:
                file.write(np.ascontiguousarray(values).tobytes())
        command = [*prefix, str(bench), str(bundle), "--json", "--threads", str(threads)]
        command += ["--input", str(source), "--output", str(target)]
        command += ["--runs", str(runs), "--warmup", str(warmup)]
        command += ["--trace", str(traced)] if trace else []
        command += ["--profile"] if profile else []
        report = _call(command, env or {})
        records: list[list[TraceRecord]] = [[] for _ in inputs]
        for inference, record in read_trace(traced) if trace else ():
            records[inference].append(record)
        data = target.read_bytes()
    size = sum(info.size_bytes for info in outputs)
    if len(data) != size * len(inputs):
        raise DeviceError(f"gfbench wrote {len(data)} bytes instead of {size * len(inputs)}")
    return BenchResult(
        outputs=[_split(data[i * size : (i + 1) * size], outputs) for i in range(len(inputs))],
        trace=records,
        report=report,
    )


def _call(command: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    try:
        result = subprocess.run(
            command,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            errors="replace",  # names are of the bundle
            check=False,
        )
    except OSError as error:
        raise DeviceError(f"{command[0]} cannot be started: {error.strerror}") from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit status {result.returncode}"
        raise DeviceError(reason.removeprefix("gfbench: "))
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def _split(data: bytes, outputs: Sequence[TensorInfo]) -> list[npt.NDArray[Any]]:
    arrays = []
    for info in outputs:
        arrays.append(np.frombuffer(data[: info.size_bytes], info.dtype).reshape(info.shape))
        data = data[info.size_bytes :]
    return arrays
