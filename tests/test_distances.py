"""The distances of pytorch-metric-learning in the place of a similarity."""

import subprocess
import sys
from functools import partial

import helpers
import pytest
import torch
from captum.attr import LayerGradCam
from encoders import FlatEncoder, HeadEncoder, PooledEncoder, random, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_fam import (
    FeatureActivationMap,
    Relax,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
    channel_contributions,
    compare_attributions,
)

pml = pytest.importorskip("pytorch_metric_learning.distances")

INF = float("inf")
INPUTS = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)
ENCODER = seeded(PooledEncoder)
LP = [
    {"p": p, "power": power, "normalize_embeddings": normalised}
    for p in (0.5, 1, 1.5, 2, 3, INF)
    for power in (0.5, 1, 2, 3)
    for normalised in (False, True)
]
DISTANCES = {
    "cosine": pml.CosineSimilarity(),
    "cosine squared": pml.CosineSimilarity(power=2),
    "dot": pml.DotProductSimilarity(normalize_embeddings=False),
    "dot normalised": pml.DotProductSimilarity(),
    "dot cubed": pml.DotProductSimilarity(normalize_embeddings=False, power=3),
    "L1": pml.LpDistance(p=1, normalize_embeddings=False),
    "L1 normalised": pml.LpDistance(p=1),
    "L2": pml.LpDistance(normalize_embeddings=False),
    "L2 squared": pml.LpDistance(power=2, normalize_embeddings=False),
    "L2 normalised, squared": pml.LpDistance(power=2),
    "L3 squared": pml.LpDistance(p=3, power=2, normalize_embeddings=False),
    "L1.5": pml.LpDistance(p=1.5, normalize_embeddings=False),
    "max": pml.LpDistance(p=INF, normalize_embeddings=False),
}
each_distance = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())
close = partial(helpers.close, atol=1e-11)
few = settings(deadline=None, max_examples=40, derandomize=True)


def matrix(distance, z, s):
    """The library's own scores (B, K), a distance with a minus."""
    return distance(z, s) * (1 if distance.is_inverted else -1)


def summed(z, s, distance):
    return channel_contributions(z[:, None], s[None], distance).sum(-1)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def by_hand(distance, z, s):
    """The formulas of the documentation, one number at a time."""

    def norm(v):
        return max(map(abs, v)) if distance.p == INF else sum(abs(x) ** distance.p for x in v) ** (1 / distance.p)

    if distance.normalize_embeddings:
        z, s = ([x / max(norm(v), 1e-12) for x in v] for v in (z, s))
    if distance.is_inverted:
        dot = sum(a * b for a, b in zip(z, s))
        return [a * b * dot ** (distance.power - 1) if distance.power != 1 else a * b for a, b in zip(z, s)]
    terms = [abs(a - b) for a, b in zip(z, s)]
    d = norm(terms)
    if not d:
        return [0.0] * len(z)
    if distance.p == INF:
        return [-(d**distance.power) * (t == d) / terms.count(d) for t in terms]
    return [-(d**distance.power) * (t / d) ** distance.p for t in terms]


# Contributions and their sums


@pytest.mark.parametrize("options", LP, ids=lambda o: "-".join(map(str, o.values())))
def test_minus_a_distance_is_the_librarys(options):
    distance = pml.LpDistance(**options)
    z, s = random(3, 5), random(4, 5, seed=2)
    s[0] = z[1]  # equal vectors, zeros, and a zero on both sides
    z[0], s[1] = 0, 0
    close(summed(z, s, distance), matrix(distance, z, s), atol=1e-6 if options["power"] < 1 else 1e-11)


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("normalised", [True, False])
def test_a_product_is_the_librarys_to_a_power_also_where_it_is_negative(power, normalised):
    z, s = random(3, 5), torch.cat([random(3, 5, seed=2), -random(1, 5), tensor([[0.0] * 5])])
    distance = pml.DotProductSimilarity(normalize_embeddings=normalised, power=power)
    assert (z @ s.mT < 0).any()
    close(summed(z, s, distance), distance(z, s))
    if normalised:
        close(summed(z, s, pml.CosineSimilarity(power=power)), pml.CosineSimilarity(power=power)(z, s))


