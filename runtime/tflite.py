"""A .tflite file in this process, through LiteRT or the older tflite-runtime."""

import importlib
import importlib.metadata
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.bundle import Manifest, check_tensors
from gfcompile.runtime.device.gfrt import StepProfile, TensorInfo, TraceRecord
from gfcompile.runtime.engine import Latency, measure
from gfcompile.runtime.errors import BundleError, DeviceError
from gfcompile.runtime.placement import Placement

Array = npt.NDArray[Any]

# The same Interpreter under the names of its packages, newest first.
_PACKAGES: Mapping[str, str] = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "tflite-runtime": "tflite_runtime.interpreter",
    "tensorflow": "tensorflow.lite",
}
_DELEGATE = "DELEGATE"
XNNPACK, INTERPRETER = "XNNPACK", "interpreter"


@dataclass(frozen=True, kw_only=True)
class Delegation:
    """How much of a model its delegate has taken.

    Attributes:
        operators: of the model, by name; how many there are of each.
        left: those that the interpreter's own kernels run.
        partitions: how many runs of neighbouring operators were delegated.
    """

    operators: Mapping[str, int]
    left: Mapping[str, int]
    partitions: int

    @property
    def share(self) -> float:
        total = sum(self.operators.values())
        return 1 - sum(self.left.values()) / total if total else 0.0


class TfliteInterpreter:
    """A model that is ready to run, on XNNPACK where that takes it.

    Attributes:
        package: where the interpreter comes from, with its version.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int = 1,
        delegate: bool = True,
        keep_all: bool = False,
    ) -> None:
        """Loads a file or its content.

        Args:
            threads: that kernels run on; 0 leaves it to the interpreter.
            delegate: whether the default delegate may take operators.
            keep_all: every tensor can be read after a run, not the outputs alone.

        Raises:
            DeviceError: no interpreter is installed.
            BundleError: it cannot load the model.
        """
        module, self.package = _interpreter_module()
        options: dict[str, Any] = {"num_threads": threads or None}
        if isinstance(model, bytes):
            options["model_content"] = model
        else:
            options["model_path"] = str(model)
        if not delegate:
            kinds = module.OpResolverType
            options["experimental_op_resolver_type"] = kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        if keep_all:
            options["experimental_preserve_all_tensors"] = True
        try:
            with _no_greeting():
                self._interpreter = module.Interpreter(**options)
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise BundleError(f"{self.package} cannot load the model: {error}") from error
        self._inputs = [detail["index"] for detail in self._interpreter.get_input_details()]
        self._outputs = {
            detail["name"]: detail["index"] for detail in self._interpreter.get_output_details()
        }

    def signature(self) -> tuple[list[TensorInfo], list[TensorInfo]]:
        """The inputs and the outputs."""
        details = (self._interpreter.get_input_details(), self._interpreter.get_output_details())
        inputs, outputs = ([_tensor_info(each) for each in found] for found in details)
        return inputs, outputs

    def run(self, *inputs: Array) -> dict[str, Array]:
        """The outputs by their tensors' names.

        Raises:
            DeviceError: an operator failed.
        """
        for index, array in zip(self._inputs, inputs, strict=True):
            self._interpreter.set_tensor(index, array)
        try:
            self._interpreter.invoke()
        except RuntimeError as error:
            raise DeviceError(f"{self.package} cannot run the model: {error}") from error
        return {name: self._interpreter.get_tensor(i) for name, i in self._outputs.items()}

    def records(self) -> list[TraceRecord]:
        """Every tensor that the last run wrote, in the file's order; for `keep_all`."""
        inputs = {detail["index"] for detail in self._interpreter.get_input_details()}
        operators = self._interpreter._get_ops_details()
        written = {int(index) for operator in operators for index in operator["outputs"]} - inputs
        records: list[TraceRecord] = []
        for detail in self._interpreter.get_tensor_details():
            if detail["index"] not in written:
                continue
            values = np.asarray(self._interpreter.get_tensor(detail["index"]))
            scale, zero_point = detail["quantization"]
            info = TensorInfo(
                detail["name"], values.dtype.name, values.shape, values.nbytes, scale, zero_point, 0
            )
            records.append(TraceRecord(len(records), detail["name"], info, values.tobytes()))
        return records

    def placements(self) -> list[Placement]:
        """What runs each operator: XNNPACK, or the interpreter's own kernels.

        An operator was delegated if its results are those of a delegate, or are nowhere: within a
        delegate, tensors of the file have no memory.
        """
        operators = self._interpreter._get_ops_details()
        names = {d["index"]: d["name"] for d in self._interpreter.get_tensor_details()}
        delegated = {
            int(index)
            for operator in operators
            if operator["op_name"] == _DELEGATE
            for index in operator["outputs"]
        }
        placements = []
        for operator in operators:
            if operator["op_name"] == _DELEGATE:
                continue
            results = [int(index) for index in operator["outputs"]]
            left = any(i not in delegated and self._has_memory(i) for i in results)
            placements.append(
                Placement(
                    kind=str(operator["op_name"]),
                    name=str(names.get(results[0], "")),
                    unit=INTERPRETER if left else XNNPACK,
                )
            )
        return placements

    def delegation(self) -> Delegation:
        """How much of the model XNNPACK has taken."""
        placements = self.placements()
        operators = self._interpreter._get_ops_details()
        return Delegation(
            operators=Counter(p.kind for p in placements),
            left=Counter(p.kind for p in placements if p.unit == INTERPRETER),
            partitions=sum(operator["op_name"] == _DELEGATE for operator in operators),
        )

    def _has_memory(self, index: int) -> bool:
        try:
            self._interpreter.get_tensor(index)
        except ValueError:
            return False
        return True


