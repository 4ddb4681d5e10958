"""A stand-in for the CUDA driver: Jetson bundles run on a CPU, kernel source and all."""

from gfcompile.targets.tvm.standin.build import build_standin

__all__ = ["build_standin"]
