"""The zoo of Global Filter Networks: sizes, parameter names and shapes, and cost.

Kept apart from gfnet.py so that listing models does not import torch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from gfcompile.compile.models.spec import ModelSpec, Paper, Shapes

_PAPER = Paper(title="Global Filter Networks for Image Classification", arxiv="2107.00645")
_MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class GFNetSpec(ModelSpec):
    """A GFNet of one stage, or a pyramid: a 2x2 convolution between stages, gains in the blocks."""

    @property
    def is_pyramid(self) -> bool:
        return len(self.dims) > 1

    @property
    def stride(self) -> int:
        return int(self.patch_size * 2 ** (len(self.dims) - 1))

    @property
    def sides(self) -> tuple[int, ...]:
        """Rows (and columns) of tokens in each stage."""
        return tuple(self.image_size // self.patch_size >> stage for stage in range(len(self.dims)))

    @property
    def filters(self) -> tuple[tuple[int, int, int], ...]:
        return tuple((side, side, dim) for side, dim in zip(self.sides, self.dims, strict=True))

    def _stages(self) -> Iterable[tuple[int, tuple[int, int, int]]]:
        return enumerate(zip(self.dims, self.depths, self.sides, strict=True))

    def shapes(self) -> Shapes:
        side, patch = self.sides[0], self.patch_size
        shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, side * side, self.dims[0])}
        embeddings = [(3, self.dims[0], patch)]
        embeddings += [(a, b, 2) for a, b in zip(self.dims, self.dims[1:], strict=False)]
        for stage, (dim_in, dim_out, kernel) in enumerate(embeddings):
            name = f"patch_embed.{stage}" if self.is_pyramid else "patch_embed"
            shapes[f"{name}.proj.weight"] = (dim_out, dim_in, kernel, kernel)
            shapes[f"{name}.proj.bias"] = (dim_out,)
        for stage, (dim, depth, side) in self._stages():
            for index in range(depth):
                name = f"blocks.{stage}.{index}" if self.is_pyramid else f"blocks.{index}"
                block = _block_shapes(dim, side, gain=self.is_pyramid)
                shapes |= {f"{name}.{key}": shape for key, shape in block.items()}
        shapes["norm.weight"] = shapes["norm.bias"] = (self.dims[-1],)
        shapes["head.weight"] = (self.num_classes, self.dims[-1])
        shapes["head.bias"] = (self.num_classes,)
        return shapes

    @property
    def macs(self) -> int:
        """Convolutions, linear layers, and the filters as separable real DFTs over half spectra.

        A fast Fourier transform would need fewer: 2.84 instead of 2.92 G for gfnet_xs.
        """
        total = self.num_classes * self.dims[-1]
        inputs = (3, *self.dims)
        for stage, (dim, depth, side) in self._stages():
            kernel = self.patch_size if stage == 0 else 2
            embedding = kernel * kernel * inputs[stage] * dim
            mlp = 2 * dim * dim * _MLP_RATIO
            total += side * side * (embedding + depth * mlp)
            total += depth * dim * _filter_macs(side, side)
        return total

    @property
    def unprunable_because(self) -> str:
        return "its global filters need the whole grid of patches"

    def trained_as(self, shapes: Shapes) -> Self:
        classes = image_size = None
        match shapes.get("head.weight"):
            case (int(rows), _) if rows > 0:
                classes = rows
        match shapes.get("pos_embed"):
            case (_, int(tokens), _) if tokens > 0:
                side = math.isqrt(tokens) * self.patch_size
                image_size = None if side % self.stride else side
        return self.resized(image_size=image_size, num_classes=classes)


def _block_shapes(dim: int, side: int, *, gain: bool) -> Shapes:
    hidden = dim * _MLP_RATIO
    shapes: dict[str, tuple[int, ...]] = {
        "gamma": (dim,),
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "filter.complex_weight": (side, side // 2 + 1, dim, 2),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.fc1.weight": (hidden, dim),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (dim, hidden),
        "mlp.fc2.bias": (dim,),
    }
    if not gain:
        del shapes["gamma"]
    return shapes


def _filter_macs(h: int, w: int) -> int:
    """Real multiply-accumulates of irfft2(rfft2(x) * K) for one channel of (h, w)."""
    half = w // 2 + 1
    along_w = h * w * 2 * half  # real to complex, and the same back
    along_h = half * h * h * 4  # complex to complex
    return 2 * (along_w + along_h) + 4 * h * half


def _gfnet(
    name: str, *, patch_size: int, dims: tuple[int, ...], depths: tuple[int, ...], top1: float
) -> GFNetSpec:
    return GFNetSpec(
        name=name,
        family="gfnet",
        paper=_PAPER,
        patch_size=patch_size,
        dims=dims,
        depths=depths,
        top1_percent=top1,
    )


_SMALL, _LARGE = (64, 128, 256, 512), (96, 192, 384, 768)

# Accuracies from the README beside the published weights.
SPECS = (
    _gfnet("gfnet_ti", patch_size=16, dims=(256,), depths=(12,), top1=74.6),
    _gfnet("gfnet_xs", patch_size=16, dims=(384,), depths=(12,), top1=78.6),
    _gfnet("gfnet_s", patch_size=16, dims=(384,), depths=(19,), top1=80.0),
    _gfnet("gfnet_b", patch_size=16, dims=(512,), depths=(19,), top1=80.7),
    _gfnet("gfnet_h_ti", patch_size=4, dims=_SMALL, depths=(3, 3, 10, 3), top1=80.1),
    _gfnet("gfnet_h_s", patch_size=4, dims=_LARGE, depths=(3, 3, 10, 3), top1=81.5),
    _gfnet("gfnet_h_b", patch_size=4, dims=_LARGE, depths=(3, 3, 27, 3), top1=82.9),
)
