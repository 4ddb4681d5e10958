"""What each layer costs when it alone is quantized, and which ones are therefore left in float.

The global filters are analysed as well, in two int8 forms: as circular convolutions with an int8
kernel, which the scheme takes for those that bear it if it is asked to, and on int8 spectra, which
it never takes. That is what a compiler does that quantizes whatever it finds; the mean of the
image, which is one bin, sets the scale of all others.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gfcompile.quantize._pt2e import quiet
from gfcompile.quantize.attention import Attention, find_attentions
from gfcompile.quantize.calibration import check_images
from gfcompile.quantize.fake_quant import FixedFakeQuant
from gfcompile.quantize.filters import Filter, find_filters
from gfcompile.quantize.observers import ActivationObserver, WeightObserver
from gfcompile.quantize.prepared import export, one_thread
from gfcompile.quantize.quantizer import KeptFloat, QuantNode, find_layers
from gfcompile.quantize.scheme import AUTO, OpKind, QuantScheme, automatic_layers
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.exactness import sqnr_db

__all__ = ["Sensitivity", "analyze", "choose", "explain", "most_sensitive", "robust_filters"]

aten = torch.ops.aten
Kind = OpKind | Literal["filter as circular int8", "filter on int8 spectra"]
Edit = Callable[..., Any]

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The model with this alone quantized, against the float model.

    Attributes:
        name: the layer's, the attention's or the filter's, in the module.
        sqnr_db: of the logits.
        loss: mean Kullback-Leibler divergence of the class probabilities from the float ones, which
            is by how much cross-entropy grows for labels drawn from those.
        top1_agreement: of the images, the fraction with the same best class.
        grid: of a filter: rows, columns, channels.
    """

    name: str
    kind: Kind
    sqnr_db: float
    loss: float
    top1_agreement: float
    grid: tuple[int, int, int] | None = None


def analyze(
    module: nn.Module, batches: Sequence[Tensor], scheme: QuantScheme
) -> tuple[Sensitivity, ...]:
    """Every layer that the scheme quantizes, and every global filter, in the order of the model.

    Args:
        module: float, in eval mode; left as it is.
        batches: float32 images (n, 3, H, W), any n each; ranges are calibrated on the same ones.
    """
    images = torch.stack(check_images(module, batches))
    if len(images) < 2:
        raise UserError("the analysis needs at least two images")
    with torch.no_grad(), one_thread(), quiet():
        graph = export(module, images[:2], any_batch=True)
        layers, _ = find_layers(graph.graph, scheme)
        order = {node.name: i for i, node in enumerate(graph.graph.nodes)}
        probes: dict[tuple[str, Kind], Mapping[fx.Node, Edit]] = {}
        observers: dict[fx.Node, Edit] = {}
        named = {layer.name for layer in layers}
        for attention in find_attentions(graph.graph):
            if f"{attention.name}.q" in named:
                watching, rounding = _attention_probe(attention, scheme)
                observers |= watching
                probes[attention.name, "attention"] = rounding
                order[attention.name] = order[attention.softmax.name]
        for layer in layers:
            if layer.op in ("attention", "global_filter"):
                continue
            activation = ActivationObserver(scheme.activation, scheme.activation_range)
            observers[layer.node] = _watching(activation, layer.node)
            probes[layer.name, layer.op] = {layer.node: _rounded_layer(layer, activation, scheme)}
            order[layer.name] = order[layer.node.name]
        grids = {found.name: found.grid for found in find_filters(graph.graph)}
        for found in find_filters(graph.graph):
            signal = ActivationObserver(scheme.activation, scheme.activation_range)
            observers[found.forward] = _watching(signal, found.forward)
            probes[found.name, "filter as circular int8"] = {
                found.forward: _rounded_input(found, signal),
                found.product: _rounded_kernel(found),
            }
            spectrum = ActivationObserver(scheme.activation, scheme.activation_range)
            observers[found.product] = _watching_spectrum(spectrum, found)
            probes[found.name, "filter on int8 spectra"] = {
                found.product: _rounded_spectrum(found, spectrum)
            }
            order[found.name] = order[found.forward.name]
        expected = _run(graph, images, observers)
        results = []
        for (name, kind), edits in probes.items():
            logits = _run(graph, images, edits)
            results.append(
                Sensitivity(
                    name=name,
                    kind=kind,
                    sqnr_db=sqnr_db(expected.numpy(), logits.numpy()),
                    loss=_divergence(expected, logits),
                    top1_agreement=float((expected.argmax(1) == logits.argmax(1)).float().mean()),
                    grid=grids.get(name),
                )
            )
    return tuple(sorted(results, key=lambda result: order[result.name]))


