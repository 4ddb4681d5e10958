"""Runs a bundle's .mlpackage: through Core ML on a Mac, through our evaluator elsewhere."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.bundle import Manifest, model_file
from gfcompile.runtime.device.gfrt import StepProfile, TensorInfo, TraceRecord
from gfcompile.runtime.engine import ComputeUnits, Engine, Latency, measure
from gfcompile.runtime.errors import BundleError, DeviceError
from gfcompile.runtime.placement import Placement
from gfcompile.targets.coreml.evaluate import Evaluator
from gfcompile.targets.coreml.tools import coremltools, quiet

Array = npt.NDArray[Any]

_UNITS: Mapping[ComputeUnits, str] = {
    "all": "ALL",
    "cpu": "CPU_ONLY",
    "cpu-gpu": "CPU_AND_GPU",
    "cpu-ane": "CPU_AND_NE",
}
EVALUATED = "evaluated, not Apple's runtime"


def open_engine(
    folder: Path, manifest: Manifest, threads: int, *, compute_units: ComputeUnits = "all"
) -> Engine:
    """What runs the bundle in `folder` on this machine.

    Args:
        threads: of the evaluator; Core ML chooses for itself.
        compute_units: what Core ML may use on a Mac.

    Raises:
        DeviceError: units were chosen, and this is no Mac.
        BundleError: Core ML cannot load the package.
    """
    package = model_file(folder, manifest)
    if platform.system() == "Darwin":
        return CoremlEngine(package, manifest, compute_units)
    if compute_units != "all":
        raise DeviceError(f"compute units {compute_units}: only a Mac has units to choose from")
    return EvaluatedEngine(package, manifest, threads)


class EvaluatedEngine:
    """The package in our evaluator: what it computes, not how fast."""

    stand_in = EVALUATED

    def __init__(self, package: Path, manifest: Manifest, threads: int) -> None:
        import torch

        self._evaluator = Evaluator(package)
        self._manifest = manifest
        if threads:
            torch.set_num_threads(threads)

    @property
    def device_name(self) -> str:
        return EVALUATED

    def run(self, batches: list[Array]) -> list[list[Array]]:
        return [self._run(batch) for batch in batches]

    def trace(self, batches: list[Array]) -> list[list[TraceRecord]]:
        runs = []
        for batch in batches:
            records: list[TraceRecord] = []

            def observe(op: Any, results: Sequence[Any], into: list[TraceRecord] = records) -> None:
                for (name, _), result in zip(op.outputs, results, strict=True):
                    if hasattr(result, "numpy"):
                        into.append(_record(len(into), op.kind, name, result.numpy()))

            self._evaluator.run({"image": _planes(batch, self._manifest)}, observe)
            runs.append(records)
        return runs

    def profile(self, batch: Array, runs: int) -> list[StepProfile]:  # noqa: ARG002 - Engine's
        raise DeviceError(f"no profile: the bundle is {EVALUATED}; on a Mac, see `compute_plan`")

    def benchmark(self, batch: Array, runs: int, warmup: int) -> Latency:
        return measure(lambda: self._run(batch), runs, warmup)

    def close(self) -> None:
        pass

    def _run(self, batch: Array) -> list[Array]:
        results = self._evaluator.run({"image": _planes(batch, self._manifest)})
        return [results[spec.name] for spec in self._manifest.outputs]


class CoremlEngine:
    """The package in Core ML, on a Mac."""

    stand_in = ""

    def __init__(self, package: Path, manifest: Manifest, compute_units: ComputeUnits) -> None:
        self._package, self._manifest, self._units = package, manifest, compute_units
        ct = coremltools()
        try:
            with quiet():
                self._model = ct.models.MLModel(
                    str(package), compute_units=getattr(ct.ComputeUnit, _UNITS[compute_units])
                )
        except Exception as error:  # Core ML's own come as bare ones
            raise BundleError(f"{package}: Core ML cannot load it: {error}") from error

    @property
    def device_name(self) -> str:
        return f"Core ML, compute units {self._units}"

    def run(self, batches: list[Array]) -> list[list[Array]]:
        return [self._run(batch) for batch in batches]

    def trace(self, batches: list[Array]) -> list[list[TraceRecord]]:  # noqa: ARG002 - Engine's
        raise DeviceError("Core ML does not show what lies between a model's operations")

    def profile(self, batch: Array, runs: int) -> list[StepProfile]:
        """The whole model as one step; `compute_plan` has the estimated share of each operation."""
        latency = self.benchmark(batch, runs, 1)
        return [StepProfile("model", self._manifest.library, runs, runs * latency.median_ms / 1e3)]

    def benchmark(self, batch: Array, runs: int, warmup: int) -> Latency:
        return measure(lambda: self._run(batch), runs, warmup)

    def placements(self) -> list[Placement]:
        """The unit that Core ML has planned for each operation; see `compute_plan`."""
        return compute_plan(self._package, self._units)

    def close(self) -> None:
        self._model = None

    def _run(self, batch: Array) -> list[Array]:
        if self._model is None:
            raise DeviceError("the session is closed")
        value: Any = batch
        if self._manifest.inputs[0].pixels:
            from PIL import Image

            value = Image.fromarray(batch[0])
        try:
            results = self._model.predict({"image": value})
        except Exception as error:
            raise DeviceError(f"Core ML cannot run the model: {error}") from error
        return [np.asarray(results[spec.name], np.float32) for spec in self._manifest.outputs]


def compute_plan(package: Path, compute_units: ComputeUnits = "all") -> list[Placement]:
    """Each operation that Core ML executes, its unit, and Core ML's estimate of its share.

    Raises:
        DeviceError: this machine is no Mac, or its system is older than macOS 14.4.
    """
    if platform.system() != "Darwin":
        raise DeviceError("only a Mac says on which unit an operation runs")
    ct = coremltools()
    from coremltools.models.compute_plan import MLComputePlan

    units = getattr(ct.ComputeUnit, _UNITS[compute_units])
    try:
        with quiet():
            model = ct.models.MLModel(str(package), compute_units=units)
            plan = MLComputePlan.load_from_path(
                path=model.get_compiled_model_path(), compute_units=units
            )
    except Exception as error:
        raise DeviceError(f"Core ML makes no plan for {package}: {error}") from error
    placements = []
    for op in plan.model_structure.program.functions["main"].block.operations:
        usage = plan.get_compute_device_usage_for_mlprogram_operation(op)
        if usage is None:  # constants
            continue
        cost = plan.get_estimated_cost_for_mlprogram_operation(op)
        device = type(usage.preferred_compute_device).__name__
        unit = {"MLCPUComputeDevice": "CPU", "MLGPUComputeDevice": "GPU"}.get(
            device, "Neural Engine"
        )
        # "ios17.conv": the part before the dot is the opset.
        kind = op.operator_name.split(".")[-1]
        share = None if cost is None else float(cost.weight)
        name = str(op.outputs[0].name)
        placements.append(Placement(kind=kind, name=name, unit=unit, share=share))
    return placements


def _planes(batch: Array, manifest: Manifest) -> Array:
    """A batch as the program has it: pixels (1, H, W, 3) become (1, 3, H, W)."""
    return batch.transpose(0, 3, 1, 2) if manifest.inputs[0].pixels else batch


def _record(step: int, kind: str, name: str, array: Array) -> TraceRecord:
    info = TensorInfo(name, array.dtype.name, array.shape, array.nbytes, 0.0, 0, 0)
    return TraceRecord(step, f"{kind} {name}", info, array.tobytes())
