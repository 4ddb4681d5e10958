"""What commands share: types of their arguments, whom progress is told, and how they print."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gfcompile.compile.progress import ConsoleProgress, SilentProgress


_SEEDS = 1 << 32  # a training shifts one by 32 bits, into the 64 that torch takes


def positive_int(text: str) -> int:
    return _whole(text, least=1)


def natural_int(text: str) -> int:
    return _whole(text, least=0)


def seed_int(text: str) -> int:
    number = natural_int(text)
    if number >= _SEEDS:
        raise argparse.ArgumentTypeError(f"{number} is not below {_SEEDS}")
    return number


def _whole(text: str, *, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is not at least {least}")
    return number


def console_progress(*, quiet: bool) -> "ConsoleProgress | SilentProgress":
    """One that tells the terminal; nobody if `quiet`, or where another process tells it."""
    from gfcompile.compile.progress import ConsoleProgress, SilentProgress

    return SilentProgress() if quiet or not is_first_process() else ConsoleProgress()


def is_first_process() -> bool:
    """Under torchrun, whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def print_table(
    header: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, right: set[int]
) -> None:
    """Columns as wide as their content; those in `right` are flush right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def complain(text: str) -> None:
    print(f"gfcompile: {printable(text)}", file=sys.stderr)


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def printable(text: str) -> str:
    """One line that a terminal can show, whatever a file or a device has put into the text."""
    from gfcompile.runtime.report.html import clean

    return clean(one_line(text))


def one_line(text: str) -> str:
    return " ".join(text.split())
