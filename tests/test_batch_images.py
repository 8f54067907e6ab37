"""The batch job on a folder, a pattern or images by name: all pairs, or each image with its nearest neighbours."""

# ruff: noqa: F811  # fixtures of other tests

import os
import shutil
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_batch import NAMES, contents, in_process, photos, read, run, stamps  # noqa: F401
from test_batch_options import SIZE, close, small, tensor_of, the_map  # noqa: F401
from test_cli_outside import damaged

from captum_fam import FeatureActivationMap

pa = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
from captum_fam import batch  # noqa: E402  # after the skip
from captum_fam.batch import _images  # noqa: E402

ENCODER = {"encoder": "batch_small:small", "size": SIZE}
COMMAND = ("--encoder", "batch_small:small", "--size", SIZE)


@pytest.fixture
def album(photos, small):
    """Five photographs, one in a folder of the folder, and what is none of them."""
    folder = Path("album")
    (folder / "sub").mkdir(parents=True)
    for name in NAMES:
        shutil.copy(photos / name, folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_bytes((photos / NAMES[0]).read_bytes())
    (folder / ".thumbnails").mkdir()
    shutil.copy(photos / NAMES[0], folder / ".thumbnails" / "small.jpg")
    (folder / "folder.jpg").mkdir()
    return folder


def pairs_of(folder):
    return [(row["query"], row["reference"]) for row in read(folder)]


PATHS = [f"album/{name}" for name in NAMES]


def test_a_folder_is_all_pairs_of_its_images_in_both_orders_or_once_for_both_sides(album, in_process):
    found = batch.explain_pairs(album, Path("out"), **ENCODER)
    assert (found.explained, found.failed) == (20, 0)
    assert pairs_of("out") == list(permutations(PATHS, 2))
    assert batch.explain_pairs("album", "both", sides="both", **ENCODER).explained == 10
    assert pairs_of("both") == list(combinations(PATHS, 2))
    rows = dict(zip(pairs_of("out"), read("out")))
    for row in read("both"):
        query, reference = row["query"], row["reference"]
        np.testing.assert_allclose(the_map(row), the_map(rows[query, reference]), rtol=2**-10, atol=1e-6)
        np.testing.assert_allclose(the_map(row, "reference_"), the_map(rows[reference, query]), rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["album/*.jpg"], PATHS[:4]),  # in quotes, so the shell has left it
        (["album/**/*.png", "album/c*.jpg"], [PATHS[4], *PATHS[1:3]]),
        (PATHS[:3], PATHS[:3]),  # the shell has put names in its place
        ([PATHS[1], "album/sub", PATHS[1]], [PATHS[1], PATHS[4]]),
    ],
    ids=["a pattern", "patterns", "names", "names and folders"],
)
def test_patterns_and_names_are_images_too(album, run, given, names):
    status, out, err = run(*given, "-o", "out", *COMMAND)
    assert (status, err) == (0, "")
    assert pairs_of("out") == list(permutations(names, 2))
    assert f"explained {len(names) * (len(names) - 1)} pairs, 0 failed\n" in out


def test_a_folder_whose_name_has_brackets_is_no_pattern(album, in_process):
    album.rename("album [2026]")
    batch.explain_pairs("album [2026]", "out", **ENCODER)
    assert pairs_of("out")[0] == ("album [2026]/astronaut.jpg", "album [2026]/cat.jpg")


@pytest.mark.parametrize(
    ("root", "first"),
    [("album", "astronaut.jpg"), (".", "album/astronaut.jpg"), ("album/sub", "{cwd}/album/astronaut.jpg")],
)
def test_images_in_the_root_have_paths_from_there(album, in_process, root, first):
    """So the rows can be read wherever the folder lies, and with any root they are the same images."""
    found = batch.explain_pairs("album", "out", root=root, **ENCODER)
    assert found.failed == 0
    assert pairs_of("out")[0][0] == first.format(cwd=Path.cwd())


def brute_force(encoder, similarity, names):
    """The others in the order of their similarity, one by one, in NumPy."""
    z = {name: encoder(tensor_of(name))[0].detach().numpy() for name in names}

    def score(a, b):
        if similarity == "euclidean":
            return -np.sum((a - b) ** 2)
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b) if similarity == "cosine" else 1)

    return {q: sorted((n for n in names if n != q), key=lambda n: -score(z[q], z[n])) for q in names}


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("at_once", [2, 256])
def test_neighbours_are_the_most_similar_others_best_first(album, small, run, monkeypatch, similarity, at_once):
    monkeypatch.setattr(_images, "_ROWS", at_once)
    status, _, err = run("album", "-o", "out", "--neighbours", 2, "--similarity", similarity, *COMMAND)
    assert (status, err) == (0, "")
    encoder = small.small().eval()
    expected = brute_force(encoder, similarity, PATHS)
    assert pairs_of("out") == [(q, n) for q in PATHS for n in expected[q][:2]]
    rows = read("out")
    assert all(a["score"] >= b["score"] for a, b in zip(rows[::2], rows[1::2]))
    query, reference = (tensor_of(rows[0][side]) for side in ("query", "reference"))
    fam = FeatureActivationMap(encoder, encoder[3], similarity=similarity)
    close(the_map(rows[0]), fam.attribute(query, reference=reference)[0, 0])


def test_more_neighbours_than_there_are_others_are_all_of_them(album, in_process):
    assert batch.explain_pairs(album, Path("out"), neighbours=99, **ENCODER).explained == 20


