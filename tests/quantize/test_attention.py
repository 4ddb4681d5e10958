"""int8 for attention: where its parts are, and what the quantized module computes."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from gfcompile.quantize import Calibrated, QuantScheme, analyze, calibrate
from gfcompile.quantize.attention import find_attentions
from gfcompile.quantize.prepared import prepare_training
from gfcompile.runtime.exactness import sqnr_db

TOKENS, HEADS, DIM = 9, 2, 16
ATTENTION_ONLY = QuantScheme(ops=frozenset({"attention"}))
Array = npt.NDArray[np.float64]


class Attention(nn.Module):
    """Self-attention; how q, k and v come out of their product is told by `split`."""

    def __init__(self, split: str = "chunk") -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)
        self.drop = nn.Dropout(0.1)
        self.split = split
        self.mask = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, N, C)
        batch = x.shape[0]
        qkv, size = self.qkv(x), DIM // HEADS
        if self.split == "chunk":
            q, k, v = (
                part.reshape(batch, TOKENS, HEADS, size).transpose(1, 2)
                for part in qkv.chunk(3, -1)
            )
            weights = (q @ k.transpose(-2, -1) * size**-0.5).softmax(-1)
        elif self.split == "unbind":
            q, k, v = qkv.reshape(batch, TOKENS, 3, HEADS, size).permute(2, 0, 3, 1, 4).unbind(0)
            weights = self.drop((q * size**-0.5 @ k.permute(0, 1, 3, 2)).softmax(-1))
        elif self.split == "masked":
            parts = qkv.reshape(batch, TOKENS, 3, HEADS, size).permute(2, 0, 3, 1, 4)
            q, k, v = parts[0], parts[1], parts[2]
            scores = (q @ k.mT).view(1, batch, HEADS, TOKENS, TOKENS) / size**0.5 + self.mask
            weights = scores.view(batch, HEADS, TOKENS, TOKENS).softmax(-1)
        else:  # keys come transposed from the start
            q, k, v = qkv.reshape(batch, TOKENS, 3, HEADS, size).unbind(2)
            weights = F.softmax(q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * size**-0.5, -1)
            v = v.transpose(1, 2)
        y: torch.Tensor = self.proj((weights @ v).transpose(1, 2).reshape(batch, TOKENS, DIM))
        return y


class Net(nn.Module):
    def __init__(self, split: str = "chunk") -> None:
        super().__init__()
        self.embed = nn.Linear(12, DIM)
        self.attn = Attention(split)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 3, 6, 6)
        patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)
        x = self.embed(patches.reshape(x.shape[0], TOKENS, 12))
        y: torch.Tensor = x + self.attn(x)
        return y


def net(split: str = "chunk") -> nn.Module:
    torch.manual_seed(0)
    module = Net(split).eval()
    with torch.no_grad():  # scores that differ
        module.attn.qkv.weight *= 4
    return module


def images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def exported(module: nn.Module, x: torch.Tensor) -> fx.Graph:
    with torch.no_grad():
        return torch.export.export(module, (x,)).module().graph


@pytest.mark.parametrize("split", ["chunk", "unbind", "masked", "transposed"])
def test_attention_is_found_however_it_is_written(split: str) -> None:
    (found,) = find_attentions(exported(net(split), images(2)))
    assert found.name == "attn"
    size = DIM // HEADS
    shapes = {part: tuple(e.source.meta["val"].shape) for part, e in found.operands.items()}
    rows, columns = (2, HEADS, TOKENS, size), (2, HEADS, size, TOKENS)
    # Keys as tokens by channels, unless they were never in that layout.
    assert shapes == {"q": rows, "k": columns if split == "transposed" else rows, "v": rows}
    assert found.weights.index == 0


class Others(nn.Module):
    """A softmax that weighs constants, one over products with constants, one of probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 8), nn.Linear(8, 8)
        self.constant = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x.reshape(x.shape[0], TOKENS, 12))
        x = (x @ x.mT).softmax(-1)[..., :8] @ self.constant
        x = (x @ self.constant).softmax(-1).mT @ x
        return self.two(x).softmax(-1)


def test_other_softmaxes_are_left_alone() -> None:
    torch.manual_seed(0)
    module = Others().eval()
    assert list(find_attentions(exported(module, images(1)))) == []
    names = [layer.name for layer in calibrate(module, [images(2)]).layers]
    assert names == ["one", "two"]


def test_two_attentions_of_a_module_have_names_of_their_own() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(2)
            for _ in range(2):
                x = x + (x @ x.mT).softmax(-1) @ x
            return x

    found = list(find_attentions(exported(Twice(), images(1))))
    assert len({attention.name for attention in found}) == 2


def ranges(calibrated: Calibrated) -> dict[str, tuple[float, int]]:
    return {
        layer.name: (layer.activation_scale, layer.activation_zero_point)
        for layer in calibrated.layers
    }


@dataclass
class Rounding:
    """Rounds in float64, and remembers how near a value came to a tie."""

    nearest: float = 0.5

    def __call__(self, x: Array, scale: float, zero_point: int) -> Array:
        steps = x / scale
        inside = steps[(steps > -128 - zero_point) & (steps < 127 - zero_point)]
        self.nearest = min(self.nearest, float(np.abs(inside % 1 - 0.5).min()))
        return (np.clip(np.rint(steps) + zero_point, -128, 127) - zero_point) * scale


