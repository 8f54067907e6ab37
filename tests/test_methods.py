"""The other methods, each against its formula: CAM, LaFAM, decomposition, Relevance-CAM, Score-CAM and RELAX."""

import contextlib
import copy
import inspect
import re
import warnings

import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import LayerGradCam, LayerLRP, NoiseTunnel
from captum.attr._utils.custom_modules import Addition_Module
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule
from encoders import (
    CONV,
    FlatEncoder,
    HeadEncoder,
    Modified,
    PooledEncoder,
    PowerPooledEncoder,
    ResidualEncoder,
    TokenEncoder,
    TwoInputEncoder,
    random,
    seeded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_model_untouched import NormEncoder, state
from torch import nn

from captum_fam import (
    ClassActivationMap,
    LabelFreeActivationMap,
    Relax,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
)
from captum_fam.methods.relax import masks_of

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
X = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)
VALUES = st.floats(-8, 8, width=32)
EXACT = {"rtol": 1e-9, "atol": 1e-12}
DIMENSIONS = {1: "linear", 2: "bilinear", 3: "trilinear"}


def close(actual, expected, rtol=1e-9, atol=1e-12):
    expected = torch.as_tensor(np.asarray(expected)) if not isinstance(expected, torch.Tensor) else expected
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@contextlib.contextmanager
def silent():
    """A warning is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def run(encoder, *inputs, layer=None):
    """Embeddings and the layer's activations of an ordinary forward pass, as arrays."""
    kept = []
    handle = (layer or encoder.layer).register_forward_hook(lambda m, args, out: kept.append(out.detach().clone()))
    with torch.no_grad():
        z = encoder(*inputs)
    handle.remove()
    return z.numpy(), kept[-1].numpy()


def similarity_of(z, s, similarity="cosine"):
    return oracle.contributions(z, s, similarity).sum()


def margin(z, references, own, contrast=None, similarity="cosine"):
    """The score of one embedding for its reference, less that of another or the mean of all the others."""
    scores = [similarity_of(z, s, similarity) for s in references]
    others = [score for k, score in enumerate(scores) if k != own] if contrast == "rest" else scores[contrast or 0]
    return scores[own] - (0 if contrast is None else np.mean(others))


class OfActivations(nn.Sequential):
    """An "encoder" whose input is the activation of its layer; by default its embedding is the spatial mean."""

    def __init__(self, *after):
        super().__init__(nn.Identity(), *(after or (nn.AdaptiveAvgPool2d(1), nn.Flatten())))
        self.double().eval()

    @property
    def layer(self):
        return self[0]


def places(map_):
    return map_[0, 0].numel()


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# Label-free activation map


def test_a_label_free_map_by_hand():
    A = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 4.0], [8.0, -4.0]]]]).double()
    encoder = OfActivations()
    close(LabelFreeActivationMap(encoder, encoder.layer).attribute(A), [[[[0.5, 3.0], [5.5, 1.0]]]])


@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder, FlatEncoder])
@pytest.mark.parametrize("dim", CONV)
def test_a_label_free_map_is_the_mean_of_the_activations(dim, kind):
    encoder, x = seeded(lambda: kind(dim)), random(2, 3, *[6] * dim)
    maps = LabelFreeActivationMap(encoder, encoder.layer).attribute(x)
    close(maps, run(encoder, x)[1].mean(1, keepdims=True))
    of_input = LabelFreeActivationMap(encoder, encoder.layer).attribute(x, attribute_to_layer_input=True)
    close(of_input, run(encoder, x, layer=encoder.conv2)[1].mean(1, keepdims=True))


@pytest.mark.parametrize(
    "question",
    [
        {"target": 3, "reference_embedding": REFERENCES},
        {"target": [0, 3, 1], "reference_embedding": REFERENCES},
        {"reference_embedding": REFERENCES[:1]},
        {"reference_embedding": REFERENCES[:3]},
        {"reference": X.flip(0)},
        {"target": 1, "reference": random(2, 3, 12, 12)},
        {"target": 2},
    ],
    ids=["int", "list", "shared", "paired", "inputs", "other size", "class"],
)
def test_a_label_free_map_is_the_same_for_every_reference_and_target(question):
    encoder = seeded(PooledEncoder)
    lafam = LabelFreeActivationMap(encoder, encoder.layer)
    close(lafam.attribute(X, **question), lafam.attribute(X), rtol=0, atol=0)


@pytest.mark.parametrize("question", [{}, {"target": 2}, {"target": 3, "reference_embedding": REFERENCES}], ids=str)
@pytest.mark.parametrize("similarity", ["cosine", "euclidean", lambda z, s: z * s])
def test_a_similarity_changes_nothing_of_a_label_free_map(similarity, question):
    encoder = seeded(PooledEncoder)
    plain = LabelFreeActivationMap(encoder, encoder.layer).attribute(X)
    lafam = LabelFreeActivationMap(encoder, encoder.layer, similarity=similarity)
    close(lafam.attribute(X, **question), plain, rtol=0, atol=0)


def test_a_label_free_map_explains_a_score_and_a_model_of_any_output():
    encoder = seeded(PooledEncoder)
    plain = LabelFreeActivationMap(encoder, encoder.layer).attribute(X)
    score = SimilarityScore(encoder, REFERENCES)
    close(LabelFreeActivationMap(score, encoder.layer).attribute(X), plain)
    close(LabelFreeActivationMap(score, encoder.layer).attribute(X, 2), plain)


@pytest.mark.parametrize("contrast", [0, [1, 2, 3], "rest"])
def test_the_contrast_of_a_label_free_map_is_zero(contrast):
    encoder = seeded(PooledEncoder)
    lafam = LabelFreeActivationMap(encoder, encoder.layer)
    maps = lafam.attribute(X, 3, reference_embedding=REFERENCES, contrast=contrast)
    assert maps.shape == (3, 1, 4, 4)
    assert not maps.any()
    assert not lafam.attribute_all(X, reference_embedding=REFERENCES, contrast="rest").any()


def test_all_label_free_maps_are_copies_of_one():
    encoder = seeded(PooledEncoder)
    lafam = LabelFreeActivationMap(encoder, encoder.layer)
    maps = lafam.attribute_all(X, reference_embedding=REFERENCES)
    close(maps, lafam.attribute(X).expand(3, 4, 4, 4), rtol=0, atol=0)


def test_a_label_free_map_without_the_sum_is_each_channels_share():
    encoder = seeded(PooledEncoder)
    terms = LabelFreeActivationMap(encoder, encoder.layer).attribute(X, attr_dim_summation=False)
    close(terms, run(encoder, X)[1] / 6)


# Similarity decomposition

HAND_A = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 4.0], [8.0, 4.0]]]]).double()  # its mean is (3, 4)
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
    z, A = run(encoder, x)
    return encoder, x, z, A, random(4, z.shape[1], seed=2)


def but_for_clamping(build):
    return NEARLY if build is PowerPooledEncoder else EXACT


