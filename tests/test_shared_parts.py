"""SharedParts and FFAM: shares by hand and from scikit-learn's own NMF, sums that hold for any factorisation."""

import re
import sys
import warnings

import numpy as np
import pytest
import torch
from encoders import (
    FlatEncoder,
    HeadEncoder,
    OfActivations,
    PooledEncoder,
    PowerPooledEncoder,
    Shifted,
    TokenEncoder,
    TwoInputEncoder,
    random,
    seeded,
)
from helpers import close, run, silent
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_untouched import state
from torch import nn

from captum_fam import (
    FeatureFactorizationActivationMap,
    Hits,
    SharedParts,
    SimilarityDecomposition,
    SimilarityScore,
    compare_attributions,
    explain_hits,
    patch_tokens,
)
from captum_fam.methods.factorisation import MOST_STEPS, factorised

decomposition = pytest.importorskip("sklearn.decomposition")


class SignedEncoder(nn.Module):
    """Activations of all signs, whose places add up to the embedding."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 2, stride=2, bias=False)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.head(self.layer(x).mean((2, 3)))


class Squares(nn.Module):
    """The mean of the squares of places (B, C, h, w)."""

    def forward(self, places):
        return places.square().mean((2, 3))


class Finite(nn.Module):
    """The mean of the places that are finite."""

    def forward(self, places):
        return places.nan_to_num(0, 0, 0).mean((2, 3))


X, Y = random(3, 3, 8, 8), random(3, 3, 8, 12, seed=2)
ENCODERS = {
    "pooled": (PooledEncoder, {}),
    "head": (HeadEncoder, {}),
    "power": (PowerPooledEncoder, {}),
    "signed": (SignedEncoder, {}),
    "integrated": (HeadEncoder, {"n_steps": 3, "baseline": "zero"}),
    "integrated, mean": (PowerPooledEncoder, {"n_steps": 3}),
}
each_encoder = pytest.mark.parametrize("name", ENCODERS)
not_added_up = pytest.mark.filterwarnings("ignore:The places of layer")


def made(name, n_parts=3, **more):
    build, options = ENCODERS[name]
    encoder = seeded(build)
    return SharedParts(encoder, encoder.layer, n_parts, **options, **more)


def of_activations(n_parts, *after, **options):
    """Of images that are the activations themselves."""
    encoder = OfActivations(*after)
    return SharedParts(encoder, encoder.layer, n_parts, **options)


def on_a_line(*places):
    """An image of these places, (1, C, 1, N)."""
    return torch.tensor(places).double().T[None, :, None]


def strengths(A, n):
    """W (N, n) of activations (N, C) in NumPy, by scikit-learn; the rows of H have length one."""
    V = A - np.minimum(A.min(0), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = decomposition.NMF(n, init="nndsvda", max_iter=MOST_STEPS, random_state=0)
        W = model.fit_transform(V / V.max())
    return W * np.linalg.norm(model.components_, axis=1) * V.max()


def expected(method, x, y, b=0):
    """W, W' and the shares of a pair, from scikit-learn and the matrix of places."""
    encoder = method.forward_func
    A, R = (run(encoder, t)[1][b].flatten(1).T.numpy() for t in (x, y))
    W = strengths(np.concatenate([A, R]), method.n_parts)
    here, there = W[: len(A)], W[len(A) :]
    matrix = SimilarityDecomposition(
        encoder, method.layer, similarity=method.similarity, n_steps=method.n_steps, baseline=method.baseline
    )
    P = matrix.attribute_matrix(x, y)[b].numpy()
    p, q = (w / np.where(w.sum(1) > 0, w.sum(1), 1)[:, None] for w in (here, there))
    shares = p.T @ P @ q
    order = np.argsort(-(shares.sum(0) + shares.sum(1)), kind="stable")
    return here[:, order], there[:, order], shares[order][:, order], P, p[:, order], q[:, order]


# Values


