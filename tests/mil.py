"""Small MIL programs as saved packages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.targets.coreml.package import Description, write_package
from gfcompile.targets.coreml.tools import coremltools, quiet

Array = npt.NDArray[Any]
DESCRIPTION = Description(text="a test", author="tests", version="1", license="none")


def saved_program(
    folder: Path, build: Callable[[Any, Any], Any], x: Array, *, ios: int = 17
) -> Path:
    """A package whose program takes `x` and returns what `build` makes with MIL's Builder."""
    ct = coremltools()
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    dtype = {"f": types.fp32, "i": types.int32}[x.dtype.kind]

    @Builder.program(
        input_specs=[Builder.TensorSpec(shape=x.shape, dtype=dtype)],
        opset_version=getattr(ct.target, f"iOS{ios}"),
    )
    def program(x: Any) -> Any:
        return build(Builder, x)

    package = folder / "test.mlpackage"
    with quiet():
        write_package(
            program, package, ios=ios, image_shape=None, classes=None, description=DESCRIPTION
        )
    return package


def sampled(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