@pytest.mark.parametrize(
    ("similarity", "reference", "expected"),
    [
        ("cosine", [0.0, 2.0], [[0.0, 0.8], [1.6, 0.8]]),
        ("cosine", [4.0, 3.0], [[0.16, 0.8], [1.44, 1.44]]),
        ("dot", [4.0, 3.0], [[4.0, 20.0], [36.0, 36.0]]),
        ("dot", [-1.0, 0.0], [[-1.0, -2.0], [-3.0, -6.0]]),
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
    z, A = run(encoder, x)
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


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@each_decomposable
def test_the_mean_of_a_decomposition_is_the_similarity(build, similarity):
    encoder, x, z, _, s = decomposable(build)
    with silent():
        maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
            x, [2, 0, 3], reference_embedding=s
        )
    expected = [margin(z[b], s.numpy(), own, None, similarity) for b, own in enumerate([2, 0, 3])]
    close(maps.mean((1, *range(2, maps.ndim))), expected, **but_for_clamping(build))


@pytest.mark.parametrize("contrast", [1, [1, 2, 0], "rest"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@each_decomposable
def test_the_mean_of_a_contrast_is_the_margin(build, similarity, contrast):
    encoder, x, z, _, s = decomposable(build)
    with silent():
        maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
            x, [2, 0, 3], reference_embedding=s, contrast=contrast
        )
    others = contrast if isinstance(contrast, list) else [contrast] * 3
    expected = [
        margin(z_b, s.numpy(), own, other, similarity)
        for z_b, own, other in zip(z, [2, 0, 3], others, strict=True)
    ]  # fmt: skip
    close(maps.mean((1, *range(2, maps.ndim))), expected, **but_for_clamping(build))


def activations_and_references(C):
    shape = st.tuples(st.just(2), st.just(C), st.integers(1, 3), st.integers(1, 3))
    return st.tuples(hnp.arrays(np.float64, shape, elements=VALUES), hnp.arrays(np.float64, (3, C), elements=VALUES))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4).flatmap(activations_and_references),
    st.sampled_from(["cosine", "dot"]),
    st.sampled_from([None, 2, "rest"]),
)
@pytest.mark.filterwarnings("ignore:Embeddings are zero")
def test_the_mean_of_a_decomposition_of_any_activations_is_the_similarity(arrays, similarity, contrast):
    A, s = arrays
    A, s = np.where(np.abs(A) < 1e-3, 0, A), np.where(np.abs(s) < 1e-3, 0, s)
    encoder = OfActivations()
    maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
        torch.from_numpy(A), [0, 1], reference_embedding=torch.from_numpy(s), contrast=contrast
    )
    for b in range(2):
        z = A[b].mean((1, 2))
        if oracle.norm(z) > 1e-6 or not z.any():
            expected = margin(z, s, b, contrast, similarity)
            if contrast is None or all(s.any(1)):
                close(maps[b].mean(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(
    ("build", "after"),
    [
        (FlatEncoder, np.ravel),
        (PowerPooledEncoder, powers(3)),
        (lambda: Modified(PooledEncoder(), lambda z: z.cumsum(1)), lambda A: A.mean((1, 2)).cumsum()),
    ],
    ids=["flattened", "power", "head"],
)
def test_a_decomposition_of_any_encoder_is_that_of_its_numeric_jacobian(build, after, similarity):
    encoder = seeded(build)
    x = random(2, 3, 6, 6)
    z, A = run(encoder, x)
    s = random(2, z.shape[1], seed=2).numpy()
    maps = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity).attribute(
        x, reference_embedding=torch.from_numpy(s)
    )
    for b in range(2):
        factor = s[b] if similarity == "dot" else s[b] / oracle.norm(s[b]) / oracle.norm(z[b])
        gradient = np.tensordot(factor, oracle.numeric_jacobian(after, A[b]), 1)
        close(maps[b, 0], 9 * (gradient * A[b]).sum(0), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("contrast", [None, "rest"])
@each_decomposable
def test_all_decompositions_at_once_are_those_one_by_one(build, contrast):
    encoder, x, _, _, s = decomposable(build)
    decomposition = SimilarityDecomposition(encoder, encoder.layer)
    maps = decomposition.attribute_all(x, reference_embedding=s, contrast=contrast)
    each = [decomposition.attribute(x, k, reference_embedding=s, contrast=contrast) for k in range(4)]
    close(maps, torch.cat(each, 1))


@each_decomposable
def test_a_pair_of_decompositions_has_the_similarity_as_its_two_means(build):
    encoder, x, z, _, _ = decomposable(build)
    here, there = SimilarityDecomposition(encoder, encoder.layer).attribute_pair(x, x.flip(0))
    expected = [similarity_of(*pair) for pair in zip(z, z[::-1], strict=True)]
    for maps in (here, there):
        close(maps.mean((1, *range(2, maps.ndim))), expected, **but_for_clamping(build))
    close(there, here.flip(0))


def test_the_maps_of_a_layer_that_gives_a_tuple_have_means_that_add_up_to_the_similarity():
    encoder = seeded(TwoInputEncoder)
    encoder.head = seeded(lambda: nn.Linear(9, 3, bias=False))
    inputs, s = (random(2, 3, 8, 8), random(2, 1, 8, 8)), random(1, 3, seed=2)
    with silent():
        maps = SimilarityDecomposition(encoder, encoder.layer).attribute(inputs, reference_embedding=s)
    close(sum(m.mean((1, 2, 3)) for m in maps), F.cosine_similarity(encoder(*inputs), s).detach())


UNDECOMPOSABLE = {
    "bias of a head": HeadEncoder,
    "final normalisation after a head": lambda: Modified(BiasFreeHead(), lambda z: F.normalize(z, dim=1)),
    "a power without its root": lambda: Modified(PooledEncoder(), lambda z: z.square()),
}


@pytest.mark.parametrize("contrast", [None, 3])
@pytest.mark.parametrize("build", UNDECOMPOSABLE.values(), ids=UNDECOMPOSABLE.keys())
def test_a_warning_says_how_much_of_the_score_the_locations_have(build, contrast):
    encoder, x = seeded(build), X[:1]
    z, _ = run(encoder, x)
    s = random(4, z.shape[1], seed=2)
    with pytest.warns(UserWarning, match=r"^The locations add up to") as caught:
        maps = SimilarityDecomposition(encoder, encoder.layer).attribute(x, 1, reference_embedding=s, contrast=contrast)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert ("length 1" in message) == np.allclose(np.linalg.norm(z, axis=1), 1)
    numbers = [
        float(number)
        for number in re.match(r"The locations add up to (\S+), but the similarity is (\S+):", message).groups()
    ]
    expected = margin(z[0], s.numpy(), 1, contrast)
    assert abs(maps.mean() - expected) > 1e-3
    assert numbers == pytest.approx([maps.mean().item(), expected], rel=5e-3)


def test_the_gradient_of_a_normalisation_that_is_no_mean_adds_up_to_nothing():
    """A normalised embedding does not change with the length of the activations: Euler's theorem, degree zero."""
    encoder = seeded(lambda: Modified(BiasFreeHead(), lambda z: F.normalize(z, dim=1)))
    with pytest.warns(UserWarning, match="have length 1, by a final normalisation"):
        maps = SimilarityDecomposition(encoder, encoder.layer).attribute(X, 1, reference_embedding=random(4, 4))
    close(maps.mean((1, 2, 3)), np.zeros(3))


@pytest.mark.parametrize(("similarity", "came"), [("euclidean", "euclidean"), (lambda z, s: z * s, "function")])
def test_a_similarity_that_is_no_mean_over_locations_is_refused_with_the_cure(similarity, came):
    encoder = seeded(PooledEncoder)
    for forward_func, own in [(encoder, similarity), (SimilarityScore(encoder, REFERENCES, similarity), None)]:
        with pytest.raises(ValueError, match=rf'`similarity`.*"cosine" or "dot".*{came}.*similarity="cosine"'):
            SimilarityDecomposition(forward_func, encoder.layer, similarity=own).attribute(
                X, 1, reference_embedding=None if own is None else REFERENCES
            )
        with pytest.raises(ValueError, match=rf'`similarity`.*"cosine" or "dot".*{came}.*similarity="cosine"'):
            SimilarityDecomposition(forward_func, encoder.layer, similarity=own).attribute_matrix(X, X)


@pytest.mark.parametrize("zero", ["inputs", "references"])
def test_the_decomposition_of_a_zero_embedding_is_zero_and_says_so(zero):
    encoder = OfActivations()
    A, s = (HAND_A * 0, torch.ones(1, 2)) if zero == "inputs" else (HAND_A, torch.zeros(1, 2))
    decomposition = SimilarityDecomposition(encoder, encoder.layer)
    with pytest.warns(UserWarning, match=rf"Embeddings are zero or not finite \({zero} \[0\]\)"):
        assert not decomposition.attribute(A, reference_embedding=s.double()).any()


# Similarity decomposition: the matrix


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
    n = places(here)
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
    (z, _), (s, _) = run(encoder, X), run(encoder, other)
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
    A, B = run(encoder, X)[1], run(encoder, other)[1]
    close(matrix.reshape(3, 4, 4, 3, 5), np.einsum("bkhw,bkij->bhwij", A, B) / 16 / 15)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("head", [False, True], ids=["flattened", "flattened, then a head"])
def test_the_matrix_of_a_flattened_encoder_is_that_of_its_columns(head, similarity):
    encoder = seeded(FlatEncoder)
    W = random(5, 6 * 16, seed=3) if head else torch.eye(6 * 16).double()
    encoder = Modified(encoder, lambda z: z @ W.T)
    (z, A), (s, B) = run(encoder, X), run(encoder, X.flip(0))
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
    with pytest.warns(UserWarning, match=r"add up to (\S+), but the similarity is 1:") as caught:
        matrix = SimilarityDecomposition(encoder, encoder.layer).attribute_matrix(X[:1], X[:1])
    assert len(caught) == 1
    assert f"add up to {matrix.sum().item():.3g}, but" in str(caught[0].message)


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


# Class activation map


class Classifier(PooledEncoder):
    """Five classes by a linear layer on the spatial mean of ``layer``, which ``again`` repeats."""

    def __init__(self, dim=2):
        super().__init__(dim)
        self.again = nn.Identity()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.again(self.features(x)).flatten(2).mean(2))


class TwoHeads(Classifier):
    """A classifier, and a linear layer that comes later but is not on the way to the logits."""

    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(6, 7)

    def forward(self, x):
        mean = self.features(x).mean((2, 3))
        self.auxiliary(mean)
        return self.fc(mean)


def cam_of(W, A, target, contrast=None):
    """sum_k W_tk A_k of one example, by loops."""
    if contrast is None:
        weights = W[target]
    elif contrast == "rest":
        weights = W[target] - np.mean([W[t] for t in range(len(W)) if t != target], axis=0)
    else:
        weights = W[target] - W[contrast]
    return oracle.aligned_map(weights, A)


def weight_of(linear):
    return linear.weight.detach().numpy()


def test_a_class_activation_map_by_hand():
    model = OfActivations(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, -1.0]]))
        model[3].bias.fill_(100.0)
    cam = ClassActivationMap(model, model[0])
    close(cam.attribute(HAND_A, 1), [[[[2.0, 0.0], [-2.0, 8.0]]]])
    close(cam.attribute(HAND_A, 0, contrast=1), [[[[-1.0, 2.0], [5.0, -2.0]]]])


@pytest.mark.parametrize("contrast", [None, 3, "rest"])
@pytest.mark.parametrize("dim", CONV)
def test_a_class_activation_map_is_the_weighted_sum_of_the_activations(dim, contrast):
    model, x = seeded(lambda: Classifier(dim)), random(3, 3, *[6] * dim)
    A = run(model, x)[1]
    maps = ClassActivationMap(model, model.layer).attribute(x, [4, 0, 2], contrast=contrast)
    assert maps.shape == (3, 1, *[3] * dim)
    for b, target in enumerate([4, 0, 2]):
        close(maps[b, 0], cam_of(weight_of(model.fc), A[b], target, contrast))


@pytest.mark.parametrize("dim", CONV)
def test_the_mean_of_a_class_activation_map_and_the_bias_are_the_logit(dim):
    model, x = seeded(lambda: Classifier(dim)), random(3, 3, *[6] * dim)
    maps = ClassActivationMap(model, model.layer).attribute_all(x)
    assert maps.shape == (3, 5, *[3] * dim)
    close((maps.flatten(2).mean(2) + model.fc.bias).detach(), model(x).detach())


@pytest.mark.parametrize("positive", [lambda z: 2 * z, lambda z: F.normalize(z, dim=1)], ids=["double", "normalised"])
def test_of_a_multiple_of_the_mean_too_the_map_and_the_bias_are_the_logit(positive):
    model = seeded(Classifier)
    model.fc = nn.Sequential(Function(positive), model.fc)
    maps = ClassActivationMap(model, model.layer).attribute_all(X)
    close((maps.mean((2, 3)) + model.fc[1].bias).detach(), model(X).detach())


@pytest.mark.parametrize("contrast", [None, "rest"])
def test_all_class_activation_maps_at_once_are_those_one_by_one(contrast):
    model = seeded(Classifier)
    cam = ClassActivationMap(model, model.layer)
    each = [cam.attribute(X, t, contrast=contrast) for t in range(5)]
    close(cam.attribute_all(X, contrast=contrast), torch.cat(each, 1))


def real_shaped():
    """Batch norm, strides, and dropout between the mean and the linear layer, as in MobileNetV2."""
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), nn.ReLU6()),
        *(nn.Conv2d(5, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 5)),
    )


@pytest.mark.parametrize(
    ("build", "layer", "shape"),
    [
        (real_shaped, lambda model: model[5], (3, 3, 10, 14)),
        (lambda: torchvision.models.resnet18(num_classes=7), lambda model: model.layer4, (2, 3, 64, 96)),
    ],
    ids=["sequential", "ResNet-18"],
)
def test_grad_cam_times_the_number_of_locations_is_the_class_activation_map(build, layer, shape):
    model, x = seeded(build), random(*shape)
    maps = ClassActivationMap(model, layer(model)).attribute(x, 2)
    assert places(maps) > 1
    close(LayerGradCam(model, layer(model)).attribute(x, 2).detach() * places(maps), maps)


def test_of_two_heads_the_one_that_is_not_the_output_must_be_named():
    model = seeded(TwoHeads)
    A = run(model, X)[1]
    with pytest.raises(ValueError, match=r"several linear layers.*classifier="):
        ClassActivationMap(model, model.layer).attribute(X, 4)
    named = ClassActivationMap(model, model.layer, classifier=model.fc).attribute(X, 4)
    other = ClassActivationMap(model, model.layer, classifier=model.auxiliary).attribute(X, 6)
    for b in range(3):
        close(named[b, 0], cam_of(weight_of(model.fc), A[b], 4))
        close(other[b, 0], cam_of(weight_of(model.auxiliary), A[b], 6))


def test_functions_around_a_classifier_are_explained():
    model = seeded(Classifier)
    plain = ClassActivationMap(model, model.layer).attribute(X, 2)
    close(ClassActivationMap(model.forward, model.layer).attribute(X, 2), plain)
    close(ClassActivationMap(lambda x: model(x), model.layer, classifier=model.fc).attribute(X, 2), plain)


def test_a_class_activation_map_can_be_of_the_layers_input():
    model = seeded(Classifier)
    plain = ClassActivationMap(model, model.layer).attribute(X, 2)
    close(ClassActivationMap(model, model.again).attribute(X, 2, None, True), plain)


two_layers = lambda: nn.Sequential(  # noqa: E731
    *(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), *(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
)
flattened = lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 5))  # noqa: E731
maximum = lambda: nn.Sequential(  # noqa: E731
    nn.Conv2d(3, 6, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 5)
)
after_relu = lambda: nn.Sequential(  # noqa: E731
    nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
)


@pytest.mark.parametrize("build", [two_layers, flattened, maximum, after_relu])
def test_a_head_that_is_not_directly_after_the_mean_is_refused(build):
    model = seeded(build)
    before = state(model, X)
    with pytest.raises(ValueError, match=r"spatial mean of layer '.*0' \(Conv2d\).*LayerGradCam"):
        ClassActivationMap(model, model[0]).attribute(X, 1)
    assert state(model, X) == before


def test_models_without_a_weight_for_each_class_are_refused():
    encoder = seeded(PooledEncoder)
    with pytest.raises(ValueError, match=r"SimilarityScore.*SimilarityDecomposition"):
        ClassActivationMap(SimilarityScore(encoder, REFERENCES), encoder.layer)
    with pytest.raises(ValueError, match=r"`forward_func`.*torch.nn.Linear.*classifier=.*LayerGradCam"):
        ClassActivationMap(encoder, encoder.layer)


@pytest.mark.parametrize("classifier", ["fc", nn.Conv2d(6, 5, 1), 5, [nn.Linear(6, 5)]])
def test_a_classifier_that_is_no_linear_layer_is_refused(classifier):
    model = seeded(Classifier)
    with pytest.raises(TypeError, match=r"`classifier`.*torch\.nn\.Linear"):
        ClassActivationMap(model, model.layer, classifier=classifier)


