"""Training, whatever is trained: batches, learning rate, averages, and a state to resume from."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gfcompile.quantize.data import Batch, Images
from gfcompile.quantize.distributed import Group
from gfcompile.quantize.train_config import LoopConfig
from gfcompile.quantize.training_state import TrainingState
from gfcompile.runtime.errors import CompileError, UserError

__all__ = [
    "EpochRecord",
    "HardLoss",
    "Loop",
    "ParameterGroup",
    "SilentTraining",
    "StepRecord",
    "Task",
    "TrainProgress",
    "accuracy",
    "deterministic",
    "divergence",
]

_LARGEST_GRADIENT = 1.0  # norm, over all parameters
_LEAST_RATE = 0.01  # of the learning rate, at the end of the cosine
_SAVE_SECONDS = 600.0  # within an epoch; at its end the state is saved anyway

HardLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A step: its number from 1 on, and the batch's loss and top-1 over all processes."""

    step: int
    epoch: int
    loss: float
    top1: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What an epoch came to; top-1 of the averaged weights on the validation images, if any."""

    epoch: int
    loss: float
    train_top1: float
    val_top1: float | None


class TrainProgress(Protocol):
    """Who is told how training goes."""

    def begin(self, *, steps: int, done: int) -> None:
        """Training starts, or goes on after `done` of its steps."""

    def step(self, record: StepRecord) -> None:
        """A step was made."""

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is over."""


class SilentTraining:
    """Tells nobody."""

    def begin(self, *, steps: int, done: int) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        pass

    def epoch(self, record: EpochRecord) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that are trained alike.

    Attributes:
        decay: whether weight decay is for them.
        rate: their part of the learning rate.
        since: the epoch, from 0 on, in which they begin to be trained.
    """

    parameters: list[nn.Parameter]
    decay: bool
    rate: float = 1.0
    since: int = 0


class Task(Protocol):
    """What is trained, and for what.

    Attributes:
        module: on the device of the group; of its parameters, those are trained that require
            gradients.
    """

    module: nn.Module

    def identity(self) -> dict[str, Any]:
        """What a state must have been made for to be resumed, besides options and data; JSON."""

    def groups(self) -> list[ParameterGroup]:
        """The parameters that are trained, each once, those without any included."""

    def begin_epoch(self, epoch: int) -> None:
        """An epoch starts; not called for one that is resumed within."""

    def outputs(self, forward: nn.Module, images: Tensor) -> Any:
        """What the loss is computed from; in mixed precision, if that is asked for.

        Args:
            forward: calls `module`, of which gradients are then averaged over all processes.
        """

    def loss(self, outputs: Any, hard_loss: HardLoss) -> tuple[Tensor, Tensor]:
        """The loss, and the logits (n, classes).

        Args:
            hard_loss: cross-entropy of logits and labels.
        """

    def evaluated(self) -> nn.Module:
        """The module as it is validated: images to logits."""


def accuracy(module: nn.Module, images: Images, group: Group, *, batch_size: int = 64) -> float:
    """Top-1 of the module, which is on the group's device, on images that the processes share.

    Raises:
        UserError: not one image can be read.
    """
    right = torch.zeros(2, dtype=torch.float64, device=group.device)
    with torch.no_grad():
        for batch in images.evaluate(batch_size, rank=group.rank, world=group.world):
            logits = module(torch.from_numpy(batch.images).to(group.device))
            hits = logits.argmax(1).cpu() == torch.from_numpy(batch.labels)
            right += right.new_tensor([int(hits.sum()), len(hits)])
    hit, seen = group.total(right).tolist()
    if seen == 0:
        raise UserError(f"{images.files.source}: not one image can be read")
    return float(hit / seen)


def divergence(logits: Tensor, taught: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the classes, summed over the last axis, mean over the first.

    Times T^2, so that its gradients do not shrink with the temperature T.
    """
    t = temperature
    ours, theirs = F.log_softmax(logits / t, dim=-1), F.log_softmax(taught / t, dim=-1)
    return t * t * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


