"""Files of images: what is read, what is said of those that are not, and the kinds of figures."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageFile

from captum_fam import images
from captum_fam.images import FIGURES, check_output, read_image, write_figure

HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic"

SAID = {
    "an empty file": (b"", "it is empty"),
    "HEIC": (HEIC, "pip install pillow-heif"),
    "HEIC of another brand": (HEIC.replace(b"ftypheic", b"ftypmif1"), "pip install pillow-heif"),
    "PDF": (b"%PDF-1.7\n", "it is PDF: save its page"),
    "JPEG XL": (b"\xff\x0a\0\0", "it is JPEG XL: convert it"),
    "JPEG XL in its box": (b"\0\0\0\x0cJXL \r\n", "it is JPEG XL: convert it"),
    "SVG": (b"\n<svg xmlns='http://www.w3.org/2000/svg'/>", "such as SVG or a web page"),
    "a web page": (b"<!doctype html><title>Log in</title>", "such as SVG or a web page"),
    "a pointer of LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a video": (b"\0\0\0\x18ftypisom\0\0\0\0", "pass a file that Pillow opens"),
    "text": (b"no image", "pass a file that Pillow opens"),
}


@pytest.mark.parametrize(("content", "words"), SAID.values(), ids=SAID)
def test_of_a_file_that_is_no_image_it_is_said_what_it_is_and_what_helps(tmp_path, monkeypatch, content, words):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="as an image: ") as caught:
        read_image(path)
    assert str(caught.value).startswith(f"cannot read {path} as an image: ")
    assert words in str(caught.value)


def test_avif_that_pillow_lacks_says_which_pillow_has_it(tmp_path, monkeypatch):
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1")

    def unknown(path):
        raise Image.UnidentifiedImageError(path)

    monkeypatch.setattr(Image, "open", unknown)
    with pytest.raises(ValueError, match=r"it is AVIF, .*11\.3 on: pip install --upgrade pillow$"):
        read_image(tmp_path / "a.avif")


@pytest.fixture
def as_it_was():
    """Plug-ins that are registered here are so nowhere else."""
    known = [(of, of.copy()) for of in (Image.OPEN, Image.MIME, Image.EXTENSION)]
    order = Image.ID.copy()
    yield
    Image.ID[:] = order
    for of, before in known:
        of.clear()
        of.update(before)


def test_heic_is_read_where_its_plugin_is_installed(tmp_path, monkeypatch, as_it_was):
    class Heic(ImageFile.StubImageFile):
        format = "HEIF"

        def _open(self):
            self._mode, self._size = "RGB", (6, 4)

        def load(self):
            self.__class__, self.__dict__ = Image.Image, Image.new("RGB", (6, 4), "red").__dict__

    def register():
        Image.register_open("HEIF", Heic, lambda prefix: prefix[4:12] == b"ftypheic")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    (tmp_path / "photo.HEIC").write_bytes(HEIC)
    assert np.asarray(read_image(tmp_path / "photo.HEIC")).shape == (4, 6, 3)
    assert np.asarray(read_image(tmp_path / "photo.HEIC"))[0, 0].tolist() == [255, 0, 0]


def test_heic_of_the_real_plugin(tmp_path, as_it_was):
    heif = pytest.importorskip("pillow_heif")
    values = np.full((32, 48, 3), (200, 40, 40), np.uint8)
    heif.from_pillow(Image.fromarray(values)).save(tmp_path / "photo.heic")
    read = np.asarray(read_image(tmp_path / "photo.heic")).astype(int)
    assert read.shape == values.shape
    assert np.abs(read - values).max() < 10
    (tmp_path / "half.heic").write_bytes((tmp_path / "photo.heic").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"half\.heic as an image"):
        read_image(tmp_path / "half.heic")


def test_of_a_photo_that_is_cut_short_the_reason_is_said(tmp_path):
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.jpg as an image: .*truncated.*; pass a whole file"):
        read_image(tmp_path / "half.jpg")


def test_a_folder_says_how_to_name_its_files(tmp_path):
    with pytest.raises(ValueError, match=r"it is a folder, pass its files, such as .*\*\.jpg$"):
        read_image(tmp_path)


def test_a_pattern_that_nobody_expanded_is_said_to_be_one(tmp_path):
    with pytest.raises(ValueError, match=r"no file matches it, either"):
        read_image(tmp_path / "*.jpg")
    for name in ("a.jpg", "b.jpg"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"\*\.jpg: 2 files match it, but the shell .*leave out its quotes"):
        read_image(tmp_path / "*.jpg")
    Image.new("L", (4, 4)).save(tmp_path / "photo[1].jpg")
    assert read_image(tmp_path / "photo[1].jpg").size == (4, 4)
    for address in ("https://example.org/a.jpg", "s3://bucket/*.jpg"):  # a slash of which a path does not keep
        with pytest.raises(
            ValueError, match=r"^there is no image \w+:/.*: it is an address; save the picture, and name"
        ):
            read_image(Path(address))
    with pytest.raises(ValueError, match=r"nope\.jpg: check the path$"):
        read_image(tmp_path / "nope.jpg")


@pytest.mark.parametrize(
    ("suffix", "begins"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".pdf", b"%PDF"), (".svg", b"<?xml")]
)
def test_a_figure_is_written_as_its_name_says(tmp_path, suffix, begins):
    figure = Figure()
    figure.subplots().set_xlabel("猫 $x^$ \N{HORIZONTAL ELLIPSIS}", parse_math=False)
    output = tmp_path / f"figure{suffix}"
    check_output(output, FIGURES)
    write_figure(figure, output)
    assert output.read_bytes().startswith(begins)
    assert list(tmp_path.iterdir()) == [output]


def test_an_output_of_no_such_kind_names_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"figure\.gif: name a file that ends in \.png or \.pdf or \.svg with -o"):
        check_output(tmp_path / "figure.gif", FIGURES)
    with pytest.raises(ValueError, match=r"name a file that ends in \.html with -o"):
        check_output(Path("page"), ".html")
    assert images.FIGURES == (".png", ".pdf", ".svg")
