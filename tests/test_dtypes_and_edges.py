"""Dtypes, empty batches, and inputs at the edge: what comes out, and what is warned about."""

import contextlib
import copy
import re
import warnings

import numpy as np
import pytest
import reference as oracle
import torch
import torchvision
from encoders import HeadEncoder, OfActivations, PooledEncoder, TwoInputEncoder, random, seeded
from helpers import close, silent
from torch import nn
from torchvision import tv_tensors

from captum_fam import FeatureActivationMap, SimilarityDecomposition, SimilarityScore, channel_contributions

INPUTS = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)
ALIGNED, JACOBIAN = seeded(PooledEncoder), seeded(lambda: HeadEncoder(embedding=6))
# Bounds on the relative error of a map: a few roundings of activations and embeddings.
ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}

each_dtype = pytest.mark.parametrize("dtype", ERROR)
each_encoder = pytest.mark.parametrize("encoder", [ALIGNED, JACOBIAN], ids=["aligned", "jacobian"])


def explainer(encoder, **options):
    return FeatureActivationMap(encoder, encoder.layer, **options)


def assert_maps_near(maps, wanted, dtype, error=None):
    assert maps.dtype == dtype
    assert (maps.double() - wanted).norm() <= (ERROR[dtype] if error is None else error) * wanted.norm()


