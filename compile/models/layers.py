"""What the families are built of alike."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from gfcompile.compile.models.weights import State

M = TypeVar("M", bound=nn.Module)


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class PatchEmbed(nn.Module):
    """An image to one token per patch."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, N, C)
        grid: Tensor = self.proj(x)  # (B, C, h, w)
        return grid.flatten(2).transpose(1, 2)


def with_weights(make: Callable[[], M], state: State) -> M:
    """The module that `make` builds, in evaluation mode, around the tensors of `state`."""
    with torch.device("meta"):  # nothing is drawn that would be thrown away
        module = make()
    # view_as_complex, for one, takes no other layout.
    module.load_state_dict({k: v.contiguous() for k, v in state.items()}, assign=True)
    return module.eval()
