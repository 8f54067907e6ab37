"""Integrated places (n_steps, baseline): against NumPy, Captum and hooks by hand, and what they add up to."""

import contextlib

import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
from captum.attr import LayerIntegratedGradients
from encoders import (
    Function,
    OfActivations,
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
    FeatureActivationMap,
    SimilarityDecomposition,
    channels_last,
    patch_tokens,
)

X, S = random(3, 3, 8, 8), random(4, 4, seed=2)
METHODS = [FeatureActivationMap, SimilarityDecomposition]
each_method = pytest.mark.parametrize("method", METHODS)


def places(encoder, layer=None, method=SimilarityDecomposition, n_steps=3, **options):
    return method(encoder, encoder.layer if layer is None else layer, n_steps=n_steps, **options)


class Curved(nn.Module):
    """A convolution, the layer and a head on what ``join`` makes of input, layer input and layer output."""

    def __init__(self, join=lambda self, x, h, a: F.gelu(a).mean((2, 3))):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.join = nn.Linear(4, 4), join

    def forward(self, x, *more):
        h = torch.tanh(self.stem(x))
        return self.head(self.join(self, x, h, self.layer(h), *more))


CURVED = seeded(Curved)


# Against NumPy


def integral(function, A, B, n):
    """v (D, *spatial) by the rule of Gauss and Legendre, with gradients by differences."""
    rule = zip(*np.polynomial.legendre.leggauss(n))
    return sum(
        w / 2 * oracle.place_embeddings(oracle.numeric_jacobian(function, B + (1 + t) / 2 * (A - B)), A - B)
        for t, w in rule
    )


HAND = OfActivations(
    nn.Flatten(), nn.Tanh(), *seeded(lambda: nn.Sequential(nn.Linear(12, 5), nn.SiLU(), nn.Linear(5, 4)))
)
ACTIVATIONS = random(3, 2, 2, 3, seed=3).numpy()


def embedding(A):
    W, b, U, c = (p.detach().numpy() for p in HAND.parameters())
    h = W @ np.tanh(A.ravel()) + b
    return U @ (h / (1 + np.exp(-h))) + c


def own_f(z, s):
    return s * z**2


WAYS = {
    "FAM": (FeatureActivationMap, {}, lambda z, k, asked: oracle.pair_weights(z, S.numpy(), k, "cosine", **asked)),
    "FAM of distances, signed": (
        FeatureActivationMap,
        {"similarity": "euclidean", "normalize": None},
        lambda z, k, asked: oracle.pair_weights(z, S.numpy(), k, "euclidean", None, **asked),
    ),
    **{
        similarity: (
            SimilarityDecomposition,
            {"similarity": similarity},
            lambda z, k, asked, of=similarity: oracle.decomposition_weights(z, S.numpy(), k, of, **asked),
        )
        for similarity in oracle.FACTORS
    },
    "own f": (SimilarityDecomposition, {"dimension_weights": own_f}, lambda z, k, asked: own_f(z, S.numpy()[k])),
}
BASELINES = {
    "mean": lambda A: A.mean((2, 3), keepdims=True),
    "zero": lambda A: 0 * A,
    **{str(shape): random(*shape, seed=4) for shape in [(3, 2, 2, 3), (1, 2, 1, 1), (2, 1, 1), (3, 1, 2, 1), (1,)]},
}
each_baseline = pytest.mark.parametrize("baseline", BASELINES)


def baseline_of(name, A):
    """What the argument is, and the baseline itself in the shape of A."""
    given = BASELINES[name]
    return (
        (name, np.broadcast_to(given(A), A.shape))
        if callable(given)
        else (given, np.broadcast_to(given.numpy(), A.shape))
    )


def expected_maps(A, B, n, f_of, own, asked):
    maps = []
    for a, b, k in zip(A, B, own):
        maps.append(a[0].size * np.tensordot(f_of(embedding(a), k, asked), integral(embedding, a, b, n), 1))
    return np.stack(maps)[:, None]


