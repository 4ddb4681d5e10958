"""How exact the bundle is: stage by stage, layer by layer, and what was kept in float."""

from collections.abc import Mapping, Sequence
from typing import Any

from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.report import charts
from gfcompile.runtime.report.html import (
    NBSP,
    NONE,
    Content,
    Html,
    breakable,
    decibel,
    el,
    figure,
    join,
    mapping,
    number,
    percent,
    plural,
    records,
)
from gfcompile.runtime.report.sections.blocks import folded, scrolling, section, table
from gfcompile.runtime.results import ValidationResult

SHOWN_LAYERS = 8
_FORMS = {
    "dft": "separable real DFT as matrix products",
    "circular": "depthwise circular convolution",
    "native": "the target's own FFT",
}


def exactness(manifest: Manifest, result: ValidationResult | None) -> Html | None:
    """How far each stage's numbers are from the stage before, up to those of the device."""
    entries = records(manifest.ledger)
    if not entries and (result is None or result.numbers is None):
        return None
    rows = [_ledger_row(entry) for entry in entries]
    if result is not None and result.numbers is not None:
        numbers = result.numbers
        rows.append(
            [
                el("b", "device"),
                numbers.reference,
                number(numbers.max_abs_error),
                number(numbers.tolerance),
                "equal" if numbers.max_abs_error == 0 else decibel(figure(numbers.sqnr_db)),
                percent(numbers.top1_agreement),
                f"{numbers.inferences}",
                f"{result.device.name}: {'within' if numbers.within else 'outside'} tolerance",
            ]
        )
    chart = table(
        ("stage", "against", "max abs error", "allowed", "SQNR", "same top-1", "images", "run by"),
        rows,
        numbers=range(2, 7),
        cards=True,
    )
    return section(
        "Exactness",
        "Each stage of the compilation against the stage before it, over golden images. SQNR is "
        "signal to quantization noise: 6 dB are one bit.",
        scrolling(chart, "Exactness of each stage"),
        [_int8_note(entry) for entry in entries],
        [_tokens_note(entry) for entry in entries],
    )


def _ledger_row(entry: Mapping[str, Any]) -> list[Content]:
    error = figure(entry.get("max_abs_error"))
    sqnr = figure(entry.get("sqnr_db"))
    return [
        str(entry.get("stage", "")),
        str(entry.get("against", "")),
        number(error),
        number(figure(entry.get("tolerance"))),
        "equal" if sqnr is None and error == 0 else decibel(sqnr),
        percent(figure(entry.get("top1_agreement"))),
        number(figure(entry.get("images"))),
        str(entry.get("how", "")),
    ]


def _int8_note(entry: Mapping[str, Any]) -> Html | None:
    int8 = mapping(entry.get("int8"))
    equal, values = figure(int8.get("equal")), figure(int8.get("values"))
    if equal is None or values is None:
        return None
    other = round((1 - equal) * values)
    return el(
        "p",
        f"{str(entry.get('stage', '')).capitalize()}: {other:,} of {values:,.0f} int8 activations "
        f"differ from the graph's, by {_steps(int8.get('max_steps'))} at most; logits by "
        f"{_steps(int8.get('logits_max_steps'))} at most.",
        class_="soft small",
        style="margin-top:0.75rem",
    )


def _steps(value: object) -> str:
    steps = figure(value)
    return f"{number(steps)}{NBSP}{'step' if steps == 1 else 'steps'}"


def _tokens_note(entry: Mapping[str, Any]) -> Html | None:
    kept = entry.get("tokens_kept")
    shares = [figure(share) for share in kept] if isinstance(kept, list | tuple) else []
    if not shares or all(share == 1.0 for share in shares):
        return None
    return el(
        "p",
        f"{str(entry.get('stage', '')).capitalize()} keeps, of the patches that its graph keeps, "
        + ", ".join(percent(share, 1) for share in shares)
        + " at the stages, one after the other.",
        class_="soft small",
    )


