"""Why a faiss index returned these hits."""

import functools
import importlib.util
import io
import os
import warnings
import zipfile
from pathlib import Path

import helpers
import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from encoders import FlatEncoder, HeadEncoder, Modified, PooledEncoder, random, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from captum_fam import (
    ClassActivationMap,
    FeatureActivationMap,
    RetrievalExplanation,
    SimilarityDecomposition,
    demo,
    explain_retrieval,
)
from captum_fam.bundled import bundled_encoder
from captum_fam.images import to_tensor

faiss = pytest.importorskip("faiss")

DATA = os.environ.get("CAPTUM_FAM_DATA")
N, D = 12, 6
ENCODER = seeded(PooledEncoder).float()
GALLERY = random(N, 3, 8, 8, seed=5, dtype=torch.float32)
QUERY = random(3, 3, 8, 8, dtype=torch.float32)
IDS = np.arange(N)[::-1].copy()


class GemEncoder(PooledEncoder):
    """Generalised-mean pooling with a learned power."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.features(x).clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


class Seen(nn.Module):
    """Keeps the images that it embeds."""

    def __init__(self, encoder=ENCODER):
        super().__init__()
        self.encoder, self.layer, self.batches = encoder, encoder.layer, []

    def forward(self, x):
        self.batches.append(x.clone())
        return self.encoder(x)


NORMALISED = Modified(ENCODER, F.normalize)
GEM = seeded(GemEncoder).float()
HEAD = seeded(HeadEncoder).float()


def embed(encoder, images):
    with torch.no_grad():
        return encoder(images).float().numpy()


def flat(vectors, metric=faiss.METRIC_L2):
    return filled(faiss.IndexFlat(vectors.shape[1], metric), vectors)


def filled(index, vectors, ids=None):
    index.train(vectors)
    if ids is None:
        index.add(vectors)
    else:
        index.add_with_ids(vectors, ids)
    return index


def inverted_file(metric, probes=3):
    """Every vector in one of three cells; a search looks into ``probes`` of them."""
    index = faiss.IndexIVFFlat(faiss.IndexFlat(D, metric), D, 3, metric)
    index.cp.min_points_per_centroid = 1
    filled(index, embed(ENCODER, GALLERY)).make_direct_map()
    index.nprobe = probes
    return index


def explain(index, query=QUERY, encoder=ENCODER, gallery=None, k=4, **options):
    return explain_retrieval(query, index, encoder, encoder.layer, gallery, k, **options)


close = functools.partial(helpers.close, rtol=1e-4, atol=1e-5)
VECTORS = embed(ENCODER, GALLERY)
L2, IP = faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT
INDICES = {
    "IndexFlatIP": lambda: filled(faiss.IndexFlatIP(D), VECTORS),
    "IndexFlatL2": lambda: filled(faiss.IndexFlatL2(D), VECTORS),
    "HNSW IP": lambda: filled(faiss.IndexHNSWFlat(D, 8, IP), VECTORS),
    "HNSW L2": lambda: filled(faiss.IndexHNSWFlat(D, 8, L2), VECTORS),
    "IDMap2 IP": lambda: filled(faiss.IndexIDMap2(faiss.IndexFlatIP(D)), VECTORS, IDS),
    "IDMap2 L2": lambda: filled(faiss.IndexIDMap2(faiss.IndexFlatL2(D)), VECTORS, IDS),
    "IVF IP": lambda: inverted_file(IP),
    "IVF L2": lambda: inverted_file(L2),
}
each_index = pytest.mark.parametrize("build", INDICES.values(), ids=INDICES.keys())


def check(found, index, encoder, query, k, gallery=None, similarity=None, number=lambda i: i):
    """The explanation, hit by hit, against faiss's own search and against FAM of one pair at a time."""
    z = encoder(query).detach()
    cosine = similarity == "cosine"
    scores, indices = index.search((F.normalize(z.float()) if cosine else z.float()).numpy(), k)
    assert found.indices.tolist() == indices.tolist()
    np.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-6 * cosine)  # faiss's, to the bit
    sign = 1 if index.metric_type == IP else -1
    close(found.similarities.float(), sign * torch.from_numpy(scores))
    name = similarity or ("dot" if sign == 1 else "euclidean")
    fam = FeatureActivationMap(encoder, encoder.layer, similarity=name)
    signed = FeatureActivationMap(encoder, encoder.layer, similarity=name, normalize=None)
    for b, row in enumerate(indices.tolist()):
        s = torch.from_numpy(np.stack([index.reconstruct(i) for i in row])).to(z)
        x = query[b : b + 1].expand(k, -1, -1, -1)
        close(found.maps[b], fam.attribute(x, reference_embedding=s)[:, 0])
        close(found.signed_maps[b], signed.attribute(x, reference_embedding=s)[:, 0])
        if gallery is not None:
            hits = torch.stack([gallery[number(i)] for i in row])
            close(found.hit_maps[b], fam.attribute(hits, reference_embedding=z[b : b + 1])[:, 0])
        if k > 1:
            one = fam.attribute(query[b : b + 1], 1, reference_embedding=s, contrast=0)
            close(found.contrast(1, 0)[b], one[0])
            rest = fam.attribute(query[b : b + 1], 1, reference_embedding=s, contrast="rest")
            close(found.contrast(1)[b], rest[0])


