"""What the bundle takes on a disk and in memory."""

from collections.abc import Sequence

from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.report import charts
from gfcompile.runtime.report.html import (
    Content,
    Html,
    breakable,
    el,
    figure,
    percent,
    plural,
    size,
)
from gfcompile.runtime.report.sections.blocks import folded, section, table

SHOWN_FILES = 5


def file_sizes(manifest: Manifest) -> dict[str, float]:
    """The bytes of each file, as the manifest has them."""
    return {name: figure(entry.size_bytes) or 0.0 for name, entry in manifest.files.items()}


def sizes(manifest: Manifest) -> Html:
    """What the bundle takes on a disk and in memory."""
    files = sorted(file_sizes(manifest).items(), key=lambda item: (-item[1], item[0]))
    total = sum(number for _, number in files) or 1
    rows = [
        [
            el("span", breakable(name), class_="mono"),
            charts.bar(number, largest=total, description=f"{name}: {size(number)}"),
            size(number),
            percent(number / total, 1),
        ]
        for name, number in files
    ]

    def drawn(some: Sequence[Sequence[Content]]) -> Html:
        return table(("file", "chart", "size", "share"), some, numbers=(2, 3), bars=1)

    precision = manifest.precision
    arena = figure(manifest.extra.get("arena_bytes"))
    lower = figure(manifest.extra.get("arena_lower_bound_bytes"))
    memory = ""
    if arena is not None:
        memory = f" Activations share an arena of {size(arena)}"
        if lower:
            memory += f", {percent(arena / lower - 1)} above the least possible"
        memory += "."
    return section(
        "Size",
        f"{size(total)} in {plural(len(files), 'file')} and the manifest. Requested "
        f"{precision.requested}; stored as {precision.storage}; computed as "
        f"{precision.compute}.{memory}",
        drawn(rows[:SHOWN_FILES]),
        folded(f"All {len(rows)} files", drawn(rows)) if len(rows) > SHOWN_FILES else None,
    )
