"""The formula of contract 2: M_i = N f.v_i, its signs, places, contrasts and thresholds, against independent values."""

from functools import partial

import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
from captum.attr import LayerGradientXActivation
from encoders import FlatEncoder, HeadEncoder, PooledEncoder, random, seeded
from helpers import close, run, silent
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from captum_fam import FeatureActivationMap, SimilarityDecomposition
from captum_fam.engine import places

METHODS = {"FAM": FeatureActivationMap, "decomposition": SimilarityDecomposition}
ENCODERS = {"aligned": PooledEncoder, "head": HeadEncoder, "flat": FlatEncoder}
X = random(2, 3, 8, 8)
# What is taken away from a score, as arguments of attribute and of the reference implementation.
LESS = {
    "nothing": {},
    "a reference": {"contrast": 1},
    "the rest": {"contrast": "rest"},
    "itself": {"contrast": "self"},
    "a threshold": {"threshold": 0.3},
}
KNOWN = {
    "cosine": LESS,
    "dot": LESS,
    "euclidean": {k: v for k, v in LESS.items() if k not in ("itself", "a threshold")},
}
CASES = [pytest.param(s, less, id=f"{s}-{name}") for s, known in KNOWN.items() for name, less in known.items()]


class Wide(nn.Module):
    """More dimensions than places, fewer channels: v is cheapest by forward-mode products."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 5, 4, stride=4), nn.Linear(5, 9, bias=False)

    def forward(self, x):
        return self.head(torch.relu(self.layer(x)).mean((2, 3)))


def sums_to_the_embedding(build):
    """An encoder without biases after its layer, whose places therefore add up to the embedding."""
    encoder = seeded(build)
    if hasattr(encoder, "head"):
        encoder.head.bias = None
    return encoder


def after(encoder, a):
    """What lies between the layer and the embedding, for one example's activations."""
    if isinstance(encoder, FlatEncoder):
        return a.reshape(-1)
    return encoder.head.weight.detach().numpy() @ a.reshape(len(a), -1).mean(1)


def f_of(method, z, s, k, similarity, less):
    if method == "FAM":
        return oracle.pair_weights(z, s, k, similarity, **less)
    return oracle.decomposition_weights(z, s, k, similarity, **less)