def test_parts_that_no_place_shares_have_the_shares_of_their_places_by_hand():
    # Channels 0 and 1 are one part, channel 2 another: each place has one of them.
    x, y = on_a_line([3, 4, 0], [0, 0, 1], [0, 0, 0]), on_a_line([6, 8, 0], [0, 0, 2])
    found = of_activations(2, similarity="dot").explain(x, y)
    # Embeddings are means: (1, 4 / 3, 1 / 3) and (3, 4, 1).
    close(found.score, [3 + 16 / 3 + 1 / 3], 1e-6)
    close(found.shares, [[[25 / 3, 0], [0, 1 / 3]]], 1e-4, 1e-4)
    close(found.totals, [[25 / 3, 1 / 3]], 1e-4, 1e-4)
    close(found.residual, [0.0], 0, 1e-12)
    close(found.maps[0, :, 0], [[5.0, 0, 0], [0, 1, 0]], 1e-3, 1e-3)
    close(found.reference_maps[0, :, 0], [[10.0, 0], [0, 2]], 1e-3, 1e-3)
    here, there = of_activations(2, similarity="dot").attribute_pair(x, y)
    close(here[0, 0], [[25.0, 1, 0]], 1e-3, 1e-3)  # 3 places: the mean is 26 / 3
    close(there[0, 0], [[50 / 3, 2 / 3]], 1e-3, 1e-3)


def test_parts_that_are_in_every_place_have_shares_in_their_proportions_by_hand():
    # One part in all places; of the cosine nothing is left.
    x, y = on_a_line([3, 4], [6, 8]), on_a_line([1, 0])
    found = of_activations(1).explain(x, y)
    close(found.shares, [[[0.6]]])
    close(found.residual, [0.0], 0, 1e-12)


@not_added_up
@each_encoder
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_shares_are_the_matrix_of_places_by_the_parts_that_scikit_learn_finds(name, similarity):
    method = made(name, similarity=similarity)
    found = method.explain(X, Y)
    maps, back = method.attribute_pair(X, Y)
    for b in range(3):
        here, there, shares, P, p, q = expected(method, X, Y, b)
        close(found.maps[b].flatten(1).T, here)
        close(found.reference_maps[b].flatten(1).T, there)
        close(found.shares[b], shares)
        same = P * (p @ q.T)
        close(maps[b, 0].flatten(), len(P) * same.sum(1))
        close(back[b, 0].flatten(), len(P.T) * same.sum(0))
    z, s = method.forward_func(X), method.forward_func(Y)
    score = torch.cosine_similarity(z, s) if similarity == "cosine" else (z * s).sum(1)
    close(found.score, score.detach())


@not_added_up
@each_encoder
@settings(max_examples=10, deadline=None)
@given(n_parts=st.integers(1, 6), seed=st.integers(0, 99), similarity=st.sampled_from(["cosine", "dot"]))
def test_shares_and_the_residual_add_up_to_the_score_however_many_parts(name, n_parts, seed, similarity):
    method = made(name, n_parts, similarity=similarity)
    x, y = random(2, 3, 8, 8, seed=seed), random(2, 3, 8, 8, seed=seed + 100)
    found = method.explain(x, y)
    assert found.shares.shape == (2, n_parts, n_parts)
    close(found.shares.sum((1, 2)) + found.residual, found.score)
    close(found.totals.sum(1) + found.residual, found.score)
    assert (found.maps >= 0).all()
    assert (found.totals.diff(dim=1) <= 1e-12).all()  # the largest first
    close(method.attribute(x, reference=y).mean((1, 2, 3)), found.shares.diagonal(dim1=1, dim2=2).sum(1))


def test_nothing_is_left_where_places_add_up_and_all_that_they_lack_where_they_do_not():
    close(made("pooled").explain(X, Y).residual, torch.zeros(3).double(), 0, 1e-12)
    method = made("head")
    with pytest.warns(UserWarning, match="The places of layer 'layer' .* do not add up to the similarity"):
        found = method.explain(X, Y)
    z, s = method.forward_func(X), method.forward_func(Y)
    v, w = z - method.forward_func.head.bias, s - method.forward_func.head.bias
    close(found.residual, ((z * s - v * w).sum(1) / z.norm(dim=1) / s.norm(dim=1)).detach())


def test_with_one_part_the_map_is_that_of_the_decomposition():
    encoder = seeded(SignedEncoder)
    found = SharedParts(encoder, encoder.layer, 1).explain(X, Y)
    assert (found.maps > 0).all()
    assert (found.reference_maps > 0).all()
    whole = SimilarityDecomposition(encoder, encoder.layer).attribute_pair(X, Y)
    close(SharedParts(encoder, encoder.layer, 1).attribute_pair(X, Y), whole)