@contextlib.contextmanager
def one_warning(match):
    """The block warns once, and so."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield
    (warning,) = [str(w.message) for w in record]
    assert re.search(match, warning), warning


@each_dtype
@each_encoder
@pytest.mark.parametrize(
    "asked", [{"contrast": 3}, {"contrast": "rest"}, {"contrast": "self"}, {"threshold": 0.5}], ids=str
)
def test_a_difference_of_scores_in_each_dtype_is_near_that_of_float64(encoder, dtype, asked):
    fam, narrow = explainer(encoder), explainer(copy.deepcopy(encoder).to(dtype))
    maps = narrow.attribute(INPUTS.to(dtype), 1, reference_embedding=REFERENCES.to(dtype), **asked)
    assert_maps_near(maps, fam.attribute(INPUTS, 1, reference_embedding=REFERENCES, **asked), dtype)


@each_dtype
@each_encoder
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("normalize", ["minmax", None])
def test_each_dtype_comes_out_as_it_came_in_near_the_float64_map(encoder, dtype, similarity, normalize):
    fam = explainer(encoder, similarity=similarity, normalize=normalize)
    narrow = explainer(copy.deepcopy(encoder).to(dtype), similarity=similarity, normalize=normalize)
    maps = narrow.attribute(INPUTS.to(dtype), 1, reference_embedding=REFERENCES.to(dtype))
    assert_maps_near(maps, fam.attribute(INPUTS, 1, reference_embedding=REFERENCES), dtype)


@each_dtype
@each_encoder
def test_every_call_keeps_the_dtype(encoder, dtype):
    fam, x = explainer(copy.deepcopy(encoder).to(dtype)), INPUTS.to(dtype)
    assert fam.embed(x).dtype == dtype
    assert fam.attribute(x, reference=x).dtype == dtype
    assert fam.attribute(x, 0, None, True, reference_embedding=REFERENCES.to(dtype), contrast=1).dtype == dtype
    assert fam.attribute(x, 0, attr_dim_summation=False, reference_embedding=REFERENCES.to(dtype)).dtype == dtype
    assert fam.attribute_all(x, reference=x, contrast="rest").dtype == dtype
    assert fam.attribute_all(x, reference=x, contrast="self").dtype == dtype
    assert fam.attribute_all(x, reference=x, threshold=0.5).dtype == dtype
    assert fam.attribute_all(x, reference_embedding=random(40, 6).to(dtype)).dtype == dtype  # more than dimensions
    assert [maps.dtype for maps in fam.attribute_pair(x, x)] == [dtype, dtype]


@each_encoder
def test_references_of_another_dtype_do_not_change_that_of_the_maps(encoder):
    fam = explainer(copy.deepcopy(encoder).float())
    maps = fam.attribute(INPUTS.float(), 1, reference_embedding=REFERENCES)
    assert_maps_near(maps, explainer(encoder).attribute(INPUTS, 1, reference_embedding=REFERENCES), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("route", ["aligned", "jacobian"])
def test_tiny_signed_contributions_do_not_vanish_in_half_precision(dtype, route):
    x = random(2, 3, 128, 128)  # 64 * 64 locations share the gradient
    tiny = explainer(seeded(PooledEncoder), similarity="dot", normalize=None, channel_weights=route)
    narrow = explainer(seeded(PooledEncoder).to(dtype), similarity="dot", normalize=None, channel_weights=route)
    references = REFERENCES[:1] * 1e-4  # contributions near 1e-6, below the least normal float16
    wanted = tiny.attribute(x, reference_embedding=references)
    assert wanted.abs().max() < 1e-3
    assert_maps_near(narrow.attribute(x.to(dtype), reference_embedding=references), wanted, dtype)


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
@pytest.mark.parametrize("route", ["aligned", "jacobian"])
def test_contributions_beyond_float16_do_not_overflow(similarity, route):
    encoder = seeded(PooledEncoder)
    with torch.no_grad():
        encoder.conv2.weight.mul_(1000)
        encoder.conv2.bias.mul_(1000)
    references = 600 * REFERENCES[:1]
    fam = explainer(encoder, similarity=similarity, channel_weights=route)
    narrow = explainer(copy.deepcopy(encoder).half(), similarity=similarity, channel_weights=route)
    assert channel_contributions(fam.embed(INPUTS), references, similarity).abs().max() > 65504
    wanted = fam.attribute(INPUTS, reference_embedding=references)
    assert_maps_near(narrow.attribute(INPUTS.half(), reference_embedding=references.half()), wanted, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1, 1e-3])
def test_gradients_that_half_precision_would_lose_still_make_the_map(dtype, factor):
    # Gradients near factor / (64 * 64): down to 2e-7, where float16 has steps of 6e-8. The embedding itself does not
    # underflow, and so neither need its map.
    encoder = seeded(HeadEncoder)
    with torch.no_grad():
        encoder.head.weight.mul_(factor)
        encoder.head.bias.mul_(factor)
    x, references = random(1, 3, 128, 128), random(1, 4, seed=2)
    wanted = explainer(encoder).attribute(x, reference_embedding=references)
    narrow = explainer(copy.deepcopy(encoder).to(dtype))
    assert_maps_near(narrow.attribute(x.to(dtype), reference_embedding=references.to(dtype)), wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alignment_is_recognised_in_half_precision(dtype):
    fam = explainer(copy.deepcopy(ALIGNED).to(dtype))
    with torch.inference_mode():  # which the jacobian route refuses
        fam.attribute(INPUTS.to(dtype), 0, reference_embedding=REFERENCES.to(dtype))


# Unit vectors may differ by this much because of rounding, and are equal all the same.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
A_OF_TWO = torch.tensor([[[[3.0, 1.0], [2.0, 6.0]], [[0.0, 4.0], [8.0, 4.0]]]])  # its mean is (3, 4)


def turned(distance, dtype):
    """An encoder (B, 2, h, w) -> (B, 2), whose unit embedding is that far from the unit mean, and its matrix."""
    angle = 2 * np.arcsin(distance / 2)
    matrix = torch.tensor([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], dtype=dtype)
    encoder = OfActivations(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False)).to(dtype)
    with torch.no_grad():
        encoder[-1].weight.copy_(matrix)
    return encoder, matrix.double().numpy()


@each_dtype
@pytest.mark.parametrize("far", [3, 10, None], ids=["3 roundings", "10 roundings", "a right angle"])
def test_what_has_as_many_dimensions_as_channels_but_is_not_aligned_takes_its_gradient(dtype, far):
    encoder, W = turned(2**0.5 if far is None else far * ROUNDING[dtype], dtype)
    s = torch.tensor([[1.0, -0.5]], dtype=dtype)
    for method in (FeatureActivationMap, SimilarityDecomposition):
        assert method(encoder, encoder.layer).route(A_OF_TWO.to(dtype)) == "jacobian"
    maps = SimilarityDecomposition(encoder, encoder.layer, similarity="dot").attribute(
        A_OF_TWO.to(dtype), reference_embedding=s
    )
    by_hand = np.einsum("d,dk,khw->hw", [1.0, -0.5], W, A_OF_TWO[0].double().numpy())  # N f.v_i, with v_i = W A_i / N
    exactly = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert_maps_near(maps[0, 0], torch.from_numpy(by_hand), dtype, exactly)


@each_dtype
def test_what_differs_by_less_than_a_rounding_is_aligned(dtype):
    encoder, _ = turned(ROUNDING[dtype] / 4 if dtype == torch.bfloat16 else ROUNDING[dtype] / 2, dtype)
    assert FeatureActivationMap(encoder, encoder.layer).route(A_OF_TWO.to(dtype)) == "aligned"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("distance", "route"), [(1e-2, "jacobian"), (0.9, "jacobian"), (1e-7, "aligned")])
def test_values_that_cancel_in_the_mean_do_not_hide_that_it_is_not_aligned(dtype, distance, route):
    encoder, _ = turned(distance, dtype)
    A = A_OF_TWO + torch.tensor([[[[1e4, -1e4], [1e4, -1e4]]]])
    assert FeatureActivationMap(encoder, encoder.layer).route(A.to(dtype)) == route


# z_d is the sum of w_di a_i: whole numbers, and so every value of the map. Gradients are 64 and more: with the gain
# against underflow they are beyond float16, without it they are exact.
STEEP_W = 64.0 * torch.tensor([[1, -2, 3, 0], [2, 1, -1, 4]])
STEEP_A = torch.tensor([[[[0.5, 0.25], [0.125, 1.0]]], [[[1.0, 0.0], [0.5, 0.25]]]])


def steep(dtype=torch.float16):
    encoder = OfActivations(nn.Flatten(), nn.Linear(4, 2, bias=False)).to(dtype)
    with torch.no_grad():
        encoder[-1].weight.copy_(STEEP_W)
    return encoder


def by_hand(references):
    """N sum_d s_d w_di a_i (B, K, h, w), in float64."""
    rows = np.einsum("kd,di,bi->bki", references, STEEP_W.double().numpy(), STEEP_A.flatten(1).double().numpy())
    return torch.from_numpy(4 * rows).unflatten(2, (2, 2))


@pytest.mark.parametrize("K", [1, 3])
def test_float16_falls_back_from_its_gain_where_gradients_would_overflow(K):
    references = np.array([[1.0, -1.0], [0.5, 2.0], [-2.0, 0.0]])[:K]
    encoder = steep()
    decomposition = SimilarityDecomposition(encoder, encoder.layer, similarity="dot")
    with silent():
        maps = decomposition.attribute_all(
            STEEP_A.half(), reference_embedding=torch.tensor(references, dtype=torch.float16)
        )
    assert maps.dtype == torch.float16
    torch.testing.assert_close(maps.double(), by_hand(references), rtol=0, atol=0)
    one = decomposition.attribute(STEEP_A.half(), 0, reference_embedding=torch.tensor(references).half())
    torch.testing.assert_close(one[:, 0].double(), by_hand(references)[:, 0], rtol=0, atol=0)


def test_float16_scales_the_gradients_of_each_input_by_themselves():
    # References of unlike sizes: with one scale for both, the second one's would be rounded to zero.
    encoder, references = steep(), np.array([[16.0, -16.0], [2.0**-24, 2.0**-23]])
    maps = SimilarityDecomposition(encoder, encoder.layer, similarity="dot").attribute(
        STEEP_A.half(), reference_embedding=torch.tensor(references).float()
    )
    wanted = by_hand(references)
    torch.testing.assert_close(maps[:, 0].double(), wanted[[0, 1], [0, 1]], rtol=0, atol=0)


class FloatHead(nn.Module):
    """A layer in float16, and after it a head in float32 whose gradients float16 would round to zero."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Identity(), nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(STEEP_W * 2.0**-32)

    def forward(self, x):
        return self.head(self.layer(x).float().flatten(1))


