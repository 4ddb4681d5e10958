"""Our torchao Quantizer: reads an exported graph and marks what the scheme quantizes."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx

from gfcompile.quantize._pt2e import (
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from gfcompile.quantize.attention import Attention, find_attentions, module_name
from gfcompile.quantize.filters import find_filters
from gfcompile.quantize.observers import ActivationObserver, FixedObserver, WeightObserver
from gfcompile.quantize.scheme import OpKind, QuantScheme
from gfcompile.runtime.errors import UserError

__all__ = ["KeptFloat", "QuantNode", "SchemeQuantizer", "find_layers"]

aten = torch.ops.aten
_INT32 = torch.iinfo(torch.int32)
_NAMED = "the scheme names it"
_WEIGHTLESS: tuple[OpKind, ...] = ("attention", "global_filter")


@dataclass(frozen=True, kw_only=True)
class QuantNode:
    """An input to quantize, with the weight and bias that it meets.

    An attention has three, named "q", "k" and "v" behind its own name, and no weights. A global
    filter has one; its weights are rounded apart, see `filters`.

    Attributes:
        name: the layer's in the module.
        node: the layer's in the exported graph.
        index: which operand of it the input is.
    """

    name: str
    op: OpKind
    node: fx.Node
    index: int = 0

    @property
    def input(self) -> fx.Node:
        return _operand(self.node, self.index)

    @property
    def weight(self) -> fx.Node | None:
        return None if self.op in _WEIGHTLESS else _operand(self.node, 1)

    @property
    def bias(self) -> fx.Node | None:
        weightless = self.op in _WEIGHTLESS or not _has_bias(self.node)
        return None if weightless else _operand(self.node, 2)


@dataclass(frozen=True, kw_only=True)
class KeptFloat:
    """A layer that stays in float, and why: an attention, or one with a matrix of weights."""

    name: str
    reason: str


def find_layers(
    graph: fx.Graph, scheme: QuantScheme
) -> tuple[tuple[QuantNode, ...], tuple[KeptFloat, ...]]:
    """The layers that the scheme quantizes, and those that it could have but does not.

    Raises:
        UserError: a name in `scheme.keep_float` that is no layer's.
    """
    chosen: list[QuantNode] = []
    kept: list[KeptFloat] = []
    attentions = {attention.softmax: attention for attention in find_attentions(graph)}
    filters = {found.forward: found for found in find_filters(graph)}
    for node in graph.nodes:
        if node in filters and scheme.takes_int8(filters[node].name):
            name = filters[node].name
            if filters[node].is_rewritable:
                chosen.append(QuantNode(name=name, op="global_filter", node=node))
            else:
                kept.append(KeptFloat(name=name, reason="its spectrum is computed"))
            continue
        if node in attentions:
            attention = attentions[node]
            reason = _keeps_attention(attention, scheme)
            if reason is None:
                chosen += [
                    QuantNode(
                        name=f"{attention.name}.{part}",
                        op="attention",
                        node=edge.user,
                        index=edge.index,
                    )
                    for part, edge in attention.operands.items()
                ]
            else:
                kept.append(KeptFloat(name=attention.name, reason=reason))
            continue
        if node.target == aten.scaled_dot_product_attention.default:
            kept.append(KeptFloat(name=module_name(node), reason="attention in a single call"))
            continue
        if node.target == aten.linear.default:
            op: OpKind | None = "linear"
            other = ""
        elif node.target in (aten.conv2d.default, aten.conv2d.padding):
            op = "patch_conv2d" if _tiles_its_input(node) else None
            other = "a convolution that is no patch embedding"
        elif node.target == aten.matmul.default and _is_constant(node, 1):
            op = None
            other = "a matrix product that is no Linear"
        else:
            continue
        name = _layer_name(node)
        if scheme.keeps_float(name):
            kept.append(KeptFloat(name=name, reason=_NAMED))
        elif op is None:
            kept.append(KeptFloat(name=name, reason=other))
        elif op not in scheme.ops:
            kept.append(KeptFloat(name=name, reason=f"the scheme leaves {op} layers in float"))
        elif not _is_constant(node, 1) or (_has_bias(node) and not _is_constant(node, 2)):
            kept.append(KeptFloat(name=name, reason="its weight or bias is computed"))
        else:
            chosen.append(QuantNode(name=name, op=op, node=node))
    names = [layer.name for layer in chosen if layer.op not in _WEIGHTLESS]
    names += [attention.name for attention in attentions.values()]
    _check_names(scheme.keep_float, "layer", "keep in float", names + [k.name for k in kept])
    _check_names(
        scheme.int8_filters, "filter", "compute in int8", [f.name for f in filters.values()]
    )
    return tuple(chosen), tuple(kept)


class SchemeQuantizer(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Puts observers on input, weight and bias of every layer that the scheme quantizes.

    Only edges into these layers are annotated, never an output: a tensor that also feeds a filter
    or a residual addition reaches those in float.
    """

    def __init__(
        self,
        scheme: QuantScheme,
        activation_observer: type[ActivationObserver] = ActivationObserver,
        weight_observer: type[WeightObserver] = WeightObserver,
        fixed_observer: type[FixedObserver] = FixedObserver,
        **options: object,
    ) -> None:
        """`options` go to those observers whose parameters are not fixed."""
        super().__init__()
        self.scheme = scheme
        activation, weight = scheme.activation, scheme.weight
        self._activation = QuantizationSpec(
            dtype=torch.int8,
            quant_min=activation.low,
            quant_max=activation.high,
            observer_or_fake_quant_ctr=activation_observer.with_args(
                scheme=activation, rule=scheme.activation_range, **options
            ),
        )
        self._weight = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-weight.stored_high,
            quant_max=weight.stored_high,
            observer_or_fake_quant_ctr=weight_observer.with_args(
                scheme=weight, rule=scheme.weight_range, **options
            ),
        )

        self._softmax = QuantizationSpec(
            dtype=torch.int8,
            quant_min=activation.low,
            quant_max=activation.high,
            observer_or_fake_quant_ctr=fixed_observer.with_args(
                scheme=activation,
                scale=scheme.softmax_scale,
                zero_point=scheme.softmax_zero_point,
            ),
        )

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        layers, _ = find_layers(model.graph, self.scheme)
        for layer in layers:
            specs = {layer.input: self._activation}
            if layer.weight is not None:
                specs[layer.weight] = self._weight
            if layer.bias is not None:
                assert layer.weight is not None
                specs[layer.bias] = DerivedQuantizationSpec(
                    derived_from=[(layer.input, layer.node), (layer.weight, layer.node)],
                    derive_qparams_fn=_bias_qparams,
                    dtype=torch.int32,
                    # Wide enough to saturate nothing: WeightObserver makes the room.
                    quant_min=_INT32.min,
                    quant_max=_INT32.max,
                    qscheme=torch.per_channel_symmetric,
                    ch_axis=0,
                )
            _annotate(layer.node, specs)
        for attention in find_attentions(model.graph):
            if _keeps_attention(attention, self.scheme) is None:
                _annotate(attention.weights.user, {attention.weights.source: self._softmax})
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to check: `find_layers` annotates only what it has examined."""


def _bias_qparams(
    observers: list[ActivationObserver | WeightObserver],
) -> tuple[torch.Tensor, torch.Tensor]:
    (input_scale, _), (weight_scales, zeros) = (o.calculate_qparams() for o in observers)
    return input_scale * weight_scales, zeros


def _annotate(node: fx.Node, specs: dict[fx.Node, object]) -> None:
    """Adds to what is said of the node's inputs; a product may take two."""
    known = node.meta.get("quantization_annotation")
    if known is not None:
        specs = {**known.input_qspec_map, **specs}
    node.meta["quantization_annotation"] = QuantizationAnnotation(
        input_qspec_map=specs, _annotated=True
    )


