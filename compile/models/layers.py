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


class StochasticDepth(nn.Module):
    """What a residual is added; in training, some images of a batch go without (arXiv:1603.09382).

    The others have more of it, so that the mean stays. Its rate is 0 until it is set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0

    def forward(self, branch: Tensor) -> Tensor:  # (B, ...)
        if not self.training or self.rate == 0:
            return branch
        kept = branch.new_full((branch.shape[0], *[1] * (branch.ndim - 1)), 1 - self.rate)
        return branch * torch.bernoulli(kept) / kept


def set_stochastic_depth(module: nn.Module, rate: float) -> None:
    """Lets the rate of each block grow from 0 in the first to `rate` in the last one."""
    depths = [child for child in module.modules() if isinstance(child, StochasticDepth)]
    for index, depth in enumerate(depths):
        depth.rate = rate * index / max(1, len(depths) - 1)


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
