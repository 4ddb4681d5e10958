"""Reports, rendered in headless Chromium: light, dark, on a phone and on paper."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import report_cases as cases

from gfcompile.runtime.compare import Contender, render_comparison
from gfcompile.runtime.report import write_report
from gfcompile.runtime.report.page import write_page
from tools import need_chromium

Scheme = Literal["light", "dark"]
PHONE, DESK = 360, 1100
PAGES = ("measured", "estimated", "compared")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = need_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # CI runs as root, where Chromium's sandbox does not start; the pages are ours.
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    made = {name: folder / f"{name}.html" for name in PAGES}
    # Names without a place to break are the hardest to fit.
    notes = (*cases.manifest().notes, "/" + "very-long-name" * 12)
    hard = cases.manifest(notes=notes, versions={"v" * 60: "1." * 40})
    write_report(made["measured"], hard, cases.result(), picture=cases.picture())
    write_report(made["estimated"], cases.manifest())
    contenders = [
        Contender(
            name=f"dynamicvit_lvvit_m-jetson-xavier-cpu-{precision}",
            model="dynamicvit_lvvit_m",
            precision=precision,
            target="jetson-xavier-cpu",
            device="a board in the cellar" if precision == "int8" else "",
            median_us=9700.0 if precision == "int8" else None,
            p90_us=9900.0 if precision == "int8" else None,
            estimate_us=30_000.0,
            top1_agreement=1.0,
            size_bytes=17.7e6,
        )
        for precision in ("float32", "int8")
    ]
    write_page(made["compared"], render_comparison(contenders))
    return made


@contextmanager
def shown(browser: Any, path: Path, *, width: int, scheme: Scheme) -> Iterator[Any]:
    """The page, with what it logged and asked for as `logged` and `requested`."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.logged, page.requested = [], []
    page.on("console", lambda message: page.logged.append(message.text))
    page.on("pageerror", lambda error: page.logged.append(str(error)))
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(path.as_uri())
    yield page
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_nothing_goes_wrong_and_nothing_is_fetched(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    with shown(browser, pages[name], width=DESK, scheme="light") as page:
        assert page.logged == []
        others = [url for url in page.requested if not url.startswith("data:image/jpeg")]
        assert others == [pages[name].as_uri()]


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_does_not_scroll_sideways(browser: Any, pages: dict[str, Path], name: str) -> None:
    with shown(browser, pages[name], width=PHONE, scheme="light") as page:
        for details in page.query_selector_all("details"):
            details.evaluate("element => element.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_contrast_names_and_structure_are_accessible(
    browser: Any, pages: dict[str, Path], scheme: Scheme, width: int
) -> None:
    pytest.importorskip("axe_playwright_python")
    from axe_playwright_python.sync_playwright import Axe

    for name in PAGES:
        with shown(browser, pages[name], width=width, scheme=scheme) as page:
            for details in page.query_selector_all("details"):
                details.evaluate("element => element.open = true")
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()


def test_dark_is_dark(browser: Any, pages: dict[str, Path]) -> None:
    def lightness(scheme: Scheme) -> int:
        with shown(browser, pages["measured"], width=DESK, scheme=scheme) as page:
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(","))

    assert lightness("dark") < 120 < 600 < lightness("light")


def test_patches_and_photo_are_drawn(browser: Any, pages: dict[str, Path]) -> None:
    with shown(browser, pages["measured"], width=DESK, scheme="light") as page:
        boxes = [element.bounding_box() for element in page.query_selector_all(".photos svg")]
        assert len(boxes) == 3
        assert all(box["width"] > 100 and box["width"] == box["height"] for box in boxes)
        # The photo is a red and green ramp: its first stage keeps the first patch, the third none
        # of the first row.
        first = page.query_selector_all(".photos svg")[0].screenshot()
    from io import BytesIO

    from PIL import Image

    image = Image.open(BytesIO(first)).convert("RGB")
    kept, dropped = (image.getpixel((image.width * (2 * i + 1) // 8, 4)) for i in (0, 1))
    assert sum(kept) < 300 < 600 < sum(dropped)


def test_paper_shows_what_is_folded_on_a_screen(browser: Any, pages: dict[str, Path]) -> None:
    with shown(browser, pages["measured"], width=DESK, scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
        hidden = page.evaluate(
            "[...document.querySelectorAll('details td')].filter(e => !e.checkVisibility("
            "{contentVisibilityAuto: true})).length"
        )
        assert hidden == 0