@each_baseline
@pytest.mark.parametrize("way", WAYS)
def test_maps_are_those_of_numpy(way, baseline):
    method, options, f_of = WAYS[way]
    given, B = baseline_of(baseline, ACTIVATIONS)
    maps = places(HAND, method=method, baseline=given, **options).attribute(
        torch.from_numpy(ACTIVATIONS), [2, 0, 3], reference_embedding=S
    )
    close(maps, expected_maps(ACTIVATIONS, B, 3, f_of, [2, 0, 3], {}), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "asked", [{"contrast": 1}, {"contrast": "rest"}, {"contrast": "self"}, {"threshold": 0.3}], ids=str
)
@pytest.mark.parametrize("way", ["FAM", "cosine", "dot"])
def test_maps_of_differences_are_those_of_numpy(way, asked):
    method, options, f_of = WAYS[way]
    _, B = baseline_of("mean", ACTIVATIONS)
    maps = places(HAND, method=method, n_steps=2, **options).attribute(
        torch.from_numpy(ACTIVATIONS), [2, 0, 3], reference_embedding=S, **asked
    )
    close(maps, expected_maps(ACTIVATIONS, B, 2, f_of, [2, 0, 3], asked), rtol=1e-6, atol=1e-8)


def test_a_product_of_one_place_by_hand():
    """z = A^3 from B = 1 to A = 3: two nodes have the integral 3 t^2 exactly, so v = 27 - 1."""
    encoder = OfActivations(Function(lambda a: a.flatten(1) ** 3))
    explainer = places(
        encoder, similarity="dot", n_steps=2, baseline=torch.ones(1, 1, 1, 1), channel_weights="jacobian"
    )
    a, s = torch.full((1, 1, 1, 1), 3.0).double(), torch.full((1, 1), 5.0).double()
    map, delta = explainer.attribute(a, reference_embedding=s, return_convergence_delta=True)
    close(map, np.full((1, 1, 1, 1), 130.0))
    close(delta, np.zeros(1), atol=1e-12)
    one = places(encoder, similarity="dot", n_steps=1, baseline="zero", channel_weights="jacobian")
    # its node is 1.5: v = 3 * 3 * 1.5^2
    map, delta = one.attribute(a, reference_embedding=s, return_convergence_delta=True)
    close(map.flatten(), np.array([5 * 20.25]))
    close(delta, np.array([101.25 - 5 * 27]))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@each_baseline
def test_the_matrix_is_that_of_numpy_and_with_its_baselines_adds_up_to_the_score(similarity, baseline):
    given, B = baseline_of(baseline, ACTIVATIONS)
    others = random(3, 2, 2, 3, seed=5).numpy()
    _, B_others = baseline_of(baseline, others)
    explainer = places(HAND, similarity=similarity, baseline=given, n_steps=24)
    matrix, rows, columns, both = explainer.attribute_matrix(
        torch.from_numpy(ACTIVATIONS), torch.from_numpy(others), return_baselines=True
    )
    for i, (a, b, r, c) in enumerate(zip(ACTIVATIONS, B, others, B_others)):
        z, s = embedding(a), embedding(r)
        scale = 1 if similarity == "dot" else oracle.norm(z) * oracle.norm(s)
        v, w = (integral(embedding, *of, 24).reshape(4, -1) / scale**0.5 for of in ((a, b), (r, c)))
        z0, s0 = embedding(b) / scale**0.5, embedding(c) / scale**0.5
        parts = [v.T @ w, v.T @ s0, w.T @ z0, (z0 @ s0)[None]]
        close([matrix[i], rows[i], columns[i], both[i]], parts, rtol=1e-6, atol=1e-8)
        close(sum(part[i].sum() for part in (matrix, rows, columns, both)), np.float64(z @ s / scale), rtol=1e-6)
    here, there = explainer.attribute_pair(torch.from_numpy(ACTIVATIONS), torch.from_numpy(others))
    close((matrix.sum(2) + rows) * 6, here.flatten(1), rtol=1e-7, atol=1e-10)
    close((matrix.sum(1) + columns) * 6, there.flatten(1), rtol=1e-7, atol=1e-10)
    close(matrix, explainer.attribute_matrix(torch.from_numpy(ACTIVATIONS), torch.from_numpy(others)))


# Against Captum, and hooks by hand


