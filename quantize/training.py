"""Quantization-aware training: a calibrated model learns to live with its own rounding.

It starts from calibrated ranges. For the first part of training they are calibrated anew at the
start of each epoch, as the weights move; then they are frozen, or, with learned step sizes, they
are trained from the start. The float model teaches: its logits are the better part of the target.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gfcompile.quantize._pt2e import quiet
from gfcompile.quantize.calibration import check_images
from gfcompile.quantize.checkpoint import QuantizedCheckpoint, settle_as
from gfcompile.quantize.data import Batch, Images
from gfcompile.quantize.distributed import Group
from gfcompile.quantize.prepared import one_thread, prepare, prepare_training
from gfcompile.quantize.qparams import dequantize, quantize
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.quantize.train_config import TrainConfig
from gfcompile.quantize.training_state import TrainingState, fingerprint
from gfcompile.runtime.errors import CompileError, UserError

__all__ = ["EpochRecord", "SilentTraining", "StepRecord", "TrainProgress", "accuracy", "train"]

_LARGEST_GRADIENT = 1.0  # norm, over all parameters
_LEAST_RATE = 0.01  # of the learning rate, at the end of the cosine
# The logarithm of a learned scale has a way to go, several units where it must leave an outlier
# behind; weights move by much less than themselves.
_SCALE_RATE = 10.0
_SAVE_SECONDS = 600.0  # within an epoch; at its end the state is saved anyway


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


def train(
    module: nn.Module,
    images: Images,
    *,
    config: TrainConfig,
    scheme: QuantScheme,
    group: Group,
    validation: Images | None = None,
    state_file: Path | None = None,
    progress: TrainProgress | None = None,
) -> QuantizedCheckpoint:
    """The module's weights, trained under fake quantization, with their scales.

    The same arguments give the same bits on the same machine, also if the training was killed and
    resumed in between, and to float rounding whatever the number of processes.

    Args:
        module: float, in eval mode; it is the teacher as well, and left as it is.
        images: to train on.
        validation: to report top-1 on; nothing is chosen by it.
        state_file: where the training state is kept, to resume from if it is there already.

    Raises:
        UserError: options or data that cannot be used, or a state of another training.
        CompileError: the module cannot be prepared, or the loss is no longer finite.
    """
    if config.batch_size % group.world:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be shared evenly by {group.world} processes"
        )
    sample = images.sample(config.calibration_images)
    check_images(module, [torch.from_numpy(np.stack(sample))] if sample else [])
    with _deterministic(), quiet():
        run = _Training(module, images, sample, config=config, scheme=scheme, group=group)
        run.validation = validation
        run.state_file = state_file
        run.progress = progress or SilentTraining()
        run.resume()
        run.go()
        return run.result()


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


class _Training:
    """A training on its way: the model, where it stands, and one method per thing that it does."""

    def __init__(
        self,
        module: nn.Module,
        images: Images,
        sample: Sequence[Any],
        *,
        config: TrainConfig,
        scheme: QuantScheme,
        group: Group,
    ) -> None:
        self.module, self.images = module, images
        self.config, self.group = config, group
        self.validation: Images | None = None
        self.state_file: Path | None = None
        self.progress: TrainProgress = SilentTraining()
        self.sample = [torch.from_numpy(pixels) for pixels in sample]
        self.teacher = copy.deepcopy(module).to(group.device)
        self.teacher.requires_grad_(False)
        student = copy.deepcopy(module).to(group.device).requires_grad_(True)
        example = torch.stack([self.sample[0], self.sample[-1]]).to(group.device)
        self.prepared = prepare_training(student, example, scheme, learn_scales=config.learn_scales)
        self.graph = self.prepared.graph
        self.settle_ranges()
        self.parameters = dict(self.graph.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.wrapped = group.wrap(self.graph)
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=config.lr)
        self.steps_per_epoch = images.steps(config.batch_size)
        self.total = config.epochs * self.steps_per_epoch
        self.step = 0
        self.sums = [0.0, 0.0]  # of loss and top-1, over the epoch so far
        self.history: list[EpochRecord] = []

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Weight decay is for matrices and filters; scales have a rate of their own."""
        scales = [p for name, p in self.parameters.items() if name.endswith(".growth")]
        others = [p for name, p in self.parameters.items() if not name.endswith(".growth")]
        return [
            {
                "params": [p for p in others if p.ndim > 1],
                "weight_decay": self.config.weight_decay,
                "rate": 1.0,
            },
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "rate": 1.0},
            {"params": scales, "weight_decay": 0.0, "rate": _SCALE_RATE},
        ]

    def go(self) -> None:
        """Trains until the end."""
        config = self.config
        self.progress.begin(steps=self.total, done=self.step)
        for epoch in range(self.step // self.steps_per_epoch, config.epochs):
            first = self.step % self.steps_per_epoch
            if first == 0 and self.step > 0 and self._ranges_follow(epoch):
                self.settle_ranges()
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

    def _ranges_follow(self, epoch: int) -> bool:
        config = self.config
        return not config.learn_scales and epoch < config.range_epochs * config.epochs

    def settle_ranges(self) -> None:
        """Calibrates the ranges for the weights as they are now, and freezes them."""
        fakes = self.prepared.fake_quants()
        for fake in fakes:
            fake.watch()
        with torch.no_grad():
            for first in range(0, len(self.sample), self.config.batch_size):
                self.graph(self._on_device(self.sample[first : first + self.config.batch_size]))
        self.prepared.settle()
        for fake in fakes:
            fake.freeze(self.group.device)
            self.group.agree([fake.scale, fake.zero_point])

    def train_step(self, batch: Batch, epoch: int) -> None:
        """One step on this process's share of a batch."""
        config = self.config
        # Whatever the module may draw depends on the step alone.
        torch.manual_seed((config.seed << 32) + (self.step << 8) + self.group.rank)
        rate = self._rate()
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate * parameters["rate"]
        images = torch.from_numpy(batch.images).to(self.group.device)
        labels = torch.from_numpy(batch.labels).to(self.group.device)
        share = self._mixup_share()
        partners = _partners(len(labels), images.device)
        if share < 1:
            images = share * images + (1 - share) * images[partners]
        with self._mixed_precision():
            logits = self.wrapped(images).float()
            with torch.no_grad():
                taught = self.teacher(images).float()
        loss = share * self._hard_loss(logits, labels)
        if share < 1:
            loss = loss + (1 - share) * self._hard_loss(logits, labels[partners])
        loss = (1 - config.distill) * loss + config.distill * self._soft_loss(logits, taught)
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

    def _hard_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    def _soft_loss(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Kullback-Leibler divergence, times T^2 so that its gradients do not shrink with T."""
        t = self.config.temperature
        ours, theirs = F.log_softmax(logits / t, dim=1), F.log_softmax(taught / t, dim=1)
        return t * t * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)

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
        """Top-1 of the averaged weights, rounded, on the validation images."""
        if self.validation is None:
            return None
        with self.averaged():
            return accuracy(
                self.graph, self.validation, self.group, batch_size=self.config.batch_size
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

    def _on_device(self, images: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(images)).to(self.group.device)

    # The state

    def identity(self) -> dict[str, Any]:
        """What a state must have been made for to be resumed. Another --lr may go on from it."""
        return {
            "config": {k: v for k, v in asdict(self.config).items() if k != "lr"},
            "scheme": dict(self.prepared.scheme.to_dict()),
            "weights": fingerprint(self.module.state_dict()),
            "data": self.images.files.fingerprint(),
        }

    def save(self) -> None:
        if self.state_file is None or not self.group.is_first:
            return
        TrainingState(
            identity=self.identity(),
            step=self.step,
            graph=self.graph.state_dict(),
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
        self.graph.load_state_dict(state.graph)
        self.average = state.average
        self.optimizer.load_state_dict(state.optimizer)
        self.step, self.sums = state.step, state.sums
        self.history = [EpochRecord(**record) for record in state.history]

    # The result

    def result(self) -> QuantizedCheckpoint:
        """The averaged weights, rounded, and what they were rounded to."""
        watched = self.prepared
        with self.averaged():
            ranges = [watched.activation_fake_quant(layer).trained() for layer in watched.layers]
            scales = {
                watched.constant_name(layer, 1): watched.weight_fake_quant(layer).trained()
                for layer in watched.weighted
            }
            weights = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        state = {
            name: weights.get(name, value.detach().cpu().clone())
            for name, value in self.module.state_dict().items()
        }
        own = copy.deepcopy(self.module).cpu()
        own.load_state_dict(state)
        scheme = self.prepared.scheme
        with torch.no_grad(), one_thread():
            prepared = prepare(own, self.sample[0].unsqueeze(0), scheme)
            for image in self.sample:
                prepared.graph(image.unsqueeze(0))
            settle_as(prepared, ranges, scales)
            prepared.make_room_for_biases()
            records = prepared.records()
            for layer in prepared.weighted:
                name = prepared.constant_name(layer, 1)
                final = prepared.weight(layer).scales
                assert final is not None
                scales[name] = final
                values = prepared.constant(layer, 1)
                column = final.reshape(-1, *[1] * (values.ndim - 1))
                rounded = dequantize(quantize(values, column, 0, scheme.weight), column, 0)
                state[name] = torch.from_numpy(rounded)
        return QuantizedCheckpoint(
            state=state,
            scales=scales,
            scheme=scheme,
            layers=records,
            kept_float=prepared.kept_float,
            images=len(self.sample),
            training={
                **asdict(self.config),
                "images": len(self.images.files),
                "passed_over": len(self.images.corrupt),
                "history": [asdict(record) for record in self.history],
            },
        )


def _partners(count: int, device: torch.device) -> Tensor:
    """For each image the one to mix with: its neighbour, so that it is in the same process."""
    index = torch.arange(count, device=device)
    return torch.clamp(index ^ 1, max=count - 1)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic kernels; torch's own random state is left as it was."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng():
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