def test_a_classifier_that_is_not_called_is_refused():
    model = seeded(Classifier)
    with pytest.raises(ValueError, match=r"`classifier`.*not called"):
        ClassActivationMap(model, model.layer, classifier=nn.Linear(6, 5).double()).attribute(X, 1)


@pytest.mark.parametrize("references", [{"reference": X}, {"reference_embedding": REFERENCES}])
def test_references_to_a_classifiers_map_are_refused(references):
    model = seeded(Classifier)
    cam = ClassActivationMap(model, model.layer)
    for call in (lambda: cam.attribute(X, 1, **references), lambda: cam.attribute_all(X, **references)):
        with pytest.raises(ValueError, match=r"no references.*`target`"):
            call()


def test_a_class_has_no_other_side():
    model = seeded(Classifier)
    with pytest.raises(NotImplementedError, match="SimilarityDecomposition"):
        ClassActivationMap(model, model.layer).attribute_pair(X, X)


# Score-CAM


def score_cam_of(encoder, layer, x, score, *arguments):
    """Score-CAM of one input (C, *spatial), channel by channel: ``score`` takes an embedding (D,) to a number."""
    _, A = run(encoder, x[None], *arguments, layer=layer)
    A, mode = torch.from_numpy(A[0]), DIMENSIONS[x.ndim - 1]
    with torch.no_grad():
        baseline = score(encoder(torch.zeros_like(x)[None], *arguments)[0].numpy())
        alpha = []
        for A_k in A:
            spread = A_k.max() - A_k.min()
            if spread == 0:
                alpha.append(0.0)
                continue
            up = F.interpolate(A_k[None, None], size=x.shape[1:], mode=mode, align_corners=False)[0]
            seen = x * ((up - A_k.min()) / spread)
            alpha.append(score(encoder(seen[None], *arguments)[0].numpy()) - baseline)
    return oracle.aligned_map(alpha, A.numpy())


def question(references, own, contrast=None, similarity="cosine"):
    return lambda z: margin(z, references.numpy(), own, contrast, similarity)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("contrast", [None, 1, "rest"])
def test_score_cam_is_a_loop_over_channels(contrast, similarity):
    encoder = seeded(PooledEncoder)
    maps = ScoreCam(encoder, encoder.layer, similarity=similarity).attribute(
        X, [3, 0, 2], reference_embedding=REFERENCES, contrast=contrast
    )
    for b, own in enumerate([3, 0, 2]):
        score = question(REFERENCES, own, contrast, similarity)
        close(maps[b, 0], score_cam_of(encoder, encoder.layer, X[b], score))


@pytest.mark.filterwarnings("ignore:The activations")
@pytest.mark.parametrize("layer", ["early", "conv2", "layer"])
@pytest.mark.parametrize("dim", CONV)
def test_score_cam_is_that_loop_in_each_number_of_dimensions_and_at_each_layer(dim, layer):
    encoder, x, s = seeded(lambda: HeadEncoder(dim)), random(2, 3, *[5, 7, 6][:dim]), random(2, 4, seed=2)
    maps = ScoreCam(encoder, getattr(encoder, layer)).attribute(x, reference_embedding=s)
    for b in range(2):
        close(maps[b, 0], score_cam_of(encoder, getattr(encoder, layer), x[b], question(s, b)))


def test_score_cam_by_hand():
    """The embedding is the mean of the 2 x 2 input, which is the layer's one map; the score is z s."""
    encoder = OfActivations()
    A = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]]).double()
    # H = (A - 1) / 4 = [[0, .25], [.5, 1]], so X H = [[0, .5], [1.5, 5]] with mean 1.75, and s = 2 gives alpha = 3.5
    maps = ScoreCam(encoder, encoder.layer, similarity="dot").attribute(
        A, reference_embedding=torch.tensor([[2.0]]).double()
    )
    close(maps, 3.5 * A)


def test_all_score_cam_maps_at_once_are_those_one_by_one():
    encoder = seeded(PooledEncoder)
    cam = ScoreCam(encoder, encoder.layer)
    for contrast in (None, "rest"):
        maps = cam.attribute_all(X, reference_embedding=REFERENCES, contrast=contrast)
        each = [cam.attribute(X, k, reference_embedding=REFERENCES, contrast=contrast) for k in range(4)]
        close(maps, torch.cat(each, 1))


@settings(deadline=None, max_examples=30)
@given(
    hnp.arrays(np.float64, (1, 3, 2, 3), elements=st.integers(-4, 4)), hnp.arrays(np.float64, (1, 3), elements=VALUES)
)
@pytest.mark.filterwarnings("ignore:Embeddings are zero")
def test_channels_with_a_constant_map_weigh_nothing(A, s):
    A[0, 1] = 2.0
    encoder = OfActivations()
    cam = ScoreCam(encoder, encoder.layer, similarity="dot")
    terms = cam.attribute(torch.from_numpy(A), attr_dim_summation=False, reference_embedding=torch.from_numpy(s))
    assert not terms[:, 1].any()
    assert terms.isfinite().all()
    close(terms.sum((0, 1)), score_cam_of(encoder, encoder.layer, torch.from_numpy(A[0]), lambda z: z @ s[0]))


def test_a_baseline_without_an_embedding_is_no_reason_to_warn():
    encoder = OfActivations()
    with silent():
        maps = ScoreCam(encoder, encoder.layer).attribute(HAND_A, reference_embedding=torch.ones(1, 2).double())
    close(maps[0, 0], score_cam_of(encoder, encoder.layer, HAND_A[0], lambda z: similarity_of(z, np.ones(2))))


@pytest.mark.parametrize("perturbations_per_eval", [1, 4, 6, 7, 100])
def test_score_cam_does_not_depend_on_the_number_of_masks_at_once(perturbations_per_eval):
    encoder = seeded(HeadEncoder)
    s = random(4, 4, seed=2)
    plain = ScoreCam(encoder, encoder.layer).attribute(X, [1, 0, 3], reference_embedding=s)
    batches = []
    handle = encoder.register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
    cam = ScoreCam(encoder, encoder.layer, perturbations_per_eval=perturbations_per_eval)
    close(cam.attribute(X, [1, 0, 3], reference_embedding=s), plain)
    handle.remove()
    assert max(batches[1:]) <= max(perturbations_per_eval, 3)


class Rows(nn.Module):
    """Counts the inputs that go through an encoder, and notes the pass of zeros."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.layer, self.rows, self.baseline = encoder, encoder.layer, [], None

    def forward(self, x, *arguments):
        if self.baseline is None and not x.any():
            self.baseline = len(self.rows)
        self.rows.append(len(x))
        return self.encoder(x, *arguments)


@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("perturbations_per_eval", [1, 5, 32])
def test_score_cam_takes_a_pass_for_each_channel_and_one_more_for_any_number_of_references(perturbations_per_eval, K):
    counted = Rows(seeded(PooledEncoder))
    cam = ScoreCam(counted, counted.layer, perturbations_per_eval=perturbations_per_eval)
    cam.attribute_all(X, reference_embedding=REFERENCES[:K])
    assert counted.rows[0] == 3  # the pass that records the layer
    assert sum(counted.rows[1:]) <= 3 * (6 + 1)
    masked = [rows for i, rows in enumerate(counted.rows) if i != counted.baseline]
    assert max(masked[1:]) <= perturbations_per_eval


class Shifted(PooledEncoder):
    """Takes a row of six numbers with each input, and a factor for all."""

    def forward(self, x, shift, factor=1.0):
        return factor * (super().forward(x) + shift)


PERTURBING = {
    "ScoreCam": lambda model, **options: ScoreCam(model, model.layer, **options),
    "Relax": lambda model, **options: Relax(model, n_samples=12, grid=2, **options),
}
each_perturbing = pytest.mark.parametrize("perturbing", PERTURBING.values(), ids=PERTURBING.keys())


@pytest.mark.parametrize("perturbations_per_eval", [1, 4, 32])
@each_perturbing
def test_additional_arguments_with_a_row_for_each_input_go_with_it(perturbing, perturbations_per_eval):
    encoder, shift = seeded(Shifted), random(3, 6, seed=7)
    method = perturbing(encoder, perturbations_per_eval=perturbations_per_eval)
    maps = method.attribute(X, 2, (shift, 0.5), reference_embedding=REFERENCES)
    for b in range(3):
        alone = method.attribute(X[b : b + 1], 2, (shift[b : b + 1], 0.5), reference_embedding=REFERENCES)
        close(maps[b : b + 1], alone)
    assert not torch.allclose(maps, method.attribute(X, 2, (shift.flip(0), 0.5), reference_embedding=REFERENCES))
    if isinstance(method, ScoreCam):
        for b in range(3):
            expected = score_cam_of(encoder, encoder.layer, X[b], question(REFERENCES, 2), shift[b : b + 1], 0.5)
            close(maps[b, 0], expected)


def test_score_cam_refuses_what_it_cannot_mask():
    two, tokens = seeded(TwoInputEncoder), seeded(TokenEncoder)
    with pytest.raises(ValueError, match=r"one input \(B, C, \*spatial\).*\(3, 3, 8, 8\), \(3, 1, 8, 8\)"):
        ScoreCam(two, two.layer).attribute((X, X[:, :1]), reference_embedding=random(1, 3))
    as_they_are = ScoreCam(tokens, tokens.layer, reshape_transform=lambda a: a)
    with pytest.raises(ValueError, match=r"activations of shape \(2, 10, 6\).*reshape_transform"):
        as_they_are.attribute(random(2, 3, 12, 12), reference_embedding=random(1, 6))


def test_score_cam_of_tokens_needs_only_a_reshape_transform():
    tokens, x, s = seeded(TokenEncoder), random(2, 3, 12, 12), random(2, 6, seed=2)

    def on_the_grid(activation):
        return activation[:, 1:].mT.unflatten(2, (3, 3))

    maps = ScoreCam(tokens, tokens.layer, reshape_transform=on_the_grid).attribute(x, reference_embedding=s)
    grid = Function(on_the_grid)

    def show_grid(module, args, output):
        grid(output)

    tokens.layer.register_forward_hook(show_grid)
    for b in range(2):
        close(maps[b, 0], score_cam_of(tokens, grid, x[b], question(s, b)))


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("a", TypeError), (None, TypeError)]
)
@each_perturbing
def test_a_wrong_number_of_perturbations_is_refused(perturbing, value, error):
    with pytest.raises(error, match=r"`perturbations_per_eval`.*positive int"):
        perturbing(seeded(PooledEncoder), perturbations_per_eval=value)


# RELAX


class Seen(nn.Module):
    """Keeps what an encoder is shown."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.seen = encoder, []

    def forward(self, x, *arguments):
        self.seen.append(x.detach().clone())
        return self.encoder(x, *arguments)


def masks_for(size, **options):
    """The masks (N, *size), as an encoder sees them when its input is all ones."""
    seen = Seen(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)).double())
    with torch.no_grad():
        seen(torch.ones(1, 1, *size, dtype=torch.float64))
        seen.seen.clear()
        Relax(seen, **options).attribute(torch.ones(1, 1, *size).double(), reference_embedding=random(1, 2))
    return torch.cat(seen.seen)[:, 0].numpy()


def relax_of(encoder, x, masks, score):
    """The formula for one input (C, *spatial), mask by mask."""
    with torch.no_grad():
        f = [score(encoder((x * torch.from_numpy(M))[None])[0].numpy()) for M in masks]
    R = sum(f_n * M for f_n, M in zip(f, masks, strict=True)) / sum(masks)
    return R - sum(f) / len(f)


