"""What runs on the device, and what talks to it: NumPy and the standard library alone."""

from gfcompile.runtime.session import Session, load

__all__ = ["Session", "load"]
