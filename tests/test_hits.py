"""Hits of any search: the forms they come in, what is missing of them, and what is drawn."""

import dataclasses
import functools
import json
import pickle
import re

import helpers
import numpy as np
import pytest
import torch
from encoders import PooledEncoder, random, seeded
from torch import nn

from captum_fam import FeatureActivationMap, Hits, SimilarityDecomposition, explain_hits, explain_retrieval

ENCODER = seeded(PooledEncoder).float()
QUERY = random(2, 3, 8, 8, dtype=torch.float32).sigmoid()
PHOTOS = dict(zip("abcdef", random(6, 3, 8, 8, seed=4, dtype=torch.float32).sigmoid()))
IDS = [["c", "a", "f"], ["b", "c", "e"]]
IMAGES = torch.stack([torch.stack([PHOTOS[name] for name in row]) for row in IDS])
close = functools.partial(helpers.close, rtol=1e-5, atol=1e-6)


def embed(images):
    return ENCODER(images).detach()


VECTORS = embed(IMAGES.flatten(0, 1)).reshape(2, 3, -1)


def explain(hits, *args, query=QUERY, **options):
    return explain_hits(query, hits, ENCODER, ENCODER.layer, *args, **options)


class Pairs(torch.utils.data.Dataset):
    """A data set whose items begin with the image."""

    def __getitem__(self, name):
        return PHOTOS[name], 7


FORMS = {
    "images": (IMAGES,),
    "images in Hits": (Hits(images=IMAGES),),
    "ids": (Hits(ids=IDS), PHOTOS),
    "a data set": (Hits(ids=IDS), Pairs()),
    "embeddings and a gallery": (Hits(ids=IDS, embeddings=VECTORS), PHOTOS),
    "arrays": (Hits(ids=np.array(IDS).tolist(), embeddings=VECTORS.numpy()), PHOTOS),
    "scores": (Hits(ids=IDS, scores=[[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]], embeddings=VECTORS), PHOTOS),
}


@pytest.mark.filterwarnings("ignore:The similarities that are explained order")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_hits_is_explained_alike(form):
    found = explain(*FORMS[form])
    fam = FeatureActivationMap(ENCODER, ENCODER.layer)
    for b in range(2):
        close(found.maps[b], fam.attribute_all(QUERY[b : b + 1], reference_embedding=VECTORS[b])[0])
        close(found.hit_maps[b], fam.attribute(IMAGES[b], reference=QUERY[b : b + 1])[:, 0])
    close(found.similarities, torch.cosine_similarity(embed(QUERY)[:, None], VECTORS, dim=2))
    assert found.ids == ([[0, 1, 2]] * 2 if form.startswith("images") else IDS)


def test_images_of_the_hits_of_one_query():
    one = explain(IMAGES[0], query=QUERY[:1])
    close(one.maps, explain(IMAGES[:1], query=QUERY[:1]).maps)
    with pytest.raises(ValueError, match=r"for each of 2 queries, \(B, k, C, \*spatial\)"):
        explain(IMAGES[0])


def test_embeddings_alone_explain_the_query():
    found = explain(Hits(embeddings=VECTORS))
    close(found.maps, explain(IMAGES).maps)
    assert found.hit_maps is None
    with pytest.raises(ValueError, match="A page shows the images of the hits: pass them, or a `gallery`"):
        found.explore()
    assert len(found.visualize(use_pyplot=False).axes) == 3 * 2 + 1


def test_each_image_is_embedded_once_where_its_embedding_is_given():
    passes = []
    handle = ENCODER.register_forward_pre_hook(lambda m, args: passes.append(len(args[0])))
    try:
        explain(Hits(ids=IDS, embeddings=VECTORS), PHOTOS)
    finally:
        handle.remove()
    assert passes == [2, 3, 3]  # the queries, and the hits of each


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_the_sum_of_both_sides_is_the_similarity(similarity):
    found = explain(IMAGES, similarity=similarity, method=SimilarityDecomposition)
    z = embed(QUERY)[:, None].double()
    s = VECTORS.double()
    expected = {
        "cosine": torch.cosine_similarity(z, s, dim=2),
        "dot": (z * s).sum(2),
        "euclidean": -(z - s).square().sum(2),
    }[similarity]
    close(found.similarities.double(), expected)
    close(found.maps.double().mean((2, 3)) + found.constants, expected)
    back = -z.square().sum(2) if similarity == "euclidean" else 0
    close(found.hit_maps.double().mean((2, 3)) + back, expected)