@pytest.mark.parametrize("contrast", [None, 1, "rest"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_relax_is_the_mean_of_the_scores_weighted_by_the_masks(similarity, contrast):
    encoder, options = seeded(PooledEncoder), {"n_samples": 40, "grid": 3, "seed": 5}
    masks = masks_for((8, 8), **options)
    assert masks.shape == (40, 8, 8)
    maps = Relax(encoder, similarity=similarity, **options).attribute(
        X, [3, 0, 2], reference_embedding=REFERENCES, contrast=contrast
    )
    assert maps.shape == (3, 1, 8, 8)
    for b, own in enumerate([3, 0, 2]):
        expected = relax_of(encoder, X[b], masks, question(REFERENCES, own, contrast, similarity))
        close(maps[b, 0], expected, rtol=1e-5, atol=1e-7)  # masks are float32


@pytest.mark.parametrize("dim", CONV)
def test_relax_is_that_mean_in_each_number_of_dimensions(dim):
    encoder, x = seeded(lambda: PooledEncoder(dim)), random(2, 3, *[5, 8, 7][:dim])
    masks = masks_for(x.shape[2:], n_samples=60, grid=2)
    maps = Relax(encoder, n_samples=60, grid=2).attribute(x, reference_embedding=REFERENCES[:2])
    assert maps.shape == (2, 1, *x.shape[2:])
    for b in range(2):
        close(maps[b, 0], relax_of(encoder, x[b], masks, question(REFERENCES, b)), rtol=1e-5, atol=1e-7)


def interpolated(grid, lengths):
    """Linear interpolation of an array to other lengths, pixels as areas: an axis at a time, by np.interp."""
    for axis, length in enumerate(lengths):
        n = grid.shape[axis]
        at = (np.arange(length) + 0.5) * n / length - 0.5
        grid = np.apply_along_axis(lambda line, at=at, n=n: np.interp(at, np.arange(n), line), axis, grid)
    return grid


SIZES = [(7,), (8, 8), (9, 5), (2, 3), (1, 1), (14, 15), (4, 6, 5)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("grid", [1, 2, 4])
def test_a_mask_is_a_shifted_part_of_an_interpolated_grid(size, grid):
    kept = (random(5, *[grid] * len(size)) > 0).double()
    shifts = random(5, len(size), seed=3).sigmoid()
    masks = masks_of(kept, shifts, size)
    assert masks.shape == (5, *size)
    for mask, cells, shift in zip(masks, kept.numpy(), shifts.numpy(), strict=True):
        cell = [-(-s // grid) for s in size]
        large = interpolated(cells, [(grid + 1) * c for c in cell])
        start = [int(part * c) for part, c in zip(shift, cell, strict=True)]
        part = large[tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))]
        close(mask.double(), part, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("grid", [1, 3, 7])
def test_masks_have_the_size_of_the_input_and_are_between_zero_and_one(size, grid):
    masks = masks_for(size, n_samples=30, grid=grid)
    assert masks.shape == (30, *size)
    assert masks.min() >= 0
    assert masks.max() <= 1 + 1e-6  # masks are float32
    assert masks.std() > 0.1


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("grid", [1, 4])
def test_masks_show_on_average_what_is_to_be_kept(grid, keep):
    masks = masks_for((12, 12), n_samples=2000, grid=grid, keep=keep)
    assert np.abs(masks.mean(0) - keep).max() < 0.06  # five deviations of the mean of 2,000 coins
    assert abs(masks.mean() - keep) < 0.05


def test_masks_are_neither_alike_nor_aligned_with_a_grid():
    masks = masks_for((12, 12), n_samples=800, grid=3)
    assert len(np.unique(masks.reshape(800, -1), axis=0)) > 600
    jumps = np.abs(np.diff(masks, axis=2)).mean((0, 1))[3:-3]  # at the edges, interpolation is constant
    assert jumps.max() < 1.25 * jumps.min()  # borders of cells are at each column alike


@pytest.mark.parametrize("perturbations_per_eval", [1, 7, 30, 500])
def test_relax_does_not_depend_on_the_number_of_masks_at_once(perturbations_per_eval):
    encoder = Seen(seeded(PooledEncoder))
    maps = Relax(encoder, n_samples=30, grid=3, perturbations_per_eval=perturbations_per_eval).attribute(
        X, [1, 0, 3], reference_embedding=REFERENCES
    )
    assert max(len(x) for x in encoder.seen) <= perturbations_per_eval
    assert sum(len(x) for x in encoder.seen) == 3 * 30
    plain = Relax(encoder, n_samples=30, grid=3).attribute(X, [1, 0, 3], reference_embedding=REFERENCES)
    close(maps, plain, rtol=1e-6, atol=1e-9)


def test_relax_of_an_input_does_not_depend_on_its_batch():
    encoder = seeded(PooledEncoder)
    relax = Relax(encoder, n_samples=30, grid=3)
    maps = relax.attribute(X, [1, 0, 3], reference_embedding=REFERENCES)
    order = [2, 0]
    close(relax.attribute(X[order], [3, 1], reference_embedding=REFERENCES), maps[order], rtol=1e-6, atol=1e-9)


def test_relax_neither_uses_nor_moves_the_global_random_numbers():
    encoder, maps = seeded(PooledEncoder), []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed)
            before = torch.get_rng_state(), np.random.get_state()[1].tolist()
            maps.append(Relax(encoder, n_samples=20, grid=3).attribute(X, 1, reference_embedding=REFERENCES))
            assert torch.equal(torch.get_rng_state(), before[0])
            assert np.random.get_state()[1].tolist() == before[1]
    close(*maps, rtol=0, atol=0)


def test_a_seed_is_a_set_of_masks():
    encoder = seeded(PooledEncoder)
    one, same, other = (
        Relax(encoder, n_samples=20, grid=3, seed=seed).attribute(X, 1, reference_embedding=REFERENCES)
        for seed in (4, 4, 5)
    )
    close(one, same, rtol=0, atol=0)
    assert (one - other).abs().max() > 1e-3
    relax = Relax(encoder, n_samples=20, grid=3, seed=4)
    for _ in range(2):
        close(relax.attribute(X, 1, reference_embedding=REFERENCES), one, rtol=0, atol=0)


def test_the_default_masks_are_of_seven_cells_kept_by_a_coin_and_of_seed_zero():
    explicit = masks_for((8, 8), n_samples=10, seed=0, grid=7, keep=0.5)
    np.testing.assert_array_equal(masks_for((8, 8), n_samples=10), explicit)


@pytest.mark.parametrize("corner", [(0, 0), (8, 0), (8, 8), (4, 4)])
def test_what_alone_an_encoder_sees_is_most_important(corner):
    top, left = corner

    def encoder(x):
        return x[:, :, top : top + 8, left : left + 8].mean((2, 3))

    x = random(1, 3, 16, 16).abs()
    relax = Relax(encoder, similarity="dot", n_samples=1500, grid=4)
    maps = relax.attribute(x, reference_embedding=torch.ones(1, 3).double())
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[top : top + 8, left : left + 8] = True
    assert inside.flatten()[maps.argmax()]
    assert maps[0, 0][inside].mean() > 2 * maps[0, 0][~inside].mean().abs()


def test_a_pixel_that_makes_no_difference_has_importance_zero():
    maps = Relax(lambda x: torch.ones(len(x), 3).double(), n_samples=50).attribute(X, reference_embedding=random(1, 3))
    close(maps, np.zeros((3, 1, 8, 8)), atol=1e-6)


def test_the_contrast_of_relax_is_the_difference_of_two_maps():
    encoder = seeded(PooledEncoder)
    relax = Relax(encoder, n_samples=25, grid=3)
    maps = [relax.attribute(X, k, reference_embedding=REFERENCES) for k in range(4)]
    by_number = relax.attribute(X, 0, reference_embedding=REFERENCES, contrast=2)
    rest = relax.attribute(X, 0, reference_embedding=REFERENCES, contrast="rest")
    close(by_number, maps[0] - maps[2], rtol=1e-5, atol=1e-8)
    close(rest, maps[0] - (maps[1] + maps[2] + maps[3]) / 3, rtol=1e-5, atol=1e-8)


def test_relax_of_the_input_itself_is_the_papers_case():
    encoder = seeded(PooledEncoder)
    masks = masks_for((8, 8), n_samples=25, grid=3)
    z = torch.from_numpy(run(encoder, X)[0])
    maps = Relax(encoder, n_samples=25, grid=3).attribute(X, reference=X)
    for b in range(3):
        close(maps[b, 0], relax_of(encoder, X[b], masks, question(z, b)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n_samples": 0}, ValueError, "`n_samples`.*positive int.*0"),
        ({"n_samples": 1.5}, TypeError, "`n_samples`.*positive int.*1.5"),
        ({"grid": 0}, ValueError, "`grid`.*positive int.*0"),
        ({"grid": (7, 7)}, TypeError, r"`grid`.*positive int.*tuple|`grid`.*\(7, 7\)"),
        ({"keep": 0.0}, ValueError, "`keep`.*between 0 and 1.*0.0"),
        ({"keep": 1.0}, ValueError, "`keep`.*between 0 and 1.*1.0"),
        ({"keep": -0.5}, ValueError, "`keep`.*between 0 and 1.*-0.5"),
        ({"keep": float("nan")}, ValueError, "`keep`.*between 0 and 1.*nan"),
        ({"keep": "half"}, TypeError, "`keep`.*between 0 and 1.*half"),
        ({"seed": "a"}, TypeError, "`seed`.*int.*a"),
        ({"seed": 1.5}, TypeError, "`seed`.*int.*1.5"),
        ({"seed": None}, TypeError, "`seed`.*int.*None"),
        ({"similarity": "cosin"}, ValueError, "`similarity`.*Did you mean 'cosine'"),
        ({"output_selector": 1}, TypeError, "`output_selector`.*function.*1"),
    ],
)
def test_wrong_options_of_relax_are_refused_when_it_is_made(options, error, match):
    with pytest.raises(error, match=match):
        Relax(seeded(PooledEncoder), **options)


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [((X, X), r"\(3, 3, 8, 8\), \(3, 3, 8, 8\)"), (X[:, :, 0, 0], r"\(3, 3\)")],
    ids=["two", "no locations"],
)
def test_inputs_that_relax_cannot_mask_are_refused(inputs, shapes):
    with pytest.raises(ValueError, match=rf"one input \(B, C, \*spatial\).*{shapes}"):
        Relax(lambda *_: REFERENCES[:3]).attribute(inputs, 1, reference_embedding=REFERENCES)


def test_relax_explains_functions_that_return_more_than_an_embedding():
    encoder, options = seeded(PooledEncoder), {"n_samples": 12, "grid": 3}
    plain = Relax(encoder, **options).attribute(X, 1, reference_embedding=REFERENCES)
    selected = Relax(lambda x: {"z": encoder(x)}, output_selector=lambda output: output["z"], **options)
    close(selected.attribute(X, 1, reference_embedding=REFERENCES), plain)


# Relevance-CAM


class Plain(nn.Module):
    """A network without biases, of convolutions, poolings, a container and a head of two layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.early = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.block = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1, bias=False), nn.ReLU(), nn.AvgPool2d(2))
        self.conv2, self.layer = nn.Conv2d(4, 6, 1, bias=False), nn.ReLU()
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.hidden, self.act, self.head = nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4, bias=False)

    def forward(self, x):
        x = self.block(self.pool(self.early(self.conv1(x))))
        return self.head(self.act(self.hidden(self.mean(self.layer(self.conv2(x))).flatten(1))))


def activation_times_gradient(encoder, layer, x, start, layer_input=False):
    """A_k sum_locations (A dC/dA)_k for C = sum z (c / z), the quotient held: epsilon-LRP where there is no bias."""
    kept = []

    def keep(activation):
        kept.append(activation.detach().clone().requires_grad_())
        return kept[-1].clone()

    if layer_input:
        handle = layer.register_forward_pre_hook(lambda m, args: (keep(args[0]),))
    else:
        handle = layer.register_forward_hook(lambda m, args, out: keep(out))
    z = encoder(x)
    handle.remove()
    c = torch.from_numpy(np.stack([start(b, z_b) for b, z_b in enumerate(z.detach().numpy())]))
    (gradient,) = torch.autograd.grad((z * (c / z).detach()).sum(), kept)
    A = kept[0].detach()
    relevance = A * gradient
    return (relevance.flatten(2).sum(2)[..., None, None] * A).sum(1, keepdim=True)


def starting(references, targets, similarity="cosine", contrast=None):
    """The contributions that LRP starts from, by the reference implementation."""

    def start(b, z):
        if contrast is None:
            return oracle.contributions(z, references[targets[b]].numpy(), similarity)
        return oracle.contrasted(z, references.numpy(), targets[b], contrast, similarity)

    return start


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("contrast", [None, 1, "rest"])
@pytest.mark.parametrize("layer_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("name", ["conv1", "early", "pool", "block", "block.0", "block.2", "conv2", "layer"])
def test_without_biases_relevance_is_activation_times_gradient(name, layer_input, contrast, similarity):
    encoder, x, s = seeded(Plain), 1000 * random(2, 3, 8, 8), 5 * random(4, 4, seed=2)  # large, for the stabiliser 1e-9
    layer = encoder.get_submodule(name)
    expected = activation_times_gradient(
        encoder, layer, x, starting(s, [2, 0], similarity, contrast), layer_input
    )  # fmt: skip
    assert expected.abs().max() > 1e-4
    maps = RelevanceCam(encoder, layer, similarity=similarity).attribute(
        x, [2, 0], None, layer_input, reference_embedding=s, contrast=contrast
    )
    close(maps, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("contrast", [None, 1])
def test_relevance_of_a_tiny_network_with_biases_by_hand_written_lrp(contrast):
    """The epsilon rule, layer by layer: R_i = a_i sum_j w_ji R_j / (sum_i w_ji a_i + b_j)."""
    encoder = seeded(
        lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), seed=4
    )
    (W1, b1, W2, b2), x = (p.detach().numpy() for p in encoder.parameters()), random(4, 2, 2, 2)
    s = random(2, 3, seed=2)
    maps = RelevanceCam(encoder, encoder[0]).attribute(x, 0, reference_embedding=s, contrast=contrast)
    for b in range(4):
        A = np.maximum(x[b].numpy(), 0)
        a0 = A.ravel()
        h = W1 @ a0 + b1
        a1 = np.maximum(h, 0)
        z = W2 @ a1 + b2
        c = oracle.pair_weights(z, s.numpy(), 0, "cosine", None, contrast)
        R1 = a1 * (W2.T @ (c / z))
        R0 = a0 * (W1.T @ (R1 / h))
        alpha = R0.reshape(2, 4).sum(1)
        assert np.abs(alpha).max() > 1e-3
        close(maps[b, 0], oracle.aligned_map(alpha, A), rtol=1e-6, atol=1e-9)


def test_relevance_by_hand():
    """One location and a head: z = (3 a, b) = (6, 1), s = (1, 1), dot: c = (6, 1), R = (6, 1), M = 6 * 2 + 1 * 1."""
    encoder = OfActivations(nn.Flatten(), nn.Linear(2, 2, bias=False))
    encoder[0] = nn.ReLU()
    with torch.no_grad():
        encoder[2].weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    maps = RelevanceCam(encoder, encoder[0], similarity="dot").attribute(
        torch.tensor([[[[2.0]], [[1.0]]]]).double(), reference_embedding=torch.ones(1, 2).double()
    )
    close(maps, [[[[13.0]]]], rtol=1e-7)


def test_at_the_layer_that_is_pooled_relevance_is_the_contribution():
    """Where the embedding is the mean, R_k sums to c_k: the map is sum_k c_k A_k."""
    encoder = seeded(PooledEncoder)
    z, A = run(encoder, X)
    maps = RelevanceCam(encoder, encoder.layer).attribute(X, 1, reference_embedding=REFERENCES)
    for b in range(3):
        c = oracle.contributions(z[b], REFERENCES[1].numpy(), "cosine")
        close(maps[b, 0], oracle.aligned_map(c, A[b]), rtol=1e-6, atol=1e-9)


def test_all_relevance_maps_at_once_are_those_one_by_one():
    encoder, s = seeded(Plain), random(4, 4, seed=2)
    cam = RelevanceCam(encoder, encoder.pool)
    for contrast in (None, "rest"):
        each = [cam.attribute(X, k, reference_embedding=s, contrast=contrast) for k in range(4)]
        close(cam.attribute_all(X, reference_embedding=s, contrast=contrast), torch.cat(each, 1))


class PlainClassifier(nn.Module):
    """Modules that Captum's LRP has rules for, with biases; classes on top."""

    def __init__(self):
        super().__init__()
        self.conv1, self.early = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()
        self.pool, self.conv2, self.layer = nn.MaxPool2d(2), nn.Conv2d(5, 6, 3, padding=1), nn.ReLU()
        self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.mean(self.layer(self.conv2(self.pool(self.early(self.conv1(x)))))).flatten(1))


RULES = {
    "epsilon": None,
    "alpha1-beta0": Alpha1_Beta0_Rule,
    "gamma": GammaRule,
    "wide epsilon": lambda: EpsilonRule(0.1),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def ruled(rule, build=PlainClassifier):
    """A model whose layers with weights have this rule."""
    model = seeded(build)
    for module in model.modules():
        if rule is not None and isinstance(module, nn.Conv2d | nn.Linear):
            module.rule = rule()
    return model


@each_rule
@pytest.mark.parametrize(
    ("name", "layer_input"),
    [("pool", True), ("pool", False), ("conv2", True), ("conv2", False), ("mean", True)],
)
def test_the_relevance_of_a_class_is_that_of_captums_lrp(name, layer_input, rule):
    for_captum = ruled(rule)
    lrp = LayerLRP(for_captum, for_captum.get_submodule(name))
    relevance = lrp.attribute(X.clone(), 3, attribute_to_layer_input=layer_input).detach()
    model = ruled(rule)
    terms = RelevanceCam(model, model.get_submodule(name)).attribute(X, 3, None, layer_input, attr_dim_summation=False)
    before = {("pool", True): model.early, ("conv2", True): model.pool, ("mean", True): model.layer}
    A = torch.from_numpy(run(model, X, layer=before.get((name, layer_input), model.get_submodule(name)))[1])
    close(terms, relevance.sum((2, 3), keepdim=True) * A, rtol=1e-6, atol=1e-10)


def test_a_rule_changes_the_map():
    maps = [RelevanceCam(model, model.early).attribute(X, 3) for model in (ruled(rule) for rule in RULES.values())]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(maps) for b in maps[:i])


def test_the_classes_of_a_classifier_are_its_references():
    """The relevance starts from the logit of the class, for "rest" less the mean of the others'."""
    model = seeded(PlainClassifier)
    cam = RelevanceCam(model, model.layer)
    each = [cam.attribute(X, t) for t in range(5)]
    close(cam.attribute_all(X), torch.cat(each, 1))
    close(cam.attribute(X, [4, 0, 2]), torch.stack([each[4][0], each[0][1], each[2][2]]))
    close(cam.attribute(X, 0, contrast=2), each[0] - each[2], rtol=1e-6)
    close(cam.attribute(X, 0, contrast="rest"), each[0] - sum(each[1:]) / 4, rtol=1e-6)


def leftovers(model, *tensors):
    """All that a call may leave: ``state``, attributes of the modules, and the parameters' identities and memory."""
    attributes = [{name: id(value) for name, value in vars(m).items()} for m in model.modules()]
    memory = [(id(t), t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers())]
    return state(model, *tensors), attributes, memory


class Awkward(PlainClassifier):
    """As a user may hand it over: batch norm, frozen weights, an awaited gradient, hooks and rules of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(6), nn.Dropout(0.3)
        self.stage = nn.Sequential(self.conv2, self.norm)
        self.conv1.weight.requires_grad_(False)
        self.conv2.weight.requires_grad_(False)
        self.conv2.rule = Alpha1_Beta0_Rule()
        self.conv1.rule = GammaRule()
        self.relu_hook = self.layer.register_forward_hook(lambda *_: None)
        self.fc_hook = self.fc.register_forward_pre_hook(lambda *_: None)
        self.fails = False

    def forward(self, x):
        x = self.layer(self.stage(self.pool(self.early(self.conv1(x)))))
        x = self.drop(self.mean(x).flatten(1))
        if self.fails:
            raise OSError
        return self.fc(x)


def awkward(training=False):
    model = seeded(Awkward)
    model.fc.weight.grad = torch.ones(5, 6, dtype=torch.float64)
    return model.train(training)


@pytest.mark.filterwarnings("ignore:The model is in training mode")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["early", "pool", "stage", "layer"])
def test_lrp_leaves_nothing_in_the_model(name, training):
    model = awkward(training)
    x = X.clone().requires_grad_()
    cam = RelevanceCam(model, model.get_submodule(name))
    before, rules = leftovers(model, x), (model.conv1.rule, model.conv2.rule)
    calls = [
        lambda: cam.attribute(x, 3),
        lambda: cam.attribute(x, 3, attribute_to_layer_input=True),
        lambda: cam.attribute_all(x, contrast="rest"),
        lambda: cam.attribute_pair(x, x),
        lambda: cam.attribute(x, 3),
    ]
    for call in calls:
        assert call() is not None
        after = leftovers(model, x)
        assert after[:2] == before[:2]
        assert [m[0] for m in after[2]] == [m[0] for m in before[2]]
        assert (model.conv1.rule, model.conv2.rule) == rules
        left = [name for m in model.modules() for name in vars(m) if name.startswith(("activation", "relevance"))]
        assert left == []
    assert not hasattr(model.fc, "rule")


@pytest.mark.parametrize(
    "fail",
    [
        lambda model: setattr(model, "fails", True),
        lambda model: setattr(model, "stage", nn.Sequential(model.conv2, nn.Softplus())),
        lambda model: setattr(model, "drop", Function(lambda z: z + z.square())),
        lambda model: setattr(model, "mean", nn.Softmax2d()),
        lambda model: setattr(model.conv2, "rule", "epsilon"),
        lambda model: setattr(model.fc, "rule", Broken()),
    ],
    ids=["forward", "no rule", "arithmetic", "shape", "no such rule", "rule that fails"],
)  # fmt: skip
def test_lrp_leaves_nothing_in_the_model_when_it_fails(fail):
    model = awkward()
    fail(model)
    before = leftovers(model, X)
    for grad_enabled in (True, False):
        with torch.set_grad_enabled(grad_enabled), pytest.raises((ValueError, TypeError, OSError, RuntimeError)):
            RelevanceCam(model, model.early).attribute(X, 3)
        assert leftovers(model, X)[:2] == before[:2]


class Broken(EpsilonRule):
    def _create_backward_hook_output(self, outputs):
        raise OSError


@each_rule
def test_rules_of_the_user_stay_and_weights_are_put_back_exactly(rule):
    model = ruled(rule)
    rules = [getattr(m, "rule", None) for m in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    first = RelevanceCam(model, model.early).attribute(X, 3)
    assert all(a is b for a, b in zip(rules, [getattr(m, "rule", None) for m in model.modules()], strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    close(RelevanceCam(model, model.early).attribute(X, 3), first, rtol=0, atol=0)


def test_sums_in_a_forward_function_are_refused_before_the_layer_only():
    encoder = seeded(ResidualEncoder)
    before = leftovers(encoder, X)
    for layer in (encoder.stem, encoder.block.body[0]):
        with pytest.raises(ValueError, match=r"LRP cannot follow.*Add.*after layer '.*' \(Conv2d\).*Addition_Module"):
            RelevanceCam(encoder, layer).attribute(X, 1, reference_embedding=REFERENCES)
    assert leftovers(encoder, X)[:2] == before[:2]
    z, A = run(encoder, X, layer=encoder.block)
    maps = RelevanceCam(encoder, encoder.block).attribute(X, 1, reference_embedding=REFERENCES)
    c = [oracle.contributions(z_b, REFERENCES[1].numpy(), "cosine") for z_b in z]
    close(maps, np.einsum("bk,bkij->bij", c, A)[:, None], rtol=1e-6, atol=1e-9)


class Summed(nn.Module):
    """A residual block whose sum is Captum's module, without biases."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 1, bias=False))
        self.add, self.last, self.mean = Addition_Module(), nn.ReLU(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.layer(self.stem(x))
        return self.mean(self.last(self.add(x, self.body(x)))).flatten(1)


@pytest.mark.parametrize("name", ["stem", "layer", "body.0", "body.1", "body", "add", "last"])
def test_captums_sums_are_followed(name):
    encoder = seeded(Summed)
    layer = encoder.get_submodule(name)
    expected = activation_times_gradient(encoder, layer, X, starting(REFERENCES, [1, 1, 1]))
    maps = RelevanceCam(encoder, layer).attribute(X, 1, reference_embedding=REFERENCES)
    close(maps, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


class Unbiased(nn.Module):
    """A bias-free network whose last feature map ``pool`` takes to (B, 6) and ``finish`` to the embedding."""

    def __init__(self, pool, finish):
        super().__init__()
        self.early = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.relu, self.conv2, self.layer = nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.ReLU()
        self.pool, self.finish = pool, finish

    def forward(self, x):
        return self.finish(self.pool(self.layer(self.conv2(self.relu(self.early(x))))))


def spatial_mean(x):
    return x.mean((2, 3))


REFUSED = {
    "normalised": (spatial_mean, lambda z: F.normalize(z, dim=1)),
    "divided": (spatial_mean, lambda z: z / z.norm(dim=1, keepdim=True)),
    "centred": (spatial_mean, lambda z: z - z.mean(1, keepdim=True)),
    "added": (spatial_mean, lambda z: z + z.relu()),
    "square": (spatial_mean, torch.square),
    "power": (lambda x: x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3), lambda z: z),
    "attention": (lambda x: (x * x.flatten(2).softmax(2).view_as(x)).sum((2, 3)), lambda z: z),
}


def pooled():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


FOLLOWED = {
    "relu": (pooled, torch.relu),
    "joined with itself": (pooled, lambda z: torch.cat([z, z], 1)[:, 3:9]),
    "reordered": (pooled, lambda z: z.flip(1).reshape(-1, 3, 2).mT.flatten(1)),
    "stacked": (pooled, lambda z: torch.stack([z, z], 2).unbind(2)[0]),
}
PERHAPS = {
    **FOLLOWED,
    "scaled": (pooled, lambda z: 2 * z),
    "negated": (pooled, lambda z: -z),
    "divided by a number": (pooled, lambda z: z / 2),
    "sum": (lambda: lambda x: x.sum((2, 3)), lambda z: z),
    "mean": (lambda: spatial_mean, lambda z: z),
    "maximum": (lambda: lambda x: x.amax((2, 3)), lambda z: z),
    "softmax": (pooled, lambda z: z.softmax(1)),
    "sigmoid": (pooled, torch.sigmoid),
    "exponential": (pooled, torch.exp),
    "root": (pooled, lambda z: (z + 1e-6).sqrt()),
    "layer norm": (pooled, lambda z: F.layer_norm(z, (6,))),
    "matrix": (pooled, lambda z: z @ random(6, 6)),
    "linear": (pooled, lambda z: F.linear(z, random(6, 6))),
    "shifted": (pooled, lambda z: z + 1),
    "sum of a copy": (pooled, lambda z: z.repeat(1, 2).unflatten(1, (2, 6)).sum(1)),
    "repeated": (pooled, lambda z: z[:, :, None].expand(-1, -1, 2).flatten(1)[:, :6]),
    "convolution": (lambda: lambda x: F.conv2d(x, random(6, 6, 1, 1)).mean((2, 3)), lambda z: z),
    "upsampled": (lambda: lambda x: F.interpolate(x, scale_factor=2).mean((2, 3)), lambda z: z),
}


@pytest.mark.parametrize("steps", REFUSED.values(), ids=REFUSED)
def test_arithmetic_that_lrp_has_no_rule_for_is_refused(steps):
    encoder = seeded(lambda: Unbiased(*steps))
    before = leftovers(encoder, X)
    with pytest.raises(ValueError, match="LRP cannot follow"):
        RelevanceCam(encoder, encoder.layer).attribute(X, 1, reference_embedding=REFERENCES)
    assert leftovers(encoder, X)[:2] == before[:2]


def unless_refused(call, *signs):
    """What the call gives; None where it is refused with a message that has one of the signs."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        if not any(sign in str(error) for sign in signs):
            raise
        return None


@pytest.mark.parametrize("steps", PERHAPS.values(), ids=PERHAPS)
def test_functions_in_a_forward_are_refused_or_lose_no_relevance(steps):
    """Without biases, the relevances of the channels add up to the score, as LRP conserves relevance."""
    pool, finish = steps
    encoder, x = seeded(lambda: Unbiased(pool(), finish)), 100 * X
    before, cam = leftovers(encoder, x), RelevanceCam(encoder, encoder.early)
    terms = unless_refused(
        lambda: cam.attribute(x, 1, attr_dim_summation=False, reference_embedding=REFERENCES), "LRP cannot follow"
    )
    assert leftovers(encoder, x)[:2] == before[:2]
    if steps in FOLLOWED.values():
        assert terms is not None
    if terms is not None:
        z, A = run(encoder, x, layer=encoder.early)
        alpha = terms.sum((2, 3)) / torch.from_numpy(A).sum((2, 3))
        alpha = torch.where(torch.from_numpy(A).sum((2, 3)) == 0, 0, alpha)
        close(alpha.sum(1), [similarity_of(z_b, REFERENCES[1].numpy()) for z_b in z], rtol=1e-5, atol=1e-7)


def test_a_mean_in_a_forward_directly_after_the_layer_gives_the_relevance_of_a_pooling_module():
    by_function = seeded(lambda: Unbiased(spatial_mean, lambda z: z))
    by_module = seeded(lambda: Unbiased(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    one, two = (
        RelevanceCam(encoder, encoder.layer).attribute(100 * X, 1, reference_embedding=REFERENCES)
        for encoder in (by_function, by_module)
    )
    close(one, two, rtol=1e-6, atol=1e-8)


def test_a_mean_in_a_forward_further_on_shares_relevance_evenly_which_is_refused():
    encoder = seeded(lambda: Unbiased(spatial_mean, lambda z: z))
    with pytest.raises(ValueError, match=r"LRP cannot follow.*Mean.*after layer 'early' \(Conv2d\)"):
        RelevanceCam(encoder, encoder.early).attribute(X, 1, reference_embedding=REFERENCES)


ACTIVATIONS = [nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, lambda: nn.Softmax(1)]


@pytest.mark.parametrize("module", ACTIVATIONS)
def test_activation_functions_are_refused_by_name_or_pass_relevance_on(module):
    """What acts on each value alone gives it its relevance: the map is sum_k c_k A_k of what the module takes."""
    encoder = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), module(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    before, cam = leftovers(encoder, X), RelevanceCam(encoder, encoder[0])
    maps = unless_refused(lambda: cam.attribute(X, 1, reference_embedding=REFERENCES), type(encoder[1]).__name__)
    assert leftovers(encoder, X)[:2] == before[:2]
    if isinstance(encoder[1], nn.Softmax):
        assert maps is None
    if maps is not None:
        z, A = run(encoder, X, layer=encoder[0])
        c = [oracle.contributions(z_b, REFERENCES[1].numpy(), "cosine") for z_b in z]
        close(maps, np.einsum("bk,bkij->bij", c, A)[:, None], rtol=1e-5, atol=1e-7)


IN_PLACE = {
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "LeakyReLU": lambda inplace: nn.LeakyReLU(0.1, inplace),
    "ELU": lambda inplace: nn.ELU(1.0, inplace),
    "SiLU": nn.SiLU,
    "Hardswish": nn.Hardswish,
}


@pytest.mark.parametrize("module", IN_PLACE.values(), ids=IN_PLACE)
def test_activation_functions_in_place_pass_on_the_same_relevance(module):
    """As in the heads of MobileNetV3, and in EfficientNet."""
    models = [
        seeded(lambda i=i: nn.Sequential(nn.Conv2d(3, 6, 3), *pooled(), nn.Linear(6, 5), module(i), nn.Linear(5, 6)))
        for i in (True, False)
    ]
    close(*[RelevanceCam(m, m[0]).attribute(X, 1, reference_embedding=REFERENCES) for m in models])


class Reused(nn.Module):
    """Calls one ReLU and one convolution twice, or two of each with the same weights."""

    def __init__(self, shared):
        super().__init__()
        self.layer, self.conv, self.relu = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 6, 1, bias=False), nn.ReLU()
        self.again, self.relu_again = copy.deepcopy(self.conv), nn.ReLU()
        self.shared, self.mean = shared, nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.relu(self.conv(self.layer(x)))
        x = self.relu_again(x) if "relu" not in self.shared else self.relu(x)
        x = self.again(x) if "conv" not in self.shared else self.conv(x)
        return self.mean(x).flatten(1)


@pytest.mark.parametrize("shared", ["relu", "conv"])
def test_modules_that_are_called_twice_are_refused_or_give_the_maps_of_two_modules(shared):
    reused = seeded(lambda: Reused(shared))
    expected = RelevanceCam(two := seeded(lambda: Reused("")), two.layer).attribute(
        X, 1, reference_embedding=REFERENCES
    )
    before, cam = leftovers(reused, X), RelevanceCam(reused, reused.layer)
    maps = unless_refused(lambda: cam.attribute(X, 1, reference_embedding=REFERENCES), "called 2 times")
    assert leftovers(reused, X)[:2] == before[:2]
    if maps is not None:
        close(maps, expected, rtol=1e-6, atol=1e-9)


def test_a_residual_network_is_explained_at_its_last_stage_and_refused_before():
    model, x, s = seeded(torchvision.models.resnet18), random(2, 3, 64, 64), random(1, 1000)
    z, A = run(model, x, layer=model.layer4)
    maps = RelevanceCam(model, model.layer4).attribute(x, reference_embedding=s)
    for b in range(2):
        c = oracle.contributions(z[b], s[0].numpy(), "cosine")
        alpha = A[b].mean((1, 2)) * (weight_of(model.fc).T @ (c / z[b]))
        close(maps[b, 0], oracle.aligned_map(alpha, A[b]), rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match=r"LRP cannot follow.*Add"):
        RelevanceCam(model, model.layer3).attribute(x, reference_embedding=s)


def test_relevance_through_a_plain_network_in_place_is_that_out_of_place():
    build = lambda inplace: nn.Sequential(  # noqa: E731
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(24, 5), nn.ReLU(inplace), nn.Dropout(0.5, inplace), nn.Linear(5, 6)),
    )
    for i in (0, 2, 3, 5):  # those into whose output nothing writes
        maps = [
            RelevanceCam(model, model[i]).attribute(X, 1, reference_embedding=REFERENCES)
            for model in (seeded(lambda: build(True)), seeded(lambda: build(False)))
        ]
        close(*maps)


def test_an_encoder_that_is_no_module_is_refused():
    encoder = seeded(PooledEncoder)
    for forward_func in (lambda x: encoder(x), SimilarityScore(lambda x: encoder(x), REFERENCES)):
        with pytest.raises(TypeError, match=r"RelevanceCam needs.*torch.nn.Module.*function"):
            RelevanceCam(forward_func, encoder.layer).attribute(
                X, 1, reference_embedding=None if isinstance(forward_func, SimilarityScore) else REFERENCES
            )


def test_a_layer_with_several_tensors_is_refused():
    two = seeded(TwoInputEncoder)
    with pytest.raises(ValueError, match=r"one tensor.*'layer' \(Pair\)"):
        RelevanceCam(two, two.layer).attribute((X, X[:, :1]), reference_embedding=random(1, 3))


def test_relevance_under_inference_mode_is_refused_with_the_cure():
    encoder = seeded(PooledEncoder)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*torch.no_grad\(\)"):
        RelevanceCam(encoder, encoder.layer).attribute(X, 1, reference_embedding=REFERENCES)


def test_user_inputs_are_unchanged_by_lrp():
    encoder, x = seeded(Plain), X.clone()
    for requires_grad in (False, True):
        x.requires_grad_(requires_grad)
        before = state(encoder, x)
        RelevanceCam(encoder, encoder.conv1).attribute(x, 1, None, True, reference_embedding=random(4, 4))
        assert state(encoder, x) == before
        assert torch.equal(x, X)


# All of them


def channels_method(method):
    """The method's name, its explainer for a layer by name, and the model; targets are 0 to 3 in each."""

    def make(layer="layer", model=None, dtype=torch.float64, **options):
        build = Classifier if method is ClassActivationMap else PooledEncoder
        model = seeded(model or build).to(dtype)
        layers = [getattr(model, name) for name in layer] if isinstance(layer, list) else getattr(model, layer)
        if method is not ClassActivationMap:
            return method(SimilarityScore(model, REFERENCES.to(dtype)), layers, **options), model
        return method(model, layers, **options), model

    return make


def relax(layer=None, model=None, dtype=torch.float64, **options):
    model = seeded(model or PooledEncoder).to(dtype)
    return Relax(SimilarityScore(model, REFERENCES.to(dtype)), n_samples=12, grid=3, **options), model


METHODS = [ClassActivationMap, LabelFreeActivationMap, RelevanceCam, ScoreCam, SimilarityDecomposition]
MAKES = {method.__name__: channels_method(method) for method in METHODS}
each_channels = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
each_method = pytest.mark.parametrize("make", [*MAKES.values(), relax], ids=[*MAKES, "Relax"])
OF_REFERENCES = [*METHODS[1:], lambda encoder, layer: Relax(encoder, n_samples=12, grid=3)]
each_of_references = pytest.mark.parametrize("method", OF_REFERENCES, ids=[*list(MAKES)[1:], "Relax"])
MASKED = {"rtol": 1e-5, "atol": 1e-8}  # masks are float32


def tolerance(explainer):
    return MASKED if isinstance(explainer, Relax) else EXACT


@each_channels
@pytest.mark.parametrize("dim", CONV)
def test_maps_have_one_channel_and_the_layers_size(dim, make):
    method, model = make(model=lambda: (Classifier if make is MAKES["ClassActivationMap"] else PooledEncoder)(dim))
    x = random(2, 3, *[8, 6, 6][:dim])
    A = run(model, x)[1]
    maps = method.attribute(x, 2)
    assert maps.shape == (2, 1, *A.shape[2:])
    terms = method.attribute(x, 2, attr_dim_summation=False)
    assert terms.shape == A.shape
    close(terms.sum(1, keepdim=True), maps)
    assert method.attribute_all(x).shape == (2, 5 if isinstance(method, ClassActivationMap) else 4, *A.shape[2:])


@each_channels
def test_each_term_is_its_channel_times_one_weight(make):
    method, model = make()
    terms, A = method.attribute(X, 2, attr_dim_summation=False), torch.from_numpy(run(model, X)[1])
    alpha = (terms * A).sum((2, 3), keepdim=True) / A.square().sum((2, 3), keepdim=True).clamp(min=1e-30)
    close(terms, alpha * A)


@each_channels
def test_relu_attributions_drop_the_negative_part(make):
    method, _ = make()
    maps = method.attribute(X, 2)
    close(method.attribute(X, 2, relu_attributions=True), maps.clamp(min=0))
    close(method.attribute_all(X, relu_attributions=True)[:, 2:3], maps.clamp(min=0))


@pytest.mark.filterwarnings("ignore:The locations add up")
@each_channels
def test_a_list_of_layers_has_a_list_of_maps(make):
    """Those of CAM are the same map twice, and there are no others: only a layer that is pooled has one."""
    names, build = ["early", "layer"], PooledEncoder
    if make is MAKES["ClassActivationMap"]:
        names, build = ["again", "layer"], Classifier
    if make is MAKES["RelevanceCam"]:
        build = lambda: Unbiased(pooled(), lambda z: z)  # noqa: E731
    method, _ = make(names, build)
    maps = method.attribute(X, 2)
    assert isinstance(maps, list)
    for name, own in zip(names, maps, strict=True):
        close(own, make(name, build)[0].attribute(X, 2))
    assert [m.shape[1] for m in method.attribute_all(X)] in ([4, 4], [5, 5])


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.05)], ids=str
)
@each_method
def test_maps_have_the_dtype_of_the_activations(make, dtype, share):
    plain = make()[0].attribute(X, 2)
    assert plain.dtype == torch.float64
    maps = make(dtype=dtype)[0].attribute(X.to(dtype), 2)
    assert maps.dtype == dtype
    assert (maps.double() - plain).norm() < share * plain.norm()