def weights_of_cosine(z, s):
    return F.normalize(s, dim=1) / z.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_terms_and_delta_are_those_of_captums_layer_integrated_gradients(n):
    start = random(3, 3, 8, 8, seed=7)
    z, A = run(CURVED, X)
    _, B = run(CURVED, start)
    f = weights_of_cosine(z, S[1:2])
    captum = LayerIntegratedGradients(lambda x, f: (f * CURVED(x)).sum(1), CURVED.layer)
    expected, missed = captum.attribute(
        X, start, additional_forward_args=f, n_steps=n, method="gausslegendre", return_convergence_delta=True
    )
    terms, delta = places(CURVED, n_steps=n, baseline=B).attribute(
        X, 1, attr_dim_summation=False, reference_embedding=S, return_convergence_delta=True
    )
    rounded = {"rtol": 1e-6, "atol": 1e-8}  # Captum's weights of the nodes are in single precision
    close(terms / A[0, 0].numel(), expected.detach(), **rounded)
    close(delta, missed, **rounded)


def by_hand(encoder, f, *inputs, baseline, n=3, layer=None):
    """(A - B) * the mean of d(f.z)/dA over the path, in the layer's form: its last call is replaced at each node."""
    layer = encoder.layer if layer is None else layer
    calls = []
    with torch.no_grad(), contextlib.closing(_hook(layer, lambda o: calls.append(o))):
        encoder(*inputs)
    A = calls[-1] if isinstance(calls[-1], tuple) else (calls[-1],)
    B = baseline(*A) if isinstance(calls[-1], tuple) else (baseline(*A),)
    total = [torch.zeros_like(a) for a in A]
    for t, w in zip(*np.polynomial.legendre.leggauss(n)):
        leaves = tuple((b + (1 + t) / 2 * (a - b)).requires_grad_() for a, b in zip(A, B))
        count = iter(range(1, 1 + len(calls)))
        put = lambda o, v=leaves, c=count: (v if isinstance(o, tuple) else v[0]) if next(c) == len(calls) else None  # noqa: E731
        with contextlib.closing(_hook(layer, put)):
            gradients = torch.autograd.grad((f * encoder(*inputs)).sum(), leaves)
        total = [s + w / 2 * g * (a - b) for s, g, a, b in zip(total, gradients, A, B)]
    return tuple(total) if isinstance(calls[-1], tuple) else total[0]


def _hook(layer, function):
    handle = layer.register_forward_hook(lambda m, i, o: function(o))
    handle.close = handle.remove
    return handle


def mean_map(a):
    return a.mean((2, 3), keepdim=True).expand_as(a)


HABITS = {
    "a residual around the layer": lambda self, x, h, a: F.gelu(h + a).mean((2, 3)),
    "a view by the number of inputs": lambda self, x, h, a: F.gelu(a).reshape(len(x), 4, -1).square().mean(2),
    "a gate by another branch": lambda self, x, h, a: (F.gelu(a) * h.sigmoid()).mean((2, 3)),
    "a layer that is called again": lambda self, x, h, a: F.gelu(self.layer(torch.tanh(a))).mean((2, 3)),
    "again, with a residual": lambda self, x, h, a: F.gelu(a + self.layer(torch.tanh(a))).mean((2, 3)),
    "an argument for each row": lambda self, x, h, a, shift: F.gelu(a + shift).mean((2, 3)),
    "rows in a loop": lambda self, x, h, a: torch.stack([F.gelu(a[i]).mean((1, 2)) for i in range(len(x))]),
}


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("size", [None, 2])
def test_encoders_that_cannot_take_all_points_at_once_have_the_maps_of_hooks_by_hand(habit, size):
    encoder, more = seeded(lambda: Curved(HABITS[habit])), (random(3, 4, 1, 1, seed=6),) if "argument" in habit else ()
    f = weights_of_cosine(encoder(X, *more).detach(), S[1:2])
    terms = by_hand(encoder, f, X, *more, baseline=mean_map)
    again = pytest.warns(UserWarning, match="called several times.*its last call") if "again" in habit else silent()
    with again:
        maps = places(encoder).attribute(X, 1, more or None, reference_embedding=S, internal_batch_size=size)
    close(maps, terms.sum(1, keepdim=True) * 64)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_with_the_statistics_of_a_batch_takes_each_node_by_itself(training):
    encoder = seeded(lambda: Curved(lambda self, x, h, a: torch.tanh(self.norm(a)).mean((2, 3))))
    encoder.norm = nn.BatchNorm2d(4, track_running_stats=training).double().train(training)
    before = state(encoder)
    with pytest.warns(UserWarning, match="training mode and has batch norm") if training else contextlib.nullcontext():
        maps = places(encoder, similarity="dot").attribute(X, 1, reference_embedding=S)
    assert state(encoder) == before
    close(maps, by_hand(encoder, S[1], X, baseline=mean_map).sum(1, keepdim=True) * 64)


