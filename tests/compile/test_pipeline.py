"""From a module to a bundle that runs and agrees with its graph, on every kind of target."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from small_models import PYRAMID, SPEC, build
from torch import nn

import gfcompile.runtime
from gfcompile.compile.bundle import Bundle
from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import Transform, normalize, preprocess, stand_in_photos
from gfcompile.targets.coreml.options import CoremlOptions
from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.standin.build import build_standin
from tools import need, need_arm64_sysroot


def compiled(
    folder: Path, target: str, precision: str, spec: GFNetSpec = SPEC, **more: object
) -> Bundle:
    config = CompileConfig(
        model=spec.name,
        target=target,
        precision=precision,  # type: ignore[arg-type]
        image_size=spec.image_size,
        output=folder / f"{spec.name}-{target}-{precision}",
        cache=False,
        **more,  # type: ignore[arg-type]
    )
    return compile_model(config, module=build(spec))


def artifact_entry(bundle: Bundle) -> dict[str, object]:
    return next(dict(entry) for entry in bundle.manifest.ledger if entry["stage"] == "artifact")


@pytest.mark.parametrize("spec", [SPEC, PYRAMID], ids=lambda spec: spec.name)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_host_bundle_agrees_with_torch_on_a_photo(
    tmp_path: Path, spec: GFNetSpec, precision: str
) -> None:
    bundle = compiled(tmp_path, "host", precision, spec)
    photo = stand_in_photos()[0]
    with gfcompile.runtime.load(bundle.path) as session:
        image = preprocess(photo, Transform.from_dict(dict(bundle.manifest.transform or {})))
        logits = session.run(image)
        top = session.classify(photo, top=3)
    with torch.no_grad():
        expected = build(spec)(torch.from_numpy(image)).numpy()
    assert logits.shape == expected.shape
    # 2 blocks of sums of at most 192 terms: 1e-4 of the largest logit is generous for float32;
    # int8 leaves at least 25 dB of a calibrated model.
    scale = np.abs(expected).max()
    assert np.abs(logits - expected).max() <= (1e-4 if precision == "float32" else 0.1) * scale
    assert [index for index, _, _ in top] == np.argsort(-logits[0])[:3].tolist()
    entry = artifact_entry(bundle)
    assert "native" in str(entry["how"])


@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3"])
def test_older_x86_levels_run_here_too(tmp_path: Path, target: str) -> None:
    for precision in ("float32", "int8"):
        assert artifact_entry(compiled(tmp_path, target, precision))["top1_agreement"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["raspberry-pi-3", "raspberry-pi-4", "raspberry-pi-5"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_arm_library_is_verified_under_qemu(
    tmp_path: Path, target: str, precision: str
) -> None:
    need("qemu-aarch64")
    need_arm64_sysroot()
    entry = artifact_entry(compiled(tmp_path, target, precision))
    assert "qemu" in str(entry["how"])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["jetson-nano", "jetson-tx2", "jetson-xavier", "jetson-orin"])
def test_jetson_kernels_are_verified_behind_the_stand_in_driver(
    tmp_path: Path, target: str
) -> None:
    bundle = compiled(tmp_path, target, "int8")
    assert "stand-in" in str(artifact_entry(bundle)["how"])
    assert bundle.manifest.precision.requested == "int8"
    has_dp4a = target in ("jetson-xavier", "jetson-orin")
    assert ("dp4a" in bundle.manifest.precision.compute) == has_dp4a
    assert all(kernel["spill_bytes"] == 0 for kernel in bundle.manifest.kernels)
    for name in ("kernels.ptx", "kernels.cubin"):
        assert bundle.manifest.files[name].size_bytes > 0


@pytest.mark.slow
def test_the_jetson_bundle_itself_runs_as_arm64_behind_the_stand_in_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("qemu-aarch64")
    need_arm64_sysroot()
    sources: list[tuple[str, Gpu]] = []

    def remember(source: str, gpu: Gpu, arch: str, folder: Path) -> Path:
        sources.append((source, gpu))
        return build_standin(source, gpu, arch, folder)  # type: ignore[arg-type]

    monkeypatch.setattr("gfcompile.targets.tvm.standin.twin.build_standin", remember)
    bundle = compiled(tmp_path, "jetson-tx2", "int8", dump=tmp_path / "dump")
    ((source, gpu),) = sources
    driver = build_standin(source, gpu, "aarch64", tmp_path / "driver")
    pixels = np.fromfile(bundle.path / "golden" / "image.u8", np.uint8).reshape(64, 64, 3)
    transform = Transform.from_dict(dict(bundle.manifest.transform or {}))
    image = normalize(pixels, transform)
    env = {"LD_LIBRARY_PATH": str(driver)}
    with gfcompile.runtime.load(bundle.path, device="qemu", env=env) as session:
        logits = session.run(image)
        assert "cuda" in session.device_name
    graph = ort.InferenceSession(max((tmp_path / "dump").glob("*.onnx")))
    (expected,) = graph.run(None, {"image": image})
    steps = np.abs(logits - expected) / head_scale(bundle)
    assert steps.max() <= 2
    assert steps.mean() <= 0.5


def head_scale(bundle: Bundle) -> float:
    """The scale of the head's int8 input."""
    (entry,) = (e for e in bundle.manifest.ledger if e["stage"] == "artifact")
    return float(entry["int8"]["logits_step"])


