"""Quantized checkpoints: a safetensors file with integers, scales, and how they came about.

A quantized weight W is stored as integers under its own name and as scales, one per output channel,
under `W.scale`. Integers of 4 bits lie two to a byte, the earlier one in the low half; where they
have groups, `W.factor` (channels, groups) says what the scale is multiplied by for each. Everything
else is float32 under its own name. The rest is JSON in the file's metadata.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gfcompile.quantize._pt2e import quiet
from gfcompile.quantize.calibration import Calibrated
from gfcompile.quantize.files import write_atomically
from gfcompile.quantize.int4 import pack_int4, unpack_int4
from gfcompile.quantize.metadata import KEY, read_header
from gfcompile.quantize.prepared import LayerQuant, Prepared, one_thread, prepare
from gfcompile.quantize.qparams import QParams, dequantize, quantize, steps_of, with_factors
from gfcompile.quantize.quantizer import KeptFloat
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.records import parse_json

__all__ = [
    "QuantizedCheckpoint",
    "load_quantized",
    "read_quantized",
    "write_quantized",
]

_FORMAT = 2  # 1 knows no groups; checkpoints without any are of that
_SCALE = ".scale"
_FACTOR = ".factor"


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    """A model's weights, rounded, and the scales that they are rounded to.

    Attributes:
        state: float32, by name; every quantized weight is a multiple of its scales.
        scales: of each quantized weight, by its name: one per output channel.
        factors: the same where the scheme has groups: (channels, groups), that scales are
            multiplied by.
        layers: the quantized layers in the order in which they run, with the scale and zero point
            of their inputs.
        kept_float: layers with weights that are not quantized, and why.
        images: how many images the ranges were calibrated on.
        training: how the weights were trained, JSON values; empty if they were only calibrated.
    """

    state: Mapping[str, torch.Tensor]
    scales: Mapping[str, npt.NDArray[np.float32]]
    scheme: QuantScheme
    layers: tuple[LayerQuant, ...]
    kept_float: tuple[KeptFloat, ...]
    images: int
    factors: Mapping[str, npt.NDArray[np.uint8]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


def write_quantized(checkpoint: QuantizedCheckpoint, path: Path) -> None:
    """Writes the checkpoint to `path`, in one step."""
    import safetensors.torch

    bits = checkpoint.scheme.weight_bits
    tensors: dict[str, torch.Tensor] = {}
    for name, value in checkpoint.state.items():
        # A copy each: the format has no shared memory.
        values = value.detach().cpu().to(torch.float32).contiguous().clone()
        if name not in checkpoint.scales:
            tensors[name] = values
            continue
        scales, factors = checkpoint.scales[name], checkpoint.factors.get(name)
        weight = checkpoint.scheme.weight
        steps = steps_of(scales, factors, values.shape, weight)
        integers = quantize(values.numpy(), steps, 0, weight).astype(np.int8)
        stored = pack_int4(integers) if bits == 4 else integers
        tensors[name] = torch.from_numpy(stored)
        tensors[name + _SCALE] = torch.from_numpy(scales.copy())
        if factors is not None:
            tensors[name + _FACTOR] = torch.from_numpy(factors.copy())
    header = {
        "format": _FORMAT if checkpoint.factors else 1,
        "scheme": checkpoint.scheme.to_dict(),
        "weights": {name: list(checkpoint.state[name].shape) for name in checkpoint.scales},
        "layers": [asdict(layer) for layer in checkpoint.layers],
        "kept_float": [asdict(layer) for layer in checkpoint.kept_float],
        "images": checkpoint.images,
        "training": checkpoint.training,
    }
    metadata = {KEY: json.dumps(header)}
    write_atomically(
        path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata)
    )


def read_quantized(path: Path) -> QuantizedCheckpoint:
    """What `write_quantized` wrote.

    Raises:
        UserError: it is damaged, or of a newer gfcompile, or no quantized checkpoint at all.
    """
    import safetensors.torch

    text = read_header(path)
    if text is None:
        raise UserError(f"{path}: no quantized checkpoint; `gfcompile quantize` writes them")
    try:
        header = parse_json(text)
        if header["format"] > _FORMAT:
            raise UserError(f"{path}: written by a newer gfcompile (format {header['format']})")
        tensors = safetensors.torch.load_file(path)
        scheme = QuantScheme.from_dict(header["scheme"])
        weights = header["weights"]
        scales = {name: tensors.pop(name + _SCALE).numpy() for name in weights}
        factors = {}
        if scheme.weight.group_size is not None:
            factors = {name: tensors.pop(name + _FACTOR).numpy() for name in weights}
        state = {}
        for name, tensor in tensors.items():
            if name not in weights:
                state[name] = tensor
                continue
            shape = tuple(weights[name])
            codes = tensor.numpy()
            if scheme.weight_bits == 4:
                codes = unpack_int4(codes, shape)
            integers = with_factors(
                codes.reshape(shape).astype(np.int32), factors.get(name), scheme.weight
            )
            column = steps_of(scales[name], None, shape, scheme.weight)
            state[name] = torch.from_numpy(dequantize(integers, column, 0))
        return QuantizedCheckpoint(
            state=state,
            scales=scales,
            factors=factors,
            scheme=scheme,
            layers=tuple(LayerQuant(**layer) for layer in header["layers"]),
            kept_float=tuple(KeptFloat(**layer) for layer in header["kept_float"]),
            images=header["images"],
            training=header["training"],
        )
    except (
        LookupError,
        TypeError,
        ValueError,
        OverflowError,
        safetensors.SafetensorError,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged; write it again with `gfcompile quantize`") from error


def load_quantized(path: Path, module: nn.Module, example: torch.Tensor) -> Calibrated:
    """The module in QDQ form with the weights and scales of a quantized checkpoint.

    Args:
        module: float, of the architecture that was quantized; left as it is.
        example: a batch of the shape that the quantized module is for.

    Raises:
        UserError: no quantized checkpoint, or of another model.
    """
    checkpoint = read_quantized(path)
    own = copy.deepcopy(module)
    try:
        own.load_state_dict(dict(checkpoint.state))
    except RuntimeError as error:  # torch's own, with one line per name that differs
        raise UserError(f"{path}: is of another model than {type(module).__name__}") from error
    with torch.no_grad(), one_thread(), quiet():
        prepared = prepare(own.eval(), example, checkpoint.scheme)
        ranges = [
            QParams(layer.activation_scale, layer.activation_zero_point)
            for layer in checkpoint.layers
        ]
        names = [layer.name for layer in checkpoint.layers]
        if [layer.name for layer in prepared.layers] != names:
            raise UserError(f"{path}: quantizes other layers than {type(module).__name__} has")
        settle_as(prepared, ranges, checkpoint.scales, checkpoint.factors)
        return Calibrated(
            module=prepared.convert(),
            scheme=checkpoint.scheme,
            layers=checkpoint.layers,
            kept_float=checkpoint.kept_float,
            images=checkpoint.images,
            training=checkpoint.training,
        )


def settle_as(
    prepared: Prepared,
    ranges: list[QParams],
    scales: Mapping[str, npt.NDArray[np.float32]],
    factors: Mapping[str, npt.NDArray[np.uint8]],
) -> None:
    """Settles every layer on what is given: ranges by position, weights' scales by name."""
    for layer, chosen in zip(prepared.layers, ranges, strict=True):
        prepared.activation(layer).settle_as(chosen)
    for layer in prepared.weighted:
        name = prepared.constant_name(layer, 1)
        prepared.weight(layer).settle_as(scales[name], factors.get(name))
