"""Deciding which patches matter, shared by all families that prune (arXiv:2106.02034)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_POLICY_EPS = 1e-6


class TrainingOutput(NamedTuple):
    """What a pruning model returns in training mode, for the loss of the paper.

    Attributes:
        logits: (B, classes).
        tokens: (B, N, C), what is compared with the parent's tokens.
        kept: (B, N), 1 where that comparison counts and 0 at dropped patches; no gradient.
        decisions: one (B, N') per pruning stage, 1 for kept and 0 for dropped, with gradients
            through the Gumbel softmax.
    """

    logits: Tensor
    tokens: Tensor
    kept: Tensor
    decisions: tuple[Tensor, ...]


class Pointwise(nn.Conv2d):
    """A linear layer over the last axis, whose weight is stored as that of a 1x1 convolution."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C')
        return F.linear(x, self.weight.flatten(1), self.bias)


class Predictor(nn.Module):
    """Judges each patch by itself and by the mean of those alive.

    In training: a hard decision for each patch, drawn by Gumbel softmax, (B, N, 1). Otherwise
    the patches to keep, best first, (B, keep).

    Args:
        keep: how many patches are kept in evaluation; set to all where the others are used too.
        pointwise: whether linear layers are stored as 1x1 convolutions.
    """

    def __init__(self, dim: int, keep: int, *, eps: float = 1e-5, pointwise: bool = False) -> None:
        super().__init__()
        linear = Pointwise if pointwise else nn.Linear
        self.keep = keep
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, eps=eps), linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            linear(dim, dim // 2),
            nn.GELU(),
            linear(dim // 2, dim // 4),
            nn.GELU(),
            linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, patches: Tensor, alive: Tensor) -> Tensor:
        """Decisions, or indices (see above).

        Args:
            patches: (B, N, C).
            alive: (B, N, 1), 1 for patches that are in the mean, 0 for others.
        """
        log_probabilities = self.log_probabilities(patches, alive)
        if self.training:
            return F.gumbel_softmax(log_probabilities, hard=True)[..., :1]
        order = log_probabilities[..., 0].argsort(dim=1, descending=True)
        return order[:, : self.keep]

    def log_probabilities(self, patches: Tensor, alive: Tensor) -> Tensor:
        """Of keeping and of dropping each patch, (B, N, 2)."""
        x = self.in_conv(patches)
        local, shared = x.chunk(2, dim=-1)  # (B, N, C/2) each
        count = alive.sum(1, keepdim=True).clamp_min(1)  # a draw may drop all patches of an image
        mean = (shared * alive).sum(1, keepdim=True) / count
        judged: Tensor = self.out_conv(torch.cat([local, mean.expand_as(local)], dim=-1))
        return judged


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Row index[b, k] of each x[b]: (B, N, C), (B, K) -> (B, K, C).

    One gather of whole rows: an element-wise one would need an index per channel.
    """
    batch, tokens, channels = x.shape
    start = torch.arange(0, batch * tokens, tokens, device=index.device)
    rows = (index + start.unsqueeze(1)).flatten()
    return x.reshape(-1, channels).index_select(0, rows).reshape(batch, -1, channels)


class Partition:
    """The patches of each image in two sets, of which each takes a path of its own.

    Args:
        order: (B, N), all patches, those of the first set first.
        keep: how many are in the first set.
    """

    def __init__(self, order: Tensor, keep: int) -> None:
        self.order = order
        self.keep = keep
        self.places = order.argsort(dim=1)  # the inverse permutation

    def apply(
        self, full: Callable[[Tensor], Tensor], fast: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """`full` of the first set and `fast` of the others, each back in its place, (B, N, C)."""
        kept, others = self.order[:, : self.keep], self.order[:, self.keep :]
        done = torch.cat([full(take_tokens(x, kept)), fast(take_tokens(x, others))], dim=1)
        return take_tokens(done, self.places)


def divide(patches: Tensor, predictor: nn.Module, keep: int) -> Partition | None:
    """Which path each of `patches` (B, N, C) takes; None where all take the full one."""
    if keep == patches.shape[1]:
        return None
    order = predictor(patches, torch.ones_like(patches[..., :1]))
    return Partition(order, keep)


def mix(one: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """`one` where `mask` is 1, `other` where it is 0, with gradients to the mask."""
    return one * mask + other * (1 - mask)


def masked_softmax(scores: Tensor, policy: Tensor) -> Tensor:
    """Softmax over the tokens that `policy` keeps, and every token itself.

    Dropped tokens get no attention but still compute, so that all of a batch keep one shape and
    gradients reach the policy. A trace of eps keeps the division defined.

    Args:
        scores: (B, heads, N, N).
        policy: (B, N, 1), 1 for tokens that are kept, 0 for others.
    """
    tokens = scores.shape[-1]
    allowed = policy.reshape(-1, 1, 1, tokens)
    itself = torch.eye(tokens, dtype=scores.dtype, device=scores.device)
    allowed = allowed + (1 - allowed) * itself  # (B, 1, N, N)
    dtype = torch.promote_types(scores.dtype, torch.float32)  # as softmax in mixed precision
    weights: Tensor = _WeightedSoftmax.apply(scores.to(dtype), allowed.to(dtype))  # type: ignore[no-untyped-call]
    return weights


class _WeightedSoftmax(torch.autograd.Function):
    """p = (a e + eps/N) / (sum of a e + eps) along the last axis, where e = exp(x - max x).

    As one function it passes over its tensors half as often as autograd would, and keeps two of
    them: training in which all tokens compute is bound by memory. The maximum counts as a constant,
    as it cancels up to eps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        e = (x - x.amax(-1, keepdim=True)).exp_()
        p = e * a
        total = p.sum(-1, keepdim=True).add_(_POLICY_EPS)
        p.add_(_POLICY_EPS / x.shape[-1]).div_(total)
        ctx.save_for_backward(e, a, p, total)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        e, a, p, total = ctx.saved_tensors
        # dp_j / d(a e)_k = (1 if j = k, else 0, less p_j) / total
        of_e = (grad - (grad * p).sum(-1, keepdim=True)).div_(total).mul_(e)
        return of_e * a, of_e.sum_to_size(a.shape)
