"""Work done in chunks: the same maps and warnings as at once, from passes and comparisons of bounded size."""

import math
import warnings

import pytest
import torch
from encoders import (
    FlatEncoder,
    HeadEncoder,
    PooledEncoder,
    TokenEncoder,
    TwoInputEncoder,
    random,
    seeded,
)
from helpers import close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_errors import Counted
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_fam import (
    FeatureActivationMap,
    LabelFreeActivationMap,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
    channel_contributions,
)
from captum_fam.engine import question

X = random(5, 3, 8, 8)
REFERENCES = random(7, 6, seed=2)
ENCODERS = {"aligned": PooledEncoder, "jacobian": lambda: HeadEncoder(embedding=6), "flat": FlatEncoder}
METHODS = [FeatureActivationMap, SimilarityDecomposition, LabelFreeActivationMap, ScoreCam, RelevanceCam]
SIMILARITIES = ["cosine", "dot", "euclidean"]
SIZES = [1, 2, 3, 4, 5, 100]
each_size = pytest.mark.parametrize("size", SIZES)


def said(call):
    """What a call warns of, sorted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return sorted(str(w.message) for w in caught)


def references_of(kind, seed=2, K=7):
    return random(K, 96 if kind == "flat" else 6, seed=seed)


class Sizes(nn.Module):
    """Notes how many inputs each pass of an encoder takes."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.layer, self.sizes = encoder, encoder.layer, []

    def forward(self, *inputs):
        self.sizes.append(len(inputs[0]))
        return self.encoder(*inputs)