def test_what_places_without_a_part_contribute_is_in_the_residual():
    # On the way from the mean of an image's places to zero, a place of zeros contributes, too.
    x, y = on_a_line([2, 1], [0, 0]), on_a_line([0, 0], [4, 0], [2, 2])
    found = of_activations(1, Squares(), similarity="dot", n_steps=2).explain(x, y)
    # The squares of a place less those of the mean, (1, 1 / 2) and (2, 2 / 3), by the number of places:
    # (3 / 2, 3 / 8) of the first, and (4, -4 / 27) + (0, 32 / 27) of those with a part in the other.
    close(found.shares, [[[6 + 7 / 18]]])
    close(found.score, [14.0])  # of (2, 1 / 2) and (20 / 3, 4 / 3)
    close(found.residual, [8 - 7 / 18])


# The factorisation


def test_a_factorisation_of_few_parts_is_exact_where_there_are_few():
    generator = torch.Generator().manual_seed(0)
    W, H = (torch.rand(*size, generator=generator).double() for size in ((30, 2), (2, 7)))
    A = W @ H
    found = factorised(A, 2)
    left = A - found @ torch.linalg.lstsq(found, A).solution
    assert left.norm() < 1e-2 * A.norm()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), size=st.sampled_from([1e-30, 1e-3, 1e6, 1e30]), n_parts=st.integers(1, 4))
