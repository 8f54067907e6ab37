"""Few-shot episodes: the decision of the library, and maps of it that FAM gives by another way as well."""

import copy
import functools
import importlib.util
import io
import os
import random as lottery
import re
import zipfile
from contextlib import nullcontext
from pathlib import Path

import helpers
import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from encoders import FlatEncoder, HeadEncoder, PooledEncoder, TwoInputEncoder, random, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from captum_fam import (
    FeatureActivationMap,
    SimilarityDecomposition,
    SimilarityScore,
    explain_episode,
    prototypes,
)

methods = pytest.importorskip("easyfsl.methods")
modules = pytest.importorskip("easyfsl.modules")
DATA = os.environ.get("CAPTUM_FAM_DATA")

few = settings(deadline=None, max_examples=30)
close = functools.partial(helpers.close, rtol=None, atol=None)  # as their dtype has it
SUPPORTED = {
    "PrototypicalNetworks": lambda b, D: methods.PrototypicalNetworks(b),
    "FEAT": lambda b, D: methods.FEAT(b, attention_module=modules.MultiHeadAttention(1, D, D, D)),
    "SimpleShot": lambda b, D: methods.SimpleShot(b),
    "BDCSPN": lambda b, D: methods.BDCSPN(b),
    "MatchingNetworks": lambda b, D: methods.MatchingNetworks(b, feature_dimension=D),
    "LaplacianShot, knn": lambda b, D: methods.LaplacianShot(b, knn=1),
    "LaplacianShot, lambda": lambda b, D: methods.LaplacianShot(b, lambda_regularization=0),
    "LaplacianShot, steps": lambda b, D: methods.LaplacianShot(b, inference_steps=0),
}
OPTIONS = {
    "plain": {},
    "softmax": {"use_softmax": True},
    "centred": {"feature_centering": random(6, seed=9, dtype=torch.float32)},
    "normalised": {"feature_normalization": 2.0},
    "all": {"use_softmax": True, "feature_centering": torch.full((6,), 0.1), "feature_normalization": 1.0},
}
QUERIES = random(5, 3, 8, 8, dtype=torch.float32)
each_supported = pytest.mark.parametrize("name", SUPPORTED)
each_shot = pytest.mark.parametrize("shots", [1, 5])


class NormEncoder(PooledEncoder):
    """Batch norm before the layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return super().forward(self.norm(x))


class MapEncoder(PooledEncoder):
    """Feature maps, as Relation Networks compare them."""

    def forward(self, x):
        return self.features(x)


class Points(nn.Module):
    """Inputs (B, D, 1, 1) that are their own embeddings."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        return self.layer(x).mean((2, 3))


def points(values):
    return torch.as_tensor(values, dtype=torch.float32)[..., None, None]


def support(shots, ways=4):
    """Support images and their labels 0 to K - 1, not in order."""
    return random(shots * ways, 3, 8, 8, seed=2, dtype=torch.float32), torch.arange(ways).flip(0).repeat(shots)


def classifier_of(name, shots=None, encoder=PooledEncoder, D=6, **options):
    """A classifier in single precision; fitted, where there are shots."""
    made = seeded(lambda: SUPPORTED[name](encoder(), D)).float()
    for option, value in options.items():
        setattr(made, option, value)
    if shots:
        with torch.no_grad():
            made.process_support_set(*support(shots))
    return made


def distance(z, s):
    return -((z - s) ** 2) / torch.linalg.vector_norm(z - s, dim=-1, keepdim=True)


CONTRIBUTIONS = {
    "dot": lambda z, s: z * s,
    "cosine": lambda z, s: F.normalize(z, dim=-1) * F.normalize(s, dim=-1),
    "euclidean": lambda z, s: -((z - s) ** 2),
    distance: distance,
}


@torch.no_grad()
def by_hand(fitted, queries=QUERIES):
    """What a copy of a classifier compares: the copy, its embedding, references (B, K, D), and their similarity."""
    fitted = copy.deepcopy(fitted)
    if isinstance(fitted, methods.MatchingNetworks):
        shots, labels = F.normalize(fitted.contextualized_support_features), fitted.one_hot_support_labels.argmax(1)
        rows = []
        for z in (embed := lambda x: fitted.encode_query_features(fitted.compute_features(x)))(queries):
            votes = [(z @ shot).exp() for shot in shots]
            for k in range(int(labels.max()) + 1):
                mine = [i for i in range(len(shots)) if labels[i] == k]
                rows.append(sum(votes[i] * shots[i] for i in mine) / sum(votes[i] for i in mine))
        return fitted, embed, torch.stack(rows).unflatten(0, (len(queries), -1)), "dot"
    if isinstance(fitted, methods.BDCSPN):
        fitted(queries)  # rectifies the prototypes
    names = {methods.LaplacianShot: "euclidean", methods.SimpleShot: "cosine", methods.BDCSPN: "cosine"}
    s = fitted.prototypes.detach().expand(len(queries), -1, -1)
    return fitted, fitted.compute_features, s, names.get(type(fitted), distance)


