"""coremltools, imported without what it says while it is."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

# Its import brings torchao with it, which torch has remarks on.
_LOGGERS = ("coremltools", "torch.utils._pytree", "torchao")


def coremltools() -> Any:
    """The package; its remarks on other packages' versions, and on not being on a Mac, are dropped.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    with quiet():
        import coremltools
    return coremltools


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A stretch of code in which coremltools has nothing to say below errors."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # The bars of its passes go to stderr, whether or not that is a terminal.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
