"""Hits of a search and classes of an episode on the pair explorer's page: every number against NumPy."""

import base64
import copy
import importlib.util
import io
import json
import pickle
import re

import numpy as np
import pytest
import torch
from encoders import HeadEncoder, PatchEncoder, PooledEncoder, random, seeded
from PIL import Image

from captum_fam import (
    CorrespondenceMap,
    FeatureActivationMap,
    SimilarityDecomposition,
    SimilarityScore,
    explain_episode,
    explain_hits,
    explain_retrieval,
    explore_pair,
)
from captum_fam.methods.dimension_attribution import DimensionAttribution

STEP = 8  # pixels of a place
HERE, THERE = (3, 5), (4, 2)  # grids of queries, and of supports and galleries
LABELS = [7, 2, 7, 5, 7, 2]  # classes 2, 5 and 7 have two, one and three shots
CLASSES = {2: [1, 5], 5: [3], 7: [0, 2, 4]}
QUERIES, SUPPORT, CONTROL = random(2, 3, 24, 40), random(6, 3, 32, 16, seed=2), random(1, 3, 32, 16, seed=3)
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
pytestmark = pytest.mark.filterwarnings("ignore:`photos` has values from")  # inputs are drawn as they are
each_similarity = pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])


ENCODER = seeded(PatchEncoder)


def activations(images):
    """What the encoder has of each place, (B, N, 6), without torch."""
    B, _, H, W = images.shape
    patches = images.numpy().reshape(B, 3, H // STEP, STEP, W // STEP, STEP).transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, -1, 3 * STEP**2) @ ENCODER.layer.weight.detach().numpy().reshape(6, -1).T


def places(images):
    """The embeddings of the places, (B, N, 4), which add up to those of the images."""
    A = activations(images)
    return A @ ENCODER.head.weight.detach().numpy().T / A.shape[1]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def norm(row):
    return np.linalg.norm(row)


ACROSS = {1: 1, 2: 2, 3: 3, 4: 2, 5: 5, 6: 3}  # shots in a row, by their number


def tiled(shots, *shape):
    """Values (S, ..., N') of shots, as of one image of them in rows."""
    S, (h, w) = len(shots), THERE
    down, across = S // ACROSS[S], ACROSS[S]
    whole = np.full((*shape, down * h, across * w), np.nan)
    for n, shot in enumerate(shots):
        top, left = n // across * h, n % across * w
        whole[..., top : top + h, left : left + w] = shot.reshape(*shape, h, w)
    return whole


def score_of(z, p, similarity):
    return {"cosine": unit(z) @ unit(p), "dot": z @ p, "euclidean": -((z - p) ** 2).sum()}[similarity]


def matrix_of(query, shots, similarity):
    """(3, 5, 4, 2 S), with four shots (3, 5, 8, 4): what each place of the query makes with each of the shots."""
    v, w = places(query)[0], places(shots)
    times = {"cosine": 1 / norm(v.sum(0)) / norm(w.sum(1).mean(0)), "dot": 1, "euclidean": 2}[similarity]
    return tiled(times * v @ w.transpose(0, 2, 1) / len(shots), *HERE)


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.html, re.S)[1])


def decoded(stored):
    """The matrix of a mode, as the page's script reads it."""
    whole = stored["whole"]
    assert whole["digits"] == 2
    codes = np.array([64 * BASE64.index(a) + BASE64.index(b) for a, b in zip(whole["text"][::2], whole["text"][1::2])])
    share = (codes - 2047) / 2047
    return (whole["largest"] * share * abs(share)).reshape(*stored["query"], *stored["reference"])