# Against the reference implementation, with a numeric Jacobian


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(("similarity", "less"), CASES)
def test_the_map_is_that_of_the_formula(kind, method, similarity, less):
    encoder = sums_to_the_embedding(ENCODERS[kind])
    z, A = run(encoder, X)
    s = random(3, z.shape[1], seed=5)
    explainer = METHODS[method](encoder, encoder.layer, similarity=similarity)
    one = explainer.attribute(X, [0, 2], reference_embedding=s, **less)
    terms = explainer.attribute(X, [0, 2], reference_embedding=s, attr_dim_summation=False, **less)
    for b, k in enumerate((0, 2)):
        f = f_of(method, z[b].numpy(), s.numpy(), k, similarity, less)
        a = A[b].numpy()
        if kind == "aligned":
            expected = oracle.aligned_map(f, a)
        else:
            expected = oracle.jacobian_map(f, oracle.numeric_jacobian(partial(after, encoder), a), a)
        close(one[b, 0], expected, rtol=1e-6, atol=1e-8)
        close(terms[b].sum(0), expected, rtol=1e-6, atol=1e-8)
    if less.get("contrast") != 1:
        every = explainer.attribute_all(X, reference_embedding=s, **less)
        close(torch.stack([every[0, 0], every[1, 2]])[:, None], one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("less", [{}, {"contrast": "self"}, {"threshold": -0.2}], ids=str)
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_pair_is_explained_on_both_sides_as_by_two_calls(kind, method, less):
    encoder, other = seeded(ENCODERS[kind]), random(2, 3, 8, 8, seed=9)
    explainer = METHODS[method](encoder, encoder.layer)
    here, there = explainer.attribute_pair(X, other, **less)
    close(here, explainer.attribute(X, reference=other, **less))
    close(there, explainer.attribute(other, reference=X, **less))


@pytest.mark.parametrize("less", LESS.values(), ids=LESS)
@pytest.mark.parametrize("method", METHODS)
def test_the_map_is_gradient_times_activation_of_the_held_constant_target(method, less):
    encoder = seeded(HeadEncoder)
    z, A = run(encoder, X)
    s = random(2, 4, seed=5)
    f = torch.stack([torch.from_numpy(f_of(method, row.numpy(), s.numpy(), 0, "cosine", less)) for row in z])
    held = LayerGradientXActivation(lambda x: (f * encoder(x)).sum(1), encoder.layer).attribute(X)
    expected = held.sum(1, keepdim=True) * A[0, 0].numel()
    close(METHODS[method](encoder, encoder.layer).attribute(X, 0, reference_embedding=s, **less), expected.detach())


def test_the_decompositions_self_is_the_gradient_of_the_cosine_by_place():
    encoder = seeded(FlatEncoder)
    z, A = run(encoder, X)
    s = random(1, z.shape[1], seed=5)
    cosine = LayerGradientXActivation(lambda x: F.cosine_similarity(encoder(x), s), encoder.layer).attribute(X)
    maps = SimilarityDecomposition(encoder, encoder.layer).attribute(X, reference_embedding=s, contrast="self")
    close(maps, cosine.sum(1, keepdim=True).detach() * A[0, 0].numel())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_self_of_an_image_with_itself_is_empty(method, similarity):
    encoder = seeded(HeadEncoder)
    explainer = METHODS[method](encoder, encoder.layer, similarity=similarity)
    plain, own = (explainer.attribute(X, reference=X, contrast=c) for c in (None, "self"))
    assert own.abs().max() <= 1e-12 * plain.abs().max()


# Sums


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(("similarity", "less"), CASES)
def test_a_decomposition_adds_up_to_the_score_less_what_is_taken_away(kind, similarity, less):
    encoder = sums_to_the_embedding(ENCODERS[kind])
    z, _ = run(encoder, X)
    s = random(3, z.shape[1], seed=5)
    score = np.array([[oracle.contributions(a, b, similarity).sum() for b in s.numpy()] for a in z.numpy()])
    if similarity == "euclidean":
        score = score + (s**2).sum(1).numpy()  # which no place of the input has
    less_of = {
        None: 0,
        1: score[:, 1],
        "rest": score[:, 1:].mean(1),
        "self": score[:, 0],
    }[less.get("contrast")] + less.get("threshold", 0)
    explainer = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    with silent():
        maps = explainer.attribute(X, 0, reference_embedding=s, **less)
    close(maps.mean((1, 2, 3)), score[:, 0] - less_of, atol=1e-10)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("similarity", KNOWN)
def test_fam_adds_up_to_the_weighted_lengths_of_the_dimensions(kind, similarity):
    encoder = sums_to_the_embedding(ENCODERS[kind])
    z, _ = run(encoder, X)
    s = random(1, z.shape[1], seed=5)
    maps = FeatureActivationMap(encoder, encoder.layer, similarity=similarity).attribute(X, reference_embedding=s)
    w = np.stack([oracle.weights(oracle.contributions(row, s[0].numpy(), similarity)) for row in z.numpy()])
    close(maps.mean((1, 2, 3)), (w * z.abs().numpy()).sum(1))


finite = st.floats(-8, 8).map(lambda v: round(v, 3))


@given(
    weight=hnp.arrays(np.float64, (4, 6), elements=finite),
    s=hnp.arrays(np.float64, (3, 4), elements=finite),
    signs=hnp.arrays(np.float64, 4, elements=st.sampled_from([-1.0, 1.0])),
    similarity=st.sampled_from(list(KNOWN)),
    less=st.sampled_from(list(LESS)),
    normalize=st.sampled_from(["minmax", None]),
    method=st.sampled_from(list(METHODS)),
)
@settings(max_examples=150, deadline=None)
def test_a_change_of_the_signs_of_dimensions_changes_no_map(weight, s, signs, similarity, less, normalize, method):
    if less not in KNOWN[similarity]:
        return
    encoder = seeded(lambda: HeadEncoder(embedding=4))
    options = {"normalize": normalize} if method == "FAM" else {}
    maps = []
    for d in (np.ones(4), signs):
        encoder.head.weight.data = torch.from_numpy(weight * d[:, None])
        encoder.head.bias.data = torch.from_numpy(0.1 * d)
        explainer = METHODS[method](encoder, encoder.layer, similarity=similarity, **options)
        maps.append(explainer.attribute(X, 0, reference_embedding=torch.from_numpy(s * d), **LESS[less]))
    close(*maps, rtol=1e-7, atol=1e-9 * float(1 + maps[0].abs().max()))


@given(
    weight=hnp.arrays(np.float64, (4, 6), elements=finite),
    s=hnp.arrays(np.float64, (3, 4), elements=finite),
    similarity=st.sampled_from(["cosine", "dot"]),
    threshold=st.floats(-2, 2),
)
@settings(max_examples=100, deadline=None)
def test_what_lies_above_a_threshold_adds_up_to_the_score_less_it(weight, s, similarity, threshold):
    encoder = sums_to_the_embedding(lambda: HeadEncoder(embedding=4))
    encoder.head.weight.data = torch.from_numpy(weight)
    z, _ = run(encoder, X)
    explainer = SimilarityDecomposition(encoder, encoder.layer, similarity=similarity)
    maps = explainer.attribute(X, 0, reference_embedding=torch.from_numpy(s), threshold=threshold)
    for row, M in zip(z.numpy(), maps):
        if oracle.norm(row) and oracle.norm(s[0]):
            score = oracle.contributions(row, s[0], similarity).sum()
            assert abs(float(M.mean()) - (score - threshold)) <= 1e-8 * (1 + abs(score))
        else:
            assert not M.any()


# Three ways to f.v


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [HeadEncoder, FlatEncoder, Wide])
def test_many_references_have_the_maps_that_each_has_alone(build, method):
    encoder = seeded(build)
    z, _ = run(encoder, X)
    s = random(z.shape[1] + 3, z.shape[1], seed=5)
    explainer = METHODS[method](encoder, encoder.layer)
    every = explainer.attribute_all(X, reference_embedding=s)
    close(every, torch.cat([explainer.attribute(X, k, reference_embedding=s) for k in range(len(s))], 1))


