from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gfcompile.quantize.data import Images, LabelledImages, read_images
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import Transform, preprocess

TRANSFORM = Transform(image_size=16, resize=18)


def images(files: LabelledImages, **options: object) -> Images:
    return Images(files=files, transform=TRANSFORM, threads=2, **options)  # type: ignore[arg-type]


def folder_of(tmp_path: Path, **counts: int) -> Path:
    for name, count in counts.items():
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            shade = (37 * i + len(name) * 11) % 256
            Image.new("RGB", (20, 20), (shade, i, 0)).save(tmp_path / name / f"{i:02}.png")
    return tmp_path


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = read_images(folder_of(tmp_path, cat=2, ant=1, bee=1), classes=3)
    assert files.classes == ("ant", "bee", "cat")
    assert files.labels == (0, 1, 2, 2)
    assert [path.parent.name for path in files.paths] == ["ant", "bee", "cat", "cat"]


def test_a_csv_may_hold_numbers_or_names_and_a_header(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path,label\na.png,3\nsub/b.png,0\n")
    files = read_images(table, classes=5)
    assert files.paths == (tmp_path / "a.png", tmp_path / "sub" / "b.png")
    assert files.labels == (3, 0)
    table.write_text("path,label\na.png,3\nb.png,0\n", encoding="utf-8-sig")
    assert read_images(table, classes=5).labels == (3, 0)
    table.write_text('a.png,dog\n"b, c.png",cat\n')
    files = read_images(table, classes=2)
    assert files.labels == (1, 0)
    assert files.classes == ("cat", "dog")


def test_validation_classes_are_numbered_as_in_training(tmp_path: Path) -> None:
    training = read_images(folder_of(tmp_path / "train", a=1, b=1, c=1), classes=3)
    held_out = read_images(folder_of(tmp_path / "val", b=1, c=1), classes=3, names=training.classes)
    assert held_out.labels == (1, 2)
    with pytest.raises(UserError, match="class 'd' is not among"):
        read_images(folder_of(tmp_path / "other", a=1, d=1), classes=3, names=training.classes)


def test_folders_beside_a_csv_of_numbers_count_as_they_do_alone(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("a.png,2\nb.png,0\n")
    training = read_images(table, classes=3)
    folder = folder_of(tmp_path / "val", a=1, b=1, c=1)
    assert read_images(folder, classes=3, names=training.classes).labels == (0, 1, 2)
    with pytest.raises(UserError, match="3 class folders for a head of 4 classes"):
        read_images(folder, classes=4, names=("",) * 4)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("", "no images"),
        ("a.png,0\nb.png,10\n", "label 10 is outside of the model's head, which has 10 classes"),
        ("a.png,0\nb.png,-1\n", "label -1 is outside"),
        ("a.png,4\nb.png,4\n", "all images are of one class"),
        ("a.png,0\nb.png\n", "line 2: 1 fields"),
        ("a.png,0\nb.png,--1\n", "'--1' is no label"),
        (f"a.png,0\nb.png,{'1' * 5000}\n", f"'{'1' * 40}' is no label"),
    ],
)
def test_labels_that_cannot_be_are_named(tmp_path: Path, lines: str, complaint: str) -> None:
    table = tmp_path / "list.csv"
    table.write_text(lines)
    with pytest.raises(UserError, match=complaint):
        read_images(table, classes=10)


def test_folders_that_cannot_be_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder or CSV"):
        read_images(tmp_path / "none", classes=3)
    empty = folder_of(tmp_path / "empty", a=1, b=0)
    with pytest.raises(UserError, match=r"b: a class without images"):
        read_images(empty, classes=2)
    with pytest.raises(UserError, match="2 class folders for a head of 5 classes"):
        read_images(folder_of(tmp_path / "few", a=1, b=1), classes=5)


def test_without_augmentation_an_epoch_is_the_evaluation_images_in_another_order(
    image_folder: Path,
) -> None:
    data = images(read_images(image_folder, classes=3))
    batches = list(data.train(0, 8, augment="none", seed=0))
    assert [batch.images.shape for batch in batches] == [(8, 3, 16, 16)] * 3
    trained = np.concatenate([batch.images for batch in batches])
    evaluated = np.concatenate([batch.images for batch in data.evaluate(5)])
    assert {x.tobytes() for x in trained} == {x.tobytes() for x in evaluated}
    assert np.array_equal(evaluated[3], preprocess(data.files.paths[3], TRANSFORM)[0])
    labels = np.concatenate([batch.labels for batch in data.evaluate(5)])
    assert tuple(labels) == data.files.labels


def test_without_augmentation_images_are_decoded_once_while_there_is_room(tmp_path: Path) -> None:
    files = read_images(folder_of(tmp_path, a=2, b=2), classes=2)
    one_crop = 16 * 16 * 3
    kept, some = images(files), images(files, room=2 * one_crop)
    first = [pixels.copy() for pixels in kept.sample(4)]
    some.sample(4)
    for path in files.paths:
        path.unlink()
    np.testing.assert_array_equal(kept.sample(4), first)
    np.testing.assert_array_equal(some.sample(4), first[:2])
    assert sorted(some.corrupt) == [2, 3]


def test_epochs_differ_and_each_depends_on_the_seed_alone(image_folder: Path) -> None:
    def epoch(number: int, seed: int = 0, **options: int) -> list[bytes]:
        data = images(read_images(image_folder, classes=3))
        batches = data.train(number, 8, augment="crop-flip", seed=seed, **options)
        return [batch.images.tobytes() for batch in batches]

    assert epoch(0) == epoch(0)
    assert epoch(0)[2:] == epoch(0, first=2)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)


def test_processes_share_each_batch_of_one(image_folder: Path) -> None:
    data = images(read_images(image_folder, classes=3))
    whole = list(data.train(1, 10, augment="crop", seed=3))
    shares = [list(data.train(1, 10, augment="crop", seed=3, rank=r, world=2)) for r in (0, 1)]
    assert len(whole) == 3  # 24 images; the last batch is filled up
    for batch, one, other in zip(whole, *shares, strict=True):
        assert np.array_equal(batch.images, np.concatenate([one.images, other.images]))
        assert np.array_equal(batch.labels, np.concatenate([one.labels, other.labels]))
    counted = sum(len(batch.labels) for r in (0, 1) for batch in data.evaluate(4, rank=r, world=2))
    assert counted == 24


def test_unreadable_images_are_named_and_passed_over_up_to_a_limit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, a=6, b=6)
    broken = [folder / "a" / "02.png", folder / "b" / "05.png"]
    broken[0].write_bytes(b"not a PNG")
    broken[1].write_bytes(broken[1].read_bytes()[:60])
    said: list[str] = []
    data = images(read_images(folder, classes=2), max_corrupt=2, on_corrupt=said.append)
    assert sum(len(batch.labels) for batch in data.evaluate(4)) == 10
    batches = list(data.train(0, 4, augment="none", seed=0))
    assert [len(batch.labels) for batch in batches] == [4, 4, 4]
    assert len(said) == 2
    for path in broken:
        assert any(str(path) in line for line in said)
    strict = images(read_images(folder, classes=2), max_corrupt=1)
    with pytest.raises(UserError, match=r"that makes 2 unreadable images .* --max-corrupt"):
        list(strict.evaluate(4))


def test_calibration_images_come_from_all_over_the_set(image_folder: Path) -> None:
    data = images(read_images(image_folder, classes=3))
    assert len(data.sample(6)) == 6
    assert len(data.sample(100)) == 24
    assert len(data.sample(10)) == 8
