"""Quantization-aware training: a calibrated model learns to live with its own rounding.

It starts from calibrated ranges. For the first part of training they are calibrated anew at the
start of each epoch, as the weights move; then they are frozen, or, with learned step sizes, they
are trained from the start. The float model teaches: its logits are the better part of the target.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gfcompile.quantize._pt2e import quiet
from gfcompile.quantize.calibration import check_images
from gfcompile.quantize.checkpoint import QuantizedCheckpoint, settle_as
from gfcompile.quantize.data import Images
from gfcompile.quantize.distributed import Group
from gfcompile.quantize.loop import (
    HardLoss,
    Loop,
    ParameterGroup,
    TrainProgress,
    deterministic,
    divergence,
)
from gfcompile.quantize.prepared import one_thread, prepare, prepare_training
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.quantize.train_config import TrainConfig
from gfcompile.quantize.training_state import fingerprint

__all__ = ["train"]

# The logarithm of a learned scale has a way to go, several units where it must leave an outlier
# behind; weights move by much less than themselves.
_SCALE_RATE = 10.0


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
    sample = images.sample(config.calibration_images)
    check_images(module, [torch.from_numpy(np.stack(sample))] if sample else [])
    with deterministic(), quiet():
        task = _QuantizedTraining(module, sample, config=config, scheme=scheme, group=group)
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
            checkpoint = task.result()
    return replace(checkpoint, training={**checkpoint.training, **loop.report()})


class _QuantizedTraining:
    """The module under fake quantization, on its way to the integers that it will have."""

    def __init__(
        self,
        module: nn.Module,
        sample: Sequence[Any],
        *,
        config: TrainConfig,
        scheme: QuantScheme,
        group: Group,
    ) -> None:
        self.source = module
        self.config, self.group = config, group
        self.sample = [torch.from_numpy(pixels) for pixels in sample]
        self.teacher = copy.deepcopy(module).to(group.device)
        self.teacher.requires_grad_(False)
        student = copy.deepcopy(module).to(group.device).requires_grad_(True)
        example = self._on_device([self.sample[0], self.sample[-1]])
        self.prepared = prepare_training(student, example, scheme, learn_scales=config.learn_scales)
        self.module: nn.Module = self.prepared.graph
        self._leave_unreached(example)
        self.settle_ranges()

    def identity(self) -> dict[str, Any]:
        """The scheme, and the weights that training starts from."""
        return {
            "scheme": dict(self.prepared.scheme.to_dict()),
            "weights": fingerprint(self.source.state_dict()),
        }

    def groups(self) -> list[ParameterGroup]:
        """Weight decay is for matrices and filters; scales have a rate of their own."""
        trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        scales = [p for name, p in trained.items() if name.endswith(".growth")]
        others = [p for name, p in trained.items() if not name.endswith(".growth")]
        return [
            ParameterGroup(parameters=[p for p in others if p.ndim > 1], decay=True),
            ParameterGroup(parameters=[p for p in others if p.ndim <= 1], decay=False),
            ParameterGroup(parameters=scales, decay=False, rate=_SCALE_RATE),
        ]

    def begin_epoch(self, epoch: int) -> None:
        """Ranges follow the weights for a while."""
        config = self.config
        following = not config.learn_scales and epoch < config.range_epochs * config.epochs
        if epoch > 0 and following:  # for the first epoch they were settled already
            self.settle_ranges()

    def settle_ranges(self) -> None:
        """Calibrates the ranges for the weights as they are now, and freezes them."""
        fakes = self.prepared.fake_quants()
        for fake in fakes:
            fake.watch()
        with torch.no_grad():
            for first in range(0, len(self.sample), self.config.batch_size):
                self.module(self._on_device(self.sample[first : first + self.config.batch_size]))
        self.prepared.settle()
        for fake in fakes:
            fake.freeze(self.group.device)
            shared = (fake.scale, fake.zero_point, getattr(fake, "factors", None))
            self.group.agree(tensor for tensor in shared if tensor is not None)

    def outputs(self, forward: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the module and of its teacher."""
        logits = forward(images).float()
        with torch.no_grad():
            return logits, self.teacher(images).float()

    def loss(self, outputs: tuple[Tensor, Tensor], hard_loss: HardLoss) -> tuple[Tensor, Tensor]:
        """Part cross-entropy, part distance from the teacher."""
        (logits, taught), config = outputs, self.config
        soft = divergence(logits, taught, config.temperature)
        return (1 - config.distill) * hard_loss(logits) + config.distill * soft, logits

    def evaluated(self) -> nn.Module:
        """The same module: it rounds and has no modes."""
        return self.module

    def _leave_unreached(self, example: Tensor) -> None:
        """What no gradient reaches stays as it is.

        Such is a score predictor: its choice of patches has no gradient. Processes that train
        together would wait for one.
        """
        torch.autograd.backward(self.module(example).sum())
        own = {name for name, _ in self.source.named_parameters()}
        for name, parameter in self.module.named_parameters():
            if name in own and parameter.grad is None:
                parameter.requires_grad_(False)
            parameter.grad = None

    def _on_device(self, images: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(images)).to(self.group.device)

    def result(self) -> QuantizedCheckpoint:
        """The weights as they are now, rounded, and what they were rounded to."""
        watched = self.prepared
        ranges = [watched.activation_fake_quant(layer).trained() for layer in watched.layers]
        trained = {
            watched.constant_name(layer, 1): watched.weight_fake_quant(layer).trained()
            for layer in watched.weighted
        }
        scales = {name: found for name, (found, _) in trained.items()}
        factors = {name: found for name, (_, found) in trained.items() if found is not None}
        weights = {name: p.detach().cpu().clone() for name, p in self.module.named_parameters()}
        state = {
            name: weights.get(name, value.detach().cpu().clone())
            for name, value in self.source.state_dict().items()
        }
        own = copy.deepcopy(self.source).cpu()
        own.load_state_dict(state)
        scheme = self.prepared.scheme
        with torch.no_grad(), one_thread():
            prepared = prepare(own, self.sample[0].unsqueeze(0), scheme)
            for image in self.sample:
                prepared.graph(image.unsqueeze(0))
            settle_as(prepared, ranges, scales, factors)
            prepared.make_room_for_biases()
            state |= prepared.rounded_filters()
            records = prepared.records()
            for layer in prepared.weighted:
                name = prepared.constant_name(layer, 1)
                final = prepared.weight(layer).scales
                assert final is not None
                scales[name] = final
                state[name] = torch.from_numpy(prepared.rounded_weight(layer))
        return QuantizedCheckpoint(
            state=state,
            scales=scales,
            factors=factors,
            scheme=scheme,
            layers=records,
            kept_float=prepared.kept_float,
            images=len(self.sample),
            training=asdict(self.config),
        )