@pytest.mark.parametrize("p", [1, 3])
def test_a_cosine_of_vectors_that_are_normalised_by_another_norm_is_the_librarys(p):
    distance, z, s = pml.CosineSimilarity(p=p), random(3, 5), random(4, 5, seed=2)
    assert not torch.allclose(distance(z, s), pml.CosineSimilarity()(z, s))
    close(summed(z, s, distance), distance(z, s))
    close(SimilarityScore(nn.Flatten(), s, distance)(z), distance(z, s))


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (pml.LpDistance(p=1, normalize_embeddings=False), [-3.0, -4.0, 0.0]),
        (pml.LpDistance(p=2, normalize_embeddings=False), [-9 / 5, -16 / 5, 0.0]),
        (pml.LpDistance(p=2, power=2, normalize_embeddings=False), [-9.0, -16.0, 0.0]),
        (pml.LpDistance(p=INF, normalize_embeddings=False), [0.0, -4.0, 0.0]),
        (pml.LpDistance(p=INF, power=2, normalize_embeddings=False), [0.0, -16.0, 0.0]),
        (pml.DotProductSimilarity(normalize_embeddings=False), [4.0, -10.0, 4.0]),
        (pml.DotProductSimilarity(normalize_embeddings=False, power=2), [-8.0, 20.0, -8.0]),
        (pml.DotProductSimilarity(normalize_embeddings=False, power=3), [16.0, -40.0, 16.0]),
    ],
)
def test_contributions_of_a_pair_computed_by_hand(distance, expected):
    z, s = tensor([4.0, -5.0, 2.0]), tensor([1.0, -1.0, 2.0])
    s = tensor([1.0, 2.0, 2.0]) if distance.is_inverted else s
    close(channel_contributions(z, s, distance), tensor(expected))


def test_dimensions_that_tie_for_the_largest_share_the_distance():
    distance = pml.LpDistance(p=INF, normalize_embeddings=False)
    close(channel_contributions(tensor([1.0, 5.0, 2.0]), tensor([4.0, 2.0, 1.0]), distance), tensor([-1.5, -1.5, 0]))


@pytest.mark.parametrize(("power", "expected"), [(1, [1.0, -1.0]), (2, [0.0, 0.0]), (3, [0.0, 0.0])])
def test_orthogonal_vectors_have_contributions_that_cancel(power, expected):
    distance = pml.DotProductSimilarity(normalize_embeddings=False, power=power)
    close(channel_contributions(tensor([1.0, 1.0]), tensor([1.0, -1.0]), distance), tensor(expected))


vectors = st.integers(1, 6).flatmap(
    lambda D: st.tuples(*[st.lists(st.floats(-50, 50).map(lambda x: round(x, 2)), min_size=D, max_size=D)] * 2)
)


@few
@given(vectors, st.sampled_from(LP))
def test_contributions_to_a_distance_follow_the_formula_and_are_never_positive(pair, options):
    distance = pml.LpDistance(**options)
    c = channel_contributions(*(tensor(v) for v in pair), distance)
    close(c, tensor(by_hand(distance, *pair)), atol=1e-9)
    assert (c <= 0).all()


@few
@given(vectors, st.sampled_from([1, 2, 3]), st.booleans())
def test_contributions_to_a_product_follow_the_formula(pair, power, normalised):
    distance = pml.DotProductSimilarity(normalize_embeddings=normalised, power=power)
    c = channel_contributions(*(tensor(v) for v in pair), distance)
    close(c, tensor(by_hand(distance, *pair)), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-90, 1e-30, 1e30, 1e90])
@pytest.mark.parametrize("p", [1, 2, 3, INF])
def test_a_distance_of_very_small_or_large_vectors_is_finite_and_scales(scale, p):
    distance, z, s = pml.LpDistance(p=p, normalize_embeddings=False), random(5), random(5, seed=2)
    c = channel_contributions(z * scale, s * scale, distance)
    close(c / scale, channel_contributions(z, s, distance), atol=0)