@each_size
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(
    "options",
    [
        {"target": 3},
        {"target": [0, 6, 2, 2, 5]},
        {"target": torch.tensor([1, 0, 3, 4, 6]), "contrast": [0, 1, 2, 3, 4]},
        {"target": 1, "contrast": "rest"},
        {"target": [0, 6, 2, 2, 5], "contrast": "self"},
        {"target": 3, "threshold": 0.2},
        {"target": 2, "attr_dim_summation": False},
        {"target": 2, "relu_attributions": True, "contrast": 0},
        {"target": 4, "attribute_to_layer_input": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_maps_of_chunks_of_inputs_are_those_of_all_at_once(kind, size, options):
    encoder = seeded(ENCODERS[kind])
    of_itself = options.get("contrast") == "self" or "threshold" in options  # which a distance has not
    fam = FeatureActivationMap(encoder, encoder.layer, similarity="dot" if of_itself else "euclidean")
    options = {"reference_embedding": references_of(kind), **options}
    close(fam.attribute(X, internal_batch_size=size, **options), fam.attribute(X, **options))


@each_size
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(
    ("similarity", "asked"),
    [
        *[(similarity, {"contrast": contrast}) for similarity in SIMILARITIES for contrast in (None, "rest")],
        *[
            (similarity, asked)
            for similarity in ("cosine", "dot")
            for asked in ({"contrast": "self"}, {"threshold": 0.2})
        ],
    ],
    ids=str,
)
def test_all_maps_of_chunks_are_those_of_all_at_once(kind, size, similarity, asked):
    encoder = seeded(ENCODERS[kind])
    fam = FeatureActivationMap(encoder, encoder.layer, similarity=similarity)
    options = {"reference_embedding": references_of(kind), **asked}
    close(fam.attribute_all(X, internal_batch_size=size, **options), fam.attribute_all(X, **options))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("contrast", [None, "rest"])
@pytest.mark.parametrize("K", [4, 9])  # fewer and more than there are dimensions
def test_every_method_works_in_chunks(method, contrast, K):
    encoder = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    explainer = method(SimilarityScore(encoder, random(K, 6, seed=4)), encoder[1])
    whole = explainer.attribute_all(X, contrast=contrast)
    close(explainer.attribute_all(X, contrast=contrast, internal_batch_size=2), whole)
    close(explainer.attribute(X, 3, contrast=contrast, internal_batch_size=2), whole[:, 3:4])


@given(
    B=st.integers(0, 6),
    K=st.integers(1, 12),
    size=st.integers(1, 7),
    kind=st.sampled_from(sorted(ENCODERS)),
    contrast=st.sampled_from([None, "rest", "self"]),
)
@settings(max_examples=60, deadline=None)
def test_no_size_of_chunk_changes_the_maps(B, K, size, kind, contrast):
    encoder, x, s = seeded(ENCODERS[kind]), random(B, 3, 8, 8, seed=3), references_of(kind, K=K)
    fam = FeatureActivationMap(encoder, encoder.layer)
    contrast = contrast if K > 1 or contrast == "self" else None
    each = [fam.attribute(x, k, reference_embedding=s, contrast=contrast, internal_batch_size=size) for k in range(K)]
    close(fam.attribute_all(x, reference_embedding=s, contrast=contrast, internal_batch_size=size), torch.cat(each, 1))


@each_size
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_encoder_never_sees_more_inputs_or_references_than_asked_for(kind, size):
    encoder = Sizes(seeded(ENCODERS[kind]))
    fam = FeatureActivationMap(encoder, encoder.layer)
    fam.attribute(X, reference=random(5, 3, 8, 8, seed=5), internal_batch_size=size)
    fam.attribute_all(X, reference=random(7, 3, 8, 8, seed=6), internal_batch_size=size)
    assert max(encoder.sizes) == min(size, 7)
    assert sum(encoder.sizes) == 5 + 5 + 5 + 7  # and each once


@each_size
def test_the_similarity_never_sees_more_references_than_asked_for(size):
    seen = []

    def similarity(z, s):
        seen.append(s.shape[-2])
        return z * s

    encoder = seeded(PooledEncoder)
    fam = FeatureActivationMap(encoder, encoder.layer, similarity=similarity)
    fam.attribute_all(X, reference_embedding=REFERENCES, internal_batch_size=size)
    assert max(seen) == min(size, 7)


def test_references_paired_with_inputs_stay_with_them():
    encoder = seeded(PooledEncoder)
    fam = FeatureActivationMap(encoder, encoder.layer)
    others = random(5, 3, 8, 8, seed=5)
    each = [fam.attribute(x[None], reference=r[None]) for x, r in zip(X, others)]
    close(fam.attribute(X, reference=others, internal_batch_size=2), torch.cat(each))


def test_arguments_with_a_row_for_each_input_are_cut_with_them():
    inner = seeded(PooledEncoder)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.layer = inner, inner.layer

        def forward(self, x, scale, power, bias):
            assert scale.shape == (len(x), 1, 1, 1)
            return self.encoder((x * scale) ** power) + bias

    encoder = Scaled()
    fam = FeatureActivationMap(encoder, encoder.layer)
    args = (random(5, 1, 1, 1, seed=7).abs(), 2, random(6, seed=8))
    options = {"reference": random(5, 3, 8, 8, seed=5), "additional_forward_args": args}
    close(fam.attribute(X, internal_batch_size=2, **options), fam.attribute(X, **options))


@each_size
def test_several_inputs_tensors_and_layers_keep_their_form(size):
    encoder = seeded(TwoInputEncoder)
    inputs = (random(5, 3, 8, 8), random(5, 1, 9, 9, seed=2))
    fam = FeatureActivationMap(encoder, [encoder.layer, encoder.layer.one])
    s = random(4, 3, seed=3)
    close(
        fam.attribute_all(inputs, reference_embedding=s, internal_batch_size=size),
        fam.attribute_all(inputs, reference_embedding=s),
    )
    close(
        fam.attribute(inputs, 1, reference_embedding=s, attr_dim_summation=False, internal_batch_size=size),
        fam.attribute(inputs, 1, reference_embedding=s, attr_dim_summation=False),
    )


class Signed(nn.Module):
    """Of positive maps, the normalised mean; of others, the squares of the mean."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1, bias=False)
        self.layer.weight.data.abs_()

    def forward(self, x):
        z = self.layer(x).mean((2, 3))
        return torch.where((z >= 0).all(1, keepdim=True), nn.functional.normalize(z), z.square())


@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_one_input_that_is_not_aligned_decides_for_those_of_other_chunks(method, order):
    encoder = seeded(Signed)
    explainer, s = method(encoder, encoder.layer, similarity="dot"), random(2, 4, seed=5)
    x = random(4, 3, 6, 6, seed=3).abs() * torch.tensor([1, 1, 1, -1]).reshape(-1, 1, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = explainer.attribute_all(x[order], reference_embedding=s)
        first = order.index(0)
        alone = explainer.attribute_all(x[:1], reference_embedding=s)
        assert (alone - whole[first][None]).abs().max() > 0.01  # alone, it takes the other route
        for size in (1, 2, 3):
            close(explainer.attribute_all(x[order], reference_embedding=s, internal_batch_size=size), whole)


@each_size
def test_embeddings_that_mean_nothing_are_named_once_by_their_numbers_in_the_call(size):
    encoder = seeded(PooledEncoder)
    x, s = X.clone(), REFERENCES.clone()
    x[1] = math.nan
    x[4] = math.nan
    s[2] = 0
    s[6] = math.inf
    fam = FeatureActivationMap(encoder, encoder.layer)
    expected = [
        "Embeddings are zero or not finite (inputs [1, 4], references [2, 6]): the maps that depend on them are zero."
    ]
    assert said(lambda: fam.attribute_all(x, reference_embedding=s, internal_batch_size=size)) == expected
    assert said(lambda: fam.attribute_all(x, reference_embedding=s)) == expected


@pytest.mark.parametrize("value", [1e-46, 1e39])
def test_references_that_mean_nothing_in_the_dtype_of_the_embeddings_are_named(value):
    encoder = seeded(PooledEncoder).float()
    s = torch.full((2, 6), 0.5, dtype=torch.float64)
    s[1] = value
    fam = FeatureActivationMap(encoder, encoder.layer)
    (doubt,) = said(lambda: fam.attribute_all(X.float(), reference_embedding=s))
    assert "(references [1])" in doubt
    assert not fam.attribute_all(X.float(), reference_embedding=s)[:, 1].any()


@each_size
def test_the_largest_remainder_is_told(size):
    encoder = seeded(lambda: HeadEncoder(embedding=6))
    decomposition = SimilarityDecomposition(encoder, encoder.layer)
    texts = {
        tuple(said(lambda n=n: decomposition.attribute_all(X, reference_embedding=REFERENCES, internal_batch_size=n)))
        for n in (size, None)
    }
    assert len(texts) == 1
    assert "add up to" in texts.pop()[0]


def test_an_input_that_is_not_finite_does_not_hide_a_layer_that_is_not_used():
    class Cut(HeadEncoder):
        def forward(self, x):
            return self.head(self.features(x).detach().flatten(2).mean(2)) + 0 * self.kept.flatten(1).mean(
                1, keepdim=True
            )

        def features(self, x):
            self.kept = super().features(x)
            return self.kept

    encoder = seeded(lambda: Cut(embedding=6))
    x = X.clone()
    x[0] = math.inf
    fam = FeatureActivationMap(encoder, encoder.layer)
    assert any("does not depend" in d for d in said(lambda: fam.attribute(x, 0, reference_embedding=REFERENCES)))


@each_size
def test_a_layer_that_the_embedding_does_not_depend_on_is_named_once(size):
    class Cut(HeadEncoder):
        def forward(self, x):
            return self.head(self.features(x).detach().flatten(2).mean(2))

    encoder = seeded(lambda: Cut(embedding=6))
    fam = FeatureActivationMap(encoder, encoder.layer)
    (doubt,) = said(lambda: fam.attribute_all(X, reference_embedding=REFERENCES, internal_batch_size=size))
    assert "does not depend on layer 'layer'" in doubt


def test_one_chunk_whose_weights_are_zero_is_no_reason_to_doubt_the_layer():
    encoder = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)))
    with torch.no_grad():
        encoder[3].weight[2:] = 0  # dimensions 2 and 3 are constant
    s = torch.eye(4, dtype=torch.float64)
    fam = FeatureActivationMap(encoder, encoder[0], similarity="dot", normalize=None)
    assert said(lambda: fam.attribute_all(X, reference_embedding=s, internal_batch_size=1)) == []
    assert said(lambda: fam.attribute_all(X, reference_embedding=s[2:], internal_batch_size=1)) != []


def test_tokens_off_the_map_are_an_error_in_chunks_too():
    class ClassToken(TokenEncoder):
        def forward(self, x):
            return self.layer(torch.cat([self.cls.expand(len(x), -1, -1), self.patch(x).flatten(2).mT], 1))[:, 0]

    encoder = seeded(ClassToken)
    fam = FeatureActivationMap(encoder, encoder.layer)
    with pytest.raises(ValueError, match="only through tokens that are no patches"):
        fam.attribute_all(random(3, 3, 12, 12), reference_embedding=random(4, 6), internal_batch_size=1)


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("8", TypeError)]
)
@pytest.mark.parametrize("call", ["attribute", "attribute_all"])
def test_a_chunk_has_a_positive_number_of_inputs(call, value, error):
    encoder = Counted()
    fam = FeatureActivationMap(encoder, encoder.layer)
    with pytest.raises(error, match=r"`internal_batch_size` to be a positive int, but got"):
        getattr(fam, call)(X[:1], reference_embedding=REFERENCES[:1], internal_batch_size=value)
    assert not encoder.calls


def test_score_cam_masks_each_input_once_for_any_number_of_references(monkeypatch):
    encoder = Counted(seeded(PooledEncoder))
    cam = ScoreCam(encoder, encoder.layer, perturbations_per_eval=6)
    cam.attribute_all(X[:1], reference_embedding=REFERENCES)
    passes = encoder.calls
    monkeypatch.setattr(question, "_AT_ONCE", 6)  # one reference at a time
    cam.attribute_all(X[:1], reference_embedding=REFERENCES)
    assert encoder.calls == 2 * passes


def test_score_cam_compares_with_the_rest_once(monkeypatch):
    seen = []

    def similarity(z, s):
        seen.append(s.shape[-2])
        return channel_contributions(z, s, "dot")

    encoder = seeded(PooledEncoder)
    cam = ScoreCam(encoder, encoder.layer, similarity=similarity, perturbations_per_eval=6)
    monkeypatch.setattr(question, "_AT_ONCE", 6)  # one reference at a time
    cam.attribute_all(X[:1], reference_embedding=random(20, 6), contrast="rest")
    few = sum(seen)
    cam.attribute_all(X[:1], reference_embedding=random(40, 6), contrast="rest")
    assert sum(seen) - few == 2 * few


class GradientRows:
    """Notes how many rows each call of torch.autograd.grad asks for at once."""

    def __init__(self, monkeypatch):
        self.rows, self._grad = [], torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", self)

    def __call__(self, outputs, inputs, grad_outputs=None, *args, is_grads_batched=False, **options):
        self.rows.append(len(grad_outputs) if is_grads_batched else 1)
        return self._grad(outputs, inputs, grad_outputs, *args, is_grads_batched=is_grads_batched, **options)


@pytest.mark.parametrize(
    ("embedding", "K", "rows"),
    [
        pytest.param(4, 3, [3], id="few references, a gradient for each"),
        pytest.param(4, 50, [4], id="one for each of fewer dimensions"),
        pytest.param(40, 50, [1, 16, 1], id="that of any, its derivative for each of fewer places, and a check"),
    ],
)
@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition])
def test_more_references_take_no_more_gradients_however_they_are_chunked(method, embedding, K, rows, monkeypatch):
    encoder = seeded(lambda: HeadEncoder(embedding=embedding))
    torch.nn.init.zeros_(encoder.head.bias)
    explainer, gradients = method(encoder, encoder.layer), GradientRows(monkeypatch)
    if K > 3:
        monkeypatch.setattr(question, "_AT_ONCE", 2 * embedding)
    explainer.attribute_all(X[:1], reference_embedding=random(K, embedding))
    assert gradients.rows == rows


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        own = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in own:  # no view
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("contrast", [None, "rest", "self"])
@pytest.mark.parametrize("kind", ["aligned", "jacobian"])
def test_nothing_that_is_made_grows_with_the_references_but_their_maps(kind, contrast, monkeypatch):
    monkeypatch.setattr(question, "_AT_ONCE", 4096)
    encoder = seeded({"aligned": lambda: PooledEncoder(channels=64), "jacobian": lambda: HeadEncoder(2, 6)}[kind])
    D, x = encoder(X[:1]).shape[1], X[:1]
    fam = FeatureActivationMap(encoder, encoder.layer)
    for K in (2_000, 20_000):
        s = random(K, D)
        with Largest() as largest:
            maps = fam.attribute_all(x, reference_embedding=s, contrast=contrast)
        assert maps.shape == (1, K, 4, 4)
        assert largest.numel == maps.numel()


def test_large_chunks_of_references_are_the_users_wish_and_no_default(monkeypatch):
    seen = []

    def similarity(z, s):
        seen.append(s.shape[-2])
        return channel_contributions(z, s, "dot")

    encoder = seeded(PooledEncoder)
    monkeypatch.setattr(question, "_AT_ONCE", 3 * 6 * 5)
    FeatureActivationMap(encoder, encoder.layer, similarity=similarity).attribute_all(X, reference_embedding=REFERENCES)
    assert seen == [3, 3, 1]
