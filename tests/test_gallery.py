"""The code of docs/gallery.md runs as it stands, and the pictures beside it are what it makes."""

import numpy as np
import pytest
from PIL import Image

from docs import gallery
from docs.gallery import FOLDER

SETUP, FILES = gallery.blocks()
SMALL = 60_000  # bytes of a picture


@pytest.fixture(scope="module")
def names():
    return gallery.prepared(SETUP)


@pytest.mark.parametrize("name", FILES)
def test_the_code_makes_its_picture(name, names, monkeypatch, tmp_path):
    if "SharedParts" in FILES[name]:
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    result = gallery.made(FILES[name], names)
    assert not [*tmp_path.iterdir()]
    if name.endswith(".html"):
        assert len(result.html) < 400_000
        return
    made, kept = gallery.picture(result), Image.open(FOLDER / name)
    assert abs(made.height - kept.height) <= 8, "python docs/gallery.py"
    small = [np.asarray(image.convert("RGB").resize((64, 64)), float) for image in (made, kept)]
    assert np.abs(small[0] - small[1]).mean() < 3, "python docs/gallery.py"  # of 255: JPEG has 1, red for blue 6


def test_the_pictures_are_those_of_the_page_and_small():
    pictures = {name for name in FILES if name.endswith(".jpg")}
    assert {file.name for file in FOLDER.iterdir()} == pictures
    for name in pictures:
        assert Image.open(FOLDER / name).width == gallery.WIDTH
        assert (FOLDER / name).stat().st_size <= SMALL


@pytest.mark.parametrize("name", FILES)
def test_ten_lines_make_it(name):
    assert len([line for line in FILES[name].splitlines() if line]) <= 10
