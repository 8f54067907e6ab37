"""SimilarityDecomposition, against its formula, numeric Jacobians, Captum and the similarity itself."""

import re

import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
from captum.attr import LayerGradientXActivation
from encoders import (
    CONV,
    HAND_A,
    Classifier,
    FlatEncoder,
    HeadEncoder,
    Modified,
    OfActivations,
    PooledEncoder,
    PowerPooledEncoder,
    TwoInputEncoder,
    random,
    seeded,
)
from helpers import arrays, close, margin, silent, similarity_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_model_untouched import state
from torch import nn

from captum_fam import SimilarityDecomposition, SimilarityScore

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
X = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)
VALUES = st.floats(-8, 8, width=32)


HAND_B = torch.tensor([[[[8.0, 0.0]], [[2.0, 4.0]]]]).double()  # its mean is (4, 3)


class BiasFreeHead(HeadEncoder):
    """A linear projection head without bias; D = 4."""

    def __init__(self, dim=2):
        super().__init__(dim)
        self.head = nn.Linear(6, 4, bias=False)


def powers(power):
    """Pooling z_k = (mean A_k^p)^(1/p) of activations from 1e-6 on."""
    return lambda A: np.mean(np.maximum(A, 1e-6) ** power, axis=tuple(range(1, A.ndim))) ** (1 / power)


# Encoders whose embedding is homogeneous of degree one in the layer's activations, or that and L2-normalised.
DECOMPOSABLE = {
    "mean": PooledEncoder,
    "mean in 1-D": lambda: PooledEncoder(1),
    "mean in 3-D": lambda: PooledEncoder(3),
    "flattened": FlatEncoder,
    "power": PowerPooledEncoder,
    "head": BiasFreeHead,
    "scaled mean": lambda: Modified(PooledEncoder(), lambda z: 3 * z),
    "normalised mean": lambda: Modified(PooledEncoder(), lambda z: F.normalize(z, dim=1)),
    "sum": lambda: Modified(FlatEncoder(), lambda z: z.reshape(len(z), 6, -1).sum(2)),
}
NEARLY = {"rtol": 1e-5, "atol": 3e-6}  # a channel that is zero everywhere is clamped to 1e-6, which no location has
each_decomposable = pytest.mark.parametrize("build", DECOMPOSABLE.values(), ids=DECOMPOSABLE.keys())


def decomposable(build):
    encoder = seeded(build)
    x = random(3, 3, *[8] * (encoder.conv1 if hasattr(encoder, "conv1") else encoder.encoder.conv1).weight[0, 0].ndim)
    z, A = arrays(encoder, x)
    return encoder, x, z, A, random(4, z.shape[1], seed=2)


def but_for_clamping(build):
    return NEARLY if build is PowerPooledEncoder else {}


def spatial_mean(maps):
    """Of a map for each input (B, 1, *spatial)."""
    assert maps.shape[1] == 1
    return maps.flatten(1).mean(1)


def of_places(z, references, own, contrast=None, similarity="cosine"):
    """
    What the places add up to: the margin, less what is left of it for an embedding of zeros, which no place has.
    """
    return margin(z, references, own, contrast, similarity) - margin(0 * z, references, own, contrast, similarity)


def by_captum(encoder, x, f):
    """N times Captum's LayerGradientXActivation of f.z, for weights f (B, D) that are held constant."""
    weights = torch.as_tensor(np.stack(f))
    terms = LayerGradientXActivation(lambda x: (encoder(x) * weights).sum(1), encoder.layer).attribute(x).detach()
    return terms[0, 0].numel() * terms.sum(1, keepdim=True)


def each_less(*contrasts):
    """Contrasts, and what takes away a share of what the input has with itself."""
    less = [*({"contrast": c} for c in contrasts), {"contrast": "self"}, {"threshold": 0.3}]
    return pytest.mark.parametrize("less", less, ids=str)


@pytest.mark.parametrize(
    ("similarity", "reference", "expected"),
    [
        ("cosine", [0.0, 2.0], [[0.0, 0.8], [1.6, 0.8]]),
        ("cosine", [4.0, 3.0], [[0.16, 0.8], [1.44, 1.44]]),
        ("dot", [4.0, 3.0], [[4.0, 20.0], [36.0, 36.0]]),
        ("dot", [-1.0, 0.0], [[-1.0, -2.0], [-3.0, -6.0]]),
        ("euclidean", [4.0, 3.0], [[5.0, 18.0], [31.0, 38.0]]),  # f = 2s - z = (5, 2)
        ("euclidean", [3.0, 4.0], [[3.0, 22.0], [41.0, 34.0]]),  # f = z
    ],
)
def test_a_decomposition_by_hand(similarity, reference, expected):
    encoder = OfActivations()
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    with silent():
        maps = decomposition.attribute(HAND_A, reference_embedding=torch.tensor([reference]).double())
    close(maps, [[expected]])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("dim", CONV)
def test_the_weights_of_a_decomposition_are_the_reference_over_the_norms(dim, similarity):
    encoder, x = seeded(lambda: PooledEncoder(dim)), random(3, 3, *[6] * dim)
    z, A = arrays(encoder, x)
    maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
        x, [3, 0, 1], reference_embedding=REFERENCES
    )
    for b, own in enumerate([3, 0, 1]):
        s = REFERENCES[own].numpy()
        alpha = s if similarity == "dot" else s / oracle.norm(s) / oracle.norm(z[b])
        close(maps[b, 0], oracle.aligned_map(alpha, A[b]))


@pytest.mark.parametrize("positive", [F.normalize, lambda z: 3 * z], ids=["normalised", "scaled"])
def test_for_a_multiple_of_the_mean_the_norm_is_that_of_the_mean(positive):
    plain, modified = seeded(PooledEncoder), seeded(lambda: Modified(PooledEncoder(), positive))
    maps = [
        SimilarityDecomposition(encoder, encoder.layer).attribute(X, 1, reference_embedding=REFERENCES)
        for encoder in (plain, modified)
    ]
    close(*maps)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@each_decomposable