def close(actual, expected, rtol=1e-4, atol=1e-7):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def shows(one, query, shots, similarity):
    """A reference of the page is these images, its matrix and sums those of their mean."""
    z, p = places(query)[0].sum(0), places(shots).sum(1).mean(0)
    score, M = score_of(z, p, similarity), matrix_of(query, shots, similarity)
    mode, sums = one["modes"]["score"], one["modes"]["score"]["sums"]
    assert one["score"] == pytest.approx(score, rel=1e-5)
    assert mode["error"] <= abs(M).max() / 1000
    close(decoded(mode), M, atol=1.01 * mode["error"] + 1e-9)
    close(mode["rows"]["sum"], M.sum((2, 3)).ravel(), atol=1e-6)
    close(mode["columns"]["sum"], M.sum((0, 1)).ravel(), atol=1e-6)
    close(mode["rows"]["value"], M.reshape(15, -1).max(1))
    assert mode["rows"]["best"] == M.reshape(15, -1).argmax(1).tolist()
    assert sums["pairs"] == pytest.approx(M.sum(), abs=1e-9)
    if similarity == "euclidean":
        assert sums["lengths"] == pytest.approx(-(z @ z) - p @ p)
    assert [sums["score"], sums["sum"]] == pytest.approx([score, score], abs=1e-9)
    assert sums["remainder"] == pytest.approx(0, abs=1e-9)
    cosines = tiled(unit(activations(query)[0]) @ unit(activations(shots)).transpose(0, 2, 1), *HERE)
    close(decoded(one["modes"]["alike"]), cosines, atol=1.01 * one["modes"]["alike"]["error"] + 1e-9)
    made = one["maps"]["made"]
    close(made["query"]["values"], M.sum((2, 3)).ravel())
    close(made["reference"]["values"], M.sum((0, 1)).ravel())


def episode_of(similarity="cosine", encoder=ENCODER, **options):
    return explain_episode(encoder, encoder.layer, QUERIES, SUPPORT, LABELS, similarity=similarity, **options)


@each_similarity
@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition])
def test_a_class_is_its_shots_side_by_side_and_they_add_up_to_its_score(similarity, method):
    episode = episode_of(similarity, method=method)
    for query in range(2):
        data = data_of(episode.explore(query, control=CONTROL))
        image, order = QUERIES[query : query + 1], episode.similarities[query].argsort(descending=True).tolist()
        assert data["similarity"] == similarity
        assert data["control"] == 3
        labels = [list(CLASSES)[k] for k in order]
        for one, label, k in zip(data["references"], labels, order):
            shows(one, image, SUPPORT[CLASSES[label]], similarity)
            assert one["score"] == pytest.approx(episode.similarities[query, k].item(), rel=1e-5)
            assert one["width"] == 16 * len(CLASSES[label])
        shows(data["references"][3], image, CONTROL, similarity)
        names = [one["name"] for one in data["references"]]
        assert names == [f"class {labels[0]}, predicted", *(f"class {label}" for label in labels[1:]), "control"]
        assert data["query"]["name"] == f"query {query}"
        assert labels[0] == episode.predicted[query]


