"""Pythons beside this one: with the older tflite-runtime and Google's tools for Android, and of
arm64 under QEMU.

They are made once per machine, from PyPI and from Debian's packages, in the user's cache. Where
that cannot be, the test is skipped; in CI it fails.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from tools import in_ci, need

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gfcompile-tests"
_SOURCE = Path(__file__).parents[1] / "src"

# Debian 12: what CPython 3.11 and LiteRT load.
_DEBIAN = (
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "libbz2-1.0"),
    *("liblzma5", "libssl3", "libuuid1"),
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib"),
)
_WHEELS = ("ai-edge-litert==2.3.0", "numpy==2.4.*", "flatbuffers", "protobuf", "tqdm")
_WHEELS_OF_LITERT = ("backports.strenum", "typing_extensions")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")

# XNNPACK chooses kernels by what /proc/cpuinfo says: it must be what QEMU plays.
_CPUINFO = {
    "cortex-a72": ("0xd08", "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"),
    "cortex-a76": (
        "0xd0b",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc "
        "dcpop asimddp",
    ),
}


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
        _extract_packages(root, ("libusb-1.0-0", "libudev1"))

    libraries = {str(path.parent) for path in _made("libusb", make).rglob("lib*.so.*")}
    return Python(
        (str(folder / "bin" / "python"),), {"LD_LIBRARY_PATH": ":".join(sorted(libraries))}
    )


def _with_numpy_1(name: str, *packages: str) -> Path:
    if sys.version_info[:2] != (3, 11):
        _lacking(f"{packages[0]} has no wheel for this Python")

    def make(folder: Path) -> None:
        _call(sys.executable, "-m", "venv", str(folder))
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
        _call(*pip, "numpy<2", *packages)

    return _made(name, make)


def python_for_arm64(cpu: str) -> Python:
    """CPython 3.11 of Debian's arm64 with LiteRT, on the CPU that QEMU plays."""
    qemu = need("qemu-aarch64")
    base = _made("arm64-python", _make_arm64)
    root = base / "root"

    def make(folder: Path) -> None:
        part, features = _CPUINFO[cpu]
        shutil.copytree(root, folder, symlinks=True, copy_function=os.link, dirs_exist_ok=True)
        core = (
            f"processor\t: {{}}\nBogoMIPS\t: 100.00\nFeatures\t: {features}\n"
            "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\n"
            f"CPU part\t: {part}\nCPU revision\t: 1\n\n"
        )
        _write(folder / "proc" / "cpuinfo", core.format(0) + core.format(1))
        for name in ("possible", "present"):
            _write(folder / "sys" / "devices" / "system" / "cpu" / name, "0-1\n")

    place = _made(f"arm64-python-{cpu}", make)
    paths = f"{base / 'site'}:{_SOURCE}"
    options = ["-cpu", cpu, "-L", str(place), "-E", f"PYTHONHOME={place / 'usr'}"]
    options += ["-E", f"PYTHONPATH={paths}"]
    return Python((qemu, *options, str(place / "usr" / "bin" / "python3.11")))


def _make_arm64(folder: Path) -> None:
    root, site = folder / "root", folder / "site"
    _extract_packages(root, _DEBIAN, architecture="arm64")
    wheels = folder / "wheels"
    for path in (site, wheels):
        path.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    pip += [f"--platform={platform}" for platform in _PLATFORMS]
    _call(*pip, "--python-version=3.11", f"--dest={wheels}", *_WHEELS, *_WHEELS_OF_LITERT)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    shutil.rmtree(wheels)


def _extract_packages(root: Path, packages: Sequence[str], architecture: str = "") -> None:
    """Unpacks Debian's packages into `root`, by an apt that knows nothing of this system's."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        _lacking("apt-get is not here to fetch Debian's packages")
    root.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as temporary:
        state = Path(temporary)
        for name in ("lists", "archives"):
            (state / name / "partial").mkdir(parents=True)
        options = {
            "Dir::State": str(state),
            "Dir::State::status": "/dev/null",
            "Dir::Cache": str(state),
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
        }
        if architecture:
            options |= {"APT::Architecture": architecture, "APT::Architectures": architecture}
        apt = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in options.items())]
        _call(*apt, "update")
        _call(*apt, "download", *packages, cwd=state)
        for package in sorted(state.glob("*.deb")):
            _call("dpkg-deb", "-x", str(package), str(root))


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache, filled by `make` if it is not there."""
    place = _CACHE / name
    if not place.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as temporary:
            fresh = Path(temporary) / name
            fresh.mkdir()
            try:
                make(fresh)
            except (subprocess.CalledProcessError, OSError, zipfile.BadZipFile) as error:
                _lacking(f"{name} cannot be made: {getattr(error, 'stderr', '') or error}")
            try:
                fresh.rename(place)
            except OSError:
                assert place.exists()  # another worker was first
    return place


def _call(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _lacking(what: str) -> NoReturn:
    if in_ci():
        pytest.fail(what, pytrace=False)
    pytest.skip(what)
