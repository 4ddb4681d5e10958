"""The zoo of Swin Transformer, whole and with patches that take a cheaper path. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from gfcompile.compile.models.predictor_specs import (
    PRUNED_STAGE,
    SPARSIFICATION_PAPER,
    linear_shapes,
    norm_shapes,
    predictor_macs,
    predictor_shapes,
    sparse_ratios,
)
from gfcompile.compile.models.spec import ModelSpec, Paper, Shapes

_PAPER = Paper(
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    arxiv="2103.14030",
)
_MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class SwinSpec(ModelSpec):
    """A Swin Transformer; of its third stage, patches that are not kept take no MLP.

    They take one linear layer instead; attention is for all.

    Attributes:
        head_dim: channels of each head.
        window: side of the square of patches that attend to each other.
    """

    head_dim: int = 32
    window: int = 7

    @property
    def stride(self) -> int:
        """Windows must tile every stage."""
        return int(self.patch_size * 2 ** (len(self.dims) - 1) * self.window)

    @property
    def sides(self) -> tuple[int, ...]:
        """Rows (and columns) of patches in each stage."""
        return tuple(self.image_size // self.patch_size >> stage for stage in range(len(self.dims)))

    @property
    def prunable_patches(self) -> int:
        return self.sides[PRUNED_STAGE] ** 2

    @property
    def chooses_anew(self) -> bool:
        return True

    @property
    def unprunable_because(self) -> str:
        return "it was not trained with a cheaper path"

    def has_fast_path(self, stage: int, block: int) -> bool:
        """Whether only the kept patches take a block's MLP."""
        first = min(self.prune_before, default=self.depths[PRUNED_STAGE])
        return stage == PRUNED_STAGE and block >= first

    def shift(self, stage: int, block: int) -> int:
        """By how much the windows of a block are moved; those of a single window stay."""
        return self.window // 2 if block % 2 and self.sides[stage] > self.window else 0

    def _stages(self) -> Iterator[tuple[int, int, int, int]]:
        for stage, sizes in enumerate(zip(self.dims, self.depths, self.sides, strict=True)):
            yield stage, *sizes

    def shapes(self) -> Shapes:
        first, patch = self.dims[0], self.patch_size
        shapes: dict[str, tuple[int, ...]] = {
            "patch_embed.proj.weight": (first, 3, patch, patch),
            "patch_embed.proj.bias": (first,),
            **norm_shapes("patch_embed.norm", first),
        }
        for stage, dim, depth, _ in self._stages():
            name = f"layers.{stage}"
            for index in range(depth):
                fast = self.has_fast_path(stage, index)
                shapes |= self._block_shapes(f"{name}.blocks.{index}", dim, fast=fast)
            if stage + 1 < len(self.dims):
                shapes |= norm_shapes(f"{name}.downsample.norm", 4 * dim)
                reduction = linear_shapes(
                    f"{name}.downsample.reduction", self.dims[stage + 1], 4 * dim, bias=False
                )
                shapes |= reduction
            if stage == PRUNED_STAGE:
                for number in range(len(self.prune_before)):
                    shapes |= predictor_shapes(f"{name}.score_predictor.{number}", dim)
        shapes |= norm_shapes("norm", self.dims[-1])
        shapes |= linear_shapes("head", self.num_classes, self.dims[-1])
        return shapes

    def _block_shapes(self, name: str, dim: int, *, fast: bool) -> Shapes:
        shapes = {
            **norm_shapes(f"{name}.norm1", dim),
            f"{name}.attn.relative_position_bias_table": (
                (2 * self.window - 1) ** 2,
                dim // self.head_dim,
            ),
            **linear_shapes(f"{name}.attn.qkv", 3 * dim, dim),
            **linear_shapes(f"{name}.attn.proj", dim, dim),
            **norm_shapes(f"{name}.norm2", dim),
            **linear_shapes(f"{name}.mlp.fc1", _MLP_RATIO * dim, dim),
            **linear_shapes(f"{name}.mlp.fc2", dim, _MLP_RATIO * dim),
        }
        if fast:
            shapes |= norm_shapes(f"{name}.fastmlp.fc1.0", dim)
            shapes |= linear_shapes(f"{name}.fastmlp.fc1.1", dim, dim)
        return shapes

    @property
    def macs(self) -> int:
        """Convolution, linear layers, and the two products of attention, once frozen."""
        total = self.num_classes * self.dims[-1]
        total += self.sides[0] ** 2 * 3 * self.patch_size**2 * self.dims[0]
        for stage, dim, depth, side in self._stages():
            patches = kept = side * side
            if stage > 0:
                total += patches * 4 * self.dims[stage - 1] * dim
            for index in range(depth):
                if stage == PRUNED_STAGE and index in self.prune_before:
                    kept = self.kept_patches[self.prune_before.index(index)]
                    total += predictor_macs(dim, patches) if kept < patches else 0
                total += patches * dim * (4 * dim + 2 * self.window**2)
                total += kept * 2 * _MLP_RATIO * dim * dim + (patches - kept) * dim * dim
        return total

    def trained_as(self, shapes: Shapes) -> Self:
        match shapes.get("head.weight"):
            case (int(rows), _) if rows > 0:
                return self.resized(num_classes=rows)
        return self

    def _stage_ratios(self, keep_ratio: float) -> tuple[float, ...]:
        return sparse_ratios(keep_ratio)


def _swin(name: str, *, dims: tuple[int, ...], depth: int, top1: float) -> SwinSpec:
    return SwinSpec(
        name=name,
        family="swin",
        paper=_PAPER,
        patch_size=4,
        dims=dims,
        depths=(2, 2, depth, 2),
        top1_percent=top1,
    )


def _dynamic(name: str, parent: SwinSpec, *, top1: float) -> SwinSpec:
    """`parent` with predictors in its third stage: early in a shallow one, else spread wider."""
    return SwinSpec(
        name=name,
        family=parent.family,
        paper=SPARSIFICATION_PAPER,
        patch_size=parent.patch_size,
        dims=parent.dims,
        depths=parent.depths,
        top1_percent=top1,
        prune_before=(1, 2, 3) if parent.depths[PRUNED_STAGE] == 6 else (2, 4, 6),
        keep_ratios=sparse_ratios(),
        parent=parent.name,
    )


_NARROW, _WIDE = (96, 192, 384, 768), (128, 256, 512, 1024)
_TINY = _swin("swin_tiny", dims=_NARROW, depth=6, top1=81.2)
_SMALL = _swin("swin_small", dims=_NARROW, depth=18, top1=83.2)
_BASE = _swin("swin_base", dims=_WIDE, depth=18, top1=83.5)

# Accuracies from the READMEs beside the published weights.
SPECS = (
    _dynamic("swin_t", _TINY, top1=80.91),
    _dynamic("swin_s", _SMALL, top1=83.21),
    _dynamic("swin_b", _BASE, top1=83.43),
    _TINY,
    _SMALL,
    _BASE,
)
