"""Quantization as a stage of its own: a model and labelled images to a quantized checkpoint."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfcompile.compile.models import load_model, model_spec
from gfcompile.compile.progress import Progress, SilentProgress
from gfcompile.compile.training_job import TrainingJob
from gfcompile.quantize import QuantScheme, TrainConfig, is_quantized
from gfcompile.quantize.scheme import AUTO, automatic_layers
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import imagenet_transform

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from gfcompile.compile.training_progress import ConsoleTraining
    from gfcompile.quantize import Calibrated
    from gfcompile.quantize.data import Images
    from gfcompile.quantize.sensitivity import Sensitivity

ANALYSED_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(TrainingJob):
    """What to quantize, and how.

    Attributes:
        checkpoint: the trained float weights.
        weight_bits: 8 or 4.
        group_size: of 4 bits, how many weights share a factor of their channel's scale; None for
            none.
        keep_float: layers that are not quantized, by name, or "auto:K" for the K that quantization
            alone hurts most.
        int8_filters: global filters that are computed in int8, as circular convolutions, by name,
            or "auto" for those that bear it.
    """

    checkpoint: Path | None = None
    weight_bits: int = 8
    group_size: int | None = None
    keep_float: tuple[str, ...] = ()
    int8_filters: tuple[str, ...] = ()
    training: TrainConfig = field(default_factory=TrainConfig)

    @property
    def path(self) -> Path:
        """Where the quantized checkpoint goes."""
        return self.output or Path(f"{self.model}-int{self.weight_bits}.safetensors")


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
    group_size: int | None,
    keep_float: tuple[str, ...],
    int8_filters: tuple[str, ...],
    pays: Callable[[int, int, int], bool],
    batch: int = 1,
) -> "Calibrated":
    """The module with the ranges that the images bring about; names as in `QuantizeConfig`.

    Args:
        images: inputs (1, 3, H, W).
        pays: whether a filter of (rows, columns, channels) takes the circular form; "auto" is for
            these alone.
        batch: images that the quantized module takes at once.
    """
    import torch

    from gfcompile.quantize import calibrate
    from gfcompile.quantize.sensitivity import choose, explain

    batches = [torch.from_numpy(image) for image in images]
    scheme = QuantScheme.with_weight_bits(
        weight_bits, group_size=group_size, keep_float=keep_float, int8_filters=int8_filters
    )
    scheme, results = choose(scheme, module, batches[:ANALYSED_IMAGES], pays=pays)
    calibrated = calibrate(module, batches, scheme, batch_size=batch)
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
    config.check_output(config.checkpoint)
    progress = progress or SilentProgress()
    with progress.stage("load model and data"):
        subject = _load(config, progress, module)
    from gfcompile.quantize.checkpoint import write_quantized
    from gfcompile.quantize.distributed import open_group
    from gfcompile.quantize.loop import accuracy
    from gfcompile.quantize.sensitivity import choose, explain
    from gfcompile.quantize.training import train

    results: tuple[Sensitivity, ...] = ()
    with open_group(config.device) as group:
        scheme = subject.scheme(config)
        if automatic_layers(config.keep_float) is not None or "auto" in config.int8_filters:
            with progress.stage("analyse the layers"):
                scheme, results = choose(scheme, subject.module, subject.sample())
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
                progress=config.listeners(console, group),
            )
        training = {
            **trained.training,
            "checkpoint": subject.weights,
            "keep_ratios": list(subject.keep_ratios),
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
    with progress.stage("analyse the layers"):
        return analyze(subject.module, subject.sample(), subject.scheme(config, chosen=False))


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is quantized, as it is compiled, and what it is trained on.

    Attributes:
        float_layers: what the model itself keeps in float.
        keep_ratios: shares of the patches that it keeps.
    """

    module: "nn.Module"
    weights: str
    images: "Images"
    validation: "Images | None"
    float_layers: tuple[str, ...]
    keep_ratios: tuple[float, ...]

    def scheme(self, config: QuantizeConfig, *, chosen: bool = True) -> QuantScheme:
        """The scheme asked for, with the layers that stay in float.

        Args:
            chosen: whether "auto" is among the names.
        """
        named = [name for name in config.keep_float if chosen or not name.startswith(AUTO)]
        return QuantScheme.with_weight_bits(
            config.weight_bits,
            group_size=config.group_size,
            keep_float=(*self.float_layers, *named),
            int8_filters=tuple(n for n in config.int8_filters if chosen or n != "auto"),
        )

    def sample(self) -> list[Any]:
        """Images to analyse with."""
        import torch

        return [
            torch.from_numpy(pixels).unsqueeze(0) for pixels in self.images.sample(ANALYSED_IMAGES)
        ]


def _load(config: QuantizeConfig, progress: Progress, module: "nn.Module | None") -> _Subject:
    from gfcompile.compile.prune import freeze

    # What it refuses, said before data are read.
    QuantScheme.with_weight_bits(
        config.weight_bits, group_size=config.group_size, keep_float=config.keep_float
    )
    float_layers: tuple[str, ...] = ()
    keep_ratios: tuple[float, ...] = ()
    if module is not None:
        if config.image_size is None or config.num_classes is None:
            raise UserError("a module of your own needs image_size and num_classes")
        weights, classes = "a module given by the caller", config.num_classes
        transform = imagenet_transform(config.image_size)
    else:
        model_spec(config.model, config.keep_ratio).resized(
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
            keep_ratio=config.keep_ratio,
        )
        module, weights, classes = loaded.module, loaded.weights, loaded.num_classes
        transform = loaded.transform
        float_layers, keep_ratios = loaded.spec.float_layers, loaded.spec.keep_ratios
    images, validation = config.read_data(transform, classes, progress)
    return _Subject(
        module=freeze(module),
        weights=weights,
        images=images,
        validation=validation,
        float_layers=float_layers,
        keep_ratios=keep_ratios,
    )
