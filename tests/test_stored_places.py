"""Places of a query in many stored images, against the matches that a figure would draw of each whole matrix."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoders import HeadEncoder, PooledEncoder, random, seeded
from helpers import close, silent
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from captum_fam import (
    CorrespondenceMap,
    FeatureActivationMap,
    IntegratedDecomposition,
    SimilarityDecomposition,
    match_places,
    place_vectors,
    store_places,
)
from captum_fam.matches import strongest_matches
from captum_fam.tasks import stored_places

X, R = random(4, 3, 8, 8), random(4, 3, 12, 8, seed=2)  # places of 4 x 4 and 6 x 4
QUERY, STORED = random(3, 4, 6, seed=3), random(7, 2, 5, 6, seed=4)


def of(build, method, *args, **options):
    encoder = seeded(build)
    return method(encoder, encoder.layer, *args, **options)


METHODS = {
    "cosines of places": lambda: of(PooledEncoder, CorrespondenceMap),
    "parts of a mean": lambda: of(PooledEncoder, SimilarityDecomposition),
    "parts of a dot product": lambda: of(PooledEncoder, SimilarityDecomposition, similarity="dot"),
    "a gradient": lambda: of(HeadEncoder, SimilarityDecomposition),
    "a path": lambda: of(HeadEncoder, SimilarityDecomposition, n_steps=3),
    "an early layer": lambda: IntegratedDecomposition(seeded(PooledEncoder), None, n_steps=3),
}


def matrices(query, stored):
    """The products of all places, by NumPy, (G, h, w, h', w')."""
    return np.einsum("abc,guvc->gabuv", np.asarray(query, np.float64), np.asarray(stored, np.float64))


def check(found, query, stored, n):
    """That the result is what the whole matrices say."""
    products = matrices(query, stored)
    best = products.max((3, 4))
    close(found.scores, best.mean((1, 2)), check_dtype=False)
    for k, matrix in enumerate(products):
        expected = strongest_matches(torch.from_numpy(matrix), n)
        lacks = n - len(expected)
        assert found.places[k].tolist() == [[*pair] for pair in expected] + [[-1, -1]] * lacks
        flat = matrix.reshape(best[k].size, -1)
        close(found.values[k], [flat[pair] for pair in expected] + [0.0] * lacks)
    return best


# Matches


def test_matches_of_two_grids_by_hand():
    query = torch.tensor([[[1.0, 0], [0, 1], [-1, 0]]])
    stored = torch.tensor([[[[0.0, 2], [0, 0], [3, 0]]], [[[0, -1], [0, -1], [0, -1]]], [[[4, 5], [0, 0], [0, 0]]]])
    found = match_places(query, stored, n=2, return_maps=True)
    close(found.maps, torch.tensor([[[3.0, 2, 0]], [[0, -1, 0]], [[4, 5, 0]]]))
    close(found.scores, torch.tensor([5.0, -1, 9]) / 3)
    close(found.values, torch.tensor([[3.0, 0], [0, 0], [5, 0]]))  # 2 is mutual, and touches 3 in the query
    assert found.places.tolist() == [[[0, 2], [-1, -1]], [[-1, -1]] * 2, [[1, 0], [-1, -1]]]
    assert list(found.ids) == [0, 1, 2]
    assert repr(found) == "PlaceMatches(images=3, n=2)"


sides = st.integers(1, 5)


@given(sides, sides, sides, sides, st.integers(1, 4), st.integers(1, 9), st.integers(0, 99), st.integers(1, 400))
def test_they_are_those_of_the_figure_of_each_matrix_however_many_are_read_at_once(h, w, h2, w2, C, n, seed, at_once):
    query, stored = random(h, w, C, seed=seed), random(5, h2, w2, C, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_places, "_READ_AT_ONCE", at_once)
        patch.setattr(stored_places, "_AT_ONCE", max(1, at_once // 3))
        found = match_places(query, stored, n, return_maps=True)
    close(found.maps, check(found, query, stored, n))


@given(st.lists(st.integers(-2, 2), min_size=36, max_size=36), st.lists(st.integers(-2, 2), min_size=36, max_size=36))
def test_of_equal_values_each_match_is_mutual_and_none_touch(one, two):
    query, stored = torch.tensor(one).reshape(3, 4, 3).double(), torch.tensor(two).reshape(1, 4, 3, 3).double()
    (matrix,) = matrices(query, stored).reshape(1, 12, 12)
    found = match_places(query, stored, n=12)
    pairs = [pair for pair in found.places[0].tolist() if pair[0] >= 0]
    assert bool(pairs) == (matrix.max() > 0)
    for k, (i, j) in enumerate(pairs):
        assert matrix[i, j] == matrix[i].max() == matrix[:, j].max() == found.values[0, k] > 0
        for a, b in pairs[:k]:
            assert max(abs(i // 4 - a // 4), abs(i % 4 - a % 4)) > 1
            assert max(abs(j // 3 - b // 3), abs(j % 3 - b % 3)) > 1
    assert (found.values[0].diff() <= 0).all()


@pytest.mark.filterwarnings("ignore:The places of layer")
@pytest.mark.parametrize("name", METHODS)
def test_products_of_place_vectors_are_the_matrix_of_the_method(name):
    method = METHODS[name]()
    one, two = place_vectors(method, X), place_vectors(method, R)
    h, w = one.shape[1:3]
    assert two.shape[1:] == (h * 3 // 2, w, one.shape[3])
    expected = method.attribute_matrix(X, R)
    close(one.flatten(1, 2) @ two.flatten(1, 2).mT, expected, 1e-7, 1e-9)
    found = match_places(one[:1], two[:1], n=3)
    assert [tuple(p) for p in found.places[0].tolist() if p[0] >= 0] == strongest_matches(
        expected[0].reshape(h, w, *two.shape[1:3]), 3
    )


def test_the_map_of_an_image_is_that_of_the_correspondence():
    method = METHODS["cosines of places"]()
    found = match_places(place_vectors(method, X[:1]), place_vectors(method, R), return_maps=True)
    close(found.maps, method.attribute_all(X[:1], reference=R)[0])


def test_half_precision_is_multiplied_in_single():
    query, stored = QUERY.half(), STORED.half()
    found = match_places(query, stored)
    assert found.values.dtype == found.scores.dtype == torch.float32
    close(found.scores, matrices(query, stored).max((3, 4)).mean((1, 2)), 1e-5, 1e-6, check_dtype=False)
    assert match_places(QUERY, stored).values.dtype == torch.float64


def test_images_that_are_not_finite_match_nothing():
    stored = STORED.clone()
    stored[1, 0, 0, 0], stored[3, 1, 4, 2], stored[6, 0, 1, 1] = torch.nan, torch.inf, -torch.inf
    with pytest.warns(UserWarning, match=re.escape("Stored places are not finite ([1, 3, 6])")):
        found = match_places(QUERY, stored, return_maps=True)
    plain = match_places(QUERY, STORED, return_maps=True)
    bad = torch.tensor([1, 3, 6])
    for some, all_of in zip(found[1:], plain[1:]):
        close(some[[0, 2, 4, 5]], all_of[[0, 2, 4, 5]])
        assert (some[bad] == (-1 if some is found.places else 0)).all()
    with pytest.warns(UserWarning, match=re.escape("([0, 1, 2, 3, 4, ...])")):
        match_places(QUERY, torch.full_like(STORED, torch.nan))


# Forms


def table(vectors, kind):
    """A Parquet table's column of these vectors (G, h, w, C)."""
    flat = pa.array(vectors.reshape(-1), {"f2": pa.float16(), "f8": pa.float64()}[vectors.dtype.str[1:]])
    size = vectors[0].size
    if kind == "tensors":
        return pa.FixedShapeTensorArray.from_numpy_ndarray(vectors)
    if kind == "lists":
        return pa.ListArray.from_arrays(pa.array(range(0, vectors.size + 1, size), pa.int32()), flat)
    return pa.FixedSizeListArray.from_arrays(flat, size)