@pytest.mark.slow
def test_gfnet_xs_for_tx2_keeps_its_sizes(tmp_path: Path) -> None:
    config = CompileConfig(
        model="gfnet_xs", target="jetson-tx2", precision="int8", output=tmp_path / "out"
    )
    bundle = compile_model(config)
    assert bundle.size_bytes <= 18_000_000
    assert bundle.manifest.files["libgfnet_xs.so"].size_bytes <= 600_000


def test_every_dumped_stage_is_valid_and_runs_in_onnx_runtime(tmp_path: Path) -> None:
    compiled(tmp_path, "host", "int8", dump=tmp_path / "dump")
    stages = sorted((tmp_path / "dump").glob("*.onnx"))
    assert len(stages) >= 4
    image = np.zeros((1, 3, 64, 64), np.float32)
    for stage in stages:
        onnx.checker.check_model(onnx.load(stage))
        session = ort.InferenceSession(stage, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"image": image})
        assert np.isfinite(logits).all()


class HandWritten(nn.Module):
    """A filter in channels-first layout, and an operator that has no kernel class."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.gain = nn.Parameter(torch.randn(8, 6, 4, 2, generator=generator))
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)  # (B, 8, 6, 6)
        spectrum = torch.fft.rfft2(x, dim=(2, 3)) * torch.view_as_complex(self.gain)
        x = x + torch.fft.irfft2(spectrum, s=(6, 6), dim=(2, 3))
        x = torch.softmax(x, dim=1)
        return self.head(x.flatten(2).transpose(1, 2).mean(1))


def test_a_module_of_the_users_own_compiles(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = HandWritten().eval()
    config = CompileConfig(
        model="hand_written", target="host", image_size=48, output=tmp_path / "out", cache=False
    )
    bundle = compile_model(config, module=module)
    assert len(bundle.manifest.filters) == 1
    image = np.random.default_rng(0).standard_normal((1, 3, 48, 48)).astype(np.float32)
    with gfcompile.runtime.load(bundle.path) as session:
        logits = session.run(image)
    with torch.no_grad():
        expected = module(torch.from_numpy(image)).numpy()
    # Longest sum: 192 products of the stem; softmax and mean shrink errors.
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_what_cannot_be_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin1.txt").write_bytes("Zürich\n".encode("latin-1"))
    base = {"model": "gfnet_xs", "target": "host", "output": tmp_path / "out"}
    for change, words in (
        ({"model": "gfnet_sx"}, "gfnet_xs"),
        ({"target": "jetson-tx3"}, "jetson-tx2"),
        ({"image_size": 225}, "224"),
        ({"fft": "native"}, "unknown fft 'native'; choose from auto, dft, circular"),
        ({"precision": "int4"}, "unknown precision 'int4'; choose from float32, float16, int8"),
        ({"coreml": CoremlOptions(ios=14)}, "unknown ios 14; choose from 15"),  # type: ignore[arg-type]
        ({"checkpoint": tmp_path / "none.pth"}, "no such checkpoint"),
        ({"precision": "int8", "calibration_data": tmp_path / "empty"}, "no calibration images"),
        ({"calibration_data": tmp_path}, "--int8"),
        ({"labels": tmp_path / "none.txt"}, "labels"),
        ({"labels": tmp_path / "latin1.txt"}, "latin1.txt: byte 1 is not of UTF-8"),
    ):
        with pytest.raises(UserError, match=words):
            compile_model(CompileConfig(**{**base, **change}))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_labels_for_another_head_are_refused_before_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gfcompile.compile.graph.build_graph", pytest.fail)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    config = CompileConfig(
        model="gfnet_ti",
        target="host",
        output=tmp_path / "out",
        cache=False,
        labels=tmp_path / "labels.txt",
    )
    with pytest.raises(UserError, match="2 labels for 1000 classes"):
        compile_model(config)