@each_distance
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_contributions_of_lower_precision_are_those_of_float64_rounded(distance, dtype):
    z, s = random(4, 6, dtype=dtype), random(4, 6, seed=2, dtype=dtype)
    c = channel_contributions(z, s, distance)
    eps = torch.finfo(dtype).eps
    assert c.dtype == dtype
    close(c.double(), channel_contributions(z.double(), s.double(), distance), rtol=8 * eps, atol=8 * eps)


@each_distance
def test_gradients_are_those_of_the_librarys_matrix(distance):
    z, s = random(3, 5).requires_grad_(), random(4, 5, seed=2).requires_grad_()
    weights = random(3, 4, seed=3)
    ours = torch.autograd.grad((summed(z, s, distance) * weights).sum(), (z, s))
    theirs = torch.autograd.grad((matrix(distance, z, s) * weights).sum(), (z, s))
    close(ours, theirs)


@each_distance
@pytest.mark.parametrize("reference", ["equal", "zeros"])
def test_gradients_are_finite_for_equal_vectors_and_zeros(distance, reference):
    z = random(2, 5).requires_grad_()
    s = (z.detach() if reference == "equal" else tensor([[0.0] * 5] * 2)).clone().requires_grad_()
    for gradient in torch.autograd.grad(channel_contributions(z, s, distance).sum(), (z, s)):
        assert gradient.isfinite().all()


# Wherever a similarity is accepted


@each_distance
def test_a_score_is_the_librarys_matrix(distance):
    score = SimilarityScore(ENCODER, REFERENCES, distance)
    close(score(INPUTS), matrix(distance, ENCODER(INPUTS), REFERENCES))


each_build = pytest.mark.parametrize("build", [PooledEncoder, FlatEncoder, HeadEncoder])


def after_the_layer(encoder, A):
    """The embedding that activations of the layer give."""
    if isinstance(encoder, HeadEncoder):
        return encoder.head(A.mean((2, 3)))
    return A.mean((2, 3)) if isinstance(encoder, PooledEncoder) else A.flatten(1)


def map_by_hand(encoder, image, weights_of):
    """N f.v_i with f = terms * sign(z), for terms made of the numbers of z: places times activation times gradient."""
    A = encoder.features(image[None]).detach().requires_grad_()
    z = after_the_layer(encoder, A)
    f = weights_of(z[0].tolist()) * z[0].detach().sign()
    (gradient,) = torch.autograd.grad((f * z[0]).sum(), A)
    return (A * gradient)[0].sum(0).detach() * A[0, 0].numel()


@each_distance
@each_build
def test_a_map_weighs_each_place_by_the_gradient_of_the_contributions_weighted_embedding(distance, build):
    encoder = seeded(build)
    s = encoder(random(4, 3, 8, 8, seed=5)).detach()
    fam = FeatureActivationMap(encoder, encoder.layer, similarity=distance)
    for b, k in [(0, 0), (1, 3), (2, 1)]:

        def weights(z, k=k):
            c = tensor(by_hand(distance, z, s[k].tolist()))
            return (c - c.min()) / (c.max() - c.min())

        expected = map_by_hand(encoder, INPUTS[b], weights)
        close(fam.attribute(INPUTS[b : b + 1], k, reference_embedding=s)[0, 0], expected)


@each_distance
@each_build
def test_contrast_weighs_each_place_by_the_difference_of_contributions(distance, build):
    encoder = seeded(build)
    s = encoder(random(4, 3, 8, 8, seed=5)).detach()
    fam = FeatureActivationMap(SimilarityScore(encoder, s, distance), encoder.layer)

    def contributions(z):
        return tensor([by_hand(distance, z, row) for row in s.tolist()])

    def another(z):
        return contributions(z)[2] - contributions(z)[0]

    def rest(z):
        return contributions(z)[2] - contributions(z)[[0, 1, 3]].mean(0)

    for contrast, weights in ((0, another), ("rest", rest)):
        expected = torch.stack([map_by_hand(encoder, image, weights) for image in INPUTS])
        close(fam.attribute(INPUTS, 2, contrast=contrast)[:, 0], expected)