@pytest.mark.parametrize("shots", [4, 5, 6])
def test_more_shots_are_in_rows(shots):
    photos = [Image.new("RGB", (8, 16), (40 * n, 0, 0)) for n in range(7)]
    episode = explain_episode(ENCODER, ENCODER.layer, QUERIES, SUPPORT, [0] * shots + [1] * (6 - shots))
    data = data_of(episode.explore(photos=photos))
    (one,) = (one for one in data["references"] if one["name"].startswith("class 0"))
    shows(one, QUERIES[:1], SUPPORT[:shots], "cosine")
    across, pixels = ACROSS[shots], jpeg(one["picture"])
    assert [one["width"], one["height"]] == [8 * across, 16 * (shots // across)]
    for n in range(shots):
        middle = pixels[n // across * 16 + 8, n % across * 8 + 4]
        assert middle == pytest.approx([40 * (n + 1), 0, 0], abs=9)


def maps_of(query, label):
    """The whole maps of a class, for the cosine, from the embeddings of places alone."""
    v, z = places(query)[0], places(query)[0].sum(0)
    shots = {name: places(SUPPORT[numbers]) for name, numbers in CLASSES.items()}
    p = {name: w.sum(1).mean(0) for name, w in shots.items()}
    others = [name for name in CLASSES if name != label]

    def f(z, s):
        return unit(s) / norm(z)

    def own(z, s):
        return f(z, s) - unit(z) @ unit(s) * f(z, z)

    def fam(z, s):
        c = unit(z) * unit(s)
        return (c - c.min()) / (c.max() - c.min()) * np.sign(z)

    less_rest = f(z, p[label]) - np.mean([f(z, p[name]) for name in others], 0)
    A = {name: unit(activations(SUPPORT[numbers])) for name, numbers in CLASSES.items()}
    of_query, mine = unit(activations(query)[0]), A[label]

    def best(of, name):
        return (of @ A[name].reshape(-1, 6).T).max(-1)

    there = (mine @ of_query.T).max(-1) - np.mean([best(mine, name) for name in others], 0)
    return {
        "own": (15 * v @ own(z, p[label]), 8 * shots[label] @ own(p[label], z)),
        "common": (15 * v @ fam(z, p[label]), 8 * shots[label] @ fam(p[label], z)),
        "rest": (15 * v @ less_rest, None),
        "alike": (best(of_query, label) - np.mean([best(of_query, name) for name in others], 0), there),
    }


def test_the_whole_maps_of_a_class_are_those_of_its_mean():
    episode = episode_of()
    data = data_of(episode.explore(1))
    assert data["maps"] == ["own", "rest", "common", "made", "alike"]
    for one in data["references"]:
        label = int(re.search(r"\d+", one["name"])[0])
        for name, (here, there) in maps_of(QUERIES[1:], label).items():
            actual = one["maps"][name]
            close(actual["query"]["values"], here, atol=1e-5)
            if there is None:
                assert actual["reference"] is None
            else:
                close(actual["reference"]["values"], tiled(there).ravel(), atol=1e-5)
                assert actual["reference"]["shape"] == [4, 2 * len(CLASSES[label])]
        if label == 2:  # the episode's own
            close(one["maps"]["common"]["query"]["values"], episode.maps[1, 0].flatten())


def test_the_page_has_the_map_of_the_options_that_explained():
    plain, weighed = (data_of(episode_of(normalize=n).explore())["references"][0]["maps"] for n in ("minmax", None))
    found = episode_of(normalize=None)
    close(weighed["common"]["query"]["values"], found.map()[0].flatten())
    assert plain["common"] != weighed["common"]
    assert {**plain, "common": 0} == {**weighed, "common": 0}


@each_similarity
def test_an_encoder_with_biases_adds_up_by_both_baselines(similarity):
    """By the integral along a path, with what each place makes with a baseline."""
    encoder = seeded(HeadEncoder)
    z, s = (encoder(x).detach().numpy() for x in (QUERIES, SUPPORT))
    for options in ({}, {"method": SimilarityDecomposition, "n_steps": 8, "baseline": "zero"}):
        data = data_of(episode_of(similarity, encoder, **options).explore())
        for one in data["references"]:
            group = CLASSES[int(re.search(r"\d+", one["name"])[0])]
            mode, sums = one["modes"]["score"], one["modes"]["score"]["sums"]
            p = s[group].mean(0)
            assert sums["score"] == pytest.approx(score_of(z[0], p, similarity), rel=1e-6)
            assert sums["remainder"] == pytest.approx(0, abs=1e-3 * abs(sums["pairs"]))
            assert mode["reference"] == [16, 8 * len(group)]
            # Biases alone, which no place has: the embedding of activations that are zero.
            bias = encoder.head.bias.detach().numpy()
            times = {"cosine": 1 / norm(z[0]) / norm(p), "dot": 1, "euclidean": 2}[similarity]
            assert sums["rest"] == pytest.approx(times * bias @ bias, rel=1e-4)
            assert sums["query_rest"] == pytest.approx(times * (z[0] - bias) @ bias, rel=1e-3)
            assert sums["reference_rest"] == pytest.approx(times * (p - bias) @ bias, rel=1e-3)
            assert sum(mode["query_rest"]) == pytest.approx(sums["query_rest"], rel=1e-3)
            assert sum(mode["reference_rest"]) == pytest.approx(sums["reference_rest"], rel=1e-3)
            assert len(mode["reference_rest"]) == 16 * 8 * len(group)


@pytest.mark.filterwarnings("ignore:The places of layer")
def test_without_steps_what_is_missing_is_printed():
    encoder = seeded(HeadEncoder)
    data = data_of(episode_of("dot", encoder, method=SimilarityDecomposition).explore())
    for one in data["references"]:
        sums = one["modes"]["score"]["sums"]
        assert sums.keys() == {"pairs", "sum", "score", "remainder"}
        assert sums["remainder"] == pytest.approx(sums["score"] - sums["pairs"])
        assert abs(sums["remainder"]) > 0.01 * abs(sums["score"])


def jpeg(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))).astype(int)


def test_photos_of_the_shots_are_side_by_side_in_one_size():
    colours = [
        (250, 0, 0),
        (0, 250, 0),
        (0, 0, 250),
        (250, 250, 0),
        (0, 250, 250),
        (250, 0, 250),
        (9, 9, 9),
        (99, 99, 99),
    ]
    photos = [Image.new("RGB", (20 + 4 * (n == 2), 40), colour) for n, colour in enumerate(colours)]
    episode = episode_of()
    titles = ["who?", "two", "five", "seven", "nobody"]
    data = data_of(episode.explore(photos=photos, titles=titles, control=CONTROL))
    shown = {one["name"]: jpeg(one["picture"]) for one in data["references"]}
    assert shown.keys() == {"two", "five", "seven", "nobody"}
    assert data["query"]["name"] == "who?"
    assert abs(jpeg(data["query"]["picture"]) - colours[0]).max() < 9
    for name, group in zip(titles[1:], [*CLASSES.values(), [6]]):
        S = len(group)
        pixels = shown[name].reshape(40, S, -1, 3)
        for n, number in enumerate(group):
            middle = pixels[5:-5, n, 5:-5]
            assert abs(middle - colours[1 + number]).max() < 9
    assert [one["width"] for one in data["references"] if one["name"] == "seven"] == [3 * 20]
    assert shown["two"].shape == (40, 2 * 24, 3)


def test_a_row_of_photos_has_the_pixels_of_a_square_one():
    photos = [Image.new("RGB", (800, 400))] * 7
    data = data_of(episode_of().explore(photos=photos))
    for one in [data["query"], *data["references"]]:
        h, w = jpeg(one["picture"]).shape[:2]
        assert h * w == pytest.approx(512**2, rel=0.01)
        assert w / h == pytest.approx(one["width"] / one["height"], rel=0.01)


def test_a_single_class_and_a_single_shot_work():
    data = data_of(explain_episode(ENCODER, ENCODER.layer, QUERIES, SUPPORT[:1], [3]).explore())
    (one,) = data["references"]
    shows(one, QUERIES[:1], SUPPORT[:1], "cosine")
    assert "rest" not in data["maps"]


def test_of_several_images_one_by_one_it_is_the_page_of_explore_pair():
    """A class of one shot is a reference."""
    episode = explain_episode(ENCODER, ENCODER.layer, QUERIES, SUPPORT[:3], [0, 1, 2])
    order = episode.similarities[0].argsort(descending=True)
    options = {"titles": ["a", "b", "c", "d"]}
    one = data_of(explore_pair(QUERIES[:1], SUPPORT[order], FeatureActivationMap(ENCODER, ENCODER.layer), **options))
    two = data_of(episode.explore(titles=["a", *("bcd"[i] for i in order.argsort())]))
    for a, b in zip(one["references"], two["references"], strict=True):
        assert [a["name"], a["picture"]] == [b["name"], b["picture"]]
        close(a["score"], b["score"])
        for mode in ("score", "alike"):
            close(decoded(a["modes"][mode]), decoded(b["modes"][mode]), atol=1e-4)
        for name in one["maps"]:
            for side in ("query", "reference") if name != "rest" else ["query"]:
                close(a["maps"][name][side]["values"], b["maps"][name][side]["values"])


def test_explore_pair_takes_fam_and_shows_its_map():
    score = SimilarityScore(ENCODER, random(5, 4), similarity="dot")
    for fam in (
        FeatureActivationMap(ENCODER, ENCODER.layer, similarity="dot"),
        FeatureActivationMap(score, ENCODER.layer),
    ):
        (one,) = data_of(explore_pair(QUERIES[:1], SUPPORT[:1], fam))["references"]
        shows(one, QUERIES[:1], SUPPORT[:1], "dot")
        here, there = FeatureActivationMap(ENCODER, ENCODER.layer, similarity="dot").attribute_pair(
            QUERIES[:1], SUPPORT[:1]
        )
        close(one["maps"]["common"]["query"]["values"], here.flatten())
        close(one["maps"]["common"]["reference"]["values"], there.flatten())


@pytest.mark.parametrize("name", ["query", "reference"])
def test_several_tensors_are_refused_in_words(name):
    given = {"query": QUERIES[:1], "reference": SUPPORT} | {name: (SUPPORT, SUPPORT)}
    with pytest.raises(ValueError, match=f"Expected `{name}` to be .*, but got tuple"):
        explore_pair(method=CorrespondenceMap(ENCODER, ENCODER.layer), **given)


@pytest.mark.filterwarnings("ignore:Embeddings are zero or not finite", "ignore:Activations are not finite")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("where", ["query", "one", "all"])
def test_what_has_no_score_has_a_page_that_says_none(value, where):
    """A page has no number that is not finite; other references have theirs."""
    queries, support = QUERIES.clone(), SUPPORT.clone()
    {"query": queries, "one": support[3:4], "all": support}[where][:] = value
    photos = [Image.new("RGB", (9, 9))] * 7
    episode = explain_episode(ENCODER, ENCODER.layer, queries, support, LABELS)
    fam = FeatureActivationMap(ENCODER, ENCODER.layer)
    pages = episode.explore(photos=photos), explore_pair(queries[:1], support, fam, photos=photos)
    for data, has_one in zip(map(data_of, pages), ("class 5", "reference 4")):
        for one in data["references"]:
            sums, known = one["modes"]["score"]["sums"], where == "one" and not one["name"].startswith(has_one)
            assert (sums["pairs"] != 0) == known
            if not known:
                assert one["score"] == (0 if value == 0 else None)
                assert set(sums.values()) == {0}
                assert set(one["maps"]["own"]["query"]["values"]) == {0}
            else:
                assert sums["score"] == pytest.approx(one["score"], rel=1e-5)


# Classifiers of easyfsl

needs_easyfsl = pytest.mark.skipif(importlib.util.find_spec("easyfsl") is None, reason="needs easyfsl")


def classifier_of(name, dtype=torch.float64, **options):
    methods, modules = (pytest.importorskip(f"easyfsl.{module}") for module in ("methods", "modules"))
    if name == "FEAT":
        options["attention_module"] = seeded(lambda: modules.MultiHeadAttention(1, 4, 4, 4))
    if name == "MatchingNetworks":
        options["feature_dimension"] = 4
    if name == "LaplacianShot":
        options["lambda_regularization"] = 0
    return getattr(methods, name)(copy.deepcopy(ENCODER), **options).to(dtype).eval()


def decided(name, method=FeatureActivationMap, dtype=torch.float64, **options):
    classifier = classifier_of(name, dtype, **options)
    images = QUERIES.to(dtype), SUPPORT.to(dtype)
    return explain_episode(classifier, classifier.backbone.layer, *images, [0, 1, 0, 2, 0, 1], method=method)


@needs_easyfsl
@pytest.mark.parametrize("options", [{}, {"use_softmax": True}])
@pytest.mark.parametrize("name", ["SimpleShot", "PrototypicalNetworks"])
def test_classifiers_that_compare_with_means_add_up(name, options):
    method = SimilarityDecomposition
    data = data_of(decided(name, method, **options).explore(1))
    similarity = {"SimpleShot": "cosine", "PrototypicalNetworks": "euclidean"}[name]
    groups = [[0, 2, 4], [1, 5], [3]]
    for one in data["references"]:
        shows(one, QUERIES[1:], SUPPORT[groups[int(re.search(r"\d", one["name"])[0])]], similarity)


@needs_easyfsl
def test_features_that_are_centred_and_normalised_add_up():
    centre = torch.full((4,), 0.1, dtype=torch.float64)
    data = data_of(decided("SimpleShot", feature_centering=centre, feature_normalization=2.0).explore())
    z, s = ((places(images).sum(1) - 0.1) for images in (QUERIES, SUPPORT))
    for one in data["references"]:
        group = [[0, 2, 4], [1, 5], [3]][int(re.search(r"\d", one["name"])[0])]
        score = score_of(z[0], unit(s[group]).mean(0), "cosine")
        sums = one["modes"]["score"]["sums"]
        assert sums["score"] == pytest.approx(score, abs=1e-9)
        assert sums["sum"] == pytest.approx(score, abs=0.02)


@needs_easyfsl
@pytest.mark.filterwarnings("ignore:The places of layer")
@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition])
@pytest.mark.parametrize("name", ["FEAT", "BDCSPN", "MatchingNetworks", "LaplacianShot"])
def test_classifiers_that_change_the_means_are_refused(name, method):
    episode = decided(name, method, torch.float32)  # the LSTM of MatchingNetworks has no other
    for _ in range(2):
        with pytest.raises(ValueError, match=r"are not the means of its support images' embeddings.*Pass the encoder"):
            episode.explore()


