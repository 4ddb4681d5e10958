"""A bundle, loaded and ready to run: `gfcompile.runtime.load`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from gfcompile.runtime import images
from gfcompile.runtime.bench import BenchResult, qemu_command, run_bench
from gfcompile.runtime.bundle import Manifest, TensorSpec, check_bundle, check_tensors, model_file
from gfcompile.runtime.device import gfrt
from gfcompile.runtime.device.gfrt import StepProfile, TensorInfo, TraceRecord
from gfcompile.runtime.engine import ComputeUnits, Engine, Latency, measure
from gfcompile.runtime.engines import find_opener
from gfcompile.runtime.errors import BundleError, DeviceError, UserError
from gfcompile.runtime.placement import Placement, PlacingEngine
from gfcompile.runtime.trace import logical_values

if TYPE_CHECKING:
    from PIL import Image

    Photo = str | Path | Image.Image | npt.NDArray[np.uint8]

Device = Literal["local", "process", "qemu"]
Array = npt.NDArray[Any]


class Session:
    """A model of one input and one output or more, as `load` returns it.

    Attributes:
        manifest: what the bundle says about itself.
        inputs, outputs: name, dtype, shape and scale of each.
        device_name: "cpu", or "cuda: " and the GPU's name, once it is known.
        threads: that the kernels run on; 0 is one for each big CPU.
    """

    def __init__(self, bundle: Path, manifest: Manifest, engine: "Engine", threads: int) -> None:
        self.manifest = manifest
        self.inputs: tuple[TensorSpec, ...] = manifest.inputs
        self.outputs: tuple[TensorSpec, ...] = manifest.outputs
        self.threads = threads
        self._bundle = bundle
        self._engine = engine

    @property
    def device_name(self) -> str:
        return self._engine.device_name

    @property
    def batch(self) -> int:
        """How many images one inference takes."""
        return self.manifest.batch

    @property
    def stand_in(self) -> str:
        """What stands in for the device's own runtime, in words; empty where nothing does."""
        return self._engine.stand_in

    def run(self, array: Array) -> Array:
        """The first output; `array` may hold several batches, one after the other.

        Raises:
            UserError: the array is not what the model takes.
        """
        return self.run_all(array)[0]

    def run_all(self, array: Array) -> list[Array]:
        """Every output.

        Raises:
            UserError: the array is not what the model takes.
        """
        batches = self._batches(array)
        results = self._engine.run(batches)
        if len(results) == 1:
            return results[0]
        return [np.concatenate(parts) for parts in zip(*results, strict=True)]

    def classify(self, image: "Photo", top: int = 5) -> list[tuple[int, str, float]]:
        """Index, label and probability of the `top` likeliest classes of an image.

        The image is a file, a PIL image, or uint8 pixels (H, W, 3) that were already cropped.
        """
        return self.classify_all([image], top)[0]

    def classify_all(
        self, photos: "Sequence[Photo]", top: int = 5
    ) -> list[list[tuple[int, str, float]]]:
        """What `classify` gives for each of these images, as many of them at once as a batch has.

        What the last batch lacks is filled up, and left out of the results.
        """
        values = images.dequantize(self.run(self.encode(*photos)), self.outputs[0])
        count = -(-len(photos) // self.batch) * self.batch
        if values.size % count:
            raise BundleError(f"outputs of the shape {values.shape} are not of {count} images")
        labels = gfrt.read_labels(str(self._bundle))
        return [
            [
                (index, labels[index] if index < len(labels) else f"class {index}", probability)
                for index, probability in gfrt.top_classes(logits, top)
            ]
            for logits in values.reshape(count, -1)[: len(photos)]
        ]

    def encode(self, *photos: "Photo") -> Array:
        """What the model takes for images (see `classify`), in its input's dtype.

        These are whole batches: the first images fill up the last one.
        """
        if self.manifest.transform is None:
            raise BundleError("the bundle does not say how an image becomes its input")
        transform = images.Transform.from_dict(dict(self.manifest.transform))
        pixels = [
            photo if isinstance(photo, np.ndarray) else images.cropped(photo, transform)
            for photo in photos
        ]
        encoded = [images.encode(each, transform, self.inputs[0]) for each in pixels]
        return np.concatenate(images.in_batches(encoded, self.batch))

    def trace(self, array: Array) -> dict[str, Array]:
        """Every tensor that a step writes, by name; int8 as the graph has it.

        Several batches come one after the other, along the first axis. For bundles of kind "gfrt".
        """
        runs = self._engine.trace(self._batches(array))
        values = [{r.tensor.name: logical_values(r) for r in records} for records in runs]
        if len(values) == 1:
            return values[0]
        return {name: np.concatenate([v[name] for v in values]) for name in values[0]}

    def profile(self, array: Array | None = None, *, runs: int = 10) -> list[StepProfile]:
        """Time of each step, in order, over `runs` runs."""
        return self._engine.profile(self._sample(array), runs)

    def placements(self) -> list[Placement]:
        """The unit that runs each operation, in order; empty where the runtime does not say."""
        return self._engine.placements() if isinstance(self._engine, PlacingEngine) else []

    def benchmark(self, array: Array | None = None, *, runs: int = 20, warmup: int = 3) -> Latency:
        """Time of one inference over `runs` runs."""
        return self._engine.benchmark(self._sample(array), runs, warmup)

    def close(self) -> None:
        """Frees the model.

        Raises:
            DeviceError: another thread is running it.
        """
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _sample(self, array: Array | None) -> Array:
        if array is not None:
            return self._batches(array)[0]
        spec = self.inputs[0]
        generator = np.random.default_rng(0)
        if spec.dtype == "float32":
            return generator.standard_normal(spec.shape, np.float32)
        return generator.integers(0, 100, spec.shape).astype(spec.dtype)

    def _batches(self, array: Array) -> list[Array]:
        spec, batch = self.inputs[0], self.batch
        if len(self.inputs) != 1:
            raise UserError("models of several inputs run through gfrt.Model and gfrt.h")
        if array.dtype != spec.dtype:
            raise UserError(f"input {spec.name} is {spec.dtype}, got {array.dtype}")
        fits = array.ndim == len(spec.shape) and array.shape[1:] == spec.shape[1:]
        if not fits or array.shape[0] == 0 or array.shape[0] % batch:
            several = "" if batch == 1 else f", or several of {batch} images one after the other"
            raise UserError(
                f"input {spec.name} has the shape {spec.shape}{several}, got {array.shape}"
            )
        whole = np.ascontiguousarray(array)
        return [whole] if len(whole) == batch else np.split(whole, len(whole) // batch)


def load(
    bundle: Path | str,
    *,
    device: Device = "local",
    threads: int = 1,
    env: Mapping[str, str] | None = None,
    compute_units: ComputeUnits = "all",
) -> Session:
    """The bundle in folder `bundle`, ready to run, every file of it checked.

    Args:
        device: "local" is this process, "process" a gfbench of its own on this machine, "qemu"
            the same for an arm64 bundle under QEMU.
        threads: that the kernels run on; 0 is one for each big CPU.
        env: environment variables for gfbench; not for "local".
        compute_units: what Core ML may use; for its bundles, on a Mac.

    Raises:
        UserError: an argument that cannot be.
        BundleError: the bundle is damaged, of a newer format, or for another machine.
        DeviceError: the device cannot run it.
    """
    if device not in get_args(Device):
        raise UserError(f"unknown device {device!r}; choose from {', '.join(get_args(Device))}")
    if not 0 <= threads <= gfrt.MAX_THREADS:
        raise UserError(
            f"{threads} threads: give 1 to {gfrt.MAX_THREADS}, or 0 for one for each big CPU"
        )
    folder = Path(bundle)
    manifest = check_bundle(folder, local=device != "qemu")
    if compute_units not in get_args(ComputeUnits):
        known = ", ".join(get_args(ComputeUnits))
        raise UserError(f"unknown compute units {compute_units!r}; choose from {known}")
    if compute_units != "all" and manifest.kind != "coreml":
        raise UserError(f"compute units are for coreml, this bundle is for {manifest.target}")
    if manifest.kind != "gfrt":
        if device != "local":
            raise UserError(f"bundles of kind {manifest.kind!r} run with --device local alone")
        engine = _format_engine(folder, manifest, threads, compute_units)
        return Session(folder, manifest, engine, threads)
    if device == "local":
        return Session(folder, manifest, _Local(folder, manifest, threads), threads)
    prefix: list[str] = []
    env = dict(env or {})
    if device == "qemu":
        if manifest.arch != "aarch64":
            raise DeviceError(f"--device qemu runs arm64 bundles, this one is for {manifest.arch}")
        prefix = qemu_command(cpu=manifest.extra.get("qemu_cpu"), env=env)
        env = {}
    return Session(folder, manifest, _Process(folder, manifest, prefix, env, threads), threads)


def _format_engine(
    folder: Path, manifest: Manifest, threads: int, compute_units: ComputeUnits
) -> "Engine":
    """What runs a model file of others on this machine."""
    if manifest.kind == "tflite":
        from gfcompile.runtime.tflite import TfliteEngine

        return TfliteEngine(model_file(folder, manifest), manifest, threads)
    opener = find_opener(manifest.kind)
    if opener is None:
        raise BundleError(f"a bundle of kind {manifest.kind!r} does not run on this machine")
    return opener(folder, manifest, threads, compute_units)


class _Local:
    """The bundle's library in this process, through gfrt.py."""

    stand_in = ""

    def __init__(self, bundle: Path, manifest: Manifest, threads: int) -> None:
        try:
            # `load` has looked at every file already.
            self._model = gfrt.Model(str(bundle), verify=False)
            check_tensors(manifest, self._model.inputs, self._model.outputs)
            self._context = self._model.context(threads)
        except gfrt.GfrtError as error:
            raise BundleError(str(error)) from None

    @property
    def device_name(self) -> str:
        return self._model.device

    def run(self, batches: list[Array]) -> list[list[Array]]:
        return [self._run(batch) for batch in batches]

    def _run(self, batch: Array) -> list[Array]:
        with _device_errors():
            return self._context.run(batch)

    def trace(self, batches: list[Array]) -> list[list[TraceRecord]]:
        runs = []
        for batch in batches:
            records: list[TraceRecord] = []
            with _device_errors():
                self._context.observe([batch], records.append)
            runs.append(records)
        return runs

    def profile(self, batch: Array, runs: int) -> list[StepProfile]:
        with _device_errors():
            self._context.run(batch)
            self._context.enable_profile()
            for _ in range(runs):
                self._context.run(batch)
            steps = self._context.profile()
            self._context.enable_profile(False)
        return steps

    def benchmark(self, batch: Array, runs: int, warmup: int) -> Latency:
        return measure(lambda: self._run(batch), runs, warmup)

    def close(self) -> None:
        with _device_errors():
            self._context.close()
        self._model.close()


@contextmanager
def _device_errors() -> Iterator[None]:
    try:
        yield
    except gfrt.GfrtError as error:
        raise DeviceError(str(error)) from None


class _Process:
    """The bundle's gfbench, in a process of its own."""

    stand_in = ""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        prefix: list[str],
        env: Mapping[str, str],
        threads: int,
    ) -> None:
        self._bundle = bundle
        self._outputs = [_tensor_info(spec) for spec in manifest.outputs]
        self._prefix, self._env, self._threads = prefix, env, threads
        self.device_name = manifest.device

    def _bench(self, batches: list[Array], **options: Any) -> BenchResult:
        result = run_bench(
            self._bundle,
            batches,
            self._outputs,
            prefix=self._prefix,
            env=self._env,
            threads=self._threads,
            **options,
        )
        self.device_name = result.report["device"]
        return result

    def run(self, batches: list[Array]) -> list[list[Array]]:
        return self._bench(batches).outputs

    def trace(self, batches: list[Array]) -> list[list[TraceRecord]]:
        return self._bench(batches, trace=True).trace

    def profile(self, batch: Array, runs: int) -> list[StepProfile]:
        return self._bench([batch], runs=runs, profile=True).profile

    def benchmark(self, batch: Array, runs: int, warmup: int) -> Latency:
        report = self._bench([batch], runs=runs, warmup=warmup).report
        return Latency(
            median_ms=report["median_ms"],
            min_ms=report["min_ms"],
            p90_ms=report["p90_ms"],
            runs=runs,
        )

    def close(self) -> None:
        pass


def _tensor_info(spec: TensorSpec) -> TensorInfo:
    size = math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
    return TensorInfo(spec.name, spec.dtype, spec.shape, size, spec.scale, spec.zero_point, 0)