def test_parts_do_not_depend_on_the_size_of_activations_and_their_strengths_are_in_it(seed, size, n_parts):
    A = random(12, 5, seed=seed).relu()
    close(factorised(A * size, n_parts) / size, factorised(A, n_parts), 1e-6, 1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_a_shift_of_channels_below_zero_changes_nothing(seed):
    A = random(12, 5, seed=seed).relu()
    A[0] = 0  # the minimum of all channels
    shift = random(5, seed=seed + 1).abs()
    close(factorised(A - shift, 3), factorised(A, 3), 1e-6, 1e-9)


def test_positive_channels_are_not_shifted():
    close(factorised(torch.full((4, 3), 2.0).double(), 1), np.full((4, 1), 2 * 3**0.5))


def test_a_factorisation_is_the_same_each_time_and_says_nothing_of_its_steps():
    A = random(40, 20).abs()
    with silent():
        close(factorised(A, 15), factorised(A, 15), 0, 0)


def test_six_parts_or_as_many_as_there_are_channels():
    assert of_activations(None).explain(random(1, 9, 2, 3).abs(), random(1, 9, 2, 3, seed=2).abs()).maps.shape[1] == 6
    assert of_activations(None).explain(random(1, 4, 2, 3).abs(), random(1, 4, 2, 3, seed=2).abs()).maps.shape[1] == 4
    assert of_activations(None).explain(random(1, 9, 1, 2).abs(), random(1, 9, 1, 2, seed=2).abs()).maps.shape[1] == 4


# Forms


def test_a_reference_may_be_shared_and_chunks_change_nothing():
    method = made("pooled")
    found, one = method.explain(X, Y), method.explain(X, Y[1:2])
    close(one.shares[1], found.shares[1])
    close(one.reference_maps[1], found.reference_maps[1])
    for most in (1, 2):
        parts = method.explain(X, Y, internal_batch_size=most)
        for field in ("maps", "reference_maps", "shares", "residual", "score"):
            close(getattr(parts, field), getattr(found, field))
        close(method.explain(X, Y[:1], internal_batch_size=most).shares[0], found.shares[0])


def test_a_tensor_of_baselines_is_cut_with_the_inputs():
    encoder = seeded(PowerPooledEncoder)
    A = run(encoder, X)[1]
    method = SharedParts(encoder, encoder.layer, 2, n_steps=2, baseline=A.flip(0) / 2)
    close(method.explain(X, X, internal_batch_size=1).shares, method.explain(X, X).shares)


def test_a_target_takes_its_reference():
    method = made("pooled")
    maps = method.attribute(X, [2, 0, 1], reference=Y)
    close(maps, method.attribute(X, reference=Y[[2, 0, 1]]))
    close(method.attribute(X, 1, reference=Y)[0], method.attribute(X[:1], reference=Y[1:2])[0])
    signed = made("signed")
    maps = signed.attribute(X, reference=Y)
    assert (maps < 0).any()
    close(signed.attribute(X, reference=Y, relu_attributions=True), maps.relu())


def test_nothing_has_no_parts():
    found = made("pooled").explain(X[:0], Y[:1])
    assert found.maps.shape == (0, 3, 4, 4)
    assert found.shares.shape == (0, 3, 3)
    assert repr(found) == "SharedPartsExplanation(0 pairs, 3 parts, maps=(0, 3, 4, 4))"


@pytest.mark.parametrize("dim", [1, 3])
def test_signals_and_volumes_have_parts(dim):
    encoder = seeded(lambda: PooledEncoder(dim))
    found = SharedParts(encoder, encoder.layer, 2).explain(random(2, 3, *[6] * dim), random(2, 3, *[8] * dim, seed=2))
    assert found.maps.shape == (2, 2, *[3] * dim)
    assert found.reference_maps.shape == (2, 2, *[4] * dim)


@not_added_up
def test_tokens_have_parts_where_they_lie():
    encoder = seeded(TokenEncoder)
    x, y = random(2, 3, 12, 12), random(2, 3, 12, 12, seed=2)
    method = SharedParts(encoder, encoder.layer, 2, reshape_transform=patch_tokens(3, 3))
    found = method.explain(x, y)
    assert found.maps.shape == (2, 2, 3, 3)
    close(found.shares.sum((1, 2)) + found.residual, found.score)


def test_the_input_of_a_layer_has_parts():
    encoder = seeded(PooledEncoder)
    A, R = (run(encoder, t, layer=encoder.conv2)[1] for t in (X, Y))  # what the last ReLU takes
    maps = SharedParts(encoder, encoder.layer, 2, similarity="dot").attribute(
        X, reference=Y, attribute_to_layer_input=True
    )
    assert maps.shape == (3, 1, 4, 4)
    a, r = A[0].flatten(1).T.numpy(), R[0].flatten(1).T.numpy()
    W = strengths(np.concatenate([a, r]), 2)
    p = W / W.sum(1, keepdims=True)
    same = (np.maximum(a, 0) / len(a) @ np.maximum(r, 0).T / len(r)) * (p[: len(a)] @ p[len(a) :].T)
    close(maps[0, 0].flatten(), len(a) * same.sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_maps_have_the_type_of_the_activations_and_shares_at_least_single_precision(dtype):
    encoder = OfActivations().to(dtype)
    x, y = (random(1, 4, 2, 3, seed=seed).abs().to(dtype) for seed in (1, 2))
    method = SharedParts(encoder, encoder.layer, 2)
    found = method.explain(x, y)
    assert {found.maps.dtype, found.reference_maps.dtype, method.attribute(x, reference=y).dtype} == {dtype}
    assert {found.shares.dtype, found.residual.dtype, found.score.dtype} == {torch.float32}
    close((found.shares.sum((1, 2)) + found.residual), found.score, 1e-5, 1e-5)


def test_zero_and_broken_images_have_no_shares_and_are_named():
    x, y = random(3, 4, 2, 2).abs(), random(3, 4, 2, 2, seed=2).abs()
    x[0], y[2, 0, 0, 0] = 0, float("nan")
    with pytest.warns(UserWarning, match=r"(?s)inputs \[0\].*references \[2\]"):
        found = of_activations(2).explain(x, y)
    good = of_activations(2).explain(x[1:2], y[1:2])
    close(found.shares[1:2], good.shares)
    for values in (found.shares, found.maps, found.reference_maps):
        assert not values[[0, 2]].any()
    assert found.residual[0] == 0


def test_activations_that_are_not_finite_are_named_where_the_embedding_is():
    encoder = OfActivations(Finite())
    x = random(1, 4, 2, 2).abs()
    broken = x.clone()
    broken[0, 0, 0, 0] = float("inf")
    for pair in ((broken, x), (x, broken)):
        with pytest.warns(UserWarning, match="Activations are not finite: the shares of these pairs are zero"):
            found = SharedParts(encoder, encoder.layer, 2).explain(*pair)
        assert not found.shares.any()


def test_further_arguments_go_with_their_inputs():
    encoder = seeded(Shifted)
    method = SharedParts(encoder, encoder.layer, 2, n_steps=2)
    shift = random(3, 6, seed=5)
    whole = method.attribute(X, [1, 0, 2], (shift, 2.0), reference=Y)
    one = method.attribute(X[2:], 0, (shift[2:], 2.0), reference=Y[2:])
    close(whole[2:], one)
    with pytest.raises(ValueError, match="does not fit the 1 of `reference`"):
        method.attribute(X, 0, (shift, 2.0), reference=Y[:1])


def test_the_model_is_as_it_was_and_gradients_need_not_be_on():
    encoder = seeded(HeadEncoder)
    encoder.head.bias.data.zero_()
    method = SharedParts(encoder, encoder.layer, 2)
    before = state(encoder)
    with torch.no_grad():
        found = method.explain(X, Y)
    assert state(encoder) == before
    assert not found.shares.requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        method.explain(X, Y)
    with torch.inference_mode():  # aligned: no gradient is needed
        close(made("pooled").explain(X, Y).shares.clone(), made("pooled").explain(X, Y).shares.clone())


def test_compare_attributions_gives_it_the_references():
    encoder = seeded(PooledEncoder)
    score = SimilarityScore(encoder, encoder(Y).detach())
    methods = ["SharedParts", "FeatureFactorizationActivationMap"]
    maps = compare_attributions(score, encoder.layer, X, 1, methods, reference=Y, show_progress=False)
    assert [tuple(M.shape) for M in maps.values()] == [(3, 1, 8, 8)] * 2
    with pytest.warns(UserWarning, match="SharedParts has no map: ValueError: it compares places"):
        compare_attributions(score, encoder.layer, X, 1, methods, show_progress=False)


def test_a_score_says_which_similarity():
    encoder = seeded(PooledEncoder)
    score = SimilarityScore(encoder, encoder(Y).detach(), "dot")
    close(SharedParts(score, encoder.layer, 2).explain(X, Y).score, (encoder(X) * encoder(Y)).sum(1).detach())


# Errors


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda e: SharedParts(e, e.layer, 0), ValueError, "Expected `n_parts` to be a positive int"),
        (lambda e: SharedParts(e, e.layer, 2.0), TypeError, "Expected `n_parts` to be a positive int"),
        (lambda e: SharedParts(e, [e.layer]), TypeError, "Expected `layer` to be one module, but got a list of 1"),
        (lambda e: SharedParts(e, e.layer, n_steps=0), ValueError, "`n_steps`"),
        (
            lambda e: SharedParts(e, e.layer, 7).explain(X, Y),
            ValueError,
            "Expected `n_parts` to be at most 6, as the layer has 6 channels and the images have 40 places, but got 7.",
        ),
        (
            lambda e: SharedParts(e, e.layer).attribute(X, reference_embedding=random(3, 6)),
            ValueError,
            "SharedParts compares places, and embeddings have none: pass the references as inputs of the encoder, by"
            " name, reference=images.",
        ),
        (
            lambda e: SharedParts(e, e.layer, similarity="euclidean").explain(X, Y),
            ValueError,
            'SharedParts needs a similarity that is a sum over pairs of places, "cosine" or "dot", but got'
            " 'euclidean'.",
        ),
        (lambda e: SharedParts(e, e.layer).explain(X, Y[:2]), ValueError, "to hold one reference or 3"),
        (lambda e: SharedParts(e, e.layer).explain(X, Y, internal_batch_size=0), ValueError, "`internal_batch_size`"),
        (
            lambda e: explain_hits(X[:1], Hits(images=Y), e, e.layer, method=SharedParts),
            ValueError,
            "It explains pairs of images: SharedParts(encoder, layer).explain(query, reference).",
        ),
    ],
)
def test_errors_say_what_would_work(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call(seeded(PooledEncoder))


def test_a_layer_of_several_tensors_is_refused():
    encoder = seeded(TwoInputEncoder)
    inputs = random(2, 3, 8, 8), random(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"SharedParts needs a layer with one tensor, but 'layer' .* has 2"):
        SharedParts(encoder, encoder.layer).explain(inputs, inputs)


def test_without_scikit_learn_an_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ValueError, match=re.escape("scikit-learn is not installed: pip install 'captum-fam[parts]'")):
        made("pooled").explain(X, Y)


