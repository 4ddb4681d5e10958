"""What fine-tuning for pruning trains, and the loss of its papers (2106.02034, 2207.01580)."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gfcompile.compile.finetuning import PruningConfig
from gfcompile.compile.models.layers import set_stochastic_depth
from gfcompile.compile.models.predictor import TrainingOutput
from gfcompile.quantize.data import Images
from gfcompile.quantize.distributed import Group
from gfcompile.quantize.loop import HardLoss, Loop, ParameterGroup, TrainProgress, divergence
from gfcompile.quantize.training_state import fingerprint

__all__ = ["PruningTask", "Trained", "finetune", "ratio_loss", "token_loss"]

# As published, these keep the parent's values.
_KEPT = ("cls_token", "pos_embed")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A fine-tuned model.

    Attributes:
        state: its weights by name, on the CPU.
        report: how they were trained, JSON values.
    """

    state: Mapping[str, Tensor]
    report: Mapping[str, Any]


def finetune(
    student: nn.Module,
    teacher: nn.Module,
    images: Images,
    *,
    keep_ratios: tuple[float, ...],
    config: PruningConfig,
    group: Group,
    validation: Images | None = None,
    state_file: Path | None = None,
    progress: TrainProgress | None = None,
) -> Trained:
    """The student's weights, trained to keep `keep_ratios` of the patches as its teacher would do.

    The same arguments give the same bits on the same machine, also if the training was killed and
    resumed in between. Of several processes each draws decisions of its own.

    Args:
        student: as `load_student` gives it; left as it is.
        teacher: its parent, in eval mode; left as it is.
        keep_ratios: the share of all patches that each stage is to keep.
        validation, state_file: see `Loop`.

    Raises:
        UserError: options or data that cannot be used, or a state of another training.
        CompileError: the loss is no longer finite.
    """
    task = PruningTask(
        student, teacher, config=config, keep_ratios=keep_ratios, device=group.device
    )
    loop = Loop(
        task,
        images,
        config=config,
        group=group,
        validation=validation,
        state_file=state_file,
        progress=progress,
    )
    loop.run()
    with loop.averaged():
        state = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in task.module.state_dict().items()
        }
    return Trained(state=state, report={**asdict(config), **loop.report()})


class Outputs(NamedTuple):
    """What the loss is computed from: the student's, and the teacher's logits and tokens."""

    student: TrainingOutput
    taught_logits: Tensor
    taught_tokens: Tensor


class PruningTask:
    """A pruning model that learns to decide, and its parent, which teaches.

    Args: see `finetune`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        config: PruningConfig,
        keep_ratios: tuple[float, ...],
        device: torch.device,
    ) -> None:
        self.config, self.keep_ratios = config, keep_ratios
        self.module = copy.deepcopy(student).to(device).requires_grad_(True)
        self.teacher: Any = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
        for name in _KEPT:
            if hasattr(self.module, name):
                self.module.get_parameter(name).requires_grad_(False)
        set_stochastic_depth(self.module, config.depth_rate)
        self.start = fingerprint(self.module.state_dict())

    def identity(self) -> dict[str, Any]:
        """The weights that training starts from, and the shares to keep."""
        return {
            "weights": self.start,
            "teacher": fingerprint(self.teacher.state_dict()),
            "keep_ratios": list(self.keep_ratios),
        }

    def groups(self) -> list[ParameterGroup]:
        """What the parent has is trained more slowly, and later; weight decay is for matrices."""
        config = self.config
        inherited = self.teacher.state_dict().keys()
        since = round(config.own_since * config.epochs)
        groups = []
        for own in (True, False):
            for decay in (True, False):
                parameters = [
                    p
                    for name, p in self.module.named_parameters()
                    if p.requires_grad and (name in inherited) == own and (p.ndim > 1) == decay
                ]
                groups.append(
                    ParameterGroup(
                        parameters=parameters,
                        decay=decay,
                        rate=config.own_rate if own else 1.0,
                        since=since if own else 0,
                    )
                )
        return groups

    def begin_epoch(self, _epoch: int) -> None:
        """Nothing changes between epochs."""

    def outputs(self, forward: nn.Module, images: Tensor) -> Outputs:
        """The student's, all patches computed and drawn decisions masked, and the teacher's."""
        self.module.train()
        for child in self.module.modules():
            if isinstance(child, _BatchNorm):
                child.eval()  # the parent's statistics are those of the whole data
        student = forward(images)
        with torch.no_grad():
            logits, tokens = self.teacher.teach(images)
        return Outputs(student, logits, tokens)

    def loss(self, outputs: Outputs, hard_loss: HardLoss) -> tuple[Tensor, Tensor]:
        """The papers' loss."""
        config, student = self.config, outputs.student
        logits = student.logits.float()
        soft = divergence(logits, outputs.taught_logits.float())
        soft = soft + token_loss(
            student.tokens.float(), outputs.taught_tokens.float(), student.kept, config.token_loss
        )
        ratio = ratio_loss(student.decisions, self.keep_ratios)
        loss = hard_loss(logits) + config.ratio_weight * ratio + config.distill * soft
        return loss, logits

    def evaluated(self) -> nn.Module:
        """The module as it prunes."""
        return self.module.eval()


def ratio_loss(decisions: tuple[Tensor, ...], keep_ratios: tuple[float, ...]) -> Tensor:
    """Squared distance of the share of an image's patches that is kept, mean over all stages.

    Args:
        decisions: (n, patches) each, 1 where a patch is kept.
    """
    stages = [
        (decision.float().mean(1) - ratio).square().mean()
        for decision, ratio in zip(decisions, keep_ratios, strict=True)
    ]
    return torch.stack(stages).mean()


def token_loss(tokens: Tensor, taught: Tensor, kept: Tensor, kind: str) -> Tensor:
    """Distance of the kept tokens from the teacher's, mean over all of them.

    Args:
        tokens, taught: (n, tokens, channels).
        kept: (n, tokens), 1 for those that count.
        kind: "mse", mean over channels, or "kl" of tokens that are scores of classes.
    """
    # Not `tokens[kept]`: its shape would depend on the draw.
    count = kept.sum().clamp_min(1)
    if kind == "mse":
        distance = (tokens - taught).square().mean(-1)
    else:
        ours, theirs = tokens.log_softmax(-1), taught.log_softmax(-1)
        distance = (theirs.exp() * (theirs - ours)).sum(-1)
    return (distance * kept).sum() / count
