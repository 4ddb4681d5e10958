"""The golden data of a bundle: an image, and the logits that the compiled graph gives its views.

Eight views of one image test as much as eight images do and take the room of one.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.errors import BundleError

FOLDER = "golden"
# What int8 logits may differ by is known from other images; these may lie twice as far out.
_OTHER_IMAGES = 2.0


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Inputs and what should come out.

    Attributes:
        images: (H, W, 3) each.
        logits: (images, classes).
        tolerance: that a logit may be off; None where the manifest does not tell it.
    """

    images: tuple[npt.NDArray[np.uint8], ...]
    logits: npt.NDArray[np.float32]
    tolerance: float | None

    def in_whole_batches(self, batch: int, most: int | None = None) -> Self:
        """All of these, or `most`, and as many of them again as the last batch has room for."""
        count = len(self.images) if most is None else min(most, len(self.images))
        places = [i % len(self.images) for i in range(-(-count // batch) * batch)]
        return replace(
            self, images=tuple(self.images[i] for i in places), logits=self.logits[places]
        )


def views(image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """The 8 ways to look at a square image (N, N, 3): turned, and mirrored; itself is the first."""
    turned = [np.rot90(image, times) for times in range(4)]
    return [np.ascontiguousarray(view) for view in (*turned, *(np.fliplr(v) for v in turned))]


def read_golden(bundle: Path, manifest: Manifest) -> Golden | None:
    """The bundle's golden data; None if it has none.

    Raises:
        BundleError: it is not what the manifest says.
    """
    folder = bundle / FOLDER
    if not (folder / "image.u8").is_file():
        return None
    size = int((manifest.transform or {}).get("image_size", 0))
    classes = max(math.prod(manifest.outputs[0].shape) // manifest.batch, 1)
    several = folder / "views.f32"
    try:
        pixels = np.fromfile(folder / "image.u8", np.uint8).reshape(size, size, 3)
        stored = several if several.is_file() else folder / "logits.f32"
        logits = np.fromfile(stored, "<f4").reshape(-1, classes)
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder} cannot be used: {error}; compile the bundle again") from error
    images = views(pixels)[: len(logits)]
    if not images or len(images) != len(logits):
        raise BundleError(f"{folder} has {len(logits)} rows of logits; compile the bundle again")
    return Golden(images=tuple(images), logits=logits, tolerance=_tolerance(manifest))


def _tolerance(manifest: Manifest) -> float | None:
    """As the ledger held the artifact against its graph when it was compiled."""
    entry = next((e for e in manifest.ledger if e.get("stage") == "artifact"), None)
    # Where another patch is kept, logits are those of other patches.
    if entry is None or entry.get("tokens_kept"):
        return None
    try:
        if entry.get("int8") is None:
            return float(entry["tolerance"])
        int8 = entry["int8"]
        steps = max(float(int8["logits_limit"]), 2 * float(int8["own_max_steps"]))
        return _OTHER_IMAGES * steps * float(int8["logits_step"])
    except (KeyError, TypeError, ValueError):
        return None
