from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from gfcompile.quantize.quantizer import find_layers
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.runtime.errors import UserError

Images = Callable[..., torch.Tensor]


def exported(module: nn.Module, *example: torch.Tensor) -> fx.Graph:
    with torch.no_grad():
        return torch.export.export(module.eval(), example).module().graph


def names(graph: fx.Graph, scheme: QuantScheme) -> tuple[list[str], dict[str, str]]:
    chosen, kept = find_layers(graph, scheme)
    return [layer.name for layer in chosen], {layer.name: layer.reason for layer in kept}


def test_patch_and_downsampling_convs_mlps_and_head_are_quantized(
    mini_gfnet: nn.Module, mini_layers: tuple[str, ...], images: Images
) -> None:
    chosen, kept = names(exported(mini_gfnet, images(1)), QuantScheme())
    assert tuple(chosen) == mini_layers
    assert kept == {}


def test_named_layers_and_unlisted_kinds_stay_in_float_and_say_why(
    mini_gfnet: nn.Module, images: Images
) -> None:
    graph = exported(mini_gfnet, images(1))
    chosen, kept = names(graph, QuantScheme(keep_float=("head", "*.fc2")))
    assert chosen == ["patch", "first.fc1", "down", "second.fc1"]
    assert set(kept) == {"first.fc2", "second.fc2", "head"}
    chosen, kept = names(graph, QuantScheme(ops=frozenset({"linear"})))
    assert kept == dict.fromkeys(
        ["patch", "down"], "the scheme leaves patch_conv2d layers in float"
    )


def test_a_name_that_is_no_layers_is_refused_with_the_names_that_are(
    mini_gfnet: nn.Module, images: Images
) -> None:
    with pytest.raises(UserError, match=r"'haed'.*second\.fc2, head"):
        find_layers(exported(mini_gfnet, images(1)), QuantScheme(keep_float=("haed",)))


class Odd(nn.Module):
    """Layers that must be left alone: what the contract has no kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.overlapping = nn.Conv2d(3, 8, 3, stride=2)
        self.padded = nn.Conv2d(8, 8, 2, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 2, stride=2, groups=8)
        self.dilated = nn.Conv2d(8, 8, 2, stride=2, dilation=2)
        self.valid = nn.Conv2d(8, 8, 2, stride=2, padding="valid")
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.free = nn.Linear(8, 8, bias=False)
        self.matrix = nn.Parameter(torch.eye(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dilated(self.depthwise(self.padded(self.overlapping(x))))
        x = self.same(self.valid(x)).flatten(2).transpose(1, 2) @ self.matrix
        return nn.functional.linear(self.free(x), self.free.weight.softmax(1))


def test_other_convolutions_and_computed_weights_stay_in_float() -> None:
    chosen, kept = names(exported(Odd(), torch.zeros(1, 3, 96, 96)), QuantScheme())
    assert chosen == ["valid", "free"]
    patchless = "a convolution that is no patch embedding"
    convolutions = ("overlapping", "padded", "depthwise", "dilated", "same")
    assert {name: kept[name] for name in convolutions} == dict.fromkeys(convolutions, patchless)
    assert kept["matrix"] == "a matrix product that is no Linear"
    assert "its weight or bias is computed" in kept.values()
    assert len(kept) == 7