def _keeps_attention(attention: Attention, scheme: QuantScheme) -> str | None:
    """Why an attention stays in float; None if it does not."""
    if scheme.keeps_float(attention.name):
        return _NAMED
    if "attention" not in scheme.ops:
        return "the scheme leaves attention in float"
    return None


def _tiles_its_input(conv: fx.Node) -> bool:
    defaults: tuple[object, ...] = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    args = (*conv.args, *defaults[len(conv.args) :])
    stride, padding, dilation, groups = args[3:7]
    kernel = _operand(conv, 1).meta["val"].shape[2:]
    return (
        _pair(stride) == tuple(kernel)
        and _pair(padding) in ((0, 0), ("valid", "valid"))
        and _pair(dilation) == (1, 1)
        and groups == 1
    )


def _pair(value: object) -> tuple[object, ...]:
    sizes = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return sizes * 2 if len(sizes) == 1 else sizes


def _operand(node: fx.Node, index: int) -> fx.Node:
    operand = node.args[index]
    assert isinstance(operand, fx.Node), (node, index)
    return operand


def _has_bias(node: fx.Node) -> bool:
    return len(node.args) > 2 and node.args[2] is not None


def _is_constant(node: fx.Node, index: int) -> bool:
    return _operand(node, index).op == "get_attr"


def _layer_name(node: fx.Node) -> str:
    weight = _operand(node, 1)
    if weight.op == "get_attr":
        return str(weight.target).removesuffix(".weight")
    return node.name


def _check_names(patterns: tuple[str, ...], what: str, purpose: str, names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(names) or "none"
            raise UserError(f"no {what} is called {pattern!r} to {purpose}; {what}s: {known}")
