"""Global Filter Networks (arXiv:2107.00645), written to be traced.

Parameters are named and shaped as in the weights published with the paper. Dropout and
stochastic depth, which evaluation does not see, are left out.
"""

import math

import torch
from torch import Tensor, nn

from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.compile.models.layers import Mlp, PatchEmbed, with_weights
from gfcompile.compile.models.weights import State, resample_grid

_FILTER = ".filter.complex_weight"


class GlobalFilter(nn.Module):
    """irfft2(rfft2(x) * K) over the token grid (h, w), for each channel its own K."""

    def __init__(self, dim: int, h: int, w: int) -> None:
        super().__init__()
        self.h = h
        self.w = w
        self.complex_weight = nn.Parameter(torch.empty(h, w // 2 + 1, dim, 2))

    def forward(self, x: Tensor) -> Tensor:  # (B, h*w, C)
        grid = x.reshape(x.shape[0], self.h, self.w, x.shape[2])
        spectrum = torch.fft.rfft2(grid, dim=(1, 2), norm="ortho")  # (B, h, w//2+1, C)
        spectrum = spectrum * torch.view_as_complex(self.complex_weight)
        y: Tensor = torch.fft.irfft2(spectrum, s=(self.h, self.w), dim=(1, 2), norm="ortho")
        return y.reshape(x.shape)


class Block(nn.Module):
    """x + gamma * mlp(norm2(filter(norm1(x)))): one residual; gamma in the pyramids only."""

    def __init__(self, dim: int, side: int, *, gain: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.filter = GlobalFilter(dim, side, side)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = nn.Parameter(torch.empty(dim)) if gain else None

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        branch: Tensor = self.mlp(self.norm2(self.filter(self.norm1(x))))
        return x + (branch if self.gamma is None else self.gamma * branch)


class DownLayer(nn.Module):
    """Four neighbouring tokens to one of the next stage."""

    def __init__(self, dim_in: int, dim_out: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Conv2d(dim_in, dim_out, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, N/4, C')
        grid = x.reshape(x.shape[0], self.side, self.side, x.shape[2])
        halved: Tensor = self.proj(grid.permute(0, 3, 1, 2))  # (B, C', h/2, w/2)
        return halved.flatten(2).transpose(1, 2)


class GFNet(nn.Module):
    """The network with one stage."""

    def __init__(self, spec: GFNetSpec) -> None:
        super().__init__()
        (dim,), (depth,), (side,) = spec.dims, spec.depths, spec.sides
        self.patch_embed = PatchEmbed(dim, spec.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, dim))
        self.blocks = nn.ModuleList(Block(dim, side, gain=False) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, spec.num_classes)

    def forward(self, image: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, classes)
        x = self.patch_embed(image) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class GFNetPyramid(nn.Module):
    """The network whose token grid halves from stage to stage."""

    def __init__(self, spec: GFNetSpec) -> None:
        super().__init__()
        dims, sides = spec.dims, spec.sides
        self.patch_embed = nn.ModuleList([PatchEmbed(dims[0], spec.patch_size)])
        for stage in range(1, len(dims)):
            self.patch_embed.append(DownLayer(dims[stage - 1], dims[stage], sides[stage - 1]))
        self.pos_embed = nn.Parameter(torch.empty(1, sides[0] ** 2, dims[0]))
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(dim, side, gain=True) for _ in range(depth)))
            for dim, depth, side in zip(dims, spec.depths, sides, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], spec.num_classes)

    def forward(self, image: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, classes)
        x = image
        for stage, (embed, blocks) in enumerate(zip(self.patch_embed, self.blocks, strict=True)):
            x = embed(x)
            if stage == 0:
                x = x + self.pos_embed
            x = blocks(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def build(spec: GFNetSpec, state: State) -> nn.Module:
    """The network of `spec` with the weights of `state`, in evaluation mode.

    Filters are made Hermitian on the way in, whoever trained or drew them.
    """
    weights = {
        name: hermitian(value, value.shape[0]) if name.endswith(_FILTER) else value
        for name, value in state.items()
    }
    network: type[GFNet | GFNetPyramid] = GFNetPyramid if spec.is_pyramid else GFNet
    return with_weights(lambda: network(spec), weights)


def hermitian(weight: Tensor, w: int) -> Tensor:
    """The part of a filter that the inverse real transform sees: (h, w//2+1, C, 2), for width w.

    In the first column, and for even w in the last, a real signal's spectrum is Hermitian along
    h. A learned filter is not; NumPy and PyTorch on a CPU ignore what is left over, other FFTs
    define no result for it. Dropping it here changes nothing there and lets all agree.
    """
    columns = [0] if w % 2 else [0, w // 2]
    edge = torch.view_as_complex(weight[:, columns].contiguous())  # (h, 1 or 2, C)
    mirrored = edge.flip(0).roll(1, 0).conj()  # row p holds conj(K[-p % h])
    projected = weight.clone()
    projected[:, columns] = torch.view_as_real((edge + mirrored) / 2)
    return projected


def resize_weights(state: State, spec: GFNetSpec) -> State:
    """`state` for the image size of `spec`, interpolated as the paper does before fine-tuning.

    Position embeddings are resampled bicubically by pixel centres, filters bicubically over the
    half spectrum with aligned corners, so that both the zero and the highest frequency stay.
    """
    targets = spec.shapes()
    return {
        name: value if value.shape == targets[name] else _resize(name, value, targets[name])
        for name, value in state.items()
    }


def _resize(name: str, value: Tensor, target: tuple[int, ...]) -> Tensor:
    if name == "pos_embed":
        old, new = math.isqrt(value.shape[1]), math.isqrt(target[1])
        grid = value.reshape(old, old, -1)
        return resample_grid(grid, (new, new)).reshape(target)
    assert name.endswith(_FILTER), f"{name} does not depend on the image size"
    h, half = target[:2]
    return resample_grid(value.flatten(2), (h, half), align_corners=True).reshape(target)


def random_weights(spec: GFNetSpec, seed: int) -> State:
    """Untrained weights, the same for the same seed, that make every parameter count.

    Linear layers, embeddings and filters are drawn as the paper initializes them. Its filters
    are tiny, but norm2 follows each and restores the scale, so logits do differ from image to
    image. Where training starts from a constant, this draws around one instead, or an error in
    the compiled model could hide: biases deviate from 0 by 0.02, norm gains from 1 by 0.1, and
    so do layer scales, whose 1e-3 to 1e-6 would blot out every block of a pyramid.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = spec.shapes()
    state = {}
    for name, shape in shapes.items():
        if ".proj." in name:
            fan_in = math.prod(shapes[name.replace("bias", "weight")][1:])
            bound = 1 / math.sqrt(fan_in)  # PyTorch's own for a convolution
            state[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        elif len(shape) == 1 and not name.endswith("bias"):
            state[name] = torch.empty(shape).normal_(1, 0.1, generator=generator)
        else:
            state[name] = torch.empty(shape).normal_(0, 0.02, generator=generator)
    return state
