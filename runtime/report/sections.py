"""The sections of a report: each a function of what is known, None if there is nothing to say."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.report import charts
from gfcompile.runtime.report.charts import Mark
from gfcompile.runtime.report.html import (
    NBSP,
    NONE,
    Content,
    Html,
    breakable,
    decibel,
    duration,
    el,
    figure,
    join,
    mapping,
    percent,
    plural,
    records,
    significant,
    size,
)
from gfcompile.runtime.report.kernels import Kernel, Kernels
from gfcompile.runtime.report.picture import Picture
from gfcompile.runtime.results import BoardState, Latencies, ValidationResult

SHOWN_KERNELS, SHOWN_LAYERS, SHOWN_FILES = 12, 8, 5
_MAX_US = 1e15  # thirty years
_FORMS = {
    "dft": "separable real DFT as matrix products",
    "circular": "depthwise circular convolution",
    "native": "the target's own FFT",
}


def section(title: str, lead: Content, *content: Content) -> Html:
    """A section under its heading; the lead says what was found."""
    name = "-".join(title.lower().split())
    return el(
        "section",
        el("h2", title, id=f"{name}-heading"),
        el("p", lead, class_="lead") if lead else None,
        *content,
        aria_labelledby=f"{name}-heading",
    )


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Content]],
    *,
    numbers: Sequence[int] = (),
    bars: int | None = None,
    footer: Sequence[Content] = (),
    caption: str = "",
    cards: bool = False,
) -> Html:
    """A table whose first column names the row.

    Args:
        numbers: columns that are flush right.
        bars: the column that holds a chart.
        cards: whether it has too many columns for a phone, where each row becomes a card.
    """

    def class_of(column: int) -> str | None:
        return "n" if column in numbers else "bar" if column == bars else None

    def row(cells: Sequence[Content]) -> Html:
        return el(
            "tr",
            el("th", cells[0], scope="row"),
            [
                el("td", cell, class_=class_of(i), data_label=header[i] if cards else None)
                for i, cell in enumerate(cells[1:], start=1)
            ],
        )

    head = [el("th", text, scope="col", class_=class_of(i)) for i, text in enumerate(header)]
    return el(
        "table",
        el("caption", caption) if caption else None,
        el("thead", el("tr", head)),
        el("tbody", [row(cells) for cells in rows]),
        el("tfoot", row(footer)) if footer else None,
        class_="cards" if cards else None,
    )


def pairs(rows: Iterable[Sequence[Content]]) -> Html:
    """A table of names and what they are."""
    body = [el("tr", el("th", name, scope="row"), el("td", value)) for name, value in rows]
    return el("table", el("tbody", body), class_="pairs")


def scrolling(content: Html, label: str) -> Html:
    """A table that may be wider than the page scrolls by itself."""
    return el("div", content, class_="scroll", role="region", aria_label=label, tabindex="0")


def folded(summary: str, *content: Content) -> Html:
    """Details, one click away."""
    return el("details", el("summary", summary), *content)


# ---- head


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
            found.append(("Largest error", _number(numbers.max_abs_error), "of any output"))
    elif manifest.ledger:
        last = mapping(manifest.ledger[-1])
        found.append(
            ("Agreement", percent(figure(last.get("top1_agreement"))), "same top-1 as its graph")
        )
    total = sum(_file_sizes(manifest).values())
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


# ---- the photo


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


# ---- latency


def latency(result: ValidationResult | None) -> Html | None:
    """How long an inference takes: how it is spread, and whether it stayed the same."""
    if result is None:
        return None
    latencies, protocol = result.latencies, result.protocol
    if latencies is None:
        why = result.no_latency or "No latency was taken."
        return section("Latency", None, el("p", why))
    if not _sane(latencies):
        return section("Latency", None, el("p", "The figures of this result make no sense."))
    marks = [
        Mark(value=latencies.median_us, label=f"median {duration(latencies.median_us)}"),
        Mark(value=latencies.p90_us, label=f"p90 {duration(latencies.p90_us)}", style="dashed"),
    ]
    budget = result.budget.max_latency_ms
    limits = []
    if budget is not None:
        label = f"budget for p{result.budget.percentile:g}: {duration(1e3 * budget)}"
        limits.append(Mark(value=1e3 * budget, label=label, style="limit"))
    # A budget far away would squeeze the values into a corner; the text has it then.
    near = [m for m in limits if 0.3 * latencies.min_us < m.value < 2.5 * latencies.p99_us]
    values = latencies.samples_us
    runs = len(values) * latencies.sample_every if protocol is None else protocol.runs
    content: list[Content] = []
    if len(values) >= 8:
        chart, beyond = charts.histogram(
            values,
            marks=[*marks, *near],
            label=_axis_ms,
            description=f"histogram of {len(values)} latencies around {marks[0].label}",
        )
        text = f"How often each latency occurred in {plural(len(values), 'run')}."
        if beyond:
            text += f" {plural(beyond, 'run')} took longer than the chart reaches."
        content.append(charts.figure_of("Distribution", text, chart))
        content.append(_over_time(values, [marks[0], *near], protocol))
    content.append(_latency_table(result, latencies))
    if protocol is not None:
        content.append(_protocol(result))
    spread = (
        percent(latencies.p99_us / latencies.median_us - 1) if latencies.median_us > 0 else NONE
    )
    lead = (
        f"Nine of ten inferences take at most {duration(latencies.p90_us)}; the slowest in a "
        f"hundred takes {spread} more than the median. {plural(runs, 'run')}."
    )
    return section("Latency", lead, content)


def _sane(latencies: Latencies) -> bool:
    """Whether these are times at all; a result may come from anywhere."""
    statistics = (latencies.min_us, latencies.median_us, latencies.p90_us, latencies.p99_us)
    values = (*statistics, latencies.mean_us, latencies.max_us, latencies.cv)
    return all(0 <= value < _MAX_US for value in (*values, *latencies.samples_us))


def _over_time(values: Sequence[float], marks: Sequence[Mark], protocol: Any) -> Html:
    tenth = max(1, len(values) // 10)
    first, last = (_median(part) for part in (values[:tenth], values[-tenth:]))
    change = last / first if first > 0 else 1.0
    how = "as long as" if 0.985 < change < 1.015 else f"{significant(change)} times as long as"
    end = f"{protocol.duration_s:.0f} s" if protocol is not None else f"run {len(values)}"
    chart = charts.series(
        values,
        marks=marks,
        label=_axis_ms,
        ends=("start", end),
        description=f"latency over time; the last tenth took {change:.2f} times the first",
    )
    legend = charts.key(
        (charts.line_swatch("curve"), "middle of each stretch"),
        (charts.swatch("soft"), "its range from 10% to 90%"),
        (charts.line_swatch("solid"), "median of all"),
        *((charts.line_swatch(m.style), m.label) for m in marks[1:]),
    )
    text = (
        f"A device that slows down as it warms shows it here: the last tenth took {how} the first."
    )
    return charts.figure_of("Over time", text, legend, chart)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _latency_table(result: ValidationResult, latencies: Latencies) -> Html:
    batch = max(result.bundle.batch, 1)
    per_image = [("median, for each image", duration(latencies.median_us / batch))]
    if batch == 1:
        per_image = []
    statistics = [
        ("minimum", duration(latencies.min_us)),
        ("median", duration(latencies.median_us)),
        *per_image,
        ("mean", duration(latencies.mean_us)),
        ("p90", duration(latencies.p90_us)),
        ("p99", duration(latencies.p99_us)),
        ("maximum", duration(latencies.max_us)),
        ("standard deviation over mean", percent(latencies.cv, 1)),
    ]
    beside = [
        ("loading", _ms(result.load_ms)),
        ("first inference", _ms(result.first_inference_ms)),
        ("peak memory", size(_times(result.peak_memory_mb, 1e6))),
        ("of it the model's own", size(_times(result.runtime_memory_mb, 1e6))),
    ]
    return el(
        "div",
        table(
            ("one inference" if batch == 1 else f"one inference of {batch} images", "time"),
            statistics,
            numbers=(1,),
        ),
        table(("beside it", "amount"), [row for row in beside if row[1] != NONE], numbers=(1,))
        if any(value != NONE for _, value in beside)
        else None,
        class_="columns",
    )


def _protocol(result: ValidationResult) -> Html:
    protocol = result.protocol
    assert protocol is not None
    rule = {
        "runs": f"a fixed number of runs, {protocol.runs:,}",
        "single-stream": "MLPerf's single-stream rule: at least 1024 runs and 60 seconds",
    }[protocol.rule]
    pinned = ", ".join(map(str, protocol.pinned_cpus))
    rows = [
        ("clock", protocol.timer),
        ("rule", rule),
        (
            "warm-up",
            f"{protocol.warmup}; {plural(protocol.warmup_runs, 'run')}"
            + ("" if protocol.stable else ", never stable"),
        ),
        ("threads", f"{protocol.threads}" + (f", pinned to CPU {pinned}" if pinned else "")),
        ("took", f"{significant(protocol.duration_s)} s"),
        ("tool", protocol.tool),
    ]
    return join(el("h3", "How it was measured"), pairs(rows))


# ---- kernels


def kernel_times(kernels: Kernels, latencies: Latencies | None) -> Html | None:
    """Where the time goes, each kernel beside what it would take at best."""
    if not kernels.all or (kernels.estimate_us is None and not kernels.measured):
        return None
    whole = kernels.measured_us if kernels.measured else kernels.estimate_us
    times = [_time(kernel, kernels.measured) or 0.0 for kernel in kernels.all]
    largest = max([*times, *(kernel.estimate_us or 0.0 for kernel in kernels.all)])
    shown = kernels.all[:SHOWN_KERNELS]
    rest = times[len(shown) :]
    footer: list[Content] = []
    if rest:
        share = percent(sum(rest) / whole) if whole else NONE
        footer = [f"{plural(len(rest), 'other kernel')}", duration(sum(rest)), share]
    legend = [
        (charts.swatch("solid" if kernels.measured else "hollow"), "bound by compute"),
        (charts.swatch("hatched" if kernels.measured else "hollow-hatched"), "bound by memory"),
    ]
    if kernels.measured:
        legend.append((charts.swatch("tick"), "estimate"))

    def drawn(some: Sequence[Kernel], footer: Sequence[Content] = ()) -> Html:
        header = _KERNEL_HEADER if kernels.measured else _ESTIMATE_HEADER
        return table(
            header,
            [_kernel_row(kernel, kernels, largest, whole) for kernel in some],
            numbers=range(1, len(header) - (not kernels.measured)),
            footer=[*footer, *[""] * (len(header) - len(footer))] if footer else (),
            cards=True,
        )

    return section(
        "Where the time goes" if kernels.measured else "Where the time would go",
        _kernels_lead(kernels, whole, latencies),
        charts.key(*legend),
        drawn(shown, footer),
        folded(f"All {len(kernels.all)} kernels", drawn(kernels.all)) if rest else None,
        _peaks(kernels),
    )


_KERNEL_HEADER = (
    "kernel", "time", "share", "GFLOP/s", "GB/s", "of peak", "estimate", "ratio",
)  # fmt: skip
_ESTIMATE_HEADER = ("kernel", "estimate", "share", "roofline alone", "bound by")


def _time(kernel: Kernel, measured: bool) -> float | None:
    return kernel.measured_us if measured else kernel.estimate_us


def _kernel_row(
    kernel: Kernel, kernels: Kernels, largest: float, whole: float | None
) -> list[Content]:
    time = _time(kernel, kernels.measured) or 0.0
    bound = None if kernel.estimate is None else kernel.estimate.bound
    calls = f"{plural(kernel.calls, 'call')}"
    share = percent(time / whole) if whole else NONE
    said = f"{kernel.name}: {duration(time)}, {share}"
    if bound:
        said += f", bound by {bound}"
    if kernels.measured:
        bar = charts.bar(
            time,
            largest=largest,
            pattern="hatched" if bound == "memory" else "solid",
            tick=kernel.estimate_us,
            description=f"{said}; estimate {duration(kernel.estimate_us)}",
        )
    else:
        bar = charts.bar(
            time,
            largest=largest,
            pattern="hollow-hatched" if bound == "memory" else "hollow",
            description=f"estimate for {said}",
        )
    name = join(
        el("span", breakable(kernel.name), class_="mono"),
        el("span", f" {kernel.kind}, {calls}" if kernel.kind else f" {calls}", class_="soft small"),
        bar,
    )
    if not kernels.measured:
        least = None if kernel.roofline_us is None else kernel.calls * kernel.roofline_us
        return [name, duration(time), share, duration(least), bound or NONE]
    reached = None
    if kernel.roofline_us is not None and kernel.measured_us:
        reached = kernel.calls * kernel.roofline_us / kernel.measured_us
    return [
        name,
        duration(time),
        share,
        _rate(kernel.rate(kernel.cost.flops)),
        _rate(kernel.rate(kernel.cost.bytes)),
        percent(reached),
        duration(kernel.estimate_us),
        NONE if kernel.ratio is None else f"{kernel.ratio:.2f}×",
    ]


def _kernels_lead(kernels: Kernels, whole: float | None, latencies: Latencies | None) -> str:
    top, share = kernels.all[0], None
    if whole:
        share = (_time(top, kernels.measured) or 0.0) / whole
    parts = []
    if kernels.measured:
        parts.append(f"{plural(len(kernels.all), 'kernel')} take {duration(whole)} in the profile")
        if kernels.estimate_us:
            ratio = (whole or 0.0) / kernels.estimate_us
            parts.append(f", {significant(ratio)} times the estimate")
        parts.append(f"; the longest takes {percent(share)} of it.")
        if whole and latencies is not None and latencies.median_us > 0:
            parts.append(f" That is {percent(whole / latencies.median_us)} of the median latency.")
        if (rank := kernels.rank_correlation) is not None:
            parts.append(
                f" The estimator ranks the kernels with a Spearman correlation of {rank:.2f}."
            )
    else:
        parts.append(
            f"An estimate, nothing here was measured: {duration(whole)} in all, and the longest of "
            f"{plural(len(kernels.all), 'kernel')} {percent(share)} of it."
        )
    return "".join(parts)


def _peaks(kernels: Kernels) -> Html | None:
    peaks = kernels.peaks
    if peaks is None:
        return None
    of = "one core" if peaks.cores > 1 else "the processor"
    return el(
        "p",
        f"The estimate of a kernel is the longest of three times: its operations at the peak of "
        f"{of} (float32 {significant(peaks.float32_gflops)} GFLOP/s, int8 "
        f"{significant(peaks.int8_gops)} GOP/s), its operands at the memory's bandwidth "
        f"({significant(peaks.bandwidth_gb_s)} GB/s), and the issue of the instructions in its "
        "schedule. Peaks are those of gfcompile targets. Operands that a cache holds move "
        "faster, so a kernel can beat its memory bound.",
        class_="soft small",
        style="margin-top:1rem",
    )


# ---- exactness


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
                _number(numbers.max_abs_error),
                _number(numbers.tolerance),
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
        _number(error),
        _number(figure(entry.get("tolerance"))),
        "equal" if sqnr is None and error == 0 else decibel(sqnr),
        percent(figure(entry.get("top1_agreement"))),
        _number(figure(entry.get("images"))),
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
    return f"{_number(steps)}{NBSP}{'step' if steps == 1 else 'steps'}"


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


# ---- layers


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
            grid = " × ".join(_number(figure(record.get(k))) for k in ("h", "w", "c"))
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


# ---- sizes


def _file_sizes(manifest: Manifest) -> dict[str, float]:
    return {name: figure(entry.size_bytes) or 0.0 for name, entry in manifest.files.items()}


def sizes(manifest: Manifest) -> Html:
    """What the bundle takes on a disk and in memory."""
    files = sorted(_file_sizes(manifest).items(), key=lambda item: (-item[1], item[0]))
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


# ---- board


def board(result: ValidationResult | None) -> Html | None:
    """The state of the device, which is a part of any number taken on it."""
    if result is None:
        return None
    device = result.device
    rows: list[list[Content]] = [
        ["device", device.url],
        ["name", device.name],
        ["CPU", device.cpu_model or device.arch],
        ["runs on", device.processor or NONE],
        ["memory", size(_times(device.memory_mb, 1e6))],
    ]
    rows += [[name, version] for name, version in sorted(device.versions.items())]
    states = (device.before, device.after)
    compared = _states(*states) if any(states) else None
    throttled = device.after is not None and bool(device.after.throttling)
    lead = f"{device.name}, {device.kind}"
    if throttled:
        lead += "; it says that it was slowed down"
    return section("The board", lead + ".", pairs(row for row in rows if row[1] != NONE), compared)


def _states(before: BoardState | None, after: BoardState | None) -> Html | None:
    names: dict[str, list[str]] = {}
    for i, state in enumerate((before, after)):
        for name, value in () if state is None else _state_rows(state):
            names.setdefault(name, [NONE, NONE])[i] = value
    if not names:
        return None
    rows = [[name, *values] for name, values in names.items()]
    return join(
        el("h3", "Its state, before and after the runs"),
        table(("what", "before", "after"), rows),
    )


def _state_rows(state: BoardState) -> list[tuple[str, str]]:
    rows = []
    clocks = [core.mhz for core in state.cores if core.mhz is not None]
    if clocks:
        low, high = min(clocks), max(clocks)
        shown = f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f} to {high:,.0f}"
        rows.append(("CPU clock, MHz", shown))
    limits = [core.max_mhz for core in state.cores if core.max_mhz is not None]
    if limits:
        rows.append(("highest clock, MHz", f"{max(limits):,.0f}"))
    governors = sorted({core.governor for core in state.cores if core.governor})
    if governors:
        rows.append(("governor", ", ".join(governors)))
    rows += [(f"{name}, MHz", f"{mhz:,.0f}") for name, mhz in sorted(state.clocks_mhz.items())]
    if state.power_mode:
        rows.append(("power mode", state.power_mode))
    rows += [(f"{name}, °C", f"{c:.1f}") for name, c in sorted(state.temperatures_c.items())]
    rows.append(("throttling", "; ".join(state.throttling) or "none seen"))
    rows += [
        (f"events of {name}", f"{count:,}") for name, count in sorted(state.throttle_events.items())
    ]
    if state.load_1min is not None:
        rows.append(("load, 1 minute", f"{state.load_1min:.2f}"))
    if state.memory_free_mb is not None:
        rows.append(("memory free", size(1e6 * state.memory_free_mb)))
    if state.others:
        rows.append(("other programs", "; ".join(state.others[:5])))
    return rows


# ---- how to do it again


def reproduce(manifest: Manifest, result: ValidationResult | None, commands: Sequence[str]) -> Html:
    """The exact commands and versions."""
    commands = [*commands, *(() if result is None else result.commands)]
    versions = {str(k): str(v) for k, v in mapping(manifest.versions).items()}
    taken = {} if result is None else dict(result.versions)
    rows: list[list[Content]] = [
        [name, versions.get(name, NONE), *([taken.get(name, NONE)] if taken else [])]
        for name in sorted({*versions, *taken})
    ]
    about: list[list[Content]] = [
        ["weights", manifest.weights],
        ["compiled by", manifest.created_by],
    ]
    if result is not None:
        about.append(["manifest SHA-256", el("span", result.bundle.manifest_sha256, class_="mono")])
    return section(
        "To do it again",
        None,
        el("pre", "\n".join(commands)) if commands else None,
        pairs(about),
        folded(
            f"Versions of {plural(len(rows), 'package')}",
            table(("package", "compiled with", *(["validated with"] if taken else [])), rows),
        ),
    )


def _axis_ms(us: float) -> str:
    return f"{us / 1e3:.6g}{NBSP}ms"


def _ms(value: float | None) -> str:
    return duration(None if value is None else 1e3 * value)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _rate(value: float | None) -> str:
    return NONE if value is None else significant(value)


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e9 else significant(value)