def test_a_quantized_attention_computes_what_the_scheme_says() -> None:
    module, x = net(), images(1, seed=3)
    calibrated = calibrate(module, [images(8)], ATTENTION_ONLY)
    scales = ranges(calibrated)
    assert list(scales) == ["attn.q", "attn.k", "attn.v"]
    exact = copy.deepcopy(module).double()
    with torch.no_grad():
        patches = x.double().unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)
        tokens = exact.embed(patches.reshape(1, TOKENS, 12))
        qkv = exact.attn.qkv(tokens)[0].numpy().reshape(TOKENS, 3, HEADS, -1).transpose(1, 2, 0, 3)
    rounding = Rounding()
    q, k, v = (
        rounding(part, *scales[f"attn.{name}"]) for name, part in zip("qkv", qkv, strict=True)
    )
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(DIM // HEADS)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = rounding(weights / weights.sum(-1, keepdims=True), 1 / 256, -128)
    mixed = torch.from_numpy((weights @ v).transpose(1, 0, 2).reshape(1, TOKENS, DIM))
    with torch.no_grad():
        wanted = (tokens + exact.attn.proj(mixed)).numpy()
        found = calibrated.module(x).numpy()
    # No value is so near to a tie that float32 could have decided it otherwise.
    assert rounding.nearest > 1e-4
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("split", ["chunk", "unbind", "masked", "transposed"])
def test_products_take_integers_and_softmax_takes_its_own_grid(split: str) -> None:
    calibrated = calibrate(net(split), [images(8)])
    assert isinstance(calibrated.module, fx.GraphModule)
    graph = calibrated.module.graph
    ops = torch.ops.quantized_decomposed
    (softmax,) = (n for n in graph.nodes if n.target == torch.ops.aten.softmax.int)
    products = [n for n in graph.nodes if n.target == torch.ops.aten.matmul.default]
    assert len(products) == 2
    rounded = {}
    for product in products:
        for operand in product.all_input_nodes:
            while operand.target != ops.dequantize_per_tensor.default:
                (operand,) = operand.all_input_nodes  # keys are transposed after
            rounded[product, operand] = operand.args[1:3]
    assert len(rounded) == 4
    assert (1 / 256, -128) in rounded.values()
    wanted = [v for name, v in ranges(calibrated).items() if name[-2:] in (".q", ".k", ".v")]
    assert set(rounded.values()) == {*wanted, (1 / 256, -128)}
    assert not any("quantize" in str(n.target) for n in softmax.all_input_nodes)


def test_noise_of_quantized_attention_is_that_of_eight_bits() -> None:
    module, x = net(), images(1, seed=5)
    calibrated = calibrate(module, [images(8)])
    with torch.no_grad():
        assert sqnr_db(module(x).numpy(), calibrated.module(x).numpy()) > 28


def test_attention_is_named_as_one_to_be_kept_in_float() -> None:
    module = net()
    calibrated = calibrate(module, [images(4)], QuantScheme(keep_float=("attn",)))
    assert [layer.name for layer in calibrated.layers] == ["embed", "attn.qkv", "attn.proj"]
    assert [(kept.name, kept.reason) for kept in calibrated.kept_float] == [
        ("attn", "the scheme names it")
    ]
    scheme = QuantScheme(ops=frozenset({"linear"}))
    (kept,) = calibrate(module, [images(4)], scheme).kept_float
    assert kept.reason == "the scheme leaves attention in float"


def test_attention_in_a_single_call_stays_in_float_and_says_so() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return F.scaled_dot_product_attention(y, y, y)

    module = nn.Sequential(Fused()).eval()
    (kept,) = calibrate(module, [images(2)]).kept_float
    assert (kept.name, kept.reason) == ("0", "attention in a single call")


def test_attention_is_analysed_as_one() -> None:
    module, x = net(), images(6)
    (result,) = (r for r in analyze(module, [x], QuantScheme()) if r.kind == "attention")
    assert result.name == "attn"
    alone = calibrate(module, [x], ATTENTION_ONLY, batch_size=6).module
    with torch.no_grad():
        wanted = sqnr_db(module(x).numpy(), alone(x).numpy())
    assert result.sqnr_db == pytest.approx(wanted, abs=0.2)  # a tie or two fall elsewhere


def test_fake_quantization_rounds_as_the_quantized_module_and_lets_gradients_through() -> None:
    module, x = net(), images(8)
    calibrated = calibrate(module, [x], ATTENTION_ONLY, batch_size=8)
    prepared = prepare_training(module, x, ATTENTION_ONLY, learn_scales=False)
    with torch.no_grad():
        prepared.graph(x)
    prepared.settle()
    for fake in prepared.fake_quants():
        fake.freeze(torch.device("cpu"))
    with torch.no_grad():
        trained, converted = prepared.graph(x).numpy(), calibrated.module(x).numpy()
    # The softmax was rounded while ranges were watched, which says nothing about q, k and v.
    assert np.abs(trained - converted).max() < 1e-5 * np.abs(converted).max()
    prepared.graph(x).square().sum().backward()
    weight = dict(prepared.graph.named_parameters())["attn.qkv.weight"]
    assert weight.grad is not None
    assert all(part.abs().sum() > 0 for part in weight.grad.chunk(3))