def test_an_image_without_neighbours_has_a_row_with_its_error(album, small, in_process):
    (album / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    found = batch.explain_pairs(album, Path("out"), neighbours=1, **ENCODER)
    assert (found.explained, found.failures) == (5, {"cannot be read": 1})
    assert [row["query"] for row in read("out") if row["error"]] == ["album/broken.jpg"]
    assert not any("broken" in reference for query, reference in pairs_of("out") if query != reference)


def test_images_whose_embedding_is_zero_or_not_finite_have_none_and_are_none(small):
    z = {"a": torch.tensor([1.0, 0.0]), "zero": torch.zeros(2), "b": torch.tensor([1.0, 0.1])}
    z |= {"nan": torch.tensor([torch.nan, 1.0])}
    [table] = _images.nearest(["a", "zero", "b", "nan", "lost"], z, "dot", 5)
    assert table.to_pydict() == {
        "query": ["a", "zero", "b", "nan", "lost"],
        "reference": ["b", "zero", "a", "nan", "lost"],
    }
    [table] = _images.nearest(["a", "lost"], {"a": z["a"]}, "cosine", 5)
    assert table.to_pydict() == {"query": ["a", "lost"], "reference": ["a", "lost"]}


def test_near_distances_are_told_apart_far_from_the_origin():
    """By a product of float32, whose squares are lost here, they would not be."""
    z = {name: torch.tensor([4096.0, x]) for name, x in {"a": 0.0, "b": 0.03, "c": 0.01, "d": 0.02}.items()}
    [table] = _images.nearest(list(z), z, "euclidean", 3)
    assert table["reference"].to_pylist()[:3] == ["c", "d", "b"]


def test_started_again_a_folder_is_not_embedded_anew_and_other_images_are_another_job(
    album, small, in_process, monkeypatch
):
    options = {"neighbours": 2, "part_size": 3, **ENCODER}
    batch.explain_pairs(album, Path("out"), **options)
    before = contents(Path("out"))
    (Path("out") / "part-000001.parquet").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(batch, "nearest", None)
        assert batch.explain_pairs(album, Path("out"), **options).explained == 10
    assert contents(Path("out")) == before
    for changed, named in (({"neighbours": 3}, r"neighbours \(2 then\)"), ({"neighbours": None}, "neighbours")):
        with pytest.raises(ValueError, match=f"holds a job of other {named}"):
            batch.explain_pairs(album, Path("out"), **options | changed)
    (album / NAMES[0]).rename(album / "new.jpg")
    with pytest.raises(ValueError, match="holds a job of other pairs: pass"):
        batch.explain_pairs(album, Path("out"), **options)
    assert stamps(Path("out")).keys() == before.keys()


BAD = {
    "one image": (["album/sub"], "a pair needs two images, but album/sub has 1"),
    "no image": (["empty"], "a pair needs two images, but empty has none"),
    "no match": (["album/*.gif"], "a pair needs two images, but album/*.gif has none"),
    "a list among images": (
        ["pairs.csv", "album"],
        "expected images, or one list of pairs alone, but got pairs.csv among 2",
    ),
    "an image alone": (["album/cat.jpg"], "or a folder of images"),
    "nothing there": (["albums"], "there is no file albums: check the path"),
    "embeddings": (["album", "--reference-embeddings", "z.npy"], "--reference-embeddings needs a list of pairs"),
}


@pytest.mark.parametrize(("arguments", "advice"), BAD.values(), ids=BAD)
def test_what_makes_no_pairs_is_one_line(album, run, arguments, advice):
    Path("empty").mkdir()
    Path("pairs.csv").write_text("query,reference\na,b\n")
    np.save("z.npy", np.ones((2, 5)))
    status, out, err = run(*arguments, "-o", "out", *COMMAND)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert advice in err
    assert not Path("out").exists()


@pytest.mark.parametrize("pairs", [[], [("a.jpg", "b.jpg")], {"query": ["a"], "reference": ["b"]}, 3], ids=str)
def test_pairs_in_python_are_paths(pairs):
    with pytest.raises(TypeError, match="Expected `pairs` to be the path of a list or a folder, or a list of paths"):
        batch.explain_pairs(pairs, "out")
    assert not Path("out").exists()


def test_a_warning_of_an_image_that_is_read_for_neighbours_and_for_maps_comes_once(album, run):
    damaged(album / "damaged.jpg")
    status, _, err = run("album", "-o", "out", "--neighbours", 1, *COMMAND)
    assert (status, err.count("\n"), "Corrupt EXIF data" in err) == (0, 1, True)


def test_more_pairs_than_anybody_wants_are_refused_with_a_way_out(album, in_process, monkeypatch):
    monkeypatch.setattr(_images, "MOST", 19)
    with pytest.raises(ValueError, match="5 images make 20 pairs: pass --neighbours K"):
        batch.explain_pairs(album, Path("out"), **ENCODER)
    assert batch.explain_pairs(album, Path("out"), sides="both", **ENCODER).explained == 10


@pytest.mark.skipif(os.name != "posix", reason="names of POSIX")
def test_a_name_that_is_no_utf8_is_named(album, in_process):
    shutil.copy(album / NAMES[0], os.path.join("album", os.fsdecode(b"\xff.jpg")))
    with pytest.raises(ValueError, match="is no UTF-8: rename it"):
        batch.explain_pairs(album, Path("out"), **ENCODER)


def test_every_kind_that_pillow_reads_is_an_image_and_heic_is_not_passed_over(album, in_process):
    for suffix in ("webp", "TIFF", "bmp"):
        Image.new("RGB", (8, 8), (9, 99, 199)).save(album / f"more.{suffix}")
    (album / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    found = batch.explain_pairs(album, Path("out"), neighbours=1, **ENCODER)
    assert (found.explained, found.failures) == (8, {"cannot be read": 1})
    assert "pip install pillow-heif" in found.error
