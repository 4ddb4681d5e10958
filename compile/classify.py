"""Classifies image files with a bundle, on this machine or, for arm64, under qemu."""

import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.bundle import Manifest, check_bundle
from gfcompile.runtime.errors import BundleError, DeviceError, UserError
from gfcompile.runtime.images import Transform, crop, open_image, preprocess

# Enough for a median that a single interruption does not move.
_RUNS = 11
# Where Debian's libc6-arm64-cross puts what an arm64 program needs.
_ARM64_SYSROOT = Path("/usr/aarch64-linux-gnu")


@dataclass(frozen=True, kw_only=True)
class Classified:
    """One image, classified.

    Attributes:
        top: (index, label, probability), most probable first.
        median_ms: of `runs` inferences, decoding and resizing of the image not counted; None
            where time means nothing.
        how: what ran it.
    """

    image: Path
    top: tuple[tuple[int, str, float], ...]
    median_ms: float | None
    runs: int
    how: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        top = [{"index": i, "label": label, "probability": p} for i, label, p in self.top]
        return {**asdict(self), "image": str(self.image), "top": top}


def classify_images(
    bundle: Path,
    images: Sequence[Path],
    *,
    device: Literal["local", "qemu"] = "local",
    top: int = 5,
    threads: int = 1,
) -> Iterator[Classified]:
    """Each image's most probable classes, in the order of `images`.

    Args:
        device: "qemu" emulates an arm64 CPU: what it computes is the device's, its time is not.

    Raises:
        UserError: an image that is none, or a bundle that this device cannot stand in for.
        BundleError: a bundle that is damaged or for another machine.
        DeviceError: what it is to run on is missing or refuses.
    """
    manifest = check_bundle(bundle, local=device == "local")
    transform = _transform(manifest)
    if device == "qemu":
        return _under_qemu(bundle, manifest, transform, images, top=top, threads=threads)
    return _here(bundle, transform, images, top=top, threads=threads)


def _here(
    bundle: Path, transform: Transform, images: Sequence[Path], *, top: int, threads: int
) -> Iterator[Classified]:
    from gfcompile.runtime.session import load

    with load(bundle, threads=threads) as session:
        for image in images:
            array = preprocess(image, transform)
            best = session.classify(image, top=top)  # the first run of all is not timed
            times = []
            for _ in range(_RUNS):
                started = time.perf_counter()
                session.run(array)
                times.append(time.perf_counter() - started)
            yield Classified(
                image=image,
                top=tuple((int(index), str(label), float(p)) for index, label, p in best),
                median_ms=statistics.median(times) * 1e3,
                runs=_RUNS,
                how=f"{threads} thread{'s' if threads > 1 else ''}",
            )


def _under_qemu(
    bundle: Path,
    manifest: Manifest,
    transform: Transform,
    images: Sequence[Path],
    *,
    top: int,
    threads: int,
) -> Iterator[Classified]:
    command = _qemu(manifest) + _bench(bundle)
    labels = _labels(bundle)
    with tempfile.TemporaryDirectory(prefix="gfcompile-") as made:
        pixels, output = Path(made) / "image.u8", Path(made) / "logits.f32"
        for image in images:
            pixels.write_bytes(crop(open_image(image), transform).tobytes())
            done = subprocess.run(
                [*command, "--image-u8", pixels, "--output", output, "--threads", str(threads)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise DeviceError(f"qemu-aarch64: {reason[-1]}")
            logits = np.fromfile(output, "<f4")
            yield Classified(
                image=image,
                top=tuple(
                    (index, labels[index] if labels else str(index), float(probability))
                    for index, probability in best_classes(logits, top)
                ),
                median_ms=None,
                runs=1,
                how=f"qemu as {command[2]}: what the device computes, not how fast",
            )


def best_classes(logits: npt.NDArray[np.float32], top: int) -> list[tuple[int, float]]:
    """Index and probability (softmax) of the `top` largest logits, largest first."""
    shifted = logits.astype(np.float64) - logits.max()  # no overflow in exp
    probability = np.exp(shifted) / np.exp(shifted).sum()
    order = np.argsort(-logits, kind="stable")[:top]
    return [(int(index), float(probability[index])) for index in order]


def _qemu(manifest: Manifest) -> list[str]:
    """The start of a command line that runs a program for the manifest's target."""
    from gfcompile.targets.target import find_target

    if manifest.arch != "aarch64" or manifest.device != "cpu":
        what = "an NVIDIA GPU" if manifest.device == "cuda" else manifest.arch
        raise UserError(
            f"--device qemu runs bundles for arm64 CPUs, this one is for {what} ({manifest.target})"
        )
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None:
        raise DeviceError("qemu-aarch64 is not installed; on Debian: apt-get install qemu-user")
    if not (_ARM64_SYSROOT / "lib" / "ld-linux-aarch64.so.1").exists():
        raise DeviceError(
            f"{_ARM64_SYSROOT} has no arm64 libc; on Debian: apt-get install libc6-arm64-cross"
        )
    cpu = find_target(manifest.target).cpu.qemu_cpu
    assert cpu is not None, manifest.target
    return [qemu, "-cpu", cpu, "-L", str(_ARM64_SYSROOT)]


def _bench(bundle: Path) -> list[str]:
    bench = bundle / "gfbench"
    if not bench.is_file():
        raise BundleError(f"{bundle} has no gfbench, which --device qemu runs; compile it again")
    return [str(bench), str(bundle)]


def _transform(manifest: Manifest) -> Transform:
    if manifest.transform is None:
        raise BundleError(f"{manifest.model} does not say how an image becomes its input")
    return Transform.from_dict(dict(manifest.transform))


def _labels(bundle: Path) -> list[str] | None:
    path = bundle / "labels.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else None
