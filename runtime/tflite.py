"""A .tflite file in this process, through LiteRT or the older tflite-runtime."""

import importlib
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.device.gfrt import StepProfile, TensorInfo, TraceRecord
from gfcompile.runtime.engine import Latency, measure
from gfcompile.runtime.errors import BundleError, DeviceError

Array = npt.NDArray[Any]

# The same Interpreter under the names of its packages, newest first.
PACKAGES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter", "tensorflow.lite")


class TfliteEngine:
    """An interpreter with its default delegate (XNNPACK), and its own kernels for traces.

    Attributes:
        package: where the interpreter comes from.
    """

    stand_in = ""

    def __init__(self, model: Path, manifest: Manifest, threads: int) -> None:
        self._model = model
        self._threads = threads or None
        self._outputs = [spec.name for spec in manifest.outputs]
        self._module, self.package = _interpreter_module()
        self._interpreter = self._open()

    @property
    def device_name(self) -> str:
        return f"cpu, {self.package}"

    def run(self, batches: list[Array]) -> list[list[Array]]:
        return [self._run(self._interpreter, batch) for batch in batches]

    def trace(self, batches: list[Array]) -> list[list[TraceRecord]]:
        # A delegate does not show what lies between its operators.
        kernels = self._module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = self._open(
            experimental_preserve_all_tensors=True, experimental_op_resolver_type=kernels
        )
        runs = []
        for batch in batches:
            self._run(interpreter, batch)
            runs.append(_records(interpreter))
        return runs

    def profile(self, batch: Array, runs: int) -> list[StepProfile]:
        """The whole model as one step: interpreters do not say how long an operator took."""
        self._run(self._interpreter, batch)
        start = perf_counter()
        for _ in range(runs):
            self._run(self._interpreter, batch)
        return [StepProfile("model", self._model.name, runs, perf_counter() - start)]

    def benchmark(self, batch: Array, runs: int, warmup: int) -> Latency:
        return measure(lambda: self._run(self._interpreter, batch), runs, warmup)

    def close(self) -> None:
        self._interpreter = None

    def _open(self, **options: Any) -> Any:
        try:
            interpreter = self._module.Interpreter(
                model_path=str(self._model), num_threads=self._threads, **options
            )
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise BundleError(f"{self._model}: {self.package} cannot load it: {error}") from error
        return interpreter

    def _run(self, interpreter: Any, batch: Array) -> list[Array]:
        if interpreter is None:
            raise DeviceError("the session is closed")
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], batch)
        try:
            interpreter.invoke()
        except RuntimeError as error:
            raise DeviceError(f"{self.package} cannot run {self._model}: {error}") from error
        return [
            interpreter.get_tensor(output["index"]) for output in interpreter.get_output_details()
        ]


def _interpreter_module() -> tuple[Any, str]:
    """The module that has `Interpreter`, and the name of its package.

    Raises:
        DeviceError: none is installed.
    """
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except ImportError as error:  # tflite-runtime beside numpy 2
            raise DeviceError(f"{name} cannot be imported: {error}") from error
        return module, name.split(".")[0]
    raise DeviceError(
        "running .tflite bundles needs LiteRT: pip install ai-edge-litert "
        "(or tflite-runtime with numpy<2 where there is no newer one)"
    )


def _records(interpreter: Any) -> list[TraceRecord]:
    """Every tensor that the last run of an interpreter left, in the order of the file."""
    records = []
    inputs = {detail["index"] for detail in interpreter.get_input_details()}
    written = {int(i) for op in interpreter._get_ops_details() for i in op["outputs"]} - inputs
    details = [d for d in interpreter.get_tensor_details() if d["index"] in written]
    for step, detail in enumerate(details):
        values = np.asarray(interpreter.get_tensor(detail["index"]))
        scale, zero_point = detail["quantization"]
        info = TensorInfo(
            detail["name"], values.dtype.name, values.shape, values.nbytes, scale, zero_point, 0
        )
        records.append(TraceRecord(step, detail["name"], info, values.tobytes()))
    return records
