"""Several images in one inference: each gets what it gets alone, on every kind of target."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pruning_cases
import pytest
import safetensors.torch
from PIL import Image
from small_models import PYRAMID, SPEC, build

import gfcompile.runtime
from gfcompile.compile import models
from gfcompile.compile.bundle import Bundle
from gfcompile.compile.cli import main
from gfcompile.compile.device_commands import print_result
from gfcompile.compile.emission import Pruning
from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.compile.models.spec import ModelSpec
from gfcompile.compile.models.weights import draw_weights
from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.compile.quantization import QuantizeConfig, quantize_model
from gfcompile.quantize import TrainConfig
from gfcompile.runtime.device import gfrt
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import in_batches, stand_in_photos
from gfcompile.runtime.report import render_report
from gfcompile.runtime.validate import ValidateConfig, validate
from gfcompile.targets.coreml.options import CoremlOptions
from tools import need, need_arm64_sysroot

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTOS = stand_in_photos()


def compiled(
    folder: Path, target: str, precision: str, spec: ModelSpec = SPEC, batch: int = 1
) -> Bundle:
    is_gfnet = isinstance(spec, GFNetSpec)
    config = CompileConfig(
        model=spec.name,
        target=target,
        precision=precision,  # type: ignore[arg-type]
        image_size=spec.image_size,
        batch=batch,
        output=folder / f"{spec.name}-{target}-{precision}-{batch}",
        coreml=CoremlOptions(input="tensor" if target == "coreml" else "image"),
        cache=False,
    )
    kept = spec.dropping
    return compile_model(
        config,
        module=build(spec) if is_gfnet else pruning_cases.build(spec).eval(),
        pruning=Pruning(kept=kept, chosen_anew=spec.chooses_anew) if kept else None,
    )


def logits(bundle: Bundle) -> np.ndarray:
    """Of each photo."""
    with gfcompile.runtime.load(bundle.path) as session:
        return session.run(session.encode(*PHOTOS))[: len(PHOTOS)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle for this machine that takes two images."""
    return compiled(tmp_path_factory.mktemp("pair"), "host", "int8", batch=2)