def test_hits_that_were_not_found_have_nothing():
    ids = [["c", "a", None], [None, None, None]]
    s = VECTORS.clone()
    s[0, 2], s[1] = torch.nan, 0
    for hits in (Hits(ids=ids), Hits(ids=ids, embeddings=s)):
        with helpers.silent():
            found = explain(hits, PHOTOS, contrast="self")
        whole = explain(IMAGES, contrast="self")
        close(found.maps[0, :2], whole.maps[0, :2])
        close(found.hit_maps[0, :2], whole.hit_maps[0, :2])
        missing = torch.tensor([[False, False, True], [True] * 3])
        assert not found.maps[missing].any()
        assert not found.hit_maps[missing].any()
        assert (found.similarities[missing] == -torch.inf).all()
        assert not found.explainable[missing].any()
        assert not found.contrast(2, "self")[0].any()
        rest = explain(Hits(ids=[["c", "a"]]), PHOTOS, query=QUERY[:1]).contrast(0, 1)
        close(found.contrast(0, "rest")[:1], rest)  # the rest are those that are there
        with pytest.raises(ValueError, match="found nothing for query 1"):
            found.explore(1)
        with pytest.raises(ValueError, match="found nothing for query 1"):
            found.visualize(1)
        assert len(found.visualize(0, use_pyplot=False).axes) == 2 * 4 + 1


def test_hits_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Hits(ids=IDS).ids = []


def test_no_query_at_all():
    found = explain(Hits(embeddings=VECTORS[:0]), query=QUERY[:0])
    assert found.maps.shape[:2] == (0, 3)


def test_numbers_and_names():
    for ids in (
        [[5, None, 2]] * 2,
        [[5, -1, 2]] * 2,
        np.array([[5, -1, 2]] * 2),
        [[np.int64(5), None, torch.tensor(2)]] * 2,
    ):
        numbers = explain(Hits(ids=ids, embeddings=VECTORS))
        assert numbers.ids == [[5, None, 2]] * 2
        assert numbers.indices.tolist() == [[5, -1, 2]] * 2
        assert not numbers.maps[:, 1].any()
    with pytest.raises(ValueError, match="no numbers; take `ids`"):
        explain(Hits(ids=IDS, embeddings=VECTORS)).indices  # noqa: B018


@pytest.mark.parametrize(
    ("scores", "warned"), [("similarity", False), ("distance", False), ("others", True), ("worst first", True)]
)
def test_scores_of_another_order_are_told(scores, warned):
    similar = torch.cosine_similarity(embed(QUERY)[:, None], VECTORS, dim=2)
    order = similar.argsort(1, descending=scores != "worst first")  # as a search returns them
    s, similar = VECTORS.gather(1, order[..., None].expand_as(VECTORS)), similar.gather(1, order)
    given = {
        "similarity": similar,
        "distance": 1 - similar,
        "others": torch.tensor([[1.0, 3, 2], [3, 1, 2]]),
        "worst first": torch.tensor([[3.0, 2, 1]] * 2),
    }[scores]
    hits = Hits(ids=IDS, scores=given, embeddings=s)
    if warned:
        with pytest.warns(UserWarning, match="order the hits in another way than the scores"):
            found = explain(hits)
    else:
        with helpers.silent():
            found = explain(hits)
    close(found.scores, given)


def test_hits_that_are_listed_in_any_order_need_scores_of_that_order():
    similar = torch.cosine_similarity(embed(QUERY)[:, None], VECTORS, dim=2)
    for given in (similar, 2 - 2 * similar):
        with helpers.silent():
            explain(Hits(scores=given, embeddings=VECTORS))


def test_scores_that_are_alike_but_for_rounding_have_no_order():
    similar = torch.cosine_similarity(embed(QUERY)[:, None], VECTORS, dim=2)
    with helpers.silent():
        explain(Hits(scores=similar + 1e-5 * torch.tensor([1.0, -1, 1]), embeddings=VECTORS))