def test_the_mean_of_a_decomposition_is_the_similarity(build, similarity):
    """But for the squared length of the reference, which is part of a squared distance and which no place has."""
    encoder, x, z, _, s = decomposable(build)
    with silent():
        maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
            x, [2, 0, 3], reference_embedding=s
        )
    constant = s[[2, 0, 3]].square().sum(1).numpy() if similarity == "euclidean" else np.zeros(3)
    expected = [margin(z[b], s.numpy(), own, None, similarity) for b, own in enumerate([2, 0, 3])]
    close(spatial_mean(maps), expected + constant, **but_for_clamping(build))


@pytest.mark.parametrize("contrast", [1, [1, 2, 0], "rest"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@each_decomposable
def test_the_mean_of_a_contrast_is_the_margin(build, similarity, contrast):
    """For distances, plus the squared length of the reference less that of the other, or the mean of the others'."""
    encoder, x, z, _, s = decomposable(build)
    with silent():
        maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
            x, [2, 0, 3], reference_embedding=s, contrast=contrast
        )
    others = contrast if isinstance(contrast, list) else [contrast] * 3
    expected = []
    for z_b, own, other in zip(z, [2, 0, 3], others, strict=True):
        square = s.square().sum(1).numpy()
        constant = square[own] - (np.delete(square, own).mean() if other == "rest" else square[other])
        expected.append(margin(z_b, s.numpy(), own, other, similarity) + (constant if similarity == "euclidean" else 0))
    close(spatial_mean(maps), expected, **but_for_clamping(build))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@each_decomposable
def test_the_mean_of_what_a_match_has_beyond_the_input_itself_is_zero(build, similarity):
    encoder, x, _, _, s = decomposable(build)
    with silent():
        maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
            x, [2, 0, 3], reference_embedding=s, contrast="self"
        )
    assert maps.abs().max() > 0.05
    close(spatial_mean(maps), np.zeros(3), **but_for_clamping(build))


@pytest.mark.parametrize("threshold", [0.3, -0.7, 0.0])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@each_decomposable
def test_the_mean_of_what_lies_above_a_threshold_is_the_score_less_the_threshold(build, similarity, threshold):
    encoder, x, z, _, s = decomposable(build)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    with silent():
        maps = decomposition.attribute(x, [2, 0, 3], reference_embedding=s, threshold=threshold)
    expected = [margin(z[b], s.numpy(), own, None, similarity) - threshold for b, own in enumerate([2, 0, 3])]
    close(spatial_mean(maps), expected, **but_for_clamping(build))
    if not threshold:
        close(maps, decomposition.attribute(x, [2, 0, 3], reference_embedding=s))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@each_decomposable
def test_the_score_itself_as_a_threshold_is_the_contrast_with_the_input_itself(build, similarity):
    encoder, x, z, _, s = decomposable(build)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    score = similarity_of(z[0], s[1].numpy(), similarity)
    by_threshold = decomposition.attribute(x[:1], 1, reference_embedding=s, threshold=float(score))
    close(by_threshold, decomposition.attribute(x[:1], 1, reference_embedding=s, contrast="self"))


def activations_and_references(C):
    shape = st.tuples(st.just(2), st.just(C), st.integers(1, 3), st.integers(1, 3))
    return st.tuples(hnp.arrays(np.float64, shape, elements=VALUES), hnp.arrays(np.float64, (3, C), elements=VALUES))


QUESTIONS = [
    *[(similarity, {"contrast": c}) for similarity in ("cosine", "dot", "euclidean") for c in (None, 1, "rest")],
    *[(similarity, less) for similarity in ("cosine", "dot") for less in ({"contrast": "self"}, {"threshold": 0.3})],
]
each_question = pytest.mark.parametrize(("similarity", "less"), QUESTIONS, ids=str)
each_question_of_all = pytest.mark.parametrize(
    ("similarity", "less"), [asked for asked in QUESTIONS if asked[1] != {"contrast": 1}], ids=str
)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 4).flatmap(activations_and_references), st.sampled_from(QUESTIONS))
@pytest.mark.filterwarnings("ignore:Embeddings are zero")
def test_the_mean_of_a_decomposition_of_any_activations_is_the_similarity(arrays, asked):
    (A, s), (similarity, less) = arrays, asked
    A, s = np.where(np.abs(A) < 1e-3, 0, A), np.where(np.abs(s) < 1e-3, 0, s)
    encoder = OfActivations()
    maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
        torch.from_numpy(A), [0, 2], reference_embedding=torch.from_numpy(s), **less
    )
    for b, own in enumerate([0, 2]):
        z = A[b].mean((1, 2))
        if not s.any(1).all() or (z.any() and oracle.norm(z) <= 1e-6):
            continue
        if less.get("contrast") == "self":
            expected = 0.0
        else:
            expected = of_places(z, s, own, less.get("contrast"), similarity) - (
                less.get("threshold", 0) if z.any() else 0
            )
        close(maps[b].mean(), expected, rtol=1e-7, atol=1e-9)


@each_question
@pytest.mark.parametrize(
    ("build", "after"),
    [
        (FlatEncoder, np.ravel),
        (PowerPooledEncoder, powers(3)),
        (lambda: Modified(PooledEncoder(), lambda z: z.cumsum(1)), lambda A: A.mean((1, 2)).cumsum()),
        (lambda: Modified(PooledEncoder(), lambda z: (z + 0.1).square()), lambda A: (A.mean((1, 2)) + 0.1) ** 2),
    ],
    ids=["flattened", "power", "head", "square"],
)
@pytest.mark.filterwarnings("ignore:The places of layer")
def test_a_decomposition_of_any_encoder_is_that_of_its_numeric_jacobian(build, after, similarity, less):
    encoder = seeded(build)
    x = random(2, 3, 6, 6)
    z, A = arrays(encoder, x)
    s = random(3, z.shape[1], seed=2).numpy()
    maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
        x, [0, 2], reference_embedding=torch.from_numpy(s), **less
    )
    for b, own in enumerate([0, 2]):
        f = oracle.decomposition_weights(z[b], s, own, similarity, **less)
        expected = oracle.jacobian_map(f, oracle.numeric_jacobian(after, A[b]), A[b])
        close(maps[b, 0], expected, rtol=1e-5, atol=1e-8)


