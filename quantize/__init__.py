"""int8: the scheme, calibration, quantization-aware training, and the QDQ module of it."""

from importlib import import_module
from typing import TYPE_CHECKING

from gfcompile.quantize.metadata import is_quantized
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.quantize.train_config import TrainConfig

if TYPE_CHECKING:
    from gfcompile.quantize.calibration import Calibrated, KeptFloat, LayerQuant, calibrate
    from gfcompile.quantize.checkpoint import load_quantized, read_quantized, write_quantized
    from gfcompile.quantize.sensitivity import Sensitivity, analyze
    from gfcompile.quantize.training import train

__all__ = [
    "Calibrated",
    "KeptFloat",
    "LayerQuant",
    "QuantScheme",
    "Sensitivity",
    "TrainConfig",
    "analyze",
    "calibrate",
    "is_quantized",
    "load_quantized",
    "read_quantized",
    "train",
    "write_quantized",
]

_MODULES = {
    "calibration": ("Calibrated", "KeptFloat", "LayerQuant", "calibrate"),
    "checkpoint": ("load_quantized", "read_quantized", "write_quantized"),
    "sensitivity": ("Sensitivity", "analyze"),
    "training": ("train",),
}


def __getattr__(name: str) -> object:
    # Schemes and options are plain data; torch and torchao are loaded by those who quantize.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"gfcompile.quantize.{module}"), name)
    raise AttributeError(f"module 'gfcompile.quantize' has no attribute {name!r}")
