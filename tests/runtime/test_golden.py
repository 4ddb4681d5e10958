"""Golden data: eight views of an image, and what their logits may be off by."""

from pathlib import Path

import numpy as np
import pytest
from toy_bundle import TIE, Toy, add_golden, write_manifest

from gfcompile.runtime.bundle import read_manifest
from gfcompile.runtime.errors import BundleError
from gfcompile.runtime.golden import read_golden, views


def test_the_views_are_the_eight_symmetries_of_a_square() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    found = views(image)
    np.testing.assert_array_equal(found[0], image)
    assert len({view.tobytes() for view in found}) == 8
    assert all(sorted(view.reshape(16, 3).tolist()) == image.reshape(16, 3).tolist()
               for view in found)  # fmt: skip
    # Closed: a view's views are the same eight.
    assert {v.tobytes() for v in views(found[5])} == {v.tobytes() for v in found}


def test_golden_data_is_read_with_the_tolerance_of_the_ledger(toy: Toy, tmp_path: Path) -> None:
    copy = add_golden(toy.copy(tmp_path / "toy"))
    golden = read_golden(copy.folder, read_manifest(copy.folder))
    assert golden is not None
    assert (len(golden.images), golden.logits.shape, golden.tolerance) == (8, (8, 16), TIE)
    assert read_golden(toy.folder, read_manifest(toy.folder)) is None


@pytest.mark.parametrize(
    ("entry", "tolerance"),
    [
        ({"int8": {"logits_limit": 2.0, "own_max_steps": 0.5, "logits_step": 0.1}}, 0.4),
        ({"int8": {"logits_limit": 2.0, "own_max_steps": 3.0, "logits_step": 0.1}}, 1.2),
        # Another patch may be kept, and its logits are others.
        ({"int8": None, "tolerance": 0.1, "tokens_kept": [1.0]}, None),
        ({"int8": {}}, None),
        ({"int8": None}, None),
    ],
)
def test_the_tolerance_is_twice_that_of_other_images_in_int8(
    toy: Toy, tmp_path: Path, entry: dict[str, object], tolerance: float | None
) -> None:
    copy = add_golden(toy.copy(tmp_path / "toy"))
    write_manifest(copy, ledger=[{"stage": "traced"}, {"stage": "artifact", **entry}])
    golden = read_golden(copy.folder, read_manifest(copy.folder))
    assert golden is not None
    assert golden.tolerance == (None if tolerance is None else pytest.approx(tolerance))


def test_a_bundle_of_an_older_gfcompile_has_one_golden_inference(toy: Toy, tmp_path: Path) -> None:
    copy = add_golden(toy.copy(tmp_path / "toy"))
    folder = copy.folder / "golden"
    rows = (folder / "views.f32").read_bytes()
    (folder / "views.f32").unlink()
    (folder / "logits.f32").write_bytes(rows[: 16 * 4])
    golden = read_golden(copy.folder, read_manifest(copy.folder))
    assert golden is not None
    assert (len(golden.images), golden.logits.shape) == (1, (1, 16))


def test_golden_data_that_does_not_fit_the_manifest_is_refused(toy: Toy, tmp_path: Path) -> None:
    copy = add_golden(toy.copy(tmp_path / "toy"))
    for name, size in (("image.u8", 7), ("views.f32", 5), ("views.f32", 0), ("views.f32", 9 * 64)):
        path = copy.folder / "golden" / name
        whole = path.read_bytes()
        path.write_bytes(bytes(size))
        with pytest.raises(BundleError, match="compile the bundle again"):
            read_golden(copy.folder, read_manifest(copy.folder))
        path.write_bytes(whole)