@each_shot
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@each_supported
def test_scores_are_those_of_the_library(name, options, shots):
    fitted, new = classifier_of(name, shots, **options), classifier_of(name, **options)
    _, embed, s, similarity = by_hand(fitted)
    with torch.no_grad():
        scores, c = copy.deepcopy(fitted)(QUERIES), CONTRIBUTIONS[similarity](embed(QUERIES)[:, None], s)
    for episode in (
        explain_episode(fitted, fitted.backbone.layer, QUERIES),
        explain_episode(new, new.backbone.layer, QUERIES, *support(shots)),
    ):
        close(episode.scores, scores)
        close(episode.similarities, c.sum(2))
        assert episode.classes.tolist() == [0, 1, 2, 3]
        assert episode.predicted.tolist() == scores.argmax(1).tolist()


@few
@given(st.data())
@pytest.mark.filterwarnings("ignore:Embeddings are zero")
def test_scores_are_those_of_the_library_whatever_the_features(data):
    name = data.draw(st.sampled_from(["LaplacianShot, knn", *list(SUPPORTED)[:5]]))
    ways, shots, B = (data.draw(st.integers(1, most)) for most in (4, 3, 4))
    row = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    images = points(data.draw(st.lists(row, min_size=ways * shots, max_size=ways * shots)))
    queries = points(data.draw(st.lists(row, min_size=B, max_size=B)))
    labels = torch.tensor(data.draw(st.permutations(list(range(ways)) * shots)))
    classifier = classifier_of(name, encoder=Points, D=3)
    episode = explain_episode(classifier, classifier.backbone.layer, queries, images, labels)
    classifier.process_support_set(images, labels)
    close(episode.scores, classifier(queries).detach())
    assert episode.maps.isfinite().all()