# Hits, scores and maps


@each_index
def test_hits_and_scores_are_those_of_faiss_and_maps_those_of_each_pair(build):
    index = build()
    inverse = np.argsort(IDS) if isinstance(index, faiss.IndexIDMap2) else np.arange(N)
    images = GALLERY[inverse.tolist()]  # by their number in the index
    with helpers.silent():
        found = explain(index, gallery=images)
    assert isinstance(found, RetrievalExplanation)
    assert found.route == "aligned"
    assert found.maps.shape == found.signed_maps.shape == found.hit_maps.shape == (3, 4, 4, 4)
    check(found, index, ENCODER, QUERY, 4, images)


@pytest.mark.parametrize(
    ("encoder", "route"), [(ENCODER, "aligned"), (NORMALISED, "aligned"), (GEM, "jacobian"), (HEAD, "jacobian")]
)
@pytest.mark.parametrize(("metric", "similarity"), [(L2, None), (IP, None), (IP, "cosine")])
def test_every_kind_of_pooling_is_explained_and_says_which_route_it_takes(encoder, route, metric, similarity):
    vectors = embed(encoder, GALLERY)
    index = flat(F.normalize(torch.from_numpy(vectors)).numpy() if similarity else vectors, metric)
    found = explain(index, encoder=encoder, gallery=GALLERY, similarity=similarity)
    assert found.route == FeatureActivationMap(encoder, encoder.layer).route(QUERY) == route
    check(found, index, encoder, QUERY, 4, GALLERY, similarity)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(1, 4), st.integers(1, N), st.sampled_from([L2, IP]), st.integers(0, 99), st.booleans())
def test_any_number_of_queries_and_hits(B, k, metric, seed, with_gallery):
    query, gallery = random(B, 3, 8, 8, seed=seed, dtype=torch.float32), GALLERY if with_gallery else None
    index = flat(VECTORS, metric)
    found = explain(index, query, gallery=gallery, k=k)
    check(found, index, ENCODER, query, k, gallery)
    assert (found.hit_maps is None) == (gallery is None)


def test_a_score_computed_by_hand():
    encoder = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    query = torch.tensor([[[[4.0, 0.0]], [[0.0, 2.0]]]])  # channel 0 on the left, 1 on the right; z = (2, 1)
    index = flat(np.array([[2, 3], [5, 1], [2, 1]], np.float32))
    found = explain_retrieval(query, index, encoder, encoder[0], k=3)
    assert (found.indices.tolist(), found.scores.tolist()) == ([[2, 0, 1]], [[0, 4, 9]])
    assert found.similarities.tolist() == [[0, -4, -9]]
    # Hit 2 is equal to the query in all dimensions, hit 0 in the first alone, hit 1 in the second alone.
    assert found.maps.tolist() == [[[[4, 2]], [[4, 0]], [[0, 2]]]]
    assert found.signed_maps.tolist() == [[[[0, 0]], [[0, -8]], [[-36, 0]]]]
    assert found.constants.tolist() == [[0, 0, 0]]
    assert found.contrast(1, 2).tolist() == [[[[36, -8]]]]
    assert found.contrast(1).tolist() == [[[[18, -8]]]]