@pytest.mark.parametrize(
    ("target", "spec", "rtol"),
    [
        ("host", SPEC, 0.0),
        ("host", pruning_cases.DEIT, 0.0),
        ("tflite", SPEC, 0.0),
        # TFLite's logits have a scale, from what ONNX Runtime makes of the graph at this batch: its
        # last bit may be another.
        ("tflite", pruning_cases.DEIT, 1e-6),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_image_of_a_batch_gets_the_very_logits_that_it_gets_alone(
    tmp_path: Path, target: str, spec: ModelSpec, rtol: float
) -> None:
    alone = compiled(tmp_path, target, "int8", spec)
    together = compiled(tmp_path, target, "int8", spec, batch=2)
    np.testing.assert_allclose(logits(together), logits(alone), rtol=rtol, atol=0)
    assert together.manifest.batch == 2
    assert together.manifest.outputs[0].shape == (2, spec.num_classes)
    (entry,) = (e for e in together.manifest.ledger if e["stage"] == "artifact")
    assert entry["images"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("spec", [SPEC, pruning_cases.DEIT], ids=lambda spec: spec.name)
def test_a_quantized_checkpoint_compiles_for_any_batch(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models._SPECS, spec.name, spec)
    safetensors.torch.save_file(dict(draw_weights(spec, 0)), tmp_path / "float.safetensors")
    noise = np.random.default_rng(0)
    for label in range(spec.num_classes):
        (tmp_path / "data" / f"{label}").mkdir(parents=True)
        pixels = noise.integers(0, 256, (spec.image_size, spec.image_size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{label}" / "0.png")
    quantized = quantize_model(
        QuantizeConfig(
            model=spec.name,
            checkpoint=tmp_path / "float.safetensors",
            train_data=tmp_path / "data",
            output=tmp_path / "quantized.safetensors",
            device="cpu",
            training=TrainConfig(epochs=0, batch_size=4),
        )
    )
    alone, together = (
        compile_model(
            CompileConfig(
                model=spec.name,
                target="host",
                precision="int8",
                checkpoint=quantized.path,
                batch=batch,
                output=tmp_path / f"of-{batch}",
                cache=False,
            )
        )
        for batch in (1, 3)
    )
    np.testing.assert_array_equal(logits(together), logits(alone))


@pytest.mark.parametrize(
    ("target", "spec"),
    [
        ("host", pruning_cases.SWIN),
        ("tflite", pruning_cases.DEIT),
        ("coreml", SPEC),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_in_float32_it_gets_them_to_rounding(tmp_path: Path, target: str, spec: ModelSpec) -> None:
    alone = logits(compiled(tmp_path, target, "float32", spec))
    # Batches of 3: the photos fill one and begin another.
    together = logits(compiled(tmp_path, target, "float32", spec, batch=3))
    # Sums of at most 192 terms in a dozen layers.
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


@pytest.mark.slow
@pytest.mark.parametrize("spec", [PYRAMID, pruning_cases.DEIT], ids=lambda spec: spec.name)
@pytest.mark.parametrize("target", ["raspberry-pi-4", "jetson-orin", "coreml"])
def test_targets_that_are_not_here_are_verified_on_a_batch(
    tmp_path: Path, target: str, spec: ModelSpec
) -> None:
    if target == "raspberry-pi-4":
        need("qemu-aarch64")
        need_arm64_sysroot()
    bundle = compiled(tmp_path, target, "int8", spec, batch=2)
    (entry,) = (e for e in bundle.manifest.ledger if e["stage"] == "artifact")
    assert entry["images"] in (2, 4)
    assert entry["int8"]["equal"] >= (0.9 if target == "coreml" else 0.99)


def test_photos_are_run_in_batches_and_each_gets_its_classes(
    pair: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = [str(photo) for photo in PHOTOS[:3]]
    assert main(["run", str(pair.path), *photos, "--top", "2", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["image"] for result in results] == photos
    expected = np.argsort(-logits(pair)[:3], axis=1)[:, :2]
    assert [[top["index"] for top in result["top"]] for result in results] == expected.tolist()
    assert all(
        result["median_ms_per_image"] == pytest.approx(result["median_ms"] / 2)
        for result in results
    )
    assert main(["run", str(pair.path), photos[0], "--top", "1"]) == 0
    assert " ms per image, " in capsys.readouterr().out


def test_gfbench_says_what_an_inference_takes_and_what_an_image(pair: Bundle) -> None:
    command = [str(pair.path / "gfbench"), str(pair.path), "--runs", "3", "--warmup", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "(2 images per inference)" in said
    printed = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(printed.stdout)["batch"] == 2


def test_other_shapes_are_refused_in_one_line(pair: Bundle) -> None:
    with (
        gfcompile.runtime.load(pair.path) as session,
        pytest.raises(UserError, match=r"\(2, 3, 64, 64\), or several .*got \(3, 3, 64, 64\)"),
    ):
        session.run(np.zeros((3, 3, 64, 64), np.float32))
    with gfrt.Model(str(pair.path)) as model, model.context() as context:
        one = np.zeros((1, 3, 64, 64), np.float32)
        with pytest.raises(gfrt.GfrtError, match=r"\(2, 3, 64, 64\), got float32 \(1, 3, 64, 64\)"):
            context.run(one)
        with pytest.raises(gfrt.GfrtError, match=r"98304 bytes"):
            context.run(one.tobytes())
        pixels = np.arange(2 * 64 * 64 * 3, dtype=np.uint32).astype(np.uint8)
        (values,) = context.run(model.normalize_u8(pixels))
        rows = gfrt.per_image(values)
        assert [row.tolist() for row in rows] == values.tolist()
        plain = gfrt.per_image(memoryview(values.tobytes()).cast("f", values.shape))
        assert [list(row) for row in plain] == values.tolist()


def test_validation_holds_every_place_of_the_batch_and_says_what_an_image_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = compiled(tmp_path, "host", "float32", batch=3)
    result = validate(ValidateConfig(bundle=bundle.path, runs=3, warmup=0))
    assert result.verdict.passed
    assert result.bundle.batch == 3
    assert result.numbers is not None
    # The golden image has 8 views: three batches, of which the last is filled up by one of them.
    assert result.numbers.inferences == 9
    print_result(result)
    assert "3 images per inference" in capsys.readouterr().out
    page = render_report(bundle.manifest, result)
    for text in ("3 images per inference", "3 images at a time", "one inference of 3 images"):
        assert text in page


def test_a_model_file_is_validated_on_whole_batches(tmp_path: Path) -> None:
    bundle = compiled(tmp_path, "tflite", "float32", batch=3)
    result = validate(ValidateConfig(bundle=bundle.path, runs=3, warmup=0))
    assert result.verdict.passed
    assert result.numbers is not None
    assert (result.bundle.batch, result.numbers.inferences) == (3, 9)


@pytest.mark.parametrize("batch", ["0", "-1", "65", "1000000000"])
def test_what_is_no_batch_is_refused(batch: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "gfnet_xs", "--target", "host", "--batch", batch]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"gfcompile: error: --batch {batch}: a model takes 1 to 64 images at once"


def test_core_ml_takes_images_one_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "gfnet_xs", "--target", "coreml", "--batch", "2"]
    assert main([*arguments, "--input", "uint8-image"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--input tensor" in line


def test_batches_are_filled_up_from_the_first_images() -> None:
    images = [np.full((1, 2), i) for i in range(3)]
    first, second = in_batches(images, 2)
    assert (first[:, 0].tolist(), second[:, 0].tolist()) == ([0, 1], [2, 0])
    (only,) = in_batches(images, 5)
    assert only[:, 0].tolist() == [0, 1, 2, 0, 1]
