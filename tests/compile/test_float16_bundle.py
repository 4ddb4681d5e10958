"""Bundles in float16: what computes them on which CPU, how exactly, and where there are none."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from small_models import SPEC, build

from gfcompile.compile.bundle import Bundle
from gfcompile.compile.pipeline import CompileConfig, RequestedPrecision, compile_model
from gfcompile.runtime.bench import BENCH_NAME
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.exactness import sqnr_db
from gfcompile.targets.tvm.kernel import Array
from gfcompile.targets.tvm.plan import parse
from tools import need_arm64_sysroot, qemu_aarch64


def compiled(folder: Path, target: str, precision: RequestedPrecision = "float16") -> Bundle:
    need_arm64_sysroot()  # without it an arm64 bundle is not verified
    config = CompileConfig(
        model=SPEC.name,
        target=target,
        precision=precision,
        image_size=SPEC.image_size,
        output=folder / f"{target}-{precision}",
        cache=False,
    )
    return compile_model(config, module=build(SPEC))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled(tmp_path_factory.mktemp("float16"), "android-arm64")


def logits(folder: Path, cpu: str, out: Path) -> tuple[int, Array]:
    """The level that was taken on a CPU, and its logits; QEMU refuses what that CPU lacks."""
    command = [*qemu_aarch64(cpu), str(folder / BENCH_NAME), str(folder), "--runs", "0", "--json"]
    command += ["--image-u8", str(folder / "golden" / "image.u8"), "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["level"]), np.fromfile(out, np.float32)


@pytest.mark.slow
def test_a_cpu_takes_float16_arithmetic_if_it_has_it_and_widens_otherwise(
    bundle: Bundle, tmp_path: Path
) -> None:
    """Without such arithmetic all sums are float32, and only what is stored has been rounded."""
    golden = np.fromfile(bundle.path / "golden" / "logits.f32", np.float32)
    for cpu, level, decibels in (
        ("cortex-a53", 0, 60),
        ("cortex-a72", 0, 60),
        ("cortex-a76", 1, 50),
    ):
        taken, values = logits(bundle.path, cpu, tmp_path / "out")
        assert taken == level, cpu
        assert sqnr_db(golden, values) > decibels, cpu
    needs = [parse((bundle.path / n).read_bytes()).cpu_features for n in ("plan.bin", "plan-1.bin")]
    assert needs[0] == ("asimd",)
    assert "asimdhp" in needs[1]
    assert "asimddp" not in needs[1]
    assert not (bundle.path / "plan-2.bin").exists()
    assert bundle.manifest.precision.requested == "float16"
    assert "qemu -cpu cortex-a53, and cortex-a76" in str(bundle.manifest.ledger[-1]["how"])


@pytest.mark.slow
def test_weights_take_half_the_room(bundle: Bundle, tmp_path: Path) -> None:
    for target in ("raspberry-pi-5", "android-arm64-dotprod"):
        made = compiled(tmp_path, target)
        plain = compiled(tmp_path, target, "float32")
        sizes = [(b.path / "weights.bin").stat().st_size for b in (made, plain, bundle)]
        assert max(sizes[0], sizes[2]) < 0.6 * sizes[1]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("raspberry-pi-3", r"\(cortex-a53\) has no float16 arithmetic"),
        ("raspberry-pi-4", r"\(cortex-a72\) has no float16 arithmetic"),
        ("x86-64", "AVX512-FP16"),
        ("jetson-tx2", r"the GPU \(sm_62\)"),
    ],
)
def test_a_target_without_float16_arithmetic_says_so_at_once(
    tmp_path: Path, target: str, reason: str
) -> None:
    config = CompileConfig(
        model="gfnet_xs", target=target, precision="float16", output=tmp_path / "out"
    )
    with pytest.raises(UserError, match=f"--fp16: .*{reason}.* has float32 and --int8"):
        compile_model(config)