def layers(manifest: Manifest) -> Html | None:
    """What int8 costs each layer."""
    found = [
        (str(layer.get("name", "")), a, figure(layer.get("weight_sqnr_db")), layer)
        for layer in records(manifest.extra.get("layers"))
        if (a := figure(layer.get("activation_sqnr_db"))) is not None
    ]
    if not found:
        return None
    largest = max(max(a, w or 0.0) for _, a, w, _ in found)
    worst = min(found, key=lambda row: row[1])

    def row(entry: tuple[str, float, float | None, Mapping[str, Any]]) -> list[Content]:
        name, activation, weight, layer = entry
        drawn = charts.bar(
            max(activation, 0.0),
            largest=largest,
            tick=weight,
            description=f"{name}: activations {activation:.1f} dB, weights {decibel(weight)}",
        )
        clipped = figure(layer.get("clipped_fraction"))
        return [
            el("span", breakable(name), class_="mono"),
            drawn,
            decibel(activation),
            decibel(weight),
            NONE if clipped is None else percent(clipped, 3),
        ]

    header = ("layer", "SQNR", "activations", "weights", "clipped")
    every = table(header, [row(e) for e in found], numbers=(2, 3, 4), bars=1, cards=True)
    lowest = sorted(found, key=lambda entry: entry[1])[:SHOWN_LAYERS]
    few = len(found) <= SHOWN_LAYERS
    return section(
        "Layers in int8",
        f"{plural(len(found), 'layer')}; the one that loses most is {worst[0]} with "
        f"{decibel(worst[1])}.",
        charts.key((charts.swatch("solid"), "activations"), (charts.swatch("tick"), "weights")),
        every
        if few
        else table(
            header,
            [row(e) for e in lowest],
            numbers=(2, 3, 4),
            bars=1,
            cards=True,
            caption=f"The {SHOWN_LAYERS} that lose most",
        ),
        None if few else folded(f"All {len(found)} layers in their order", every),
    )


def kept_float(manifest: Manifest) -> Html | None:
    """Layers that int8 leaves alone, and why; and the forms of the global filters."""
    kept = records(manifest.extra.get("kept_float"))
    filters = records(manifest.filters)
    blocks: list[Content] = []
    if kept:
        rows = [
            [el("span", breakable(str(k.get("name", ""))), class_="mono"), str(k.get("reason", ""))]
            for k in kept
        ]
        whole = table(("kept in float", "why"), rows)
        blocks.append(whole if len(rows) <= 12 else folded(f"All {len(rows)}, and why", whole))
    if filters:
        groups: dict[tuple[str, str], list[str]] = {}
        for record in filters:
            grid = " × ".join(number(figure(record.get(k))) for k in ("h", "w", "c"))
            groups.setdefault((str(record.get("form", "")), grid), []).append(
                str(record.get("name", ""))
            )
        rows = [
            [_FORMS.get(form, form), grid, f"{len(names)}", _span(names)]
            for (form, grid), names in groups.items()
        ]
        blocks.append(
            table(
                ("global filters", "grid × channels", "how many", "which"),
                rows,
                numbers=(2,),
                cards=True,
            )
        )
    if not blocks:
        return None
    said = []
    if kept:
        said.append(f"{plural(len(kept), 'layer')} stay in float")
    if filters:
        forms = sorted({str(record.get("form", "")) for record in filters})
        said.append(f"{plural(len(filters), 'global filter')} in the form {' and '.join(forms)}")
    return section("Choices", "; ".join(said) + ".", blocks)


def _span(names: Sequence[str]) -> Html:
    if len(names) < 3:
        return el("span", [[breakable(n), " "] for n in names], class_="mono")
    return join(
        el("span", breakable(names[0]), class_="mono"),
        " to ",
        el("span", breakable(names[-1]), class_="mono"),
    )