def test_forward_mode_products_are_taken_where_they_are_fewer(monkeypatch):
    asked = []
    products = places.Recording.place_products
    monkeypatch.setattr(places.Recording, "place_products", lambda self: asked.append(1) or products(self))
    wide, head = seeded(Wide), seeded(HeadEncoder)
    FeatureActivationMap(wide, wide.layer).attribute_all(X, reference_embedding=random(20, 9))
    assert asked
    asked.clear()
    FeatureActivationMap(head, head.layer).attribute_all(X, reference_embedding=random(50, 4))
    assert not asked


class NoSecondDerivative(torch.autograd.Function):
    """Twice its input; its gradient has none, and cannot be taken in a batch."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient + gradient.abs().max().item() * 0 + gradient


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all of it", "one path of two"])
def test_an_encoder_without_a_second_derivative_or_batches_of_gradients_has_the_same_maps(share):
    encoder, s = seeded(Wide), random(20, 9, seed=5)
    expected = SimilarityDecomposition(encoder, encoder.layer).attribute_all(X, reference_embedding=s, contrast="rest")
    plain = encoder.forward

    def forward(x):
        z = plain(x)
        return (1 - share) * z + share / 2 * NoSecondDerivative.apply(z)

    encoder.forward = forward
    maps = SimilarityDecomposition(encoder, encoder.layer).attribute_all(X, reference_embedding=s, contrast="rest")
    close(maps, expected)


# What has no such contrast


def manhattan(z, s):
    return -(z - s).abs()


@pytest.mark.parametrize("call", ["attribute", "attribute_all"])
@pytest.mark.parametrize(("less", "name"), [({"contrast": "self"}, "contrast"), ({"threshold": 0.1}, "threshold")])
@pytest.mark.parametrize("similarity", ["euclidean", manhattan])
def test_a_distance_has_neither_self_nor_threshold(similarity, less, name, call):
    encoder = seeded(HeadEncoder)
    fam = FeatureActivationMap(encoder, encoder.layer, similarity=similarity)
    with pytest.raises(ValueError, match=rf"{name}.*with itself.*\"cosine\" or \"dot\""):
        getattr(fam, call)(X, reference_embedding=random(1, 4), **less)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"contrast": "rest", "threshold": 0.5}, ValueError, "`contrast` or `threshold`"),
        ({"threshold": "high"}, TypeError, "`threshold`.*number"),
        ({"threshold": True}, TypeError, "`threshold`.*number"),
        ({"threshold": float("nan")}, ValueError, "`threshold`.*finite"),
        ({"contrast": "itself"}, ValueError, '`contrast`.*"rest" or "self".*itself'),
    ],
)
def test_wrong_contrasts_and_thresholds_are_refused_before_the_model_runs(arguments, error, match):
    encoder = seeded(HeadEncoder)
    encoder.forward = lambda x: pytest.fail("the model ran")
    fam = FeatureActivationMap(encoder, encoder.layer)
    with pytest.raises(error, match=match):
        fam.attribute(X, reference_embedding=random(2, 4), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("less", LESS.values(), ids=LESS)
@pytest.mark.parametrize("method", METHODS)
def test_each_dtype_comes_out_near_the_map_of_float64(method, less, dtype):
    encoder, s = seeded(HeadEncoder), random(2, 4, seed=5)
    exact = METHODS[method](encoder, encoder.layer).attribute(X, 0, reference_embedding=s, **less)
    encoder = encoder.to(dtype)
    maps = METHODS[method](encoder, encoder.layer).attribute(X.to(dtype), 0, reference_embedding=s.to(dtype), **less)
    assert maps.dtype == dtype
    error = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.15}[dtype]
    assert (maps.double() - exact).norm() <= error * exact.norm()