class Sliced:
    """What has a shape and a dtype, and gives arrays, as h5py and zarr do."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        return self.array[rows]


def saved(folder, array):
    np.save(folder / "places.npy", array)
    return folder / "places.npy"


ARRAYS = {
    "a tensor": lambda folder, a: torch.from_numpy(a),
    "an array": lambda folder, a: a,
    "a file": saved,
    "its name": lambda folder, a: str(saved(folder, a)),
    "a memory map": lambda folder, a: np.load(saved(folder, a), mmap_mode="r"),
    "a part of one": lambda folder, a: np.load(saved(folder, np.concatenate([a, a])), mmap_mode="r")[: len(a)],
    "Fortran's order": lambda folder, a: np.asfortranarray(a),
    "a view from the end": lambda folder, a: a[::-1].copy()[::-1],
    "other bytes first": lambda folder, a: a.astype(a.dtype.newbyteorder()),
    "what gives arrays": lambda folder, a: Sliced(a),
}


@pytest.mark.parametrize("at_once", [70, 2**24])
@pytest.mark.parametrize("form", ARRAYS)
def test_stored_places_come_in_many_forms(form, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_places, "_READ_AT_ONCE", at_once)
    with silent():
        found = match_places(QUERY.numpy(), ARRAYS[form](tmp_path, STORED.numpy()), 3)
    check(found, QUERY, STORED, 3)
    assert list(found.ids) == list(range(7))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("kind", ["lists", "fixed lists", "tensors"])
@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_so_they_do_in_parquet_with_ids(kind, dtype, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_places, "_READ_AT_ONCE", 500)
    stored = random(7, 3, 3, 6, seed=4).numpy().astype(dtype)
    ids = [f"{name}.jpg" for name in "abcdefg"]
    for name, rows in {"2": slice(4, None), "1": slice(4)}.items():
        columns = {"id": ids[rows], "places": table(stored[rows], kind), "more": [0] * len(ids[rows])}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet", row_group_size=3)
    found = match_places(QUERY, tmp_path if folder else tmp_path / "1.parquet", 3)
    count = 7 if folder else 4
    assert found.ids == ids[:count]
    check(found, QUERY, stored[:count], 3)


def test_lists_of_other_grids_need_their_shape(tmp_path):
    pq.write_table(pa.table({"id": range(7), "places": table(STORED.numpy(), "tensors")}), tmp_path / "a.parquet")
    check(match_places(QUERY, tmp_path / "a.parquet", 3), QUERY, STORED, 3)
    pq.write_table(pa.table({"id": range(7), "places": table(STORED.numpy(), "lists")}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=re.escape("of each image of `stored`, or (N, C) of a square grid")):
        match_places(QUERY, tmp_path / "b.parquet")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="says what of a file is in memory: Linux")
def test_what_was_read_of_a_memory_map_is_given_back(tmp_path):
    stored = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.float16, (64, 16, 16, 64))
    stored[:] = 1
    match_places(torch.ones(2, 2, 64), stored)
    (entry,) = re.findall(r"large\.npy\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    assert int(entry) < 100  # of 2 MB
    assert (stored == 1).all()


def test_what_the_caller_changed_in_a_copy_stays(tmp_path):
    mine = np.load(saved(tmp_path, STORED.numpy()), mmap_mode="c")
    mine[2] = 0
    match_places(QUERY, mine)
    assert not mine[2].any()
    match_places(QUERY, np.asarray(mine)[:4])
    assert not mine[2].any()


# Stores


def batches(form):
    return {
        "a batch": X,
        "batches": iter(X.split(3)),
        "batches with labels": [[X[:3], torch.zeros(3)], [X[3:], torch.zeros(1)]],
        "a loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.zeros(4)), 3),
    }[form]


@pytest.mark.parametrize("form", ["a batch", "batches", "batches with labels", "a loader"])
def test_a_store_has_the_vectors_of_all_batches(form, tmp_path):
    method = METHODS["cosines of places"]()
    stored = store_places(tmp_path / "a.npy", batches(form), method)
    expected = place_vectors(method, X)
    assert isinstance(stored, np.memmap)
    close(torch.from_numpy(np.array(stored)), expected.half(), 0, 0)
    close(torch.from_numpy(np.load(tmp_path / "a.npy")), expected.half(), 0, 0)
    query = place_vectors(method, R[:1])
    close(match_places(query, stored).scores, match_places(query, expected).scores, 1e-3, 1e-3)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.filterwarnings("ignore:The places of layer")
def test_a_store_in_single_precision(tmp_path):
    method = METHODS["a gradient"]()
    stored = store_places(str(tmp_path / "a.npy"), X, method, dtype=torch.float32)
    close(torch.from_numpy(np.array(stored)), place_vectors(method, X).float(), 0, 0)


def test_a_store_is_written_whole_or_not_at_all(tmp_path):
    method, file = METHODS["cosines of places"](), tmp_path / "a.npy"
    before = np.array(store_places(file, X[:2], method))

    def interrupted():
        yield X
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_places(file, interrupted(), method)
    assert (np.load(file) == before).all()
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]


class FirstPixels(nn.Module):
    """Places are pixels; the embedding is their mean."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        return self.layer(x).flatten(2).mean(2)