@each_question
@pytest.mark.parametrize("dim", CONV)
def test_a_decomposition_of_a_mean_is_the_sum_of_the_weighed_channels(dim, similarity, less):
    encoder, x = seeded(lambda: PooledEncoder(dim)), random(3, 3, *[6] * dim)
    z, A = arrays(encoder, x)
    maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
        x, [3, 0, 2], reference_embedding=REFERENCES, **less
    )
    for b, own in enumerate([3, 0, 2]):
        f = oracle.decomposition_weights(z[b], REFERENCES.numpy(), own, similarity, **less)
        close(maps[b, 0], oracle.aligned_map(f, A[b]))


@each_question
@pytest.mark.parametrize("kind", [FlatEncoder, HeadEncoder, PowerPooledEncoder])
@pytest.mark.filterwarnings("ignore:The places of layer")
def test_a_decomposition_is_captums_gradient_by_activation_of_the_weighed_embedding(kind, similarity, less):
    encoder = seeded(kind)
    z, _ = arrays(encoder, X)
    s = random(4, z.shape[1], seed=2)
    maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
        X, [3, 0, 2], reference_embedding=s, **less
    )
    f = [oracle.decomposition_weights(z[b], s.numpy(), own, similarity, **less) for b, own in enumerate([3, 0, 2])]
    close(maps, by_captum(encoder, X, f))


@each_question
@pytest.mark.parametrize("kind", [PooledEncoder, FlatEncoder, HeadEncoder])
@pytest.mark.filterwarnings("ignore:The places of layer")
def test_the_terms_of_a_decomposition_add_up_to_it_and_are_captums(kind, similarity, less):
    encoder = seeded(kind)
    z, A = arrays(encoder, X)
    s = random(4, z.shape[1], seed=2)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    options = {"reference_embedding": s, **less}
    terms = decomposition.attribute(X, 2, attr_dim_summation=False, **options)
    assert terms.shape == A.shape
    close(terms.sum(1, keepdim=True), decomposition.attribute(X, 2, **options))
    f = torch.as_tensor(np.stack([oracle.decomposition_weights(z_b, s.numpy(), 2, similarity, **less) for z_b in z]))
    expected = LayerGradientXActivation(lambda x: (encoder(x) * f).sum(1), encoder.layer).attribute(X).detach()
    close(terms, 16 * expected)


def ends_in_a_normalisation():
    return Modified(BiasFreeHead(), lambda z: F.normalize(z, dim=1))


@pytest.mark.parametrize(
    "build",
    [*DECOMPOSABLE.values(), HeadEncoder, ends_in_a_normalisation],
    ids=[*DECOMPOSABLE, "bias of a head", "final normalisation after a head"],
)
@pytest.mark.filterwarnings("ignore:The places of layer .* do not add up .* biases")
def test_what_a_match_has_beyond_the_input_itself_is_the_gradient_of_the_cosine_by_place(build):
    encoder, x, _, _, s = decomposable(build)
    decomposition = SimilarityDecomposition(encoder, encoder.layer)
    cosine = LayerGradientXActivation(SimilarityScore(encoder, s), encoder.layer)
    terms = cosine.attribute(x, target=[2, 0, 3]).detach()
    n = terms[0, 0].numel()
    options = {"reference_embedding": s, "contrast": "self"}
    close(decomposition.attribute(x, [2, 0, 3], **options), n * terms.sum(1, keepdim=True))
    close(decomposition.attribute(x, [2, 0, 3], attr_dim_summation=False, **options), n * terms)


@pytest.mark.parametrize("build", [PooledEncoder, FlatEncoder])
def test_an_input_has_nothing_beyond_itself(build):
    encoder = seeded(build)
    decomposition = SimilarityDecomposition(encoder, encoder.layer)
    close(decomposition.attribute(X, reference=X, contrast="self"), np.zeros((3, 1, 4, 4)))
    one_less = decomposition.attribute(X, reference=X, threshold=1.0)
    close(one_less, np.zeros((3, 1, 4, 4)))


