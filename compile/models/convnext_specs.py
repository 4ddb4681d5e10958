"""The zoo of ConvNeXt, whole and with patches that take a cheaper path. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
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

_PAPER = Paper(title="A ConvNet for the 2020s", arxiv="2201.03545")
_MLP_RATIO = 4
KERNEL = 7


@dataclass(frozen=True, kw_only=True)
class ConvNeXtSpec(ModelSpec):
    """A ConvNeXt; of its third stage, patches that are not kept take a path of one linear layer."""

    @property
    def stride(self) -> int:
        return int(self.patch_size * 2 ** (len(self.dims) - 1))

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
        """Whether only the kept patches take a block's full path."""
        first = min(self.prune_before, default=self.depths[PRUNED_STAGE])
        return stage == PRUNED_STAGE and block >= first

    def _stages(self) -> Iterator[tuple[int, int, int, int]]:
        for stage, sizes in enumerate(zip(self.dims, self.depths, self.sides, strict=True)):
            yield stage, *sizes

    def shapes(self) -> Shapes:
        patch, first = self.patch_size, self.dims[0]
        shapes: dict[str, tuple[int, ...]] = {
            "downsample_layers.0.0.weight": (first, 3, patch, patch),
            "downsample_layers.0.0.bias": (first,),
            **norm_shapes("downsample_layers.0.1", first),
        }
        for stage, (dim_in, dim) in enumerate(pairwise(self.dims), start=1):
            shapes |= {
                **norm_shapes(f"downsample_layers.{stage}.0", dim_in),
                f"downsample_layers.{stage}.1.weight": (dim, dim_in, 2, 2),
                f"downsample_layers.{stage}.1.bias": (dim,),
            }
        for stage, dim, depth, _ in self._stages():
            for index in range(depth):
                fast = self.has_fast_path(stage, index)
                shapes |= _block_shapes(f"stages.{stage}.{index}", dim, fast=fast)
        shapes |= norm_shapes("norm", self.dims[-1])
        shapes |= linear_shapes("head", self.num_classes, self.dims[-1])
        for number in range(len(self.prune_before)):
            name = f"score_predictor.{number}"
            shapes |= predictor_shapes(name, self.dims[PRUNED_STAGE], pointwise=True)
        return shapes

    @property
    def macs(self) -> int:
        """Convolutions and linear layers, once frozen."""
        total = self.num_classes * self.dims[-1]
        inputs = (3 * self.patch_size**2, *(4 * dim for dim in self.dims))
        for stage, dim, depth, side in self._stages():
            patches = side * side
            total += patches * inputs[stage] * dim
            kept = patches
            for index in range(depth):
                if stage == PRUNED_STAGE and index in self.prune_before:
                    kept = self.kept_patches[self.prune_before.index(index)]
                    total += predictor_macs(dim, patches) if kept < patches else 0
                total += patches * dim * KERNEL**2
                total += kept * 2 * _MLP_RATIO * dim * dim + (patches - kept) * dim * dim
        return total

    def trained_as(self, shapes: Shapes) -> Self:
        match shapes.get("head.weight"):
            case (int(rows), _) if rows > 0:
                return self.resized(num_classes=rows)
        return self

    def _stage_ratios(self, keep_ratio: float) -> tuple[float, ...]:
        return sparse_ratios(keep_ratio)


def _block_shapes(name: str, dim: int, *, fast: bool) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.gamma": (dim,)}
    if fast:
        shapes[f"{name}.fast_path_gamma"] = (dim,)
    shapes |= {
        f"{name}.dwconv.weight": (dim, 1, KERNEL, KERNEL),
        f"{name}.dwconv.bias": (dim,),
        **norm_shapes(f"{name}.norm", dim),
        **linear_shapes(f"{name}.pwconv1", _MLP_RATIO * dim, dim),
        **linear_shapes(f"{name}.pwconv2", dim, _MLP_RATIO * dim),
    }
    if fast:
        shapes |= norm_shapes(f"{name}.fast_path.0", dim)
        shapes |= linear_shapes(f"{name}.fast_path.1", dim, dim)
    return shapes


def _convnext(
    name: str, *, dims: tuple[int, ...], depths: tuple[int, ...], top1: float
) -> ConvNeXtSpec:
    return ConvNeXtSpec(
        name=name,
        family="convnext",
        paper=_PAPER,
        patch_size=4,
        dims=dims,
        depths=depths,
        top1_percent=top1,
    )


def _dynamic(name: str, parent: ConvNeXtSpec, *, top1: float) -> ConvNeXtSpec:
    """`parent` with predictors in its third stage: early in a shallow one, else spread wider."""
    return ConvNeXtSpec(
        name=name,
        family=parent.family,
        paper=SPARSIFICATION_PAPER,
        patch_size=parent.patch_size,
        dims=parent.dims,
        depths=parent.depths,
        top1_percent=top1,
        prune_before=(1, 2, 3) if parent.depths[PRUNED_STAGE] == 9 else (3, 6, 9),
        keep_ratios=sparse_ratios(),
        parent=parent.name,
    )


_NARROW, _WIDE = (96, 192, 384, 768), (128, 256, 512, 1024)
_TINY = _convnext("convnext_tiny", dims=_NARROW, depths=(3, 3, 9, 3), top1=82.1)
_SMALL = _convnext("convnext_small", dims=_NARROW, depths=(3, 3, 27, 3), top1=83.1)
_BASE = _convnext("convnext_base", dims=_WIDE, depths=(3, 3, 27, 3), top1=83.8)

# Accuracies from the READMEs beside the published weights.
SPECS = (
    _dynamic("convnext_t", _TINY, top1=81.59),
    _dynamic("convnext_s", _SMALL, top1=82.57),
    _dynamic("convnext_b", _BASE, top1=83.45),
    _TINY,
    _SMALL,
    _BASE,
)
