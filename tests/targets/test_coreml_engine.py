"""The engines of Core ML bundles; Core ML itself is played by a stand-in where there is no Mac."""

import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gfcompile.runtime.bundle import FileEntry, Manifest, Precision, TensorSpec
from gfcompile.runtime.errors import BundleError, DeviceError
from gfcompile.runtime.placement import Placement, PlacingEngine, placement_lines
from gfcompile.targets.coreml import engine
from gfcompile.targets.coreml.engine import CoremlEngine, compute_plan, open_engine

MANIFEST = Manifest(
    created_by="gfcompile",
    model="toy",
    target="coreml",
    kind="coreml",
    precision=Precision(requested="float16", storage="float16", compute="float16"),
    arch="any",
    library="toy.mlpackage",
    files={"toy.mlpackage/Manifest.json": FileEntry(sha256="0" * 64, size_bytes=2)},
    inputs=(
        TensorSpec(name="image", dtype="uint8", shape=(1, 2, 2, 3), layout="nhwc", pixels=True),
    ),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 3)),),
    weights="none",
)


class Model:
    """coremltools' MLModel: gives the mean of each channel, and says what it was opened with."""

    opened: tuple[str, str] = ("", "")

    def __init__(self, path: str, compute_units: str) -> None:
        if not Path(path).exists():
            raise RuntimeError("no such file")
        Model.opened = (Path(path).name, compute_units)

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        pixels = np.asarray(inputs["image"])
        assert pixels.shape == (2, 2, 3), "an image of PIL"
        return {"classLabel": "cat", "logits": pixels.reshape(1, 4, 3).mean(1)}

    def get_compiled_model_path(self) -> str:
        return "compiled"


class MLCPUComputeDevice: ...


class MLNeuralEngineComputeDevice: ...


class Plan:
    """coremltools' MLComputePlan over a convolution, a constant, and a softmax on the CPU."""

    def __init__(self) -> None:
        def op(kind: str, name: str) -> SimpleNamespace:
            return SimpleNamespace(operator_name=kind, outputs=[SimpleNamespace(name=name)])

        operations = [op("ios17.conv", "c"), op("const", "k"), op("ios16.softmax", "s")]
        block = SimpleNamespace(operations=operations)
        functions = {"main": SimpleNamespace(block=block)}
        self.model_structure = SimpleNamespace(program=SimpleNamespace(functions=functions))

    @classmethod
    def load_from_path(cls, path: str, compute_units: str) -> "Plan":
        assert (path, compute_units) == ("compiled", "all units")
        return cls()

    def get_compute_device_usage_for_mlprogram_operation(self, op: Any) -> Any:
        devices = {"c": MLNeuralEngineComputeDevice(), "s": MLCPUComputeDevice()}
        name = op.outputs[0].name
        if name not in devices:
            return None
        return SimpleNamespace(preferred_compute_device=devices[name])

    def get_estimated_cost_for_mlprogram_operation(self, op: Any) -> Any:
        return SimpleNamespace(weight=0.75) if op.outputs[0].name == "c" else None


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A bundle's folder on what looks like a Mac."""
    units = SimpleNamespace(ALL="all units", CPU_ONLY="cpu", CPU_AND_NE="cpu and ane")
    tools = SimpleNamespace(models=SimpleNamespace(MLModel=Model), ComputeUnit=units)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(engine, "coremltools", lambda: tools)
    (tmp_path / "toy.mlpackage").mkdir()
    return tmp_path


def test_a_mac_predicts(mac: Path) -> None:
    opened = open_engine(mac, MANIFEST, threads=1, compute_units="cpu-ane")
    assert isinstance(opened, CoremlEngine)
    assert Model.opened == ("toy.mlpackage", "cpu and ane")
    assert opened.stand_in == ""
    assert opened.device_name == "Core ML, compute units cpu-ane"
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    ((logits,),) = opened.run([pixels])
    np.testing.assert_array_equal(logits, pixels.reshape(1, 4, 3).mean(1))
    assert opened.benchmark(pixels, runs=3, warmup=1).runs == 3
    assert opened.profile(pixels, runs=2)[0].calls == 2
    with pytest.raises(DeviceError, match="does not show"):
        opened.trace([pixels])
    opened.close()
    with pytest.raises(DeviceError, match="closed"):
        opened.run([pixels])


def test_a_package_that_core_ml_refuses(mac: Path) -> None:
    (mac / "toy.mlpackage").rmdir()
    with pytest.raises(BundleError, match="Core ML cannot load it: no such file"):
        open_engine(mac, MANIFEST, threads=1)


def test_each_operation_has_a_unit(mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gfcompile.targets.coreml.tools import coremltools as real

    real()
    from coremltools.models import compute_plan as module

    monkeypatch.setattr(module, "MLComputePlan", Plan)
    expected = [
        Placement(kind="conv", name="c", unit="Neural Engine", share=0.75),
        Placement(kind="softmax", name="s", unit="CPU"),
    ]
    assert compute_plan(mac / "toy.mlpackage") == expected
    opened = open_engine(mac, MANIFEST, threads=1)
    assert isinstance(opened, PlacingEngine)
    assert opened.placements() == expected
    assert placement_lines(expected) == [
        "Neural Engine: 1 operation, 75.0% of the time that is estimated",
        "CPU: 1 operation",
        "  conv     Neural Engine   75.0%  c",
        "  softmax  CPU                    s",
    ]


@pytest.mark.skipif(platform.system() == "Darwin", reason="a Mac has a plan")
def test_elsewhere_there_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="only a Mac"):
        compute_plan(tmp_path)
    with pytest.raises(DeviceError, match="only a Mac has units"):
        open_engine(tmp_path, MANIFEST, threads=1, compute_units="cpu")
    assert placement_lines([]) == []
