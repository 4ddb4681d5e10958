"""What tests may need beyond pip packages: found, or the test is skipped; in CI its lack fails."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

# The Debian package that brings each tool.
_PACKAGES = {
    "qemu-aarch64": "qemu-user",
    "qemu-x86_64": "qemu-user",
    "gcc": "gcc",
    "cc": "gcc",
    "readelf": "binutils",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "nm": "binutils",
}
_ARM64_SYSROOT = Path("/usr/aarch64-linux-gnu")


def need(tool: str) -> str:
    """The path of a program, or the end of the test that needs it."""
    path = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
    if path is None:
        _lacking(tool, _PACKAGES.get(tool, tool))
    return path


def need_module(name: str) -> None:
    """The end of the test that needs this Python module, if it is not there."""
    if importlib.util.find_spec(name) is None:
        _lacking(f"the Python module {name}", "of PyPI, in the extra dev")


def need_arm64_sysroot() -> str:
    """The folder for `qemu-aarch64 -L`, with arm64's libc, or the end of the test."""
    if not (_ARM64_SYSROOT / "lib" / "ld-linux-aarch64.so.1").exists():
        _lacking(str(_ARM64_SYSROOT), "libc6-arm64-cross")
    return str(_ARM64_SYSROOT)


def qemu_aarch64(cpu: str) -> list[str]:
    """The start of a command line that runs an arm64 program on this machine.

    Args:
        cpu: as `Cpu.qemu_cpu` says it.
    """
    return [need("qemu-aarch64"), "-cpu", cpu, "-L", need_arm64_sysroot()]


def need_chromium() -> str:
    """The path of a Chromium for Playwright to drive, or the end of the test that needs it."""
    if importlib.util.find_spec("playwright") is None:
        _lacking("playwright", "none; pip install -e '.[dev]'")
    others = (shutil.which(name) for name in ("chromium", "google-chrome"))
    return next((path for path in others if path), None) or need("chromium-headless-shell")


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def _lacking(what: str, package: str) -> NoReturn:
    message = f"{what} is not installed (package {package})"
    if in_ci():
        pytest.fail(message, pytrace=False)
    pytest.skip(message)