def test_images_of_other_embeddings_are_told():
    with pytest.warns(UserWarning, match=r"gallery's images \['a', 'c', 'f'\] are not those"):
        explain(Hits(ids=IDS[:1], embeddings=VECTORS[:1].flip(2)), PHOTOS, query=QUERY[:1])
    with helpers.silent():  # a cosine knows of no length
        explain(Hits(ids=IDS, embeddings=VECTORS * 7), PHOTOS)
    with pytest.warns(UserWarning, match="are not those"):
        explain(Hits(ids=IDS, embeddings=VECTORS * 7), PHOTOS, similarity="dot")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Hits(), ValueError, "at least one of `ids`, `scores`, `embeddings` and `images`"),
        (lambda: Hits(ids=["a", "b"]), ValueError, r"`ids` of hits to be a list for each query, \[\[id"),
        (lambda: Hits(ids=[["a", "b"], ["c"]]), ValueError, r"equally many for each query, but got \[1, 2\]"),
        (lambda: Hits(scores=torch.ones(3)), ValueError, r"`scores` of hits to be \(B, k\)"),
        (lambda: Hits(embeddings=torch.ones(3, 4)), ValueError, r"`embeddings` of hits to be \(B, k, D\)"),
        (lambda: Hits(embeddings=torch.ones(1, 3, 4, dtype=torch.long)), ValueError, "floating point"),
        (lambda: Hits(images=torch.ones(3, 8, 8)), ValueError, r"`images` of hits to be \(B, k, C"),
        (lambda: Hits(ids=IDS, embeddings=VECTORS[:, :2]), ValueError, r"same B queries.*'embeddings': \(2, 2\)"),
        (lambda: explain(Hits(ids=IDS)), ValueError, "images or embeddings of the hits: pass a `gallery`"),
        (lambda: explain(Hits(ids=IDS[:1]), PHOTOS), ValueError, "each of the 2 queries, but got those of 1"),
        (lambda: explain(IDS), TypeError, "`hits` to be Hits, or images"),
        (lambda: explain(VECTORS), TypeError, r"embeddings go in as Hits\(embeddings=...\)"),
        (lambda: explain(Hits(ids=[["z"]] * 2), PHOTOS), ValueError, r"gallery\['z'\], but that failed: KeyError"),
        (lambda: explain(Hits(ids=IDS), dict.fromkeys("abcdef", "x.jpg")), TypeError, "apply the encoder's transform"),
        (
            lambda: explain(Hits(ids=IDS, images=IMAGES), PHOTOS),
            ValueError,
            "ids and without images, but got hits with images",
        ),
        (lambda: explain(Hits(scores=VECTORS[..., 0]), PHOTOS), ValueError, r"without ids; pass Hits\(ids=...\)"),
        (lambda: explain(Hits(ids=IDS), {n: x[None] for n, x in PHOTOS.items()}), TypeError, "leave out its batch dim"),
        (lambda: explain(IMAGES, contrast=3), ValueError, "`contrast` to be a rank from 0 to 2, but got 3"),
        (lambda: explain(IMAGES, contrast="best"), ValueError, "`contrast` to be a rank from 0 to 2, but got 'best'"),
        (
            lambda: explain(IMAGES, contrast="self", threshold=0.5),
            ValueError,
            "`contrast` or `threshold`, but got",
        ),
        (lambda: explain(IMAGES, contrast="self", similarity="euclidean"), ValueError, 'for "euclidean" that is 0'),
        (lambda: explain(IMAGES, threshold="high"), TypeError, "`threshold` to be a number"),
        (lambda: explain(IMAGES, internal_batch_size=0), ValueError, "internal_batch_size"),
        (lambda: explain(IMAGES).contrast(5), ValueError, "`rank` to be a rank from 0 to 2"),
        (lambda: explain(IMAGES).contrast(0, 1, threshold=0.5), ValueError, "`other` or `threshold`"),
        (lambda: explain(IMAGES[:, :1]).contrast(), ValueError, "at least two hits"),
        (lambda: explain(IMAGES, query=QUERY[0]), TypeError, r"Hits, or images"),
    ],
)
def test_what_cannot_work_is_refused_with_advice(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_signals_and_volumes():
    for layer, shape in ((nn.Conv1d(3, 4, 3), (3, 20)), (nn.Conv3d(3, 4, 3), (3, 6, 7, 8))):
        encoder = nn.Sequential(layer, nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        query, hits = torch.rand(2, *shape), torch.rand(2, 3, *shape)
        found = explain_hits(query, hits, encoder, layer, method="SimilarityDecomposition")
        close(found.maps.flatten(2).mean(2), found.similarities)
        assert found.maps.shape == (2, 3, *(n - 2 for n in shape[1:]))


def test_a_page_and_a_figure_say_what_was_found():
    found = explain(Hits(ids=IDS, embeddings=VECTORS), PHOTOS)
    (data,) = re.findall(r'id="data">(.*?)</script>', found.explore(1).html, re.S)
    assert [one["name"] for one in json.loads(data)["references"]] == ["1: image b", "2: image c", "3: image e"]
    close(found.contrast(np.int64(1), np.int64(0)), found.contrast(1, 0))
    texts = [axis.get_xlabel() for axis in found.visualize(1, use_pyplot=False).axes]
    for rank, name in enumerate("bce"):
        assert any(f"{rank + 1}: image {name}" in t and f"{found.similarities[1, rank]:.4g}" in t for t in texts)
    copied = pickle.loads(pickle.dumps(found))
    close(copied.hit_maps, found.hit_maps)
    assert copied.ids == IDS
    assert repr(found).startswith("RetrievalExplanation(maps=(2, 3, ")
    assert repr(FORMS["scores"][0]) == "Hits(queries=2, hits=3)"


def test_an_index_and_its_hits_are_explained_alike():
    faiss = pytest.importorskip("faiss")
    photos = torch.stack([*PHOTOS.values()])
    index = faiss.IndexFlatL2(6)
    index.add(embed(photos).numpy())
    one = explain_retrieval(QUERY, index, ENCODER, ENCODER.layer, photos, k=3)
    scores, numbers = index.search(embed(QUERY).numpy(), 3)
    hits = Hits(ids=numbers.tolist(), scores=scores)
    two = explain(hits, photos, similarity="euclidean")
    close(one.maps, two.maps)
    close(one.hit_maps, two.hit_maps)
    close(one.scores, two.scores)
    assert one.ids == two.ids
    close(one.indices, two.indices)


def test_a_threshold_that_no_cosine_reaches_comes_with_a_word():
    with pytest.warns(UserWarning, match=r"between -1 and 1, so a threshold of 1.2 decides nothing. .* 1 - d \* d / 2"):
        explain(IMAGES, threshold=1.2)
    with helpers.silent():
        explain(IMAGES, threshold=1.2, similarity="dot", method=SimilarityDecomposition)


def test_bytes_are_no_images():
    """As numbers up to 255 an encoder would see something else."""
    for given in ((Hits(ids=IDS), {name: (255 * x).byte() for name, x in PHOTOS.items()}), (IMAGES.mul(255).byte(),)):
        with pytest.raises((TypeError, ValueError), match="floating point, ready for the encoder"):
            explain(*given)


def test_a_negative_number_is_no_image():
    photos = torch.stack([*PHOTOS.values()])
    with pytest.raises(ValueError, match=r"gallery\[-2\], but that failed: IndexError: a negative number counts from"):
        explain(Hits(ids=[[0, -2]] * 2), photos)
    found = explain(Hits(ids=[[-7]] * 2), {-7: photos[0]})  # a name like another
    assert found.maps[:, 0].any()


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        ({}, "in common"),
        ({"contrast": "self"}, 'particular to the match ("self")'),
        ({"contrast": 1}, "rather than hit 2"),
        ({"contrast": "rest"}, "rather than the rest"),
        ({"threshold": 0.5}, "above 0.5, or below"),
    ],
)
def test_a_figure_says_what_its_maps_are(asked, label):
    found = explain(Hits(ids=IDS), PHOTOS, method=SimilarityDecomposition, **asked)
    figure = found.visualize(use_pyplot=False)
    *panels, bar = figure.axes
    assert bar.get_ylabel().startswith(label)
    among = isinstance(asked.get("contrast"), int) or asked.get("contrast") == "rest"
    assert len(panels) == 3 * (3 if among else 4)  # a hit that knows of no other has no map, and is shown
    assert any(f"similarity {found.similarities[0, 0]:.4g}" in axis.get_xlabel() for axis in panels)
    assert found.explore(mean=[0.5] * 3, std=[1] * 3)


