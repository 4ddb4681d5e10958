"""One library for several levels of x86: the best that a CPU has is taken, nothing beyond it."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_kernel import emulator, host_cpu
from small_models import SPEC, build

import gfcompile
from gfcompile.compile.bundle import Bundle
from gfcompile.compile.pipeline import CompileConfig
from gfcompile.runtime.bench import BENCH_NAME
from gfcompile.targets.target import Target, find_target
from gfcompile.targets.tvm.link import cpu_features
from gfcompile.targets.tvm.plan import parse, serialize
from gfcompile.targets.x86 import AVX2, AVX512_AMX, AVX512_VNNI, SSE
from tools import need

LEVELS = (SSE, AVX2, AVX512_VNNI, AVX512_AMX)


@pytest.fixture(scope="module", params=["float32", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    config = CompileConfig(
        model=SPEC.name,
        target="x86-64",
        precision=request.param,
        image_size=SPEC.image_size,
        output=tmp_path_factory.mktemp("levels") / request.param,
        cache=False,
    )
    return gfcompile.compile_model(config, module=build(SPEC))


def plans(folder: Path) -> list[Path]:
    return [folder / "plan.bin", *sorted(folder.glob("plan-*.bin"))]


def run(
    folder: Path, *options: str, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [*prefix, str(folder / BENCH_NAME), str(folder), "--runs", "0", "--json", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def level_of(result: subprocess.CompletedProcess[str]) -> int:
    assert result.returncode == 0, result.stderr
    return int(json.loads(result.stdout)["level"])


def logits(
    folder: Path, out: Path, *options: str, prefix: tuple[str, ...] = ()
) -> tuple[int, object]:
    image = str(folder / "golden" / "image.u8")
    result = run(folder, "--image-u8", image, "--output", str(out), *options, prefix=prefix)
    return level_of(result), np.fromfile(out, np.float32)


def test_each_level_has_a_plan_and_says_what_it_needs(bundle: Bundle) -> None:
    # AMX multiplies integers alone: in float its level would be the one below it.
    levels = LEVELS if bundle.manifest.precision.requested == "int8" else LEVELS[:-1]
    needs = [parse(path.read_bytes()).cpu_features for path in plans(bundle.path)]
    assert needs == [cpu_features(level) for level in levels]
    assert bundle.manifest.cpu_features == needs[0]
    for path in plans(bundle.path):
        assert path.name in bundle.manifest.files


def test_the_levels_share_their_weights(bundle: Bundle) -> None:
    """Matrices and filters are packed alike; only the biases of integer products differ."""
    stored = (bundle.path / "weights.bin").stat().st_size
    for path in plans(bundle.path):
        tensors = parse(path.read_bytes()).tensors
        used = {t.offset: t.size_bytes for t in tensors if t.space == "weights"}
        assert sum(used.values()) > 0.9 * stored, path.name


@pytest.mark.parametrize(("cpu", "level"), [("Nehalem", 0), ("Haswell", 1)])
def test_a_smaller_cpu_takes_its_own_kernels(
    bundle: Bundle, tmp_path: Path, cpu: str, level: int
) -> None:
    """Emulated without what it lacks: any other instruction would be illegal."""
    qemu = (need("qemu-x86_64"), "-cpu", cpu)
    taken, values = logits(bundle.path, tmp_path / "out", prefix=qemu)
    assert taken == level
    assert_close(bundle, values)


def test_this_cpu_takes_its_best_level(bundle: Bundle, tmp_path: Path) -> None:
    """And computes the same with each level below it."""
    here = host_cpu()
    assert here.arch == "x86_64"
    best = level_of(run(bundle.path))
    flags = set(Path("/proc/cpuinfo").read_text().split())
    runs_here = [set(parse(p.read_bytes()).cpu_features) <= flags for p in plans(bundle.path)]
    if not here.amx:  # with it, the kernel may still keep the tiles to itself
        assert best == max(i for i, runs in enumerate(runs_here) if runs)
    for level in range(best + 1):
        taken, values = logits(bundle.path, tmp_path / "out", "--level", str(level))
        assert taken == level
        assert_close(bundle, values)


@pytest.mark.parametrize("bundle", ["int8"], indirect=True)
def test_amx_computes_the_same_in_software(bundle: Bundle, tmp_path: Path) -> None:
    """Where the CPU lacks it: its plan then asks for no more than the level below needs."""
    if host_cpu().amx:
        pytest.skip("this CPU has taken that level itself")
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    *_, below, amx = plans(folder)
    needs = parse(below.read_bytes()).cpu_features
    amx.write_bytes(serialize(replace(parse(amx.read_bytes()), cpu_features=needs)))
    prefix = tuple(emulator(AVX512_AMX))
    for threads in ("1", "2"):
        taken, values = logits(folder, tmp_path / "out", "--threads", threads, prefix=prefix)
        assert taken == LEVELS.index(AVX512_AMX)
        assert_close(bundle, values)


def test_kernels_that_this_cpu_cannot_run_are_told_of(bundle: Bundle) -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    needed = {f for p in plans(bundle.path) for f in parse(p.read_bytes()).cpu_features}
    told = [note for note in bundle.manifest.notes if "were not verified" in note]
    assert len(told) == bool(needed - flags)
    assert all(feature in told[0] for feature in needed - flags)


def assert_close(bundle: Bundle, values: object) -> None:
    """Sums in other orders; in int8 a rounding may fall to the other side, 25 dB at worst."""
    golden = np.fromfile(bundle.path / "golden" / "logits.f32", np.float32)
    allowed = 1e-4 if bundle.manifest.precision.requested == "float32" else 0.05
    assert np.abs(np.asarray(values) - golden).max() <= allowed * np.abs(golden).max()


def test_a_plan_of_another_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(bundle.path, folder)
    plan = parse((folder / "plan-1.bin").read_bytes())
    other = replace(plan, library_id="0" * 32)
    (folder / "plan-1.bin").write_bytes(serialize(other))
    result = run(folder)
    assert result.returncode == 1
    assert "plan.bin and plan-1.bin do not belong together" in result.stderr
    (folder / "plan-1.bin").write_bytes(b"no plan")
    assert "plan-1.bin is damaged" in run(folder).stderr


def test_the_host_without_amx_is_one_of_its_levels() -> None:
    host = find_target("host")
    assert isinstance(host, Target)
    assert not host.cpu.amx
    assert bool(host.levels) == host_cpu().amx
