"""Makes docs/explorer.jpg, the page of the demonstration in a browser: pip install '.[browser]', and Chromium."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import sync_playwright

from captum_fam.demo import demo_page

RIM = 0.13, 0.68  # of the cup, in the collage: shares of its width and height
SIZE = {"width": 960, "height": 930}


def main() -> None:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "demo.html"
        demo_page().save(file)
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, device_scale_factor=1.25, color_scheme="light")
        page.goto(file.as_uri())
        frame = page.locator("#query").bounding_box()
        page.mouse.move(frame["x"] + RIM[0] * frame["width"], frame["y"] + RIM[1] * frame["height"])
        page.screenshot(path=Path(__file__).parent / "explorer.jpg", type="jpeg", quality=85)
        browser.close()


if __name__ == "__main__":
    main()
