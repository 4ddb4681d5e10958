import math

import numpy as np
import pytest
import torch
from torch import nn

from gfcompile.quantize.fake_quant import ActivationFakeQuant, BiasFakeQuant, WeightFakeQuant
from gfcompile.quantize.qparams import QParams, dequantize, quantize
from gfcompile.quantize.scheme import QuantScheme

SCHEME = QuantScheme()
CPU = torch.device("cpu")


def frozen(params: QParams, *, learn: bool = False) -> ActivationFakeQuant:
    fake = ActivationFakeQuant(SCHEME.activation, "mse", learn=learn)
    fake.settle_as(params)
    fake.freeze(CPU)
    return fake


@pytest.mark.parametrize("learn", [False, True])
def test_frozen_activations_are_rounded_as_the_scheme_says(learn: bool) -> None:
    x = np.linspace(-3, 5, 10_001, dtype=np.float32)
    params = QParams(0.0251, -37)
    wanted = dequantize(quantize(x, 0.0251, -37, SCHEME.activation), 0.0251, -37)
    actual = frozen(params, learn=learn)(torch.from_numpy(x)).detach().numpy()
    # A product with the inverse may put a value that lies on a tie on its other side.
    different = np.abs(actual - wanted) > 1e-6
    assert different.mean() < 1e-3
    assert np.abs(actual - wanted).max() <= 0.0251 * (1 + 1e-5)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_frozen_weights_are_rounded_channel_by_channel(bits: int, learn: bool) -> None:
    scheme = QuantScheme.with_weight_bits(bits)
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    fake = WeightFakeQuant(scheme.weight, scheme.weight_range, learn=learn)
    fake(weight)
    fake.freeze(CPU)
    found, factors = fake.trained()
    assert factors is None
    scales = found.reshape(-1, 1)
    wanted = dequantize(quantize(weight.numpy(), scales, 0, scheme.weight), scales, 0)
    assert fake(weight).detach().numpy() == pytest.approx(wanted, abs=1e-6)
    assert len(np.unique(np.rint(wanted / scales))) <= 2 * scheme.weight.high + 1


@pytest.mark.parametrize("learn", [False, True])
def test_frozen_weights_of_four_bits_are_rounded_group_by_group(learn: bool) -> None:
    scheme = QuantScheme.with_weight_bits(4, group_size=16)
    # Groups of 16, 16 and 4.
    weight = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[0] *= torch.linspace(0.01, 1, 36).reshape(4, 3, 3)
    fake = WeightFakeQuant(scheme.weight, scheme.weight_range, learn=learn)
    fake(weight)
    fake.freeze(CPU)
    scales, factors = fake.trained()
    assert factors is not None
    assert factors.shape == (3, 3)
    assert len(np.unique(factors[0])) == 3
    steps = np.stack([s * np.repeat(f, 16)[:36] for s, f in zip(scales, factors, strict=True)])
    codes = np.clip(np.rint(weight.numpy().reshape(3, 36) / steps), -7, 7)
    rounded = fake(weight)
    assert rounded.detach().numpy().reshape(3, 36) == pytest.approx(codes * steps, abs=1e-6)
    weight.requires_grad_()
    fake(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("learn", [False, True])
def test_values_get_a_gradient_within_the_range_and_none_beyond(learn: bool) -> None:
    fake = frozen(QParams(0.1, 0), learn=learn)
    x = torch.tensor([-20.0, -12.0, 0.33, 12.0, 20.0], requires_grad=True)
    fake(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_scales_get_the_gradient_of_lsq() -> None:
    scale, zero_point = 0.1, 3
    fake = frozen(QParams(scale, zero_point), learn=True)
    values = [-20.0, -0.47, 0.33, 5.08, 20.0]
    fake(torch.tensor(values)).sum().backward()
    low, high = -128 - zero_point, 127 - zero_point
    # Equation 3 of arXiv:1902.08153, and d(scale)/d(logarithm) = scale.
    wanted = sum(
        low if v / scale < low else high if v / scale > high else round(v / scale) - v / scale
        for v in values
    )
    assert isinstance(fake.growth, nn.Parameter)
    assert fake.growth.grad is not None
    assert fake.growth.grad.item() == pytest.approx(scale * wanted, rel=1e-4)


def test_trained_scales_are_the_settled_ones_grown() -> None:
    fake = frozen(QParams(0.1, 3), learn=True)
    assert fake.growth is not None
    with torch.no_grad():
        fake.growth.fill_(math.log(2))
    trained = fake.trained()
    assert (trained.scale, trained.zero_point) == (pytest.approx(0.2), 3)


def test_watching_again_forgets_what_was_seen() -> None:
    fake = ActivationFakeQuant(SCHEME.activation, "minmax")
    fake(torch.tensor([-100.0, 100.0]))
    fake.watch()
    x = torch.tensor([-1.0, 1.0])
    assert fake(x) is x
    fake.settle("layer")
    fake.freeze(CPU)
    assert fake.trained().scale == pytest.approx(2 / 255, rel=1e-3)


def test_a_bias_is_rounded_to_the_scale_of_the_products_and_gets_its_gradient() -> None:
    activation = frozen(QParams(4.0, 0))
    weight = WeightFakeQuant(SCHEME.weight, "minmax")
    weight.settle_as(np.array([0.01, 0.5], np.float32))
    weight.freeze(CPU)
    bias = torch.tensor([0.1234, -2.9], requires_grad=True)
    rounded = BiasFakeQuant(activation, weight)(bias)
    assert rounded.tolist() == pytest.approx([0.12, -2.0])
    rounded.sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [1, 1]