@pytest.mark.parametrize("method", [CorrespondenceMap, SimilarityDecomposition])
def test_an_input_that_is_not_finite_has_zeros_and_is_named_by_its_number_in_the_store(method, tmp_path):
    bad, explainer = X.clone(), of(FirstPixels, method)
    bad[2, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"not finite \(inputs \[2\]\)"):
        vectors = place_vectors(explainer, bad)
    assert not vectors[2].any()
    close(vectors[[0, 1, 3]], place_vectors(explainer, X[[0, 1, 3]]))
    with pytest.warns(UserWarning, match=r"not finite \(inputs \[6\]\)"):
        stored = store_places(tmp_path / "a.npy", [X, bad], explainer)
    assert [row for row in range(8) if not stored[row].any()] == [6]


def test_places_that_do_not_add_up_are_told():
    encoder = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).double()
    with torch.no_grad():
        encoder[3].bias.fill_(9.0)
    with pytest.warns(UserWarning, match="do not add up to the similarity"):
        place_vectors(SimilarityDecomposition(encoder, encoder[0]), X)


# Errors


def nothing(folder):
    return torch.zeros(0, 2, 2, 6)


def wrong_columns(folder):
    pq.write_table(pa.table({"id": [1], "embedding": [[1.0]]}), folder / "a.parquet")
    return folder / "a.parquet"


