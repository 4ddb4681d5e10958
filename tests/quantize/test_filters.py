"""Global filters in int8: as circular convolutions, if they are asked for, and in no other way."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gfcompile.quantize import calibrate, load_quantized, read_quantized, write_quantized
from gfcompile.quantize.data import Images, read_images
from gfcompile.quantize.distributed import open_group
from gfcompile.quantize.filters import FilterFakeQuant, find_filters
from gfcompile.quantize.prepared import export, prepare_training
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.quantize.sensitivity import Sensitivity, analyze, choose, robust_filters
from gfcompile.quantize.train_config import TrainConfig
from gfcompile.quantize.training import train
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.exactness import sqnr_db
from gfcompile.runtime.images import Transform

Pictures = Callable[..., torch.Tensor]
SCHEME = QuantScheme(int8_filters=("first.*",))


def integers_of(spectrum: torch.Tensor, h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """The circular kernel (h, w, C) in 127ths of each channel's largest value, and these."""
    kernel = torch.fft.irfft2(spectrum, s=(h, w), dim=(0, 1)).double().numpy()
    steps = np.abs(kernel).max(axis=(0, 1)) / 127
    return kernel / steps, steps


@pytest.mark.parametrize(("h", "w"), [(6, 4), (5, 7), (14, 14)])
def test_a_rounded_kernel_is_of_integers_and_rounded_once(h: int, w: int) -> None:
    torch.manual_seed(0)
    spectrum = torch.view_as_complex(torch.randn(h, w // 2 + 1, 16, 2))
    rounding = FilterFakeQuant([h, w], [-3, -2])
    once = rounding(spectrum)
    integers, steps = integers_of(once, h, w)
    assert np.abs(integers - np.rint(integers)).max() < 1e-3
    exact = torch.fft.irfft2(spectrum, s=(h, w), dim=(0, 1)).double().numpy()
    assert (np.abs(np.rint(integers) * steps - exact) <= 0.501 * steps).all()
    again, _ = integers_of(rounding(once), h, w)
    assert np.array_equal(np.rint(again), np.rint(integers))


def test_a_filter_takes_int8_where_the_scheme_names_it(
    mini_gfnet: nn.Module, images: Pictures
) -> None:
    pictures = images(4)
    result = calibrate(mini_gfnet, [pictures], SCHEME, batch_size=4)
    ops = {layer.name: layer.op for layer in result.layers}
    assert ops["first.filter"] == "global_filter"
    assert "second.filter" not in ops
    (layer,) = (layer for layer in result.layers if layer.name == "first.filter")
    assert layer.weight_sqnr_db is None
    assert layer.activation_sqnr_db > 30
    plain = calibrate(mini_gfnet, [pictures], QuantScheme(), batch_size=4)
    with torch.no_grad():
        ours, without = result.module(pictures), plain.module(pictures)
    assert not torch.equal(ours, without)
    # The input's and the kernel's rounding, each a 127th at most, and what follows as before.
    assert sqnr_db(without.numpy(), ours.numpy()) > 25
    with pytest.raises(UserError, match=r"no filter is called 'third' to compute in int8; filters"):
        calibrate(mini_gfnet, [pictures], QuantScheme(int8_filters=("third",)))


def test_the_float_module_keeps_its_filters(mini_gfnet: nn.Module, images: Pictures) -> None:
    before = mini_gfnet.first.filter.weight.detach().clone()
    calibrate(mini_gfnet, [images(2)], SCHEME)
    assert torch.equal(mini_gfnet.first.filter.weight, before)


def test_training_rounds_the_kernel_and_lets_its_gradient_through(square_gfnet: nn.Module) -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prepared = prepare_training(square_gfnet, images, SCHEME, learn_scales=False)
    (found,) = prepared.filters
    assert (found.name, found.grid) == ("first.filter", (4, 4, 16))
    prepared.graph(images).sum().backward()
    gradient = prepared.graph.get_parameter("first.filter.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_a_trained_checkpoint_computes_what_training_did(
    square_gfnet: nn.Module, image_folder: Path, tmp_path: Path
) -> None:
    data = Images(
        files=read_images(image_folder, classes=10, names=[f"class{i}" for i in range(10)]),
        transform=Transform(image_size=16, resize=18),
    )
    with open_group("cpu") as group:
        trained = train(
            square_gfnet,
            data,
            config=TrainConfig(epochs=1, batch_size=8, lr=1e-3),
            scheme=SCHEME,
            group=group,
        )
    write_quantized(trained, tmp_path / "q.safetensors")
    read = read_quantized(tmp_path / "q.safetensors")
    assert read.scheme == SCHEME
    weight = read.state["first.filter.weight"]
    integers, _ = integers_of(torch.view_as_complex(weight.contiguous()), 4, 4)
    assert np.abs(integers - np.rint(integers)).max() < 1e-3
    loaded = load_quantized(tmp_path / "q.safetensors", square_gfnet, torch.zeros(2, 3, 16, 16))
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in read.layers]
    # Its own weights in float differ by the rounding of activations alone.
    own = type(square_gfnet)(4, 4).eval()
    own.load_state_dict(dict(read.state))
    pictures = torch.from_numpy(np.stack(data.sample(2)))
    with torch.no_grad():
        assert sqnr_db(own(pictures).numpy(), loaded.module(pictures).numpy()) > 20


def test_filters_are_chosen_by_what_they_cost_and_where_they_pay(
    mini_gfnet: nn.Module, images: Pictures
) -> None:
    results = analyze(mini_gfnet, [images(6)], QuantScheme())
    grids = {r.name: r.grid for r in results if r.kind.startswith("filter")}
    assert grids == {"first.filter": (6, 4, 16), "second.filter": (3, 2, 24)}

    def with_loss(kind: str, loss: float) -> list[Sensitivity]:
        return [replace(r, loss=loss) if r.kind == kind else r for r in results]

    good = with_loss("filter as circular int8", 0.0)
    assert robust_filters(good, lambda *_: True) == ("first.filter", "second.filter")
    assert robust_filters(good, lambda h, w, c: (h, w, c) == (3, 2, 24)) == ("second.filter",)
    assert robust_filters(good, lambda *_: False) == ()
    # However little int8 spectra cost, nothing is chosen for them.
    spectra = with_loss("filter on int8 spectra", 0.0)
    bad = [replace(r, loss=1.0) if r.kind == "filter as circular int8" else r for r in spectra]
    assert robust_filters(bad, lambda *_: True) == ()

    automatic = QuantScheme(int8_filters=("auto",))
    scheme, seen = choose(automatic, mini_gfnet, [images(6)], pays=lambda *_: False)
    assert scheme == QuantScheme()
    assert seen
    named = QuantScheme(int8_filters=("first.filter", "auto"))
    scheme, _ = choose(named, mini_gfnet, [images(6)])
    assert scheme.int8_filters[0] == "first.filter"


class Computed(nn.Module):
    """A filter whose spectrum is no parameter as it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4, 3, 3))
        self.head = nn.Linear(3 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.avg_pool2d(x, 4).permute(0, 2, 3, 1)
        spectrum = torch.fft.rfft2(x, dim=(1, 2)) * (2 * self.gain)
        return self.head(torch.fft.irfft2(spectrum, s=(4, 4), dim=(1, 2)).flatten(1))


def test_a_spectrum_that_is_computed_stays_in_float() -> None:
    torch.manual_seed(0)
    module = Computed().eval()
    images = torch.randn(2, 3, 16, 16)
    (found,) = find_filters(export(module, images).graph)
    assert not found.is_rewritable
    result = calibrate(module, [images], QuantScheme(int8_filters=("*",)))
    (kept,) = result.kept_float
    assert kept.reason == "its spectrum is computed"
