"""One library for several levels of ARM: the best that a CPU has is taken, nothing beyond it."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from small_models import SPEC, build

from gfcompile.compile.bundle import Bundle
from gfcompile.compile.pipeline import CompileConfig, RequestedPrecision, compile_model
from gfcompile.runtime.bench import BENCH_NAME
from gfcompile.targets.arm64 import ARM64
from gfcompile.targets.tvm.kernel import Array
from gfcompile.targets.tvm.link import cpu_features
from gfcompile.targets.tvm.plan import parse
from tools import need_arm64_sysroot, qemu_aarch64

LEVELS = (ARM64.cpu, *ARM64.levels)


def compiled(folder: Path, precision: RequestedPrecision) -> Bundle:
    need_arm64_sysroot()  # without it an arm64 bundle is not verified
    config = CompileConfig(
        model=SPEC.name,
        target="android-arm64",
        precision=precision,
        image_size=SPEC.image_size,
        output=folder / precision,
        cache=False,
    )
    return compile_model(config, module=build(SPEC))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled(tmp_path_factory.mktemp("levels"), "int8")


def logits(folder: Path, cpu: str, out: Path, *options: str) -> tuple[int, Array]:
    """The level that was taken on a CPU, which refuses what it does not know, and its logits."""
    command = [*qemu_aarch64(cpu), str(folder / BENCH_NAME), str(folder), "--runs", "0", "--json"]
    command += ["--image-u8", str(folder / "golden" / "image.u8"), "--output", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["level"]), np.fromfile(out, np.float32)


@pytest.mark.slow
def test_each_level_has_a_plan_and_says_what_it_needs(bundle: Bundle) -> None:
    plans = ["plan.bin", "plan-1.bin", "plan-2.bin"]
    needs = [parse((bundle.path / name).read_bytes()).cpu_features for name in plans]
    assert needs == [cpu_features(level) for level in LEVELS]
    assert needs[0] == ("asimd",), "what every 64-bit ARM has"
    assert "asimddp" in needs[1]
    assert set(needs[2]) == {*needs[1], "i8mm"}
    for name in plans:
        assert name in bundle.manifest.files


@pytest.mark.slow
def test_the_levels_share_their_weights(bundle: Bundle) -> None:
    stored = (bundle.path / "weights.bin").stat().st_size
    for path in bundle.path.glob("plan*.bin"):
        tensors = parse(path.read_bytes()).tensors
        used = {t.offset: t.size_bytes for t in tensors if t.space == "weights"}
        assert sum(used.values()) > 0.95 * stored, path.name


@pytest.mark.slow
def test_each_cpu_takes_the_best_that_it_has_and_computes_the_same(
    bundle: Bundle, tmp_path: Path
) -> None:
    """Sums of integers are exact, and all else is the same code but for its order."""
    out = tmp_path / "out"
    taken = {cpu: logits(bundle.path, cpu, out) for cpu in ("cortex-a53", "cortex-a76", "max")}
    assert {cpu: level for cpu, (level, _) in taken.items()} == {
        "cortex-a53": 0,
        "cortex-a76": 1,
        "max": 2,
    }
    _, expected = taken["cortex-a53"]
    for cpu, (_, values) in taken.items():
        np.testing.assert_array_equal(values, expected, cpu)
    level, values = logits(bundle.path, "max", out, "--level", "1")
    assert level == 1
    np.testing.assert_array_equal(values, expected)


@pytest.mark.slow
def test_in_float_there_is_nothing_to_choose(tmp_path: Path) -> None:
    made = compiled(tmp_path, "float32")
    assert [path.name for path in made.path.glob("plan*.bin")] == ["plan.bin"]