def most_sensitive(results: Iterable[Sensitivity], count: int) -> tuple[str, ...]:
    """The names of the `count` layers whose quantization costs most, worst first.

    Raises:
        UserError: there are not that many.
    """
    layers = [result for result in results if not result.kind.startswith("filter")]
    if not 0 <= count < len(layers):
        raise UserError(
            f"--keep-float auto:{count}: the model has {len(layers)} layers to quantize, and at "
            "least one must stay"
        )
    worst = sorted(layers, key=lambda result: (-result.loss, result.sqnr_db))
    return tuple(result.name for result in worst[:count])


def robust_filters(
    results: Iterable[Sensitivity], pays: Callable[[int, int, int], bool]
) -> tuple[str, ...]:
    """The names of the filters that are to be computed in int8.

    Those whose circular form costs no more than the median layer, and is the faster one.

    Args:
        pays: whether the circular form of a filter (rows, columns, channels) is.
    """
    found = list(results)
    losses = [result.loss for result in found if not result.kind.startswith("filter")]
    return tuple(
        result.name
        for result in found
        if result.kind == "filter as circular int8"
        and result.grid is not None
        and pays(*result.grid)
        and result.loss <= statistics.median(losses)
    )


def choose(
    scheme: QuantScheme,
    module: nn.Module,
    batches: Sequence[Tensor],
    *,
    pays: Callable[[int, int, int], bool] = lambda *_: True,
) -> tuple[QuantScheme, tuple[Sensitivity, ...]]:
    """The scheme with names in place of "auto", and the analysis behind them.

    Without "auto:K" in `keep_float` and "auto" in `int8_filters` it is the scheme as it was, and
    nothing is analysed.

    Args:
        pays: see `robust_filters`; without it where the model will run is not known.

    Raises:
        UserError: a K that is no number, or too large.
    """
    named = tuple(name for name in scheme.keep_float if not name.startswith(AUTO))
    wanted = automatic_layers(scheme.keep_float)
    filters = tuple(name for name in scheme.int8_filters if name != "auto")
    if wanted is None and filters == scheme.int8_filters:
        return scheme, ()
    results = analyze(module, batches, replace(scheme, keep_float=named, int8_filters=filters))
    if wanted is not None:
        named = (*named, *most_sensitive(results, wanted))
    if filters != scheme.int8_filters:
        filters = tuple(dict.fromkeys([*filters, *robust_filters(results, pays)]))
    return replace(scheme, keep_float=named, int8_filters=filters), results


def explain(kept: Iterable[KeptFloat], results: Iterable[Sensitivity]) -> tuple[KeptFloat, ...]:
    """The layers kept in float, with what the analysis found where it chose them."""
    found = {result.name: result for result in results}
    return tuple(
        replace(
            layer,
            reason=f"quantized alone, it leaves {found[layer.name].sqnr_db:.1f} dB "
            f"and costs {found[layer.name].loss:.2g} in loss",
        )
        if layer.name in found
        else layer
        for layer in kept
    )


class _Probe(fx.Interpreter):
    """Runs a graph with some of its calls replaced."""

    def __init__(self, graph: fx.GraphModule, edits: Mapping[fx.Node, Edit]) -> None:
        super().__init__(graph)
        self.edits = edits

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.edits:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return self.edits[n](*args, **kwargs)