def test_a_decomposition_computed_by_hand():
    encoder = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    query = torch.tensor([[[[4.0, 0.0]], [[0.0, 2.0]]]])  # channel 0 on the left, 1 on the right; z = (2, 1)
    index = flat(np.array([[2, 3], [5, 1], [2, 1]], np.float32))
    found = explain_retrieval(query, index, encoder, encoder[0], k=3, method=SimilarityDecomposition)
    assert found.indices.tolist() == [[2, 0, 1]]
    # The weights 2s - z are (2, 1), (2, 5) and (8, 1).
    assert found.maps.tolist() == found.signed_maps.tolist() == [[[[8, 2]], [[8, 10]], [[32, 2]]]]
    assert found.constants.tolist() == [[-5, -13, -26]]
    assert found.similarities.tolist() == [[0, -4, -9]]  # 5 - 5, 9 - 13, 17 - 26
    assert found.contrast(1, 2).tolist() == [[[[-24, 8]]]]  # -8 on average; -4 + 9 is that and 26 - 13


def test_more_hits_than_the_index_holds_are_what_faiss_returns():
    index = flat(VECTORS)
    found = explain(index, gallery=GALLERY, k=N + 3)
    scores, indices = index.search(embed(ENCODER, QUERY), N + 3)
    assert found.indices.tolist() == indices.tolist()
    np.testing.assert_array_equal(found.scores.numpy(), scores)
    assert not found.maps[:, N:].any()
    assert not found.hit_maps[:, N:].any()
    close(found.maps[:, :N], explain(index, k=N).maps)


@pytest.mark.parametrize("metric", [L2, IP])
def test_what_was_not_found_is_no_cause_for_a_warning(metric):
    with helpers.silent():
        explain(inverted_file(metric, probes=1), gallery=GALLERY, k=N)


@pytest.mark.filterwarnings("ignore:Embeddings are zero")
@pytest.mark.parametrize("metric", [L2, IP])
def test_what_was_not_found_has_an_empty_map_and_no_part_in_the_rest(metric):
    index = inverted_file(metric, probes=1)
    found = explain(index, gallery=GALLERY, k=N)
    scores, indices = index.search(embed(ENCODER, QUERY), N)
    assert found.indices.tolist() == indices.tolist()
    np.testing.assert_array_equal(found.scores.numpy(), scores)
    missing = torch.from_numpy(indices < 0)
    assert missing.any()
    for maps in (found.maps, found.signed_maps, found.hit_maps):
        assert not maps[missing].any()
    full = explain(flat(VECTORS, metric), gallery=GALLERY, k=N)
    for b in range(len(QUERY)):
        count = int((~missing[b]).sum())
        ranks = [full.indices[b].tolist().index(i) for i in indices[b, :count]]
        for name in ("similarities", "maps", "signed_maps", "hit_maps"):
            close(getattr(found, name)[b, :count], getattr(full, name)[b, ranks])
        others = found.signed_maps[b, 1:count].mean(0)
        close(found.contrast(0)[b, 0], found.signed_maps[b, 0] - others)


def test_query_and_gallery_may_have_other_sizes():
    query = random(2, 3, 12, 16, dtype=torch.float32)
    index = flat(VECTORS)
    found = explain(index, query, gallery=GALLERY)
    assert found.maps.shape == (2, 4, 6, 8)
    assert found.hit_maps.shape == (2, 4, 4, 4)
    check(found, index, ENCODER, query, 4, GALLERY)