@needs_easyfsl
def test_a_distance_says_what_would_add_up():
    with pytest.raises(ValueError, match=r"cannot be split over places\. Pass method=SimilarityDecomposition"):
        decided("PrototypicalNetworks").explore()


@needs_easyfsl
def test_a_fitted_classifier_needs_its_support_images():
    classifier = classifier_of("SimpleShot")
    classifier.process_support_set(SUPPORT, torch.tensor([0, 1, 0, 2, 0, 1]))
    episode = explain_episode(classifier, classifier.backbone.layer, QUERIES)
    with pytest.raises(ValueError, match="pass them and their labels to explain_episode"):
        episode.explore()


# What both refuse, and what they keep

faiss = importlib.util.find_spec("faiss") and __import__("faiss")
needs_faiss = pytest.mark.skipif(not faiss, reason="needs faiss")
GALLERY = random(9, 3, 32, 16, seed=5)


def index_of(similarity, vectors):
    vectors = np.ascontiguousarray((unit(vectors) if similarity == "cosine" else vectors).astype(np.float32))
    index = (faiss.IndexFlatL2 if similarity == "euclidean" else faiss.IndexFlatIP)(vectors.shape[1])
    index.add(vectors)
    return index


class Fetched:
    """A data set that notes what is taken from it."""

    def __init__(self):
        self.numbers = []

    def __getitem__(self, number):
        self.numbers.append(number)
        return GALLERY[number], "a label"


