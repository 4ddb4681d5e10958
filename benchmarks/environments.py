"""Environments that are made once per machine, from PyPI and from Debian's packages, and kept in
the user's cache: among them CPython for arm64, which QEMU runs. The tests have theirs from here.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LITERT_WHEELS = (
    *("ai-edge-litert==2.3.0", "numpy==2.4.*", "flatbuffers", "protobuf", "tqdm"),
    *("backports.strenum", "typing_extensions"),
)

# Debian 12: what CPython 3.11 and the peers load.
_DEBIAN = (
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "libbz2-1.0"),
    *("liblzma5", "libssl3", "libuuid1"),
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib"),
)
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")

# XNNPACK chooses kernels by what /proc/cpuinfo says: it must be what QEMU plays.
_CPUINFO = {
    "cortex-a53": ("0xd03", "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"),
    "cortex-a72": ("0xd08", "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"),
    "cortex-a76": (
        "0xd0b",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc "
        "dcpop asimddp",
    ),
}


class CannotBeMadeError(Exception):
    """An environment that cannot be had here, and why."""


@dataclass(frozen=True, kw_only=True)
class Arm64Python:
    """CPython for arm64, on a CPU that QEMU plays.

    Attributes:
        qemu: the command line up to the program.
        program: the interpreter.
    """

    qemu: tuple[str, ...]
    program: str


@dataclass(frozen=True)
class Environments:
    """The environments of one use.

    Attributes:
        folder: their name in the user's cache.
    """

    folder: str

    @property
    def _cache(self) -> Path:
        return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / self.folder

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder of that name in the cache, filled by `make` if it is not there.

        Raises:
            CannotBeMadeError: a download failed, or a program for it is missing.
        """
        place = self._cache / name
        if not place.exists():
            self._cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._cache) as temporary:
                fresh = Path(temporary) / name
                fresh.mkdir()
                try:
                    make(fresh)
                except (subprocess.CalledProcessError, OSError, zipfile.BadZipFile) as error:
                    lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
                    raise CannotBeMadeError(
                        f"{name} cannot be made from PyPI's and Debian's packages; is there a "
                        f"network? {lines[-1]}"
                    ) from error
                try:
                    fresh.rename(place)
                except OSError:
                    assert place.exists()  # another process was first
        return place

    def extract_packages(
        self, root: Path, packages: Sequence[str], *, architecture: str = ""
    ) -> None:
        """Unpacks Debian's packages into `root`, by an apt that knows nothing of this system's."""
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise CannotBeMadeError("apt-get is not here to fetch Debian's packages")
        root.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._cache) as temporary:
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
            call(*apt, "update")
            call(*apt, "download", *packages, cwd=state)
            for package in sorted(state.glob("*.deb")):
                call("dpkg-deb", "-x", str(package), str(root))

    def arm64_python(
        self, cpu: str, name: str, wheels: Sequence[str], env: Mapping[str, str], *paths: Path
    ) -> Arm64Python:
        """CPython 3.11 of Debian's arm64, on the CPU that QEMU plays.

        Args:
            name: of the environment, by what is installed in it.
            wheels: these and no others are installed.
            paths: also imported from.

        Raises:
            CannotBeMadeError: a download failed, or QEMU is not installed.
        """
        qemu = shutil.which("qemu-aarch64")
        if qemu is None:
            raise CannotBeMadeError("QEMU is not installed: apt-get install qemu-user")
        base = self.made(name, lambda folder: self._make_arm64(folder, wheels))

        def make(folder: Path) -> None:
            part, features = _CPUINFO[cpu]
            root = base / "root"
            shutil.copytree(root, folder, symlinks=True, copy_function=os.link, dirs_exist_ok=True)
            core = (
                f"processor\t: {{}}\nBogoMIPS\t: 100.00\nFeatures\t: {features}\n"
                "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\n"
                f"CPU part\t: {part}\nCPU revision\t: 1\n\n"
            )
            _write(folder / "proc" / "cpuinfo", core.format(0) + core.format(1))
            for name in ("possible", "present"):
                _write(folder / "sys" / "devices" / "system" / "cpu" / name, "0-1\n")

        place = self.made(f"{name}-{cpu}", make)
        settings = {
            "PYTHONHOME": str(place / "usr"),
            "PYTHONPATH": ":".join(map(str, (base / "site", *paths))),
            **env,
        }
        options = [part for item in settings.items() for part in ("-E", "=".join(item))]
        return Arm64Python(
            qemu=(qemu, "-cpu", cpu, "-L", str(place), *options),
            program=str(place / "usr" / "bin" / "python3.11"),
        )

    def _make_arm64(self, folder: Path, names: Sequence[str]) -> None:
        root, site = folder / "root", folder / "site"
        self.extract_packages(root, _DEBIAN, architecture="arm64")
        wheels = folder / "wheels"
        for path in (site, wheels):
            path.mkdir()
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        pip += [f"--platform={platform}" for platform in _PLATFORMS]
        call(*pip, "--python-version=3.11", f"--dest={wheels}", *names)
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        shutil.rmtree(wheels)


def call(*command: str, cwd: Path | None = None) -> None:
    """Runs a program that must succeed, silently."""
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