def test_a_float16_layer_keeps_tiny_gradients_of_a_wider_head():
    encoder, references = FloatHead(), np.array([[1.0, -1.0], [0.5, 2.0]])
    maps = SimilarityDecomposition(encoder, encoder.layer, similarity="dot").attribute_all(
        STEEP_A.half(), reference_embedding=torch.tensor(references * 2.0**26).float()
    )
    torch.testing.assert_close(maps.double(), by_hand(references) / 64, rtol=0, atol=0)


class Image(torch.Tensor):
    """Stays what it is in whatever is done with it, unlike those of torchvision."""


@pytest.mark.parametrize("kind", [Image, tv_tensors.Image])
@each_encoder
def test_inputs_of_a_subclass_of_tensor_have_the_maps_of_tensors(encoder, kind):
    fam, x, other = explainer(encoder), INPUTS.as_subclass(kind), INPUTS.flip(0)
    many = random(40, 6)
    close(
        fam.attribute(x, reference=other.as_subclass(kind)).as_subclass(torch.Tensor),
        fam.attribute(INPUTS, reference=other),
    )
    for asked in ({}, {"contrast": "rest"}, {"contrast": "self"}):
        maps = fam.attribute_all(x, reference_embedding=many, **asked)
        close(maps.as_subclass(torch.Tensor), fam.attribute_all(INPUTS, reference_embedding=many, **asked))
    for maps, wanted in zip(fam.attribute_pair(x, other.as_subclass(kind)), fam.attribute_pair(INPUTS, other)):
        close(maps.as_subclass(torch.Tensor), wanted)
    assert fam.route(x) == fam.route(INPUTS)


