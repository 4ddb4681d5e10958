"""Fake quantization for training: rounds as the device will, and lets gradients through."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gfcompile.quantize.observers import ActivationObserver, FixedObserver, WeightObserver
from gfcompile.quantize.qparams import Factors, Float32Array, QParams
from gfcompile.quantize.scheme import RangeRule, TensorScheme

__all__ = ["ActivationFakeQuant", "BiasFakeQuant", "FixedFakeQuant", "WeightFakeQuant"]


class ActivationFakeQuant(ActivationObserver):
    """An observer that, once frozen, rounds to the parameters that it settled on.

    With `learn` the scale is trained: learned step sizes (arXiv:1902.08153), in the logarithm of
    the scale, as Adam's steps do not shrink with what they change. The zero point stays.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, scheme: TensorScheme, rule: RangeRule, *, learn: bool = False, **_spec: object
    ) -> None:
        super().__init__(scheme, rule)
        self.frozen = False
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.growth = nn.Parameter(torch.zeros(1)) if learn else None

    def forward(self, x: Tensor) -> Tensor:
        """x itself, counted; once frozen, x rounded."""
        if not self.frozen:
            watched: Tensor = super().forward(x)
            return watched
        low, high = self.scheme.low, self.scheme.high
        if self.growth is None:
            return torch.fake_quantize_per_tensor_affine(
                x.float(), self.scale, self.zero_point, low, high
            )
        return _learned(x.float(), self.step(), low - self.zero_point, high - self.zero_point)

    def step(self) -> Tensor:
        """The scale as it is now: (1,)."""
        return self.scale if self.growth is None else self.scale * self.growth.exp()

    def watch(self) -> None:
        """Watches, from now on, and forgets what it saw before."""
        self.forget()
        self.frozen = False

    def freeze(self, device: torch.device) -> None:
        """Rounds, from now on, to what it settled on."""
        scale, zero_point = self.calculate_qparams()
        self.scale = scale.to(device)
        self.zero_point = zero_point.to(device, torch.int32)
        self.frozen = True

    def trained(self) -> QParams:
        """What it rounds to."""
        return QParams(self.step().item(), int(self.zero_point.item()))


class FixedFakeQuant(FixedObserver):
    """Rounds to its parameters, which nobody has to watch for."""

    def forward(self, x: Tensor) -> Tensor:
        """x rounded."""
        scale, zero_point = self.params.scale, self.params.zero_point
        return torch.fake_quantize_per_tensor_affine(
            x.float(), scale, zero_point, self.scheme.low, self.scheme.high
        )


class WeightFakeQuant(WeightObserver):
    """The same for a weight, channel by channel."""

    scale: Tensor
    zero_point: Tensor
    factors: Tensor | None

    def __init__(
        self, scheme: TensorScheme, rule: RangeRule, *, learn: bool = False, **_spec: object
    ) -> None:
        super().__init__(scheme, rule)
        self.frozen = False
        self.learn = learn
        # Theirs is a value per channel, so they come with the first weight.
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)
        self.register_buffer("factors", None)
        self.growth: nn.Parameter | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight itself; once frozen, the weight rounded."""
        if not self.frozen:
            watched: Tensor = super().forward(weight)
            return watched
        low, high = self.scheme.low, self.scheme.high
        if self.growth is None and self.factors is None:
            return torch.fake_quantize_per_channel_affine(
                weight.float(), self.scale, self.zero_point, self.ch_axis, low, high
            )
        shape = [1] * weight.ndim
        shape[self.ch_axis] = -1
        steps = self.step().reshape(shape)
        if self.factors is not None:
            assert self.scheme.group_size is not None
            spread = self.factors.repeat_interleave(self.scheme.group_size, dim=1)
            steps = steps * spread[:, : weight[0].numel()].reshape(weight.shape)
        bounds = self.scale.new_tensor([low, high])
        return _learned(weight.float(), steps, bounds[0], bounds[1])

    def step(self) -> Tensor:
        """The scales as they are now: (channels,)."""
        return self.scale if self.growth is None else self.scale * self.growth.exp()

    def watch(self) -> None:
        """Takes the scales anew from the next weight."""
        self.forget()
        self.frozen = False

    def freeze(self, device: torch.device) -> None:
        """Rounds, from now on, to the scales that it has."""
        scale, zero_point = self.calculate_qparams()
        self.scale = scale.to(device)
        self.zero_point = zero_point.to(device, torch.int32)
        if self.chosen_factors is not None:
            self.factors = torch.from_numpy(self.chosen_factors).to(device)
        if self.learn and self.growth is None:
            self.growth = nn.Parameter(torch.zeros_like(self.scale))
        self.frozen = True

    def trained(self) -> tuple[Float32Array, Factors | None]:
        """The scales, and factors of groups, that it rounds to."""
        scales = np.asarray(self.step().detach().cpu().numpy(), np.float32)
        return scales, None if self.factors is None else self.factors.cpu().numpy()


class BiasFakeQuant(nn.Module):
    """Rounds a bias to multiples of the scale of its layer's products, once those are frozen.

    Coarse activations make that scale coarse as well.
    """

    def __init__(self, activation: ActivationFakeQuant, weight: WeightFakeQuant) -> None:
        super().__init__()
        self._products = (activation, weight)  # in a tuple, they are no submodules of this one

    def forward(self, bias: Tensor) -> Tensor:
        """The bias itself; once frozen, the bias rounded."""
        activation, weight = self._products
        if not (activation.frozen and weight.frozen):
            return bias
        scale = (activation.step() * weight.step()).detach()
        rounded = (bias / scale).round() * scale
        return bias.float() + (rounded - bias).detach()


def _learned(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """x rounded to multiples of `scale`; its gradients are those of LSQ."""
    rounded: Tensor = _LearnedRounding.apply(x, scale, lowest, highest)  # type: ignore[no-untyped-call]
    return rounded


class _LearnedRounding(torch.autograd.Function):
    """Equation 3 of the paper, where rounding counts as the identity.

    The scale sees round(x/s) - x/s within the range and the bound beyond it, x sees 1 or 0. As one
    function it keeps two tensors for the way back; autograd would keep and pass over a dozen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        steps = x / scale
        rounded = steps.round()
        clamped = rounded.clamp(lowest, highest)
        inside = rounded.eq_(clamped)
        # What the scale's gradient is of the output's.
        of_scale = torch.addcmul(clamped, steps, inside, value=-1)
        ctx.save_for_backward(inside, of_scale)
        ctx.shape = scale.shape
        return clamped.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inside, of_scale = ctx.saved_tensors
        return grad * inside, (grad * of_scale).sum_to_size(ctx.shape), None, None
