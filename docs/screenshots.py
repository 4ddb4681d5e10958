"""Writes report-light.png, -dark, -narrow and -kernels beside this file.

python docs/screenshots.py demo/report.html
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

VIEWS = (("light", "light", 960, 1500), ("dark", "dark", 960, 1500), ("narrow", "light", 360, 1500))
SECTIONS = ("What it sees", "Where the time")
COLOURS = 128  # the photo is small; the rest of a page has few


def main() -> None:
    page_file = Path(sys.argv[1]).resolve()
    chromium = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, scheme, width, height in VIEWS:
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(page_file.as_uri())
            save(page.screenshot(), name)
        page = browser.new_page(viewport={"width": 960, "height": 1500})
        page.goto(page_file.as_uri())
        first, last = (page.locator(f"section:has(h2:text('{title}'))") for title in SECTIONS)
        top, end = first.bounding_box(), last.bounding_box()
        assert top is not None
        assert end is not None
        height = min(end["y"] + end["height"] - top["y"], 1500)
        clip = {"x": 0, "y": top["y"], "width": 960, "height": height}
        save(page.screenshot(full_page=True, clip=clip), "kernels")
        browser.close()


def save(png: bytes, name: str) -> None:
    """Writes a picture of few colours, which is a small file."""
    target = Path(__file__).with_name(f"report-{name}.png")
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target}: {target.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
