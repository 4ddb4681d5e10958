"""A module with an observer at every place that the scheme quantizes, on its way to QDQ form."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from gfcompile.quantize._pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e, quiet
from gfcompile.quantize.fake_quant import (
    ActivationFakeQuant,
    BiasFakeQuant,
    FixedFakeQuant,
    WeightFakeQuant,
)
from gfcompile.quantize.filters import Filter, find_filters
from gfcompile.quantize.observers import ActivationObserver, WeightObserver
from gfcompile.quantize.quantizer import KeptFloat, QuantNode, SchemeQuantizer, find_layers
from gfcompile.quantize.scheme import OpKind, QuantScheme
from gfcompile.runtime.errors import CompileError
from gfcompile.runtime.exactness import sqnr_db

__all__ = ["LayerQuant", "Prepared", "export", "one_thread", "prepare", "prepare_training"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LayerQuant:
    """How one layer was quantized, or one of an attention's three operands.

    Attributes:
        activation_low, activation_high: what calibration saw at the layer's input.
        clipped_fraction: of those values, how many lie beyond the representable range.
        activation_sqnr_db, weight_sqnr_db: signal to quantization noise; an operand of attention
            meets no weight.
    """

    name: str
    op: OpKind
    activation_scale: float
    activation_zero_point: int
    activation_low: float
    activation_high: float
    clipped_fraction: float
    activation_sqnr_db: float
    weight_sqnr_db: float | None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An exported module that watches, or rounds, what the scheme quantizes.

    Attributes:
        graph: the module; its parameters are called as in the one that it was exported from.
        layers: those to quantize, in the order in which they run.
        kept_float: the others that have weights, and why.
        filters: those of `layers` that are global filters.
    """

    graph: fx.GraphModule
    scheme: QuantScheme
    layers: tuple[QuantNode, ...]
    kept_float: tuple[KeptFloat, ...]
    filters: tuple[Filter, ...]

    @property
    def weighted(self) -> tuple[QuantNode, ...]:
        """The layers that have weights."""
        return tuple(layer for layer in self.layers if layer.weight is not None)

    def settle(self) -> None:
        """Fixes the scales of every layer; before this its observers have only watched.

        Raises:
            CompileError: a layer without usable values.
        """
        for layer in self.layers:
            self.activation(layer).settle(layer.name)
        for layer in self.weighted:
            _check_finite(self.constant(layer, 1), f"the weight of {layer.name}")
            if layer.bias is not None:
                _check_finite(self.constant(layer, 2), f"the bias of {layer.name}")
        self.make_room_for_biases()

    def make_room_for_biases(self) -> None:
        """Raises the scales of weights that are so small that their bias would be saturated."""
        for layer in self.weighted:
            if layer.bias is not None:
                scale = self.activation(layer).settle(layer.name).scale
                bias, limit = self.constant(layer, 2), self.scheme.bias_limit
                self.weight(layer).make_room_for_bias(bias, scale, limit)

    def settle_like(self, other: "Prepared") -> None:
        """Takes the scales of the same module, prepared for another batch size."""
        for layer, same in zip(self.layers, other.layers, strict=True):
            self.activation(layer).settle_as(other.activation(same).settle(same.name))
        for layer, same in zip(self.weighted, other.weighted, strict=True):
            settled = other.weight(same)
            assert settled.scales is not None, "settle() comes first"
            self.weight(layer).settle_as(settled.scales, settled.chosen_factors)

    def records(self) -> tuple[LayerQuant, ...]:
        """What was settled, layer by layer."""
        # Layers that share a weight settle its scales together, so this comes after all have.
        return tuple(self._record(layer) for layer in self.layers)

    def rounded_weight(self, layer: QuantNode) -> Array:
        """The values that the layer's weight is rounded to."""
        return self.weight(layer).rounded(self.constant(layer, 1))

    def rounded_filters(self) -> dict[str, torch.Tensor]:
        """The parameters of the filters in int8, by name, as these round them."""
        return {found.parameter: found.rounded_parameter(self.graph) for found in self.filters}

    def convert(self) -> nn.Module:
        """The module in QDQ form, for the scales that were settled."""
        rounded = self.rounded_filters()
        if self.scheme.weight.group_size is not None:
            # PT2E knows scales of channels alone: what it rounds to those is rounded already.
            for layer in self.weighted:
                name = self.constant_name(layer, 1)
                rounded[name] = torch.from_numpy(self.rounded_weight(layer))
        for name, values in rounded.items():
            owner, _, attribute = name.rpartition(".")
            weight = nn.Parameter(values, requires_grad=False)
            setattr(self.graph.get_submodule(owner), attribute, weight)
        converted: nn.Module = convert_pt2e(self.graph)
        # convert_pt2e leaves the module in training mode, with eval() made to raise: the graph has
        # no modes left. Exporters ask for eval mode all the same.
        del converted.train, converted.eval
        return converted.eval()

    def activation(self, layer: QuantNode) -> ActivationObserver:
        """What watches the layer's input."""
        observer = self.graph.get_submodule(str(layer.input.target))
        assert isinstance(observer, ActivationObserver), observer
        return observer

    def weight(self, layer: QuantNode) -> WeightObserver:
        """What watches the layer's weight."""
        assert layer.weight is not None, layer
        observer = self.graph.get_submodule(str(layer.weight.target))
        assert isinstance(observer, WeightObserver), observer
        return observer

    def activation_fake_quant(self, layer: QuantNode) -> ActivationFakeQuant:
        """What watches or rounds the layer's input, of a module that was prepared for training."""
        fake = self.activation(layer)
        assert isinstance(fake, ActivationFakeQuant), fake
        return fake

    def weight_fake_quant(self, layer: QuantNode) -> WeightFakeQuant:
        """The same for the layer's weight."""
        fake = self.weight(layer)
        assert isinstance(fake, WeightFakeQuant), fake
        return fake

    def fake_quants(self) -> tuple[ActivationFakeQuant | WeightFakeQuant, ...]:
        """All of them; layers may share one."""
        inputs = [self.activation_fake_quant(layer) for layer in self.layers]
        weights = [self.weight_fake_quant(layer) for layer in self.weighted]
        return tuple(dict.fromkeys([*inputs, *weights]))

    def constant_name(self, layer: QuantNode, index: int) -> str:
        """The name of the layer's weight (1) or bias (2) among the module's parameters."""
        observer = layer.node.args[index]
        assert isinstance(observer, fx.Node), observer
        source = observer.args[0]
        assert isinstance(source, fx.Node), source
        assert source.op == "get_attr", source
        return str(source.target)

    def constant(self, layer: QuantNode, index: int) -> Array:
        """The values of the layer's weight (1) or bias (2)."""
        constant = operator.attrgetter(self.constant_name(layer, index))(self.graph)
        assert isinstance(constant, torch.Tensor), constant
        return np.asarray(constant.detach().cpu().numpy(), np.float32)

    def _record(self, layer: QuantNode) -> LayerQuant:
        activation = self.activation(layer)
        chosen = activation.settle(layer.name)
        return LayerQuant(
            name=layer.name,
            op=layer.op,
            activation_scale=chosen.scale,
            activation_zero_point=chosen.zero_point,
            activation_low=activation.low,
            activation_high=activation.high,
            clipped_fraction=activation.clipped_fraction(),
            activation_sqnr_db=activation.sqnr_db(),
            weight_sqnr_db=None if layer.weight is None else self._weight_sqnr_db(layer),
        )

    def _weight_sqnr_db(self, layer: QuantNode) -> float:
        return sqnr_db(self.constant(layer, 1), self.rounded_weight(layer))


