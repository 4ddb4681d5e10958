"""The stages in order: from what was asked for to a bundle."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

import gfcompile
from gfcompile.compile.bundle import (
    Bundle,
    check_output,
    copy_bundle,
    default_output,
    write_bundle,
)
from gfcompile.compile.cache import Cache, open_cache, toolchain
from gfcompile.compile.models import KeepRatio, LoadedModel, load_model, model_spec
from gfcompile.compile.progress import Progress, SilentProgress
from gfcompile.quantize import QuantScheme, is_quantized
from gfcompile.runtime.bundle import Manifest, Precision, TensorSpec
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import (
    Transform,
    crop,
    imagenet_transform,
    normalize,
    open_image,
    stand_in_photos,
)
from gfcompile.targets.spectral import choose_form
from gfcompile.targets.target import Target, find_target

if TYPE_CHECKING:
    from torch import nn

    from gfcompile.compile.graph import Graph
    from gfcompile.quantize import Calibrated

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
GOLDEN_IMAGES = 4
MAX_CALIBRATION_IMAGES = 512


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """What to compile, and for what.

    Attributes:
        model: a name of the zoo (`gfcompile models`), or, for a module of one's own, any name.
        target: a name that `gfcompile targets` lists.
        precision: int8 quantizes weights and activations of every product.
        checkpoint: trained weights; None for random ones drawn from `seed`. A quantized checkpoint
            brings its scales along.
        image_size, num_classes: None for those of the checkpoint, or as published.
        keep_ratio: share of the patches that a pruning model keeps, see `ModelSpec.pruned`; None
            as published.
        fft: the form of the global filters; "auto" chooses by cost on the target.
        calibration_data: a folder of images for int8; None for the photos that gfcompile ships.
        weight_bits, keep_float: see `QuantizeConfig`; a quantized checkpoint has them decided.
        output: the bundle's folder; None for one named after model, target and precision.
        dump: a folder for the graph after each stage, as ONNX files.
        labels: a text file with one class name per line, copied into the bundle.
        cache: whether to keep and reuse results in the user's cache.
    """

    model: str
    target: str
    precision: Literal["float32", "int8"] = "float32"
    checkpoint: Path | None = None
    image_size: int | None = None
    num_classes: int | None = None
    keep_ratio: KeepRatio | None = None
    fft: Literal["auto", "native", "dft", "circular"] = "auto"
    calibration_data: Path | None = None
    weight_bits: int = 8
    keep_float: tuple[str, ...] = ()
    output: Path | None = None
    dump: Path | None = None
    labels: Path | None = None
    seed: int = 0
    cache: bool = True


def compile_model(
    config: CompileConfig,
    progress: Progress | None = None,
    *,
    module: "nn.Module | None" = None,
) -> Bundle:
    """Compiles what `config` says into a bundle, which appears at its output whole or not at all.

    Args:
        config: what to compile.
        progress: told of stages and of whatever is not as the user might think.
        module: a torch module of your own, (1, 3, image_size, image_size) -> (1, classes), in
            place of a model of the zoo; `config.image_size` is then needed.

    Raises:
        UserError: something in `config` that cannot be.
        CompileError: a stage could not do its work, or its numbers are wrong.
    """
    progress = progress or SilentProgress()
    target = find_target(config.target)
    job = _Job(config=config, target=target, progress=progress, module=module)
    output = config.output or default_output(config.model, target.name, config.precision)
    check_output(output)
    job.check()
    with open_cache(enabled=config.cache, note=progress.note) as cache:
        if config.dump is not None or module is not None:
            bundle = job.write(output, cache)
        else:
            # A bundle that was made before from the same inputs is this one.
            made = cache.folder(job.key(), lambda folder: job.keep(folder, cache))
            with progress.stage("write the bundle"):
                bundle = copy_bundle(made / "bundle", output)
    for note in bundle.manifest.notes:
        progress.note(note)
    return bundle


@dataclass(frozen=True, kw_only=True)
class _Golden:
    """The inputs that the ledger is taken over."""

    pixels: Sequence[npt.NDArray[np.uint8]]  # (H, W, 3) each
    inputs: Sequence[npt.NDArray[np.float32]]  # (1, 3, H, W) each


@dataclass(frozen=True, kw_only=True)
class _Job:
    config: CompileConfig
    target: Target
    progress: Progress
    module: "nn.Module | None"

    def check(self) -> None:
        """Says early what would fail late.

        Raises:
            UserError: see `compile_model`.
        """
        config = self.config
        if self.module is None:
            spec = model_spec(config.model, config.keep_ratio)
            spec.resized(image_size=config.image_size, num_classes=config.num_classes)
        elif config.image_size is None:
            raise UserError("a module of your own needs CompileConfig.image_size")
        elif config.keep_ratio is not None:
            raise UserError("a keep ratio is for models of the zoo, not for a module of your own")
        if config.fft == "native":
            raise UserError(
                f"--fft native: {self.target.name} has no FFT of its own; "
                "choose auto, dft or circular"
            )
        if config.checkpoint is not None and not config.checkpoint.is_file():
            raise UserError(f"{config.checkpoint}: no such checkpoint file")
        if config.labels is not None and not config.labels.is_file():
            raise UserError(f"{config.labels}: no such file of labels")
        if config.calibration_data is not None:
            if config.precision != "int8":
                raise UserError("--calibration-data is for --int8; add it or leave this out")
            self.calibration_files()
        default = (config.weight_bits, config.keep_float) == (8, ())
        if config.precision != "int8" and not default:
            raise UserError("--weight-bits and --keep-float are for --int8")
        QuantScheme.with_weight_bits(config.weight_bits)
        if self.is_quantized:
            if config.precision != "int8":
                raise UserError(f"{config.checkpoint} is a quantized checkpoint: add --int8")
            if config.calibration_data is not None or not default:
                raise UserError(
                    f"{config.checkpoint} is a quantized checkpoint, which has its scales: leave "
                    "out --calibration-data, --weight-bits and --keep-float"
                )

    @property
    def is_quantized(self) -> bool:
        """Whether scales come with the checkpoint."""
        return self.config.checkpoint is not None and is_quantized(self.config.checkpoint)

    @property
    def is_calibrated(self) -> bool:
        """Whether scales come from images."""
        return self.config.precision == "int8" and not self.is_quantized

    def key(self) -> Mapping[str, object]:
        """All that the bundle depends on."""
        return {
            "bundle": self.source_key(),
            "fft": self.config.fft,
            "target": self.target,
            "labels": self.config.labels,
        }

    def graph_key(self, loaded: "_Loaded") -> Mapping[str, object]:
        """All that the graph depends on: of the target, the forms it gives to filters alone."""
        chosen = {"auto": [choose_form(self.target, *grid) for grid in loaded.filters]}
        return {
            "graph": self.source_key(),
            "forms": chosen.get(self.config.fft, self.config.fft),
        }

    def source_key(self) -> Mapping[str, object]:
        config = self.config
        return {
            "model": config.model,
            "precision": config.precision,
            "checkpoint": config.checkpoint,
            "image_size": config.image_size,
            "num_classes": config.num_classes,
            "keep_ratio": config.keep_ratio,
            "seed": config.seed,
            "calibration": self.calibration_files() if self.is_calibrated else None,
            "weight_bits": config.weight_bits,
            "keep_float": config.keep_float,
        }

    def calibration_files(self) -> list[Path]:
        """The images to calibrate with.

        Raises:
            UserError: the folder holds none.
        """
        folder = self.config.calibration_data
        if folder is None:
            return stand_in_photos()
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of calibration images")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(
                f"{folder}: no calibration images there (JPEG, PNG or WebP; 100 or more from the "
                "camera that the model will see are good)"
            )
        stride = math.ceil(len(files) / MAX_CALIBRATION_IMAGES)
        return files[::stride]

    def keep(self, folder: Path, cache: Cache) -> None:
        self.write(folder / "bundle", cache)

    def write(self, output: Path, cache: Cache) -> Bundle:
        """Makes the bundle at `output`."""
        with self.progress.stage("load the model"):
            loaded = self.load()
            golden = _golden(loaded.transform)
        if self.config.dump is not None or self.module is not None:
            graph = self.graph(loaded, golden)
        else:
            from gfcompile.compile.graph import Graph

            made = cache.folder(
                self.graph_key(loaded), lambda folder: self.graph(loaded, golden).write(folder)
            )
            graph = Graph.read(made)
        return write_bundle(lambda folder: self.emit(loaded, graph, golden, folder), output)

    def load(self) -> "_Loaded":
        config = self.config
        if self.module is not None:
            assert config.image_size is not None
            return _Loaded(
                module=self.module.eval(),
                transform=imagenet_transform(config.image_size),
                weights="a module given by the caller",
                is_random=False,
            )
        model: LoadedModel = load_model(
            config.model,
            checkpoint=config.checkpoint,
            image_size=config.image_size,
            num_classes=config.num_classes,
            keep_ratio=config.keep_ratio,
            seed=config.seed,
        )
        return _Loaded(
            module=model.module,
            transform=model.transform,
            weights=model.weights,
            is_random=model.is_random,
            filters=model.spec.filters,
            float_layers=model.spec.float_layers,
            kept_patches=model.spec.kept_patches,
            chooses_anew=model.spec.chooses_anew,
        )

    def graph(self, loaded: "_Loaded", golden: _Golden) -> "Graph":
        from gfcompile.compile.graph import build_graph
        from gfcompile.compile.quantization import calibrate_model
        from gfcompile.quantize import load_quantized

        def quantize(module: "nn.Module") -> "Calibrated":
            import torch

            config = self.config
            if self.is_quantized:
                assert config.checkpoint is not None
                return load_quantized(config.checkpoint, module, torch.from_numpy(golden.inputs[0]))
            images = [
                normalize(crop(open_image(path), loaded.transform), loaded.transform)
                for path in self.calibration_files()
            ]
            return calibrate_model(
                module,
                images,
                weight_bits=config.weight_bits,
                keep_float=(*loaded.float_layers, *config.keep_float),
            )

        dump = _Dump(self.config.dump)
        return build_graph(
            loaded.module,
            golden.inputs,
            quantize=quantize if self.config.precision == "int8" else None,
            fft=self.config.fft,
            choose_form=lambda h, w, c: choose_form(self.target, h, w, c),
            progress=self.progress,
            on_stage=dump,
        )

    def emit(self, loaded: "_Loaded", graph: "Graph", golden: _Golden, folder: Path) -> Manifest:
        """Fills the bundle's folder, verifies what was made, and describes it."""
        from gfcompile.compile.verify import Pruning, verify
        from gfcompile.targets.tvm.emit import emit
        from gfcompile.targets.tvm.partition import partition

        config, target = self.config, self.target
        with self.progress.stage("compile the kernels"):
            program = partition(graph.model)
            library = f"lib{config.model}.so"
            artifact = emit(
                program,
                target,
                folder,
                library=library,
                mean=loaded.transform.mean,
                std=loaded.transform.std,
            )
        pruning = None
        if loaded.kept_patches:
            pruning = Pruning(kept=loaded.kept_patches, chosen_anew=loaded.chooses_anew)
        with self.progress.stage("verify the artifact"):
            entry, notes = verify(
                graph.model, program, artifact, target, folder, golden.inputs, pruning
            )
        inputs = [program.tensors[name] for name in program.inputs]
        outputs = [program.tensors[name] for name in program.outputs]
        self.write_golden(graph, golden, folder)
        if config.labels is not None:
            labels = _read_labels(config.labels, outputs[0].shape[-1])
            (folder / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
        int8 = config.precision == "int8"
        return Manifest(
            created_by=f"gfcompile {gfcompile.__version__}",
            model=config.model,
            target=target.name,
            precision=Precision(
                requested=config.precision,
                storage=_storage(graph, artifact.plan.packed_bytes) if int8 else "float32",
                compute=target.int8_compute if int8 else "float32",
            ),
            arch=target.cpu.arch,
            inputs=tuple(TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in inputs),
            outputs=tuple(TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in outputs),
            weights=loaded.weights,
            device=artifact.plan.device,
            library=library,
            cpu_features=artifact.plan.cpu_features,
            compute_capability=target.gpu.compute_capability if target.gpu else None,
            transform=loaded.transform.to_dict(),
            notes=(*self.notes(loaded, graph), *notes),
            ledger=(*graph.ledger, *([entry.to_dict()] if entry is not None else [])),
            filters=tuple(graph.filters),
            kernels=artifact.kernels,
            versions=dict(toolchain()),
            extra={
                "mcpu": target.cpu.mcpu,
                "qemu_cpu": target.cpu.qemu_cpu,
                "scheme": graph.scheme,
                "layers": graph.layers,
                "kept_float": graph.kept_float,
                "arena_bytes": artifact.arena.size_bytes,
                "arena_lower_bound_bytes": artifact.arena.lower_bound_bytes,
                "calibration_images": graph.calibration_images,
                "training": graph.training,
            },
        )

    def notes(self, loaded: "_Loaded", graph: "Graph") -> list[str]:
        """What is not as the user might think."""
        config, target = self.config, self.target
        notes = []
        if loaded.is_random:
            notes.append(
                f"weights are {loaded.weights}: speed and size are real, classes mean nothing; "
                "give --checkpoint"
            )
        if config.precision == "int8":
            if graph.training:
                notes.append(
                    f"from a quantized checkpoint: epochs of training {graph.training['epochs']}, "
                    f"images {graph.training['images']}"
                )
            elif config.calibration_data is None:
                notes.append(
                    f"calibrated on the {len(self.calibration_files())} photos that gfcompile "
                    "ships, a stand-in: give --calibration-data DIR with images of yours"
                )
            notes.append(f"int8 on {target.name}: {target.int8_note}")
            if graph.kept_float:
                names = ", ".join(str(layer["name"]) for layer in graph.kept_float)
                notes.append(f"kept in float: {names}")
        return notes

    def write_golden(self, graph: "Graph", golden: _Golden, folder: Path) -> None:
        """One golden input, as pixels, and its logits by the graph in ONNX Runtime."""
        from gfcompile.compile.graph import run

        place = folder / "golden"
        place.mkdir()
        (place / "image.u8").write_bytes(golden.pixels[0].tobytes())
        logits = run(graph.model, golden.inputs[:1])[0].astype("<f4")
        (place / "logits.f32").write_bytes(logits.tobytes())


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    module: "nn.Module"
    transform: Transform
    weights: str
    is_random: bool
    filters: tuple[tuple[int, int, int], ...] = ()
    float_layers: tuple[str, ...] = ()
    kept_patches: tuple[int, ...] = ()
    chooses_anew: bool = False


class _Dump:
    """Writes each stage's graph as NN-stage.onnx, if a folder was asked for."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.count = 0

    def __call__(self, name: str, model: Any) -> None:
        if self.folder is None:
            return
        from gfcompile.compile.trace import save

        self.folder.mkdir(parents=True, exist_ok=True)
        save(model, self.folder / f"{self.count:02d}-{name}.onnx")
        self.count += 1


def _golden(transform: Transform) -> _Golden:
    photos = [open_image(path) for path in stand_in_photos()[:GOLDEN_IMAGES]]
    pixels = [crop(photo, transform) for photo in photos]
    return _Golden(pixels=pixels, inputs=[normalize(image, transform) for image in pixels])


def _storage(graph: "Graph", packed_bytes: int) -> str:
    """What an int8 bundle holds."""
    four_bits = graph.scheme["weight"]["high"] <= 7
    if four_bits and packed_bytes:
        weights = "int4 weights (expanded to int8 when loaded), int8 activations"
    elif four_bits:
        weights = "weights of 4 bits as int8, int8 activations"
    else:
        weights = "int8 products"
    return f"{weights}, float16 filters"


def _read_labels(path: Path, classes: int) -> list[str]:
    labels = path.read_text(encoding="utf-8").splitlines()
    if len(labels) != classes:
        raise UserError(f"{path}: {len(labels)} labels for {classes} classes; one line per class")
    return labels