@each_distance
@each_build
def test_self_and_threshold_take_a_share_of_the_score_with_itself_which_a_distance_has_not(distance, build):
    encoder = seeded(build)
    s = encoder(random(4, 3, 8, 8, seed=5)).detach()
    fam = FeatureActivationMap(SimilarityScore(encoder, s, distance), encoder.layer)

    def less(share, z):
        c, own = (tensor(by_hand(distance, z, other)) for other in (s[2].tolist(), z))
        return c - (c.sum() if share is None else share) / own.sum() * own

    for asked, share in (({"contrast": "self"}, None), ({"threshold": 0.3}, 0.3)):
        if not distance.is_inverted:
            with pytest.raises(ValueError, match=r"self|`threshold`.*with itself.*0"):
                fam.attribute(INPUTS, 2, **asked)
            continue
        expected = torch.stack([map_by_hand(encoder, image, partial(less, share)) for image in INPUTS])
        close(fam.attribute(INPUTS, 2, **asked)[:, 0], expected)


@each_distance
def test_grad_cam_of_the_score_is_the_gradient_of_the_librarys_matrix(distance):
    A = ENCODER.features(INPUTS).detach().requires_grad_()
    score = matrix(distance, A.mean((2, 3)), REFERENCES)[:, 1]
    (gradient,) = torch.autograd.grad(score.sum(), A)
    expected = (gradient.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True)
    cam = LayerGradCam(SimilarityScore(ENCODER, REFERENCES, distance), ENCODER.layer)
    close(cam.attribute(INPUTS, target=1), expected.detach())


@pytest.mark.parametrize("route", ["score", "option"])
@pytest.mark.parametrize(
    ("distance", "name"),
    [
        (pml.CosineSimilarity(), "cosine"),
        (pml.DotProductSimilarity(), "cosine"),
        (pml.DotProductSimilarity(normalize_embeddings=False), "dot"),
    ],
)
def test_a_decomposition_takes_the_library_objects_of_cosine_and_dot(distance, name, route):
    def decomposition(similarity):
        if route == "score":
            return SimilarityDecomposition(SimilarityScore(ENCODER, REFERENCES, similarity), ENCODER.layer), {}
        options = {"reference_embedding": REFERENCES}
        return SimilarityDecomposition(ENCODER, ENCODER.layer, similarity=similarity), options

    maps, named = (d.attribute(INPUTS, 2, **options) for d, options in map(decomposition, (distance, name)))
    close(maps, named)
    close(maps.mean((1, 2, 3)), distance(ENCODER(INPUTS), REFERENCES)[:, 2].detach())


def test_a_decomposition_takes_the_squared_euclidean_distance_but_for_what_no_place_has():
    distance = pml.LpDistance(power=2, normalize_embeddings=False)
    z, s = ENCODER(INPUTS).detach(), REFERENCES[2]
    decomposition = SimilarityDecomposition(SimilarityScore(ENCODER, REFERENCES, distance), ENCODER.layer)
    maps = decomposition.attribute(INPUTS, 2)
    close(maps.mean((1, 2, 3)) - s.square().sum(), matrix(distance, z, REFERENCES)[:, 2])
    close(maps[:, 0], torch.einsum("bc,bchw->bhw", 2 * s - z, ENCODER.features(INPUTS).detach()))


@pytest.mark.parametrize(
    "distance",
    [
        pml.LpDistance(),
        pml.LpDistance(power=2),
        pml.LpDistance(normalize_embeddings=False),
        pml.CosineSimilarity(power=2),
        pml.CosineSimilarity(p=1),
    ],
    ids=["Lp", "Lp normalised, squared", "Lp not squared", "power", "p"],
)
def test_a_decomposition_refuses_what_has_none(distance):
    with pytest.raises((ValueError, TypeError), match=r"`?similarity`?.*cosine.*dot.*euclidean"):
        SimilarityDecomposition(ENCODER, ENCODER.layer, similarity=distance).attribute(INPUTS, reference=INPUTS)