@each_method
@pytest.mark.parametrize("target", [[2, 0, 3], torch.tensor([2, 0, 3])], ids=["list", "tensor"])
def test_targets_in_each_of_captums_forms(target, make):
    method, _ = make()
    maps = method.attribute(X, target)
    for b, own in enumerate([2, 0, 3]):
        close(maps[b : b + 1], method.attribute(X[b : b + 1], own), **tolerance(method))
        close(maps[b : b + 1], method.attribute(X, torch.tensor(own))[b : b + 1], **tolerance(method))


@each_method
@pytest.mark.parametrize(
    ("target", "error"), [(9, ValueError), (-6, ValueError), ([0, 1], ValueError), (1.5, TypeError), ("a", TypeError)]
)
def test_targets_that_number_nothing_are_refused(target, error, make):
    method, model = make()
    before = state(model, X)
    with pytest.raises(error, match="`target`"):
        method.attribute(X, target)
    assert state(model, X) == before


@each_method
@pytest.mark.parametrize("contrast", [9, "others", 1.5, [0, 1]])
def test_contrasts_that_number_nothing_are_refused(contrast, make):
    with pytest.raises((ValueError, TypeError), match="`contrast`"):
        make()[0].attribute(X, 1, contrast=contrast)


@each_method
def test_without_a_target_no_reference_is_guessed(make):
    method, _ = make()
    if isinstance(method, LabelFreeActivationMap):
        close(method.attribute(X), method.attribute(X, 2))
        return
    with pytest.raises(ValueError, match="`target`"):
        method.attribute(X)