@each_shot
@pytest.mark.parametrize(
    ("encoder", "D", "options", "route"),
    [
        (PooledEncoder, 6, {}, "aligned"),
        (PooledEncoder, 6, OPTIONS["normalised"], "aligned"),
        (PooledEncoder, 6, OPTIONS["centred"], "jacobian"),
        (FlatEncoder, 96, {}, "jacobian"),
    ],
    ids=["pooled", "normalised", "centred", "flat"],
)
@each_supported
def test_maps_contrasts_and_margins_are_those_of_fam_for_the_references_of_each_class(
    name, encoder, D, options, route, shots
):
    fitted = classifier_of(name, shots, encoder, D, **options)
    episode = explain_episode(fitted, fitted.backbone.layer, QUERIES)
    assert episode.route == ("jacobian" if name == "MatchingNetworks" else route)  # its query encoder is in between
    fitted, embed, s, similarity = by_hand(fitted)
    # The share of a distance is that of its square, so min-max makes the same weights of both.
    named = "euclidean" if similarity is distance else similarity
    maps, contrasts = (FeatureActivationMap(embed, fitted.backbone.layer, similarity=n) for n in (named, similarity))
    for k in range(4):
        close(episode.map(k), maps.attribute(QUERIES, reference_embedding=s[:, k]), rtol=1e-4, atol=1e-5)
    own, other = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([2, 3, 1, 1, 3])
    first = torch.arange(5) * 4  # number of each query's first reference
    gallery = {"reference_embedding": s.flatten(0, 1)}
    want = contrasts.attribute(QUERIES, first + own, contrast=first + other, **gallery)
    close(episode.contrast(own, other), want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        c = CONTRIBUTIONS[similarity](embed(QUERIES)[:, None], s)
    close(episode.margin(own, other), (c[range(5), own] - c[range(5), other]).sum(1), rtol=1e-4, atol=1e-5)
    close(episode.margin(1, "rest"), (c[:, 1] - c[:, [0, 2, 3]].mean(1)).sum(1), rtol=1e-4, atol=1e-5)
    if similarity != "dot":  # all queries have the same references
        want = contrasts.attribute(QUERIES, 1, reference_embedding=s[0], contrast="rest")
        close(episode.contrast(1, "rest"), want, rtol=1e-4, atol=1e-5)


@each_supported
def test_the_jacobian_of_a_spatial_mean_makes_the_aligned_map(name):
    fitted = classifier_of(name, 5)
    jacobian = explain_episode(fitted, fitted.backbone.layer, QUERIES, channel_weights="jacobian")
    auto = explain_episode(fitted, fitted.backbone.layer, QUERIES)
    assert jacobian.route == "jacobian"
    close(auto.maps, jacobian.maps)
    close(auto.signed_maps, jacobian.signed_maps)


@each_shot
def test_the_margin_of_matching_networks_is_the_slope_of_its_log_odds(shots):
    fitted = classifier_of("MatchingNetworks", shots)
    episode = explain_episode(fitted, fitted.backbone.layer, QUERIES)
    scores, margin = fitted(QUERIES).detach(), episode.margin(2, 1)
    if shots == 1:
        close(margin, scores[:, 2] - scores[:, 1], rtol=1e-3, atol=1e-5)  # the library adds 1e-6 to probabilities
    z = fitted.encode_query_features(fitted.compute_features(QUERIES)).detach().requires_grad_()
    attention = (z @ F.normalize(fitted.contextualized_support_features.detach()).T).softmax(1)
    log_p = (attention @ fitted.one_hot_support_labels).log()
    (slope,) = torch.autograd.grad((log_p[:, 2] - log_p[:, 1]).sum(), z)
    close(margin, (z * slope).sum(1).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("similarity", [*oracle.SIMILARITIES, None])
def test_an_encoder_with_labels_of_any_values_compares_with_prototypes(similarity):
    encoder, x, labels = seeded(PooledEncoder), random(7, 3, 8, 8, seed=3), [70, -3, 12, 70, 12, 12, -3]
    queries = QUERIES.double()
    given_ = (lambda z, s: -(z - s).abs()) if similarity == "manhattan" else similarity
    episode = explain_episode(encoder, encoder.layer, queries, x, labels, similarity=given_)
    z, A, shots = (f.detach().numpy() for f in (encoder(queries), encoder.features(queries), encoder(x)))
    classes = [-3, 12, 70]
    p = [sum(s for s, y in zip(shots, labels) if y == k) / labels.count(k) for k in classes]
    assert (episode.route, episode.classes.tolist()) == ("aligned", classes)
    for b in range(5):
        c = [oracle.contributions(z[b], s, similarity or "cosine") for s in p]
        assert episode.scores[b].tolist() == pytest.approx([row.sum() for row in c])
        first, second, third = sorted(range(3), key=lambda k: -c[k].sum())
        assert episode.predicted[b] == classes[first]
        close(episode.maps[b], np.stack([oracle.aligned_map(oracle.weights(row) * np.sign(z[b]), A[b]) for row in c]))
        assert torch.equal(episode.map()[b, 0], episode.maps[b, first])
        for found, other in [(episode.contrast(), second), (episode.contrast(other=classes[third]), third)]:
            close(found[b, 0], oracle.aligned_map((c[first] - c[other]) * np.sign(z[b]), A[b]))
        assert episode.margin()[b].item() == pytest.approx((c[first] - c[second]).sum())
    close(episode.similarities, episode.scores)
    assert episode.constants.shape == (5, 3)
    assert not episode.constants.any()


@few
@given(
    st.integers(0, 10**6),
    st.integers(2, 5).flatmap(lambda K: st.lists(st.integers(-9, 9), min_size=K, max_size=K, unique=True)),
    st.sampled_from(["cosine", "dot", "euclidean"]),
)
def test_whatever_the_labels_they_only_name_the_classes(seed, names, similarity):
    encoder, shots, B = seeded(FlatEncoder), random(2 * len(names), 3, 4, 4, seed=seed), 3
    queries, labels = random(B, 3, 4, 4, seed=seed + 1), names * 2
    one = explain_episode(encoder, encoder.layer, queries, shots, labels, similarity=similarity)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = torch.tensor(labels)[order]
    two = explain_episode(encoder, encoder.layer, queries, shots[order], shuffled, similarity=similarity)
    assert one.classes.tolist() == two.classes.tolist() == sorted(names)
    close(one.scores, two.scores)
    close(one.maps, two.maps, rtol=1e-6, atol=1e-8)
    a, b = names[0], names[1]
    close(one.contrast(a, b), -one.contrast(b, a))
    close(one.margin(a, b), -one.margin(b, a))
    picked = [sorted(names).index(x) for x in (a, b, a)]
    for label in ([a, b, a], torch.tensor([a, b, a])):  # one for each query
        assert torch.equal(one.map(label)[:, 0], one.maps[range(B), picked])
        assert torch.equal(one.contrast(label, [b, a, b])[1], one.contrast(b, a)[1])
        assert torch.equal(one.margin(label, "rest")[1], one.margin(b, "rest")[1])


def test_a_class_is_contrasted_with_the_runner_up():
    encoder, images = Points(), points([[1.0, 5.0], [4.0, 1.0], [1.0, 0.0]])
    queries = points([[1.0, 1.0], [1.0, 4.0]])  # nearest first: labels 8, 6, 7 and 7, 8, 6
    episode = explain_episode(encoder, encoder.layer, queries, images, [7, 6, 8], similarity="euclidean")
    assert episode.predicted.tolist() == [8, 7]
    assert episode.margin().tolist() == [-1.0 + 9.0, -1.0 + 16.0]
    close(episode.contrast(), episode.contrast([8, 7], [6, 8]))
    close(episode.contrast(6), episode.contrast(6, [8, 7]))
    assert episode.margin(6).tolist() == [-9.0 + 1.0, -18.0 + 1.0]


@pytest.mark.parametrize("name", ["PrototypicalNetworks", "LaplacianShot, knn"])
def test_the_runner_up_is_known_where_all_probabilities_but_one_round_to_zero(name):
    classifier = classifier_of(name, encoder=Points, D=2, use_softmax=True)
    images = points([[0.0, 1.0], [0.0, 1000.0], [0.0, 500.0]])
    episode = explain_episode(classifier, classifier.backbone.layer, points([[0.0, 2.0]]), images, [0, 1, 2])
    assert episode.scores.tolist() == [[1.0, 0.0, 0.0]]
    close(episode.contrast(), episode.contrast(0, 2))
    close(episode.margin(), episode.margin(0, 2))


@pytest.mark.filterwarnings("ignore:Embeddings are zero")
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_a_prototype_of_zeros_is_contrasted_as_fam_does(similarity):
    encoder, images = Points(), points([[0.0, 0.0], [1.0, 2.0], [3.0, -1.0]])
    episode = explain_episode(encoder, encoder.layer, points([[1.0, 1.0]]), images, [0, 1, 2], similarity=similarity)
    fam = FeatureActivationMap(encoder, encoder.layer, similarity=similarity)
    for own, other in [(1, 0), (0, 1), (1, 2), (1, "rest")]:
        want = fam.attribute(points([[1.0, 1.0]]), own, reference_embedding=images.flatten(1), contrast=other)
        close(episode.contrast(own, other), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_contrast_in_half_precision_is_that_of_fam(similarity, dtype):
    encoder, queries = seeded(PooledEncoder).to(dtype), QUERIES.to(dtype)
    x = random(1, 3, 8, 8, seed=2, dtype=dtype) + random(3, 3, 8, 8, seed=3, dtype=dtype) / 4  # three similar classes
    episode = explain_episode(encoder, encoder.layer, queries, x, [0, 1, 2], similarity=similarity)
    s = prototypes(encoder(x), [0, 1, 2])
    fam = FeatureActivationMap(SimilarityScore(encoder, s, similarity), encoder.layer)
    want = fam.attribute(queries, 0, contrast=1)
    assert episode.map().dtype == episode.contrast(0, 1).dtype == episode.scores.dtype == dtype
    close(episode.contrast(0, 1), want, rtol=0, atol=4 * torch.finfo(dtype).eps * float(want.abs().max()))


# A few queries at a time


PARTS = ("scores", "similarities", "constants", "maps", "signed_maps")


def same(found, wanted):
    assert found.route == wanted.route
    assert torch.equal(found.explainable, wanted.explainable)
    for name in PARTS:
        values = getattr(wanted, name)
        close(getattr(found, name), values, rtol=1e-5, atol=1e-6 * max(1, values.abs().max().item()))


def seen_by(encoder):
    """The sizes of the batches that the encoder is given from now on."""
    sizes = []
    encoder.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    return sizes


@pytest.mark.filterwarnings("ignore:The places of layer")
@pytest.mark.parametrize("most", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("encoder", "D"), [(PooledEncoder, 6), (FlatEncoder, 96)])
@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition])
@each_supported
def test_a_few_queries_at_a_time_have_the_maps_of_all_at_once(name, method, encoder, D, most):
    fitted = classifier_of(name, 5, encoder, D, use_softmax=True)
    layer = fitted.backbone.layer
    whole = explain_episode(fitted, layer, QUERIES, method=method)
    sizes = seen_by(fitted.backbone)
    same(explain_episode(fitted, layer, QUERIES, method=method, internal_batch_size=most), whole)
    assert max(sizes) <= most
    # Prototypes that are rectified by all queries need all embeddings first.
    assert sum(sizes) == (10 if isinstance(fitted, methods.BDCSPN) else 5)
    new = classifier_of(name, None, encoder, D, use_softmax=True)
    same(explain_episode(new, new.backbone.layer, QUERIES, *support(5), method=method, internal_batch_size=most), whole)


@pytest.mark.filterwarnings("ignore:The places of layer")
@pytest.mark.parametrize("encoder", [PooledEncoder, HeadEncoder, FlatEncoder])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition])
def test_a_few_queries_at_a_time_go_through_a_plain_encoder(method, similarity, encoder):
    encoder = seeded(encoder).float()
    options = {"similarity": similarity, "method": method}
    whole = explain_episode(encoder, encoder.layer, QUERIES, *support(1), **options)
    sizes = seen_by(encoder)
    same(explain_episode(encoder, encoder.layer, QUERIES, *support(1), **options, internal_batch_size=2), whole)
    assert sizes == [2, 2, 2, 2, 1]  # the support images, and the queries


