"""Labelled images on the disk, and batches of them that depend on nothing but a seed.

What is drawn for an image (its place in the order, its crop) is a function of seed, epoch and its
number. So a run that is resumed, or shared by several processes, sees the same data.
"""

import csv
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.quantize.train_config import Augment
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import Transform, crop, normalize, open_image

__all__ = ["Batch", "Images", "LabelledImages", "read_images"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# A crop takes at least this share of the image, and is at most this much wider than high.
_LEAST_AREA = 0.35
_MOST_ASPECT = 4 / 3

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Which files there are, and what they show.

    Attributes:
        source: where they were found, for messages.
        paths, labels: one label for each path.
        classes: names by label; "" where only numbers are known.
    """

    source: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """A hash of names and labels, not of what the files hold."""
        lines = [f"{path}\t{label}" for path, label in zip(self.paths, self.labels, strict=True)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def read_images(source: Path, *, classes: int, names: Sequence[str] = ()) -> LabelledImages:
    """The images of a folder with a folder for each class, or of a CSV of paths and labels.

    A folder's classes are numbered in the order of their names. A CSV's labels are numbers, or
    names, numbered in their order as well; a first line "path,label" is passed over, and paths are
    relative to the CSV.

    Args:
        classes: how many the model's head has.
        names: of another set's classes; those here must be among them, and are numbered alike.

    Raises:
        UserError: nothing there, a label beyond the head, an empty class, or a single class.
    """
    if source.is_dir():
        # Beside a CSV of numbers, which are those of the head, folders count as they do alone.
        names = names if any(names) else ()
        samples, known = _read_folder(source, names)
    elif source.is_file():
        samples, known = _read_csv(source, names)
    else:
        raise UserError(f"{source}: no such folder or CSV of images")
    if not samples:
        raise UserError(
            f"{source}: no images; it must hold a folder per class with JPEG, PNG or WebP files, "
            "or be a CSV with lines `path,label`"
        )
    labels = [label for _, label in samples]
    for label in (min(labels), max(labels)):
        if not 0 <= label < classes:
            raise UserError(
                f"{source}: label {label} is outside of the model's head, which has {classes} "
                f"classes (0 to {classes - 1}); use a checkpoint, or --num-classes, with more"
            )
    if source.is_dir() and not names and len(known) != classes:
        # Folders are numbered by their names: with one missing, all labels after it are wrong.
        raise UserError(
            f"{source}: {len(known)} class folders for a head of {classes} classes; for some of "
            "the classes only, use a CSV with their numbers"
        )
    if len(set(labels)) < 2:
        raise UserError(f"{source}: all images are of one class; training needs at least two")
    return LabelledImages(
        source=source,
        paths=tuple(path for path, _ in samples),
        labels=tuple(labels),
        classes=tuple(known) or ("",) * classes,
    )


def _read_folder(source: Path, names: Sequence[str]) -> tuple[list[tuple[Path, int]], list[str]]:
    folders = sorted(path for path in source.iterdir() if path.is_dir() and path.name[0] != ".")
    known = list(names) or [folder.name for folder in folders]
    samples = []
    for folder in folders:
        label = _label(folder.name, known, source)
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"{folder}: a class without images; fill the folder or remove it")
        samples += [(file, label) for file in files]
    return samples, known


def _read_csv(source: Path, names: Sequence[str]) -> tuple[list[tuple[Path, int]], list[str]]:
    try:
        # Spreadsheets put a mark before the first line.
        with source.open(newline="", encoding="utf-8-sig") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{source}: no CSV in UTF-8: {error}") from error
    if rows and [cell.strip().lower() for cell in rows[0][1]] == ["path", "label"]:
        rows = rows[1:]
    for number, row in rows:
        if len(row) != 2:
            raise UserError(f"{source}, line {number}: {len(row)} fields, not `path,label`")
    texts = [row[1].strip() for _, row in rows]
    if all(text.lstrip("-").isdecimal() for text in texts):
        known: list[str] = list(names)
        labels = [_number(text, source) for text in texts]
    else:
        known = list(names) or sorted(set(texts))
        labels = [_label(text, known, source) for text in texts]
    return [
        (source.parent / row[0].strip(), label)
        for (_, row), label in zip(rows, labels, strict=True)
    ], known


def _number(text: str, source: Path) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{source}: {text[:40]!r} is no label") from None


def _label(name: str, known: Sequence[str], source: Path) -> int:
    try:
        return known.index(name)
    except ValueError:
        raise UserError(
            f"{source}: class {name!r} is not among those of the training data"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images (n, 3, H, W), normalized, and their labels (n,)."""

    images: FloatArray
    labels: npt.NDArray[np.int64]


@dataclass(kw_only=True)
class Images:
    """Reads labelled images, several at a time, and remembers the ones that cannot be read.

    Attributes:
        transform: the model's own, from pixels to input.
        max_corrupt: how many unreadable images are passed over before it is an error.
        on_corrupt: told of each one, once.
        threads: how many decode.
        room: bytes for crops that are the same in each epoch, to be decoded once.
    """

    files: LabelledImages
    transform: Transform
    max_corrupt: int = 10
    on_corrupt: Callable[[str], None] = lambda _: None
    threads: int = 4
    room: int = 256 << 20
    corrupt: dict[int, str] = field(default_factory=dict)
    _kept: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def evaluate(self, batch_size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The images in order, as evaluation sees them; of several processes, one's share.

        Unreadable ones are left out.
        """
        indices = np.arange(len(self.files))[rank::world]
        batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]

        def read(index: int) -> tuple[FloatArray, int] | None:
            pixels = self._pixels(index)
            return None if pixels is None else (pixels, self.files.labels[index])

        with ThreadPoolExecutor(self.threads) as pool:
            for samples in _ahead(pool, batches, read):
                found = [sample for sample in samples if sample is not None]
                if found:
                    yield _batch(found)

    def train(
        self,
        epoch: int,
        batch_size: int,
        *,
        augment: Augment,
        seed: int,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Batch]:
        """An epoch's batches from number `first` on; of several processes, one's share of each.

        The last batch is filled up from the first images. An image that cannot be read gives way
        to the next one that can.

        Args:
            batch_size: of all processes together, a multiple of `world`.
        """
        order = np.random.default_rng((seed, epoch)).permutation(len(self.files))
        steps = self.steps(batch_size)
        order = np.resize(order, steps * batch_size).reshape(steps, world, -1)

        def read(index: int) -> tuple[FloatArray, int]:
            for number in range(index, index + len(self.files)):
                number %= len(self.files)
                rng = np.random.default_rng((seed, epoch, int(number)))
                pixels = self._pixels(number, None if augment == "none" else rng, augment)
                if pixels is not None:
                    return pixels, self.files.labels[number]
            raise UserError(f"{self.files.source}: not one image can be read")

        with ThreadPoolExecutor(self.threads) as pool:
            for samples in _ahead(pool, list(order[first:, rank]), read):
                yield _batch(samples)

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch."""
        return -(-len(self.files) // batch_size)

    def sample(self, count: int) -> list[FloatArray]:
        """Up to `count` images from all over the set, as evaluation sees them, (3, H, W) each."""
        stride = -(-len(self.files) // count)
        found = (self._pixels(index) for index in range(0, len(self.files), stride))
        return [pixels for pixels in found if pixels is not None]

    def _pixels(
        self, index: int, rng: np.random.Generator | None = None, augment: Augment = "none"
    ) -> FloatArray | None:
        if index in self.corrupt:
            return None
        try:
            if rng is None:
                pixels = self._centre(index)
            else:
                image = open_image(self.files.paths[index])
                pixels = _random_crop(image, self.transform, rng, augment)
        except UserError as error:
            self._passed_over(index, str(error))
            return None
        values: FloatArray = normalize(pixels, self.transform)[0]
        return values

    def _centre(self, index: int) -> npt.NDArray[np.uint8]:
        """An image as evaluation sees it; decoded once, while there is room for it."""
        pixels = self._kept.get(index)
        if pixels is None:
            pixels = crop(open_image(self.files.paths[index]), self.transform)
            if (len(self._kept) + 1) * pixels.nbytes <= self.room:
                self._kept[index] = pixels
        return pixels

    def _passed_over(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self.corrupt:
                return
            self.corrupt[index] = reason
            count = len(self.corrupt)
        if count > self.max_corrupt:
            raise UserError(
                f"{reason}; that makes {count} unreadable images in {self.files.source}, "
                f"{self.max_corrupt} are passed over: repair them or raise --max-corrupt"
            )
        self.on_corrupt(f"passed over {reason}")


def _ahead(
    pool: ThreadPoolExecutor, batches: Sequence[Any], read: Callable[[int], Any]
) -> Iterator[list[Any]]:
    """Each batch's samples; the next batch is read while the caller uses this one."""
    waiting: list[list[Future[Any]]] = []
    try:
        for batch in batches:
            waiting.append([pool.submit(read, int(index)) for index in batch])
            if len(waiting) == 2:
                yield [future.result() for future in waiting.pop(0)]
        for futures in waiting:
            yield [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batch(samples: Sequence[tuple[FloatArray, int]]) -> Batch:
    return Batch(
        images=np.stack([pixels for pixels, _ in samples]),
        labels=np.array([label for _, label in samples], np.int64),
    )


def _random_crop(
    image: Any, transform: Transform, rng: np.random.Generator, augment: Augment
) -> npt.NDArray[np.uint8]:
    """A random part of the image as a square of the model's size, perhaps mirrored."""
    from PIL import Image

    width, height = image.size
    aspect = np.exp(rng.uniform(-np.log(_MOST_ASPECT), np.log(_MOST_ASPECT)))
    area = rng.uniform(_LEAST_AREA, 1) * width * height
    w = min(width, max(1, round(np.sqrt(area * aspect))))
    h = min(height, max(1, round(np.sqrt(area / aspect))))
    left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
    size = transform.image_size
    resample = Image.Resampling[transform.interpolation.upper()]
    part = image.resize((size, size), resample, box=(left, top, left + w, top + h))
    if augment == "crop-flip" and rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part)