# FFAM


def ffam(encoder, *others, **options):
    return FeatureFactorizationActivationMap(encoder, [encoder.layer, *others] if others else encoder.layer, **options)


def lengths(encoder, x, score):
    """The length of a score's gradient at each place, by autograd through the encoder itself."""
    kept = []
    handle = encoder.layer.register_forward_hook(lambda m, i, o: kept.append(o.detach().requires_grad_()) or kept[-1])
    z = encoder(x)
    handle.remove()
    (g,) = torch.autograd.grad(score(z).sum(), kept[0])
    return g.norm(dim=1)


@pytest.mark.parametrize("build", [PooledEncoder, HeadEncoder, PowerPooledEncoder, FlatEncoder])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_ffam_is_the_sum_of_the_parts_by_the_length_of_the_gradient(build, similarity):
    encoder = seeded(build)
    s = encoder(random(3, 3, 8, 8, seed=2)).detach()
    scores = {
        "cosine": lambda z: torch.cosine_similarity(z, s),
        "dot": lambda z: (z * s).sum(1),
        "euclidean": lambda z: -(z - s).square().sum(1),
    }
    A = run(encoder, X)[1]
    W = np.stack([strengths(a.flatten(1).T.numpy(), 2).sum(1).reshape(4, 4) for a in A])
    maps = ffam(encoder, n_parts=2, similarity=similarity).attribute(X, [0, 1, 2], reference_embedding=s)
    close(maps[:, 0], W * lengths(encoder, X, scores[similarity]).numpy())


