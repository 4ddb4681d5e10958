"""What the model makes of a photo."""

import math

from gfcompile.runtime.report import charts
from gfcompile.runtime.report.html import Html, el, percent
from gfcompile.runtime.report.picture import Picture
from gfcompile.runtime.report.sections.blocks import section, table


def picture(seen: Picture | None) -> Html | None:
    """What the model makes of a photo, and which patches it kept."""
    if seen is None:
        return None
    height, width = seen.pixels.shape[:2]
    defined = Html(
        '<svg class="off-screen" aria-hidden="true" focusable="false"><defs>'
        f'<symbol id="photo" viewBox="0 0 {width} {height}">'
        f'<image width="{width}" height="{height}" href="{seen.data_uri()}"/></symbol></defs></svg>'
    )
    rows = [
        [
            label,
            charts.bar(probability, largest=1.0, description=f"{label}: {percent(probability, 1)}"),
            percent(probability, 1),
        ]
        for label, probability in seen.top
    ]
    classes = table(
        ("class", "chart", "probability"),
        rows,
        numbers=(2,),
        bars=1,
        caption=f"The {len(seen.top)} likeliest classes, by {seen.computed_by}",
    )
    photo = el(
        "svg",
        Html('<use href="#photo"/>'),
        class_="photo",
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=f"photo: {seen.source}",
    )
    stages = [_stage(seen, i) for i in range(len(seen.kept))]
    lead = f"{seen.source}, cropped to {width} × {height}"
    if stages:
        last = len(seen.kept[-1])
        lead += f"; {last} of {seen.patches} patches reach the last blocks"
    return section(
        "What it sees",
        lead + ".",
        defined,
        el("div", el("figure", photo), classes, class_="photo-row"),
        el("h3", "Patches kept at each stage") if stages else None,
        el("div", stages, class_="photos") if stages else None,
    )


def _stage(seen: Picture, stage: int) -> Html:
    side = math.isqrt(seen.patches)
    kept = set(seen.kept[stage])
    dropped = Html(
        "".join(f"M{i % side} {i // side}h1v1h-1z" for i in range(seen.patches) if i not in kept)
    )
    share = percent(len(kept) / seen.patches)
    text = f"stage {stage + 1}: {len(kept)} of {seen.patches}, {share}"
    picture = el(
        "svg",
        Html(f'<use href="#photo" width="{side}" height="{side}"/>'),
        # A veil and a pattern of lines: dropped patches are told from dark ones in print as well.
        el("path", d=dropped, class_="paper", fill_opacity="0.84"),
        viewBox=f"0 0 {side} {side}",
        role="img",
        aria_label=f"the photo with the patches that stage {stage + 1} dropped veiled",
    )
    return el("figure", picture, el("figcaption", text))
