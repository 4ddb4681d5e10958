"""Quantization as a stage of its own: a model and labelled images to a quantized checkpoint."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfcompile.compile.models import load_model, model_spec
from gfcompile.compile.progress import Progress, SilentProgress
from gfcompile.quantize import QuantScheme, TrainConfig, is_quantized
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import Transform, imagenet_transform

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from gfcompile.compile.training_progress import ConsoleTraining
    from gfcompile.quantize import Calibrated
    from gfcompile.quantize.data import Images, LabelledImages
    from gfcompile.quantize.distributed import Group
    from gfcompile.quantize.sensitivity import Sensitivity

ANALYSED_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What to quantize, and how.

    Attributes:
        model: a name of the zoo, or, for a module of one's own, any name.
        checkpoint: the trained float weights.
        train_data: a folder with a folder of images for each class, or a CSV of paths and labels.
        val_data: the same, to report top-1 on.
        output: the quantized checkpoint; None for one named after model and bits.
        image_size, num_classes: None for those of the checkpoint.
        weight_bits: 8 or 4.
        keep_float: layers that are not quantized, by name, or "auto:K" for the K that quantization
            alone hurts most.
        device: "cpu", "cuda", or "auto".
        max_corrupt: how many unreadable images are passed over before it is an error.
        threads: how many read images.
        tensorboard: a folder for a log.
    """

    model: str
    checkpoint: Path | None = None
    train_data: Path
    val_data: Path | None = None
    output: Path | None = None
    image_size: int | None = None
    num_classes: int | None = None
    weight_bits: int = 8
    keep_float: tuple[str, ...] = ()
    training: TrainConfig = field(default_factory=TrainConfig)
    device: str = "auto"
    max_corrupt: int = 10
    threads: int = 4
    tensorboard: Path | None = None

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme.with_weight_bits(self.weight_bits, keep_float=self.keep_float)

    @property
    def path(self) -> Path:
        """Where the quantized checkpoint goes."""
        return self.output or Path(f"{self.model}-int{self.weight_bits}.safetensors")

    @property
    def state_path(self) -> Path:
        """Where the training is resumed from, until it is over."""
        return self.path.with_name(f"{self.path.name}.training")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized checkpoint on the disk.

    Attributes:
        float_top1, top1: on the validation images, before and after; None without any.
        kept_float: the layers that were left in float, and why.
    """

    path: Path
    float_top1: float | None
    top1: float | None
    kept_float: Sequence[tuple[str, str]]


def calibrate_model(
    module: "nn.Module",
    images: "Sequence[npt.NDArray[np.float32]]",
    *,
    weight_bits: int,
    keep_float: tuple[str, ...],
) -> "Calibrated":
    """The module with the ranges that the images bring about, `keep_float` as in `QuantizeConfig`.

    Args:
        images: inputs (1, 3, H, W).
    """
    import torch

    from gfcompile.quantize import calibrate
    from gfcompile.quantize.sensitivity import choose_float, explain

    batches = [torch.from_numpy(image) for image in images]
    scheme = QuantScheme.with_weight_bits(weight_bits, keep_float=keep_float)
    scheme, results = choose_float(scheme, module, batches[:ANALYSED_IMAGES])
    calibrated = calibrate(module, batches, scheme)
    return replace(calibrated, kept_float=explain(calibrated.kept_float, results))


def quantize_model(
    config: QuantizeConfig,
    progress: Progress | None = None,
    console: "ConsoleTraining | None" = None,
    *,
    module: "nn.Module | None" = None,
) -> Quantized:
    """Trains what `config` says under fake quantization, and writes a quantized checkpoint.

    A training that was ended before it was over goes on where it was. Under torchrun all processes
    train together, and the first one writes.

    Args:
        console: shows the training.
        module: a float module of your own in place of a model of the zoo; `config.image_size` and
            `config.num_classes` are then needed.

    Raises:
        UserError: something in `config`, or the data, that cannot be.
        CompileError: the model cannot be quantized, or training diverged.
    """
    progress = progress or SilentProgress()
    with progress.stage("load model and data"):
        subject = _load(config, progress, module)
    from gfcompile.quantize.checkpoint import write_quantized
    from gfcompile.quantize.distributed import open_group
    from gfcompile.quantize.sensitivity import choose_float, explain
    from gfcompile.quantize.training import accuracy, train

    results: tuple[Sensitivity, ...] = ()
    with open_group(config.device) as group:
        scheme = config.scheme
        if any(name.startswith("auto:") for name in config.keep_float):
            with progress.stage("analyse the layers"):
                scheme, results = choose_float(scheme, subject.module, subject.sample())
        float_top1 = None
        if subject.validation is not None:
            with progress.stage("validate the float model"):
                own = copy.deepcopy(subject.module).to(group.device)
                float_top1 = accuracy(own, subject.validation, group)
        with nullcontext() if console is None or not group.is_first else console.shown():
            trained = train(
                subject.module,
                subject.images,
                config=config.training,
                scheme=scheme,
                group=group,
                validation=subject.validation,
                state_file=config.state_path,
                progress=_listeners(config, console, group),
            )
        training = {
            **trained.training,
            "checkpoint": subject.weights,
            "processes": group.world,
            "float_top1": float_top1,
            "sensitivity": [vars(result) for result in results],
        }
        trained = replace(
            trained, training=training, kept_float=explain(trained.kept_float, results)
        )
        if group.is_first:
            with progress.stage("write the checkpoint"):
                write_quantized(trained, config.path)
                config.state_path.unlink(missing_ok=True)
    history = training["history"]
    return Quantized(
        path=config.path,
        float_top1=float_top1,
        top1=history[-1]["val_top1"] if history else None,
        kept_float=[(layer.name, layer.reason) for layer in trained.kept_float],
    )


def analyze_model(
    config: QuantizeConfig,
    progress: Progress | None = None,
    *,
    module: "nn.Module | None" = None,
) -> "tuple[Sensitivity, ...]":
    """What quantizing each layer alone costs, over some of the training images.

    Raises:
        UserError, CompileError: see `quantize_model`.
    """
    from gfcompile.quantize.sensitivity import analyze

    progress = progress or SilentProgress()
    with progress.stage("load model and data"):
        subject = _load(config, progress, module)
    named = tuple(name for name in config.keep_float if not name.startswith("auto:"))
    scheme = QuantScheme.with_weight_bits(config.weight_bits, keep_float=named)
    with progress.stage("analyse the layers"):
        return analyze(subject.module, subject.sample(), scheme)


@dataclass(frozen=True, kw_only=True)
class _Subject:
    module: "nn.Module"
    weights: str
    images: "Images"
    validation: "Images | None"

    def sample(self) -> list[Any]:
        """Images to analyse with."""
        import torch

        return [
            torch.from_numpy(pixels).unsqueeze(0) for pixels in self.images.sample(ANALYSED_IMAGES)
        ]


def _load(config: QuantizeConfig, progress: Progress, module: "nn.Module | None") -> _Subject:
    from gfcompile.quantize.data import read_images

    if module is not None:
        if config.image_size is None or config.num_classes is None:
            raise UserError("a module of your own needs image_size and num_classes")
        weights, classes = "a module given by the caller", config.num_classes
        transform = imagenet_transform(config.image_size)
    else:
        model_spec(config.model).resized(
            image_size=config.image_size, num_classes=config.num_classes
        )
        if config.checkpoint is None:
            raise UserError(
                "training starts from trained weights: give --checkpoint with those of the float "
                "model"
            )
        if is_quantized(config.checkpoint):
            raise UserError(
                f"{config.checkpoint}: is quantized already; give the float weights, or leave out "
                "--train-data to compile it as it is"
            )
        loaded = load_model(
            config.model,
            checkpoint=config.checkpoint,
            image_size=config.image_size,
            num_classes=config.num_classes,
        )
        module, weights, classes = loaded.module, loaded.weights, loaded.num_classes
        transform = loaded.transform
    files = read_images(config.train_data, classes=classes)
    others = None
    if config.val_data is not None:
        others = read_images(config.val_data, classes=classes, names=files.classes)
    return _Subject(
        module=module.eval(),
        weights=weights,
        images=_images(files, transform, config, progress),
        validation=None if others is None else _images(others, transform, config, progress),
    )


def _images(
    files: "LabelledImages", transform: Transform, config: QuantizeConfig, progress: Progress
) -> "Images":
    from gfcompile.quantize.data import Images

    return Images(
        files=files,
        transform=transform,
        max_corrupt=config.max_corrupt,
        on_corrupt=progress.note,
        threads=config.threads,
    )


def _listeners(config: QuantizeConfig, console: "ConsoleTraining | None", group: "Group") -> Any:
    from gfcompile.compile.training_progress import Several, TensorBoardLog

    listeners: list[Any] = []
    if group.is_first:
        listeners += [] if console is None else [console]
        listeners += [] if config.tensorboard is None else [TensorBoardLog(config.tensorboard)]
    return Several(listeners)