def lists_of(*lists):
    def write(folder):
        pq.write_table(pa.table({"id": range(len(lists)), "places": lists}), folder / "a.parquet")
        return folder / "a.parquet"

    return write


STORED_MISTAKES = {
    "a list": (lambda folder: [1.0], TypeError, "Expected `stored` to be a file that ends in .npy or .parquet, or"),
    "embeddings": (lambda folder: torch.rand(7, 6), TypeError, "but got torch.float32 of shape (7, 6)"),
    "integers": (lambda folder: np.ones((7, 2, 2, 6), int), TypeError, "but got int64 of shape (7, 2, 2, 6)"),
    "another file": (lambda folder: folder / "a.pt", ValueError, "but got '"),
    "no images": (nothing, ValueError, "Expected `stored` to hold places of images, but it is empty."),
    "an empty folder": (lambda folder: folder, ValueError, "but it is empty"),
    "other channels": (lambda folder: torch.rand(7, 2, 2, 5), ValueError, "to be places of 6 values, as `query` has"),
    "tokens": (lambda folder: torch.rand(7, 5, 6), ValueError, "stored.reshape(-1, h, w, C)"),
    "other columns": (wrong_columns, ValueError, "to have one column 'id' and one 'places', but its columns are"),
    "lists of two lengths": (lists_of([1.0] * 6, [1.0] * 24), ValueError, "of lengths [6, 24]"),
    "lists with parts of places": (lists_of([1.0] * 7), ValueError, "6 for each place and all of one length"),
    "lists of integers": (lists_of([1] * 6), ValueError, "to hold lists of floats"),
    "a missing list": (lists_of([1.0] * 6, None), ValueError, "to hold lists of floats"),
    "numbers": (lists_of(1.0), ValueError, "but it holds double"),
}


