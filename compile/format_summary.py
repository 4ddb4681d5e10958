"""What the terminal says of a model file: its operators, and who executes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from gfcompile.compile.command_line import count
from gfcompile.runtime.bundle import Manifest


def format_summary(manifest: Manifest) -> Sequence[str]:
    """Lines for a bundle of a model format; none for kernels of our own."""
    if manifest.kind == "tflite":
        return _tflite(manifest.extra)
    if manifest.kind == "coreml":
        return _coreml(manifest.extra["coreml"])
    return ()


def _tflite(extra: Mapping[str, Any]) -> Sequence[str]:
    total, left = sum(extra["operators"].values()), extra["not_delegated"]
    partitions = extra["partitions"]
    parts = count(partitions, "part")
    if not left:
        return (f"operators: {total}, all of them on XNNPACK, in {parts}",)
    taken = total - sum(left.values())
    names = ", ".join(f"{number} {name}" for name, number in left.items())
    return (
        f"operators: {total}, {taken} ({extra['delegated_share']:.1%}) on XNNPACK, in {parts}; "
        f"the interpreter runs {names}",
    )


def _coreml(extra: Mapping[str, Any]) -> Sequence[str]:
    chosen = extra["layout"]
    return tuple(
        f"layout {layout}{' (this one)' if layout == chosen else ''}: {figures['count']} "
        f"operations, up to {figures['peak_bytes'] / 1e6:.2f} MB of activations at a time, "
        f"{figures['peak_aligned_bytes'] / 1e6:.2f} MB as the Neural Engine aligns them"
        for layout, figures in sorted(
            extra["statistics"].items(), key=lambda item: item[0] != chosen
        )
    )
