"""The head of a report: the verdict, the figures that matter most, and what to beware of."""

from collections.abc import Sequence

from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.report.html import (
    NBSP,
    NONE,
    Html,
    duration,
    el,
    figure,
    mapping,
    number,
    percent,
    plural,
    records,
    significant,
    size,
)
from gfcompile.runtime.report.kernels import Kernels
from gfcompile.runtime.report.sections.sizes import file_sizes
from gfcompile.runtime.results import Latencies, ValidationResult


def verdict(result: ValidationResult | None, kernels: Kernels) -> Html:
    """Whether the bundle does what was demanded, in one word and its reasons."""
    if result is None:
        word, kind, mark = "Not measured", "unmeasured", "○"
        reasons: Sequence[str] = ["Times below are estimates. gfcompile validate measures them."]
        if kernels.estimate_us is None:
            reasons = ["gfcompile validate measures it on a device."]
    else:
        passed = result.verdict.passed
        word, kind, mark = ("Passed", "passed", "✓") if passed else ("Failed", "failed", "✗")
        reasons = result.verdict.reasons
    return el(
        "div",
        el("div", mark, class_="mark", aria_hidden="true"),
        el(
            "div",
            el("p", word, class_="word"),
            el("ul", [el("li", reason) for reason in reasons]) if reasons else None,
        ),
        class_=f"verdict {kind}",
        role="status",
    )


def tiles(manifest: Manifest, result: ValidationResult | None, kernels: Kernels) -> Html:
    """The headline numbers."""
    found: list[tuple[str, str, str]] = []
    latencies = None if result is None else result.latencies
    if result is not None and latencies is not None:
        found += _latency_tiles(result, latencies, manifest.batch)
    elif kernels.estimate_us is not None:
        under = "the sum of its kernels'"
        if manifest.batch > 1:
            under = f"{duration(kernels.estimate_us / manifest.batch)} for each image"
        found.append(("Estimate, not measured", duration(kernels.estimate_us), under))
    if result is not None and result.instructions is not None:
        found.append(("Instructions", f"{result.instructions / 1e6:,.0f}{NBSP}M", "retired"))
    if result is not None and result.numbers is not None:
        numbers = result.numbers
        under = f"same top-1, {plural(numbers.inferences, 'golden input')}"
        if numbers.top1_agreement is not None:
            found.append(("Agreement", percent(numbers.top1_agreement), under))
        else:
            found.append(("Largest error", number(numbers.max_abs_error), "of any output"))
    elif manifest.ledger:
        last = mapping(manifest.ledger[-1])
        found.append(
            ("Agreement", percent(figure(last.get("top1_agreement"))), "same top-1 as its graph")
        )
    total = sum(file_sizes(manifest).values())
    found.append(("Bundle", size(total), plural(len(manifest.files) + 1, "file")))
    if result is not None and result.peak_memory_mb is not None:
        found.append(("Peak memory", size(1e6 * result.peak_memory_mb), "resident"))
    elif (arena := figure(manifest.extra.get("arena_bytes"))) is not None:
        found.append(("Activations", size(arena), "one planned arena"))
    return el(
        "dl",
        [
            el(
                "div",
                el("dt", name),
                el("dd", value, class_="figure"),
                el("dd", under, class_="under"),
            )
            for name, value, under in found
        ],
        class_="tiles four" if len(found) % 3 == 1 else "tiles",  # no row of one
    )


def _latency_tiles(
    result: ValidationResult, latencies: Latencies, batch: int
) -> list[tuple[str, str, str]]:
    at = result.budget.percentile
    runs = result.protocol.runs if result.protocol is not None else len(latencies.samples_us)
    median = latencies.median_us
    under = f"fastest {duration(latencies.min_us)}"
    if batch > 1:
        under = f"{duration(median / batch)} for each image"
    return [
        (f"Latency, p{at:g}", duration(latencies.at(at)), f"of {plural(runs, 'run')}"),
        ("Median", duration(median), under),
        (
            "Throughput",
            f"{significant(batch * 1e6 / median)}/s" if median > 0 else NONE,
            "one image at a time" if batch == 1 else f"{batch} images at a time",
        ),
    ]


def cautions(result: ValidationResult | None) -> Html | None:
    """What makes the numbers unfair, and what mends it."""
    entries = [
        el("li", el("b", "! "), caution.text, el("code", caution.fix) if caution.fix else None)
        for caution in (() if result is None else result.cautions)
    ]
    if result is not None and result.stand_in:
        entries.append(el("li", el("b", "! "), f"{result.stand_in} stands in for the device."))
    return el("ul", entries, class_="cautions", aria_label="Cautions") if entries else None


def notes(manifest: Manifest) -> Html | None:
    """What in the bundle is not as one might think."""
    # Which layers stay in float is told with the reasons further below.
    told = "kept in float:" if records(manifest.extra.get("kept_float")) else "\0"
    entries = [el("li", note) for note in map(str, manifest.notes) if not note.startswith(told)]
    return el("ul", entries, class_="notes", aria_label="Notes on the bundle") if entries else None
