"""Post-training calibration: a float module and a few images in, a QDQ module out."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from gfcompile.quantize._pt2e import convert_pt2e, prepare_pt2e, quiet
from gfcompile.quantize.observers import ActivationObserver, WeightObserver
from gfcompile.quantize.qparams import dequantize, quantize
from gfcompile.quantize.quantizer import KeptFloat, QuantNode, SchemeQuantizer, find_layers
from gfcompile.quantize.scheme import OpKind, QuantScheme
from gfcompile.runtime.errors import CompileError, UserError
from gfcompile.runtime.exactness import sqnr_db

__all__ = ["Calibrated", "KeptFloat", "LayerQuant", "calibrate"]


@dataclass(frozen=True, kw_only=True)
class LayerQuant:
    """How one layer was quantized.

    Attributes:
        activation_low, activation_high: what calibration saw at the layer's input.
        clipped_fraction: of those values, how many lie beyond the representable range.
        activation_sqnr_db, weight_sqnr_db: signal to quantization noise.
    """

    name: str
    op: OpKind
    activation_scale: float
    activation_zero_point: int
    activation_low: float
    activation_high: float
    clipped_fraction: float
    activation_sqnr_db: float
    weight_sqnr_db: float


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A quantized module, and what calibration decided.

    Attributes:
        module: takes and returns float; within, PT2E's quantize and dequantize ops, which
            torch.onnx.export turns into a QDQ graph. Its batch size is fixed.
        layers: the quantized layers in the order in which they run.
        kept_float: the layers with weights that are not quantized, and why.
        images: how many calibration images were seen.
    """

    module: nn.Module
    scheme: QuantScheme
    layers: tuple[LayerQuant, ...]
    kept_float: tuple[KeptFloat, ...]
    images: int


def calibrate(
    module: nn.Module,
    batches: Sequence[torch.Tensor],
    scheme: QuantScheme | None = None,
    *,
    batch_size: int = 1,
) -> Calibrated:
    """The module quantized for the value ranges that the calibration images bring about.

    The same inputs give bit-equal scales, whatever number of threads torch has and, image by
    image, in whatever order they come. The given module is left as it was.

    Args:
        module: in eval mode, with one image tensor as its input.
        batches: float32 images (n, 3, H, W), any n each.
        scheme: `QuantScheme()` if not given.
        batch_size: of the quantized module, whose shapes are static.

    Raises:
        UserError: no images, images of several shapes, a module in training mode, or a name in
            `scheme.keep_float` that is no layer's.
        CompileError: the module cannot be exported, has nothing to quantize, or has a layer
            without usable values.
    """
    scheme = scheme or QuantScheme()
    images = [image for batch in batches for image in batch]
    if not images:
        raise UserError("calibration needs at least one image")
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise UserError(f"calibration images must have one shape, got {shapes[0]} and {shapes[1]}")
    if module.training:
        raise UserError("calibration needs the module in eval mode: call module.eval() first")
    # Parallel sums differ in the last bit with the number of threads.
    with torch.no_grad(), _one_thread(), quiet():
        rounds = _in_batches(images, batch_size)
        exported = _export(module, rounds[0])
        layers, kept_float = find_layers(exported.graph, scheme)
        if not layers:
            raise CompileError("int8: the model has no layer that the scheme quantizes")
        prepared = prepare_pt2e(exported, SchemeQuantizer(scheme))
        for batch in rounds:
            prepared(batch)
        for layer in layers:
            _settle(prepared, layer, scheme)
        # Layers that share a weight settle its scales together, so they are read after all have.
        records = tuple(_record(prepared, layer, scheme) for layer in layers)
        converted = _for_inference(convert_pt2e(prepared))
    return Calibrated(
        module=converted,
        scheme=scheme,
        layers=records,
        kept_float=kept_float,
        images=len(images),
    )


def _in_batches(images: Sequence[torch.Tensor], size: int) -> list[torch.Tensor]:
    """The images in batches of `size`, the last one filled up from the first images."""
    padded = [images[i % len(images)] for i in range(-(-len(images) // size) * size)]
    return [torch.stack(padded[i : i + size]) for i in range(0, len(padded), size)]


def _export(module: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    try:
        exported = torch.export.export(module, (example,)).module()
    except Exception as error:  # torch.export raises whatever the module's own code raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CompileError(
            f"torch.export cannot follow {type(module).__name__}: {reason}"
        ) from error
    assert isinstance(exported, fx.GraphModule), exported
    return exported


def _for_inference(converted: fx.GraphModule) -> fx.GraphModule:
    # convert_pt2e leaves the module in training mode, with eval() made to raise: the graph has no
    # modes left. Exporters ask for eval mode all the same.
    del converted.train, converted.eval
    return converted.eval()


def _settle(prepared: fx.GraphModule, layer: QuantNode, scheme: QuantScheme) -> None:
    """Fixes the scales of one layer; before this the observers have only watched."""
    activation, weight = _observers(prepared, layer)
    chosen = activation.settle(layer.name)
    _check_finite(_constant(prepared, layer, 1), f"the weight of {layer.name}")
    if layer.bias is not None:
        bias = _constant(prepared, layer, 2)
        _check_finite(bias, f"the bias of {layer.name}")
        weight.make_room_for_bias(bias, chosen.scale, scheme.bias_limit)


def _check_finite(values: npt.NDArray[np.float32], what: str) -> None:
    if not np.isfinite(values).all():
        raise CompileError(f"{what} holds NaN or infinity; check the checkpoint")


def _record(prepared: fx.GraphModule, layer: QuantNode, scheme: QuantScheme) -> LayerQuant:
    activation, weight = _observers(prepared, layer)
    chosen = activation.settle(layer.name)
    values = _constant(prepared, layer, 1)
    assert weight.scales is not None
    scales = weight.scales.reshape(-1, *[1] * (values.ndim - 1))
    rounded = dequantize(quantize(values, scales, 0, scheme.weight), scales, 0)
    return LayerQuant(
        name=layer.name,
        op=layer.op,
        activation_scale=chosen.scale,
        activation_zero_point=chosen.zero_point,
        activation_low=activation.low,
        activation_high=activation.high,
        clipped_fraction=activation.clipped_fraction(),
        activation_sqnr_db=activation.sqnr_db(),
        weight_sqnr_db=sqnr_db(values, rounded),
    )


def _observers(
    prepared: fx.GraphModule, layer: QuantNode
) -> tuple[ActivationObserver, WeightObserver]:
    activation = prepared.get_submodule(str(layer.input.target))
    weight = prepared.get_submodule(str(layer.weight.target))
    assert isinstance(activation, ActivationObserver), activation
    assert isinstance(weight, WeightObserver), weight
    return activation, weight


def _constant(prepared: fx.GraphModule, layer: QuantNode, index: int) -> npt.NDArray[np.float32]:
    observer = layer.node.args[index]
    assert isinstance(observer, fx.Node), observer
    source = observer.args[0]
    assert isinstance(source, fx.Node), source
    assert source.op == "get_attr", source
    constant = operator.attrgetter(str(source.target))(prepared)
    assert isinstance(constant, torch.Tensor), constant
    return np.asarray(constant.detach().numpy(), np.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
