"""How to do it again."""

from collections.abc import Sequence

from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.report.html import NONE, Content, Html, el, mapping, plural
from gfcompile.runtime.report.sections.blocks import folded, pairs, section, table
from gfcompile.runtime.results import ValidationResult


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