@pytest.mark.parametrize("distance", ["L2 normalised, squared", "dot cubed", "cosine"])
def test_perturbations_and_relevance_explain_the_librarys_score(distance):
    """The same maps as for a function with the contributions of the formulas."""
    distance = DISTANCES[distance]

    def formula(z, s):
        rows = [by_hand(distance, a.tolist(), b.tolist()) for a, b in zip(z.reshape(-1, 6), s.reshape(-1, 6))]
        return tensor(rows).to(z).reshape(z.shape)

    ours, theirs = (SimilarityScore(ENCODER, REFERENCES, similarity) for similarity in (distance, formula))
    for method in (
        lambda score: ScoreCam(score, ENCODER.layer),
        lambda score: RelevanceCam(score, ENCODER.layer),
        lambda score: Relax(score, n_samples=20, grid=3),
    ):
        maps = method(ours).attribute(INPUTS, target=1)
        assert maps.abs().max() > 0
        close(maps, method(theirs).attribute(INPUTS, target=1), atol=1e-10)


@pytest.mark.parametrize(
    ("name", "decomposable"), [("cosine", True), ("dot", True), ("L2 squared", True), ("L1", False)]
)
def test_a_comparison_has_the_decomposition_where_the_distance_has_one(name, decomposable):
    score = SimilarityScore(ENCODER, REFERENCES, DISTANCES[name])
    maps = compare_attributions(score, ENCODER.layer, INPUTS[:1], 1, show_progress=False)
    assert ("SimilarityDecomposition" in maps) == decomposable
    assert {"FeatureActivationMap", "LayerGradCam", "RelevanceCam", "Relax"} <= set(maps)
    assert not maps.failures


# What is refused


class Doubled(pml.LpDistance):
    def compute_mat(self, query_emb, ref_emb):
        return 2 * super().compute_mat(query_emb, ref_emb)


class Renamed(pml.LpDistance):
    """Another name alone changes nothing."""


class Shifted(pml.CosineSimilarity):
    def forward(self, query_emb, ref_emb=None):
        return 1 + super().forward(query_emb, ref_emb)


@pytest.mark.parametrize(
    "distance",
    [
        pml.SNRDistance(),
        pml.BatchedDistance(pml.LpDistance()),
        Doubled(),
        Shifted(),
        pml.LpDistance(power=0),
        pml.LpDistance(power=-1),
        pml.DotProductSimilarity(power=-1),
        pml.LpDistance(p=0),
    ],
    ids=lambda d: f"{type(d).__name__} {d.p}^{d.power}",
)
def test_what_has_no_known_contributions_is_refused_by_name(distance):
    for use in (
        lambda: channel_contributions(REFERENCES, REFERENCES, distance),
        lambda: SimilarityScore(ENCODER, REFERENCES, distance),
        lambda: FeatureActivationMap(ENCODER, ENCODER.layer, similarity=distance),
    ):
        with pytest.raises((ValueError, TypeError), match=rf"`similarity`.*{type(distance).__name__}"):
            use()


def test_a_class_is_refused_with_its_name():
    with pytest.raises(TypeError, match=r"`similarity`.*LpDistance"):
        SimilarityScore(ENCODER, REFERENCES, pml.LpDistance)


class Halved(pml.DotProductSimilarity):
    def normalize(self, embeddings, dim=1, **kwargs):
        return super().normalize(embeddings, dim, **kwargs) / 2


@pytest.mark.parametrize("distance", [Renamed(p=1), Halved()])
def test_a_subclass_that_normalises_or_is_named_otherwise_keeps_its_score(distance):
    close(SimilarityScore(ENCODER, REFERENCES, distance)(INPUTS), matrix(distance, ENCODER(INPUTS), REFERENCES))
    decomposition = SimilarityDecomposition(ENCODER, ENCODER.layer, similarity=distance)
    with pytest.raises((ValueError, TypeError), match="`similarity`"):
        decomposition.attribute(INPUTS, reference_embedding=REFERENCES[:1])


def test_importing_the_package_imports_no_optional_library():
    optional = ["easyfsl", "lightly", "faiss", "pytorch_metric_learning", "timm", "transformers"]
    program = f"import sys, captum_fam; print([name for name in {optional} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_version_without_batched_distances_will_do(monkeypatch):
    monkeypatch.delattr(pml, "BatchedDistance")
    z, s = random(6), random(6, seed=2)
    close(channel_contributions(z, s, pml.CosineSimilarity()), channel_contributions(z, s))
    FeatureActivationMap(ENCODER, ENCODER.layer).attribute(INPUTS, 0, reference_embedding=REFERENCES)
