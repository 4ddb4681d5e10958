"""The pruning networks as their papers and published code compute them, function by function.

In float64, on plain state dicts, with nothing of the modules under test: tokens are selected by
sorting log-probabilities and scattered back, windows are cut by slicing a rolled grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]


@dataclass
class Result:
    """Logits (B, classes), and which patches (B, kept) each stage keeps, ascending, in the grid."""

    logits: Tensor
    kept: list[Tensor] = field(default_factory=list)


def _linear(x: Tensor, state: State, name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"].flatten(1), state.get(f"{name}.bias"))


def _norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, state[f"{name}.bias"], eps)


def _mlp(x: Tensor, state: State, names: tuple[str, str]) -> Tensor:
    return _linear(F.gelu(_linear(x, state, names[0])), state, names[1])


def log_probabilities(x: Tensor, state: State, name: str, eps: float = 1e-5) -> Tensor:
    """The score predictor on patches (B, N, C) that are all alive: (B, N, 2)."""
    y = F.gelu(_linear(_norm(x, state, f"{name}.in_conv.0", eps), state, f"{name}.in_conv.1"))
    half = y.shape[2] // 2
    everyone = y[:, :, half:].mean(1, keepdim=True).expand(-1, y.shape[1], -1)
    y = F.gelu(_linear(torch.cat([y[:, :, :half], everyone], -1), state, f"{name}.out_conv.0"))
    y = _mlp(y, state, (f"{name}.out_conv.2", f"{name}.out_conv.4"))
    return y.log_softmax(-1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return torch.stack([image[chosen] for image, chosen in zip(x, index, strict=True)])


def _attention(x: Tensor, state: State, name: str, heads: int, bias: Tensor | None) -> Tensor:
    """(..., N, C), one head after the other."""
    q, k, v = _linear(x, state, f"{name}.qkv").tensor_split(3, -1)
    outputs = []
    for head, (hq, hk, hv) in enumerate(
        zip(*(part.tensor_split(heads, -1) for part in (q, k, v)), strict=True)
    ):
        scores = hq @ hk.transpose(-2, -1) / hq.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias[..., head, :, :]
        outputs.append(scores.softmax(-1) @ hv)
    return _linear(torch.cat(outputs, -1), state, f"{name}.proj")


def vision_transformer(
    state: State,
    image: Tensor,
    *,
    kind: str,
    patch_size: int,
    depth: int,
    heads: int,
    prune_before: Sequence[int] = (),
    ratios: Sequence[float] = (),
) -> Result:
    """DeiT or LV-ViT; DynamicViT where it prunes."""
    deit = kind == "deit"
    eps, gain = (1e-6, 1.0) if deit else (1e-5, 0.5)
    x = image
    if not deit:
        for layer, stride in ((1, 2), (2, 1), (3, 1)):
            weight = state[f"patch_embed.conv{layer}.weight"]
            x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
            entries = ("running_mean", "running_var", "weight", "bias")
            x = F.relu(F.batch_norm(x, *(state[f"patch_embed.bn{layer}.{e}"] for e in entries)))
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    grid = F.conv2d(x, weight, bias, stride=patch_size if deit else patch_size // 2)
    x = grid.flatten(2).transpose(1, 2)
    patches = x.shape[1]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    alive = torch.arange(patches).expand(len(x), -1)
    kept = []
    for index in range(depth):
        if index in prune_before:
            stage = list(prune_before).index(index)
            log_p = log_probabilities(x[:, 1:], state, f"score_predictor.{stage}")
            keep = int(patches * ratios[stage])
            best = log_p[:, :, 0].argsort(dim=1, descending=True)[:, :keep]
            alive = alive.gather(1, best)
            kept.append(alive.sort(1).values)
            x = torch.cat([x[:, :1], _rows(x[:, 1:], best)], 1)
        block = f"blocks.{index}"
        y = _norm(x, state, f"{block}.norm1", eps)
        x = x + gain * _attention(y, state, f"{block}.attn", heads, None)
        y = _norm(x, state, f"{block}.norm2", eps)
        x = x + gain * _mlp(y, state, (f"{block}.mlp.fc1", f"{block}.mlp.fc2"))
    x = _norm(x, state, "norm", eps)
    logits = _linear(x[:, 0], state, "head")
    if not deit:
        logits = logits + 0.5 * _linear(x[:, 1:], state, "aux_head").max(1).values
    return Result(logits, kept)


def _divided(x: Tensor, full: Tensor, fast: Tensor, kept: Tensor) -> Tensor:
    """`full` for kept patches, `fast` for the others: both computed everywhere, one taken."""
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask.scatter_(1, kept, True)
    return torch.where(mask.unsqueeze(-1), full, fast)


def convnext(
    state: State,
    image: Tensor,
    *,
    patch_size: int,
    depths: Sequence[int],
    prune_before: Sequence[int] = (),
    ratios: Sequence[float] = (),
) -> Result:
    """ConvNeXt, its third stage sparsified."""
    eps, x, kept, now = 1e-6, image, [], None
    for stage, depth in enumerate(depths):
        name = f"downsample_layers.{stage}"
        if stage:
            x = _norm(x.permute(0, 2, 3, 1), state, f"{name}.0", eps).permute(0, 3, 1, 2)
            x = F.conv2d(x, state[f"{name}.1.weight"], state[f"{name}.1.bias"], stride=2)
        else:
            x = F.conv2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"], stride=patch_size)
            x = _norm(x.permute(0, 2, 3, 1), state, f"{name}.1", eps).permute(0, 3, 1, 2)
        for index in range(depth):
            if stage == 2 and index in prune_before:
                number = list(prune_before).index(index)
                tokens = x.flatten(2).transpose(1, 2)
                log_p = log_probabilities(tokens, state, f"score_predictor.{number}", eps)
                keep = int(tokens.shape[1] * ratios[number])
                now = log_p[:, :, 0].argsort(dim=1, descending=True)[:, :keep]
                kept.append(now.sort(1).values)
            block = f"stages.{stage}.{index}"
            weight = state[f"{block}.dwconv.weight"]
            bias = state[f"{block}.dwconv.bias"]
            y = F.conv2d(x, weight, bias, padding=3, groups=len(weight))
            y = y.flatten(2).transpose(1, 2)
            full = _mlp(
                _norm(y, state, f"{block}.norm", eps),
                state,
                (f"{block}.pwconv1", f"{block}.pwconv2"),
            )
            y_new = state[f"{block}.gamma"] * full
            if stage == 2 and now is not None:
                fast = _norm(y, state, f"{block}.fast_path.0", eps)
                fast = _linear(fast, state, f"{block}.fast_path.1")
                y_new = _divided(y, y_new, state[f"{block}.fast_path_gamma"] * fast, now)
            x = x + y_new.transpose(1, 2).reshape(x.shape)
    return Result(_linear(_norm(x.mean((2, 3)), state, "norm", eps), state, "head"), kept)


def _window_bias(state: State, name: str, side: int, window: int, shift: int) -> Tensor:
    """Position bias and the mask of shifted windows, (windows, heads, n, n), pair by pair."""
    table = state[f"{name}.relative_position_bias_table"]
    places = [(row, column) for row in range(window) for column in range(window)]
    bias = torch.stack(
        [
            torch.stack(
                [
                    table[(i[0] - j[0] + window - 1) * (2 * window - 1) + i[1] - j[1] + window - 1]
                    for j in places
                ]
            )
            for i in places
        ]
    ).permute(2, 0, 1)
    label = torch.zeros(side, side)
    if shift:
        bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for row, rows in enumerate(bands):
            for column, columns in enumerate(bands):
                label[rows, columns] = 3 * row + column
    masks = []
    for top in range(0, side, window):
        for left in range(0, side, window):
            here = label[top : top + window, left : left + window].flatten()
            masks.append((here[:, None] != here[None, :]) * -100.0)
    return bias.unsqueeze(0) + torch.stack(masks).unsqueeze(1)


def _window_attention(
    x: Tensor, state: State, name: str, *, heads: int, window: int, shift: int
) -> Tensor:
    """(B, h, w, C)."""
    side = x.shape[1]
    bias = _window_bias(state, name, side, window, shift)
    rolled = x.roll((-shift, -shift), (1, 2))
    result = torch.zeros_like(rolled)
    number = 0
    for top in range(0, side, window):
        for left in range(0, side, window):
            cut = rolled[:, top : top + window, left : left + window]
            y = _attention(cut.flatten(1, 2), state, name, heads, bias[number])
            result[:, top : top + window, left : left + window] = y.reshape(cut.shape)
            number += 1
    return result.roll((shift, shift), (1, 2))


def swin(
    state: State,
    image: Tensor,
    *,
    patch_size: int,
    depths: Sequence[int],
    head_dim: int,
    window: int,
    prune_before: Sequence[int] = (),
    ratios: Sequence[float] = (),
) -> Result:
    """Swin Transformer, its third stage sparsified."""
    eps, kept, now = 1e-5, [], None
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(image, weight, bias, stride=patch_size).permute(0, 2, 3, 1)
    x = _norm(x, state, "patch_embed.norm", eps)
    for stage, depth in enumerate(depths):
        for index in range(depth):
            if stage == 2 and index in prune_before:
                number = list(prune_before).index(index)
                tokens = x.flatten(1, 2)
                log_p = log_probabilities(tokens, state, f"layers.2.score_predictor.{number}")
                keep = int(tokens.shape[1] * ratios[number])
                now = log_p[:, :, 0].argsort(dim=1, descending=True)[:, :keep]
                kept.append(now.sort(1).values)
            block = f"layers.{stage}.blocks.{index}"
            x = x + _window_attention(
                _norm(x, state, f"{block}.norm1", eps),
                state,
                f"{block}.attn",
                heads=x.shape[3] // head_dim,
                window=window,
                shift=window // 2 if index % 2 and x.shape[1] > window else 0,
            )
            y = x.flatten(1, 2)
            new = _mlp(
                _norm(y, state, f"{block}.norm2", eps),
                state,
                (f"{block}.mlp.fc1", f"{block}.mlp.fc2"),
            )
            if stage == 2 and now is not None:
                fast = _norm(y, state, f"{block}.fastmlp.fc1.0", eps)
                new = _divided(y, new, _linear(fast, state, f"{block}.fastmlp.fc1.1"), now)
            x = x + new.reshape(x.shape)
        if stage + 1 < len(depths):
            corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
            merged = _norm(torch.cat(corners, -1), state, f"layers.{stage}.downsample.norm", eps)
            x = _linear(merged, state, f"layers.{stage}.downsample.reduction")
    return Result(_linear(_norm(x, state, "norm", eps).mean((1, 2)), state, "head"), kept)
