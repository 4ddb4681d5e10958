"""The C example of the README: built against a bundle as a user would, and run."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from toy_bundle import Toy, toy_cpu

from gfcompile.runtime import load
from gfcompile.runtime.images import Transform, normalize
from gfcompile.targets.tvm.link import zig_cc
from tools import need, qemu_aarch64

SOURCE = Path(__file__).parents[2] / "examples" / "c" / "classify.c"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    path = tmp_path / "image.ppm"
    path.write_bytes(b"P6\n8 8\n255\n" + pixels.tobytes())
    return path


def expected_line(toy: Toy, image: Path) -> str:
    pixels = np.frombuffer(image.read_bytes()[-192:], np.uint8).reshape(8, 8, 3)
    device = "local" if toy.plan.arch == "x86_64" else "qemu"
    with load(toy.folder, device=device) as session:  # type: ignore[arg-type]
        assert session.manifest.transform is not None
        transform = Transform.from_dict(dict(session.manifest.transform))
        logits = session.run(normalize(pixels, transform))[0]
    return f"class {logits.argmax()}, logit {logits.max():.6f}\n"


def test_the_example_has_thirty_lines_of_code() -> None:
    body = SOURCE.read_text().split("int main")[1]
    assert len([line for line in body.splitlines() if line.strip()]) <= 31


def test_the_example_runs_here(toy: Toy, image: Path, tmp_path: Path) -> None:
    program = tmp_path / "classify"
    subprocess.run(
        [
            *(need("cc"), "-Wall", "-Wextra", "-Werror", f"-I{toy.folder}", str(SOURCE)),
            *(str(toy.library), f"-Wl,-rpath,{toy.folder}", "-o", str(program)),
        ],
        check=True,
    )
    result = subprocess.run([program, toy.folder, image], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == expected_line(toy, image)
    wrong = subprocess.run([program, tmp_path, image], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "is this a bundle?" in wrong.stderr


def test_the_example_runs_as_arm64_under_qemu(arm_toy: Toy, image: Path, tmp_path: Path) -> None:
    qemu = qemu_aarch64("cortex-a57")
    program = tmp_path / "classify"
    zig_cc(
        toy_cpu("aarch64"),
        *(f"-I{arm_toy.folder}", str(SOURCE), str(arm_toy.library)),
        *(f"-Wl,-rpath,{arm_toy.folder}", "-o", str(program)),
    )
    result = subprocess.run([*qemu, program, arm_toy.folder, image], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == expected_line(arm_toy, image)
