"""What a batch job has written, as arrays, figures and a list of errors; and lists as spreadsheets write them."""

# ruff: noqa: F811  # fixtures of other tests

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_batch import NAMES, in_process, photos, read, run, write  # noqa: F401
from test_batch_options import FEW, SIZE, explain, small, tensor_of  # noqa: F401

from captum_fam import FeatureActivationMap, visualize_pair
from captum_fam.images import read_image

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from captum_fam import batch  # noqa: E402  # after the skip
from captum_fam.batch import _pairs  # noqa: E402

MIXED = [*FEW[:2], ("nope.jpg", NAMES[0]), FEW[2], (NAMES[0], None)]


# As arrays


def pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).astype(int)


def test_the_figure_of_a_stored_pair_is_that_of_a_fresh_one(photos, small, in_process):
    """Its arrays to float16's 11 bits of their largest value, its pixels to a step of the colour scale."""
    explain(FEW, photos, sides="both")
    pair = batch.read_maps("out")[1]
    encoder = small.small().eval()
    fam = FeatureActivationMap(encoder, encoder[3])
    fresh = fam.attribute_pair(tensor_of(photos / FEW[1][0]), tensor_of(photos / FEW[1][1]))
    images = [read_image(photos / name) for name in FEW[1]]
    for stored, values in zip((pair.map, pair.reference_map), fresh):
        values = values[0, 0].numpy()
        assert stored.dtype == np.float32
        np.testing.assert_allclose(stored, values, rtol=0, atol=2**-11 * np.abs(values).max())
    figures = [
        pixels(visualize_pair(*pictures, *maps, use_pyplot=False)[0])
        for pictures, maps in ((pair.images(), (pair.map, pair.reference_map)), (images, fresh))
    ]
    difference = np.abs(figures[0] - figures[1])
    assert difference.max() <= 12
    assert difference.mean() < 0.05
    other = batch.read_maps("out")[0]
    turned = visualize_pair(*images, other.map, other.reference_map, use_pyplot=False)[0]
    assert np.abs(pixels(turned) - figures[1]).mean() > 1
    assert pair.score == pytest.approx(
        torch.cosine_similarity(*(encoder(tensor_of(photos / name)) for name in FEW[1])).item()
    )


@pytest.mark.parametrize("part_size", [1, 2, 3, 512])
def test_rows_come_in_the_order_of_the_list_by_number_slice_or_one_by_one(photos, small, in_process, part_size):
    explain(MIXED, photos, sides="both", part_size=part_size)
    maps, rows = batch.read_maps("out"), read("out")
    assert (len(maps), maps.layer, maps.job["similarity"]) == (5, "3", "cosine")
    for number in (0, 3, 1, -1, -4):  # back and forth between parts
        pair, row = maps[number], rows[number]
        assert (pair.id, pair.query, pair.reference) == (row["id"], row["query"], row["reference"])
    assert [pair.id for pair in maps] == [pair.id for pair in maps[:]] == list(range(5))
    assert [pair.id for pair in maps[3:0:-2]] == [3, 1]
    for pair, row in zip(maps, rows):
        assert (pair.score, pair.failure, pair.error) == (row["score"], row["failure"], row["error"])
        assert (pair.map is None) == (pair.reference_map is None) == (pair.error is not None)
    assert repr(maps) == "StoredPairs(5 pairs of out)"
    assert "array" in repr(maps[0])
    with pytest.raises(IndexError):
        maps[5]


def test_values_come_with_their_scale_and_a_side_that_was_not_asked_for_is_none(photos, small, in_process):
    explain(FEW, photos, sides="reference", similarity="dot", threshold=1e6)
    pair, [row, *_] = batch.read_maps(Path("out"))[0], read("out")
    assert row["reference_scale"] > 1
    assert pair.map is None
    expected = np.array(row["reference_map"], np.float64).reshape(row["reference_shape"]) * row["reference_scale"]
    np.testing.assert_array_equal(pair.reference_map, expected.astype(np.float32))


