"""Image files to input tensors: the evaluation transform of the papers, on NumPy and Pillow.

The definition is short, so that any other implementation can be held against it: decode, turn
upright (EXIF), make 8-bit RGB, resize the shorter side to `Transform.resize` (the longer one
truncated to whole pixels), cut `image_size` squared out of the centre, then (x/255 - mean)/std
in float32. It gives the same bytes as torchvision's Resize and CenterCrop on a PIL image.
"""

import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.bundle import TensorSpec
from gfcompile.runtime.errors import BundleError, UserError

if TYPE_CHECKING:
    from PIL import Image

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FORMATS = ("JPEG", "PNG", "WEBP")
# Pillow's decoders raise these on damaged files. UnidentifiedImageError is an OSError.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, KeyError, struct.error, zlib.error)
# A 10000 x 1 strip is small as a file, but not once its short side has been resized to 256.
_MAX_RESIZED_PIXELS = 2**26


@dataclass(frozen=True, kw_only=True)
class Transform:
    """How an image becomes the input of a model.

    Attributes:
        image_size: side of the square that the model sees, in pixels.
        resize: what the shorter side is resized to before the centre crop, at least image_size.
        interpolation: Pillow's filter of that name, which averages when it shrinks (antialias).
        mean, std: per channel, for values in [0, 1].
    """

    image_size: int
    resize: int
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 0 < self.image_size <= self.resize:
            raise ValueError(f"no {self.image_size}-pixel crop in an image of {self.resize} pixels")
        if self.interpolation not in get_args(Interpolation):
            known = ", ".join(get_args(Interpolation))
            raise ValueError(f"unknown interpolation {self.interpolation!r}; choose from {known}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError("mean and std need three values each, std above zero")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ValueError("mean and std need finite values")

    def to_dict(self) -> dict[str, Any]:
        """The transform as JSON values, for a manifest."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; keys that it does not know are ignored.

        Raises:
            BundleError: a value is missing or makes no sense.
        """
        try:
            return cls(
                image_size=int(values["image_size"]),
                resize=int(values["resize"]),
                interpolation=values["interpolation"],
                mean=_triple(values["mean"]),
                std=_triple(values["std"]),
            )
        except KeyError as error:
            wanted = ", ".join(field.name for field in fields(cls))
            raise BundleError(f"transform lacks {error}; it needs {wanted}") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise BundleError(f"transform makes no sense: {error}") from None


def imagenet_transform(image_size: int) -> Transform:
    """ImageNet's evaluation transform: resize to 256/224 of the crop, which is 256 for 224."""
    return Transform(image_size=image_size, resize=image_size * 256 // 224)


def open_image(path: Path | str) -> "Image.Image":
    """The JPEG, PNG or WebP image at `path`, upright, as 8-bit RGB; of an animation, frame one.

    Raises:
        UserError: there is no such file, or it is no such image, is damaged or is too large.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'no such image file'}")
    try:
        with warnings.catch_warnings():
            # Phones take photos of the size that Pillow warns of; what it refuses, we refuse.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                image.load()
                return to_rgb(image)
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a JPEG, PNG or WebP image") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: has too many pixels; reduce it first") from None
    except _DECODE_ERRORS as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from error


def to_rgb(image: "Image.Image") -> "Image.Image":
    """`image`, turned upright by its EXIF orientation, as 8-bit RGB.

    Transparent pixels show white, as a viewer shows them: what colour a file hides beneath them
    is arbitrary. 16-bit grey keeps its high byte, as Pillow does with 16-bit colour. ICC
    profiles are not applied, as in the papers' evaluation.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: "I;16", "I;16B", or 16 bits in "I"
        high = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(high.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop(image: "Image.Image", transform: Transform) -> npt.NDArray[np.uint8]:
    """The centre of an RGB image, resized: uint8 (image_size, image_size, 3).

    Raises:
        UserError: the image is so elongated that its resized form would not fit memory.
    """
    from PIL import Image

    assert image.mode == "RGB", f"{image.mode} image; call to_rgb first"
    width, height = (transform.resize * side // min(image.size) for side in image.size)
    if width * height > _MAX_RESIZED_PIXELS:
        raise UserError(f"{image.width} x {image.height} pixels are too elongated for a crop")
    # round() goes to even on halves, as the papers' crop does.
    left, top = (round((side - transform.image_size) / 2) for side in (width, height))
    box = (left, top, left + transform.image_size, top + transform.image_size)
    resample = Image.Resampling[transform.interpolation.upper()]
    return np.asarray(image.resize((width, height), resample).crop(box))


def normalize(pixels: npt.NDArray[np.uint8], transform: Transform) -> npt.NDArray[np.float32]:
    """(x/255 - mean)/std, in float32 and in that order: uint8 HWC or NHWC -> float32 NCHW."""
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.shape[-1] == 3, pixels.shape
    if pixels.ndim == 3:
        pixels = pixels[np.newaxis]
    mean = np.asarray(transform.mean, np.float32)
    std = np.asarray(transform.std, np.float32)
    scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def preprocess(image: "Path | str | Image.Image", transform: Transform) -> npt.NDArray[np.float32]:
    """The input tensor for an image file or a PIL image: float32 (1, 3, image_size, image_size).

    Raises:
        UserError: as `open_image` and `crop`.
    """
    return normalize(cropped(image, transform), transform)


def cropped(image: "Path | str | Image.Image", transform: Transform) -> npt.NDArray[np.uint8]:
    """The pixels of an image file or a PIL image that the model sees, (H, W, 3).

    Raises:
        UserError: as `open_image` and `crop`.
    """
    if not isinstance(image, str | Path):
        return crop(to_rgb(image), transform)
    opened = open_image(image)
    try:
        return crop(opened, transform)
    except UserError as error:
        raise UserError(f"{image}: {error}") from None


def encode(
    pixels: npt.NDArray[np.uint8], transform: Transform, spec: TensorSpec
) -> npt.NDArray[Any]:
    """What the input `spec` takes for pixels HWC or NHWC: its layout, its dtype, its scale."""
    if pixels.ndim == 3:
        pixels = pixels[np.newaxis]
    if spec.pixels:
        return pixels
    values = normalize(pixels, transform)
    if spec.layout == "nhwc":
        values = np.ascontiguousarray(values.transpose(0, 2, 3, 1))
    return quantize(values, spec)


def quantize(values: npt.NDArray[np.float32], spec: TensorSpec) -> npt.NDArray[Any]:
    """Real values as `spec` stores them: rint(value / scale) + zero_point, saturated."""
    if not spec.scale:
        return values
    limits = np.iinfo(spec.dtype)
    stored = np.rint(values / np.float32(spec.scale)) + np.float32(spec.zero_point)
    return np.asarray(np.clip(stored, limits.min, limits.max), spec.dtype)


def dequantize(values: npt.NDArray[Any], spec: TensorSpec) -> npt.NDArray[np.float32]:
    """The real values that `spec` stores as `values`."""
    if not spec.scale:
        return np.asarray(values, np.float32)
    shifted: npt.NDArray[np.float32] = values.astype(np.float32) - np.float32(spec.zero_point)
    return shifted * np.float32(spec.scale)


def in_batches(arrays: Sequence[npt.NDArray[Any]], size: int) -> list[npt.NDArray[Any]]:
    """What is in the arrays (n, ...) one after the other, as batches (size, ...) of it.

    The first ones fill up the last batch.
    """
    images = [image for array in arrays for image in array]
    count = -(-len(images) // size) * size
    filled = [images[i % len(images)] for i in range(count)]
    return [np.stack(filled[i : i + size]) for i in range(0, count, size)]


def stand_in_photos() -> list[Path]:
    """The photos that ship with gfcompile: for a demo, and in place of calibration data."""
    return sorted((Path(__file__).parent / "photos").glob("*.jpg"))


def _triple(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
