"""Post-training calibration: a float module and a few images in, a QDQ module out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gfcompile.quantize._pt2e import quiet
from gfcompile.quantize.prepared import LayerQuant, one_thread, prepare
from gfcompile.quantize.quantizer import KeptFloat
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.runtime.errors import UserError

__all__ = ["Calibrated", "KeptFloat", "LayerQuant", "calibrate", "check_images"]


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A quantized module, and what calibration decided.

    Attributes:
        module: takes and returns float; within, PT2E's quantize and dequantize ops, which
            torch.onnx.export turns into a QDQ graph. Its batch size is fixed.
        layers: the quantized layers in the order in which they run.
        kept_float: the layers with weights that are not quantized, and why.
        images: how many calibration images were seen.
        training: how the weights were trained for this, JSON values; empty if they were not.
    """

    module: nn.Module
    scheme: QuantScheme
    layers: tuple[LayerQuant, ...]
    kept_float: tuple[KeptFloat, ...]
    images: int
    training: Mapping[str, Any] = field(default_factory=dict)


def calibrate(
    module: nn.Module,
    batches: Sequence[torch.Tensor],
    scheme: QuantScheme | None = None,
    *,
    batch_size: int = 1,
) -> Calibrated:
    """The module quantized for the value ranges that the calibration images bring about.

    The same inputs give bit-equal scales, whatever number of threads torch has, in whatever order
    they come, and whatever the batch size: ranges are taken image by image. The given module is
    left as it was.

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
    images = check_images(module, batches)
    with torch.no_grad(), one_thread(), quiet():
        prepared = prepare(module, images[0][None], scheme or QuantScheme())
        for image in images:
            prepared.graph(image[None])
        prepared.settle()
        records = prepared.records()
        converted = prepared
        if batch_size > 1:
            example = images[0].expand(batch_size, *images[0].shape)
            converted = prepare(module, example, prepared.scheme)
            converted.settle_like(prepared)
        quantized = converted.convert()
    return Calibrated(
        module=quantized,
        scheme=prepared.scheme,
        layers=records,
        kept_float=prepared.kept_float,
        images=len(images),
    )


def check_images(module: nn.Module, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The images one by one.

    Raises:
        UserError: see `calibrate`.
    """
    images = [image for batch in batches for image in batch]
    if not images:
        raise UserError("calibration needs at least one image")
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise UserError(f"calibration images must have one shape, got {shapes[0]} and {shapes[1]}")
    if module.training:
        raise UserError("calibration needs the module in eval mode: call module.eval() first")
    return images