@each_encoder
@each_dtype
def test_an_empty_batch_has_an_empty_map(encoder, dtype):
    fam = explainer(copy.deepcopy(encoder).to(dtype))
    none, references = INPUTS[:0].to(dtype), REFERENCES.to(dtype)
    maps = [
        fam.attribute(none, reference_embedding=references[:1]),
        fam.attribute(none, 2, reference_embedding=references),
        fam.attribute(none, [], reference_embedding=references),
        fam.attribute(none, 2, reference_embedding=references, contrast="rest"),
        fam.attribute(none, 2, reference_embedding=references, contrast=0),
        fam.attribute(none, 2, reference_embedding=references, contrast="self"),
        fam.attribute(none, 2, reference_embedding=references, threshold=0.5),
        fam.attribute(none, reference=INPUTS[:1].to(dtype)),
        fam.attribute(none, reference=none),
    ]
    assert all(m.shape == (0, 1, 4, 4) and m.dtype == dtype for m in maps)
    assert fam.attribute(none, 0, attr_dim_summation=False, reference_embedding=references).shape == (0, 6, 4, 4)
    assert fam.attribute(none, 0, None, True, reference_embedding=references).shape == (0, 1, 4, 4)
    assert fam.attribute_all(none, reference_embedding=references).shape == (0, 4, 4, 4)
    for asked in ({"contrast": "rest"}, {"contrast": "self"}, {"threshold": 0.5}):
        assert fam.attribute_all(none, reference_embedding=references, **asked).shape == (0, 4, 4, 4)
    many = random(40, 6).to(dtype)
    assert fam.attribute_all(none, reference_embedding=many).shape == (0, 40, 4, 4)
    assert fam.embed(none).shape == (0, 6)


@each_encoder
@pytest.mark.parametrize("K", [0, 1])
def test_an_empty_pair_has_empty_maps(encoder, K):
    here, there = explainer(encoder).attribute_pair(INPUTS[:0], INPUTS[:K])
    assert here.shape == there.shape == (0, 1, 4, 4)


def test_an_empty_batch_of_several_tensors_and_layers_has_empty_maps():
    encoder = seeded(TwoInputEncoder)
    none = (random(0, 3, 6, 6), random(0, 1, 7, 7))
    fam = FeatureActivationMap(encoder, [encoder.layer, encoder.layer.one])
    for maps, P in (
        (fam.attribute(none, 0, reference_embedding=random(2, 3)), 1),
        (fam.attribute_all(none, reference_embedding=random(2, 3)), 2),
    ):
        assert [m.shape for m in maps[0]] == [(0, P, 4, 4), (0, P, 3, 3)]
        assert maps[1].shape == (0, P, 4, 4)


