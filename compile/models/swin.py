"""Swin Transformer (arXiv:2103.14030), and dynamic spatial sparsification of it (arXiv:2207.01580).

In the sparsified third stage all patches attend to their window, but only those that a
predictor keeps go through the MLP; the others take a linear layer. Parameters are named and
shaped as in the published weights of each.
"""

import torch
from torch import Tensor, nn

from gfcompile.compile.models.layers import Mlp, PatchEmbed, StochasticDepth, with_weights
from gfcompile.compile.models.predictor import (
    Partition,
    Predictor,
    TrainingOutput,
    divide,
    mix,
)
from gfcompile.compile.models.predictor_specs import PRUNED_STAGE
from gfcompile.compile.models.swin_specs import SwinSpec
from gfcompile.compile.models.weights import State, draw_weights

_FAR = -100.0  # added to the score of patches that only the shift has made neighbours


class NormalizedPatchEmbed(PatchEmbed):
    """An image to normalized tokens."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__(dim, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, N, C)
        y: Tensor = self.norm(super().forward(x))
        return y


class WindowAttention(nn.Module):
    """Attention of the patches of each window to one another, with a bias for relative position.

    Windows are cut from the grid rolled by `shift`, so one may hold patches from opposite edges
    of the image: these are kept apart.
    """

    order: Tensor
    places: Tensor
    relative: Tensor
    apart: Tensor

    def __init__(self, dim: int, heads: int, *, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.window = window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        order = _windows_of(side, window, shift)
        constants = {
            "order": order.flatten(),  # where in the grid the patches of the windows are
            "places": order.flatten().argsort(),  # and back
            "relative": _relative_positions(window),
            "apart": _regions_apart(side, window, shift),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        batch, _, dim = x.shape
        tokens = self.window**2
        windows = x.index_select(1, self.order).reshape(-1, tokens, dim)
        q, k, v = (
            part.reshape(-1, tokens, self.heads, dim // self.heads).transpose(1, 2)
            for part in self.qkv(windows).chunk(3, dim=-1)
        )  # (B*windows, heads, tokens, C/heads) each
        q = q if self.scale == 1 else q * self.scale
        weights = (q @ k.transpose(2, 3) + self._bias(batch)).softmax(-1)
        y = self.proj((weights @ v).transpose(1, 2).reshape(-1, tokens, dim))
        back: Tensor = y.reshape(batch, -1, dim).index_select(1, self.places)
        return back

    def _bias(self, batch: int) -> Tensor:  # (1 or B*windows, heads, tokens, tokens)
        bias = self.relative_position_bias_table[self.relative].permute(2, 0, 1).unsqueeze(0)
        return bias if len(self.apart) == 1 else (bias + self.apart).repeat(batch, 1, 1, 1)


class FastMlp(nn.Module):
    """What stands in for the MLP: a norm and one linear layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc1(x)
        return y