def search(similarity="cosine", k=3, gallery=GALLERY, index=None, encoder=ENCODER, **options):
    if index is None:
        index = index_of(similarity, encoder(GALLERY).detach().numpy())
    return explain_retrieval(QUERIES, index, encoder, encoder.layer, gallery, k, similarity=similarity, **options)


@needs_faiss
@each_similarity
@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition])
def test_the_hits_are_the_references_with_their_scores(similarity, method):
    found = search(similarity, method=method)
    scores = -found.scores if similarity == "euclidean" else found.scores
    z, s = places(QUERIES).sum(1), places(GALLERY).sum(1)
    for query in range(2):
        data = data_of(found.explore(query, control=CONTROL))
        expected = sorted(range(9), key=lambda n: -score_of(z[query], s[n], similarity))[:3]
        assert found.indices[query].tolist() == expected
        for rank, (one, number) in enumerate(zip(data["references"], expected)):
            assert one["name"] == f"{rank + 1}: image {number}"
            assert one["score"] == pytest.approx(scores[query, rank].item(), rel=1e-4)
            one["modes"]["score"]["sums"] |= rounded(one["modes"]["score"]["sums"], found, query, rank)
            shows(one, QUERIES[query : query + 1], GALLERY[number : number + 1], similarity)
        assert data["references"][3]["name"] == "control"
        assert data["query"]["name"] == f"query {query}"


