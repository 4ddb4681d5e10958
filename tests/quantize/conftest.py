from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


class Filter(nn.Module):
    def __init__(self, dim: int, h: int, w: int) -> None:
        super().__init__()
        self.h, self.w = h, w
        self.weight = nn.Parameter(0.5 * torch.randn(h, w // 2 + 1, dim, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        spectrum = torch.fft.rfft2(x.view(b, self.h, self.w, c), dim=(1, 2), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(self.weight)
        y = torch.fft.irfft2(spectrum, s=(self.h, self.w), dim=(1, 2), norm="ortho")
        return y.reshape(b, n, c)


class Block(nn.Module):
    def __init__(self, dim: int, h: int, w: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.filter = Filter(dim, h, w)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc1(self.norm2(self.filter(self.norm1(x))))
        return x + self.fc2(nn.functional.gelu(y))


class MiniGfnet(nn.Module):
    """Every kind of layer of a GFNet pyramid, for h x w patches of 4x4 pixels, halved once."""

    def __init__(self, h: int = 6, w: int = 4) -> None:
        super().__init__()
        self.h, self.w = h, w
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.first = Block(16, h, w)
        self.down = nn.Conv2d(16, 24, 2, 2)
        self.second = Block(24, h // 2, w // 2)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.first(x)
        x = self.down(x.transpose(1, 2).reshape(-1, 16, self.h, self.w)).flatten(2).transpose(1, 2)
        x = self.second(x)
        return self.head(self.norm(x).mean(1))


MINI_LAYERS = (
    "patch",
    "first.fc1",
    "first.fc2",
    "down",
    "second.fc1",
    "second.fc2",
    "head",
)


@pytest.fixture
def mini_gfnet() -> nn.Module:
    torch.manual_seed(0)
    return MiniGfnet().eval()


@pytest.fixture
def square_gfnet() -> nn.Module:
    """The same for 16x16 images."""
    torch.manual_seed(0)
    return MiniGfnet(4, 4).eval()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four images of 18x18 pixels in three folders; a class is a direction of stripes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:18, :18]
    for label, stripes in enumerate((np.sin(y), np.sin(x), np.sin(x + y))):
        (folder / f"class{label}").mkdir()
        for i in range(8):
            noisy = 128 + 60 * stripes[..., np.newaxis] + rng.normal(0, 20, (18, 18, 3))
            pixels = np.clip(noisy, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i}.png")
    return folder


@pytest.fixture
def mini_layers() -> tuple[str, ...]:
    return MINI_LAYERS


@pytest.fixture
def images() -> Callable[..., torch.Tensor]:
    """`images(n)`: n smooth random images, the same ones every time."""

    def make(n: int, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(n, 3, 6, 4, generator=generator)
        return nn.functional.interpolate(coarse, size=(24, 16), mode="bicubic")

    return make