class Block(nn.Module):
    """Window attention and MLP, each on a residual."""

    def __init__(self, spec: SwinSpec, stage: int, index: int) -> None:
        super().__init__()
        dim = spec.dims[stage]
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(
            dim,
            dim // spec.head_dim,
            side=spec.sides[stage],
            window=spec.window,
            shift=spec.shift(stage, index),
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.depth = StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        x = self.attended(x)
        y: Tensor = self.depth(self.full(x))
        return x + y

    def attended(self, x: Tensor) -> Tensor:
        y: Tensor = self.depth(self.attn(self.norm1(x)))
        return x + y

    def full(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.norm2(x))
        return y


class SparseBlock(Block):
    """A block with a cheaper path beside the MLP."""

    def __init__(self, spec: SwinSpec, stage: int, index: int) -> None:
        super().__init__(spec, stage, index)
        self.fastmlp = FastMlp(spec.dims[stage])

    def split(self, x: Tensor, partition: Partition) -> Tensor:
        """Each patch by the path that `partition` gives it, (B, N, C)."""
        x = self.attended(x)
        return x + partition.apply(self.full, self.fastmlp, x)

    def both(self, pair: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both paths for every patch, for training.

        Args:
            pair: the tokens as they are if a patch takes the full path, and if the fast one.
            mask: (B, N, 1), 1 for patches on the full path.
        """
        slow, fast = pair
        x = self.attended(mix(slow, fast, mask))
        return (
            x + self.depth(self.full(mix(x, slow, mask))),
            x + self.depth(self.fastmlp(mix(fast, x, mask))),
        )


class PatchMerging(nn.Module):
    """Four neighbouring patches to one of the next stage: norm, linear layer."""

    def __init__(self, dim_in: int, dim_out: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * dim_in)
        self.reduction = nn.Linear(4 * dim_in, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, N/4, C')
        half = self.side // 2
        cut = x.reshape(x.shape[0], half, 2, half, 2, x.shape[2])
        # The four lie column by column along the channels, as published.
        joined = cut.permute(0, 1, 3, 4, 2, 5).reshape(x.shape[0], half * half, -1)
        y: Tensor = self.reduction(self.norm(joined))
        return y


class Stage(nn.Module):
    """The blocks of one grid size; with predictors, they send patches separate ways."""

    def __init__(self, spec: SwinSpec, stage: int) -> None:
        super().__init__()
        dim, side = spec.dims[stage], spec.sides[stage]
        prunes = stage == PRUNED_STAGE
        self.prune_before = spec.prune_before if prunes else ()
        self.kept = spec.kept_patches if prunes else ()
        self.blocks = nn.ModuleList(
            (SparseBlock if spec.has_fast_path(stage, index) else Block)(spec, stage, index)
            for index in range(spec.depths[stage])
        )
        is_last = stage + 1 == len(spec.dims)
        self.downsample = None if is_last else PatchMerging(dim, spec.dims[stage + 1], side)
        self.score_predictor = nn.ModuleList(
            Predictor(dim, spec.prunable_patches) for _ in self.prune_before
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, N/4, C')
        partition = None
        for index, block in enumerate(self.blocks):
            if index in self.prune_before:
                number = self.prune_before.index(index)
                partition = divide(x, self.score_predictor[number], self.kept[number])
            if partition is None:
                x = block(x)
            else:
                assert isinstance(block, SparseBlock)
                x = block.split(x, partition)
        return x if self.downsample is None else self.downsample(x)

    def decide(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `forward` returns, for training, and the decisions (B, N) made on the way."""
        everywhere = torch.ones_like(x[..., :1])
        mask, pair = everywhere, (x, x)
        decisions: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index in self.prune_before:
                predictor = self.score_predictor[self.prune_before.index(index)]
                mask = predictor(mix(*pair, mask), everywhere)
                decisions.append(mask.squeeze(-1))
            if isinstance(block, SparseBlock):
                pair = block.both(pair, mask)
            else:
                pair = (block(pair[0]),) * 2
        x = mix(*pair, mask)
        return x if self.downsample is None else self.downsample(x), tuple(decisions)


class SwinTransformer(nn.Module):
    """The network; with predictors, one that sends patches of its third stage separate ways.

    In training with predictors, it computes both ways and returns a `TrainingOutput`.
    """

    def __init__(self, spec: SwinSpec) -> None:
        super().__init__()
        self.prunes = bool(spec.prune_before)
        self.patch_embed = NormalizedPatchEmbed(spec.dims[0], spec.patch_size)
        self.layers = nn.ModuleList(Stage(spec, stage) for stage in range(len(spec.dims)))
        self.norm = nn.LayerNorm(spec.dims[-1])
        self.head = nn.Linear(spec.dims[-1], spec.num_classes)

    def forward(self, image: Tensor) -> Tensor | TrainingOutput:  # (B, 3, H, W) -> (B, classes)
        if self.training and self.prunes:
            return self._decide(image)
        logits, _ = self._answer(image)
        return logits

    def teach(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the last stage's patches (B, N, C), for a sparsified student to learn from."""
        assert not self.prunes, "a teacher keeps all patches"
        return self._answer(image)

    def _answer(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(image)
        for stage in self.layers:
            x = stage(x)
        tokens = self.norm(x)
        return self.head(tokens.mean(1)), tokens

    def _decide(self, image: Tensor) -> TrainingOutput:
        x = self.patch_embed(image)
        decisions: tuple[Tensor, ...] = ()
        for stage in self.layers:
            assert isinstance(stage, Stage)
            x, made = stage.decide(x)
            decisions += made
        tokens = self.norm(x)
        logits = self.head(tokens.mean(1))
        return TrainingOutput(logits, tokens, torch.ones_like(tokens[..., 0]), decisions)


def _windows_of(side: int, window: int, shift: int) -> Tensor:
    """Position in the grid of each patch of each window, (windows, window**2)."""
    # On the CPU whatever the device of the parameters: nothing loads these.
    grid = torch.arange(side * side, device="cpu").reshape(side, side)
    return _cut(grid.roll((-shift, -shift), (0, 1)), window)


def _cut(grid: Tensor, window: int) -> Tensor:  # (h, w) -> (windows, window**2)
    count = len(grid) // window
    cut = grid.reshape(count, window, count, window).transpose(1, 2)
    return cut.reshape(count * count, window * window)


def _relative_positions(window: int) -> Tensor:
    """Row of the bias table for each pair of patches of a window, (window**2, window**2)."""
    line = torch.arange(window, device="cpu")
    row, column = line.repeat_interleave(window), line.repeat(window)
    down = row.unsqueeze(1) - row.unsqueeze(0) + window - 1
    right = column.unsqueeze(1) - column.unsqueeze(0) + window - 1
    return down * (2 * window - 1) + right


def _regions_apart(side: int, window: int, shift: int) -> Tensor:
    """`_FAR` for pairs of a window that are no neighbours in the image, (windows or 1, 1, n, n)."""
    if shift == 0:
        return torch.zeros(1, 1, 1, 1, device="cpu")
    line = torch.zeros(side, dtype=torch.int64, device="cpu")
    line[side - shift :] = 1  # what the roll has brought from the opposite edge
    region = _cut(line.unsqueeze(1) * 2 + line.unsqueeze(0), window)
    differ = region.unsqueeze(1) != region.unsqueeze(2)
    return differ.unsqueeze(1) * _FAR


def build(spec: SwinSpec, state: State) -> SwinTransformer:
    """The network of `spec` with the weights of `state`, in evaluation mode."""
    return with_weights(lambda: SwinTransformer(spec), state)


def resize_weights(state: State, _spec: SwinSpec) -> State:
    """`state` itself: nothing in it depends on the image size."""
    return state


random_weights = draw_weights