def test_parts_that_would_take_another_route_take_that_of_all():
    class Shifted(PooledEncoder):
        """Aligned, but for inputs that are bright."""

        def forward(self, x):
            return super().forward(x) + (x.mean((1, 2, 3)) > 1)[:, None]

    encoder, queries = seeded(Shifted).float(), QUERIES.clone()
    queries[3] += 2
    whole = explain_episode(encoder, encoder.layer, queries, *support(1))
    assert whole.route == "jacobian"
    same(explain_episode(encoder, encoder.layer, queries, *support(1), internal_batch_size=2), whole)
    assert explain_episode(encoder, encoder.layer, queries[:3], *support(1)).route == "aligned"


@each_supported
def test_no_queries_at_a_few_at_a_time_have_no_maps(name):
    fitted = classifier_of(name, 5)
    episode = explain_episode(fitted, fitted.backbone.layer, QUERIES[:0], internal_batch_size=2)
    assert episode.map().shape == (0, 1, 4, 4)
    assert episode.constants.shape == (0, 4)


@pytest.mark.parametrize("most", [0, -1, 2.0, True, "2"])
@each_supported
def test_a_number_of_queries_that_cannot_be_is_named(name, most):
    fitted = classifier_of(name, 5)
    with pytest.raises((TypeError, ValueError), match="`internal_batch_size`"):
        explain_episode(fitted, fitted.backbone.layer, QUERIES, internal_batch_size=most)