class Labelled(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return GALLERY[i], f"label {i}"

    def __len__(self):
        return N


@pytest.mark.parametrize("gallery", [GALLERY, list(GALLERY), Labelled(), torch.utils.data.TensorDataset(GALLERY)])
def test_a_gallery_is_a_tensor_a_list_or_a_data_set_with_labels(gallery):
    close(explain(flat(VECTORS), gallery=gallery).hit_maps, explain(flat(VECTORS), gallery=GALLERY).hit_maps)


@pytest.mark.parametrize(("metric", "similarity"), [(L2, "euclidean"), (IP, "dot")])
def test_a_similarity_may_be_the_librarys_object(metric, similarity):
    pml = pytest.importorskip("pytorch_metric_learning.distances")
    kind = {L2: lambda **o: pml.LpDistance(power=2, **o), IP: pml.DotProductSimilarity}[metric]
    index = flat(VECTORS, metric)
    found, named = (explain(index, similarity=s) for s in (kind(normalize_embeddings=False), similarity))
    assert torch.equal(found.maps, named.maps)


def test_the_query_is_embedded_once_and_of_the_gallery_the_hits_alone():
    encoder, index = Seen(), flat(VECTORS)
    found = explain(index, encoder=encoder)
    assert [len(batch) for batch in encoder.batches] == [3]
    assert torch.equal(encoder.batches[0], QUERY)

    encoder.batches.clear()
    found = explain(index, encoder=encoder, gallery=GALLERY)
    seen = torch.cat(encoder.batches)
    of_query = [any(torch.equal(x, q) for q in QUERY) for x in seen]
    assert sum(of_query) == 3
    numbers = [next(i for i in range(N) if torch.equal(x, GALLERY[i])) for x, q in zip(seen, of_query) if not q]
    assert set(numbers) == set(found.indices.flatten().tolist()) != set(range(N))
    assert len(numbers) <= found.indices.numel()


@pytest.mark.parametrize("options", [{"normalize": None}, {"channel_weights": "jacobian"}])
def test_options_are_those_of_fam(options):
    found = explain(flat(VECTORS), gallery=GALLERY, **options)
    fam = FeatureActivationMap(ENCODER, ENCODER.layer, similarity="euclidean", **options)
    for b, row in enumerate(found.indices):
        maps = fam.attribute_all(QUERY[b : b + 1], reference_embedding=torch.from_numpy(VECTORS[row]))
        close(found.maps[b], maps[0])
    assert found.route == options.get("channel_weights", "aligned")


# A few images at a time


PARTS = ("scores", "similarities", "constants", "maps", "signed_maps", "hit_maps")


@pytest.mark.filterwarnings("ignore:The places of layer")
@pytest.mark.parametrize("most", [1, 2, 3, 7])
@pytest.mark.parametrize(("encoder", "route"), [(ENCODER, "aligned"), (GEM, "jacobian"), (HEAD, "jacobian")])
@pytest.mark.parametrize(("metric", "similarity"), [(L2, None), (IP, None), (IP, "cosine")])
@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition])
def test_a_few_images_at_a_time_have_the_maps_of_all_at_once(method, encoder, route, metric, similarity, most):
    vectors = torch.from_numpy(embed(encoder, GALLERY))
    index = flat((F.normalize(vectors) if similarity else vectors).numpy(), metric)
    options = {"gallery": GALLERY, "similarity": similarity, "method": method}
    whole, seen = explain(index, encoder=encoder, **options), Seen(encoder)
    found = explain(index, encoder=seen, internal_batch_size=most, **options)
    assert found.route == whole.route == route
    assert torch.equal(found.indices, whole.indices)
    assert torch.equal(found.explainable, whole.explainable)
    for name in PARTS:
        values = getattr(whole, name)
        close(getattr(found, name), values, rtol=1e-5, atol=1e-6 * max(1, values.abs().max().item()))
    assert max(map(len, seen.batches)) <= most
    assert torch.equal(torch.cat(seen.batches)[:3], QUERY)
    assert sum(map(len, seen.batches)) == 3 + 3 * 4  # each query, and each of its hits


@pytest.mark.parametrize("most", [0, -1, 2.0, True])
def test_a_number_of_images_that_cannot_be_is_named(most):
    with pytest.raises((TypeError, ValueError), match="`internal_batch_size`"):
        explain(flat(VECTORS), internal_batch_size=most)


# By SimilarityDecomposition, maps add up to what the index returned


FLAT = seeded(FlatEncoder).float()