def rounded(sums, found, query, rank):
    """The index has single precision: the page's score is the result's, and the difference is said to be missing."""
    assert sums["score"] == found.similarities[query, rank].item()
    assert sums["remainder"] == sums["score"] - sums["sum"] == pytest.approx(0, abs=1e-5 * max(1, abs(sums["score"])))
    return {"score": sums["sum"], "remainder": 0}


@needs_faiss
def test_the_gallery_is_asked_for_the_hits_of_the_query_when_they_are_explored():
    gallery = Fetched()
    found = search(gallery=gallery)
    gallery.numbers.clear()
    found.explore(1)
    assert gallery.numbers == found.indices[1].tolist()


@needs_faiss
def test_what_was_not_found_is_left_out():
    """The index has two vectors, and five hits are wanted; then, for one of the queries, none."""
    index = index_of("dot", places(GALLERY).sum(1)[:2])
    found = search("dot", 5, index=index)
    data = data_of(found.explore(titles=["q", "a", "b"]))
    assert [one["name"] for one in data["references"]] == ["a", "b"]
    with pytest.raises(ValueError, match="list of 3, one for each image"):
        found.explore(titles=["q", "a", "b", "c", "d", "e"])
    found.ids[1] = [None] * 5
    with pytest.raises(ValueError, match="found nothing for query 1"):
        found.explore(1)