class ScaledRows(nn.Module):
    """An encoder whose embeddings are multiplied, row by row, by ``factors``."""

    def __init__(self, encoder, factors):
        super().__init__()
        self.encoder, self.layer, self.factors = encoder, encoder.layer, torch.tensor(factors, dtype=torch.float64)

    def forward(self, x):
        return self.encoder(x) * self.factors[: len(x), None]


BAD = pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -float("inf")])


@BAD
@each_encoder
def test_an_input_with_a_zero_or_non_finite_embedding_has_a_zero_map_and_the_others_their_own(encoder, bad):
    good = explainer(encoder).attribute(INPUTS, 1, reference_embedding=REFERENCES)
    fam = explainer(ScaledRows(encoder, [1.0, bad, 1.0]))
    with one_warning(r"zero or not finite.*inputs \[1\]"):
        maps = fam.attribute(INPUTS, 1, reference_embedding=REFERENCES)
    assert not maps[1].any()
    close(maps[[0, 2]], good[[0, 2]])


def test_a_zero_embedding_does_not_hide_the_alignment_of_the_others():
    good = explainer(ALIGNED).attribute(INPUTS, 1, reference_embedding=REFERENCES)
    fam = explainer(ScaledRows(ALIGNED, [3.0, 0.0, 3.0]))  # weights by the jacobian would be three times as large
    with pytest.warns(UserWarning, match=r"inputs \[1\]"):
        maps = fam.attribute(INPUTS, 1, reference_embedding=REFERENCES)
    close(maps[[0, 2]], good[[0, 2]])


