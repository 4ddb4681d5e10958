"""State dicts before they become modules: drawn at random, or interpolated."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from gfcompile.compile.models.spec import ModelSpec

State = Mapping[str, Tensor]


def draw_weights(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Untrained weights, the same for the same seed, that make every parameter count.

    A freshly initialized transformer pays equal attention to all and scores all patches alike,
    so an error in the compiled model could hide, and a rounding could flip which patches it
    keeps. Matrices are drawn to preserve the variance of what passes them, which gives
    queries, keys and scores the spread that trained ones have; biases deviate from 0 by 0.02,
    gains and variances from 1 by a tenth.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in spec.shapes().items():
        if name.endswith(("bias", "running_mean")) or name in ("cls_token", "pos_embed"):
            mean, std = 0.0, 0.02
        elif name.endswith("relative_position_bias_table"):
            mean, std = 0.0, 0.2
        elif len(shape) == 1:
            mean, std = 1.0, 0.1
        else:
            mean, std = 0.0, 1 / math.sqrt(math.prod(shape[1:]))
        drawn = torch.empty(shape).normal_(mean, std, generator=generator)
        # Five deviations below its mean a variance is still positive; beyond, it is held there.
        state[name] = drawn.clamp_min(0.5) if name.endswith("running_var") else drawn
    return state


def start_weights(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Weights as the papers start training from: matrices of deviation 0.02, cheap paths off."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in spec.shapes().items():
        if name.endswith(("bias", "running_mean")):
            state[name] = torch.zeros(shape)
        elif name.endswith("gamma"):
            state[name] = torch.full(shape, 1e-6)
        elif len(shape) == 1:
            state[name] = torch.ones(shape)
        else:
            drawn = torch.empty(shape)
            torch.nn.init.trunc_normal_(drawn, std=0.02, generator=generator)
            state[name] = drawn
    return state


def resample_grid(grid: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """A grid of vectors (h, w, C) at another size, by bicubic interpolation."""
    channels_first = grid.permute(2, 0, 1).unsqueeze(0)  # (1, C, h, w)
    resized = F.interpolate(channels_first, size, mode="bicubic", align_corners=align_corners)
    return resized[0].permute(1, 2, 0)
