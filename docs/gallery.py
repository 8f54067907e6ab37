"""Runs the code of docs/gallery.md and writes the pictures of docs/gallery: ``python docs/gallery.py``."""

import re
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot
from PIL import Image

PAGE = Path(__file__).with_name("gallery.md")
FOLDER = PAGE.with_suffix("")
WIDTH, INCHES = 700, 11  # of each picture, in pixels, and at most of its figure, whose words are then large enough


def blocks() -> tuple[str, dict[str, str]]:
    """The code that all others need, and the code of each file by its name."""
    first, *sections = PAGE.read_text(encoding="utf-8").split("\n## ")
    code = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
    (setup,) = code.findall(first)
    found = {}
    for section in sections:
        (name,), (found[name],) = re.findall(r'[("]gallery/([\w.]+)[)"]', section), code.findall(section)
    return setup, found


def prepared(setup: str) -> dict[str, Any]:
    """The names that the code of a file finds."""
    mpl.use("agg")
    names: dict[str, Any] = {}
    exec(setup, names)
    return names


def made(code: str, names: dict[str, Any]) -> Any:
    """The figure of a block, or its page."""
    names = dict(names)
    exec(code, names)
    pyplot.close("all")
    return names["figure"] if "figure" in names else names["page"]


def picture(figure: Any) -> Image.Image:
    shrunk = min(1, INCHES / figure.get_figwidth())
    figure.set_size_inches(shrunk * figure.get_size_inches())
    content = BytesIO()
    figure.savefig(content, format="png", dpi=WIDTH / figure.get_figwidth())
    return Image.open(content).convert("RGB")


def main() -> None:
    setup, files = blocks()
    names = prepared(setup)
    FOLDER.mkdir(exist_ok=True)
    for name, code in files.items():
        if name.endswith(".jpg"):  # the page is made with all others, and not kept
            picture(made(code, names)).save(FOLDER / name, quality=80, optimize=True)


if __name__ == "__main__":
    main()
