"""ConvNeXt (arXiv:2201.03545), and dynamic spatial sparsification of it (arXiv:2207.01580).

In the sparsified third stage, each block's full path is taken by the patches that a predictor
keeps and a linear layer by the others; both return to their places in the grid. Parameters are
named and shaped as in the published weights of each.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from gfcompile.compile.models.convnext_specs import KERNEL, ConvNeXtSpec
from gfcompile.compile.models.layers import StochasticDepth, with_weights
from gfcompile.compile.models.predictor import (
    Partition,
    Predictor,
    TrainingOutput,
    divide,
    mix,
)
from gfcompile.compile.models.predictor_specs import PRUNED_STAGE
from gfcompile.compile.models.weights import State, draw_weights

_EPS = 1e-6


class Stem(nn.Sequential):
    """An image to a grid of patches: convolution, norm."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__(
            nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size),
            nn.LayerNorm(dim, eps=_EPS),
        )

    def forward(self, image: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, h, w, C)
        y: Tensor = self[1](self[0](image).permute(0, 2, 3, 1))
        return y


class Downsample(nn.Sequential):
    """Four neighbouring patches to one of the next stage: norm, convolution."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(
            nn.LayerNorm(dim_in, eps=_EPS), nn.Conv2d(dim_in, dim_out, kernel_size=2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C) -> (B, h/2, w/2, C')
        y: Tensor = self[1](self[0](x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y


class Block(nn.Module):
    """Depthwise convolution over the grid, then patch by patch: norm, two linear layers, gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=KERNEL, padding=KERNEL // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.empty(dim))
        self.depth = StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        y: Tensor = self.depth(self.full(self.convolved(x)))
        return x + y

    def convolved(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        y: Tensor = self.dwconv(x.permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1)

    def full(self, x: Tensor) -> Tensor:  # (..., C)
        y: Tensor = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        return self.gamma * y


class SparseBlock(Block):
    """A block with a cheaper path beside the full one."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.fast_path = nn.Sequential(nn.LayerNorm(dim, eps=_EPS), nn.Linear(dim, dim))
        self.fast_path_gamma = nn.Parameter(torch.empty(dim))

    def fast(self, x: Tensor) -> Tensor:  # (..., C)
        y: Tensor = self.fast_path(x)
        return self.fast_path_gamma * y

    def split(self, x: Tensor, partition: Partition) -> Tensor:
        """Each patch by the path that `partition` gives it, (B, h, w, C)."""
        convolved = self.convolved(x).flatten(1, 2)
        return x + partition.apply(self.full, self.fast, convolved).reshape(x.shape)

    def both(self, pair: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both paths for every patch, for training.

        Args:
            pair: the grid as it is if a patch takes the full path, and if it takes the fast one.
            mask: (B, h, w, 1), 1 for patches on the full path.
        """
        slow, fast = pair
        convolved = self.convolved(mix(slow, fast, mask))
        return (
            slow + self.depth(self.full(mix(convolved, slow, mask))),
            fast + self.depth(self.fast(mix(fast, convolved, mask))),
        )


class ConvNeXt(nn.Module):
    """The network; with predictors, one that sends patches of its third stage separate ways.

    In training with predictors, it computes both ways and returns a `TrainingOutput`.
    """

    def __init__(self, spec: ConvNeXtSpec) -> None:
        super().__init__()
        self.prune_before = spec.prune_before
        self.kept = spec.kept_patches
        dims = spec.dims
        self.downsample_layers = nn.ModuleList([Stem(dims[0], spec.patch_size)])
        for dim_in, dim_out in pairwise(dims):
            self.downsample_layers.append(Downsample(dim_in, dim_out))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    SparseBlock(dim) if spec.has_fast_path(stage, index) else Block(dim)
                    for index in range(depth)
                )
            )
            for stage, (dim, depth) in enumerate(zip(dims, spec.depths, strict=True))
        )
        self.norm = nn.LayerNorm(dims[-1], eps=_EPS)
        self.head = nn.Linear(dims[-1], spec.num_classes)
        self.score_predictor = nn.ModuleList(
            Predictor(dims[PRUNED_STAGE], spec.prunable_patches, eps=_EPS, pointwise=True)
            for _ in spec.prune_before
        )

    def forward(self, image: Tensor) -> Tensor | TrainingOutput:  # (B, 3, H, W) -> (B, classes)
        if self.training and self.prune_before:
            return self._decide(image)
        x = image
        for stage, (downsample, blocks) in enumerate(
            zip(self.downsample_layers, self.stages, strict=True)
        ):
            x = downsample(x)
            x = self._sparse_stage(x) if stage == PRUNED_STAGE else blocks(x)
        logits: Tensor = self.head(self.norm(x.mean((1, 2))))
        return logits

    def teach(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the last stage's patches (B, N, C), for a sparsified student to learn from."""
        assert not self.prune_before, "a teacher keeps all patches"
        x = image
        for downsample, blocks in zip(self.downsample_layers, self.stages, strict=True):
            x = blocks(downsample(x))
        return self._answer(x)

    def _sparse_stage(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        partition = None
        for index, block in enumerate(self.stages[PRUNED_STAGE].children()):
            if index in self.prune_before:
                number = self.prune_before.index(index)
                patches = x.flatten(1, 2)
                partition = divide(patches, self.score_predictor[number], self.kept[number])
            if partition is None:
                x = block(x)
            else:
                assert isinstance(block, SparseBlock)
                x = block.split(x, partition)
        return x

    def _decide(self, image: Tensor) -> TrainingOutput:
        x = image
        for downsample, blocks in zip(
            self.downsample_layers[:PRUNED_STAGE], self.stages[:PRUNED_STAGE], strict=True
        ):
            x = blocks(downsample(x))
        x = self.downsample_layers[PRUNED_STAGE](x)
        everywhere = torch.ones_like(x[..., :1])
        mask, pair, decisions = everywhere, (x, x), []
        for index, block in enumerate(self.stages[PRUNED_STAGE].children()):
            if index in self.prune_before:
                predictor = self.score_predictor[self.prune_before.index(index)]
                patches = mix(*pair, mask).flatten(1, 2)
                decision = predictor(patches, everywhere.flatten(1, 2))
                mask = decision.reshape(everywhere.shape)
                decisions.append(decision.squeeze(-1))
            if isinstance(block, SparseBlock):
                pair = block.both(pair, mask)
            else:
                pair = (block(pair[0]),) * 2
        x = mix(*pair, mask)
        for downsample, blocks in zip(
            self.downsample_layers[PRUNED_STAGE + 1 :],
            self.stages[PRUNED_STAGE + 1 :],
            strict=True,
        ):
            x = blocks(downsample(x))
        logits, tokens = self._answer(x)
        return TrainingOutput(logits, tokens, torch.ones_like(tokens[..., 0]), tuple(decisions))

    def _answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.norm(x.mean((1, 2)))), self.norm(x).flatten(1, 2)


def build(spec: ConvNeXtSpec, state: State) -> ConvNeXt:
    """The network of `spec` with the weights of `state`, in evaluation mode."""
    return with_weights(lambda: ConvNeXt(spec), state)


def resize_weights(state: State, _spec: ConvNeXtSpec) -> State:
    """`state` itself: nothing in it depends on the image size."""
    return state


random_weights = draw_weights
