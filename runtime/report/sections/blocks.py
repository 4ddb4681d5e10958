"""What sections are made of: headings, tables, rows that fold."""

from collections.abc import Iterable, Sequence

from gfcompile.runtime.report.html import Content, Html, el


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