class TfliteEngine:
    """A bundle's .tflite file as a session runs it."""

    stand_in = ""

    def __init__(self, model: Path, manifest: Manifest, threads: int) -> None:
        self._model, self._threads = model, threads
        self._interpreter = TfliteInterpreter(model, threads=threads)
        check_tensors(manifest, *self._interpreter.signature())

    @property
    def device_name(self) -> str:
        return f"cpu, {self._interpreter.package}"

    def run(self, batches: list[Array]) -> list[list[Array]]:
        return [list(self._interpreter.run(batch).values()) for batch in batches]

    def trace(self, batches: list[Array]) -> list[list[TraceRecord]]:
        # A delegate does not show what lies between its operators.
        interpreter = TfliteInterpreter(
            self._model, threads=self._threads, delegate=False, keep_all=True
        )
        runs = []
        for batch in batches:
            interpreter.run(batch)
            runs.append(interpreter.records())
        return runs

    def profile(self, batch: Array, runs: int) -> list[StepProfile]:
        """The whole model as one step: interpreters do not say how long an operator took."""
        self._interpreter.run(batch)
        start = perf_counter()
        for _ in range(runs):
            self._interpreter.run(batch)
        return [StepProfile("model", self._model.name, runs, perf_counter() - start)]

    def placements(self) -> list[Placement]:
        return self._interpreter.placements()

    def benchmark(self, batch: Array, runs: int, warmup: int) -> Latency:
        return measure(lambda: self._interpreter.run(batch), runs, warmup)

    def close(self) -> None:
        pass


def _tensor_info(detail: Mapping[str, Any]) -> TensorInfo:
    """What the interpreter says of a tensor."""
    dtype, shape = np.dtype(detail["dtype"]), tuple(int(size) for size in detail["shape"])
    scale, zero_point = detail["quantization"]
    size_bytes = math.prod(shape) * dtype.itemsize
    return TensorInfo(detail["name"], dtype.name, shape, size_bytes, scale, zero_point, 0)


@contextmanager
def _no_greeting() -> Iterator[None]:
    """Holds back what the library says of itself while it loads a model; errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device, for its descriptor
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _interpreter_module() -> tuple[Any, str]:
    """The module that has `Interpreter`, and its package with the version.

    Raises:
        DeviceError: none is installed, or the one that is does not work.
    """
    for package, name in _PACKAGES.items():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except ImportError as error:  # tflite-runtime beside numpy 2
            raise DeviceError(f"{package} cannot be imported: {error}") from error
        return module, f"{package} {importlib.metadata.version(package)}"
    raise DeviceError(
        "running .tflite bundles needs LiteRT: pip install ai-edge-litert "
        "(or tflite-runtime with numpy<2 where there is no newer one)"
    )
