"""Images and lists of pairs of any bytes: a result or a ValueError that names the file, in bounded time and memory."""

import io
import resource
import signal
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captum_fam.images import read_image

SECONDS = 60  # for one file
MEBIBYTES = 2048  # Pillow takes images of up to 179 million pixels, which are 716 MB as RGB
SEEN = Counter()


def encoded(suffix, mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, suffix, **options)
    return file.getvalue()


def animation():
    frames = [Image.new("P", (8, 8), n) for n in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


IMAGES = {
    "PNG": encoded("PNG"),
    "PNG of a palette": encoded("PNG", "P"),
    "PNG of 16 bits": encoded("PNG", "I;16"),
    "JPEG": encoded("JPEG", exif=bytes(Image.Exif()) + b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
    "JPEG, progressive": encoded("JPEG", progressive=True),
    "JPEG of four colours": encoded("JPEG", "CMYK"),
    "GIF": animation(),
    "BMP": encoded("BMP"),
    "TIFF": encoded("TIFF"),
    "TIFF, packed": encoded("TIFF", compression="tiff_lzw"),
    "TIFF of floats": encoded("TIFF", "F"),
    "PPM": encoded("PPM"),
    "TGA": encoded("TGA"),
    "PCX": encoded("PCX"),
    "ICO": encoded("ICO"),
    "SGI": encoded("SGI"),
    "WEBP": encoded("WEBP"),
    "ICNS": encoded("ICNS"),
    "DDS": encoded("DDS"),
    "nothing": b"",
}


def csv(rows):
    return "\n".join(["id,query,reference", *rows]).encode()


def tables():
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"id": [1, 2, 3], "query": ["a.png", "b.png", "c.png"], "reference": ["d.png", None, "f\n.png"]}
    for options in ({}, {"compression": "none"}, {"use_dictionary": False, "row_group_size": 1}):
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, **options)
        yield file.getvalue()


@st.composite
def changed(draw, content):
    """A valid file with bytes turned, cut, doubled, put in, or of an extreme size."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["byte", "number", "cut", "double", "insert", "remove"])):
            case "byte" if place < len(content):
                content[place] = draw(st.integers(0, 255))
            case "number":  # a length or a size, in both orders of bytes
                number = draw(st.sampled_from([0, 1, 0x7F, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
                content[place : place + 4] = number.to_bytes(4, draw(st.sampled_from(["big", "little"])))
            case "cut":
                del content[place:]
            case "double":
                content[place:place] = content[place : place + draw(st.integers(0, 200))]
            case "insert":
                content[place:place] = draw(st.binary(max_size=20))
            case "remove":
                del content[place : place + draw(st.integers(0, 20))]
    return bytes(content)


def out_of_time(*_):
    raise TimeoutError(f"a file takes more than {SECONDS} seconds")


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture(autouse=True)
def _bounded(record_property):
    """Nothing takes long, or much memory."""
    SEEN.clear()
    signal.signal(signal.SIGALRM, out_of_time)
    before = peak()
    yield
    assert peak() - before < MEBIBYTES
    for what, number in sorted(SEEN.items()):
        record_property(what, number)


def outcome(read, path):
    """What came of a file: "read", or "refused" by an error that names the file."""
    refusal = None
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
    except ValueError as error:
        refusal = error
    finally:
        signal.alarm(0)
    assert refusal is None or str(path) in str(refusal)
    return "read" if refusal is None else "refused"


@given(st.sampled_from(list(IMAGES)).flatmap(lambda name: changed(IMAGES[name])))
def test_any_bytes_are_an_image_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "image"
    path.write_bytes(content)

    def read(path):
        image = read_image(path)
        assert image.mode == "RGB"
        image.load()

    SEEN[f"images {outcome(read, path)}"] += 1


CSV = [
    csv(["1,a.png,b.png", "2,,c.png"]),
    csv(['1,"a\n.png",b.png', '2,"x""y",z']),
    b"\xef\xbb\xbf" + csv(["\u00e9,\u00e9,\u00e9"]),
    csv([]),
    b"",
]


@given(st.one_of(*[st.sampled_from(CSV).flatmap(changed)] * 4, st.binary(max_size=100)))
def test_any_bytes_are_pairs_in_csv_or_refused(tmp_path_factory, content):
    check_pairs(tmp_path_factory.getbasetemp() / "pairs.csv", content)


@given(st.data())
def test_any_bytes_are_pairs_in_parquet_or_refused(tmp_path_factory, data):
    content = data.draw(st.sampled_from(list(tables())).flatmap(changed))
    check_pairs(tmp_path_factory.getbasetemp() / "pairs.parquet", content)


def check_pairs(path, content):
    pytest.importorskip("pyarrow")
    from captum_fam.batch._pairs import write_pairs

    path.write_bytes(content)
    SEEN[f"lists {outcome(lambda p: write_pairs(p, io.BytesIO(), 2), path)}"] += 1
