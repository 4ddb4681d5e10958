"""Where the time goes, kernel by kernel."""

from collections.abc import Sequence

from gfcompile.runtime.report import charts
from gfcompile.runtime.report.html import (
    NONE,
    Content,
    Html,
    breakable,
    duration,
    el,
    join,
    percent,
    plural,
    significant,
)
from gfcompile.runtime.report.kernels import Kernel, Kernels
from gfcompile.runtime.report.sections.blocks import folded, section, table
from gfcompile.runtime.results import Latencies

SHOWN_KERNELS = 12


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


def _rate(value: float | None) -> str:
    return NONE if value is None else significant(value)