@BAD
@each_encoder
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_a_zero_or_non_finite_reference_gives_zero_maps_and_the_others_their_own(encoder, bad, similarity):
    fam, references = explainer(encoder, similarity=similarity), REFERENCES.clone()
    good = fam.attribute_all(INPUTS, reference_embedding=REFERENCES)
    references[2] = bad
    with one_warning(r"zero or not finite.*references \[2\]"):
        maps = fam.attribute_all(INPUTS, reference_embedding=references)
    assert not maps[:, 2].any()
    close(maps[:, [0, 1, 3]], good[:, [0, 1, 3]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_encoder
def test_one_non_finite_number_in_an_input_leaves_the_other_inputs_their_maps(encoder, bad):
    fam, inputs = explainer(encoder), INPUTS.clone()
    good = fam.attribute(inputs, 1, reference_embedding=REFERENCES)
    inputs[0, 0, 0, 0] = bad
    with one_warning(r"inputs \[0\]"):
        maps = fam.attribute(inputs, 1, reference_embedding=REFERENCES)
    assert not maps[0].any()
    close(maps[1:], good[1:])


@each_encoder
def test_a_bad_reference_that_no_input_takes_is_not_warned_about(encoder):
    references = REFERENCES.clone()
    references[3] = float("nan")
    with silent():
        maps = explainer(encoder).attribute(INPUTS, [0, 1, 2], reference_embedding=references)
    close(maps, explainer(encoder).attribute(INPUTS, reference_embedding=REFERENCES[:3]))


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_bad_reference_to_contrast_with_gives_a_zero_map(bad):
    references = REFERENCES.clone()
    references[3] = bad
    with pytest.warns(UserWarning, match=r"references \[3\]"):
        maps = explainer(ALIGNED).attribute(INPUTS, 0, reference_embedding=references, contrast=[1, 3, 2])
    assert not maps[1].any()
    assert maps[0].any()
    assert maps[2].any()


class Unbiased(nn.Module):
    """Zeros in, zeros out."""

    def __init__(self):
        super().__init__()
        self.layer = seeded(lambda: nn.Conv2d(3, 6, 3, bias=False))

    def forward(self, x):
        return self.layer(x).abs().mean((2, 3))


def test_a_bad_embedding_of_a_pair_is_warned_about_once_with_its_side_and_number():
    there = INPUTS.flip(0)
    fam = explainer(Unbiased())
    there[2] = 0
    with one_warning(r"references? \[2\]"):
        one, two = fam.attribute_pair(INPUTS, there)
    assert not one[2].any()
    assert not two[2].any()
    assert one[0].any()
    assert two[0].any()


@each_encoder
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_embeddings_have_the_cosine_map_of_ordinary_ones(encoder, dtype):
    # Their squares overflow.
    huge = 1e30 if dtype == torch.float32 else 1e200
    fam = explainer(copy.deepcopy(encoder).to(dtype))
    ordinary = fam.attribute(INPUTS.to(dtype), 1, reference_embedding=REFERENCES.to(dtype))
    maps = fam.attribute(INPUTS.to(dtype), 1, reference_embedding=REFERENCES.to(dtype) * huge)
    torch.testing.assert_close(maps, ordinary, rtol=1e-5, atol=1e-6)
    maps = fam.attribute(INPUTS.to(dtype), 1, reference_embedding=REFERENCES.to(dtype) / huge)
    torch.testing.assert_close(maps, ordinary, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1e200, 1e-200])
def test_huge_and_tiny_activations_are_explained_as_ordinary_ones(factor):
    encoder = seeded(PooledEncoder)
    ordinary = explainer(encoder).attribute(INPUTS, 1, reference_embedding=REFERENCES)
    with torch.no_grad():
        encoder.conv2.weight.mul_(factor)
        encoder.conv2.bias.mul_(factor)
    for route in ("auto", "jacobian"):
        maps = explainer(encoder, channel_weights=route).attribute(INPUTS, 1, reference_embedding=REFERENCES)
        torch.testing.assert_close(maps / factor, ordinary, rtol=1e-9, atol=1e-9)


def test_contributions_that_overflow_give_a_zero_map_and_a_warning_that_says_so():
    fam = explainer(copy.deepcopy(ALIGNED).float(), similarity="euclidean")
    references = REFERENCES.float()
    references[1] *= 1e30
    with one_warning("overflow"):
        maps = fam.attribute_all(INPUTS.float(), reference_embedding=references)
    assert not maps[:, 1].any()
    assert maps[:, 0].any()


@each_encoder
def test_a_single_location_has_a_map_of_one_place(encoder):
    x = random(2, 3, 1, 1)
    maps = explainer(encoder).attribute(x, 1, reference_embedding=REFERENCES)
    by_hand = explainer(encoder, channel_weights="jacobian").attribute(x, 1, reference_embedding=REFERENCES)
    assert maps.shape == (2, 1, 1, 1)
    assert maps.any()
    close(maps, by_hand)


@pytest.mark.parametrize("K", [1, 4, 40])  # one place is fewer than two references: v is found first
def test_a_layer_without_places_has_one_value_per_input(K):
    encoder = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 6)))
    x, s = random(2, 3, 2, 2), random(K, 6, seed=2)
    z, A = (part(x).detach().numpy() for part in (encoder, encoder[:3]))
    f = np.stack([[oracle.pair_weights(row, s.numpy(), k, "cosine") for k in range(K)] for row in z])
    head = encoder[3].weight.detach().numpy()
    fam = FeatureActivationMap(encoder, encoder[2])
    close(fam.attribute(x, K - 1, attr_dim_summation=False, reference_embedding=s), (f[:, -1] @ head) * A)
    close(fam.attribute(x, K - 1, reference_embedding=s), ((f[:, -1] @ head) * A).sum(1, keepdims=True))
    close(fam.attribute_all(x, reference_embedding=s), ((f @ head) * A[:, None]).sum(2))


class Twice(PooledEncoder):
    """Calls its layer twice; the embedding is the mean of the last call."""

    def forward(self, x):
        self.features(x.flip(0))
        return super().forward(x)