def test_images_are_found_from_anywhere_or_it_is_said_why_not(photos, small, in_process, monkeypatch, tmp_path):
    explain(MIXED, photos, root=Path(shutil.copytree(photos, "photos")))
    out = Path("out").resolve()
    monkeypatch.chdir("/")
    maps = batch.read_maps(out)
    assert [image.size for image in maps[0].images()] == [(96, 80)] * 2
    with pytest.raises(ValueError, match="there is no image"):
        maps[2].images()
    with pytest.raises(ValueError, match="this pair has no images: there is no path in the column 'reference'"):
        maps[4].images()
    monkeypatch.chdir(tmp_path)
    np.save("index.npy", np.ones((1, 5)))
    explain([(NAMES[0], "0")], photos, "embedded", reference_embeddings="index.npy")
    with pytest.raises(ValueError, match="were embeddings"):
        batch.read_maps("embedded")[0].images()


def test_of_a_job_that_is_not_finished_there_is_a_warning_and_what_there_is(photos, small, in_process):
    explain(MIXED, photos, part_size=2)
    Path("out/part-000000.parquet").unlink()
    with pytest.warns(UserWarning, match="out is not finished: it has 3 of 5 pairs") as warned:
        maps = batch.read_maps("out")
    assert warned[0].filename == __file__
    assert [pair.id for pair in maps] == [2, 3, 4]
    for part in Path("out").glob("*.parquet"):
        part.unlink()
    with pytest.raises(ValueError, match="the job in out has no maps yet"):
        batch.read_maps("out")


