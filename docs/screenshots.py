"""Writes report-light.png, report-dark.png and report-narrow.png beside this file.

python docs/screenshots.py demo/report.html
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

VIEWS = (("light", "light", 960, 1500), ("dark", "dark", 960, 1500), ("narrow", "light", 360, 1500))
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
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            target = Path(__file__).with_name(f"report-{name}.png")
            picture.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
            print(f"{target}: {target.stat().st_size / 1e3:.0f} KB")
        browser.close()


if __name__ == "__main__":
    main()