# By SimilarityDecomposition, contrasts add up to margins


class UnbiasedEncoder(FlatEncoder):
    """Without biases after ``early``, so that its places add up too."""

    def __init__(self):
        super().__init__()
        self.conv2.bias = None


def totals(maps):
    """What a map adds up to."""
    return maps.flatten(1).mean(1)


@pytest.mark.parametrize("layer", ["layer", "early"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@each_shot
def test_contrasts_of_a_decomposition_add_up_to_margins_with_what_is_of_the_prototypes_alone(similarity, layer, shots):
    encoder, (images, labels), queries = seeded(UnbiasedEncoder), support(shots), QUERIES.double()
    with helpers.silent():
        episode = explain_episode(
            encoder,
            encoder.get_submodule(layer),
            queries,
            images.double(),
            labels,
            similarity=similarity,
            method=SimilarityDecomposition,
        )
    z, embedded = encoder(queries).detach().numpy(), encoder(images.double()).detach().numpy()
    p = np.stack([embedded[labels == k].mean(0) for k in range(4)])
    score = np.array([[oracle.contributions(z_b, p_k, similarity).sum() for p_k in p] for z_b in z])
    alone = -np.square(p).sum(1) if similarity == "euclidean" else np.zeros(4)
    close(episode.similarities, score)
    close(episode.constants, np.tile(alone, (5, 1)))
    close(totals(episode.maps.flatten(0, 1)).reshape(5, 4) + episode.constants, score)
    for a in range(4):
        rest = [k for k in range(4) if k != a]
        best = [max(rest, key=lambda k: row[k]) for row in score]
        for other, margin, constant in [
            *[(b, score[:, a] - score[:, b], np.full(5, alone[a] - alone[b])) for b in rest],
            ("rest", score[:, a] - score[:, rest].mean(1), np.full(5, alone[a] - alone[rest].mean())),
            (None, score[:, a] - score[range(5), best], alone[a] - alone[best]),
        ]:
            close(episode.margin(a, other), margin)
            close(episode.constant(a, other), constant)
            close(totals(episode.contrast(a, other)) + episode.constant(a, other), margin)
    close(episode.constant([0, 1, 2, 3, 0], [2, 3, 1, 1, 3]), alone[[0, 1, 2, 3, 0]] - alone[[2, 3, 1, 1, 3]])
    assert episode.constant().any() == (similarity == "euclidean")


def test_the_maps_of_a_decomposition_are_its_weights_times_what_each_place_gives():
    encoder, (images, labels), queries = seeded(FlatEncoder), support(1), QUERIES.double()
    options = {"similarity": "euclidean", "method": SimilarityDecomposition}
    episode = explain_episode(encoder, encoder.layer, queries, images.double(), labels, **options)
    A, p = encoder.features(queries).detach(), encoder(images.double()).detach()[labels.argsort()]
    f = (2 * p - A.flatten(1)[:, None]).unflatten(2, A.shape[1:])  # each dimension is one channel at one place
    close(episode.maps, 16 * (f * A[:, None]).sum(2))
    close(episode.contrast(2, 1), 16 * (2 * (p[2] - p[1]).reshape(A.shape[1:]) * A).sum(1, keepdim=True))


@pytest.mark.filterwarnings("ignore:The places of layer")  # of MatchingNetworks
@each_shot
@pytest.mark.parametrize(("encoder", "D"), [(PooledEncoder, 6), (FlatEncoder, 96)], ids=["pooled", "flat"])
@each_supported
def test_every_classifier_is_decomposed_into_what_it_compares(name, encoder, D, shots):
    fitted = classifier_of(name, shots, encoder, D)
    with helpers.silent() if name != "MatchingNetworks" else nullcontext():
        episode = explain_episode(fitted, fitted.backbone.layer, QUERIES, method=SimilarityDecomposition)
    scores = copy.deepcopy(fitted)(QUERIES).detach()
    copied, embed, s, similarity = by_hand(fitted)
    named = "euclidean" if similarity is distance else similarity
    with torch.no_grad():
        similarities = CONTRIBUTIONS[named](embed(QUERIES)[:, None], s).sum(2)
    close(episode.scores, scores)
    close(episode.similarities, similarities, rtol=1e-4, atol=1e-5)
    if similarity is distance:
        close(episode.similarities, -(scores**2), rtol=1e-4, atol=1e-5)
    close(episode.constants, -s.square().sum(2) if named == "euclidean" else torch.zeros(5, 4), rtol=1e-4, atol=1e-5)
    decomposition = SimilarityDecomposition(embed, copied.backbone.layer, similarity=named)
    for k in range(4):
        close(episode.map(k), decomposition.attribute(QUERIES, reference_embedding=s[:, k]), rtol=1e-4, atol=1e-5)
    if name != "MatchingNetworks":  # between its layer and its embedding is an LSTM
        found = totals(episode.maps.flatten(0, 1)).reshape(5, 4) + episode.constants
        close(found, similarities, rtol=1e-4, atol=1e-5)
        close(totals(episode.contrast()) + episode.constant(), episode.margin(), rtol=1e-4, atol=1e-5)


def state(model):
    """What a call must leave alone: tensors (the same, and their values), modes, hooks, gradients."""
    found = {}
    for path, module in model.named_modules():
        tensors = {n: t for n, t in vars(module).items() if isinstance(t, torch.Tensor)}
        tensors |= dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for name, t in tensors.items():
            found[path, name] = (id(t), t.tolist(), t.requires_grad, t.grad)
        hooks = {n: list(v) for n, v in vars(module).items() if n.endswith("_hooks") and v}
        found[path] = (module.training, hooks, sorted(vars(module)))
    return found


@pytest.mark.parametrize("training", [False, True])
@each_supported
def test_a_classifier_is_as_it_was(name, training):
    fitted = classifier_of(name, 5, NormEncoder).train(training)
    fitted.backbone.norm.running_mean += 0.5
    library = copy.deepcopy(fitted)
    layer, before = fitted.backbone.layer, state(fitted)
    episode = None
    for arguments in [(), support(1), ()]:
        with pytest.warns(UserWarning, match="training mode") if training else nullcontext():
            found = explain_episode(fitted, layer, QUERIES, *arguments)
        assert state(fitted) == before
        if not arguments and name != "FEAT":  # whose attention drops out in training
            episode = episode or found
            assert torch.equal(found.scores, episode.scores)  # also where the library rectifies in place
            assert torch.equal(found.maps, episode.maps)
    if episode:
        close(episode.scores, library(QUERIES).detach())
    failures = [
        (nn.ReLU(), QUERIES, *support(5)),
        (layer, QUERIES[:, :2]),
        (layer, QUERIES, support(1)[0], [0, 1, 2, 7]),
    ]
    for arguments in failures:
        with pytest.raises((ValueError, RuntimeError)):
            explain_episode(fitted, *arguments)
        assert state(fitted) == before
    with pytest.warns(UserWarning, match="training mode") if training else nullcontext():
        explain_episode(fitted.backbone, layer, QUERIES, *support(1))  # an encoder
    assert state(fitted) == before


def test_prototypes_that_are_saved_with_the_weights_are_left_alone():
    classifier = classifier_of("PrototypicalNetworks", 1)
    prototypes_ = classifier.__dict__.pop("prototypes")
    classifier.register_buffer("prototypes", prototypes_)
    before = state(classifier)
    explain_episode(classifier, classifier.backbone.layer, QUERIES, *support(5, ways=3))
    assert state(classifier) == before


@each_supported
def test_the_backbone_sees_the_queries_once_and_is_not_recorded_before_the_layer(name):
    seen, fitted = [], classifier_of(name, 5)
    fitted.backbone.register_forward_pre_hook(lambda _, x: seen.append((len(x[0]), torch.is_grad_enabled())))
    explain_episode(fitted, fitted.backbone.layer, QUERIES)
    explain_episode(fitted, fitted.backbone.layer, QUERIES, *support(2))
    explain_episode(fitted.backbone, fitted.backbone.layer, QUERIES, *support(3))
    assert explain_episode(fitted, fitted.backbone.layer, QUERIES[:0]).map().shape == (0, 1, 4, 4)
    assert seen == [(n, False) for n in (5, 8, 5, 12, 5, 0)]


@each_supported
def test_gradient_modes(name):
    fitted = classifier_of(name)
    fitted.process_support_set(*support(5))  # with a graph
    want = explain_episode(fitted, fitted.backbone.layer, QUERIES)
    assert not any(value.requires_grad for value in vars(want).values() if isinstance(value, torch.Tensor))
    for mode in (torch.no_grad, torch.inference_mode):
        new = classifier_of(name)
        with mode():
            new.process_support_set(*support(5))  # what is fitted in a mode is explained without it
        close(explain_episode(new, new.backbone.layer, QUERIES).maps, want.maps)
        with mode():
            if mode is torch.inference_mode and want.route == "jacobian":
                with pytest.raises(RuntimeError, match="inference_mode"):
                    explain_episode(new, new.backbone.layer, QUERIES, *support(5))
            else:
                found = explain_episode(new, new.backbone.layer, QUERIES, *support(5))
                close(found.maps, want.maps)


def test_options_are_those_of_fam():
    encoder = seeded(HeadEncoder).float()
    plain = explain_episode(encoder, encoder.layer, QUERIES, *support(2))
    signed = explain_episode(encoder, encoder.layer, QUERIES, *support(2), normalize=None)
    assert torch.equal(signed.maps, signed.signed_maps)
    assert torch.equal(signed.maps, plain.signed_maps)
    assert not torch.equal(signed.maps, plain.maps)
    options = {"output_selector": lambda output: output["z"], "reshape_transform": lambda a: a.mT}
    turned = explain_episode(lambda x: {"z": encoder(x)}, encoder.layer, QUERIES, *support(2), **options)
    close(turned.maps, plain.maps.mT)


x1, y1 = support(1)
x5, y5 = support(5)
Halved = type("Halved", (methods.PrototypicalNetworks,), {"forward": lambda self, images: self.prototypes / 2})
ENCODER, PROTONET = seeded(PooledEncoder).float(), classifier_of("PrototypicalNetworks")
CALLS = {
    "no support": (ENCODER, [QUERIES], "support_images"),
    "no labels": (ENCODER, [QUERIES, x1], "support_labels"),
    "no images": (PROTONET, [QUERIES, None, y1], "support_images"),
    "no queries": (PROTONET, [None, x1, y1], "query_images"),
    "few labels, encoder": (ENCODER, [QUERIES, x5, y1], "label"),
    "few labels": (PROTONET, [QUERIES, x5, y1], "support_labels"),
    "many labels": (PROTONET, [QUERIES, x1, y5], "support_labels"),
    "one-hot labels": (PROTONET, [QUERIES, x1, F.one_hot(y1)], "support_labels"),
    "float labels": (PROTONET, [QUERIES, x1, y1.float()], "support_labels"),
    "named labels": (PROTONET, [QUERIES, x1, list("abcd")], "support_labels"),
    "labels from 1": (PROTONET, [QUERIES, x1, y1 + 1], r"\[1, 2, 3, 4\].*number the classes"),
    "labels with gaps": (PROTONET, [QUERIES, x1, y1 * 2], r"\[0, 2, 4, 6\]"),
    "a layer of two tensors": (
        seeded(TwoInputEncoder).float(),
        [(QUERIES, QUERIES[:, :1]), (x1, x1[:, :1]), y1],
        "`layer` to be one module that returns one tensor",
    ),
    "two tensors of images": (PROTONET, [QUERIES, (x1, x1), y1], "support_images"),
    **{f"{n} not fitted": (classifier_of(n), [QUERIES], f"{n.split(',')[0]} has not.*process_supp") for n in SUPPORTED},
    **{
        n: (getattr(methods, n)(PooledEncoder()), [QUERIES, x1, y1], f"{n} cannot be explained by FAM: ")
        for n in ("TIM", "Finetune", "PTMAP", "TransductiveFinetuning")
    },
    "Relation": (methods.RelationNetworks(MapEncoder(), feature_dimension=6), [QUERIES, x1, y1], "LayerGradCam"),
    "LaplacianShot": (methods.LaplacianShot(PooledEncoder()), [QUERIES, x1, y1], "With lambda_regularization=0"),
}


@pytest.mark.parametrize(("model", "arguments", "message"), CALLS.values(), ids=CALLS.keys())
def test_what_cannot_be_explained_is_refused(model, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        explain_episode(model, getattr(model, "backbone", model).layer, *arguments)


@pytest.mark.parametrize(
    ("model", "layer", "options", "message"),
    [
        (PROTONET, PROTONET.backbone.layer, {"similarity": "cosine"}, "no `similarity`, because PrototypicalNetworks"),
        (ENCODER, [ENCODER.layer, ENCODER.early], {}, "`layer` to be one module that returns one tensor"),
        (ENCODER, "layer", {}, "`layer`"),
        (Halved(ENCODER), ENCODER.layer, {}, "Halved cannot be explained"),
        *[
            (
                model,
                ENCODER.layer,
                {"method": method},
                "`method` of explain_episode to be one of",
            )
            for model in (ENCODER, classifier_of("PrototypicalNetworks", encoder=lambda: ENCODER))
            for method in (LayerGradCam, "Feature", None)
        ],
        (
            ENCODER,
            ENCODER.layer,
            {"method": FeatureActivationMap(ENCODER, ENCODER.layer)},
            "`method` of explain_episode.*an instance",
        ),
        (
            ENCODER,
            ENCODER.layer,
            {"method": SimilarityDecomposition, "similarity": lambda z, s: z * s},
            "`similarity`.*has no such decomposition",
        ),
    ],
)
def test_other_arguments_are_refused(model, layer, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        explain_episode(model, layer, QUERIES, x1, y1, **options)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda e: e.map(9), r"\[0, 1, 2, 3\].*9"),
        (lambda e: e.map([0, 1, 9, 0, 0]), r"\[0, 1, 2, 3\].*9"),
        (lambda e: e.map([0, 1]), "label"),
        (lambda e: e.map("cat"), "label"),
        (lambda e: e.contrast(9), "9"),
        (lambda e: e.contrast(0, 9), "9"),
        (lambda e: e.contrast(0, "best"), '"rest".*best'),
        (lambda e: e.margin(0, "best"), '"rest".*best'),
        (lambda e: e.constant(9), "9"),
        (lambda e: e.constant(0, "best"), '"rest".*best'),
    ],
)
def test_classes_that_are_not_there_are_refused(ask, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ask(explain_episode(ENCODER, ENCODER.layer, QUERIES, x1, y1))


def test_one_class_has_a_map_and_no_contrast():
    episode = explain_episode(PROTONET, PROTONET.backbone.layer, QUERIES, x1, [0] * 4)
    assert episode.map().shape == (5, 1, 4, 4)
    for ask in (episode.contrast, episode.margin, episode.constant):
        with pytest.raises(ValueError, match="two classes"):
            ask()


def test_the_advice_for_relation_networks_works():
    classifier = seeded(lambda: methods.RelationNetworks(MapEncoder(), feature_dimension=6)).float()
    classifier.process_support_set(x1, y1)
    maps = LayerGradCam(classifier, classifier.backbone.layer).attribute(QUERIES, 2)
    A = classifier.backbone(QUERIES).detach().requires_grad_()
    classifier.backbone, backbone = nn.Identity(), classifier.backbone
    (gradient,) = torch.autograd.grad(classifier(A)[:, 2].sum(), A)
    close(maps, (gradient.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True))
    assert maps.std() > 0
    # And so does the backbone as an encoder, once it is pooled.
    episode = explain_episode(lambda x: backbone(x).mean((2, 3)), backbone.layer, QUERIES, x1, y1)
    assert episode.route == "aligned"


def drawn(photos, transform, seed, shots, queries=3):
    """Images and labels of a 5-way episode, support and queries, from a zip file whose folders are classes."""
    draw, classes = lottery.Random(seed), {}
    with zipfile.ZipFile(Path(DATA) / "photos" / photos) as zipped:
        for name in sorted(n for n in zipped.namelist() if re.match("(test|images).*(png|jpg)$", n)):
            classes.setdefault(name.rpartition("/")[0], []).append(name)
        names = [draw.sample(classes[k], shots + queries) for k in draw.sample(sorted(classes), 5)]
        images = [[transform(Image.open(io.BytesIO(zipped.read(n)))) for n in way] for way in names]
    sides = [i for way in images for i in way[:shots]], [i for way in images for i in way[shots:]]
    return *map(torch.stack, sides), *(torch.arange(5).repeat_interleave(n) for n in (shots, queries))


@functools.cache
def pretrained(name):
    spec = importlib.util.spec_from_file_location("pretrained_encoders", Path(DATA) / "encoders.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.load(name)


def each_real(test):
    """For each of the pretrained ProtoNets, photographs, and its last map before it is flattened."""
    needed = pytest.mark.skipif(DATA is None, reason="set CAPTUM_FAM_DATA to the folder of pretrained encoders")
    return needed(
        pytest.mark.parametrize(
            ("name", "photos", "layer"),
            [
                ("protonet_omniglot", "omniglot_small1.zip", "features.3.2"),
                ("protonet_miniimagenet", "clothing.zip", "features.3"),
                ("protonet_orobix", "clothing.zip", "features.3"),
            ],
        )(test)
    )


@each_real
@each_shot
def test_real_prototypical_networks(name, photos, layer, shots):
    encoder = pretrained(name)
    layer, library = encoder.net.get_submodule(layer), methods.PrototypicalNetworks(encoder.net).eval()
    right = []
    for seed in range(6 if name == "protonet_omniglot" else 1):
        images, queries, labels, wanted = drawn(photos, encoder.transform, seed, shots)
        with torch.no_grad():
            library.process_support_set(images, labels)
            scores = library(queries)
        episode = explain_episode(library, layer, queries)
        close(episode.scores, scores)
        right += (episode.predicted == wanted).tolist()
    if name == "protonet_omniglot":
        assert sum(right) / len(right) > 0.8  # chance: 0.2
    ours = explain_episode(encoder.net, layer, queries, images, labels, similarity="euclidean")
    assert episode.route == ours.route == "jacobian"
    close(ours.scores, -(scores**2), rtol=1e-4, atol=1e-3)
    close(ours.maps, episode.maps, rtol=1e-3, atol=1e-3 * float(ours.maps.abs().max()))
    for maps in (episode.map(), episode.contrast(), episode.contrast(other="rest")):
        assert maps.isfinite().all()
        assert (maps.flatten(1).std(1) > 1e-3 * maps.abs().amax((1, 2, 3))).all()
    assert (episode.margin() > 0).all()


@each_real
@each_shot
def test_contrasts_of_real_prototypical_networks_add_up_to_the_margin_and_have_its_sign(name, photos, layer, shots):
    encoder = pretrained(name)
    layer, library = encoder.net.get_submodule(layer), methods.PrototypicalNetworks(encoder.net).eval()
    images, queries, labels, _ = drawn(photos, encoder.transform, 0, shots)
    with torch.no_grad():
        library.process_support_set(images, labels)
        squared = library(queries).double() ** 2
    options = {"method": SimilarityDecomposition, "internal_batch_size": 4}
    with helpers.silent():  # the places add up
        of_library = explain_episode(library, layer, queries, **options)
        ours = explain_episode(encoder.net, layer, queries, images, labels, similarity="euclidean", **options)
    rows = torch.arange(len(queries))
    for episode in (ours, of_library):
        for a in range(5):
            for b in range(5):
                found = (totals(episode.contrast(a, b)) + episode.constant(a, b)).double()
                margin = squared[rows, b] - squared[rows, a]
                close(found, episode.margin(a, b).double(), rtol=1e-4, atol=1e-4 * squared.max().item())
                close(found, margin, rtol=1e-4, atol=1e-4 * squared.max().item())
                assert a == b or torch.equal(found.sign(), margin.sign())
        found = totals(episode.contrast()) + episode.constant()  # the predicted class and the runner-up
        assert (found > 0).all()