@pytest.mark.parametrize("name", STORED_MISTAKES)
def test_other_stores_are_refused(name, tmp_path):
    make, error, text = STORED_MISTAKES[name]
    with pytest.raises(error, match=re.escape(text)):
        match_places(QUERY, make(tmp_path))


QUERY_MISTAKES = {
    "a list": ([1.0], TypeError, "Expected `query` to be a tensor or array (h, w, C) of floats, but got list."),
    "integers": (torch.ones(2, 2, 6, dtype=torch.long), TypeError, "but got a int64 tensor of shape (2, 2, 6)."),
    "nothing": (torch.ones(0, 2, 6), TypeError, "Expected `query` to be a tensor or array (h, w, C) of floats"),
    "several": (torch.ones(3, 2, 2, 6), ValueError, "to be places of one image, but got those of 3; pass query[0]."),
    "tokens": (
        torch.ones(5, 6),
        ValueError,
        "that are no patches, and give the grid by query.reshape(",
    ),
    "an embedding": (torch.ones(6), ValueError, "Expected places (h, w, C) of each image of `query`"),
    "not finite": (torch.full((2, 2, 6), torch.nan), ValueError, "Expected `query` to be finite, but it is not;"),
}


@pytest.mark.parametrize("name", QUERY_MISTAKES)
def test_other_queries_are_refused(name):
    query, error, text = QUERY_MISTAKES[name]
    with pytest.raises(error, match=re.escape(text)):
        match_places(query, STORED)


def test_grids_of_a_store_are_one(tmp_path):
    for name, side in ("ab", 2), ("cd", 3):
        stored = random(2, side, side, 6).numpy()
        pq.write_table(pa.table({"id": list(name), "places": table(stored, "lists")}), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=re.escape("all on one grid, but got shape (9, 6)")):
        match_places(QUERY, tmp_path)


def test_the_number_of_matches_is_positive():
    with pytest.raises(ValueError, match="Expected `n` to be a positive int"):
        match_places(QUERY, STORED, 0)


def two_layers():
    encoder = seeded(PooledEncoder)
    return CorrespondenceMap(encoder, [encoder.early, encoder.layer])


METHOD_MISTAKES = {
    "another method": (lambda: of(PooledEncoder, FeatureActivationMap), TypeError, "whose attribute_matrix is a"),
    "two layers": (two_layers, ValueError, "place_vectors needs one layer with one tensor, but `method` has 2"),
    "a distance": (
        lambda: of(PooledEncoder, SimilarityDecomposition, similarity="euclidean"),
        ValueError,
        '"cosine" or "dot", but got \'euclidean\'',
    ),
    "weights": (
        lambda: of(PooledEncoder, SimilarityDecomposition, dimension_weights=lambda z, s: s),
        ValueError,
        "but got `dimension_weights`",
    ),
}


@pytest.mark.parametrize("name", METHOD_MISTAKES)
def test_other_methods_are_refused(name):
    make, error, text = METHOD_MISTAKES[name]
    with pytest.raises(error, match=re.escape(text)):
        place_vectors(make(), X)


LARGE = of(FirstPixels, SimilarityDecomposition, similarity="dot")
STORE_MISTAKES = {
    "another ending": ("a.npz", X, {}, "Expected `file` to end in .npy, but got '"),
    "another dtype": ("a.npy", X, {"dtype": torch.bfloat16}, "torch.float16 or torch.float32, but got torch.bfloat16"),
    "no batches": ("a.npy", [], {}, "Expected `images` to hold a batch of images, but it is empty."),
    "two sizes": ("a.npy", [X, R], {}, "with equally many places, but got (8, 8, 3) and (12, 8, 3)"),
    "too large": ("a.npy", X * 1e7, {}, "are too large for float16; pass dtype=torch.float32."),
}


@pytest.mark.parametrize("name", STORE_MISTAKES)
def test_other_stores_are_not_written(name, tmp_path):
    file, images, options, text = STORE_MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(text)):
        store_places(tmp_path / file, images, LARGE, **options)
    assert not [*tmp_path.iterdir()]