class SequenceFirst(nn.Module):
    """Tokens (L, B, C), the layer's too."""

    def __init__(self):
        super().__init__()
        self.layer, self.mix, self.head = nn.Linear(3, 5), nn.MultiheadAttention(5, 1), nn.Linear(5, 4)

    def forward(self, x):
        a = torch.tanh(self.layer(x.flatten(2).permute(2, 0, 1)))
        return self.head(self.mix(a, a, a)[0].mean(0))


@pytest.mark.parametrize("side", [2, 1])  # places: four, or as many as inputs
def test_layers_with_the_sequence_first_have_the_maps_of_hooks_by_hand(side):
    x = random(3, 3, 2, 2) if side == 2 else random(3, 3, 1, 3)
    encoder, N = seeded(SequenceFirst), x[0, 0].numel()
    f = weights_of_cosine(encoder(x).detach(), S[1:2])
    terms = by_hand(encoder, f, x, baseline=lambda a: a.mean(0, keepdim=True).expand_as(a))
    maps = places(encoder, reshape_transform=lambda a: a.permute(1, 2, 0)).attribute(x, 1, reference_embedding=S)
    close(maps, terms.permute(1, 2, 0).sum(1, keepdim=True) * N)


@pytest.mark.parametrize("baseline", ["mean", "zero"])
@pytest.mark.parametrize("layout", [None, patch_tokens(3, 3)], ids=["found", "given"])
def test_the_class_token_stays_as_it_is(layout, baseline):
    encoder, x, s = seeded(TokenEncoder), random(3, 3, 12, 12), random(1, 6, seed=2)

    def start(a):
        patches = a[:, 1:].mean(1, keepdim=True).expand_as(a[:, 1:])
        return torch.cat([a[:, :1], patches if baseline == "mean" else 0 * patches], 1)

    z, A = run(encoder, x)
    f = weights_of_cosine(z, s)
    explainer = places(encoder, n_steps=20, baseline=baseline, reshape_transform=layout)
    maps, delta = explainer.attribute(x, reference_embedding=s, return_convergence_delta=True)
    close(maps.flatten(1), by_hand(encoder, f, x, baseline=start, n=20)[:, 1:].sum(2) * 9)
    z0 = encoder.mix(start(A).mT)[..., 0].tanh() + A[:, 0]  # the class token's own part is the same
    close(maps.mean((1, 2, 3)), (f * (z - z0)).sum(1).detach(), rtol=1e-7, atol=1e-9)
    assert delta.abs().max() < 1e-9


def test_layers_with_channels_last_have_the_maps_of_channels_first():
    class Last(Curved):
        def forward(self, x):
            h = torch.tanh(self.stem(x)).movedim(1, -1)
            return self.head(F.gelu(self.layer(h)).mean((1, 2)))

    encoder = seeded(Last)
    encoder.layer = nn.Linear(4, 4).double()
    f = weights_of_cosine(encoder(X).detach(), S[1:2])
    terms = by_hand(encoder, f, X, baseline=lambda a: a.mean((1, 2), keepdim=True).expand_as(a))
    maps = places(encoder, reshape_transform=channels_last).attribute(X, 1, reference_embedding=S)
    close(maps, terms.sum(3)[:, None] * 64)


# What they add up to


class Transformer(nn.Module):
    """Patches (the layer), a class token, and a residual block with LayerNorm, attention and GELU."""

    def __init__(self):
        super().__init__()
        self.layer, self.cls = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 12, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.position, self.norm, self.head = nn.Parameter(torch.randn(5, 8)), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        a = self.layer(x).flatten(2).mT
        return self.head(
            self.norm(self.block(torch.cat([self.cls.expand(len(x), -1, -1), a], 1) + self.position))[:, 0]
        )


SMOOTH = {
    "tokens": seeded(Transformer),
    "gelu": CURVED,
    "residual": seeded(lambda: Curved(HABITS["a residual around the layer"])),
}