@needs_faiss
def test_a_lossy_index_has_its_own_scores_and_the_rest_is_missing():
    index = faiss.IndexScalarQuantizer(4, faiss.ScalarQuantizer.QT_4bit, faiss.METRIC_INNER_PRODUCT)
    vectors = places(GALLERY).sum(1).astype(np.float32)
    index.train(vectors)
    index.add(vectors)
    with pytest.warns(UserWarning, match="."):
        found = search("dot", index=index)
    for rank, one in enumerate(data_of(found.explore())["references"]):
        number, sums = found.indices[0, rank].item(), one["modes"]["score"]["sums"]
        stored, z = index.reconstruct(number), places(QUERIES).sum(1)[0]
        assert sums["score"] == pytest.approx(float(z @ stored), abs=1e-5)
        assert sums["sum"] == pytest.approx(z @ places(GALLERY[number : number + 1]).sum(1)[0], abs=1e-9)
        assert sums["remainder"] == pytest.approx(sums["score"] - sums["sum"])


@needs_faiss
def test_an_index_with_numbers_of_its_own_gives_these():
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(4))
    numbers = np.arange(9) * 1000 + 7
    index.add_with_ids(places(GALLERY).sum(1).astype(np.float32), numbers)
    gallery = {int(number): image for number, image in zip(numbers, GALLERY)}
    found = search("dot", index=index, gallery=gallery)
    data = data_of(found.explore())
    assert [one["name"] for one in data["references"]] == [
        f"{rank}: image {number}" for rank, number in enumerate(found.indices[0].tolist(), 1)
    ]


@needs_faiss
def test_without_a_gallery_there_is_nothing_to_show():
    with pytest.raises(ValueError, match="images of the hits: pass them, or a `gallery`"):
        search(gallery=None).explore()


RESULTS = [pytest.param(search, id="retrieval", marks=needs_faiss), pytest.param(episode_of, id="episode")]
each_result = pytest.mark.parametrize("explain", RESULTS)


