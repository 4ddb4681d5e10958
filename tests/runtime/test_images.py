"""Image files of every kind become the same tensor that an independent computation gives."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gfcompile.runtime.errors import BundleError, UserError
from gfcompile.runtime.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Transform,
    crop,
    imagenet_transform,
    normalize,
    open_image,
    preprocess,
    stand_in_photos,
)

_TRANSFORM = imagenet_transform(224)


def _smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image with structure at every scale above a few pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3))
    small = Image.fromarray(noise.astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(300, 300), (451, 300), (301, 517), (200, 150), (256, 256)])
def test_crop_agrees_with_torch_antialiased_bicubic(size: tuple[int, int]) -> None:
    # torch computes the same separable filter in float and rounds once; Pillow rounds after each
    # of its two passes, so they can be one level apart, and no more.
    import torch

    image = _smooth(*size)
    width, height = size
    scale = 256 / min(size)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float(),
        size=(int(height * scale + 1e-9), int(width * scale + 1e-9)),
        mode="bicubic",
        antialias=True,
    )
    top, left = (round((side - 224) / 2) for side in resized.shape[2:])
    expected = resized[0, :, top : top + 224, left : left + 224].permute(1, 2, 0)
    expected = expected.clamp(0, 255).round().numpy()
    assert np.abs(crop(image, _TRANSFORM).astype(int) - expected).max() <= 1


def test_the_photos_that_ship_are_read() -> None:
    photos = stand_in_photos()
    assert [photo.stem for photo in photos] == ["astronaut", "cat", "coffee", "rocket"]
    for photo in photos:
        tensor = preprocess(photo, _TRANSFORM)
        assert tensor.shape == (1, 3, 224, 224)
        assert tensor.dtype == np.float32
        assert tensor.flags["C_CONTIGUOUS"]
        assert tensor.std() > 0.3


def test_normalize_is_divide_subtract_divide_in_float32() -> None:
    ramp = np.arange(256, dtype=np.uint8)
    pixels = np.stack([ramp, ramp, ramp], axis=-1)[np.newaxis]  # (1, 256, 3)
    result = normalize(pixels, _TRANSFORM)
    assert result.shape == (1, 3, 1, 256)
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        for value in range(256):
            scalar = np.float32(value) / np.float32(255)
            expected = (scalar - np.float32(mean)) / np.float32(std)
            assert result[0, channel, 0, value] == expected


def test_normalize_takes_a_batch() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    batch = normalize(pixels, _TRANSFORM)
    assert batch.shape == (3, 3, 4, 5)
    np.testing.assert_array_equal(batch[1:2], normalize(pixels[1], _TRANSFORM))


def test_a_pil_image_and_its_file_give_the_same_tensor(tmp_path: Path) -> None:
    image = _smooth(320, 260)
    image.save(tmp_path / "image.png")
    from_file = preprocess(tmp_path / "image.png", _TRANSFORM)
    np.testing.assert_array_equal(preprocess(str(tmp_path / "image.png"), _TRANSFORM), from_file)
    np.testing.assert_array_equal(preprocess(image, _TRANSFORM), from_file)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_each_format_is_read(suffix: str, tmp_path: Path) -> None:
    image = _smooth(64, 48)
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    image.save(tmp_path / f"image.{suffix}", **lossless.get(suffix, {}))
    read = open_image(tmp_path / f"image.{suffix}")
    assert read.mode == "RGB"
    # JPEG at quality 100 still rounds its coefficients and the colour transform.
    tolerance = 4 if suffix == "jpg" else 0
    assert np.abs(np.asarray(read, int) - np.asarray(image, int)).max() <= tolerance


# What undoes each EXIF orientation, in NumPy: value -> the upright array from the stored one.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", sorted(_UPRIGHT))
def test_exif_orientation_is_undone(orientation: int, tmp_path: Path) -> None:
    stored = _smooth(40, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    expected = _UPRIGHT[orientation](np.asarray(stored))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "image.png")), expected)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = _smooth(30, 20).convert("L")
    grey.save(tmp_path / "image.png")
    read = np.asarray(open_image(tmp_path / "image.png"))
    for channel in range(3):
        np.testing.assert_array_equal(read[..., channel], np.asarray(grey))


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "image.png")
    read = np.asarray(open_image(tmp_path / "image.png"))
    np.testing.assert_array_equal(read[..., 0], values >> 8)


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    _smooth(30, 20).convert("1").save(tmp_path / "image.png")
    assert set(np.unique(np.asarray(open_image(tmp_path / "image.png")))) == {0, 255}


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    colour = np.asarray(_smooth(30, 20), np.uint8)
    alpha = np.linspace(0, 255, 30).round().astype(np.uint8)[np.newaxis, :, np.newaxis]
    alpha = np.broadcast_to(alpha, (20, 30, 1))
    Image.fromarray(np.concatenate([colour, alpha], axis=-1)).save(tmp_path / "image.png")
    opacity = alpha / 255
    expected = colour * opacity + 255 * (1 - opacity)
    read = np.asarray(open_image(tmp_path / "image.png"))
    assert np.abs(read - expected).max() <= 1  # Pillow blends in integers
    assert (read[:, 0] == 255).all()


def test_grey_with_alpha_is_composited_on_white(tmp_path: Path) -> None:
    Image.new("LA", (4, 4), (10, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (4, 4), (10, 255)).save(tmp_path / "opaque.png")
    assert (np.asarray(open_image(tmp_path / "clear.png")) == 255).all()
    assert (np.asarray(open_image(tmp_path / "opaque.png")) == 10).all()


def test_palette_is_looked_up_and_its_transparent_entry_shows_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([9, 8, 7, 60, 50, 40])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=0)
    assert open_image(tmp_path / "opaque.png").getpixel((0, 0)) == (9, 8, 7)
    clear = open_image(tmp_path / "clear.png")
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert clear.getpixel((1, 1)) == (60, 50, 40)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    # The naive conversion, R = 255 (1 - C)(1 - K): no ink is white, full key is black.
    for ink, expected in [((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((0, 0, 0, 128), 127)]:
        Image.new("CMYK", (16, 16), ink).save(tmp_path / "image.jpg", quality=100)
        read = np.asarray(open_image(tmp_path / "image.jpg"), int)
        assert read.shape == (16, 16, 3)
        assert np.abs(read - expected).max() <= 2


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), (10, 20, 30)), Image.new("RGB", (8, 8), "white")
    path = tmp_path / "image.webp"
    first.save(path, save_all=True, append_images=[second], lossless=True)
    assert open_image(path).getpixel((3, 3)) == (10, 20, 30)


def _refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        preprocess(path, _TRANSFORM)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_truncated_image_is_refused(suffix: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    _smooth(200, 200).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    assert re.search("cannot be read|not a JPEG", _refused(path))


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    assert "JPEG, PNG or WebP" in _refused(path)


def test_other_image_formats_are_refused(tmp_path: Path) -> None:
    _smooth(20, 20).save(tmp_path / "image.bmp")
    assert "JPEG, PNG or WebP" in _refused(tmp_path / "image.bmp")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such image" in _refused(tmp_path / "image.jpg")
    assert "folder" in _refused(tmp_path)


def test_a_strip_that_would_fill_memory_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (20000, 1)).save(tmp_path / "strip.png")
    assert "too elongated" in _refused(tmp_path / "strip.png")


def test_too_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    _smooth(20, 20).save(tmp_path / "image.png")
    assert "too many pixels" in _refused(tmp_path / "image.png")


@pytest.mark.parametrize(("image_size", "resize"), [(224, 256), (384, 438), (256, 292), (32, 36)])
def test_imagenet_transform_keeps_the_papers_ratio(image_size: int, resize: int) -> None:
    assert imagenet_transform(image_size).resize == resize == int(256 / 224 * image_size)


def test_a_transform_survives_json() -> None:
    transform = Transform(image_size=192, resize=200, interpolation="bilinear", mean=(0.5, 0.4, 0))
    assert Transform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform


@pytest.mark.parametrize(
    "damage",
    [
        {"interpolation": "cubist"},
        {"image_size": 300},
        {"image_size": "large"},
        {"mean": [1, 2]},
        {"std": [0, 1, 1]},
        {"image_size": float("inf")},
        {"mean": [10**400, 0, 0]},
        {"mean": [float("nan"), 0, 0]},
        {"std": [1, float("nan"), float("inf")]},
        {"std": None},
    ],
)
def test_a_damaged_transform_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(BundleError, match="transform makes no sense"):
        Transform.from_dict(_TRANSFORM.to_dict() | damage)


def test_an_incomplete_transform_is_refused() -> None:
    values = _TRANSFORM.to_dict()
    del values["resize"]
    with pytest.raises(BundleError, match="lacks 'resize'"):
        Transform.from_dict(values)


def test_importing_images_does_not_import_pillow() -> None:
    script = "import sys, gfcompile.runtime.images; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
