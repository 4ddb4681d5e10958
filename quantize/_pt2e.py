"""torchao's PT2E quantization, imported once and without the noise."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "DerivedQuantizationSpec",
    "ObserverBase",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "Quantizer",
    "convert_pt2e",
    "prepare_pt2e",
    "prepare_qat_pt2e",
    "quiet",
]


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing that torch or torchao log or warn of reaches the user.

    On import torchao reports each CUDA extension that it cannot load and trips over a deprecation
    of torch's; torch.export logs the whole traceback of an error that it raises as well.
    """
    loggers = [logging.getLogger(name) for name in ("torch", "torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


with quiet():
    from torchao.quantization.pt2e import ObserverBase
    from torchao.quantization.pt2e.quantize_pt2e import (
        convert_pt2e,
        prepare_pt2e,
        prepare_qat_pt2e,
    )
    from torchao.quantization.pt2e.quantizer import (
        DerivedQuantizationSpec,
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
    )