class Loop:
    """A training on its way: where it stands, and one method per thing that it does.

    The same arguments give the same bits on the same machine, also if the training was killed and
    resumed in between.

    Args:
        images: to train on.
        validation: to report top-1 on; nothing is chosen by it.
        state_file: where the training state is kept, to resume from if it is there already.

    Raises:
        UserError: the processes cannot share a batch evenly.
    """

    def __init__(
        self,
        task: Task,
        images: Images,
        *,
        config: LoopConfig,
        group: Group,
        validation: Images | None = None,
        state_file: Path | None = None,
        progress: TrainProgress | None = None,
    ) -> None:
        if config.batch_size % group.world:
            raise UserError(
                f"--batch-size {config.batch_size} cannot be shared evenly by {group.world} "
                "processes"
            )
        self.task, self.images = task, images
        self.config, self.group = config, group
        self.validation = validation
        self.state_file = state_file
        self.progress = progress or SilentTraining()
        self.parameters = {n: p for n, p in task.module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.forward = group.wrap(task.module)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": chosen.parameters,
                    "weight_decay": config.weight_decay if chosen.decay else 0.0,
                    "rate": chosen.rate,
                    "since": chosen.since,
                }
                for chosen in task.groups()
            ],
            lr=config.lr,
            fused=True,
        )
        self.steps_per_epoch = images.steps(config.batch_size)
        self.total = config.epochs * self.steps_per_epoch
        self.step = 0
        self.sums = [0.0, 0.0]  # of loss and top-1, over the epoch so far
        self.history: list[EpochRecord] = []

    def run(self) -> None:
        """Goes on from the state file, if there is one, and trains until the end.

        Raises:
            UserError: the state is of another training, or the data cannot be used.
            CompileError: the loss is no longer finite.
        """
        with deterministic():
            self.resume()
            self.go()

    def report(self) -> dict[str, Any]:
        """What a checkpoint tells of its training, besides the options; JSON values."""
        return {
            "images": len(self.images.files),
            "passed_over": len(self.images.corrupt),
            "history": [asdict(record) for record in self.history],
        }

    def go(self) -> None:
        """Trains until the end."""
        config = self.config
        self.progress.begin(steps=self.total, done=self.step)
        for epoch in range(self.step // self.steps_per_epoch, config.epochs):
            first = self.step % self.steps_per_epoch
            if first == 0:
                self.task.begin_epoch(epoch)
            batches = self.images.train(
                epoch,
                config.batch_size,
                augment=config.augment,
                seed=config.seed,
                first=first,
                rank=self.group.rank,
                world=self.group.world,
            )
            saved = time.monotonic()
            for batch in batches:
                self.train_step(batch, epoch)
                in_epoch = self.step % self.steps_per_epoch > 0  # at its end comes the record first
                if in_epoch and time.monotonic() - saved > _SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
            loss, top1 = (total / self.steps_per_epoch for total in self.sums)
            record = EpochRecord(
                epoch=epoch + 1, loss=loss, train_top1=top1, val_top1=self.validate()
            )
            self.history.append(record)
            self.sums = [0.0, 0.0]
            self.save()
            self.progress.epoch(record)

    def train_step(self, batch: Batch, epoch: int) -> None:
        """One step on this process's share of a batch."""
        # Whatever the module may draw depends on the step, and the process, alone.
        torch.manual_seed((self.config.seed << 32) + (self.step << 8) + self.group.rank)
        rate = self._rate()
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate * parameters["rate"] if epoch >= parameters["since"] else 0.0
        images = torch.from_numpy(batch.images).to(self.group.device)
        labels = torch.from_numpy(batch.labels).to(self.group.device)
        share = self._mixup_share()
        partners = _partners(len(labels), images.device)
        if share < 1:
            images = share * images + (1 - share) * images[partners]
        with self._mixed_precision():
            outputs = self.task.outputs(self.forward, images)

        def hard_loss(logits: Tensor) -> Tensor:
            smoothing = self.config.label_smoothing
            loss = share * F.cross_entropy(logits, labels, label_smoothing=smoothing)
            if share < 1:
                other = F.cross_entropy(logits, labels[partners], label_smoothing=smoothing)
                loss = loss + (1 - share) * other
            return loss

        loss, logits = self.task.loss(outputs, hard_loss)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), _LARGEST_GRADIENT)
        hits = (logits.detach().argmax(1) == labels).float().mean()
        means = self.group.mean(torch.stack([loss.detach(), hits, norm]))
        if not torch.isfinite(means).all():
            raise CompileError(self._diverged(epoch))
        self.optimizer.step()
        self._follow()
        self.step += 1
        mean_loss, top1, _ = means.tolist()
        self.sums = [self.sums[0] + mean_loss, self.sums[1] + top1]
        self.progress.step(
            StepRecord(step=self.step, epoch=epoch + 1, loss=mean_loss, top1=top1, lr=rate)
        )

    def _rate(self) -> float:
        """The learning rate: a line up, half a cosine down."""
        warmup = self.config.warmup * self.total
        if self.step < warmup:
            return self.config.lr * (self.step + 1) / (warmup + 1)
        done = (self.step - warmup) / max(1.0, self.total - warmup)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.config.lr * (_LEAST_RATE + (1 - _LEAST_RATE) * cosine)

    def _mixup_share(self) -> float:
        """How much of itself an image keeps."""
        if self.config.mixup == 0:
            return 1.0
        rng = np.random.default_rng((self.config.seed, self.step))
        return float(rng.beta(self.config.mixup, self.config.mixup))

    def _follow(self) -> None:
        """Moves the average of weights; young averages follow faster."""
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - keep)

    def _mixed_precision(self) -> torch.autocast:
        device = self.group.device.type
        able = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast(device, torch.bfloat16, enabled=self.config.amp and able)

    def _diverged(self, epoch: int) -> str:
        kept = ""
        if self.state_file is not None and self.state_file.exists():
            kept = f"; the last good state is kept in {self.state_file}, to go on from"
        return (
            f"the loss or its gradient is no longer finite in step {self.step + 1} (epoch "
            f"{epoch + 1}); lower --lr, now {self.config.lr:g}{kept}"
        )

    def validate(self) -> float | None:
        """Top-1 of the averaged weights on the validation images."""
        if self.validation is None:
            return None
        with self.averaged():
            return accuracy(
                self.task.evaluated(),
                self.validation,
                self.group,
                batch_size=self.config.batch_size,
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights take the place of those that are being trained."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(own)

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def identity(self) -> dict[str, Any]:
        """What a state must have been made for to be resumed. Another --lr may go on from it."""
        return {
            **self.task.identity(),
            "config": {k: v for k, v in asdict(self.config).items() if k != "lr"},
            "data": self.images.files.fingerprint(),
        }

    def save(self) -> None:
        if self.state_file is None or not self.group.is_first:
            return
        TrainingState(
            identity=self.identity(),
            step=self.step,
            graph=self.task.module.state_dict(),
            average=self.average,
            optimizer=self.optimizer.state_dict(),
            sums=self.sums,
            history=[asdict(record) for record in self.history],
        ).write(self.state_file)

    def resume(self) -> None:
        """Goes on from the state file, if there is one."""
        if self.state_file is None:
            return
        if not self.state_file.exists():
            self.save()
            return
        state = TrainingState.read(self.state_file, self.group.device)
        state.check(self.identity(), self.state_file)
        self.task.module.load_state_dict(state.graph)
        self.average = state.average
        self.optimizer.load_state_dict(state.optimizer)
        self.step, self.sums = state.step, state.sums
        self.history = [EpochRecord(**record) for record in state.history]


def _partners(count: int, device: torch.device) -> Tensor:
    """For each image the one to mix with: its neighbour, so that it is in the same process."""
    index = torch.arange(count, device=device)
    return torch.clamp(index ^ 1, max=count - 1)


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels; torch's own random state is left as it was.

    New tensors are not filled with NaN, as torch does then: no kernel reads what none has written,
    and it takes a tenth of the time.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # its attribute is not declared
    fills = settings.fill_uninitialized_memory
    with torch.random.fork_rng():
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False
        try:
            yield
        finally:
            settings.fill_uninitialized_memory = fills
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
