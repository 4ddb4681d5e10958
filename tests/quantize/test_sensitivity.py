import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from gfcompile.quantize import analyze, calibrate
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.quantize.sensitivity import choose, explain, most_sensitive
from gfcompile.quantize.sensitivity_plot import plot
from gfcompile.runtime.errors import UserError

Images = Callable[..., torch.Tensor]


@pytest.fixture
def fragile(mini_gfnet: nn.Module) -> nn.Module:
    """One layer's input has a channel a thousand times as large as the others, to no effect."""
    with torch.no_grad():
        mini_gfnet.get_parameter("second.norm2.weight")[0] *= 1000
        mini_gfnet.get_parameter("second.norm2.bias")[0] *= 1000
        mini_gfnet.get_parameter("second.fc1.weight")[:, 0] /= 1000
    return mini_gfnet


def test_every_layer_and_filter_is_there_in_the_order_of_the_model(
    mini_gfnet: nn.Module, images: Images, mini_layers: tuple[str, ...]
) -> None:
    results = analyze(mini_gfnet, [images(6)], QuantScheme())
    names = list(dict.fromkeys(result.name for result in results))
    assert [name for name in names if not name.endswith("filter")] == list(mini_layers)
    assert names.index("first.filter") < names.index("first.fc1") < names.index("second.filter")
    assert all(20 < result.sqnr_db < 80 and result.loss < 0.01 for result in results)


def test_quantizing_one_layer_alone_is_what_calibration_does_to_that_layer(
    mini_gfnet: nn.Module, images: Images, mini_layers: tuple[str, ...]
) -> None:
    pictures = images(6)
    others = tuple(name for name in mini_layers if name != "down")
    alone = calibrate(mini_gfnet, [pictures], QuantScheme(keep_float=others), batch_size=6)
    with torch.no_grad():
        noise = alone.module(pictures) - mini_gfnet(pictures)
        signal = mini_gfnet(pictures)
    wanted = 10 * torch.log10(signal.square().sum() / noise.square().sum()).item()
    (result,) = [r for r in analyze(mini_gfnet, [pictures], QuantScheme()) if r.name == "down"]
    assert result.sqnr_db == pytest.approx(wanted, abs=0.2)  # a tie or two fall elsewhere


def test_the_layer_with_outliers_is_found_and_left_in_float(
    fragile: nn.Module, images: Images
) -> None:
    pictures = images(8)
    results = analyze(fragile, [pictures], QuantScheme())
    assert most_sensitive(results, 1) == ("second.fc1",)
    scheme, seen = choose(QuantScheme(keep_float=("head", "auto:1")), fragile, [pictures])
    assert scheme.keep_float == ("head", "second.fc1")
    result = calibrate(fragile, [pictures], scheme)
    reasons = {layer.name: layer.reason for layer in explain(result.kept_float, seen)}
    assert reasons["head"] == "the scheme names it"
    assert "quantized alone, it leaves" in reasons["second.fc1"]


def test_nothing_is_analysed_that_nobody_asked_for(mini_gfnet: nn.Module) -> None:
    scheme = QuantScheme(keep_float=("head",))
    assert choose(scheme, mini_gfnet, []) == (scheme, ())


@pytest.mark.parametrize("choice", ["auto:7", "auto:x", "auto:-1"])
def test_a_choice_that_cannot_be_is_refused(
    mini_gfnet: nn.Module, images: Images, choice: str
) -> None:
    with pytest.raises(UserError, match="auto:"):
        choose(QuantScheme(keep_float=(choice,)), mini_gfnet, [images(2)])


class Spectral(nn.Module):
    """A filter between two layers, on tokens whose mean is far from zero, as of any photo."""

    def __init__(self, filter_type: type[nn.Module]) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.filter = filter_type(16, 8, 8)
        self.head = nn.Linear(16 * 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.filter(tokens).flatten(1))


def test_int8_spectra_fail_on_the_mean_of_the_image_and_nothing_of_ours_makes_them(
    mini_gfnet: nn.Module,
) -> None:
    torch.manual_seed(0)
    module = Spectral(type(mini_gfnet.first.filter)).eval()
    texture = 0.05 * torch.randn(8, 3, 32, 32)
    results = analyze(module, [1 + texture], QuantScheme())
    found = {result.kind: result.sqnr_db for result in results if result.name == "filter"}
    flat = analyze(module, [texture], QuantScheme())
    without_mean = {result.kind: result.sqnr_db for result in flat if result.name == "filter"}
    # The mean of 64 tokens is one bin, sqrt(64) times as large as a token; its step of 1/127 of it
    # is what all others are rounded to. A circular convolution rounds tokens, not bins.
    assert found["filter on int8 spectra"] < found["filter as circular int8"] - 6
    assert found["filter on int8 spectra"] < without_mean["filter on int8 spectra"]
    result = calibrate(module, [1 + texture])
    for node in result.module.graph.nodes:
        if "fft" in str(node.target):
            neighbours = [*node.all_input_nodes, *node.users]
            assert not any("quantize_per" in str(other.target) for other in neighbours)


def test_the_plot_is_a_picture_with_a_bar_for_each_result(
    mini_gfnet: nn.Module, images: Images
) -> None:
    results = analyze(mini_gfnet, [images(2)], QuantScheme())
    results = (*results, replace(results[0], name="a<b", loss=0.0))
    root = ElementTree.fromstring(plot(results, title="A & B", kept=["head"]))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}rect/{space}title")) == len(results)
    texts = [element.text for element in root.iter(f"{space}text")]
    assert "A & B" in texts
    assert "a<b" in texts
