"""Fine-tuning as a stage of its own: a trained parent and labelled images to a pruning model."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gfcompile.compile.models import LoadedModel, load_model, load_student, model_names, model_spec
from gfcompile.compile.progress import Progress, SilentProgress
from gfcompile.compile.training_job import TrainingJob
from gfcompile.quantize import is_quantized
from gfcompile.quantize.train_config import Bounds, LoopConfig
from gfcompile.runtime.errors import UserError

if TYPE_CHECKING:
    from gfcompile.compile.training_progress import ConsoleTraining

__all__ = [
    "FinetuneConfig",
    "Finetuned",
    "PruningConfig",
    "finetune_model",
    "published_training",
    "published_values",
]

_PUBLISHED_LR = 1e-3  # for batches of 1024, whatever the model
_METADATA = "gfcompile.finetuned"


@dataclass(frozen=True, kw_only=True)
class PruningConfig(LoopConfig):
    """How to train a model to drop patches; defaults as DynamicViT's authors train DeiT.

    Attributes:
        ratio_weight: in the loss, of the squared distance between the share of an image's patches
            that a stage keeps and the share that it should.
        distill: the same, of the distance from the parent's class probabilities, and again of that
            from its tokens.
        token_loss: "mse", or "kl" where a token is a score for each class.
        own_rate: the part of the learning rate that the parent's own weights have; predictors and
            cheap paths, which begin untrained, have all of it.
        own_since: the fraction of epochs after which these weights begin to be trained.
        depth_rate: of stochastic depth, in the last block.
    """

    epochs: int = 30
    warmup: float = 1 / 6
    weight_decay: float = 0.05
    ema: float = 0.9999
    ratio_weight: float = 2.0
    distill: float = 0.5
    token_loss: Literal["mse", "kl"] = "mse"
    own_rate: float = 0.01
    own_since: float = 1 / 6
    depth_rate: float = 0.0

    BOUNDS: ClassVar[Bounds] = {
        **LoopConfig.BOUNDS,
        "ratio_weight": (0, math.inf),
        "distill": (0, math.inf),
        "own_rate": (0, 1),
        "own_since": (0, 1),
        "depth_rate": (0, 0.99),
    }


_DEIT = PruningConfig()
_LVVIT = replace(_DEIT, token_loss="kl")
_PYRAMID = replace(
    _DEIT, epochs=120, ratio_weight=10.0, own_rate=0.2, own_since=1 / 24, depth_rate=0.2
)
# From https://github.com/raoyongming/DynamicViT: its README and the defaults of its main.py.
_PUBLISHED: Mapping[str, PruningConfig] = {
    "dynamicvit_deit_256": _DEIT,
    "dynamicvit_deit_s": _DEIT,
    "dynamicvit_deit_b": replace(_DEIT, ratio_weight=5.0, depth_rate=0.2),
    "dynamicvit_lvvit_s": _LVVIT,
    "dynamicvit_lvvit_m": _LVVIT,
    "convnext_t": _PYRAMID,
    "convnext_s": _PYRAMID,
    "convnext_b": replace(_PYRAMID, depth_rate=0.5),
    "swin_t": _PYRAMID,
    "swin_s": _PYRAMID,
    "swin_b": replace(_PYRAMID, depth_rate=0.5),
}


def published_training(model: str, **changes: Any) -> PruningConfig:
    """How the model was trained for its publication, with changes.

    The learning rate, unless it is among these, is the published one scaled to the batch.

    Raises:
        UserError: the model prunes nothing, or a change cannot be.
    """
    if not model_spec(model).prune_before:
        pruning = ", ".join(name for name in model_names() if model_spec(name).prune_before)
        raise UserError(f"{model} drops no patches; fine-tuning is for {pruning}")
    config = replace(_PUBLISHED.get(model, _DEIT), **changes)
    if "lr" not in changes:
        config = replace(config, lr=_PUBLISHED_LR * config.batch_size / 1024)
    return config


def published_values(option: str) -> Sequence[float]:
    """What an option of `PruningConfig` is for one published model or another, each once."""
    return sorted({getattr(config, option) for config in _PUBLISHED.values()})


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingJob):
    """What to fine-tune, and how.

    Attributes:
        teacher: the trained weights of the model's parent, which are what it starts from.
        training: see `published_training`.
    """

    teacher: Path
    training: PruningConfig

    @property
    def path(self) -> Path:
        """Where the checkpoint goes."""
        return self.output or Path(f"{self.model}-pruned.safetensors")


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """A checkpoint of a pruning model on the disk.

    Attributes:
        teacher_top1, top1: on the validation images, of the parent and of the model as it prunes;
            None without any.
    """

    path: Path
    teacher_top1: float | None
    top1: float | None


def finetune_model(
    config: FinetuneConfig,
    progress: Progress | None = None,
    console: "ConsoleTraining | None" = None,
) -> Finetuned:
    """Trains a pruning model from its parent, and writes a checkpoint of it.

    A training that was ended before it was over goes on where it was. Under torchrun all processes
    train together, and the first one writes.

    Args:
        console: shows the training.

    Raises:
        UserError: something in `config`, or the data, that cannot be.
        CompileError: training diverged.
    """
    progress = progress or SilentProgress()
    with progress.stage("load teacher and data"):
        teacher, student = _load(config)
        images, validation = config.read_data(student.transform, student.num_classes, progress)
    from gfcompile.compile.pruning_task import finetune
    from gfcompile.quantize.distributed import open_group
    from gfcompile.quantize.loop import accuracy

    with open_group(config.device) as group:
        teacher_top1 = None
        if validation is not None:
            with progress.stage("validate the teacher"):
                own = copy.deepcopy(teacher.module).to(group.device)
                teacher_top1 = accuracy(own, validation, group)
        with nullcontext() if console is None or not group.is_first else console.shown():
            trained = finetune(
                student.module,
                teacher.module,
                images,
                keep_ratios=student.spec.keep_ratios,
                config=config.training,
                group=group,
                validation=validation,
                state_file=config.state_path,
                progress=config.listeners(console, group),
            )
        training = {
            **trained.report,
            "model": config.model,
            "teacher": teacher.weights,
            "keep_ratios": list(student.spec.keep_ratios),
            "processes": group.world,
            "teacher_top1": teacher_top1,
        }
        if group.is_first:
            with progress.stage("write the checkpoint"):
                _write(trained.state, training, config.path)
                config.state_path.unlink(missing_ok=True)
    history = training["history"]
    return Finetuned(
        path=config.path,
        teacher_top1=teacher_top1,
        top1=history[-1]["val_top1"] if history else None,
    )


def _load(config: FinetuneConfig) -> tuple[LoadedModel, LoadedModel]:
    """The parent, and the pruning model that starts as it."""
    spec = model_spec(config.model, config.keep_ratio)
    if spec.parent is None:
        raise UserError(f"{config.model} drops no patches, so there is nothing to fine-tune")
    config.check_output(config.teacher)
    if config.teacher.is_file() and is_quantized(config.teacher):
        raise UserError(
            f"{config.teacher}: is quantized; fine-tune from the float weights, and quantize then"
        )
    teacher = load_model(
        spec.parent,
        checkpoint=config.teacher,
        image_size=config.image_size,
        num_classes=config.num_classes,
    )
    student = load_student(
        config.model, teacher, keep_ratio=config.keep_ratio, seed=config.training.seed
    )
    return teacher, student


def _write(state: Mapping[str, Any], training: Mapping[str, Any], path: Path) -> None:
    import safetensors.torch

    from gfcompile.quantize.files import write_atomically

    metadata = {_METADATA: json.dumps(training)}
    write_atomically(
        path, lambda temporary: safetensors.torch.save_file(dict(state), temporary, metadata)
    )