@pytest.mark.parametrize("after", [(), (nn.Flatten(),)], ids=["mean", "flattened"])
@each_less()
def test_squares_of_small_embeddings_do_not_vanish(less, after):
    """As the dot product of an embedding of 1e-25 with itself would in single precision."""
    encoder = OfActivations(*after).float()
    decomposition, small = SimilarityDecomposition(encoder, encoder.layer, similarity="dot"), 1e-25
    s = random(2, 8 if after else 2, dtype=torch.float32)
    less = {name: value * small if name == "threshold" else value for name, value in less.items()}
    maps = decomposition.attribute(HAND_A.float() * small, 1, reference_embedding=s, **less)
    less = {name: value / small if name == "threshold" else value for name, value in less.items()}
    large = decomposition.attribute(HAND_A.float(), 1, reference_embedding=s, **less)
    assert large.abs().max() > 0.1
    close(maps / small, large, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("references", [4, 20], ids=["fewer", "more"])
@each_less(None, "rest")
@each_decomposable
def test_all_decompositions_at_once_are_those_one_by_one(build, less, references):
    """Also for more references than dimensions or places."""
    encoder, x, z, _, _ = decomposable(build)
    assert references == 4 or references > min(z.shape[1], 16)
    decomposition, s = SimilarityDecomposition(encoder, encoder.layer), random(references, z.shape[1], seed=2)
    maps = decomposition.attribute_all(x, reference_embedding=s, **less)
    assert maps.shape[1] == references
    for k in {0, 1, 2, 3, references - 1}:
        close(maps[:, k : k + 1], decomposition.attribute(x, k, reference_embedding=s, **less))


@each_question_of_all
@pytest.mark.parametrize("references", [4, 40], ids=["fewer", "more"])
@pytest.mark.parametrize("kind", [PooledEncoder, FlatEncoder, HeadEncoder])
@pytest.mark.filterwarnings("ignore:The places of layer")
def test_all_decompositions_have_the_weights_of_the_reference_implementation(kind, references, similarity, less):
    encoder = seeded(kind)
    z, _ = arrays(encoder, X)
    s = random(references, z.shape[1], seed=2)
    maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute_all(
        X, reference_embedding=s, **less
    )
    for k in {0, 2, references - 1}:
        f = [oracle.decomposition_weights(z_b, s.numpy(), k, similarity, **less) for z_b in z]
        close(maps[:, k : k + 1], by_captum(encoder, X, f))


@each_decomposable
def test_a_pair_of_decompositions_has_the_similarity_as_its_two_means(build):
    encoder, x, z, _, _ = decomposable(build)
    here, there = SimilarityDecomposition(encoder, encoder.layer).attribute_pair(x, x.flip(0))
    expected = [similarity_of(*pair) for pair in zip(z, z[::-1], strict=True)]
    for maps in (here, there):
        close(spatial_mean(maps), expected, **but_for_clamping(build))
    close(there, here.flip(0))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@each_less()
@each_decomposable
def test_a_pair_has_on_both_sides_what_lies_beyond_the_input_itself_or_a_threshold(build, less, similarity):
    encoder, x, z, _, _ = decomposable(build)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    with silent():
        here, there = decomposition.attribute_pair(x, x.flip(0), **less)
    close(here, decomposition.attribute(x, reference=x.flip(0), **less))
    close(there, decomposition.attribute(x.flip(0), reference=x, **less))
    scores = np.array([similarity_of(*pair, similarity) for pair in zip(z, z[::-1], strict=True)])
    expected = scores - less["threshold"] if "threshold" in less else 0 * scores
    for maps in (here, there):
        close(spatial_mean(maps), expected, **but_for_clamping(build))


@pytest.mark.parametrize("kind", [PooledEncoder, FlatEncoder])
@pytest.mark.parametrize(("similarity", "less"), [("euclidean", {}), ("cosine", {"contrast": "self"})])
def test_a_shared_reference_has_a_map_for_each_input(kind, similarity, less):
    encoder, other = seeded(kind), random(1, 3, 8, 8, seed=4)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    here, there = decomposition.attribute_pair(X, other, **less)
    close(here, decomposition.attribute(X, reference=other, **less))
    close(there, decomposition.attribute(other.expand(3, -1, -1, -1), reference=X, **less))


def test_a_pair_of_distances_has_on_each_side_the_squared_length_of_the_other():
    encoder = seeded(PooledEncoder)
    z, _ = arrays(encoder, X)
    here, there = SimilarityDecomposition(encoder, encoder.layer, similarity="euclidean").attribute_pair(X, X.flip(0))
    squares = np.square(z).sum(1)
    distances = np.square(z - z[::-1]).sum(1)
    close(spatial_mean(here), squares[::-1] - distances)
    close(spatial_mean(there), squares - distances)


def test_the_maps_of_a_layer_that_gives_a_tuple_have_means_that_add_up_to_the_similarity():
    encoder = seeded(TwoInputEncoder)
    encoder.head = seeded(lambda: nn.Linear(9, 3, bias=False))
    inputs, s = (random(2, 3, 8, 8), random(2, 1, 8, 8)), random(1, 3, seed=2)
    with silent():
        maps = SimilarityDecomposition(encoder, encoder.layer).attribute(inputs, reference_embedding=s)
    close(sum(map(spatial_mean, maps)), F.cosine_similarity(encoder(*inputs), s).detach())


UNDECOMPOSABLE = {
    "bias of a head": HeadEncoder,
    "final normalisation after a head": lambda: Modified(BiasFreeHead(), lambda z: F.normalize(z, dim=1)),
    "a power without its root": lambda: Modified(PooledEncoder(), lambda z: z.square()),
}


BIASES = "the rest comes from biases, a LayerNorm or another such step between the layer and the embedding"
NORMALISED = "the encoder ends in a normalisation. Leave it out"


@pytest.mark.parametrize("contrast", [None, 3])
@pytest.mark.parametrize("build", UNDECOMPOSABLE.values(), ids=UNDECOMPOSABLE.keys())
def test_a_warning_says_of_which_layer_the_places_do_not_add_up_and_why(build, contrast):
    encoder = seeded(build)
    z, _ = arrays(encoder, X)
    s = random(4, z.shape[1], seed=2)
    with pytest.warns(UserWarning, match="do not add up") as caught:
        maps = SimilarityDecomposition(encoder, encoder.layer).attribute(X, 1, reference_embedding=s, contrast=contrast)
    assert len(caught) == 1
    name = "layer" if build is HeadEncoder else "encoder.layer"
    reason = NORMALISED if np.allclose(np.linalg.norm(z, axis=1), 1) else BIASES
    expected = f"The places of layer {name!r} (ReLU) do not add up to the similarity: {reason}"
    assert str(caught[0].message).startswith(expected)
    c = [oracle.decomposition_weights(z_b, s.numpy(), 1, "cosine", contrast) * z_b for z_b in z]
    missing = np.abs(spatial_mean(maps).numpy() - np.sum(c, 1)) / np.abs(c).sum(1)
    assert missing.max() > 0.05


@pytest.mark.filterwarnings("ignore:Embeddings are zero or not finite")
def test_an_image_that_cannot_be_explained_does_not_hide_that_the_encoder_ends_in_a_normalisation():
    encoder, x = seeded(ends_in_a_normalisation), X.clone()
    x[0] = torch.nan
    with pytest.warns(UserWarning, match=f"do not add up.*{NORMALISED}"):
        SimilarityDecomposition(encoder, encoder.layer).attribute(x, 1, reference_embedding=random(4, 4, seed=2))


@pytest.mark.parametrize(("bias", "warns"), [(0.36, False), (0.38, True), (-0.33, False), (-0.34, True)])
def test_a_warning_comes_where_more_than_a_twentieth_is_missing(bias, warns):
    """z = (3 + bias, 4) and s = (1, 1): of c = (3 + bias, 4) the places have all but the bias."""
    encoder = OfActivations(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        encoder[3].weight.copy_(torch.eye(2))
        encoder[3].bias.copy_(torch.tensor([bias, 0.0]))
    assert (abs(bias) > 0.05 * (7 + bias)) == warns
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity="dot")
    with pytest.warns(UserWarning, match="do not add up") if warns else silent():
        maps = decomposition.attribute(HAND_A, reference_embedding=torch.ones(1, 2).double())
    close(spatial_mean(maps), [7.0])


def test_each_layer_is_warned_of_once():
    encoder = seeded(HeadEncoder)
    with pytest.warns(UserWarning, match="do not add up") as caught:
        SimilarityDecomposition(encoder, [encoder.early, encoder.layer]).attribute_all(
            X, reference_embedding=random(4, 4)
        )
    layers = [re.match(r"The places of layer '(\w+)' \(ReLU\) do not add up", str(w.message)).group(1) for w in caught]
    assert layers == ["early", "layer"]


def test_the_gradient_of_a_normalisation_that_is_no_mean_adds_up_to_nothing():
    """A normalised embedding does not change with the length of the activations: Euler's theorem, degree zero."""
    encoder = seeded(ends_in_a_normalisation)
    with pytest.warns(UserWarning, match=NORMALISED):
        maps = SimilarityDecomposition(encoder, encoder.layer).attribute(X, 1, reference_embedding=random(4, 4))
    close(spatial_mean(maps), np.zeros(3))


def product(z, s):
    """Stands for a caller's own similarity."""
    return z * s


def test_a_similarity_that_has_no_decomposition_is_refused_with_the_cure():
    encoder = seeded(PooledEncoder)
    for forward_func, own in [(encoder, product), (SimilarityScore(encoder, REFERENCES, product), None)]:
        decomposition = SimilarityDecomposition(forward_func, encoder.layer, similarity=own)
        with pytest.raises(ValueError, match=r"`similarity`.*function.*similarity=\"cosine\".*`dimension_weights`"):
            decomposition.attribute(X, 1, reference_embedding=None if own is None else REFERENCES)


def test_a_matrix_is_refused_where_the_score_is_no_sum_over_pairs_of_places():
    encoder = seeded(PooledEncoder)
    refused = [{"similarity": "euclidean"}, {"similarity": product}, {"dimension_weights": product}]
    for options, came in zip(refused, ["euclidean", "function", "dimension_weights"], strict=True):
        decomposition = SimilarityDecomposition(encoder, encoder.layer, **options)
        with pytest.raises(ValueError, match=rf'attribute_matrix needs.*"cosine" or "dot".*{came}'):
            decomposition.attribute_matrix(X, X)
    score = SimilarityScore(encoder, REFERENCES, "euclidean")
    with pytest.raises(ValueError, match=r'attribute_matrix needs.*"cosine" or "dot".*euclidean'):
        SimilarityDecomposition(score, encoder.layer).attribute_matrix(X, X)


@each_less()
@pytest.mark.parametrize(
    "options",
    [{"similarity": "euclidean"}, {"dimension_weights": lambda z, s: s - z}],
    ids=["euclidean", "a distance of one's own"],
)
def test_a_distance_has_nothing_beyond_the_input_itself(options, less):
    encoder = seeded(PooledEncoder)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, **options)
    before = state(encoder, X)
    for call in (
        lambda: decomposition.attribute(X, 1, reference_embedding=REFERENCES, **less),
        lambda: decomposition.attribute_all(X, reference_embedding=REFERENCES, **less),
        lambda: decomposition.attribute_pair(X, X.flip(0), **less),
    ):
        with pytest.raises(ValueError, match=rf"{next(iter(less))}.*compares with.*\"cosine\" or \"dot\""):
            call()
        assert state(encoder, X) == before


