"""Charts: shapes as inline SVG that stretches to the page, text as HTML that keeps its size.

Nothing is told by colour alone: lines differ in their dashes, bars in their pattern, and each chart
stands beside a table or a text with the same figures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gfcompile.runtime.report.html import Html, coordinate, el, join

_WIDTH, _HEIGHT = 1000.0, 200.0  # of a plot's own coordinates
LineStyle = Literal["solid", "dashed", "dotted", "limit"]

# Patterns and the photo are defined once in a page; the names are ours, so no text needs escaping.
DEFINITIONS = Html(
    '<svg class="off-screen" aria-hidden="true" focusable="false"><defs>'
    '<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="7" height="7" class="fill-soft"/>'
    '<line x1="1.5" y1="0" x2="1.5" y2="7" class="hatch-line"/></pattern>'
    "</defs></svg>"
)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value worth a line of its own in a chart, with its label."""

    value: float
    label: str
    style: LineStyle = "solid"


def figure_of(title: str, text: str, *content: Html) -> Html:
    """A chart under its title and what it shows."""
    return el("figure", el("figcaption", el("b", title), text), *content)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values in [low, high], at most so many."""
    span = high - low
    if not span > 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 2.5, 5, 10):
        if span / (step * factor) <= most:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def histogram(
    values: Sequence[float],
    *,
    marks: Sequence[Mark],
    label: Callable[[float], str],
    description: str,
    most_bins: int = 60,
) -> tuple[Html, int]:
    """How often each value occurs, and how many lie beyond the right end of the chart.

    A few stragglers would squeeze all others into one bar, so the axis ends a little after the
    99th percentile, or after the last mark.
    """
    ordered = sorted(values)
    low = min([ordered[0], *(mark.value for mark in marks)])
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    last_mark = max((mark.value for mark in marks), default=p99)
    high = max(p99 + 0.15 * (p99 - low), last_mark + 0.03 * (last_mark - low))
    high = min(high, max(ordered[-1], last_mark))
    if not high > low:
        low, high = 0.95 * low - 1e-9, 1.05 * high + 1e-9
    bins = max(8, min(most_bins, round(2 * math.sqrt(len(values)))))
    counts = [0] * bins
    beyond = 0
    for value in ordered:
        if value > high:
            beyond += 1
        else:
            counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    tallest = max(counts)
    step = _WIDTH / bins
    bars = [
        el(
            "rect",
            x=i * step + 0.08 * step,
            y=_HEIGHT * (1 - count / tallest),
            width=0.84 * step,
            height=_HEIGHT * count / tallest,
            class_="fill",
        )
        for i, count in enumerate(counts)
        if count
    ]

    def at(value: float) -> float:
        return (value - low) / (high - low)

    lines = [_vertical(at(mark.value), mark.style) for mark in marks]
    chart = _plot(
        join(bars, lines),
        # One at the very end would run out of the page, or into its neighbour.
        x=[(at(value), label(value)) for value in ticks(low, high, 4) if at(value) < 0.95],
        y=[(value / tallest, f"{value:,.0f}") for value in ticks(0, tallest, 3) if value % 1 == 0],
        notes=[(at(mark.value), mark.label) for mark in marks],
        description=description,
    )
    return chart, beyond


def series(
    values: Sequence[float],
    *,
    marks: Sequence[Mark],
    label: Callable[[float], str],
    ends: tuple[str, str],
    description: str,
    points: int = 240,
) -> Html:
    """Values in the order of time: of each stretch, the middle and the range from 10% to 90%."""
    stretches = _stretches(values, max(8, min(points, len(values) // 8)))
    tops = [mark.value for mark in marks] + [high for _, _, high in stretches]
    top = 1.08 * max(tops) or 1.0
    bottom = min([*(low for low, _, _ in stretches), *(mark.value for mark in marks)])
    # From zero, so that a jump looks as large as it is.
    bottom = 0.0 if bottom > 0 else bottom

    def y(value: float) -> float:
        return _HEIGHT * (1 - (value - bottom) / (top - bottom))

    def x(i: int) -> float:
        return _WIDTH * (i + 0.5) / len(stretches)

    upper = [f"{coordinate(x(i))} {coordinate(y(s[2]))}" for i, s in enumerate(stretches)]
    lower = [f"{coordinate(x(i))} {coordinate(y(s[0]))}" for i, s in enumerate(stretches)]
    middle = [f"{coordinate(x(i))} {coordinate(y(s[1]))}" for i, s in enumerate(stretches)]
    grid = [(value - bottom) / (top - bottom) for value in ticks(bottom, top, 4)]
    shapes = join(
        [_horizontal(share, "grid-line") for share in grid],
        el("path", d=_path([*upper, *reversed(lower)], "Z"), class_="fill-soft"),
        el("path", d=_path(middle), class_="curve"),
        [_horizontal((mark.value - bottom) / (top - bottom), _rule(mark.style)) for mark in marks],
    )
    return _plot(
        shapes,
        x=[(0.0, ends[0]), (1.0, ends[1])],
        y=[(share, label(value)) for share, value in zip(grid, ticks(bottom, top, 4), strict=True)],
        notes=(),
        description=description,
    )


def bar(
    value: float,
    *,
    largest: float,
    pattern: Literal["solid", "hatched", "hollow", "hollow-hatched"] = "solid",
    tick: float | None = None,
    description: str,
) -> Html:
    """A bar for a cell of a table, and a tick for the value that it is compared with."""
    scale = 100 / largest if largest > 0 else 0
    width = max(scale * value, 0.6)
    hatched = pattern.endswith("hatched")
    hollow = pattern.startswith("hollow")
    shapes = [
        el(
            "rect",
            x=0.0,
            y=2.5,
            width=width,
            height=11.0,
            class_="outline" if hollow else None if hatched else "fill",
            fill="url(#hatch)" if hatched and not hollow else None,
            stroke_dasharray="3 2" if pattern == "hollow-hatched" else None,
        )
    ]
    if tick is not None:
        shapes.append(el("line", x1=scale * tick, y1=-1.0, x2=scale * tick, y2=17.0, class_="rule"))
    return el(
        "svg",
        shapes,
        viewBox="0 0 100 16",
        preserveAspectRatio="none",
        role="img",
        aria_label=description,
    )


def key(*entries: tuple[Html, str]) -> Html:
    """What the patterns of a chart mean."""
    return el("ul", [el("li", swatch, text) for swatch, text in entries], class_="legend")


def swatch(kind: Literal["solid", "hatched", "hollow", "hollow-hatched", "soft", "tick"]) -> Html:
    """A small sample of a bar, for `key`."""
    box = {"x": 0.5, "y": 0.5, "width": 23.0, "height": 10.0}
    if kind == "tick":
        shape = el("line", x1=12.0, y1=-1.0, x2=12.0, y2=12.0, class_="rule")
    elif kind == "hatched":
        shape = el("rect", **box, fill="url(#hatch)")
    elif kind.startswith("hollow"):
        dashes = "3 2" if kind == "hollow-hatched" else None
        shape = el("rect", **box, class_="outline", stroke_dasharray=dashes)
    else:
        shape = el("rect", **box, class_="fill" if kind == "solid" else "fill-soft")
    return el("svg", shape, viewBox="0 0 24 11", aria_hidden="true")


def line_swatch(style: LineStyle | Literal["curve"]) -> Html:
    """A small sample of a line, for `key`."""
    class_ = "curve" if style == "curve" else _rule(style)
    shape = el("line", x1=0.0, y1=5.5, x2=24.0, y2=5.5, class_=class_)
    return el("svg", shape, viewBox="0 0 24 11", aria_hidden="true")


def _plot(
    shapes: Html,
    *,
    x: Sequence[tuple[float, str]],
    y: Sequence[tuple[float, str]],
    notes: Sequence[tuple[float, str]],
    description: str,
) -> Html:
    field = el(
        "svg",
        shapes,
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        preserveAspectRatio="none",
        role="img",
        aria_label=description,
    )
    rows = []
    if notes:
        # A row for each label: the lines that they name may be close together.
        height = 1.25
        spans = [
            el(
                "span",
                text,
                class_="left" if share > 0.6 else None,
                style=f"left:{_percent(share)};top:{height * i:.2f}rem",
            )
            for i, (share, text) in enumerate(notes)
        ]
        rows = [el("div", spans, class_="notes", style=f"height:{height * len(notes):.2f}rem")]
    return el(
        "div",
        rows,
        el(
            "div",
            [el("span", text, style=f"bottom:{_percent(share)}") for share, text in y],
            class_="y",
            aria_hidden="true",
        ),
        el("div", field, class_="field"),
        el(
            "div",
            [
                el("span", text, class_=_edge(share), style=f"left:{_percent(share)}")
                for share, text in x
            ],
            class_="x",
            aria_hidden="true",
        ),
        class_="plot",
    )


def _path(points: Sequence[str], end: str = "") -> Html:
    return Html("M" + "L".join(points) + end)


def _edge(share: float) -> str | None:
    if share < 0.04:
        return "first"
    return "last" if share > 0.96 else None


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _rule(style: LineStyle) -> str:
    return "rule" if style == "solid" else f"rule {style}"


def _vertical(share: float, style: LineStyle) -> Html:
    x = _WIDTH * share
    return el("line", x1=x, y1=0.0, x2=x, y2=_HEIGHT, class_=_rule(style))


def _horizontal(share: float, class_: str) -> Html:
    y = _HEIGHT * (1 - share)
    return el("line", x1=0.0, y1=y, x2=_WIDTH, y2=y, class_=class_)


def _stretches(values: Sequence[float], points: int) -> list[tuple[float, float, float]]:
    """10%, middle and 90% of each of at most so many stretches of equal length."""
    count = min(points, len(values))
    result = []
    for i in range(count):
        part = sorted(values[len(values) * i // count : len(values) * (i + 1) // count])
        last = len(part) - 1
        result.append((part[last // 10], part[last // 2], part[last - last // 10]))
    return result