@each_of_references
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_score_explains_as_its_references_do(similarity, method):
    encoder = seeded(PooledEncoder)
    score = SimilarityScore(encoder, REFERENCES, similarity)
    by_score = method(score, encoder.layer).attribute(X, 2, contrast=1)
    if method is OF_REFERENCES[-1]:
        by_references = Relax(encoder, similarity=similarity, n_samples=12, grid=3)
    else:
        by_references = method(encoder, encoder.layer, similarity=similarity)
    close(by_score, by_references.attribute(X, 2, reference_embedding=REFERENCES, contrast=1))


@each_of_references
def test_references_in_each_form_explain_alike(method):
    encoder, images = seeded(PooledEncoder), random(4, 3, 10, 10, seed=6)
    z = torch.from_numpy(run(encoder, images)[0])
    explainer = method(encoder, encoder.layer)
    maps = explainer.attribute(X, [1, 0, 3], reference_embedding=z)
    close(explainer.attribute(X, [1, 0, 3], reference=images), maps)
    close(explainer.attribute(X, reference_embedding=z[[1, 0, 3]]), maps)
    close(explainer.attribute(X[:1], reference_embedding=z[1:2]), maps[:1], **tolerance(explainer))


@each_of_references
def test_two_references_at_once_are_refused(method):
    encoder = seeded(PooledEncoder)
    with pytest.raises(ValueError, match="exactly one of `reference`, `reference_embedding`"):
        method(encoder, encoder.layer).attribute(X, 1, reference=X, reference_embedding=REFERENCES)
    with pytest.raises(ValueError, match="exactly one of `reference`, `reference_embedding`"):
        method(SimilarityScore(encoder, REFERENCES), encoder.layer).attribute(X, 1, reference_embedding=REFERENCES)


