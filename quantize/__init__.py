"""int8: the scheme, calibration, and the QDQ module that comes of them."""

from importlib import import_module
from typing import TYPE_CHECKING

from gfcompile.quantize.scheme import QuantScheme

__all__ = ["Calibrated", "KeptFloat", "LayerQuant", "QuantScheme", "calibrate"]

if TYPE_CHECKING:
    from gfcompile.quantize.calibration import Calibrated, KeptFloat, LayerQuant, calibrate


def __getattr__(name: str) -> object:
    # The scheme is plain data; torch and torchao are loaded by those who calibrate.
    if name in __all__:
        return getattr(import_module("gfcompile.quantize.calibration"), name)
    raise AttributeError(f"module 'gfcompile.quantize' has no attribute {name!r}")