@pytest.mark.parametrize("layer_input", [False, True])
def test_a_layer_that_is_called_twice_warns_once_and_its_last_call_is_explained(layer_input):
    once = explainer(seeded(PooledEncoder)).attribute(INPUTS, 1, None, layer_input, reference_embedding=REFERENCES)
    with one_warning(r"'layer' \(ReLU\).*several times.*last call"):
        maps = explainer(seeded(Twice)).attribute(INPUTS, 1, None, layer_input, reference_embedding=REFERENCES)
    close(maps, once)


def test_two_encoder_calls_in_one_forward_are_warned_about():
    reference = random(3, 3, 8, 8, seed=5)

    def similarity(x):
        return nn.functional.cosine_similarity(ALIGNED(x), ALIGNED(reference))[:, None]

    fam = FeatureActivationMap(similarity, ALIGNED.layer)
    with pytest.warns(UserWarning, match=r"several times.*last call"):
        fam.attribute(INPUTS, reference_embedding=torch.ones(1, 1, dtype=torch.float64))


def test_a_layer_that_is_given_twice_is_not_taken_for_one_that_is_called_twice():
    fam = FeatureActivationMap(JACOBIAN, [JACOBIAN.layer, JACOBIAN.layer])
    with silent():
        one, two = fam.attribute(INPUTS, 1, reference_embedding=REFERENCES)
    close(one, two)
    close(one, explainer(JACOBIAN).attribute(INPUTS, 1, reference_embedding=REFERENCES))


class NormEncoder(PooledEncoder):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return super().forward(self.norm(x))


NORM_CALLS = {
    "attribute": lambda fam: fam.attribute(INPUTS, 1, reference_embedding=REFERENCES),
    "attribute_reference": lambda fam: fam.attribute(INPUTS, reference=INPUTS),
    "attribute_all": lambda fam: fam.attribute_all(INPUTS, reference=INPUTS),
    "attribute_pair": lambda fam: fam.attribute_pair(INPUTS, INPUTS),
}


@pytest.mark.parametrize("call", NORM_CALLS.values(), ids=NORM_CALLS.keys())
def test_batch_norm_in_training_mode_warns_once(call):
    with one_warning(r"training mode.*batch norm.*eval\(\)"):
        call(explainer(seeded(NormEncoder).train()))


@pytest.mark.parametrize("call", NORM_CALLS.values(), ids=NORM_CALLS.keys())
def test_batch_norm_in_training_mode_warns_behind_a_score_or_a_bound_method_too(call):
    model = seeded(NormEncoder).train()
    with pytest.warns(UserWarning, match="training mode"):
        call(FeatureActivationMap(model.forward, model.layer))
    with pytest.warns(UserWarning, match="training mode"):
        FeatureActivationMap(SimilarityScore(model, REFERENCES), model.layer).attribute(INPUTS, 1)


class DropPath(nn.Identity):
    """Called as those of timm and transformers are."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob


@pytest.mark.parametrize(
    "dropout", [nn.Dropout(0.3), nn.Dropout2d(0.3), torchvision.ops.StochasticDepth(0.3, "row"), DropPath(0.3)]
)
def test_dropout_in_training_mode_warns_and_not_in_eval_mode(dropout):
    model = seeded(PooledEncoder)
    model.early = nn.Sequential(model.early, dropout)
    model.train()
    fam = FeatureActivationMap(model, model.layer)
    with one_warning(r"training mode.*dropout.*eval\(\)"):
        fam.attribute(INPUTS, 1, reference_embedding=REFERENCES)
    model.eval()
    with silent():
        fam.attribute(INPUTS, 1, reference_embedding=REFERENCES)


class Powers(nn.Identity):
    """Has a p for each channel, as a generalised mean may have."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.full((5,), 3.0))


@pytest.mark.parametrize("dropout", [nn.Dropout(0.0), DropPath(0.0), DropPath(None), nn.Identity(), Powers()])
def test_dropout_of_nothing_does_not_warn(dropout):
    model = seeded(PooledEncoder)
    model.early = nn.Sequential(model.early, dropout)
    model.train()
    with silent():
        FeatureActivationMap(model, model.layer).attribute(INPUTS, 1, reference_embedding=REFERENCES)