def test_a_part_that_is_damaged_is_named_and_not_read(photos, small, in_process):
    explain(MIXED, photos, part_size=2)
    part = Path("out/part-000001.parquet")
    content = bytearray(part.read_bytes())
    content[len(content) // 3] ^= 1
    part.write_bytes(content)
    maps = batch.read_maps("out")
    assert maps[0].id == 0
    with pytest.raises(ValueError, match=r"part-000001.parquet is not as this job wrote it"):
        maps[2]
    part.unlink()
    with pytest.raises(ValueError, match=r"part-000001.parquet is no longer there"):
        maps[3]


@pytest.mark.parametrize("kind", ["nothing", "empty", "others", "an older version", "a file"])
def test_a_folder_of_no_job_is_named(tmp_path, kind):
    folder = tmp_path / "out"
    if kind == "a file":
        folder.touch()
    elif kind != "nothing":
        folder.mkdir()
        if kind == "others":
            pq.write_table(pa.table({"query": ["a"]}), folder / "part-000000.parquet")
        elif kind == "an older version":
            (folder / "_batch.json").write_text('{"job": {}, "pairs": 3}')
    with pytest.raises(ValueError, match="out is no folder that this version's captum-fam batch or explain_pairs"):
        batch.read_maps(folder)


# What failed


def test_errors_are_listed_in_a_file_and_counted_by_kind(photos, small, run):
    pairs = write(Path("pairs.parquet"), [*MIXED, ("broken.jpg", NAMES[0]), ("nope.jpg", NAMES[1])], list("abcdefg"))
    arguments = (pairs, "-o", "out", "--root", photos, "--encoder", "batch_small:small", "--size", SIZE)
    status, out, err = run(*arguments, "--part-size", 2, "--errors", "errors.csv")
    assert (status, err) == (1, "")
    assert "explained 3 pairs, 4 failed (2 no such file, 1 no path, 1 cannot be read); the first: there is no" in out
    with Path("errors.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["query"], row["reference"], row["failure"]) for row in rows] == [
        ("c", "nope.jpg", NAMES[0], "no such file"),
        ("e", NAMES[0], "", "no path"),
        ("f", "broken.jpg", NAMES[0], "cannot be read"),
        ("g", "nope.jpg", NAMES[1], "no such file"),
    ]
    assert [row["error"] for row in rows] == [row["error"] for row in read("out") if row["error"]]
    run(*arguments, "--part-size", 2, "--errors", "again.csv")  # of a job that is finished, too
    assert Path("again.csv").read_bytes() == Path("errors.csv").read_bytes()


def test_the_list_of_errors_is_written_where_all_failed_and_where_none_did(photos, small, run):
    for name, pairs, expected in (("all", [("nope.jpg", NAMES[0])], 2), ("none", FEW, 0)):
        file = write(Path(f"{name}.csv"), pairs)
        arguments = ("--root", photos, "--encoder", "batch_small:small", "--size", SIZE, "--errors", "errors.csv")
        status, _, err = run(file, "-o", name, *arguments)
        assert status == expected
        assert len(Path("errors.csv").read_text().splitlines()) == (2 if expected else 1)
    assert err == ""


BAD = {
    "a file for the folder": (["-o", "out.csv"], "-o out.csv is named as a file: pass a folder, such as -o out;"),
    "a table for the folder": (["-o", "maps.PARQUET"], "such as -o maps;"),
    "errors as JSON": (["-o", "out", "--errors", "errors.json"], "name a file that ends in .csv"),
    "errors in no folder": (["-o", "out", "--errors", "no/errors.csv"], "in a folder that exists, with --errors"),
    "errors over the list": (["-o", "out", "--errors", "./pairs.csv"], "it lists the pairs; name another file"),
}


@pytest.mark.parametrize(("arguments", "advice"), BAD.values(), ids=BAD)
def test_a_file_that_would_not_be_what_one_expects_is_refused(photos, small, run, arguments, advice):
    pairs = write(Path("pairs.csv"), FEW)
    before = pairs.read_bytes()
    status, out, err = run(pairs, *arguments, "--root", photos)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert advice in err
    assert pairs.read_bytes() == before
    assert not Path("out.csv").exists()


def test_a_folder_may_have_a_dot_in_its_name_and_one_that_is_there_any(photos, small, in_process):
    assert explain(FEW, photos, "run.2026").explained == 3
    Path("out.csv").mkdir()
    assert explain(FEW, photos, "out.csv").explained == 3


# Lists as spreadsheets write them


SHEETS = {
    "semicolons": ("query;reference\na,1;b\n", [("a,1", "b")]),
    "semicolons, a byte order mark and CRLF": ("\ufeffid;query;reference\r\n7;a;b\r\n", [("a", "b")]),
    "tabs": ("query\treference\na;1\tb,2\n", [("a;1", "b,2")]),
    "semicolons and quotes": ('"query";"reference"\n"a;1";"b"\n', [("a;1", "b")]),
    "commas and a name with semicolons": ('query,reference,"x;y;z;w"\na,b,c\n', [("a", "b")]),
    "semicolons and a name with commas": ('"u,v,w,x";query;reference\n1;a;b\n', [("a", "b")]),
    "a path with semicolons below commas": ("query,reference\na;b;c,d\n", [("a;b;c", "d")]),
}


@pytest.mark.parametrize(("text", "rows"), SHEETS.values(), ids=SHEETS)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".CSV"])
def test_the_header_says_what_separates_columns(tmp_path, suffix, text, rows):
    file = tmp_path / f"pairs{suffix}"
    file.write_text(text, encoding="utf-8", newline="")
    table = pa.concat_tables(_pairs._read_pairs(file))
    assert list(zip(table["query"].to_pylist(), table["reference"].to_pylist())) == rows


def test_columns_that_are_missing_are_named_as_they_are(tmp_path):
    (tmp_path / "pairs.csv").write_text("query;hit\na;b\n")
    with pytest.raises(ValueError, match="one column 'reference', but its columns are query, hit"):
        list(_pairs._read_pairs(tmp_path / "pairs.csv"))