@pytest.mark.parametrize(
    ("encoder", "route"), [(ENCODER, "aligned"), (NORMALISED, "aligned"), (GEM, "jacobian"), (FLAT, "jacobian")]
)
@pytest.mark.parametrize(("metric", "similarity"), [(L2, None), (IP, None), (IP, "cosine")])
def test_maps_of_a_decomposition_add_up_to_the_score_of_the_index(encoder, route, metric, similarity):
    vectors = embed(encoder, GALLERY)
    index = flat(F.normalize(torch.from_numpy(vectors)).numpy() if similarity else vectors, metric)
    with helpers.silent():
        found = explain(index, encoder=encoder, gallery=GALLERY, similarity=similarity, method=SimilarityDecomposition)
    z = embed(encoder, QUERY)
    scores, indices = index.search(F.normalize(torch.from_numpy(z)).numpy() if similarity else z, 4)
    scores = -scores if metric == L2 else scores
    s = np.stack([[index.reconstruct(i) for i in row] for row in indices.tolist()])
    of_hits = -np.square(s).sum(2) if metric == L2 else np.zeros_like(scores)
    of_queries = -np.square(z).sum(1, keepdims=True) if metric == L2 else np.zeros_like(scores)
    assert found.route == route
    assert torch.equal(found.maps, found.signed_maps)
    assert found.indices.tolist() == indices.tolist()
    close(found.constants, of_hits)
    close(found.similarities, scores)
    close(found.maps.mean((2, 3)) + found.constants, scores)
    close(found.hit_maps.mean((2, 3)) + torch.from_numpy(of_queries), scores)
    for rank, other, rest in [(0, 1, [1]), (2, 0, [0]), (1, "rest", [0, 2, 3])]:
        margin = (scores[:, rank] - scores[:, rest].mean(1)) - (of_hits[:, rank] - of_hits[:, rest].mean(1))
        close(found.contrast(rank, other).mean((1, 2, 3)), margin)


@pytest.mark.parametrize("metric", [L2, IP])
def test_maps_of_a_decomposition_are_those_of_each_pair(metric):
    index = flat(embed(FLAT, GALLERY), metric)
    found = explain(index, encoder=FLAT, gallery=GALLERY, method=SimilarityDecomposition)
    name = "dot" if metric == IP else "euclidean"
    A, hits = (FLAT.features(x).detach() for x in (QUERY, GALLERY))  # each dimension is one channel at one place
    for b, row in enumerate(found.indices.tolist()):
        for rank, number in enumerate(row):
            for own, other, map_ in [
                (A[b], hits[number], found.maps[b, rank]),
                (hits[number], A[b], found.hit_maps[b, rank]),
            ]:
                f = oracle.decomposition_weights(own.flatten().numpy(), other.flatten()[None].numpy(), 0, name)
                close(map_.double(), own[0].numel() * (f.reshape(own.shape) * own.double().numpy()).sum(0))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (None, "one of CorrespondenceMap, .*, but got None"),
        ("Decomposition", "but got Decomposition. Did you mean 'SimilarityDecomposition'"),
        ("LayerGradCam", "Captum's: compare_attributions"),
        (LayerGradCam, r"LayerGradCam\(SimilarityScore"),
        (ClassActivationMap, "explains classifiers; SimilarityDecomposition is the same"),
        (FeatureActivationMap(ENCODER, ENCODER.layer), "an instance: pass its class"),
    ],
)
def test_what_is_no_method_of_similarities_is_refused(method, message):
    encoder = Seen()
    with pytest.raises(ValueError, match=f"`method` of explain_retrieval to be .*{message}"):
        explain(flat(VECTORS), encoder=encoder, method=method)
    assert not encoder.batches


