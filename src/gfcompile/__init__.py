"""gfcompile: spectral and token-pruned vision models, compiled for the edge."""

from typing import TYPE_CHECKING

from gfcompile.runtime.devices import register_device
from gfcompile.runtime.engines import register_engine
from gfcompile.runtime.version import VERSION

__version__ = VERSION
__all__ = ["CompileConfig", "__version__", "compile_model"]

if TYPE_CHECKING:
    from pathlib import Path
    from urllib.parse import SplitResult

    from gfcompile.compile.pipeline import CompileConfig, compile_model
    from gfcompile.runtime.bundle import Manifest
    from gfcompile.runtime.devices import Device
    from gfcompile.runtime.engine import ComputeUnits, Engine


def __getattr__(name: str) -> object:
    # The compiler imports torch and TVM; `gfcompile.runtime` must not pay for them.
    if name in ("CompileConfig", "compile_model"):
        from gfcompile.compile import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'gfcompile' has no attribute {name!r}")


def _open_coreml(
    folder: "Path", manifest: "Manifest", threads: int, compute_units: "ComputeUnits"
) -> "Engine":
    from gfcompile.targets.coreml.engine import open_engine

    return open_engine(folder, manifest, threads, compute_units=compute_units)


def _open_rpc(parts: "SplitResult") -> "Device":
    from gfcompile.targets.tvm.rpc_device import open_rpc

    return open_rpc(parts)


register_engine("coreml", _open_coreml)
register_device("rpc", _open_rpc)
