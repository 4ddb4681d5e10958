"""`gfcompile report` and `gfcompile compare`: arguments in, a page or a table out."""

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from gfcompile.runtime.errors import UserError
from gfcompile.runtime.results import (
    ValidationResult,
    history_folder,
    manifest_sha256,
    newest,
    read_result,
)

if TYPE_CHECKING:
    from gfcompile.runtime.compare import Contender


def report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "result",
        type=Path,
        nargs="?",
        metavar="RESULT.json",
        help="a result of gfcompile validate (default: the newest of this bundle, if there is one)",
    )
    parser.add_argument(
        "--photo", type=Path, metavar="IMAGE", help="to classify (default: the bundle's own)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: BUNDLE-results/report.html"
    )


def report_command(options: argparse.Namespace) -> None:
    """Writes the report and prints where it is."""
    from gfcompile.runtime.bundle import check_bundle

    check_bundle(options.bundle, local=False)
    if options.result is None:
        result = newest(options.bundle)
    else:
        result = read_result(options.result)
        if result.bundle.manifest_sha256 != manifest_sha256(options.bundle):
            raise UserError(
                f"{options.result} is of another bundle, or of this one as it was before: "
                "validate it again"
            )
    output = options.output or history_folder(options.bundle) / "report.html"
    command = ["gfcompile", "report", str(options.bundle)]
    command += [] if options.photo is None else ["--photo", str(options.photo)]
    _write(output, options.bundle, result, options.photo, shlex.join(command))
    print(f"{output}: {'measured' if result is not None else 'not measured, estimates alone'}")


def write_validation_report(result: ValidationResult, bundle: Path, output: Path) -> None:
    """The report of a validation, beside its result."""
    _write(output, bundle, result, None, "")


def _write(
    output: Path,
    bundle: Path,
    result: ValidationResult | None,
    photo: Path | None,
    command: str,
) -> None:
    from gfcompile.runtime.bundle import read_manifest
    from gfcompile.runtime.report import look, write_report

    manifest = read_manifest(bundle)
    picture = look(bundle, manifest, photo)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_report(
        output,
        manifest,
        result,
        picture=picture,
        commands=(command,) if command else (),
    )


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="BUNDLE|RESULT.json",
        help="a bundle, with the newest result beside it, or one result; the first is the measure",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a table for a README")
    form.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a plot")


def compare_command(options: argparse.Namespace) -> None:
    """Prints bundles side by side."""
    from gfcompile.runtime.compare import contender, markdown, render_comparison, to_json
    from gfcompile.runtime.report.page import write_page

    contenders = [contender(path) for path in options.paths]
    if options.html is not None:
        write_page(options.html, render_comparison(contenders))
    if options.json:
        print(json.dumps(to_json(contenders), indent=2))
    elif options.markdown:
        print(markdown(contenders), end="")
    else:
        _print_table(contenders)
        if options.html is not None:
            print(f"\n{options.html}: the plot")


def _print_table(contenders: "list[Contender]") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gfcompile.runtime.compare import HEADER, NUMBERS, rows
    from gfcompile.runtime.report.html import NONE, clean

    body = rows(contenders)
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    used = [i for i in range(len(HEADER)) if any(row[i] != NONE for row in body)]
    for i in used:
        shown.add_column(HEADER[i], justify="right" if i in NUMBERS else "left")
    for row in body:
        shown.add_row(*[Text(clean(row[i])) for i in used])
    console = Console(highlight=False)
    # A pipe or a log has no width of its own; there a line may be as long as it is.
    if not console.is_terminal:
        console.width = 400
    console.print(shown)
