"""Bundles for Android: the plan of an ARM board, in a library that Android loads."""

import dataclasses
import subprocess
from pathlib import Path

import numpy as np
import pytest
from android_host import build_android_host
from small_models import SPEC, build

from gfcompile.compile import cli
from gfcompile.compile.bundle import Bundle
from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.runtime.images import stand_in_photos
from gfcompile.targets.tvm.bionic import loader_complaint
from gfcompile.targets.tvm.plan import parse
from tools import need_arm64_sysroot, qemu_aarch64


def compiled(folder: Path, target: str) -> Bundle:
    need_arm64_sysroot()  # without it an arm64 bundle is not verified
    config = CompileConfig(
        model=SPEC.name,
        target=target,
        precision="int8",
        image_size=SPEC.image_size,
        output=folder / target,
        cache=False,
    )
    return compile_model(config, module=build(SPEC))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled(tmp_path_factory.mktemp("android"), "android-arm64")


@pytest.mark.slow
def test_plans_and_weights_are_those_of_any_arm_linux(bundle: Bundle, tmp_path: Path) -> None:
    board = compiled(tmp_path, "arm64")
    for name in ("plan.bin", "plan-1.bin", "plan-2.bin"):
        ours, theirs = (parse((b.path / name).read_bytes()) for b in (bundle, board))
        assert ours == dataclasses.replace(theirs, library_id=ours.library_id)
    assert (bundle.path / "weights.bin").read_bytes() == (board.path / "weights.bin").read_bytes()
    assert set(bundle.manifest.files) == set(board.manifest.files)


@pytest.mark.slow
def test_the_library_computes_what_the_runner_was_verified_with(
    bundle: Bundle, tmp_path: Path
) -> None:
    """The library itself, loaded from the bundle, with glibc behind bionic's names."""
    assert loader_complaint((bundle.path / bundle.manifest.library).read_bytes()) == ""
    arguments = ["--image-u8", str(bundle.path / "golden" / "image.u8"), "--output"]
    (tmp_path / "host").mkdir()
    host = build_android_host(tmp_path / "host")
    logits = []
    for program in (host, bundle.path / "gfbench"):
        result = tmp_path / "out"
        command = [*qemu_aarch64("cortex-a53"), program, bundle.path, *arguments, result]
        subprocess.run(command, check=True, capture_output=True)
        logits.append(np.fromfile(result, np.float32))
    np.testing.assert_array_equal(*logits)
    golden = np.fromfile(bundle.path / "golden" / "logits.f32", np.float32)
    # What the ledger found is the bound: the golden image is the first that it was taken over.
    (entry,) = (e for e in bundle.manifest.ledger if e["stage"] == "artifact")
    assert entry["how"] == "aarch64 runner under qemu -cpu cortex-a53, and cortex-a76, and max"
    assert np.abs(logits[0] - golden).max() <= entry["max_abs_error"] * (1 + 1e-6)


@pytest.mark.slow
def test_a_photo_is_classified_under_qemu(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = stand_in_photos()[0]
    assert cli.main(["run", str(bundle.path), str(photo), "--device", "qemu", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("under qemu: what the device computes, not how fast")
    assert len(lines) == 4


@pytest.mark.slow
def test_cores_with_sdot_use_it(tmp_path: Path) -> None:
    made = compiled(tmp_path, "android-arm64-dotprod")
    assert "sdot" in made.manifest.precision.compute
    assert "asimddp" in made.manifest.cpu_features
    (entry,) = (e for e in made.manifest.ledger if e["stage"] == "artifact")
    assert entry["int8"]["max_steps"] <= 1