@pytest.mark.parametrize("contrast", [0, "rest", [1, 2, 0]], ids=str)
def test_a_pair_takes_no_contrast_with_another_reference(contrast):
    encoder = seeded(PooledEncoder)
    with pytest.raises(ValueError, match=r'`contrast` of a pair.*"self"'):
        SimilarityDecomposition(encoder, encoder.layer).attribute_pair(X, X, contrast=contrast)


def test_all_at_once_take_no_number_as_a_contrast():
    encoder = seeded(PooledEncoder)
    with pytest.raises(ValueError, match=r'`contrast`.*"rest", "self" or None.*1'):
        SimilarityDecomposition(encoder, encoder.layer).attribute_all(X, reference_embedding=REFERENCES, contrast=1)


@pytest.mark.parametrize("kind", [PooledEncoder, FlatEncoder])
@each_less()
def test_a_zero_embedding_has_nothing_with_itself_and_its_map_is_zero(less, kind):
    encoder = OfActivations(*(() if kind is PooledEncoder else (nn.Flatten(),)))
    A = torch.cat([HAND_A, HAND_A * 0])
    s = random(1, 2 if kind is PooledEncoder else 8, seed=2)
    decomposition = SimilarityDecomposition(encoder, encoder.layer)
    with pytest.warns(UserWarning, match=r"Embeddings are zero or not finite \(inputs \[1\]\)") as caught:
        maps = decomposition.attribute(A, reference_embedding=s, **less)
    assert len(caught) == 1
    assert not maps[1].any()
    close(maps[:1], decomposition.attribute(HAND_A, reference_embedding=s, **less))
    assert maps[0].any()


@pytest.mark.parametrize("zero", ["inputs", "references"])
def test_the_decomposition_of_a_zero_embedding_is_zero_and_says_so(zero):
    encoder = OfActivations()
    A, s = (HAND_A * 0, torch.ones(1, 2)) if zero == "inputs" else (HAND_A, torch.zeros(1, 2))
    decomposition = SimilarityDecomposition(encoder, encoder.layer)
    with pytest.warns(UserWarning, match=rf"Embeddings are zero or not finite \({zero} \[0\]\)"):
        assert not decomposition.attribute(A, reference_embedding=s.double()).any()


