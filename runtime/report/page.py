"""The page of a report: its head, its style, and the security policy that forbids all else."""

import os
from pathlib import Path

from gfcompile.runtime.report.charts import DEFINITIONS
from gfcompile.runtime.report.html import Content, Html, el, join

# Should a hostile text get past the escaping, nothing is loaded or run all the same.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, *content: Content) -> str:
    """A whole document."""
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="robots", content="noindex"),
        el("title", title),
        el("style", Html(style)),
    )
    body = el("body", DEFINITIONS, join(*content))
    return "<!DOCTYPE html>\n" + el("html", head, body, lang="en") + "\n"


def write_page(path: Path, text: str) -> None:
    """Writes the document at `path`, whole or not at all."""
    made = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with made.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
