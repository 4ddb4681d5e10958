"""Bundles and results side by side: what each takes, how exact it is, and where that was seen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gfcompile.runtime.bundle import MANIFEST_NAME, Manifest, read_manifest
from gfcompile.runtime.errors import BundleError, UserError
from gfcompile.runtime.report import charts
from gfcompile.runtime.report.html import (
    NONE,
    Content,
    Html,
    breakable,
    clean,
    decibel,
    duration,
    el,
    figure,
    mapping,
    percent,
    size,
)
from gfcompile.runtime.report.kernels import kernels_of
from gfcompile.runtime.report.page import page
from gfcompile.runtime.report.sections.blocks import scrolling, section, table
from gfcompile.runtime.results import ValidationResult, manifest_sha256, newest, read_result

HEADER = (
    "bundle", "model", "precision", "target", "device", "batch", "median", "p90", "estimate",
    "times", "same top-1", "SQNR", "size", "memory",
)  # fmt: skip
NUMBERS = range(5, len(HEADER))


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One bundle, as far as it is known.

    Attributes:
        name: of its folder.
        device: where it was measured; "" if it was not.
        batch: images per inference, which is what all times are of.
        median_us, p90_us: measured.
        estimate_us: of its kernels, on the target that it was compiled for.
        top1_agreement: with the golden outputs on the device, or with its graph when compiled.
        sqnr_db: of int8 against float; None where nothing was quantized.
        peak_memory_bytes: of the process that ran it.
    """

    name: str
    model: str
    precision: str
    target: str
    device: str = ""
    batch: int = 1
    median_us: float | None = None
    p90_us: float | None = None
    estimate_us: float | None = None
    top1_agreement: float | None = None
    sqnr_db: float | None = None
    size_bytes: float | None = None
    peak_memory_bytes: float | None = None

    @property
    def time_us(self) -> float | None:
        """The measured time, or else the estimate."""
        return self.estimate_us if self.median_us is None else self.median_us

    @property
    def image_us(self) -> float | None:
        """The same for one of the batch's images."""
        return None if self.time_us is None else self.time_us / self.batch


def contender(path: Path) -> Contender:
    """What is known of a bundle, with the newest result kept beside it, or of one result.

    Raises:
        BundleError, UserError: it is neither.
    """
    if path.is_dir():
        manifest = read_manifest(path)
        return _of_bundle(path, manifest, newest(path))
    if path.name == MANIFEST_NAME:
        raise UserError(f"{path}: give the bundle's folder, {path.parent}")
    result = read_result(path)
    bundle = path.absolute().parent.with_name(result.bundle.name)
    try:
        manifest = read_manifest(bundle)
    except BundleError:
        return _of_result(result)  # the result came alone; estimates are in the bundle
    if manifest_sha256(bundle) != result.bundle.manifest_sha256:
        return _of_result(result)
    return _of_bundle(bundle, manifest, result)


def _of_bundle(bundle: Path, manifest: Manifest, result: ValidationResult | None) -> Contender:
    ledger = {str(entry.get("stage")): mapping(entry) for entry in manifest.ledger}
    listed = [figure(entry.size_bytes) or 0.0 for entry in manifest.files.values()]
    agreement = figure(ledger.get("artifact", {}).get("top1_agreement"))
    if result is not None and result.numbers is not None:
        agreement = result.numbers.top1_agreement
    return Contender(
        name=bundle.resolve().name,
        model=str(manifest.model),
        precision=str(manifest.precision.requested),
        target=str(manifest.target),
        batch=manifest.batch,
        estimate_us=kernels_of(manifest, None).estimate_us,
        top1_agreement=agreement,
        sqnr_db=figure(ledger.get("quantized", {}).get("sqnr_db")),
        # As a result has it, and as the compiler tells it: with the manifest.
        size_bytes=sum(listed) + (bundle / MANIFEST_NAME).stat().st_size,
        **_measured(result),
    )


def _of_result(result: ValidationResult) -> Contender:
    return Contender(
        name=result.bundle.name,
        model=result.bundle.model,
        precision=result.bundle.requested,
        target=result.bundle.target,
        batch=max(result.bundle.batch, 1),
        top1_agreement=None if result.numbers is None else result.numbers.top1_agreement,
        size_bytes=result.bundle.size_bytes,
        **_measured(result),
    )


def _measured(result: ValidationResult | None) -> dict[str, Any]:
    if result is None:
        return {}
    values: dict[str, Any] = {"device": result.device.name}
    if result.latencies is not None:
        values["median_us"] = figure(result.latencies.median_us)
        values["p90_us"] = figure(result.latencies.p90_us)
    if result.peak_memory_mb is not None:
        values["peak_memory_bytes"] = 1e6 * result.peak_memory_mb
    return values