@pytest.mark.parametrize(("similarity", "factor"), [("cosine", 1 / 25), ("dot", 1)])
def test_a_matrix_by_hand(similarity, factor):
    encoder = OfActivations()
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    with silent():
        matrix = decomposition.attribute_matrix(HAND_A, HAND_B)
    close(matrix, [np.array([[8.0, 0.0], [24.0, 16.0], [40.0, 32.0], [56.0, 16.0]]) / 8 * factor])
    close(matrix.sum((1, 2)), [24.0 * factor])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@each_decomposable
def test_the_entries_of_a_matrix_add_up_to_the_score_and_its_rows_to_the_map(build, similarity):
    encoder, x, z, _, _ = decomposable(build)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    with silent():
        matrix = decomposition.attribute_matrix(x, x.flip(0))
        here, there = decomposition.attribute_pair(x, x.flip(0))
    n = here[0, 0].numel()
    assert matrix.shape == (3, n, n)
    expected = [similarity_of(*pair, similarity) for pair in zip(z, z[::-1], strict=True)]
    close(matrix.sum((1, 2)), expected, **but_for_clamping(build))
    close(n * matrix.sum(2), here.flatten(1), **but_for_clamping(build))
    close(n * matrix.sum(1), there.flatten(1), **but_for_clamping(build))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("build", [PooledEncoder, BiasFreeHead, PowerPooledEncoder])
def test_the_matrix_of_swapped_roles_is_transposed(build, similarity):
    encoder, other = seeded(build), random(3, 3, 12, 6, seed=5)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    matrix = decomposition.attribute_matrix(X, other)
    assert matrix.shape == (3, 16, 18)
    close(decomposition.attribute_matrix(other, X), matrix.mT)
    (z, _), (s, _) = arrays(encoder, X), arrays(encoder, other)
    expected = [similarity_of(*pair, similarity) for pair in zip(z, s, strict=True)]
    close(matrix.sum((1, 2)), expected, **but_for_clamping(build))


@pytest.mark.parametrize("build", [PooledEncoder, BiasFreeHead])
def test_a_shared_reference_has_the_matrices_of_its_copies(build):
    encoder = seeded(build)
    decomposition, reference = SimilarityDecomposition(encoder, encoder.layer), random(1, 3, 6, 6, seed=4)
    shared = decomposition.attribute_matrix(X, reference)
    assert shared.shape == (3, 16, 9)
    close(shared, decomposition.attribute_matrix(X, reference.expand(3, -1, -1, -1)))
    close(16 * shared.sum(2), decomposition.attribute(X, reference=reference).flatten(1))


def test_locations_are_in_row_major_order():
    encoder = seeded(PooledEncoder)
    other = random(3, 3, 6, 10, seed=5)
    matrix = SimilarityDecomposition(encoder, encoder.layer, similarity="dot").attribute_matrix(X, other)
    A, B = arrays(encoder, X)[1], arrays(encoder, other)[1]
    close(matrix.reshape(3, 4, 4, 3, 5), np.einsum("bkhw,bkij->bhwij", A, B) / 16 / 15)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("head", [False, True], ids=["flattened", "flattened, then a head"])
def test_the_matrix_of_a_flattened_encoder_is_that_of_its_columns(head, similarity):
    encoder = seeded(FlatEncoder)
    W = random(5, 6 * 16, seed=3) if head else torch.eye(6 * 16).double()
    encoder = Modified(encoder, lambda z: z @ W.T)
    (z, A), (s, B) = arrays(encoder, X), arrays(encoder, X.flip(0))
    matrix = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute_matrix(X, X.flip(0))
    columns = W.numpy().reshape(-1, 6, 16)  # the columns of location i take its six channels to the embedding
    for b in range(3):
        v, w = (np.einsum("dki,ki->id", columns, a[b].reshape(6, 16)) for a in (A, B))
        expected = v @ w.T / (1 if similarity == "dot" else oracle.norm(z[b]) * oracle.norm(s[b]))
        close(matrix[b], expected)
        if not head:
            assert not np.any(expected - np.diag(np.diag(expected)))


def test_a_list_of_layers_has_a_list_of_matrices():
    encoder = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    layers = [encoder[1], encoder[0]]
    matrices = SimilarityDecomposition(encoder, layers).attribute_matrix(X, X.flip(0))
    assert isinstance(matrices, list)
    assert [m.shape for m in matrices] == [(3, 9, 9), (3, 36, 36)]
    for layer, matrix in zip(layers, matrices, strict=True):
        close(matrix, SimilarityDecomposition(encoder, layer).attribute_matrix(X, X.flip(0)))
        close(matrix.sum((1, 2)), F.cosine_similarity(encoder(X), encoder(X.flip(0))).detach())


@pytest.mark.parametrize("build", [lambda: OfActivations(), lambda: OfActivations(nn.Flatten())])
def test_the_matrix_of_zero_embeddings_is_zero_and_says_so(build):
    encoder = build()
    A = torch.cat([HAND_A, HAND_A * 0, HAND_A])
    B = torch.cat([HAND_A, HAND_A, HAND_A * 0])
    decomposition = SimilarityDecomposition(encoder, encoder.layer)
    with pytest.warns(UserWarning, match=r"Embeddings are zero or not finite \(inputs \[1\], references \[2\]\)"):
        matrix = decomposition.attribute_matrix(A, B)
    assert not matrix[1:].any()
    close(matrix[0].sum(), np.array(1.0))


@pytest.mark.parametrize("after", [(), (nn.Flatten(),)], ids=["mean", "flattened"])
def test_the_matrix_and_map_of_an_embedding_that_is_not_finite_are_zero_and_say_only_so(after):
    encoder = OfActivations(*after)
    A = torch.cat([HAND_A, HAND_A * torch.nan])
    decomposition = SimilarityDecomposition(encoder, encoder.layer)
    for call in (
        lambda: decomposition.attribute_matrix(A, HAND_A),
        lambda: decomposition.attribute(A, reference=HAND_A) / 4,
    ):
        with pytest.warns(UserWarning, match=r"Embeddings are zero or not finite \(inputs \[1\]\)") as caught:
            result = call()
        assert len(caught) == 1
        assert not result[1].any()
        close(result[0].sum(), np.array(1.0))


