"""The sections of a report: each a function of what is known, None if there is nothing to say."""

from gfcompile.runtime.report.sections.again import reproduce
from gfcompile.runtime.report.sections.board import board
from gfcompile.runtime.report.sections.exactness import exactness, kept_float, layers
from gfcompile.runtime.report.sections.head import cautions, notes, tiles, verdict
from gfcompile.runtime.report.sections.kernel_times import kernel_times
from gfcompile.runtime.report.sections.latency import latency
from gfcompile.runtime.report.sections.photo import picture
from gfcompile.runtime.report.sections.sizes import sizes

__all__ = [
    "board",
    "cautions",
    "exactness",
    "kept_float",
    "kernel_times",
    "latency",
    "layers",
    "notes",
    "picture",
    "reproduce",
    "sizes",
    "tiles",
    "verdict",
]
