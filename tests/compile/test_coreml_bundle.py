"""From a module to a Core ML bundle: what it holds, what it computes, what is said of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import PYRAMID, SPEC, build

import gfcompile.runtime
from gfcompile.compile.bundle import Bundle
from gfcompile.compile.cli import main
from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.runtime.errors import CompileError, UserError
from gfcompile.runtime.images import Transform, preprocess, stand_in_photos
from gfcompile.targets.coreml.options import CoremlOptions
from gfcompile.targets.coreml.program import read_program


def compiled(
    folder: Path,
    precision: str | None = None,
    spec: GFNetSpec = SPEC,
    labels: Path | None = None,
    target: str = "coreml",
    **options: Any,
) -> Bundle:
    config = CompileConfig(
        model=spec.name,
        target=target,
        precision=precision,  # type: ignore[arg-type]
        image_size=spec.image_size,
        labels=labels,
        output=folder / "bundle",
        coreml=CoremlOptions(**options),
        cache=False,
    )
    return compile_model(config, module=build(spec))


def logits_of(bundle: Bundle, photo: Path) -> np.ndarray:
    with gfcompile.runtime.load(bundle.path) as session:
        assert session.stand_in == "evaluated, not Apple's runtime"
        return session.run(session.encode(photo))


def torch_logits(spec: GFNetSpec, bundle: Bundle, photo: Path) -> np.ndarray:
    image = preprocess(photo, Transform.from_dict(dict(bundle.manifest.transform or {})))
    with torch.no_grad():
        return build(spec)(torch.from_numpy(image)).numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "spec", "options", "share"),
    [
        # Shares of the largest logit: float rounding, then 2**-11 a few times, then int8 steps.
        ("float32", SPEC, {"layout": "plain", "input": "tensor"}, 1e-5),
        (None, SPEC, {}, 5e-3),
        (None, PYRAMID, {"ios": 15}, 5e-3),
        ("int8", SPEC, {}, 0.1),
        ("int8", PYRAMID, {"layout": "plain", "ios": 18}, 0.1),
        ("int8", SPEC, {"ios": 16}, 0.1),
        ("int8", SPEC, {"ios": 15}, 0.1),
    ],
)
def test_bundle_agrees_with_torch(
    precision: str | None, spec: GFNetSpec, options: dict[str, Any], share: float, tmp_path: Path
) -> None:
    bundle = compiled(tmp_path, precision, spec, **options)
    photo = stand_in_photos()[0]
    expected = torch_logits(spec, bundle, photo)
    result = logits_of(bundle, photo)
    np.testing.assert_allclose(result, expected, rtol=0, atol=share * np.abs(expected).max())

    manifest = bundle.manifest
    ios = options.get("ios", 17)
    assert (manifest.kind, manifest.arch) == ("coreml", "any")
    assert manifest.precision.requested == (precision or "float16")
    stages = [entry["stage"] for entry in manifest.ledger]
    added = []
    if precision == "int8":
        added = ["quantized"] if ios >= 17 else ["quantized", "weights only"]
    if precision != "float32":
        added.append("in float32")
    assert stages == ["traced", "lowered", *added, "artifact"]
    by_stage = {entry["stage"]: entry for entry in manifest.ledger}
    if precision == "int8" and ios >= 17:
        # Step for step what the QDQ graph has, but for values that lie on a rounding tie.
        assert by_stage["in float32"]["int8"]["equal"] > 0.999
        assert by_stage["artifact"]["int8"]["max_steps"] <= 1
    statistics = manifest.extra["coreml"]["statistics"]
    assert statistics.keys() == {"ane", "plain"}
    assert all(figures["count"] > 0 for figures in statistics.values())
    assert (precision == "int8" and ios < 17) == any(
        "weights alone" in note for note in manifest.notes
    )


@pytest.mark.slow
def test_pixels_and_tensors_give_the_same_logits(tmp_path: Path) -> None:
    photo = stand_in_photos()[1]
    images = compiled(tmp_path / "one", "float32")
    tensors = compiled(tmp_path / "two", "float32", input="tensor")
    assert images.manifest.inputs[0].pixels
    assert images.manifest.inputs[0].shape == (1, 64, 64, 3)
    assert tensors.manifest.inputs[0].shape == (1, 3, 64, 64)
    one, other = (logits_of(bundle, photo) for bundle in (images, tensors))
    # (x / 255 - mean) / std in float32, or its factors in the weights.
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.slow
def test_run_says_that_the_package_was_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {i}" for i in range(10)))
    bundle = compiled(tmp_path, labels=names)
    assert main(["run", str(bundle.path), str(stand_in_photos()[0]), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "evaluated, not Apple's runtime" in out
    assert out.count("kind ") == 2
    assert " ms" not in out
    description = read_program(bundle.path / bundle.manifest.library).spec.description
    assert "gfnet_small" in description.metadata.shortDescription
    assert "not stated" in description.metadata.license
    with gfcompile.runtime.load(bundle.path) as session:
        trace = session.trace(session.encode(stand_in_photos()[0]))
        assert trace["logits"].shape == (1, 10)


def test_options_of_coreml_are_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ios, --layout and --license are for coreml, not for"):
        compiled(tmp_path, "float32", target="x86-64", ios=18)


@pytest.mark.slow
def test_a_wrong_package_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gfcompile.targets.coreml import evaluate

    monkeypatch.setattr(
        evaluate, "OPERATIONS", {**evaluate.OPERATIONS, "gelu": lambda a: a["x"].relu()}
    )
    with pytest.raises(CompileError, match="float rounding explains"):
        compiled(tmp_path)
    assert not (tmp_path / "bundle").exists()