def test_a_method_that_explains_no_classifiers_asks_for_references():
    encoder = seeded(PooledEncoder)
    decomposition = SimilarityDecomposition(encoder, encoder.layer)
    for call in (lambda: decomposition.attribute(X, 1), lambda: decomposition.attribute_all(X)):
        with pytest.raises(ValueError, match=r"exactly one of `reference`, `reference_embedding`.*got none"):
            call()


@pytest.mark.parametrize(
    "method", [ScoreCam, lambda model, layer: Relax(model, n_samples=30, grid=3)], ids=["ScoreCam", "Relax"]
)
@pytest.mark.parametrize("contrast", [None, 3, "rest"])
def test_without_references_a_target_is_a_class_and_its_score_the_logit(contrast, method):
    model = seeded(Classifier)
    maps = method(model, model.layer).attribute(X, [4, 0, 2], contrast=contrast)
    masks = masks_for((8, 8), n_samples=30, grid=3)

    for b, own in enumerate([4, 0, 2]):

        def logit(z, own=own):
            others = {None: 0, 3: z[3], "rest": np.mean(np.delete(z, own))}
            return z[own] - others[contrast]

        if method is ScoreCam:
            close(maps[b, 0], score_cam_of(model, model.layer, X[b], logit))
        else:
            close(maps[b, 0], relax_of(model, X[b], masks, logit), rtol=1e-5, atol=1e-7)


@each_method
@pytest.mark.parametrize("target", [2, [2, 0, 3]], ids=["int", "list"])
def test_a_noise_tunnel_without_noise_changes_nothing(target, make):
    method, _ = make()
    target = torch.tensor(target) if isinstance(target, list) else target
    smooth = NoiseTunnel(method).attribute(X, nt_samples=3, stdevs=0.0, target=target)
    close(smooth, method.attribute(X, target), **tolerance(method))


@each_method
def test_results_are_detached_and_no_grad_changes_nothing(make):
    method, _ = make()
    maps = method.attribute(X.clone().requires_grad_(), 2)
    assert not maps.requires_grad
    assert not method.embed(X.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        close(method.attribute(X, 2), maps, rtol=0, atol=0)


@pytest.mark.parametrize("make", [m for name, m in [*MAKES.items(), ("Relax", relax)] if name != "RelevanceCam"])
def test_inference_mode_changes_nothing_where_no_gradient_is_taken(make):
    method, _ = make()
    maps = method.attribute(X, 2)
    with torch.inference_mode():
        close(method.attribute(X, 2), maps, rtol=0, atol=0)


@each_method
def test_each_example_is_explained_as_if_it_were_alone(make):
    method, _ = make()
    maps = method.attribute(X, 2)
    for b in range(3):
        close(method.attribute(X[b : b + 1], 2), maps[b : b + 1], **tolerance(method))


@each_method
def test_an_empty_batch_has_an_empty_map(make):
    method, _ = make()
    maps = method.attribute(X[:0], 2)
    assert maps.shape == (0, 1, *((8, 8) if isinstance(method, Relax) else (4, 4)))
    assert maps.dtype == torch.float64
    if not isinstance(method, Relax):
        assert method.attribute_all(X[:0]).shape[0] == 0


@each_method
def test_embeddings_are_the_encoders(make):
    method, model = make()
    expected = run(model, X)[1].mean((2, 3))
    close(method.embed(X), expected)
    close(method.embed(X[:0]), expected[:0])


@each_method
def test_what_is_not_implemented_says_so_and_flags_are_captums(make):
    method, _ = make()
    with pytest.raises(NotImplementedError, match=type(method).__name__):
        method.attribute_future()
    assert not method.has_convergence_delta()
    if not isinstance(method, Relax):  # as Captum's other perturbation methods
        assert not method.multiplies_by_inputs
    assert hasattr(type(method).attribute, "__wrapped__")
    first = list(inspect.signature(method.attribute).parameters)[:3]
    assert first == ["inputs", "target", "additional_forward_args"]


@each_channels
def test_the_layer_is_read_when_it_is_asked_for(make):
    method, model = make()
    name = "again" if isinstance(method, ClassActivationMap) else "layer"
    expected = make(name)[0].attribute(X, 2)
    other, model = make("conv1")
    other.layer = getattr(model, name)
    close(other.attribute(X, 2), expected)


class Recalled(nn.Module):
    """A ReLU that is called twice, or two of them; CAM's linear layer at the end where there are classes."""

    def __init__(self, twice, classes):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 6) if classes else nn.Identity()
        self.early, self.layer, self.mean = nn.ReLU(), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        if twice:
            self.early = self.layer

    def forward(self, x):
        return self.fc(self.mean(self.layer(self.conv2(self.early(self.conv1(x))))).flatten(1))


