"""A real browser for the pages that the package writes: Chromium of the system, driven by Playwright."""

import contextlib
import os
import shutil

import numpy as np
import pytest

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = os.environ.get("CAPTUM_FAM_AXE")  # the file axe.min.js of npm's axe-core

needs_axe = pytest.mark.skipif(AXE is None, reason="set CAPTUM_FAM_AXE to the file axe.min.js of `npm pack axe-core`")


@contextlib.contextmanager
def chromium():
    """The browser, or a skip that says what is missing."""
    driver = pytest.importorskip("playwright.sync_api", reason="pip install 'captum-fam[browser]'")
    if EXECUTABLE is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with driver.sync_playwright() as playwright:
        # Chromium's sandbox does not start as root.
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()


class Heard:
    """What a page asked for, and what went wrong in it."""

    def __init__(self, context):
        self.requests, self.faults = [], []
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("weberror", lambda fault: self.faults.append(str(fault.error)))
        context.on("console", lambda message: self.faults.append(f"{message.type}: {message.text}"))
        context.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))


@contextlib.contextmanager
def opened(browser, path, *, width=1400, height=1000, quiet=True, **options):
    """
    The page of a file, in a window of its own; ``options`` are those of Playwright's contexts. At the end, nothing may
    have been asked for but the file, and nothing logged.
    """
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(5000)
    page = context.new_page()
    page.heard = Heard(context)
    page.goto(path.as_uri())
    yield page
    context.close()
    if quiet:
        asked = [url for url in page.heard.requests if not url.startswith("data:")]
        assert asked == [path.as_uri()], f"the page asked for {asked}"
        assert not page.heard.faults, f"the page's console has {page.heard.faults}"


def violations(page):
    """What axe-core finds, as one line each."""
    with open(AXE, encoding="utf-8") as file:
        page.evaluate(file.read())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{v['id']}: {v['help']}: {node['html']} {node['failureSummary']}" for v in found for node in v["nodes"]]


def pixels(page, stage):
    """The canvas of a stage, (h, w, 4): red, green, blue, opacity."""
    size, data = page.evaluate(
        """selector => {
            const canvas = document.querySelector(selector + " canvas");
            const {width, height} = canvas;
            // Read from a copy: Chromium logs a warning about a canvas that is read often.
            const copy = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
            copy.drawImage(canvas, 0, 0);
            return [[height, width], Array.from(copy.getImageData(0, 0, width, height).data)];
        }""",
        stage,
    )
    return np.array(data).reshape(*size, 4)


def no_wider_than_the_window(page):
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