def _run(graph: fx.GraphModule, images: Tensor, edits: Mapping[fx.Node, Edit]) -> Tensor:
    return torch.cat([_Probe(graph, edits).run(batch) for batch in torch.split(images, _BATCH)])


def _call(node: fx.Node) -> Edit:
    assert callable(node.target), node
    return node.target


def _watching(observer: ActivationObserver, node: fx.Node) -> Edit:
    def watch(x: Tensor, *rest: Any, **kwargs: Any) -> Any:
        return _call(node)(observer(x), *rest, **kwargs)

    return watch


def _watching_spectrum(observer: ActivationObserver, found: Filter) -> Edit:
    def watch(*args: Tensor) -> Any:
        observer(torch.view_as_real(args[1 - found.constant_index]))
        return _call(found.product)(*args)

    return watch


def _round(observer: ActivationObserver, x: Tensor, name: str) -> Tensor:
    chosen = observer.settle(name)
    low, high = observer.scheme.low, observer.scheme.high
    return torch.fake_quantize_per_tensor_affine(x, chosen.scale, chosen.zero_point, low, high)


def _attention_probe(
    attention: Attention, scheme: QuantScheme
) -> tuple[dict[fx.Node, Edit], dict[fx.Node, Edit]]:
    """What watches an attention's operands, and what rounds them and its softmax."""
    watching: dict[fx.Node, dict[int, Edit]] = {}
    rounding: dict[fx.Node, dict[int, Edit]] = {}
    for part, edge in attention.operands.items():
        observer = ActivationObserver(scheme.activation, scheme.activation_range)
        watching.setdefault(edge.user, {})[edge.index] = observer
        rounding.setdefault(edge.user, {})[edge.index] = partial(
            _round, observer, name=f"{attention.name}.{part}"
        )
    softmax = FixedFakeQuant(scheme.activation, scheme.softmax_scale, scheme.softmax_zero_point)
    rounding[attention.weights.user][attention.weights.index] = softmax
    return (
        {node: _on_operands(node, edits) for node, edits in watching.items()},
        {node: _on_operands(node, edits) for node, edits in rounding.items()},
    )


def _on_operands(node: fx.Node, edits: Mapping[int, Edit]) -> Edit:
    def run(*args: Any) -> Any:
        edited = [edits[i](arg) if i in edits else arg for i, arg in enumerate(args)]
        return _call(node)(*edited)

    return run


def _rounded_layer(layer: QuantNode, activation: ActivationObserver, scheme: QuantScheme) -> Edit:
    def run(x: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> Any:
        observer = WeightObserver(scheme.weight, scheme.weight_range)
        observer(weight)
        rounded = torch.from_numpy(observer.rounded(weight.numpy()))
        return _call(layer.node)(_round(activation, x, layer.name), rounded, *rest, **kwargs)

    return run


def _rounded_input(found: Filter, observer: ActivationObserver) -> Edit:
    def run(x: Tensor, *rest: Any, **kwargs: Any) -> Any:
        return _call(found.forward)(_round(observer, x, found.name), *rest, **kwargs)

    return run


def _rounded_spectrum(found: Filter, observer: ActivationObserver) -> Edit:
    index = found.constant_index

    def run(*args: Tensor) -> Any:
        parts = torch.view_as_real(args[1 - index]).contiguous()
        return torch.view_as_complex(_round(observer, parts, found.name)) * args[index]

    return run


def _rounded_kernel(found: Filter) -> Edit:
    """The product with the spectrum of the int8 kernel of the same circular convolution."""
    rounding, index = found.rounding(), found.constant_index

    def run(*args: Tensor) -> Any:
        return rounding(args[index]) * args[1 - index]

    return run


def _divergence(expected: Tensor, logits: Tensor) -> float:
    return float(
        F.kl_div(
            F.log_softmax(logits.double(), dim=1),
            F.log_softmax(expected.double(), dim=1),
            reduction="batchmean",
            log_target=True,
        )
    )
