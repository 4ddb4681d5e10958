"""Pruning frozen for inference: constant sizes, and nothing that only training needs.

Each rewrite computes what it replaces, up to the rounding of sums in another order:

    score predictor                       frozen
    log softmax of two logits, first one  the difference of the logits: log softmax is its
                                          logistic's logarithm, which grows with it
    last layer's two rows                 their difference, without the bias, which would move
                                          all scores alike
    mean weighted by an all-ones policy   plain mean: what is dropped is gone, not masked
    mean copied to every patch, joined    its part of the next layer computed once, and added
    to it, then a linear layer            to every patch
    argsort, first k                      TopK of constant k, unsorted where order is not used

What is scaled by a constant is computed scaled: queries, LV-ViT's branches, and what a batch
norm follows.
"""

import copy
from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gfcompile.compile.models import dynamicvit, swin
from gfcompile.compile.models.predictor import Pointwise, Predictor


def freeze(module: nn.Module) -> nn.Module:
    """`module` as it is compiled: the same logits, and static shapes for torch.export.

    It shares the weights that no rewrite touches. Modules with nothing to rewrite, frozen ones
    among them, come back as an equal copy.
    """
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    frozen = copy.deepcopy(module, shared).eval()
    for name, child in list(frozen.named_modules()):
        for kind, rewrite in _REWRITES.items():
            if isinstance(child, kind):
                frozen.set_submodule(name, rewrite(child))
    return frozen


def selections(model: ir.Model) -> tuple[str, ...]:
    """Names of the values in a traced or lowered graph that say which patches each stage keeps.

    They are what `runtime.kept_patches.places_in_grid` takes.
    """
    return tuple(
        str(node.outputs[1].name)
        for node in model.graph
        if node.op_type == "TopK" and node.outputs[0].dtype == ir.DataType.FLOAT
    )


class FrozenPredictor(nn.Module):
    """Indices of the patches to keep, (B, keep), without the detour over probabilities."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        norm, inner, _ = predictor.in_conv
        joined, _, narrow, _, last, _ = predictor.out_conv
        weight, bias = _parameters(joined)
        half = weight.shape[1] // 2
        keep_row, drop_row = _parameters(last)[0]
        self.keep = predictor.keep
        self.norm = norm
        self.act = nn.GELU()
        self.inner = _linear(*_parameters(inner))
        self.local = _linear(weight[:, :half], bias)
        self.shared = _linear(weight[:, half:])
        self.narrow = _linear(*_parameters(narrow))
        self.score = _linear((keep_row - drop_row).unsqueeze(0))

    def forward(self, patches: Tensor, _alive: Tensor) -> Tensor:  # (B, N, C) -> (B, keep)
        scores = self.scores(patches)
        # Where all are returned, nothing but the order counts. (A size is a tensor to torch.jit.)
        ordered = bool(self.keep == scores.shape[1])
        return scores.topk(self.keep, dim=1, sorted=ordered).indices

    def scores(self, patches: Tensor) -> Tensor:
        """How much rather each patch is kept than dropped, (B, N), up to a constant."""
        x = self.act(self.inner(self.norm(patches)))
        local, shared = x.chunk(2, dim=-1)
        x = self.act(self.local(local) + self.shared(shared.mean(1, keepdim=True)))
        scores: Tensor = self.score(self.act(self.narrow(x)))
        return scores.squeeze(-1)


def _fold_batch_norms(stem: dynamicvit.ConvStem) -> nn.Module:
    for conv_name, norm_name in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")):
        conv, norm = stem.get_submodule(conv_name), stem.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        if isinstance(norm, nn.BatchNorm2d):  # not yet folded
            stem.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
            stem.set_submodule(norm_name, nn.Identity())
    return stem


def _fold_query_scale(attention: dynamicvit.Attention | swin.WindowAttention) -> nn.Module:
    weight, _ = _parameters(attention.qkv)
    scales = torch.ones(3, len(weight) // 3, dtype=torch.float64)  # queries, keys, values
    scales[0] = attention.scale
    attention.qkv = _scaled(attention.qkv, scales.flatten())
    attention.scale = 1.0
    return attention


def _fold_gain(block: dynamicvit.Block) -> nn.Module:
    if block.gain != 1:
        for name in ("attn.proj", "mlp.fc2"):
            linear = block.get_submodule(name)
            rows = len(_parameters(linear)[0])
            block.set_submodule(
                name, _scaled(linear, torch.full((rows,), block.gain, dtype=torch.float64))
            )
        block.gain = 1.0
    return block


def _scaled(layer: nn.Module, scales: Tensor) -> nn.Linear:
    """`layer` with each row of its output multiplied."""
    weight, bias = _parameters(layer)
    scales = scales.to(weight)
    return _linear(weight * scales.unsqueeze(1), None if bias is None else bias * scales)


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (rows, columns) and bias of a linear layer, or of a 1x1 convolution that is one."""
    assert isinstance(layer, nn.Linear | Pointwise)
    bias = None if layer.bias is None else layer.bias.detach()
    return layer.weight.detach().flatten(1), bias


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


_REWRITES: dict[type[nn.Module], Callable[..., nn.Module]] = {
    Predictor: FrozenPredictor,
    dynamicvit.ConvStem: _fold_batch_norms,
    dynamicvit.Attention: _fold_query_scale,
    swin.WindowAttention: _fold_query_scale,
    dynamicvit.Block: _fold_gain,
}
