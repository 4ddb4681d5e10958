"""An arm64 CPU that QEMU imitates on this machine: what it computes, never how fast."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import SplitResult

import gfcompile.runtime.device
from gfcompile.runtime.bench import qemu_command
from gfcompile.runtime.devices.base import Device
from gfcompile.runtime.devices.local import LocalDevice
from gfcompile.runtime.errors import DeviceError, NoVerdictError, UserError

_PLUGIN = Path(gfcompile.runtime.device.__file__).with_name("qemu_instructions.c")
_COUNT = re.compile(r"^instructions (\d+)$", re.M)


class QemuDevice(LocalDevice):
    """An arm64 CPU under qemu-user."""

    kind = "qemu"
    measures = False

    def __init__(self, url: str, cpu: str) -> None:
        """Looks for QEMU.

        Raises:
            NoVerdictError: it or the arm64 C library is not installed.
        """
        try:
            self._command = qemu_command(cpu=cpu, env={})
        except DeviceError as error:
            raise NoVerdictError(str(error)) from None
        self._options: list[str] = []
        super().__init__(url, f"{cpu} under QEMU")

    def count_instructions(self, command: Sequence[str], *, timeout_s: float) -> int | None:
        """How many instructions a program retires; None where QEMU takes no plugins.

        Exact, and the same in every run; which instructions they are is not told, so these are
        no cycles.
        """
        plugin = self._folder / "qemu_instructions.so"
        if not plugin.exists() and not _build_plugin(plugin):
            return None
        self._options = ["-plugin", str(plugin), "-d", "plugin"]
        try:
            done = self.run(command, timeout_s=timeout_s)
        finally:
            self._options = []
        found = _COUNT.search(done.stderr)
        return int(found.group(1)) if done.status == 0 and found else None

    def _prefix(self) -> list[str]:
        return [*self._command, *self._options]


def open_qemu(parts: SplitResult) -> Device:
    """`qemu:CPU`.

    Raises:
        UserError: no CPU was named.
        NoVerdictError: QEMU is not installed.
    """
    cpu = parts.path
    if not re.fullmatch(r"[a-z0-9-]{1,40}", cpu):
        raise UserError("--device qemu:CPU needs a CPU as QEMU calls it, such as qemu:cortex-a72")
    return QemuDevice(f"qemu:{cpu}", cpu)


def _build_plugin(output: Path) -> bool:
    """Compiles the plugin, by the C compiler that is there."""
    compiler = shutil.which("cc")
    command = [compiler] if compiler else [sys.executable, "-m", "ziglang", "cc"]
    command += ["-std=c11", "-O2", "-shared", "-fPIC", str(_PLUGIN), "-o", str(output)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
