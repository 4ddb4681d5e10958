"""The stages in order: from what was asked for to a bundle."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

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
from gfcompile.compile.emission import (
    Emission,
    EmissionRequest,
    Golden,
    Pruning,
    RequestedPrecision,
)
from gfcompile.compile.models import KeepRatio, LoadedModel, load_model, model_spec
from gfcompile.compile.models.spec import ModelSpec
from gfcompile.compile.progress import Progress, SilentProgress
from gfcompile.compile.pruning_gain import note_on_gain
from gfcompile.quantize import QuantScheme, is_quantized
from gfcompile.runtime.bundle import Manifest, Precision
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.golden import FOLDER as GOLDEN_FOLDER
from gfcompile.runtime.golden import views
from gfcompile.runtime.images import (
    Transform,
    crop,
    imagenet_transform,
    in_batches,
    normalize,
    open_image,
    stand_in_photos,
)
from gfcompile.targets.coreml.options import CoremlOptions, Ios, Layout
from gfcompile.targets.spectral import choose_form
from gfcompile.targets.target import AnyTarget, ModelFormat, Target, find_target
from gfcompile.targets.tflite.options import Interface, TfliteOptions

if TYPE_CHECKING:
    from torch import nn

    from gfcompile.compile.graph import Graph
    from gfcompile.quantize import Calibrated

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
GOLDEN_IMAGES = 4
MAX_CALIBRATION_IMAGES = 512
MAX_BATCH = 64  # what the artifact is checked with are all activations of a batch, in memory

# There is no "native" here: no target has an FFT of its own, see `choose_form`.
FftChoice = Literal["auto", "dft", "circular"]


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """What to compile, and for what.

    Attributes:
        model: a name of the zoo (`gfcompile models`), or, for a module of one's own, any name.
        target: a name that `gfcompile targets` lists.
        precision: int8 quantizes weights and activations of every product; float16 stores weights
            in half precision and, on ARM's CPUs that have such arithmetic, multiplies in it; None
            is float16 for Core ML, float32 elsewhere.
        checkpoint: trained weights; None for random ones drawn from `seed`. A quantized checkpoint
            brings its scales along.
        image_size, num_classes: None for those of the checkpoint, or as published.
        keep_ratio: share of the patches that a pruning model keeps, see `ModelSpec.pruned`; None
            as published.
        batch: images that the model takes at once, (batch, 3, H, W). For each it computes what it
            does for one alone, with the same scales.
        fft: the form of the global filters; "auto" chooses by cost on the target.
        calibration_data: a folder of images for int8; None for the photos that gfcompile ships.
        weight_bits, group_size, keep_float, int8_filters: see `QuantizeConfig`; a quantized
            checkpoint has them decided.
        output: the bundle's folder; None for one named after model, target and precision.
        dump: a folder for the graph after each stage, as ONNX files.
        labels: a text file with one class name per line, copied into the bundle.
        tflite: for targets of the TFLite emitter.
        coreml: for the target of the Core ML emitter.
        tuning_db: what `gfcompile tune` wrote, used before what gfcompile ships; "shipped" for the
            latter alone, "none" for neither. For targets with kernels of our own.
        cache: whether to keep and reuse results in the user's cache.
    """

    model: str
    target: str
    precision: RequestedPrecision | None = None
    checkpoint: Path | None = None
    image_size: int | None = None
    num_classes: int | None = None
    keep_ratio: KeepRatio | None = None
    batch: int = 1
    fft: FftChoice = "auto"
    calibration_data: Path | None = None
    weight_bits: int = 8
    group_size: int | None = None
    keep_float: tuple[str, ...] = ()
    int8_filters: tuple[str, ...] = ()
    output: Path | None = None
    dump: Path | None = None
    labels: Path | None = None
    seed: int = 0
    tflite: TfliteOptions = field(default_factory=TfliteOptions)
    coreml: CoremlOptions = field(default_factory=CoremlOptions)
    tuning_db: Path | Literal["shipped", "none"] = "shipped"
    cache: bool = True


def compile_model(
    config: CompileConfig,
    progress: Progress | None = None,
    *,
    module: "nn.Module | None" = None,
    pruning: Pruning | None = None,
) -> Bundle:
    """Compiles what `config` says into a bundle, which appears at its output whole or not at all.

    Args:
        config: what to compile.
        progress: told of stages and of whatever is not as the user might think.
        module: a torch module of your own, (batch, 3, image_size, image_size) -> (batch, classes),
            in place of a model of the zoo; `config.image_size` is then needed.
        pruning: how that module drops patches, if it does. Which ones it keeps is then compared;
            otherwise another choice between two of nearly the same score is an error.

    Raises:
        UserError: something in `config` that cannot be.
        CompileError: a stage could not do its work, or its numbers are wrong.
    """
    progress = progress or SilentProgress()
    target = find_target(config.target)
    job = _Job(config=config, target=target, progress=progress, module=module, pruning=pruning)
    output = config.output or default_output(config.model, target.name, job.precision, config.batch)
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


def check_config(config: CompileConfig) -> None:
    """Says at once what a compilation of a model of the zoo would refuse.

    Raises:
        UserError: see `compile_model`.
    """
    if config.output is not None:
        check_output(config.output)
    _job(config, SilentProgress()).check()


def lowered_graph(config: CompileConfig, cache: Cache, progress: Progress) -> "Graph":
    """The graph that `config`'s kernels are compiled from.

    Raises:
        UserError, CompileError: see `compile_model`.
    """
    job = _job(config, progress)
    job.check()
    return job.lowered(cache)[0]


def _job(config: CompileConfig, progress: Progress) -> "_Job":
    """What there is to do for a model of the zoo."""
    target = find_target(config.target)
    return _Job(config=config, target=target, progress=progress, module=None, pruning=None)


@dataclass(frozen=True, kw_only=True)
class _Job:
    config: CompileConfig
    target: AnyTarget
    progress: Progress
    module: "nn.Module | None"
    pruning: Pruning | None

    @property
    def precision(self) -> RequestedPrecision:
        if self.config.precision is not None:
            return self.config.precision
        is_coreml = isinstance(self.target, ModelFormat) and self.target.emitter == "coreml"
        return "float16" if is_coreml else "float32"

    def check(self) -> None:
        """Says early what would fail late.

        Raises:
            UserError: see `compile_model`.
        """
        config = self.config
        for name, value, kind in (
            ("precision", self.precision, RequestedPrecision),
            ("fft", config.fft, FftChoice),
            ("interface", config.tflite.interface, Interface),
            ("ios", config.coreml.ios, Ios),
            ("layout", config.coreml.layout, Layout),
        ):
            if value not in get_args(kind):
                known = ", ".join(map(str, get_args(kind)))
                raise UserError(f"unknown {name} {value!r}; choose from {known}")
        if self.module is None:
            spec = model_spec(config.model, config.keep_ratio)
            spec.resized(image_size=config.image_size, num_classes=config.num_classes)
        elif config.image_size is None:
            raise UserError("a module of your own needs CompileConfig.image_size")
        elif config.keep_ratio is not None:
            raise UserError("a keep ratio is for models of the zoo, not for a module of your own")
        if not 1 <= config.batch <= MAX_BATCH:
            raise UserError(
                f"--batch {config.batch}: a model takes 1 to {MAX_BATCH} images at once"
            )
        self.check_emitter()
        if config.checkpoint is not None and not config.checkpoint.is_file():
            raise UserError(f"{config.checkpoint}: no such checkpoint file")
        if config.labels is not None:
            _read_labels(config.labels)
        if config.calibration_data is not None:
            if self.precision != "int8":
                raise UserError("--calibration-data is for --int8; add it or leave this out")
            self.calibration_files()
        asked = (config.weight_bits, config.group_size, config.keep_float, config.int8_filters)
        default = asked == (8, None, (), ())
        if self.precision != "int8" and not default:
            raise UserError(
                "--weight-bits, --group-size, --keep-float and --int8-filter are for --int8"
            )
        QuantScheme.with_weight_bits(
            config.weight_bits, group_size=config.group_size, keep_float=config.keep_float
        )
        if self.is_quantized:
            if self.precision != "int8":
                raise UserError(f"{config.checkpoint} is a quantized checkpoint: add --int8")
            if config.calibration_data is not None or not default:
                raise UserError(
                    f"{config.checkpoint} is a quantized checkpoint, which has its scales: leave "
                    "out --calibration-data, --weight-bits, --group-size, --keep-float and "
                    "--int8-filter"
                )

    @property
    def is_quantized(self) -> bool:
        """Whether scales come with the checkpoint."""
        return self.config.checkpoint is not None and is_quantized(self.config.checkpoint)

    @property
    def is_calibrated(self) -> bool:
        """Whether scales come from images."""
        return self.precision == "int8" and not self.is_quantized

    def check_emitter(self) -> None:
        """Says early what the target's emitter cannot do.

        Raises:
            UserError: see `compile_model`.
        """
        config, target = self.config, self.target
        if isinstance(config.tuning_db, Path):
            if not isinstance(target, Target):
                raise UserError(f"--tuning-db: {target.name} has no kernels of ours to tune")
            if not config.tuning_db.is_file():
                raise UserError(f"--tuning-db {config.tuning_db}: no such file; make one by tune")
        if isinstance(target, Target):
            if self.precision == "float16" and not target.has_float16:
                raise UserError(
                    f"--fp16: {_why_no_float16(target)}; {target.name} has float32 and --int8 "
                    "(--fp16 is for ARM's CPUs from ARMv8.2 on, such as arm64, android-arm64 and "
                    "raspberry-pi-5, and for model formats)"
                )
        elif target.integer_only and self.precision != "int8":
            raise UserError(f"{target.name} takes integer operators alone: add --int8")
        if config.tflite != TfliteOptions():
            if isinstance(target, Target) or target.emitter != "tflite":
                raise UserError(f"--interface and --input are for tflite, not for {target.name}")
            if config.tflite.interface != "float32" and self.precision != "int8":
                raise UserError(f"--interface {config.tflite.interface} needs --int8")
        if config.coreml != CoremlOptions() and (
            isinstance(target, Target) or target.emitter != "coreml"
        ):
            raise UserError(f"--ios, --layout and --license are for coreml, not for {target.name}")
        is_coreml = isinstance(target, ModelFormat) and target.emitter == "coreml"
        if is_coreml and config.batch > 1 and config.coreml.input == "image":
            raise UserError(
                f"--batch {config.batch}: Core ML takes an image one at a time; "
                "with --input tensor it takes normalized values"
            )

    def key(self) -> Mapping[str, object]:
        """All that the bundle depends on."""
        return {
            "bundle": self.source_key(),
            "fft": self.config.fft,
            "target": self.target,
            "labels": self.config.labels,
            "precision": self.precision,
            "options": [self.config.tflite, self.config.coreml],
            # A file by its content. What gfcompile ships is part of its sources, as all keys are.
            "tuning_db": self.config.tuning_db,
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
            "int8": self.precision == "int8",
            "checkpoint": config.checkpoint,
            "image_size": config.image_size,
            "num_classes": config.num_classes,
            "keep_ratio": config.keep_ratio,
            "batch": config.batch,
            "seed": config.seed,
            "calibration": self.calibration_files() if self.is_calibrated else None,
            "weight_bits": config.weight_bits,
            "group_size": config.group_size,
            "keep_float": config.keep_float,
            "int8_filters": config.int8_filters,
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

    def calibration(self, loaded: "_Loaded") -> list[npt.NDArray[np.float32]]:
        """Images as the graph takes them, (1, 3, H, W) each, to calibrate with."""
        return [
            normalize(crop(open_image(path), loaded.transform), loaded.transform)
            for path in self.calibration_files()
        ]

    def keep(self, folder: Path, cache: Cache) -> None:
        self.write(folder / "bundle", cache)

    def write(self, output: Path, cache: Cache) -> Bundle:
        """Makes the bundle at `output`."""
        graph, loaded, golden = self.lowered(cache)
        return write_bundle(lambda folder: self.emit(loaded, graph, golden, folder), output)

    def lowered(self, cache: Cache) -> "tuple[Graph, _Loaded, Golden]":
        """The graph, and what it came from."""
        with self.progress.stage("load the model"):
            loaded = self.load()
            golden = _golden(loaded.transform, self.config.batch)
        if self.config.dump is not None or self.module is not None:
            return self.graph(loaded, golden), loaded, golden
        from gfcompile.compile.graph import Graph

        made = cache.folder(
            self.graph_key(loaded), lambda folder: self.graph(loaded, golden).write(folder)
        )
        return Graph.read(made), loaded, golden

    def load(self) -> "_Loaded":
        config = self.config
        if self.module is not None:
            assert config.image_size is not None
            return _Loaded(
                module=self.module.eval(),
                transform=imagenet_transform(config.image_size),
                weights="a module given by the caller",
                is_random=False,
                pruning=self.pruning,
            )
        model: LoadedModel = load_model(
            config.model,
            checkpoint=config.checkpoint,
            image_size=config.image_size,
            num_classes=config.num_classes,
            keep_ratio=config.keep_ratio,
            seed=config.seed,
        )
        # Before the work. A module of one's own says only what it returns, in the end.
        self.labels(model.num_classes)
        kept = model.spec.dropping
        return _Loaded(
            module=model.module,
            transform=model.transform,
            weights=model.weights,
            is_random=model.is_random,
            filters=model.spec.filters,
            float_layers=model.spec.float_layers,
            pruning=Pruning(kept=kept, chosen_anew=model.spec.chooses_anew) if kept else None,
            spec=model.spec,
        )

    def labels(self, classes: int) -> list[str]:
        """The names of the classes, if any are given.

        Raises:
            UserError: they are not as many as there are classes.
        """
        path = self.config.labels
        labels = [] if path is None else _read_labels(path)
        if path is not None and len(labels) != classes:
            raise UserError(
                f"{path}: {len(labels)} labels for {classes} classes; one line per class"
            )
        return labels

    def graph(self, loaded: "_Loaded", golden: Golden) -> "Graph":
        from gfcompile.compile.graph import build_graph
        from gfcompile.compile.quantization import calibrate_model
        from gfcompile.quantize import load_quantized

        def quantize(module: "nn.Module") -> "Calibrated":
            import torch

            config = self.config
            if self.is_quantized:
                assert config.checkpoint is not None
                return load_quantized(config.checkpoint, module, torch.from_numpy(golden.inputs[0]))
            return calibrate_model(
                module,
                self.calibration(loaded),
                weight_bits=config.weight_bits,
                group_size=config.group_size,
                keep_float=(*loaded.float_layers, *config.keep_float),
                int8_filters=config.int8_filters,
                pays=self.takes_circular_form,
                batch=config.batch,
            )

        dump = _Dump(self.config.dump)
        return build_graph(
            loaded.module,
            golden.inputs,
            quantize=quantize if self.precision == "int8" else None,
            fft=self.config.fft,
            choose_form=lambda h, w, c: choose_form(self.target, h, w, c),
            progress=self.progress,
            on_stage=dump,
        )

    def takes_circular_form(self, h: int, w: int, c: int) -> bool:
        """Whether a filter of this grid is computed in the circular form, which int8 is for."""
        form = self.config.fft
        return (choose_form(self.target, h, w, c) if form == "auto" else form) == "circular"

    def emit(self, loaded: "_Loaded", graph: "Graph", golden: Golden, folder: Path) -> Manifest:
        """Fills the bundle's folder, verifies what was made, and describes it."""
        config, target = self.config, self.target
        shape = graph.model.graph.outputs[0].shape
        assert shape is not None
        labels = self.labels(int(shape.numpy()[-1]))
        if labels:
            (folder / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
        emission = self.emission(
            EmissionRequest(
                model=config.model,
                precision=self.precision,
                weights=loaded.weights,
                graph=graph,
                transform=loaded.transform,
                golden=golden,
                calibration=lambda: in_batches(self.calibration(loaded), config.batch),
                labels=labels,
                folder=folder,
                progress=self.progress,
                pruning=loaded.pruning,
            )
        )
        self.write_golden(graph, golden, loaded.transform, folder)
        return Manifest(
            created_by=f"gfcompile {gfcompile.__version__}",
            model=config.model,
            target=target.name,
            kind=emission.kind,
            precision=Precision(
                requested=self.precision, storage=emission.storage, compute=emission.compute
            ),
            arch=emission.arch,
            inputs=emission.inputs,
            outputs=emission.outputs,
            weights=loaded.weights,
            device=emission.device,
            library=emission.library,
            cpu_features=emission.cpu_features,
            compute_capability=emission.compute_capability,
            transform=loaded.transform.to_dict(),
            notes=(*self.notes(loaded, graph), *emission.notes),
            ledger=(*graph.ledger, *(entry.to_dict() for entry in emission.ledger)),
            filters=tuple(graph.filters),
            kernels=emission.kernels,
            versions=dict(toolchain()),
            extra={
                "scheme": graph.scheme,
                "layers": graph.layers,
                "kept_float": graph.kept_float,
                "calibration_images": graph.calibration_images,
                "training": graph.training,
                **emission.extra,
            },
        )

    def emission(self, request: EmissionRequest) -> Emission:
        """What the target's emitter makes; each brings packages that the others do without."""
        target = self.target
        if isinstance(target, Target):
            from gfcompile.compile.emitters.tvm import emit_plan

            return emit_plan(request, target, self.config.tuning_db)
        if target.emitter == "tflite":
            from gfcompile.compile.emitters.tflite import emit_tflite

            return emit_tflite(request, target, self.config.tflite)
        if target.emitter == "coreml":
            from gfcompile.compile.emitters.coreml import emit_coreml

            return emit_coreml(request, self.config.coreml)
        raise AssertionError(f"no emitter is called {target.emitter}")

    def notes(self, loaded: "_Loaded", graph: "Graph") -> list[str]:
        """What is not as the user might think."""
        config, target = self.config, self.target
        notes = []
        if loaded.is_random:
            notes.append(
                f"weights are {loaded.weights}: speed and size are real, classes mean nothing; "
                "give --checkpoint"
            )
        spec = loaded.spec
        if spec is not None and spec.parent is not None:
            parent = model_spec(spec.parent).resized(
                image_size=spec.image_size, num_classes=spec.num_classes
            )
            notes.append(note_on_gain(spec, parent, target, int8=self.precision == "int8"))
        if self.precision == "int8":
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

    def write_golden(
        self, graph: "Graph", golden: Golden, transform: Transform, folder: Path
    ) -> None:
        """A golden image, and the logits of it and its other views by the graph in ONNX Runtime."""
        from gfcompile.compile.graph import run

        place = folder / GOLDEN_FOLDER
        place.mkdir()
        image = golden.pixels[0][0]
        (place / "image.u8").write_bytes(image.tobytes())
        inputs = [normalize(view, transform) for view in views(image)]
        batches = in_batches(inputs, self.config.batch)
        logits = np.concatenate(run(graph.model, batches))[: len(inputs)].astype("<f4")
        (place / "logits.f32").write_bytes(logits[0].tobytes())
        (place / "views.f32").write_bytes(logits.tobytes())


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    module: "nn.Module"
    transform: Transform
    weights: str
    is_random: bool
    filters: tuple[tuple[int, int, int], ...] = ()
    float_layers: tuple[str, ...] = ()
    pruning: Pruning | None = None
    spec: ModelSpec | None = None  # of a model of the zoo


def _why_no_float16(target: Target) -> str:
    """What keeps a target's kernels from float16."""
    if target.gpu is not None:
        return f"gfcompile's kernels for the GPU ({target.gpu.arch}) compute in float32 or integers"
    if target.cpu.arch == "x86_64":
        return "on x86-64 only AVX512-FP16 computes in float16, which gfcompile has no kernels for"
    return f"this CPU ({target.cpu.mcpu}) has no float16 arithmetic"


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


def _golden(transform: Transform, batch: int) -> Golden:
    """The photos, and turned and mirrored ones where batches have room for more."""
    photos = [open_image(path) for path in stand_in_photos()[:GOLDEN_IMAGES]]
    seen = zip(*(views(crop(photo, transform)) for photo in photos), strict=True)
    looks = [view for of_each in seen for view in of_each]
    count = -(-GOLDEN_IMAGES // batch) * batch
    pixels = in_batches([np.stack(looks[:count])], batch)
    return Golden(pixels=pixels, inputs=[normalize(images, transform) for images in pixels])


def _read_labels(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file of labels")
    try:
        # With or without the byte order mark that Windows' editors write, which is of no name.
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not of UTF-8; save the labels as UTF-8 text, one line "
            "per class"
        ) from error