@each_channels
def test_the_last_call_of_a_layer_that_is_called_several_times_is_explained_with_a_warning(make):
    classes = make is MAKES["ClassActivationMap"]
    twice, _ = make(model=lambda: Recalled(True, classes))
    once, _ = make(model=lambda: Recalled(False, classes))
    with pytest.warns(UserWarning, match=r"'.*' \(ReLU\) was called several times.*its last call"):
        maps = twice.attribute(X, 2)
    close(maps, once.attribute(X, 2))


@pytest.mark.parametrize("layer", ["layer4", None, [], ("a",)])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_no_module_is_refused(method, layer):
    with pytest.raises(TypeError, match="`layer`"):
        method(seeded(Classifier), layer)


@pytest.mark.parametrize("forward_func", [None, "resnet50", X])
@pytest.mark.parametrize("method", [*METHODS, lambda func, layer: Relax(func)], ids=[*MAKES, "Relax"])
def test_a_forward_func_that_cannot_be_called_is_refused(method, forward_func):
    with pytest.raises(TypeError, match="`forward_func`"):
        method(forward_func, nn.Identity())


@each_method
@pytest.mark.parametrize("inputs", [X.numpy(), [X], None, ()], ids=["array", "list", "None", "empty tuple"])
def test_inputs_that_are_no_tensors_are_refused(inputs, make):
    with pytest.raises(TypeError, match=r"`inputs`.*a tensor or a tuple of tensors"):
        make()[0].attribute(inputs, 2)


@pytest.mark.parametrize("method", OF_REFERENCES[1:], ids=[*list(MAKES)[2:], "Relax"])
def test_embeddings_that_are_not_finite_have_zero_maps_and_a_warning(method):
    encoder = OfActivations()
    A = torch.cat([HAND_A, HAND_A * torch.nan, HAND_A])
    explainer = method(encoder, encoder.layer)
    s = torch.tensor([[1.0, 2.0]]).double()
    if isinstance(explainer, RelevanceCam):
        explainer.layer = encoder[0] = nn.ReLU()
    message = r"Embeddings are zero or not finite \(inputs \[1\]\)"
    if isinstance(explainer, Relax):
        message = "Scores of masked inputs are not finite"
    with pytest.warns(UserWarning, match="finite") as caught:
        maps = explainer.attribute(A, reference_embedding=s)
    messages = [str(w.message) for w in caught]
    assert any(re.match(message, m) for m in messages)
    assert len(messages) == len(set(messages))
    assert maps[[0, 2]].isfinite().all()
    assert maps[0].any()
    assert not maps[1].any()
    close(maps[0], maps[2], **tolerance(explainer))


@each_of_references
def test_references_of_another_dimension_are_refused(method):
    encoder = seeded(PooledEncoder)
    before = state(encoder, X)
    with pytest.raises(ValueError, match=r"reference embeddings have 5 dimensions.*`inputs` have 6"):
        method(encoder, encoder.layer).attribute(X, 1, reference_embedding=random(4, 5))
    assert state(encoder, X) == before


@each_method
def test_a_data_parallel_model_is_explained_as_its_module(make):
    method, model = make()
    expected = method.attribute(X, 2)
    if isinstance(method, ClassActivationMap):
        parallel = ClassActivationMap(nn.DataParallel(model), model.layer)
    else:
        parallel, _ = make()
        model = parallel.forward_func.encoder
        parallel.forward_func = SimilarityScore(nn.DataParallel(model), REFERENCES)
    close(parallel.attribute(X, 2), expected)


@each_method
def test_bound_methods_are_explained_as_their_models(make):
    method, _ = make()
    expected = method.attribute(X, 2)
    method.forward_func = method.forward_func.forward
    close(method.attribute(X, 2), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_method
def test_devices_follow_the_inputs(make):
    method, _ = make()
    expected = method.attribute(X, 2)
    method, _ = make()
    method.forward_func.cuda()
    maps = method.attribute(X.cuda(), 2)
    assert maps.is_cuda
    close(maps.cpu(), expected, rtol=1e-5, atol=1e-7)


@each_perturbing
def test_a_progress_bar_is_shown_only_where_it_is_asked_for(perturbing, capsys):
    encoder = seeded(PooledEncoder)
    maps = [
        perturbing(encoder, show_progress=show).attribute(X, 1, reference_embedding=REFERENCES)
        for show in (False, True)
    ]
    close(*maps, rtol=0, atol=0)
    assert re.search(r"ScoreCam|Relax", capsys.readouterr().err)
    perturbing(encoder).attribute(X, 1, reference_embedding=REFERENCES)
    assert capsys.readouterr().err == ""


class Users(NormEncoder):
    """Six outputs of a linear layer on the mean of ``layer``, with batch norm and dropout before it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(super().forward(x))


class Stop(BaseException):
    """As KeyboardInterrupt: no Exception."""


CALLS = {
    "attribute": lambda method, x: method.attribute(x, 2, contrast="rest"),
    "attribute_all": lambda method, x: method.attribute_all(x),
    "attribute_pair": lambda method, x: method.attribute_pair(x, x),
    "attribute_matrix": lambda method, x: method.attribute_matrix(x, x),
    "embed": lambda method, x: method.embed(x),
}


COMBINATIONS = {
    f"{name}-{call}": (make, CALLS[call])
    for name, make in [*MAKES.items(), ("Relax", relax)]
    for call in CALLS
    if hasattr(make()[0], call) and (name, call) != ("ClassActivationMap", "attribute_pair")
}


@pytest.mark.filterwarnings("ignore:The model is in training mode")
@pytest.mark.filterwarnings("ignore:The locations add up")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("fails_at", [None, 1, 2, 3, 4])
@pytest.mark.parametrize(("make", "call"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_call_leaves_the_model_as_it_was(make, call, fails_at, training):
    method, model = make(model=Users)
    model.train(training)
    model.layer.register_forward_hook(lambda *_: None)
    model.conv2.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    left = [fails_at or 1000]

    def fail(*_):
        left[0] -= 1
        if not left[0]:
            raise Stop

    model.fc.register_forward_hook(fail)
    for grad_enabled, requires_grad in [(True, False), (True, True), (False, True)]:
        left[0] = fails_at or 1000
        x = X.clone().requires_grad_(requires_grad)
        with torch.set_grad_enabled(grad_enabled):
            before, own = leftovers(model, x), dict(vars(method))
            if fails_at == 1:
                with pytest.raises(Stop):
                    call(method, x)
            else:  # not every call has so many forward passes
                with contextlib.suppress(Stop):
                    call(method, x)
            assert leftovers(model, x)[:2] == before[:2]
            assert vars(method) == own


@pytest.mark.filterwarnings("ignore:The locations add up")
@each_method
def test_a_model_in_training_mode_is_told(make):
    method, model = make(model=Users)
    model.train()
    with pytest.warns(UserWarning, match="The model is in training mode"):
        method.attribute(X, 2)


@pytest.mark.parametrize("make", [*list(MAKES.values())[1:], relax], ids=[*list(MAKES)[1:], "Relax"])
def test_in_place_changes_after_the_layer_change_nothing(make):
    class InPlace(nn.Module):
        def __init__(self, relu):
            super().__init__()
            self.layer, self.relu, self.mean = nn.Conv2d(3, 6, 3, padding=1), relu, nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(self.mean(self.relu(self.layer(x))).flatten(1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = [make(model=lambda i=i: InPlace(nn.ReLU(inplace=i)))[0].attribute(X, 2) for i in (True, False)]
    close(*maps)


@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
@pytest.mark.parametrize("method", METHODS[1:])
def test_pairs_are_explained_on_both_sides(method, kind):
    encoder, other = seeded(kind), random(3, 3, 10, 6, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = method(encoder, encoder.layer)
        here, there = explainer.attribute_pair(X, other)
        close(here, explainer.attribute(X, reference=other))
        close(there, explainer.attribute(other, reference=X))


# Mistakes that would give a wrong map without a word


@pytest.mark.parametrize("method", [ClassActivationMap, RelevanceCam, ScoreCam, Relax])
def test_a_class_must_be_named_also_where_there_are_as_many_inputs_as_classes(method):
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *pool, nn.Linear(4, 3)))
    explainer = method(model, n_samples=10) if method is Relax else method(model, model[1])
    with pytest.raises(ValueError, match=r"`target` is needed: a class, 0 to 2"):
        explainer.attribute(X)
    assert explainer.attribute(X, [0, 1, 2]).shape[0] == 3


class OfBytes(PooledEncoder):
    """Takes images of bytes, and normalises them itself."""

    def forward(self, x):
        return super().forward(x.double() / 255 - 0.4)


@pytest.mark.parametrize(
    "explainer", [lambda e: ScoreCam(e, e.layer), lambda e: Relax(e, n_samples=40, seed=3)], ids=["ScoreCam", "Relax"]
)
def test_images_of_bytes_are_masked_to_their_rounding(explainer):
    encoder, x = seeded(OfBytes), (random(2, 3, 12, 12).abs() * 100).clamp(max=255).to(torch.uint8)
    s = random(1, 6)
    maps = explainer(encoder).attribute(x, reference_embedding=s)
    exact = explainer(encoder).attribute(x.double(), reference_embedding=s)
    assert maps.is_floating_point()
    close(maps.double(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
    assert maps.std() > 0


def test_relevances_of_bytes_are_refused_with_the_cure():
    encoder = seeded(OfBytes)
    with pytest.raises(TypeError, match=r"inputs\.float\(\)"):
        RelevanceCam(encoder, encoder.layer).attribute(torch.ones(1, 3, 12, 12, dtype=torch.uint8), reference=X[:1])


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_relax_says_which_reference_cannot_be_compared_with(bad, similarity):
    encoder, s = seeded(PooledEncoder), torch.stack([random(6), torch.full((6,), bad).double()])
    with pytest.warns(UserWarning, match=r"Embeddings are zero or not finite \(references \[1\]\)") as caught:
        maps = Relax(encoder, n_samples=20, similarity=similarity).attribute(X[:2], [0, 1], reference_embedding=s)
    assert len(caught) == 1
    assert maps[0].any()
    assert not maps[1].any()


def test_relevances_of_more_references_than_dimensions_are_those_one_by_one():
    encoder, s = seeded(lambda: Unbiased(nn.AdaptiveAvgPool2d(1), nn.Flatten())), random(9, 6)
    cam = RelevanceCam(encoder, encoder.conv2)
    maps = cam.attribute_all(X, reference_embedding=s)
    for k in range(9):
        close(maps[:, k : k + 1], cam.attribute(X, k, reference_embedding=s), rtol=1e-6, atol=1e-10)


class Cut(PooledEncoder):
    def forward(self, x):
        return self.head(self.features(x).detach()).flatten(2).mean(2)

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(6, 6, 1)


def test_lrp_says_that_the_gradient_is_cut():
    encoder = seeded(Cut)
    with pytest.raises(ValueError, match=r"LRP cannot follow.*cut of the gradient"):
        RelevanceCam(encoder, encoder.layer).attribute(X, reference_embedding=random(1, 6))


class Scaled(PooledEncoder):
    """Takes numbers that do not go with the inputs row by row."""

    def forward(self, x, factors):
        return super().forward(x) * factors


@pytest.mark.parametrize(
    "explainer", [lambda e: ScoreCam(e, e.layer), lambda e: Relax(e, n_samples=40)], ids=["ScoreCam", "Relax"]
)
def test_arguments_that_are_no_rows_are_given_whole(explainer):
    encoder, factors, s = seeded(Scaled), random(6).abs(), random(1, 6)
    maps = explainer(encoder).attribute(X, None, factors, reference_embedding=s)
    bound = Modified(seeded(PooledEncoder), lambda z: z * factors)
    close(maps, explainer(bound).attribute(X, reference_embedding=s))


@pytest.mark.filterwarnings("ignore:Relevances")
def test_relevances_that_are_not_finite_give_zero_maps():
    class Infinite(EpsilonRule):
        def _create_backward_hook_output(self, outputs):
            return lambda grad: grad * torch.inf

    encoder = seeded(lambda: Unbiased(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    encoder.conv2.rule = Infinite()
    with pytest.warns(UserWarning, match="Relevances of layer 'relu'"):
        maps = RelevanceCam(encoder, encoder.relu).attribute(X, 1, reference_embedding=REFERENCES)
    assert not maps.any()
