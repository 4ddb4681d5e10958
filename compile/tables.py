"""Tables in a terminal."""


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]], *, right: set[int]) -> None:
    """Columns as wide as their content; those in `right` are flush right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