@pytest.mark.parametrize("name", SMOOTH)
@given(
    seed=st.integers(0, 10**6),
    baseline=st.sampled_from(["mean", "zero", "tensor"]),
    rows=st.integers(1, 3),
    similarity=st.sampled_from(["cosine", "dot", "euclidean"]),
)
@settings(max_examples=12, deadline=None)
def test_for_any_smooth_network_the_places_add_up_to_what_the_baseline_leaves(name, seed, baseline, rows, similarity):
    encoder, x = SMOOTH[name], random(rows, 3, 8, 8, seed=seed)
    z, A = run(encoder, x)
    B = {"mean": mean_map(A), "zero": 0 * A, "tensor": random(*A.shape, seed=seed + 1)}[baseline]
    with contextlib.closing(_hook(encoder.layer, lambda o: B)), torch.no_grad():
        z0 = encoder(x)
    f = {"cosine": weights_of_cosine(z, S[:1]), "dot": S[:1], "euclidean": 2 * S[:1] - z}[similarity]
    explainer = places(encoder, n_steps=48, baseline=B if baseline == "tensor" else baseline, similarity=similarity)
    maps, delta = explainer.attribute(x, 0, reference_embedding=S, return_convergence_delta=True)
    close(maps.mean((1, 2, 3)), (f * (z - z0)).sum(1), rtol=1e-6, atol=1e-7)
    assert delta.abs().max() < 1e-6


@each_method
@pytest.mark.parametrize("size", [None, 1, 4])
@pytest.mark.parametrize("summed", [True, False])
def test_the_delta_of_few_steps_is_the_error_itself(method, size, summed):
    B = random(3, 4, 8, 8, seed=4)
    with contextlib.closing(_hook(CURVED.layer, lambda o: B)), torch.no_grad():
        z0 = CURVED(X)
    z = CURVED(X).detach()
    options = {"normalize": None} if method is FeatureActivationMap else {}
    oracle_f = oracle.pair_weights if options else oracle.decomposition_weights
    f = np.stack([oracle_f(row, S.numpy(), 1, "cosine", *options.values()) for row in z.numpy()])
    maps, delta = places(CURVED, method=method, n_steps=2, baseline=B, **options).attribute(
        X, 1, None, False, True, summed, reference_embedding=S, return_convergence_delta=True, internal_batch_size=size
    )
    assert (maps >= 0).all()  # the delta is that of the map before its negative part is dropped
    maps = places(CURVED, method=method, n_steps=2, baseline=B, **options).attribute(X, 1, reference_embedding=S)
    close(delta, maps.mean((1, 2, 3)) - (torch.from_numpy(f) * (z - z0)).sum(1))
    assert delta.abs().min() > 1e-6


def test_layers_have_a_map_and_a_delta_each_as_in_calls_of_their_own():
    layers = [CURVED.stem, CURVED.layer, CURVED.stem]
    options = {"reference_embedding": S, "return_convergence_delta": True}
    maps, deltas = places(CURVED, layers).attribute(X, 1, **options)
    alone = [places(CURVED, layer).attribute(X, 1, **options) for layer in layers]
    close(maps, [M for M, _ in alone])
    close(deltas, [delta for _, delta in alone])
    here, there = places(CURVED, layers).attribute_pair(X, X.flip(0))
    close(places(CURVED, layers).attribute_matrix(X, X[:1])[1], places(CURVED).attribute_matrix(X, X[:1]))
    close((here, there), tuple(map(list, zip(*[places(CURVED, m).attribute_pair(X, X.flip(0)) for m in layers]))))


def test_both_tensors_of_a_layer_move_together():
    encoder, x, s = seeded(lambda: TwoInputEncoder(4)), (X, random(3, 1, 8, 8, seed=5)), S[:1]
    encoder.head = nn.Sequential(nn.Tanh(), encoder.head, nn.GELU())
    f = weights_of_cosine(encoder(*x).detach(), s)
    terms = by_hand(encoder, f, *x, baseline=lambda a, b: (mean_map(a), mean_map(b)))
    maps, delta = places(encoder).attribute(x, reference_embedding=s, return_convergence_delta=True)
    close(maps, tuple(t.sum(1, keepdim=True) * t[0, 0].numel() for t in terms))
    with contextlib.closing(_hook(encoder.layer, lambda o: tuple(map(mean_map, o)))), torch.no_grad():
        z0 = encoder(*x)
    close(delta, sum(M.mean((1, 2, 3)) for M in maps) - (f * (encoder(*x).detach() - z0)).sum(1), atol=1e-10)