def test_training_mode_without_batch_norm_and_batch_norm_in_eval_mode_do_not_warn():
    partly = seeded(NormEncoder).train()
    partly.norm.eval()
    with silent():
        for model in (seeded(PooledEncoder).train(), partly):
            explainer(model).attribute(INPUTS, reference=INPUTS)


class Aside(HeadEncoder):
    """The embedding does not depend on ``layer``, or only through a detached tensor."""

    def __init__(self, detached):
        super().__init__()
        self.detached, self.other = detached, nn.Linear(3, 4)

    def forward(self, x):
        z = super().forward(x)
        return z.detach() if self.detached else self.other(x.mean((2, 3)))


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("layer_input", [False, True])
def test_an_embedding_that_does_not_depend_on_the_layer_warns_once_and_has_a_zero_map(detached, layer_input):
    fam = explainer(seeded(lambda: Aside(detached)))
    with one_warning(r"does not depend on.*'layer' \(ReLU\)"):
        maps = fam.attribute(INPUTS, 0, None, layer_input, reference_embedding=random(5, 4))
    assert maps.shape == (3, 1, 4, 4)
    assert not maps.any()
    with one_warning("does not depend on"):
        maps = fam.attribute_all(INPUTS, reference_embedding=random(50, 4))
    assert not maps.any()


def test_of_several_layers_only_the_independent_one_is_named():
    class Split(HeadEncoder):
        def forward(self, x):
            self.conv2(x[:, [0, 1, 2, 0, 1]])
            return self.head(self.layer(self.early(self.conv1(x)).repeat(1, 2, 1, 1)[:, :6]).mean((2, 3)))

    model = seeded(Split)
    with one_warning("'conv2'"):
        maps = FeatureActivationMap(model, [model.conv1, model.conv2]).attribute(
            INPUTS, 0, reference_embedding=random(1, 4)
        )
    assert maps[0].any()
    assert not maps[1].any()


@pytest.mark.parametrize("size", [(12, 12), (12, 8)])
def test_a_map_as_high_as_the_embedding_is_long_is_not_taken_for_tokens(size):
    # conv1 keeps the size: 12 is also the embedding's dimension.
    encoder = seeded(lambda: HeadEncoder(embedding=12))
    with silent():
        FeatureActivationMap(encoder, encoder.conv1).attribute(random(2, 3, *size), reference_embedding=random(1, 12))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("route", ["auto", "jacobian"])
@each_encoder
def test_nothing_is_warned_about_in_the_ordinary_case(encoder, route, similarity):
    fam = explainer(encoder, similarity=similarity, channel_weights=route)
    layers = FeatureActivationMap(encoder, [encoder.early, encoder.layer])
    with silent():
        fam.attribute(INPUTS, reference=INPUTS.flip(0))
        fam.attribute(INPUTS, [0, 1, 3], None, True, reference_embedding=REFERENCES, contrast="rest")
        fam.attribute_all(INPUTS, reference_embedding=random(9, 6))
        fam.attribute_pair(INPUTS, INPUTS[:1])
        fam.embed(INPUTS)
        layers.attribute(INPUTS, 0, reference_embedding=REFERENCES)
        fam.attribute(INPUTS, reference=INPUTS)  # each with itself: a similarity of one


WARNED_CALLS = {
    "attribute": lambda fam, x: fam.attribute(x, 0, reference_embedding=REFERENCES),
    "attribute_all": lambda fam, x: fam.attribute_all(x, reference_embedding=REFERENCES),
    "attribute_pair": lambda fam, x: fam.attribute_pair(x, INPUTS),
}


@pytest.mark.parametrize("call", WARNED_CALLS.values(), ids=WARNED_CALLS.keys())
@pytest.mark.parametrize("doubt", ["bad embedding", "training mode"])
def test_a_warning_points_at_the_line_of_the_caller(call, doubt):
    encoder = seeded(NormEncoder).train(doubt == "training mode")
    x = INPUTS * float("nan") if doubt == "bad embedding" else INPUTS
    with pytest.warns(UserWarning, match=doubt if doubt == "training mode" else "not finite") as record:
        call(explainer(encoder), x)
    assert {w.filename for w in record} == {__file__}