def rows(contenders: Sequence[Contender]) -> list[tuple[str, ...]]:
    """A row of text for each, under HEADER; "times" is against the first one, image by image.

    Times are compared only where both were measured, or both are estimates.
    """
    return [
        (
            c.name,
            c.model,
            c.precision,
            c.target,
            c.device or "not measured",
            f"{c.batch}",
            duration(c.median_us),
            duration(c.p90_us),
            duration(c.estimate_us),
            _times(c, contenders[0]),
            percent(c.top1_agreement),
            decibel(c.sqnr_db),
            size(c.size_bytes),
            size(c.peak_memory_bytes),
        )
        for c in contenders
    ]


def _times(one: Contender, first: Contender) -> str:
    alike = (one.median_us is None) == (first.median_us is None)
    if not alike or not one.image_us or not first.image_us:
        return NONE
    return f"{one.image_us / first.image_us:.2f}×"


def markdown(contenders: Sequence[Contender]) -> str:
    """A table for a README; columns in which nothing stands are left out."""
    body = rows(contenders)
    used = [i for i in range(len(HEADER)) if any(row[i] != NONE for row in body)]
    rule = ["---:" if i in NUMBERS else "---" for i in used]
    lines = [[HEADER[i] for i in used], rule]
    lines += [[_markdown_text(row[i]) for i in used] for row in body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _markdown_text(text: str) -> str:
    """Text that Markdown takes as it is."""
    text = clean(" ".join(text.split()))
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#~" else c for c in text)


def to_json(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """JSON values."""
    return [asdict(c) for c in contenders]


def render_comparison(contenders: Sequence[Contender]) -> str:
    """A page with a bar for each and the table."""
    names = ", ".join(dict.fromkeys(c.model for c in contenders))
    every = [[breakable(row[0]), *row[1:]] for row in rows(contenders)]
    measured = [c for c in contenders if c.median_us is not None]
    return page(
        f"{names}: gfcompile compare",
        el(
            "header",
            el("p", f"{len(contenders)} bundles side by side", class_="eyebrow"),
            el("h1", names),
            class_="wide",
        ),
        el(
            "main",
            _times_section(contenders, bool(measured)),
            _sizes_section(contenders),
            section(
                "All figures",
                "“times” is against the first row, for one image, where both were measured or both "
                "estimated.",
                scrolling(
                    table(HEADER, every, numbers=NUMBERS, cards=True), "All figures of each bundle"
                ),
            ),
            class_="wide",
        ),
    )


def _times_section(contenders: Sequence[Contender], measured: bool) -> Html:
    largest = max([c.p90_us or c.time_us or 0.0 for c in contenders])
    body: list[list[Content]] = []
    for c in contenders:
        time = c.time_us
        bar: Content = NONE
        if time is not None:
            said = "measured" if c.median_us is not None else "estimate"
            bar = charts.bar(
                time,
                largest=largest,
                pattern="solid" if c.median_us is not None else "hollow",
                tick=c.p90_us,
                description=f"{c.name}: {duration(time)}, {said}",
            )
        shown = duration(time) if c.median_us is not None else f"≈ {duration(time)}"
        body.append([_label(c), bar, shown if time is not None else NONE])
    legend = [(charts.swatch("hollow"), "estimate")]
    if measured:
        legend = [
            (charts.swatch("solid"), "measured median"),
            (charts.swatch("tick"), "p90"),
            *legend,
        ]
    return section(
        "Time of one inference",
        "Shorter is better. Estimates are of the target, measurements of the device named.",
        charts.key(*legend),
        table(("bundle", "chart", "time"), body, numbers=(2,), bars=1),
    )


def _sizes_section(contenders: Sequence[Contender]) -> Html:
    largest = max([c.size_bytes or 0.0 for c in contenders])
    body = [
        [
            _label(c),
            charts.bar(
                c.size_bytes or 0.0,
                largest=largest,
                description=f"{c.name}: {size(c.size_bytes)}",
            ),
            size(c.size_bytes),
        ]
        for c in contenders
    ]
    return section(
        "Size of the bundle", None, table(("bundle", "chart", "size"), body, numbers=(2,), bars=1)
    )


def _label(c: Contender) -> Content:
    where = c.device or c.target
    images = "" if c.batch == 1 else f", {c.batch} images"
    return [c.model, " ", el("span", f"{c.precision}, {where}{images}", class_="soft small")]