# Other precisions and modes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", [L2, IP])
def test_encoders_of_other_precision_keep_it(dtype, metric):
    encoder = seeded(PooledEncoder).to(dtype)
    query, gallery = QUERY.to(dtype), GALLERY.to(dtype)
    index = flat(embed(encoder, gallery), metric)
    with helpers.silent():
        found = explain(index, query, encoder, gallery)
    scores, indices = index.search(embed(encoder, query), 4)
    assert found.indices.tolist() == indices.tolist()
    np.testing.assert_array_equal(found.scores.float().numpy(), scores)
    assert found.maps.dtype == found.hit_maps.dtype == dtype
    fam = FeatureActivationMap(encoder, encoder.layer, similarity="dot" if metric == IP else "euclidean")
    for b, row in enumerate(indices.tolist()):
        s = torch.from_numpy(np.stack([index.reconstruct(i) for i in row])).to(dtype)
        tolerance = 8 * torch.finfo(dtype).eps + 1e-6
        wanted = fam.attribute_all(query[b : b + 1], reference_embedding=s)[0]
        close(found.maps[b], wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_without_gradients_where_the_route_allows(context):
    with context():
        found = explain(flat(VECTORS), gallery=GALLERY)
    wanted = explain(flat(VECTORS), gallery=GALLERY)
    assert torch.equal(found.maps, wanted.maps)
    assert torch.equal(found.hit_maps, wanted.hit_maps)
    index = flat(embed(HEAD, GALLERY))
    if context is torch.no_grad:
        with context():
            close(explain(index, encoder=HEAD).maps, explain(index, encoder=HEAD).maps)
    else:
        with context(), pytest.raises(RuntimeError, match="inference_mode"):
            explain(index, encoder=HEAD)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("build", [PooledEncoder, GemEncoder])
def test_the_model_and_the_index_are_left_as_they_were(build, fails):
    model = seeded(build).float()
    model.conv2.weight.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    model.register_buffer("count", torch.tensor(3))
    index, query = flat(embed(model, GALLERY)), QUERY.clone().requires_grad_()

    def state():
        return (
            [(p.requires_grad, None if p.grad is None else p.grad.tolist(), p.tolist()) for p in model.parameters()],
            [b.tolist() for b in model.buffers()],
            [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            (query.requires_grad, query.grad, query.tolist(), torch.is_grad_enabled()),
            (index.ntotal, index.reconstruct_n(0, N).tolist()),
        )

    before = state()
    if fails:
        with pytest.raises(TypeError, match="gallery"):
            explain(index, query, model, [g.numpy() for g in GALLERY])
    else:
        found = explain(index, query, model, GALLERY)
        assert not any(t.requires_grad for t in (found.maps, found.hit_maps, found.similarities, found.contrast()))
    assert state() == before


# What is doubtful, and what cannot work


@pytest.mark.parametrize("scale", [1, 0.01])
@pytest.mark.parametrize("metric", [L2, IP])
@pytest.mark.parametrize(("factory", "lossy"), [("PCA3,Flat", True), ("Flat", False)])
def test_an_index_whose_scores_are_not_those_of_its_vectors_is_named(factory, lossy, metric, scale):
    encoder = Modified(ENCODER, lambda z: z * scale * torch.arange(1, D + 1))
    index = filled(faiss.index_factory(D, factory, metric), embed(encoder, GALLERY))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = explain(index, encoder=encoder)
    scores, _ = index.search(embed(encoder, QUERY), 4)
    np.testing.assert_array_equal(found.scores.numpy(), scores)
    s = torch.from_numpy(np.stack([index.reconstruct(i) for i in found.indices[0].tolist()]))
    z = torch.from_numpy(embed(encoder, QUERY[:1]))
    close(found.similarities[0], (z @ s.mT)[0] if metric == IP else -(z - s).square().sum(1), atol=1e-9)
    assert ["lossy" in str(w.message) for w in caught] == [True] * lossy


def test_a_lossy_index_of_normalised_vectors_is_one_of_cosines():
    vectors = F.normalize(random(700, D, seed=5)).float().numpy()
    index = faiss.IndexPQ(D, 2, 4, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    with pytest.warns(UserWarning, match="lossy"):
        found = explain(index, similarity="cosine")
    assert not torch.allclose(found.similarities, found.scores.to(found.similarities))
    assert found.maps.any()


@pytest.mark.parametrize("length", [0.85, 1.15])
def test_an_exact_index_of_vectors_that_are_not_normalised_is_refused_for_the_cosine(length):
    vectors = length * F.normalize(random(12, D, seed=5)).float().numpy()
    with pytest.raises(ValueError, match="normalize_L2"):
        explain(flat(vectors, IP), similarity="cosine")


def test_a_query_without_any_hit_has_empty_maps():
    query = QUERY.clone()
    query[1] = float("nan")  # faiss finds nothing near
    with pytest.warns(UserWarning, match="not finite"):
        found = explain(flat(VECTORS), query, gallery=GALLERY)
    assert found.indices[1].tolist() == [-1] * 4
    assert not found.maps[1].any()
    assert not found.hit_maps[1].any()
    close(found.hit_maps[::2], explain(flat(VECTORS), gallery=GALLERY).hit_maps[::2])


@pytest.mark.parametrize(
    ("order", "named"),
    [([*range(N)][::-1], r"\[0, 2, 5\]"), ([2, 1, 0, *range(3, N)], r"\[0, 2\]")],
    ids=["all", "alike"],
)
def test_a_gallery_in_another_order_is_named_by_its_images(order, named):
    """Also where the images that changed places are alike: the embeddings of 0 and 2 have a cosine of 0.9956."""
    index = flat(VECTORS)
    assert set(explain(index, k=3).indices.flatten().tolist()) == {0, 2, 5}
    with pytest.warns(UserWarning, match=rf"gallery's images {named} are not") as caught:
        explain(index, gallery=GALLERY[order], k=3)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (lambda: filled(faiss.IndexFlat(D, faiss.METRIC_L1), VECTORS), {}, r"`index`.*inner products or L2.*IndexFlat"),
        (lambda: faiss.IndexFlatL2(D), {}, r"`index`.*empty.*add"),
        (lambda: flat(VECTORS[:, :5].copy()), {}, r"5 dimensions.*`query`.*6.*same encoder"),
        (lambda: flat(VECTORS, IP), {"similarity": "cosine"}, r"cosine.*normalise.*faiss\.normalize_L2"),
        (lambda: flat(VECTORS, IP), {"similarity": "euclidean"}, r"inner products.*`similarity`.*'dot' or 'cosine'"),
        (lambda: flat(VECTORS), {"similarity": "cosine"}, r"cosine.*normalise.*faiss\.normalize_L2"),
        (lambda: flat(VECTORS), {"similarity": "dot"}, r"L2.*`similarity`.*'euclidean' or 'cosine'.*'dot'"),
        (lambda: flat(VECTORS), {"k": 0}, r"`k`.*positive.*0"),
        (lambda: flat(VECTORS), {"k": 2.0}, r"`k`.*positive int.*2\.0"),
        (lambda: VECTORS, {}, r"`index`.*faiss index.*ndarray"),
        (lambda: flat(VECTORS), {"query": QUERY.numpy()}, r"`query`.*tensor.*ndarray"),
        (lambda: flat(VECTORS), {"query": QUERY[0]}, r"`inputs`.*batch"),
        (lambda: flat(VECTORS), {"gallery": [x[:, : 4 + i] for i, x in enumerate(GALLERY)]}, r"one shape in `gallery`"),
        (lambda: flat(VECTORS), {"gallery": list(GALLERY.numpy())}, r"gallery\[\d+\].*image.*ndarray.*transform"),
        (lambda: flat(VECTORS), {"gallery": GALLERY[:2], "k": N}, r"`gallery`.*2"),
        (lambda: flat(VECTORS), {"gallery": 5}, r"`gallery`.*int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_with_advice(make, options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        explain(make(), **options)


def test_errors_of_contrast_name_rank_and_hits():
    found = explain(flat(VECTORS))
    for call in (lambda: found.contrast(4), lambda: found.contrast(-1), lambda: found.contrast(0, 4)):
        with pytest.raises(ValueError, match=r"`(rank|other)`.*0 to 3"):
            call()
    with pytest.raises(ValueError, match=r"at least two hits"):
        explain(flat(VECTORS), k=1).contrast()


# Other references give other maps, where the images share different things


def shares_of_collages(encoder, layer, tensors, views, **options):
    """
    Collages (left | right) of neighbouring photographs, searched in an index of other views of all of them. For each
    collage, the share of the positive map on the left, for the hits of its left and its right photograph: plain FAM,
    and contrast of the one with the other, each (collages, 2). And the largest relative difference of the two FAM maps.
    """
    count = len(tensors)
    vectors = F.normalize(torch.from_numpy(embed(encoder, views))).numpy()
    query = torch.cat([tensors, tensors.roll(-1, 0)], 3)
    options = {"similarity": "cosine", "k": count} | options
    found = explain_retrieval(query, flat(vectors, IP), encoder, layer, views, **options)
    plain, contrast, differences = [], [], []
    for b in range(count):
        left, right = (found.indices[b].tolist().index(i % count) for i in (b, b + 1))
        pair = found.maps[b, [left, right]]
        signed = torch.stack([found.contrast(left, right)[b, 0], found.contrast(right, left)[b, 0]])
        plain.append(demo.shares(pair, 1, 2)[:, 0])
        contrast.append(demo.shares(signed, 1, 2)[:, 0])
        differences.append((pair[0] - pair[1]).abs().max() / pair.max())
    return torch.stack(plain), torch.stack(contrast), torch.stack(differences)


def test_hits_of_a_collages_photographs_are_explained_by_their_own_halves():
    """
    Claimed, for six collages of two photographs: the contrast map of the left photograph's hit lies on the left, that
    of the right one's on the right, in every collage; and plain FAM leans the same way on average. Encoders with
    random weights, asked the same, stay clearly behind: what is seen is not only the collage's seam.

    The last collage is of two portraits, which are much alike to the encoder. FAM's contrast map, whose places do not
    add up to the margin, has one sign there, as a warning says. The decomposition's do, and it finds the sides.
    """

    def shares(encoder, **options):
        tensors, views = (
            torch.stack([to_tensor(p, encoder.size, encoder.mean, encoder.std) for p in photos])
            for photos in (photographs, map(demo.another_view, photographs))
        )
        return shares_of_collages(encoder, encoder.features, tensors, views, **options)

    photographs = list(demo.photographs().values())
    plain, contrast, differences = shares(bundled_encoder())
    assert (contrast[:-1, 0] > contrast[:-1, 1] + 0.7).all()
    assert (plain[:, 0] - plain[:, 1]).mean() > 0.25
    assert (differences[:-1] > 0.3).all()
    assert differences[-1] > 0.05
    _, adding_up, _ = shares(bundled_encoder(), method=SimilarityDecomposition)
    assert (adding_up[:-1, 0] > adding_up[:-1, 1] + 0.7).all()
    assert adding_up[-1, 0] > adding_up[-1, 1] + 0.4
    untrained = [shares(demo.untrained_encoder(seed)) for seed in (0, 1)]
    assert all((d < 0.05).all() for _, _, d in untrained)
    assert all((p[:, 0] - p[:, 1]).mean() < 0.1 for p, _, _ in untrained)
    assert all((c[:, 0] - c[:, 1]).min() < 0.7 for _, c, _ in untrained)


@pytest.mark.skipif(DATA is None, reason="set CAPTUM_FAM_DATA to the folder of pretrained encoders and photographs")
def test_hits_of_clothing_are_explained_by_their_own_halves():
    spec = importlib.util.spec_from_file_location("pretrained_encoders", Path(DATA) / "encoders.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    encoder = module.load("mobilenet_v2_imagenet")
    with zipfile.ZipFile(Path(DATA) / "photos" / "clothing.zip") as zipped:
        names = sorted(n for n in zipped.namelist() if n.startswith("test/") and n.endswith(".jpg"))[::75]
        photos = [Image.open(io.BytesIO(zipped.read(n))).convert("RGB") for n in names]
    tensors = torch.stack([encoder.transform(p) for p in photos])
    views = torch.stack([encoder.transform(demo.another_view(p)) for p in photos])
    plain, contrast, differences = shares_of_collages(encoder.net, encoder.layer, tensors, views)
    assert (contrast[:, 0] > contrast[:, 1] + 0.5).all()
    assert (plain[:, 0] - plain[:, 1]).mean() > 0.1
    assert (differences > 0.1).all()


@pytest.mark.parametrize("kind", ["IndexFlatIP", "IndexFlatL2"])
def test_an_index_of_unit_vectors_searched_with_others_is_doubted(kind):
    encoder, images = seeded(PooledEncoder).float(), random(6, 3, 8, 8).float()
    with torch.no_grad():
        vectors = F.normalize(encoder(images))
    index = getattr(faiss, kind)(vectors.shape[1])
    index.add(vectors.numpy())
    with pytest.warns(UserWarning, match='unit length.*similarity="cosine"'):
        explain_retrieval(images[:2], index, encoder, encoder.layer, k=2)
    with helpers.silent():
        explain_retrieval(images[:2], index, encoder, encoder.layer, k=2, similarity="cosine")
        explain_retrieval(images[:2], index, lambda x: F.normalize(encoder(x)), encoder.layer, k=2)