@each_result
@pytest.mark.parametrize("query", [-1, 2, True, 0.0, "0", None])
def test_a_query_is_a_number(explain, query):
    with pytest.raises(ValueError, match="Expected `query` to be the number of one of 2 queries, from 0, but got"):
        explain().explore(query)


@each_result
def test_nothing_is_computed_before_a_page_is_asked_for_nor_for_wrong_words(explain, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("computed")

    for method in (SimilarityDecomposition, CorrespondenceMap):
        monkeypatch.setattr(method, "attribute_matrix", fail)
    found = explain()
    for titles in (["one"], "four", ["q", "1", "2", "3", "4"]):
        with pytest.raises(ValueError, match="Expected `titles` to be a list of 4"):
            found.explore(titles=titles)
    with pytest.raises(ValueError, match="Expected `photos` to be"):
        found.explore(photos=[Image.new("RGB", (9, 9))] * 2)
    with pytest.raises(AssertionError, match="computed"):
        found.explore()


@each_result
def test_a_page_is_made_twice_the_same_and_leaves_the_model_and_the_result(explain):
    encoder, before = copy.deepcopy(ENCODER.state_dict()), explain()
    maps = before.maps.clone()
    assert before.explore().html == before.explore().html
    assert torch.equal(before.maps, maps)
    assert all(torch.equal(a, b) for a, b in zip(encoder.values(), ENCODER.state_dict().values()))
    assert not any(p.grad is not None for p in ENCODER.parameters())
    assert not ENCODER.layer._forward_hooks


@each_result
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
def test_a_copy_has_the_maps_alone(explain, again):
    """Neither a lambda nor weights are in a file."""
    found = explain()
    encoder = found._origin.method.forward_func
    found._origin.method.forward_func = lambda x: encoder(x)
    other = again(found)
    assert torch.equal(other.maps, found.maps)
    with pytest.raises(ValueError, match="has no images and no encoder, which explore needs; take the one"):
        other.explore()


@each_result
@pytest.mark.filterwarnings("ignore:The index gave a score")
def test_a_method_of_ones_own_is_refused(explain):
    class Own(DimensionAttribution):
        def terms(self, z, s):
            return s.expand(torch.broadcast_shapes(z.shape, s.shape))

    with pytest.raises(TypeError, match=r"Expected `method` to be .* but got \['Own'\]"):
        explain(method=Own).explore()


def test_a_similarity_of_ones_own_is_refused():
    with pytest.raises(ValueError, match="needs a similarity that is a sum over pairs of places"):
        episode_of(lambda z, s: z * s).explore()


def test_inputs_of_several_tensors_are_refused():
    class Two(PooledEncoder):
        def forward(self, a, b):
            return super().forward(a + b)

    encoder, images = seeded(Two), (QUERIES, QUERIES)
    episode = explain_episode(encoder, encoder.layer, images, images, [0, 1])
    with pytest.raises(ValueError, match="Expected `query` to be one image"):
        episode.explore()


def test_an_encoder_that_has_changed_since_is_noticed():
    encoder = seeded(PatchEncoder)
    episode = explain_episode(encoder, encoder.layer, QUERIES, SUPPORT, LABELS)
    with torch.no_grad():
        encoder.head.weight.mul_(torch.tensor([1, 2, 1, 1.0])[:, None])
    with pytest.raises(ValueError, match="the encoder has changed since"):
        episode.explore()


@each_result
def test_what_was_explained_in_inference_mode_is_explored_outside(explain):
    with torch.inference_mode():
        found = explain(encoder=seeded(PooledEncoder))
    assert len(data_of(found.explore())["references"]) == 3


def test_signals_have_no_page():
    encoder = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 3), torch.nn.AdaptiveAvgPool1d(1), torch.nn.Flatten())
    found = explain_hits(torch.rand(1, 3, 20), torch.rand(2, 3, 20), encoder, encoder[0])
    with pytest.raises(ValueError, match=r"one image \(1, C, H, W\).*but got a float32 tensor of shape \(1, 3, 20\)"):
        found.explore()
