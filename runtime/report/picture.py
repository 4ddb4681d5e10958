"""What a bundle sees in a photo: its classes, and the patches that a pruning model kept."""

import io
import math
import platform
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.runtime import images
from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.device import gfrt
from gfcompile.runtime.errors import DeviceError
from gfcompile.runtime.kept_patches import places_in_grid
from gfcompile.runtime.report.html import figure, mapping, records

MAX_SIDE = 4096
TOP = 5


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A photo and what was made of it.

    Attributes:
        pixels: (H, W, 3) uint8, as the model sees it.
        top: class and probability, the likeliest first.
        source: which photo it is.
        computed_by: what gave the classes.
        kept: per pruning stage, the places of the patches kept, in a square grid of `patches`.
    """

    pixels: npt.NDArray[np.uint8]
    top: tuple[tuple[str, float], ...]
    source: str
    computed_by: str
    kept: tuple[tuple[int, ...], ...] = ()
    patches: int = 0

    def data_uri(self) -> str:
        """The photo as a JPEG."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "JPEG", quality=88, optimize=True)
        return "data:image/jpeg;base64," + b64encode(buffer.getvalue()).decode("ascii")


def look(bundle: Path, manifest: Manifest, photo: Path | None = None) -> Picture | None:
    """What the bundle makes of `photo`, or of its golden image; None if nothing can be shown.

    For a photo, and to see which patches a pruning model keeps, the bundle runs here if this
    machine can: natively, or an arm64 one under QEMU. Otherwise its golden image stands with the
    logits that its graph gave for it.

    Raises:
        UserError: the photo cannot be used.
        DeviceError: a photo was given, and this machine cannot run the bundle.
        BundleError: the bundle is damaged.
    """
    if manifest.transform is None:
        return None
    transform = images.Transform.from_dict(dict(manifest.transform))
    pixels = images.cropped(photo, transform) if photo else _golden_pixels(bundle, transform)
    if pixels is None:
        return None
    name = photo.name if photo else "the bundle's golden photo"
    if photo is None and not mapping(manifest.extra.get("pruning")):
        return _recorded(bundle, pixels, name)
    try:
        return _run(bundle, manifest, pixels, name)
    except DeviceError:
        if photo is not None:
            raise
        return _recorded(bundle, pixels, name)


def _run(bundle: Path, manifest: Manifest, pixels: npt.NDArray[np.uint8], name: str) -> Picture:
    from gfcompile.runtime.session import load

    if manifest.device == "cuda":
        raise DeviceError("kernels for a GPU do not run here")
    emulated = manifest.arch not in ("any", platform.machine())
    with load(bundle, device="qemu" if emulated else "local") as session:
        top = session.classify(pixels, top=TOP)
        kept, patches = _kept(manifest, lambda: session.trace(session.encode(pixels)))
    how = (
        "the bundle, under QEMU" if emulated else session.stand_in or "the bundle, on this machine"
    )
    return Picture(
        pixels=pixels,
        top=tuple((label, probability) for _, label, probability in top),
        source=name,
        computed_by=how,
        kept=kept,
        patches=patches,
    )


def _recorded(bundle: Path, pixels: npt.NDArray[np.uint8], name: str) -> Picture | None:
    """The golden image with its golden logits."""
    try:
        logits = np.fromfile(bundle / "golden" / "logits.f32", "<f4")
    except OSError:
        return None
    if logits.size == 0 or not np.isfinite(logits).all():
        return None
    labels = gfrt.read_labels(str(bundle))
    top = tuple(
        (labels[i] if i < len(labels) else f"class {i}", probability)
        for i, probability in gfrt.top_classes(logits, TOP)
    )
    return Picture(
        pixels=pixels, top=top, source=name, computed_by="the bundle's graph, in ONNX Runtime"
    )


def _golden_pixels(bundle: Path, transform: images.Transform) -> npt.NDArray[np.uint8] | None:
    side = transform.image_size
    try:
        raw = np.fromfile(bundle / "golden" / "image.u8", np.uint8)
    except OSError:
        return None
    return raw.reshape(side, side, 3) if side <= MAX_SIDE and raw.size == side * side * 3 else None


def _kept(manifest: Manifest, trace: Any) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The places kept per stage, and of how many; nothing for a model that keeps all of them."""
    pruning = mapping(manifest.extra.get("pruning"))
    selections = records(pruning.get("selections"))
    kept, patches = pruning.get("kept"), figure(pruning.get("patches"))
    if not selections or not isinstance(kept, list) or patches is None:
        return (), 0
    if math.isqrt(int(patches)) ** 2 != patches or len(kept) != len(selections):
        return (), 0
    values = trace()
    try:
        chosen = [
            values[s["tensor"]][:, int(s["leading"]) :] - int(s["offset"]) for s in selections
        ]
        places = places_in_grid(
            chosen, [int(k) for k in kept], chosen_anew=bool(pruning.get("chosen_anew"))
        )
    except (KeyError, TypeError, ValueError, IndexError):
        return (), 0  # the manifest names what the plan does not have
    return tuple(tuple(int(i) for i in stage[0] if 0 <= i < patches) for stage in places), int(
        patches
    )
