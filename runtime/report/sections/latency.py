"""How long an inference takes."""

from collections.abc import Sequence
from typing import Any

from gfcompile.runtime.report import charts
from gfcompile.runtime.report.charts import Mark
from gfcompile.runtime.report.html import (
    NBSP,
    NONE,
    Content,
    Html,
    duration,
    el,
    join,
    megabytes,
    milliseconds,
    percent,
    plural,
    significant,
)
from gfcompile.runtime.report.sections.blocks import pairs, section, table
from gfcompile.runtime.results import Latencies, ValidationResult

_MAX_US = 1e15  # thirty years


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
    statistics = [
        ("minimum", duration(latencies.min_us)),
        ("median", duration(latencies.median_us)),
        *(per_image if batch > 1 else ()),
        ("mean", duration(latencies.mean_us)),
        ("p90", duration(latencies.p90_us)),
        ("p99", duration(latencies.p99_us)),
        ("maximum", duration(latencies.max_us)),
        ("standard deviation over mean", percent(latencies.cv, 1)),
    ]
    beside = [
        ("loading", milliseconds(result.load_ms)),
        ("first inference", milliseconds(result.first_inference_ms)),
        ("peak memory", megabytes(result.peak_memory_mb)),
        ("of it the model's own", megabytes(result.runtime_memory_mb)),
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


def _axis_ms(us: float) -> str:
    return f"{us / 1e3:.6g}{NBSP}ms"