def prepare(module: nn.Module, example: torch.Tensor, scheme: QuantScheme) -> Prepared:
    """The module for inputs of `example`'s shape, batch included, with observers in it.

    Raises:
        CompileError: the module cannot be exported, or has nothing to quantize.
    """
    with quiet():
        exported = export(module, example)
        layers, kept_float = _find(exported, scheme)
        filters = _filters(exported, layers)
        graph = prepare_pt2e(exported, SchemeQuantizer(scheme))
    return Prepared(
        graph=graph, scheme=scheme, layers=layers, kept_float=kept_float, filters=filters
    )


def prepare_training(
    module: nn.Module, example: torch.Tensor, scheme: QuantScheme, *, learn_scales: bool
) -> Prepared:
    """The module for any batch size, with fake quantization in it, which still only watches.

    Args:
        example: at least two images; torch.export takes a size of one for a constant.
        learn_scales: see `ActivationFakeQuant`.

    Raises:
        CompileError: the module cannot be exported, or has nothing to quantize.
    """
    with quiet():
        exported = export(module, example, any_batch=True)
        layers, kept_float = _find(exported, scheme)
        filters = _filters(exported, layers)
        quantizer = SchemeQuantizer(
            scheme, ActivationFakeQuant, WeightFakeQuant, FixedFakeQuant, learn=learn_scales
        )
        # With what was put into it on the device of the rest: ranges, and scales that are learned.
        graph = prepare_qat_pt2e(exported, quantizer).to(example.device)
    prepared = Prepared(
        graph=graph, scheme=scheme, layers=layers, kept_float=kept_float, filters=filters
    )
    for index, found in enumerate(filters):
        name = f"filter_fake_quant_{index}"
        graph.add_submodule(name, found.rounding())
        with graph.graph.inserting_before(found.product):
            rounded = graph.graph.call_module(name, (found.spectrum,))
        found.product.update_arg(found.constant_index, rounded)
    graph.recompile()
    for layer in prepared.weighted:
        if layer.bias is not None:
            # PT2E's own module for it derives the scale at the end and rounds nothing before.
            rounding = BiasFakeQuant(
                prepared.activation_fake_quant(layer), prepared.weight_fake_quant(layer)
            )
            graph.set_submodule(str(layer.bias.target), rounding, strict=True)
    return prepared


def export(module: nn.Module, example: torch.Tensor, *, any_batch: bool = False) -> fx.GraphModule:
    """The graph of the module's aten calls.

    Raises:
        CompileError: torch.export cannot follow the module.
    """
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    try:
        exported = torch.export.export(module, (example,), dynamic_shapes=shapes).module()
    except Exception as error:  # torch.export raises whatever the module's own code raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CompileError(
            f"torch.export cannot follow {type(module).__name__}: {reason}"
        ) from error
    assert isinstance(exported, fx.GraphModule), exported
    return exported


@contextmanager
def one_thread() -> Iterator[None]:
    """Parallel sums differ in the last bit with the number of threads; not in here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _find(
    exported: fx.GraphModule, scheme: QuantScheme
) -> tuple[tuple[QuantNode, ...], tuple[KeptFloat, ...]]:
    layers, kept_float = find_layers(exported.graph, scheme)
    if not layers:
        raise CompileError("int8: the model has no layer that the scheme quantizes")
    return layers, kept_float


def _filters(exported: fx.GraphModule, layers: tuple[QuantNode, ...]) -> tuple[Filter, ...]:
    chosen = {layer.node for layer in layers}
    return tuple(found for found in find_filters(exported.graph) if found.forward in chosen)


def _check_finite(values: Array, what: str) -> None:
    if not np.isfinite(values).all():
        raise CompileError(f"{what} holds NaN or infinity; check the checkpoint")
