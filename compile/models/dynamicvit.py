"""DeiT, LV-ViT, and DynamicViT (arXiv:2106.02034), which prunes their tokens; to be traced.

Parameters are named and shaped as in the published weights of each. Dropout, which evaluation
does not see and the papers' fine-tuning leaves at zero, is left out.
"""

import math

import torch
from torch import Tensor, nn

from gfcompile.compile.models.dynamicvit_specs import STEM_CHANNELS, ViTSpec
from gfcompile.compile.models.layers import Mlp, PatchEmbed, StochasticDepth, with_weights
from gfcompile.compile.models.predictor import (
    Predictor,
    TrainingOutput,
    masked_softmax,
    take_tokens,
)
from gfcompile.compile.models.weights import State, draw_weights, resample_grid


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:  # (B, N, C)
        batch, tokens, dim = x.shape
        q, k, v = (
            part.reshape(batch, tokens, self.heads, dim // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )  # (B, heads, N, C/heads) each
        q = q if self.scale == 1 else q * self.scale
        scores = q @ k.transpose(2, 3)
        weights = scores.softmax(-1) if policy is None else masked_softmax(scores, policy)
        y: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))
        return y


class Block(nn.Module):
    """Attention and MLP, each on a residual; LV-ViT halves what they add."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        (dim,) = spec.dims
        eps = norm_eps(spec)
        self.gain = 1.0 if spec.kind == "deit" else 0.5
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, spec.heads, bias=spec.kind == "deit")
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, spec.mlp_ratio * dim)
        self.depth = StochasticDepth()

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:  # (B, N, C)
        x = x + self._scaled(self.attn(self.norm1(x), policy))
        return x + self._scaled(self.mlp(self.norm2(x)))

    def _scaled(self, branch: Tensor) -> Tensor:
        branch = self.depth(branch)
        return branch if self.gain == 1 else branch * self.gain


class ConvStem(nn.Module):
    """An image to one token per patch, by four convolutions, the first and last of them strided."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        wide = STEM_CHANNELS
        self.conv1 = nn.Conv2d(3, wide, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, kernel_size=3, padding=1, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(wide)
        self.conv3 = nn.Conv2d(wide, wide, kernel_size=3, padding=1, bias=False)
        self.bn3: nn.Module = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU()
        self.proj = nn.Conv2d(wide, dim, kernel_size=patch_size // 2, stride=patch_size // 2)

    def forward(self, image: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, N, C)
        x = self.relu(self.bn1(self.conv1(image)))  # (B, 64, H/2, W/2)
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        grid: Tensor = self.proj(x)
        return grid.flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A vision transformer with a class token; with predictors, one that prunes.

    In evaluation it drops patches; in training (where it has predictors) it keeps all of them
    but masks attention, and returns a `TrainingOutput`.
    """

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        (dim,), (depth,) = spec.dims, spec.depths
        self.prune_before = spec.prune_before
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + spec.prunable_patches, dim))
        embed = PatchEmbed if spec.kind == "deit" else ConvStem
        self.patch_embed = embed(dim, spec.patch_size)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=norm_eps(spec))
        self.head = nn.Linear(dim, spec.num_classes)
        self.score_predictor = nn.ModuleList(Predictor(dim, keep) for keep in spec.kept_patches)
        self.aux_head = nn.Linear(dim, spec.num_classes) if spec.kind == "lvvit" else None

    def forward(self, image: Tensor) -> Tensor | TrainingOutput:  # (B, 3, H, W) -> (B, classes)
        if self.training and self.prune_before:
            return self._decide(image)
        x = self._embed(image)
        for index, block in enumerate(self.blocks):
            if index in self.prune_before:
                x = self._prune(x, self.score_predictor[self.prune_before.index(index)])
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        if self.aux_head is not None:
            # The class token's opinion, and half the strongest of any patch.
            logits = logits + 0.5 * self.aux_head(self.norm(x[:, 1:])).amax(1)
        return logits

    def teach(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and tokens (B, N, C) for a pruned student to learn from.

        The tokens are normalized patches; of LV-ViT, the class scores of each patch.
        """
        assert not self.prune_before, "a teacher keeps all patches"
        x = self._embed(image)
        for block in self.blocks:
            x = block(x)
        return self._answer(x)

    def _embed(self, image: Tensor) -> Tensor:  # -> (B, 1 + N, C)
        patches = self.patch_embed(image) + self.pos_embed[:, 1:]
        first = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([first.expand(image.shape[0], -1, -1), patches], dim=1)

    def _prune(self, x: Tensor, predictor: nn.Module) -> Tensor:
        """The class token and the patches to keep."""
        batch, tokens, _ = x.shape
        if predictor.keep == tokens - 1:
            return x
        alive = torch.ones(batch, tokens - 1, 1, dtype=x.dtype, device=x.device)
        kept = predictor(x[:, 1:], alive)  # (B, keep)
        first = torch.zeros(batch, 1, dtype=kept.dtype, device=x.device)
        return take_tokens(x, torch.cat([first, 1 + kept], dim=1))

    def _decide(self, image: Tensor) -> TrainingOutput:
        x = self._embed(image)
        alive = torch.ones_like(x[:, 1:, :1])
        policy, decisions = None, []
        for index, block in enumerate(self.blocks):
            if index in self.prune_before:
                predictor = self.score_predictor[self.prune_before.index(index)]
                alive = alive * predictor(x[:, 1:], alive)
                policy = torch.cat([torch.ones_like(x[:, :1, :1]), alive], dim=1)
                decisions.append(alive.squeeze(-1))
            x = block(x, policy)
        logits, answers = self._answer(x)
        return TrainingOutput(logits, answers, decisions[-1].detach(), tuple(decisions))

    def _answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        first, patches = x[:, 0], x[:, 1:]
        return self.head(first), patches if self.aux_head is None else self.aux_head(patches)


def norm_eps(spec: ViTSpec) -> float:
    """What the layer norms of each paper add to the variance."""
    return 1e-6 if spec.kind == "deit" else 1e-5


def build(spec: ViTSpec, state: State) -> VisionTransformer:
    """The network of `spec` with the weights of `state`, in evaluation mode."""
    return with_weights(lambda: VisionTransformer(spec), state)


def resize_weights(state: State, spec: ViTSpec) -> State:
    """`state` for the image size of `spec`.

    The position embedding of patches is resampled bicubically by pixel centres, as DeiT does
    before fine-tuning at a higher resolution; the class token's stays.
    """
    first, patches = state["pos_embed"][:, :1], state["pos_embed"][0, 1:]
    old, new = math.isqrt(len(patches)), math.isqrt(spec.prunable_patches)
    grid = resample_grid(patches.reshape(old, old, -1), (new, new))
    resized = torch.cat([first, grid.reshape(1, new * new, -1)], dim=1)
    return {**state, "pos_embed": resized}


random_weights = draw_weights