def test_the_contrast_of_ffam_is_a_difference_of_its_maps():
    method, s = ffam(seeded(HeadEncoder)), random(3, 4, seed=2)
    maps = method.attribute_all(X, reference_embedding=s)
    close(method.attribute(X, 0, reference_embedding=s, contrast=2), maps[:, :1] - maps[:, 2:])
    rest = torch.stack([maps[:, k] - (maps.sum(1) - maps[:, k]) / 2 for k in range(3)], 1)
    close(method.attribute_all(X, reference_embedding=s, contrast="rest"), rest)
    terms = method.attribute(X, 1, reference_embedding=s, contrast="rest", attr_dim_summation=False)
    assert terms.shape == (3, 6, 4, 4)
    close(terms.sum(1), rest[:, 1])


def test_ffam_has_captums_forms():
    encoder, s = seeded(PooledEncoder), random(4, 6, seed=2)
    method = ffam(encoder)
    maps = method.attribute(X, [0, 3, 1], reference_embedding=s)
    close(method.attribute(X, [0, 3, 1], reference_embedding=s, internal_batch_size=1), maps)
    terms = method.attribute(X, [0, 3, 1], reference_embedding=s, attr_dim_summation=False)
    assert terms.shape == (3, 6, 4, 4)
    close(terms.sum(1, keepdim=True), maps)
    one, early = ffam(encoder, encoder.early).attribute(X, [0, 3, 1], reference_embedding=s)
    close(one, maps)
    assert early.shape == (3, 1, 8, 8)
    close(method.attribute_all(X, reference_embedding=s)[[0, 1, 2], [0, 3, 1]], maps[:, 0])
    assert method.attribute(X[:0], 0, reference_embedding=s).shape == (0, 1, 4, 4)


def test_ffam_of_a_match_with_itself_is_zero():
    encoder = seeded(PooledEncoder)
    assert ffam(encoder).attribute(X, reference=X).abs().max() < 1e-12


def test_ffam_of_broken_activations_is_zero():
    x = random(2, 4, 2, 2).abs()
    x[0, 0, 0, 0] = float("nan")
    with pytest.warns(UserWarning, match=r"inputs \[0\]"):
        maps = ffam(OfActivations()).attribute(x, reference_embedding=random(1, 4, seed=2))
    assert not maps[0].any()
    assert maps[1].any()


def test_ffam_says_what_it_cannot_do():
    encoder, s = seeded(PooledEncoder), random(3, 6, seed=2)
    with pytest.raises(ValueError, match="FeatureFactorizationActivationMap has no contrast='self'"):
        ffam(encoder).attribute(X, reference_embedding=s, contrast="self")
    with pytest.raises(ValueError, match="at most 6"):
        ffam(encoder, n_parts=7).attribute(X, reference_embedding=s)
    with pytest.raises(ValueError, match="Expected `n_parts` to be a positive int"):
        ffam(encoder, n_parts=-1)
    text = "The gradient of a similarity is ruled out by torch.inference_mode(); use torch.no_grad() instead."
    with torch.inference_mode(), pytest.raises(RuntimeError, match=re.escape(text)):
        ffam(encoder).attribute(X, reference_embedding=s)