def test_a_matrix_warns_as_a_map_does():
    encoder = seeded(HeadEncoder)
    decomposition, messages = SimilarityDecomposition(encoder, encoder.layer), []
    for call in (decomposition.attribute_matrix, lambda x, s: decomposition.attribute(x, reference=s)):
        with pytest.warns(UserWarning, match=f"The places of layer 'layer' .* do not add up .*{BIASES}") as caught:
            call(X, X)
        messages += [str(w.message) for w in caught]
    assert len(messages) == 2
    assert len(set(messages)) == 1


@pytest.mark.parametrize("reference", [X[:2], (X, X), [X], None])
def test_a_matrix_refuses_references_of_another_number_or_form(reference):
    encoder = seeded(PooledEncoder)
    with pytest.raises((ValueError, TypeError), match="`reference`"):
        SimilarityDecomposition(encoder, encoder.layer).attribute_matrix(X, reference)


def test_a_matrix_of_a_layer_that_gives_a_tuple_is_refused():
    """Locations of the one tensor meet those of the other too: no matrix for each adds up to the score."""
    encoder, inputs = seeded(TwoInputEncoder), (random(2, 3, 8, 8), random(2, 1, 8, 8))
    with pytest.raises(ValueError, match="attribute_matrix needs a layer with one tensor"):
        SimilarityDecomposition(encoder, encoder.layer).attribute_matrix(inputs, inputs)


def test_a_matrix_of_a_score_takes_its_encoder_and_similarity():
    encoder = seeded(PooledEncoder)
    score = SimilarityScore(encoder, REFERENCES, "dot")
    expected = SimilarityDecomposition(encoder, encoder.layer, similarity="dot").attribute_matrix(X, X)
    close(SimilarityDecomposition(score, encoder.layer).attribute_matrix(X, X), expected)


# Similarity decomposition: the weights of a caller, and the way to the channels

S = torch.tensor([[4.0, 3.0], [1.0, 0.0]]).double()


@pytest.mark.parametrize(
    ("less", "f"),
    [
        ({}, (12, 12)),
        ({"contrast": 1}, (12 - 3, 12)),
        ({"contrast": "rest"}, (12 - 3, 12)),
        ({"contrast": "self"}, (12 - 9 * 84 / 91, 12 - 16 * 84 / 91)),  # f.z = 84; with itself f is (9, 16), f.z = 91
        ({"threshold": 7}, (12 - 9 / 13, 12 - 16 / 13)),
    ],
    ids=str,
)
def test_weights_of_ones_own_by_hand(less, f):
    """f(z, s) = z * s with z = (3, 4) and s = (4, 3), the other reference being (1, 0)."""
    encoder = OfActivations()
    decomposition = SimilarityDecomposition(encoder, encoder.layer, dimension_weights=product)
    expected = f[0] * HAND_A[:, :1] + f[1] * HAND_A[:, 1:]
    with silent():
        close(decomposition.attribute(HAND_A, 0, reference_embedding=S, **less), expected)
    if less != {"contrast": 1}:
        close(decomposition.attribute_all(HAND_A, reference_embedding=S, **less)[:, :1], expected)


@pytest.mark.parametrize("kind", [PooledEncoder, FlatEncoder, HeadEncoder, PowerPooledEncoder])
@pytest.mark.filterwarnings("ignore:The places of layer")
def test_weights_of_ones_own_weigh_the_dimensions_of_any_encoder(kind):
    encoder = seeded(kind)
    z, _ = arrays(encoder, X)
    s = random(30, z.shape[1], seed=2)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, dimension_weights=lambda z, s: z.tanh() * s + z)
    maps = decomposition.attribute_all(X, reference_embedding=s)
    for k in (0, 29):
        expected = by_captum(encoder, X, [np.tanh(z_b) * s[k].numpy() + z_b for z_b in z])
        close(maps[:, k : k + 1], expected)
        close(decomposition.attribute(X, k, reference_embedding=s), expected)


@pytest.mark.parametrize(
    ("similarity", "f"),
    [
        ("cosine", lambda z, s: s / s.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True)),
        ("dot", lambda z, s: s),
        ("euclidean", lambda z, s: 2 * s - z),
    ],
)
@each_decomposable
def test_the_weights_of_a_named_similarity_given_as_a_function_give_its_maps(build, similarity, f):
    encoder, x, _, _, s = decomposable(build)
    named = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    own = SimilarityDecomposition(encoder, encoder.layer, dimension_weights=f)
    for less in ({}, {"contrast": "rest"}):
        options = {"reference_embedding": s, **less}
        close(own.attribute(x, 1, **options), named.attribute(x, 1, **options))
    for one, other in zip(own.attribute_pair(x, x.flip(0)), named.attribute_pair(x, x.flip(0)), strict=True):
        close(one, other)


def test_weights_of_ones_own_are_asked_for_tensors_of_one_shape():
    encoder, shapes = seeded(PooledEncoder), []

    def weights(z, s):
        shapes.append((z.shape, s.shape))
        return s

    SimilarityDecomposition(encoder, encoder.layer, dimension_weights=weights).attribute_all(
        X, reference_embedding=REFERENCES
    )
    assert shapes
    assert all(z == s and z[-1] == 6 for z, s in shapes)


@pytest.mark.parametrize(
    ("weights", "came"),
    [(lambda z, s: (z * s).sum(-1), r"shape"), (lambda z, s: s[..., :2], "shape"), (lambda z, s: 1.0, "float|1.0")],
    ids=["score", "dimensions", "number"],
)
def test_weights_of_another_shape_are_refused(weights, came):
    encoder = seeded(PooledEncoder)
    before = state(encoder, X)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, dimension_weights=weights)
    with pytest.raises(ValueError, match=rf"`dimension_weights` to return weights of shape \(3, 1, 6\).*got.*({came})"):
        decomposition.attribute(X, 1, reference_embedding=REFERENCES)
    assert state(encoder, X) == before


