"""The report of a bundle: one HTML file that needs no network, no script and no other file."""

from collections.abc import Sequence
from pathlib import Path

from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.report import sections
from gfcompile.runtime.report.html import el, join, moment
from gfcompile.runtime.report.kernels import kernels_of
from gfcompile.runtime.report.page import page, write_page
from gfcompile.runtime.report.picture import Picture, look
from gfcompile.runtime.results import ValidationResult

__all__ = ["Picture", "look", "render_report", "write_report"]


def write_report(
    path: Path,
    manifest: Manifest,
    result: ValidationResult | None = None,
    *,
    picture: Picture | None = None,
    commands: Sequence[str] = (),
) -> None:
    """Writes the report at `path`, whole or not at all; see `render_report`."""
    write_page(path, render_report(manifest, result, picture=picture, commands=commands))


def render_report(
    manifest: Manifest,
    result: ValidationResult | None = None,
    *,
    picture: Picture | None = None,
    commands: Sequence[str] = (),
) -> str:
    """The report as HTML; the same input gives the same bytes.

    Args:
        manifest: of the bundle.
        result: of its validation; without one, times are estimates and are called so.
        picture: a photo and what the bundle makes of it, see `look`.
        commands: that led here, beside those that the result has.
    """
    kernels = kernels_of(manifest, result)
    precision = manifest.precision.requested
    where = manifest.target if result is None else result.device.name or result.device.url
    title = f"{manifest.model}, {precision}, on {where}"
    about = [manifest.created_by, f"target {manifest.target}"]
    if manifest.batch > 1:
        about.append(f"{manifest.batch} images per inference")
    if result is not None:
        about = [f"validated {moment(result.date)}", *about]
    return page(
        f"{title}: gfcompile",
        el(
            "header",
            el("p", " · ".join(map(str, about)), class_="eyebrow"),
            el("h1", title),
            sections.verdict(result, kernels),
            sections.tiles(manifest, result, kernels),
            sections.cautions(result),
            sections.notes(manifest),
        ),
        el(
            "main",
            join(
                sections.latency(result),
                sections.picture(picture),
                sections.kernel_times(kernels, None if result is None else result.latencies),
                sections.exactness(manifest, result),
                sections.layers(manifest),
                sections.kept_float(manifest),
                sections.sizes(manifest),
                sections.board(result),
                sections.reproduce(manifest, result, commands),
            ),
        ),
        el(
            "footer",
            el(
                "p",
                "Written by gfcompile. Estimates are called so; every other time is measured.",
            ),
        ),
    )
