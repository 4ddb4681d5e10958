"""The zoo of DeiT and LV-ViT, whole and with DynamicViT's token pruning. No torch.

Kept apart from dynamicvit.py so that listing models does not import torch.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

from gfcompile.compile.models.predictor_specs import (
    linear_shapes,
    norm_shapes,
    predictor_macs,
    predictor_shapes,
)
from gfcompile.compile.models.spec import ModelSpec, Paper, Shapes

_DYNAMICVIT = Paper(
    title="DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
    arxiv="2106.02034",
)
_DEIT = Paper(
    title="Training data-efficient image transformers & distillation through attention",
    arxiv="2012.12877",
)
_LVVIT = Paper(
    title="All Tokens Matter: Token Labeling for Training Better Vision Transformers",
    arxiv="2104.10858",
)
_KEEP_RATIO = 0.7
STEM_CHANNELS = 64  # of LV-ViT's convolutional stem


@dataclass(frozen=True, kw_only=True)
class ViTSpec(ModelSpec):
    """A vision transformer with a class token, whole or pruned.

    Attributes:
        kind: "deit", or "lvvit": a convolutional stem, no bias on queries, keys and values,
            halved residuals, and a head that labels every token.
        heads: of each attention.
    """

    kind: Literal["deit", "lvvit"]
    heads: int

    @property
    def mlp_ratio(self) -> int:
        return 4 if self.kind == "deit" else 3

    @property
    def stride(self) -> int:
        return self.patch_size

    @property
    def unprunable_because(self) -> str:
        return "it was not trained to drop patches"

    def shapes(self) -> Shapes:
        (dim,), (depth,) = self.dims, self.depths
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, dim),
            "pos_embed": (1, 1 + self.prunable_patches, dim),
            **self._embedding_shapes(dim),
        }
        for index in range(depth):
            name = f"blocks.{index}"
            shapes |= {
                **norm_shapes(f"{name}.norm1", dim),
                **linear_shapes(f"{name}.attn.qkv", 3 * dim, dim, bias=self.kind == "deit"),
                **linear_shapes(f"{name}.attn.proj", dim, dim),
                **norm_shapes(f"{name}.norm2", dim),
                **linear_shapes(f"{name}.mlp.fc1", self.mlp_ratio * dim, dim),
                **linear_shapes(f"{name}.mlp.fc2", dim, self.mlp_ratio * dim),
            }
        shapes |= {**norm_shapes("norm", dim), **linear_shapes("head", self.num_classes, dim)}
        for stage in range(len(self.prune_before)):
            shapes |= predictor_shapes(f"score_predictor.{stage}", dim)
        if self.kind == "lvvit":
            shapes |= linear_shapes("aux_head", self.num_classes, dim)
        return shapes

    def _embedding_shapes(self, dim: int) -> Shapes:
        patch = self.patch_size
        if self.kind == "deit":
            return {
                "patch_embed.proj.weight": (dim, 3, patch, patch),
                "patch_embed.proj.bias": (dim,),
            }
        wide = STEM_CHANNELS
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (channels, kernel) in enumerate([(3, 7), (wide, 3), (wide, 3)], start=1):
            shapes[f"patch_embed.conv{layer}.weight"] = (wide, channels, kernel, kernel)
            for entry in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"patch_embed.bn{layer}.{entry}"] = (wide,)
        shapes["patch_embed.proj.weight"] = (dim, wide, patch // 2, patch // 2)
        shapes["patch_embed.proj.bias"] = (dim,)
        return shapes

    @property
    def macs(self) -> int:
        """Convolutions, linear layers, and the two products of attention, once frozen."""
        (dim,), (depth,) = self.dims, self.depths
        patches = self.prunable_patches
        if self.kind == "deit":
            total = patches * 3 * self.patch_size**2 * dim
        else:
            wide = STEM_CHANNELS
            pixels = (self.image_size // 2) ** 2
            total = pixels * wide * (3 * 7**2 + 2 * wide * 3**2)
            total += patches * (self.patch_size // 2) ** 2 * wide * dim
        kept = dict(zip(self.prune_before, self.kept_patches, strict=True))
        for index in range(depth):
            if kept.get(index, patches) < patches:
                total += predictor_macs(dim, patches)
                patches = kept[index]
            tokens = 1 + patches
            total += tokens * dim * dim * (4 + 2 * self.mlp_ratio) + 2 * tokens * tokens * dim
        labelled = patches if self.kind == "lvvit" else 0
        return total + (1 + labelled) * dim * self.num_classes

    def trained_as(self, shapes: Shapes) -> Self:
        classes = image_size = None
        match shapes.get("head.weight"):
            case (int(rows), _) if rows > 0:
                classes = rows
        match shapes.get("pos_embed"):
            case (_, int(tokens), _) if tokens > 1:
                side = math.isqrt(tokens - 1)
                # Too small to prune means that this model cannot be it: the shapes will tell.
                if all(int(side * side * ratio) for ratio in self.keep_ratios):
                    image_size = side * self.patch_size
        return self.resized(image_size=image_size, num_classes=classes)


def _deit(name: str, *, dim: int, heads: int, top1: float | None, paper: Paper = _DEIT) -> ViTSpec:
    return ViTSpec(
        name=name,
        family="dynamicvit",
        kind="deit",
        paper=paper,
        patch_size=16,
        dims=(dim,),
        depths=(12,),
        heads=heads,
        top1_percent=top1,
    )


def _lvvit(name: str, *, dim: int, depth: int, heads: int, top1: float) -> ViTSpec:
    return ViTSpec(
        name=name,
        family="dynamicvit",
        kind="lvvit",
        paper=_LVVIT,
        patch_size=16,
        dims=(dim,),
        depths=(depth,),
        heads=heads,
        top1_percent=top1,
    )


def _dynamic(name: str, parent: ViTSpec, *, top1: float) -> ViTSpec:
    """`parent` with a predictor before each of the last three quarters of its blocks."""
    quarter = parent.depths[0] // 4
    return ViTSpec(
        name=name,
        family=parent.family,
        kind=parent.kind,
        paper=_DYNAMICVIT,
        patch_size=parent.patch_size,
        dims=parent.dims,
        depths=parent.depths,
        heads=parent.heads,
        top1_percent=top1,
        prune_before=(quarter, 2 * quarter, 3 * quarter),
        keep_ratios=(_KEEP_RATIO, _KEEP_RATIO**2, _KEEP_RATIO**3),
        parent=parent.name,
    )


_DEIT_256 = _deit("deit_256", dim=256, heads=4, top1=None, paper=_DYNAMICVIT)
_DEIT_SMALL = _deit("deit_small", dim=384, heads=6, top1=79.9)
_DEIT_BASE = _deit("deit_base", dim=768, heads=12, top1=81.8)
_LVVIT_S = _lvvit("lvvit_s", dim=384, depth=16, heads=6, top1=83.3)
_LVVIT_M = _lvvit("lvvit_m", dim=512, depth=20, heads=8, top1=84.0)

# Accuracies from the READMEs beside the published weights.
SPECS = (
    _dynamic("dynamicvit_deit_256", _DEIT_256, top1=76.53),
    _dynamic("dynamicvit_deit_s", _DEIT_SMALL, top1=79.32),
    _dynamic("dynamicvit_deit_b", _DEIT_BASE, top1=81.43),
    _dynamic("dynamicvit_lvvit_s", _LVVIT_S, top1=83.08),
    _dynamic("dynamicvit_lvvit_m", _LVVIT_M, top1=83.82),
    _deit("deit_tiny", dim=192, heads=3, top1=72.2),
    _DEIT_256,
    _DEIT_SMALL,
    _DEIT_BASE,
    _LVVIT_S,
    _LVVIT_M,
)