def test_long_names_of_hits_fit_under_a_picture():
    name = "a/very/long/folder/" * 4 + "photo.jpg"
    figure = explain(Hits(ids=[[name, "a", "b"]]), PHOTOS | {name: PHOTOS["c"]}, query=QUERY[:1]).visualize()
    longest = max(len(line) for axis in figure.axes for line in axis.get_xlabel().splitlines())
    assert longest <= 31
    assert any("photo.jpg" in axis.get_xlabel() for axis in figure.axes)


def test_a_hit_that_is_missing_has_no_margin_to_speak_of():
    with helpers.silent():
        explain(Hits(ids=[["a", None]] * 2), PHOTOS, threshold=0.1, method=SimilarityDecomposition)


def test_titles_are_a_list():
    with pytest.raises(ValueError, match="list of 3"):
        explain(IMAGES).visualize(titles="abc", use_pyplot=False)


@pytest.mark.parametrize("of", [lambda s: s, lambda s: 1 - s], ids=["similarities", "distances"])
def test_hits_that_are_equally_near_are_in_order(of):
    s = VECTORS[:1, [0, 0, 1]] if embed(QUERY)[0] @ VECTORS[0, 0] > 0 else VECTORS[:1, [1, 1, 0]]
    similar = torch.cosine_similarity(embed(QUERY[:1])[:, None], s, dim=2)
    order = similar.argsort(1, descending=True)
    with helpers.silent():
        explain(Hits(scores=of(similar.gather(1, order)), embeddings=s[:, order[0]]), query=QUERY[:1])


def test_few_images_at_a_time_go_through_a_method_that_compares_places():
    passes = []
    handle = ENCODER.register_forward_pre_hook(lambda m, args: passes.append(len(args[0])))
    try:
        few = explain(IMAGES, method="CorrespondenceMap", internal_batch_size=1)
    finally:
        handle.remove()
    assert set(passes) == {1}
    close(few.maps, explain(IMAGES, method="CorrespondenceMap").maps)
