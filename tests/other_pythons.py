"""Pythons beside this one: with the older tflite-runtime and Google's tools for Android, and of
arm64 under QEMU.

They are made once per machine, from PyPI and from Debian's packages, in the user's cache. Where
that cannot be, the test is skipped; in CI it fails.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest
from environments import LITERT_WHEELS, CannotBeMadeError, Environments, call

from tools import in_ci, need

_ENVIRONMENTS = Environments("gfcompile-tests")
_SOURCE = Path(__file__).parents[1] / "src"


@dataclass(frozen=True)
class Python:
    """An interpreter that can import gfcompile.runtime."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    def run(self, script: str, *arguments: str) -> str:
        """What `script` prints."""
        result = subprocess.run(
            [*self.command, "-c", script, *arguments],
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout


def python_with_tflite_runtime() -> Python:
    """This Python with tflite-runtime 2.14 and the numpy that it was built for."""
    folder = _with_numpy_1("tflite-runtime-2.14", "tflite-runtime==2.14.0", "pillow")
    return Python((str(folder / "bin" / "python"),), {"PYTHONPATH": str(_SOURCE)})


def python_with_tflite_support() -> Python:
    """This Python with Google's tools for metadata, and the task library that Android apps use."""
    folder = _with_numpy_1("tflite-support-0.4.4", "tflite-support==0.4.4")

    def make(root: Path) -> None:
        # The package's audio tasks load a library for USB devices, whichever task is wanted.
        _ENVIRONMENTS.extract_packages(root, ("libusb-1.0-0", "libudev1"))

    libraries = {str(path.parent) for path in _made("libusb", make).rglob("lib*.so.*")}
    return Python(
        (str(folder / "bin" / "python"),), {"LD_LIBRARY_PATH": ":".join(sorted(libraries))}
    )


def _with_numpy_1(name: str, *packages: str) -> Path:
    if sys.version_info[:2] != (3, 11):
        _lacking(f"{packages[0]} has no wheel for this Python")

    def make(folder: Path) -> None:
        call(sys.executable, "-m", "venv", str(folder))
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
        call(*pip, "numpy<2", *packages)

    return _made(name, make)


def python_for_arm64(cpu: str) -> Python:
    """CPython 3.11 of Debian's arm64 with LiteRT, on the CPU that QEMU plays."""
    need("qemu-aarch64")
    try:
        python = _ENVIRONMENTS.arm64_python(cpu, "arm64-python", LITERT_WHEELS, {}, _SOURCE)
    except CannotBeMadeError as error:
        _lacking(str(error))
    return Python((*python.qemu, python.program))


def _made(name: str, make: Callable[[Path], None]) -> Path:
    try:
        return _ENVIRONMENTS.made(name, make)
    except CannotBeMadeError as error:
        _lacking(str(error))


def _lacking(what: str) -> NoReturn:
    if in_ci():
        pytest.fail(what, pytrace=False)
    pytest.skip(what)