def test_weights_that_are_no_function_and_two_kinds_of_weights_are_refused():
    encoder = seeded(PooledEncoder)
    with pytest.raises(TypeError, match="`dimension_weights`"):
        SimilarityDecomposition(encoder, encoder.layer, dimension_weights="cosine")
    with pytest.raises(ValueError, match=r"`similarity` or `dimension_weights`.*both"):
        SimilarityDecomposition(encoder, encoder.layer, similarity="cosine", dimension_weights=product)


@each_less(None, "rest")
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_weights_of_ones_own_take_the_place_of_a_scores_similarity(similarity, less):
    encoder = seeded(PooledEncoder)
    score = SimilarityScore(encoder, REFERENCES, similarity)
    of_score = SimilarityDecomposition(score, encoder.layer, dimension_weights=product)
    own = SimilarityDecomposition(encoder, encoder.layer, dimension_weights=product)
    close(of_score.attribute(X, 1, **less), own.attribute(X, 1, reference_embedding=REFERENCES, **less))


ROUTES = {name: "jacobian" if name in ("flattened", "power", "head") else "aligned" for name in DECOMPOSABLE}


@pytest.mark.parametrize(
    ("build", "route"), list(zip(DECOMPOSABLE.values(), ROUTES.values(), strict=True)), ids=DECOMPOSABLE
)
def test_the_route_is_aligned_where_the_embedding_is_a_multiple_of_the_mean(build, route):
    encoder, x, z, A, _ = decomposable(build)
    assert SimilarityDecomposition(encoder, encoder.layer).route(x) == route
    forced = SimilarityDecomposition(encoder, encoder.layer, channel_weights="jacobian")
    assert forced.route(x) == "jacobian"
    if z.shape[1] == A.shape[1]:
        assert SimilarityDecomposition(encoder, encoder.layer, channel_weights="aligned").route(x) == "aligned"


def test_a_list_of_layers_has_a_list_of_routes():
    encoder = seeded(PooledEncoder)
    assert SimilarityDecomposition(encoder, [encoder.early, encoder.layer]).route(X) == ["jacobian", "aligned"]


@each_question
@pytest.mark.parametrize("name", ["mean", "mean in 1-D", "mean in 3-D", "scaled mean", "sum"])
def test_both_routes_give_one_map_where_the_embedding_is_a_multiple_of_the_mean(name, similarity, less):
    encoder, x, _, _, s = decomposable(DECOMPOSABLE[name])
    maps = [
        SimilarityDecomposition(encoder, encoder.layer, similarity=similarity, channel_weights=route).attribute(
            x, [2, 0, 3], reference_embedding=s, **less
        )
        for route in ("aligned", "jacobian")
    ]
    close(*maps)


def test_through_a_normalisation_of_the_mean_only_the_aligned_route_adds_up():
    encoder, x, z, _, s = decomposable(DECOMPOSABLE["normalised mean"])
    with silent():
        maps = SimilarityDecomposition(encoder, encoder.layer).attribute(x, 1, reference_embedding=s)
    close(spatial_mean(maps), [similarity_of(z_b, s[1].numpy()) for z_b in z])
    forced = SimilarityDecomposition(encoder, encoder.layer, channel_weights="jacobian")
    with pytest.warns(UserWarning, match=NORMALISED):
        close(spatial_mean(forced.attribute(x, 1, reference_embedding=s)), np.zeros(3))


@each_question
def test_the_aligned_route_can_be_forced_and_takes_no_gradient(similarity, less):
    encoder = seeded(PowerPooledEncoder)
    z, A = arrays(encoder, X)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity, channel_weights="aligned")
    with torch.inference_mode():
        maps = decomposition.attribute(X, [3, 0, 2], reference_embedding=REFERENCES, **less)
    for b, own in enumerate([3, 0, 2]):
        f = oracle.decomposition_weights(z[b], REFERENCES.numpy(), own, similarity, **less)
        multiple = oracle.norm(z[b]) / oracle.norm(A[b].mean((1, 2)))
        close(maps[b, 0], multiple * oracle.aligned_map(f, A[b]))


def test_the_jacobian_under_inference_mode_is_refused_with_the_cure():
    encoder = seeded(PooledEncoder)
    decomposition = SimilarityDecomposition(encoder, encoder.layer, channel_weights="jacobian")
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*torch\.no_grad\(\)"):
        decomposition.attribute(X, 1, reference_embedding=REFERENCES)


def test_a_route_that_cannot_be_taken_is_refused():
    encoder = seeded(HeadEncoder)
    with pytest.raises(ValueError, match=r'channel_weights="aligned".*has 6 and the embedding 4.*"jacobian"'):
        SimilarityDecomposition(encoder, encoder.layer, channel_weights="aligned").attribute(
            X, 1, reference_embedding=random(4, 4)
        )
    with pytest.raises(ValueError, match=r"`channel_weights`.*'gradient'"):
        SimilarityDecomposition(encoder, encoder.layer, channel_weights="gradient")


@pytest.mark.parametrize("kind", [PooledEncoder, Classifier])
def test_a_forgotten_reference_is_an_error_also_for_a_classifier(kind):
    model = seeded(kind)
    decomposition, before = SimilarityDecomposition(model, model.layer), state(model, X)
    for call in (
        lambda: decomposition.attribute(X),
        lambda: decomposition.attribute(X, 1),
        lambda: decomposition.attribute_all(X),
        lambda: decomposition.attribute_all(X, contrast="self"),
    ):
        with pytest.raises(ValueError, match=r"exactly one of `reference`, `reference_embedding`.*got none"):
            call()
    for call in (decomposition.attribute_pair, decomposition.attribute_matrix):
        with pytest.raises(TypeError, match="`reference`"):
            call(X, None)
    assert state(model, X) == before
