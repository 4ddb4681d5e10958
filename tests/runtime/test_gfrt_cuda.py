"""The CUDA side of the runtime against a driver that fails where it is told to.

That generated kernels compute the right thing is tested elsewhere, with the stand-in driver; here
it is what the runtime asks of a driver, what it gives back, and what it says when refused.
"""

import hashlib
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_bundle import Toy, toy_cpu, toy_images, write_manifest

from gfcompile.runtime import load
from gfcompile.runtime.errors import BundleError, DeviceError
from gfcompile.targets.tvm.link import link_bench, link_library
from gfcompile.targets.tvm.plan import Plan, PlanIO, PlanStep, PlanTensor, serialize
from tools import need

WEIGHTS = np.random.default_rng(0).standard_normal(192, np.float32)
NOTHING_LEFT = "contexts 0 depth 0 modules 0 memories 0 streams 0 events 0 unbalanced 0"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fake libcuda.so.1."""
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).parent / "fake_cuda.c"
    subprocess.run(
        [need("cc"), "-O1", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True
    )
    return folder


@pytest.fixture(scope="module")
def gpu_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """y = 2 (x + w), for compute capability 6.2."""
    folder = tmp_path_factory.mktemp("gpu")
    cpu = toy_cpu("x86_64")
    (folder / "weights.bin").write_bytes(WEIGHTS.tobytes())
    (folder / "kernels.cubin").write_bytes(b"cubin;")
    (folder / "kernels.ptx").write_bytes(b"ptx;")
    shape = (1, 3, 8, 8)
    launch: dict[str, Any] = {"grid": (3, 2, 1), "block": (8, 2, 2), "shared_bytes": 128}
    plan = Plan(
        device="cuda",
        arch="x86_64",
        library="libgpu.so",
        library_id="0123456789abcdef",
        compute_capability=(6, 2),
        tensors=(
            PlanTensor(name="x", dtype="float32", shape=shape, offset=0),
            PlanTensor(name="w", dtype="float32", shape=(192,), space="weights", offset=0),
            PlanTensor(name="sum", dtype="float32", shape=shape, offset=768),
            PlanTensor(name="y", dtype="float32", shape=shape, offset=1536),
        ),
        steps=(
            PlanStep(kernel="add", label="first", args=(0, 1, 2), outputs=(2,), **launch),
            PlanStep(kernel="twice", label="second", args=(2, 3), outputs=(3,), **launch),
        ),
        inputs=(PlanIO(name="x", tensor=0),),
        outputs=(PlanIO(name="y", tensor=3),),
        arena_bytes=2304,
        weights_bytes=768,
        weights_sha256=hashlib.sha256(WEIGHTS.tobytes()).hexdigest(),
    )
    (folder / "plan.bin").write_bytes(serialize(plan))
    link_library([], [], cpu, folder / plan.library, library_id=plan.library_id, cuda=True)
    link_bench(cpu, folder / "gfbench")
    toy = Toy(folder=folder, plan=plan)
    io = {"dtype": "float32", "shape": shape}
    write_manifest(toy, inputs=[{"name": "x", **io}], outputs=[{"name": "y", **io}])
    return toy


def run(toy: Toy, driver: Path, log: Path, **settings: object) -> tuple[np.ndarray, str]:
    """The output for an image, and which of the kernels' files were given to the driver."""
    env = {f"FAKE_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
    env |= {"LD_LIBRARY_PATH": str(driver), "FAKE_CUDA_LOG": str(log)}
    with load(toy.folder, device="process", env=env) as session:
        trace = session.trace(toy_images())
        result = session.run(toy_images())
        np.testing.assert_array_equal(trace["y"], result)
        np.testing.assert_array_equal(2 * trace["sum"], result)
    ledger, _, loaded = log.read_text().partition("\n")
    assert ledger == NOTHING_LEFT
    return result, loaded


def test_it_runs_and_gives_everything_back(gpu_toy: Toy, driver: Path, tmp_path: Path) -> None:
    result, loaded = run(gpu_toy, driver, tmp_path / "log")
    np.testing.assert_array_equal(result.ravel(), 2 * (toy_images().ravel() + WEIGHTS))
    assert loaded == "cubin;"


def test_the_profile_comes_from_events(gpu_toy: Toy, driver: Path) -> None:
    env = {"LD_LIBRARY_PATH": str(driver)}
    with load(gpu_toy.folder, device="process", env=env) as session:
        profile = session.profile(runs=3)
        assert session.device_name == "cuda: Fake GPU (6.2)"
    assert [(step.kernel, step.label) for step in profile] == [
        ("add", "first"),
        ("twice", "second"),
    ]
    # The fake's clock advances by 0.25 ms from event to event.
    assert [step.seconds for step in profile] == pytest.approx([3 * 0.25e-3] * 2)


def test_a_newer_gpu_gets_ptx(gpu_toy: Toy, driver: Path, tmp_path: Path) -> None:
    for capability in (70, 90):
        assert run(gpu_toy, driver, tmp_path / "log", capability=capability)[1] == "ptx;"


def test_refused_machine_code_falls_back_on_ptx(gpu_toy: Toy, driver: Path, tmp_path: Path) -> None:
    toy = gpu_toy.copy(tmp_path / "toy")
    (toy.folder / "kernels.cubin").write_bytes(b"bad;")
    manifest = json.loads((toy.folder / "manifest.json").read_text())
    manifest = {key: manifest[key] for key in ("inputs", "outputs")}
    write_manifest(toy, **manifest)
    assert run(toy, driver, tmp_path / "log")[1] == "bad;ptx;"
    (toy.folder / "kernels.ptx").write_bytes(b"bad ptx;")
    write_manifest(toy, **manifest)
    with pytest.raises(DeviceError, match=r"kernels\.ptx cannot be loaded: the CUDA driver says"):
        run(toy, driver, tmp_path / "log")


@pytest.mark.parametrize(
    ("capability", "target"),
    [(53, "jetson-nano"), (61, "an older device")],
)
def test_an_older_gpu_is_refused_by_name(
    gpu_toy: Toy, driver: Path, tmp_path: Path, capability: int, target: str
) -> None:
    have = f"{capability // 10}.{capability % 10}"
    message = rf"needs compute capability 6\.2, this GPU \(Fake GPU\) has {have}: .*{target}"
    with pytest.raises(DeviceError, match=message):
        run(gpu_toy, driver, tmp_path / "log", capability=capability)


def test_a_machine_without_a_driver_is_told_what_to_do(gpu_toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"no CUDA driver .*Jetson with its L4T driver"):
        run(gpu_toy, tmp_path, tmp_path / "log")
    with pytest.raises(BundleError, match="no CUDA driver"):
        load(gpu_toy.folder)


def test_a_driver_without_a_gpu(gpu_toy: Toy, driver: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no NVIDIA GPU can be used: the CUDA driver finds none"):
        run(gpu_toy, driver, tmp_path / "log", devices=0)
    with pytest.raises(DeviceError, match=r"no NVIDIA GPU can be used: .*CUDA_ERROR_FAKE \(2: as"):
        run(gpu_toy, driver, tmp_path / "log", fail="cuInit")


def test_a_driver_that_is_too_old(gpu_toy: Toy, tmp_path: Path) -> None:
    source = tmp_path / "old.c"
    source.write_text("int cuInit(unsigned flags) { return (int)flags; }")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([need("cc"), "-shared", "-fPIC", "-o", library, source], check=True)
    with pytest.raises(DeviceError, match="the CUDA driver has no cuDeviceGetCount"):
        run(gpu_toy, tmp_path, tmp_path / "log")


# What gfbench leaves to the end of its process where a context fails: the model.
MODEL_LEFT = "contexts 1 depth 0 modules 1 memories 1 streams 0 events 0 unbalanced 0"


@pytest.mark.parametrize(
    ("function", "message", "left"),
    [
        ("cuDevicePrimaryCtxRetain", "the GPU: the CUDA driver says CUDA_ERROR_FAKE", NOTHING_LEFT),
        ("cuModuleGetFunction", "the GPU code of the bundle has no kernel add", NOTHING_LEFT),
        ("cuMemAlloc_v2", "no GPU memory for the weights", NOTHING_LEFT),
        ("cuMemcpyHtoD_v2", "the weights: the CUDA driver says", NOTHING_LEFT),
        ("cuStreamCreate", "a stream: the CUDA driver says", MODEL_LEFT),
        ("cuEventCreate", "an event: the CUDA driver says", MODEL_LEFT),
        ("cuMemcpyHtoDAsync_v2", "copying to the GPU: the CUDA driver says", None),
        ("cuLaunchKernel", "first: the CUDA driver says", None),
        ("cuMemcpyDtoHAsync_v2", "copying from the GPU: the CUDA driver says", None),
    ],
)
def test_each_refusal_of_the_driver_ends_in_one_line(
    gpu_toy: Toy, driver: Path, tmp_path: Path, function: str, message: str, left: str | None
) -> None:
    with pytest.raises(DeviceError, match=re.escape(message)) as caught:
        run(gpu_toy, driver, tmp_path / "log", fail=function)
    assert "\n" not in str(caught.value)
    if left is not None:
        assert (tmp_path / "log").read_text().startswith(left)


def test_a_step_with_fewer_arguments_than_its_kernel_is_an_error_of_the_gpu(
    gpu_toy: Toy, driver: Path, tmp_path: Path
) -> None:
    """The driver reads as many as the kernel takes; what is behind the plan's own must be ours."""
    first, second = gpu_toy.plan.steps
    second = replace(second, args=(2,), outputs=(2,))
    toy = gpu_toy.with_plan(tmp_path / "toy", steps=(first, second))
    io = [{"name": "x", "dtype": "float32", "shape": (1, 3, 8, 8)}]
    write_manifest(toy, inputs=io, outputs=io)
    with pytest.raises(DeviceError, match=r"second: the CUDA driver says .*\(700"):
        run(toy, driver, tmp_path / "log")


def test_a_library_without_cuda_says_so(gpu_toy: Toy, tmp_path: Path) -> None:
    toy = gpu_toy.copy(tmp_path / "toy")
    cpu = toy_cpu("x86_64")
    link_library([], [], cpu, toy.library, library_id=toy.plan.library_id)
    write_manifest(toy)
    with pytest.raises(BundleError, match=r"linked without CUDA: load libgpu\.so of the bundle"):
        load(toy.folder)
