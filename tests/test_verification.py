"""Why a pair was accepted or rejected at a threshold."""

import copy
import functools
import importlib.util
import io
import os
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path

import helpers
import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
from encoders import (
    HAND_A,
    FlatEncoder,
    HeadEncoder,
    Modified,
    OfActivations,
    PooledEncoder,
    Unbiased,
    pooled,
    random,
    seeded,
)
from helpers import arrays, close, held, silent
from PIL import Image
from torch import nn

from captum_fam import (
    FeatureActivationMap,
    IntegratedDecomposition,
    RelevanceCam,
    SimilarityDecomposition,
)
from captum_fam.tasks.verification import explain_verification
from captum_fam.tasks.verification_explanation import VerificationExplanation

DATA = os.environ.get("CAPTUM_FAM_DATA")
PAGE = (Path(__file__).parent.parent / "docs" / "verification.md").read_text(encoding="utf-8")
B = 5
X, Y = random(B, 3, 8, 8), random(B, 3, 8, 8, seed=2)
POOLED, HEAD, FLAT = seeded(PooledEncoder), seeded(HeadEncoder), seeded(FlatEncoder)
NORMALISED = Modified(HEAD, F.normalize)
THETA = {"cosine": 0.97, "dot": 0.068, "euclidean": 0.08}


def explain(encoder=POOLED, threshold=0.97, images=X, others=Y, **options):
    return explain_verification(images, others, encoder, encoder.layer, threshold, **options)


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught]


def means(maps):
    return maps.double().flatten(1).mean(1)


# Values by hand, by NumPy and by the methods themselves


def test_a_pair_by_hand():
    encoder = OfActivations()
    other = torch.tensor([[[[4.0, 4.0], [4.0, 4.0]], [[3.0, 3.0], [3.0, 3.0]]]]).double()  # z (3, 4), s (4, 3)
    found = explain(encoder, 0.8, HAND_A, other)
    # f = (s / 5 - 0.8 z / 5) / 5 = (0.064, -0.008); there (z / 5 - 0.8 s / 5) / 5 = (-0.008, 0.064)
    close(found.maps, np.array([[[[0.064, 0.096], [0.128, 0.352]]]]))
    close(found.other_maps, np.full((1, 1, 2, 2), 0.16))
    close(found.scores, np.array([0.96]))
    close(found.margins, np.array([0.16]))
    assert found.accepted.tolist() == [True]
    assert found.measure == "cosine"


def test_a_distance_by_hand():
    encoder = OfActivations()
    other = torch.tensor([[[[4.0, 4.0], [4.0, 4.0]], [[3.0, 3.0], [3.0, 3.0]]]]).double()
    found = explain(encoder, 2, HAND_A, other, similarity="euclidean")
    # d² = 2, the margin 4 - 2; f = 2 s - z + (4 - 25) z / 25 = (2.48, -1.36)
    close(found.maps, np.array([[[[2.48, -0.48], [-3.44, 9.44]]]]))
    close(found.scores, np.array([2**0.5]))
    close(found.margins, np.array([2.0]))
    close(means(found.maps), np.array([2.0]))
    close(means(found.other_maps), np.array([2.0]))
    rejected = explain(encoder, 1, HAND_A, other, similarity="euclidean")
    assert (rejected.measure, rejected.accepted.tolist()) == ("distance", [False])
    close(rejected.margins, np.array([-1.0]))


@pytest.mark.parametrize("similarity", THETA)
def test_maps_of_both_sides_are_those_of_numpy_and_add_up_to_the_margin(similarity):
    theta = THETA[similarity]
    with silent():
        found = explain(threshold=theta, similarity=similarity, internal_batch_size=2)
    (z, A), (s, R) = arrays(POOLED, X), arrays(POOLED, Y)

    def expected(z, s, A):
        if similarity == "euclidean":
            f = 2 * s - z + (theta**2 - s @ s) / (z @ z) * z
        else:
            f = oracle.decomposition_weights(z, s[None], 0, similarity, threshold=theta)
        return oracle.aligned_map(f, A)

    close(found.maps[:, 0], np.stack([expected(*each) for each in zip(z, s, A)]))
    close(found.other_maps[:, 0], np.stack([expected(*each) for each in zip(s, z, R)]))
    scores = [oracle.contributions(a, b, similarity).sum() for a, b in zip(z, s)]
    margins = np.array(scores) + theta**2 if similarity == "euclidean" else np.array(scores) - theta
    close(found.margins, margins)
    close(means(found.maps), margins)
    close(means(found.other_maps), margins)
    assert 0 < found.accepted.sum() < B  # both decisions are there


def test_decisions_and_scores_are_those_of_torch():
    z, s = (helpers.run(POOLED, x)[0] for x in (X, Y))
    for similarity, score in (
        ("cosine", F.cosine_similarity(z, s)),
        ("dot", (z * s).sum(1)),
        ("euclidean", F.pairwise_distance(z, s, eps=0)),
    ):
        theta = THETA[similarity]
        found = explain(threshold=theta, similarity=similarity)
        close(found.scores, score)
        assert found.accepted.tolist() == (score <= theta if similarity == "euclidean" else score >= theta).tolist()
        close(found.thresholds, np.full(B, theta))


METHODS = {
    "SimilarityDecomposition": (SimilarityDecomposition, {}),
    "IntegratedDecomposition": (IntegratedDecomposition, {}),
    "FeatureActivationMap": (FeatureActivationMap, {}),
    "RelevanceCam": (RelevanceCam, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("most", [None, 1, 12])
def test_each_method_explains_what_its_attribute_pair_does(name, most):
    kind, options = METHODS[name]
    encoder = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), *pooled(), nn.Linear(6, 4)))
    found = explain_verification(X, Y, encoder, encoder[1], 0.9, method=name, internal_batch_size=most)
    here, there = kind(encoder, encoder[1], **options).attribute_pair(X, Y, threshold=0.9)
    close(found.maps, here, atol=1e-9)
    close(found.other_maps, there, atol=1e-9)
    assert found.adds_up == (name in ("SimilarityDecomposition", "IntegratedDecomposition"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("similarity", THETA)
@pytest.mark.parametrize("encoder", [POOLED, HEAD, FLAT], ids=["aligned", "head", "flat"])
def test_each_pair_may_have_a_threshold_of_its_own(encoder, similarity):
    theta = THETA[similarity] * torch.linspace(0.9, 1.02, B).double()
    found = explain(encoder, theta.tolist(), similarity=similarity, internal_batch_size=2)
    for i in range(B):
        alone = explain(encoder, theta[i].item(), X[i : i + 1], Y[i : i + 1], similarity=similarity)
        for name in ("maps", "other_maps", "scores", "margins", "thresholds", "accepted"):
            close(getattr(found, name)[i : i + 1], getattr(alone, name))


def test_of_unit_embeddings_a_distance_is_twice_the_map_of_its_cosine():
    encoder, d = Modified(POOLED, F.normalize), 0.2
    by_distance = explain(encoder, d, similarity="euclidean")
    by_cosine = explain(encoder, 1 - d**2 / 2)
    close(by_distance.maps, 2 * by_cosine.maps)
    close(by_distance.other_maps, 2 * by_cosine.other_maps)
    assert by_distance.accepted.tolist() == by_cosine.accepted.tolist()
    assert 0 < by_distance.accepted.sum() < B


def test_what_no_place_has_is_the_share_of_the_head_s_bias():
    found, _ = warned(lambda: explain(HEAD, 0.9))
    (z, _), (s, _) = arrays(HEAD, X), arrays(HEAD, Y)
    bias = HEAD.head.bias.detach().numpy()

    def of_bias(z, s):
        return oracle.decomposition_weights(z, s[None], 0, "cosine", threshold=0.9) @ bias

    here, there = found.missing
    close(here, np.array([of_bias(*pair) for pair in zip(z, s)]))
    close(there, np.array([of_bias(*pair) for pair in zip(s, z)]))
    close(means(found.maps) + here, found.scores - 0.9)


def test_the_parts_for_and_against_are_those_of_the_map():
    found = explain()
    for M, positive, negative in zip((found.maps, found.other_maps), found.supporting, found.opposing):
        close(positive, np.maximum(M.numpy(), 0))
        close(negative, np.maximum(-M.numpy(), 0))
        assert positive.max() > 0
        assert negative.max() > 0


def test_the_sides_change_places():
    one, two = explain(), explain(images=Y, others=X)
    close(one.maps, two.other_maps)
    close(one.other_maps, two.maps)
    close(one.margins, two.margins)


# Which pairs


@pytest.mark.parametrize("most", [None, 2])
def test_one_image_goes_with_all_of_the_other_side(most):
    every = explain(others=Y[:1].expand(B, -1, -1, -1), internal_batch_size=most)
    for one in (
        explain(others=Y[:1], internal_batch_size=most),
        explain(images=Y[:1], others=X, internal_batch_size=most),
    ):
        close(one.margins, every.margins)
    close(explain(others=Y[:1]).other_maps, every.other_maps)
    close(explain(images=Y[:1], others=X).maps, every.other_maps)


def test_no_pair_and_sides_of_different_sizes():
    found = explain(images=X[:0], others=Y[:0])
    assert found.maps.shape == found.other_maps.shape == (0, 1, 4, 4)
    assert found.margins.shape == found.accepted.shape == found.explainable.shape == (0,)
    assert repr(found) == "VerificationExplanation(0 pairs, 0 accepted, maps=(0, 1, 4, 4))"
    assert explain(images=X[:0], others=Y[:1]).maps.shape == (0, 1, 4, 4)
    assert explain(images=X[:1], others=Y[:0]).other_maps.shape == (0, 1, 4, 4)
    wide = explain(others=random(B, 3, 8, 12))
    assert (wide.maps.shape, wide.other_maps.shape) == ((B, 1, 4, 4), (B, 1, 4, 6))
    close(means(wide.other_maps), wide.margins)


class TwoViews(PooledEncoder):
    """Takes two images of one person."""

    def forward(self, a, b):
        return super().forward(torch.cat([a, b], -1))


def test_inputs_of_several_tensors():
    encoder = seeded(TwoViews)
    found = explain(encoder, 0.9, (X, X.flip(0)), (Y, Y.flip(0)), internal_batch_size=2)
    plain = explain(POOLED, 0.9, torch.cat([X, X.flip(0)], -1), torch.cat([Y, Y.flip(0)], -1))
    close(found.maps, plain.maps)
    close(found.other_maps, plain.other_maps)


class Siamese(nn.Module):
    """As tutorials have it: two images in, a score out, and a branch as a method and as a module."""

    def __init__(self):
        super().__init__()
        self.encoder = PooledEncoder()

    def forward_once(self, x):
        return self.encoder(x)

    get_embedding = forward_once

    def forward(self, a, b):
        return F.pairwise_distance(self.forward_once(a), self.forward_once(b))


@pytest.mark.parametrize("branch", ["forward_once", "get_embedding", "encoder"])
def test_the_branch_of_a_siamese_network_is_explained(branch):
    siamese = seeded(Siamese)
    found = explain_verification(X, Y, getattr(siamese, branch), siamese.encoder.layer, 0.08, similarity="euclidean")
    close(found.scores, siamese(X, Y).detach(), atol=1e-5)  # torch adds 1e-6 to each difference
    close(means(found.maps), 0.08**2 - found.scores**2)


def test_a_siamese_network_itself_is_an_error_that_says_what_it_is_called_with():
    siamese = seeded(Siamese)
    with pytest.raises(TypeError, match="argument"):
        explain_verification(X, Y, siamese, siamese.encoder.layer, 0.9)


def test_data_parallel_and_a_layer_of_its_module():
    model = nn.DataParallel(POOLED)
    close(explain_verification(X, Y, model, POOLED.layer, 0.97).maps, explain().maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maps_have_the_dtype_of_the_activations_and_scores_are_single_precision(dtype):
    encoder, exact = seeded(PooledEncoder).to(dtype), explain()
    with silent():
        found = explain(encoder, 0.97, X.to(dtype), Y.to(dtype), internal_batch_size=2)
    assert found.maps.dtype == found.other_maps.dtype == dtype
    assert found.scores.dtype == found.margins.dtype == torch.float32
    atol = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    close(found.maps.double(), exact.maps, rtol=0, atol=atol)
    close(found.margins.double(), exact.margins, rtol=0, atol=atol)


def test_the_model_is_left_as_it_was_and_no_more_than_so_many_images_are_in_it_at_once():
    sizes = []
    encoder = copy.deepcopy(HEAD)
    encoder.conv1.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    images, others = random(100, 3, 8, 8), random(100, 3, 8, 8, seed=2)
    before = held(encoder)
    warned(lambda: explain(encoder, 0.9, images, others))
    assert max(sizes) == 32  # without asking
    assert held(encoder) == before
    sizes.clear()
    warned(lambda: explain(encoder, 0.9, images[:9], others[:9], internal_batch_size=9, n_steps=2))
    assert max(sizes) == 9
    assert not any(p.grad is not None for p in encoder.parameters())


def test_under_inference_mode_and_without_gradients():
    with torch.inference_mode():
        close(explain().maps.clone(), explain().maps.clone())
    with torch.no_grad():
        close(explain(FLAT, 0.5).maps, warned(lambda: explain(FLAT, 0.5))[0].maps)


# Warnings: a picture that speaks for another decision does not come without a word


def test_silent_where_the_maps_add_up():
    encoder = seeded(lambda: Unbiased(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with silent():
        found = explain(encoder, 0.9)
    for missing in found.missing:
        close(missing, np.zeros(B))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("encoder", [POOLED, seeded(lambda: Unbiased(nn.AdaptiveAvgPool2d(1), nn.Flatten()))])
def test_an_image_and_itself_at_its_own_score_is_no_matter_of_rounding(encoder, dtype):
    encoder, images = copy.deepcopy(encoder).to(dtype), X.to(dtype)
    with silent():
        found = explain(encoder, 1, images, images)
        distances = explain(encoder, 0.1, images, images, similarity="euclidean")
    assert found.maps.abs().max() < {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
    assert str(distances.scores.tolist()) == str([0.0] * B)


def opposed(found):
    """Pairs on whose maps the total has another sign than the margin."""
    wrong = (means(found.maps) * found.margins < 0) | (means(found.other_maps) * found.margins < 0)
    return wrong.nonzero().flatten().tolist()


def test_pairs_whose_map_speaks_for_the_other_decision_are_named():
    for options, reason in (
        ({"encoder": HEAD, "threshold": 0.9}, "the rest belongs to no place, see `missing`"),
        ({"method": "FeatureActivationMap"}, r"add up to no score. Pass method=SimilarityDecomposition"),
        ({"encoder": HEAD, "n_steps": 4, "threshold": 0.9995, "baseline": "zero"}, "belongs to the baseline"),
    ):
        found, texts = warned(functools.partial(explain, **options))
        wrong = opposed(found)
        assert wrong
        (text,) = [t for t in texts if "do not add up to score - threshold" in t]
        assert reason in text
        named = eval(text.split("pairs ")[1].split("]")[0] + "]")
        assert set(named) >= set(wrong)
        if options["encoder"] is not HEAD if "encoder" in options else True:
            assert named == wrong


def test_many_pairs_are_not_all_printed():
    images, others = random(30, 3, 8, 8), random(30, 3, 8, 8, seed=2)
    _, texts = warned(lambda: explain(HEAD, 0.9, images, others))
    (text,) = [t for t in texts if "do not add up to score - threshold" in t]
    assert "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9] and 20 more" in text


def test_an_encoder_that_ends_in_a_normalisation_is_named_even_near_the_threshold():
    head = seeded(lambda: Unbiased(nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Flatten(), nn.Linear(6, 4, bias=False))))
    z, s = (helpers.run(head, x)[0] for x in (X, Y))
    near = F.cosine_similarity(z, s) - 3e-4  # so that nothing is far from its sum
    found, texts = warned(lambda: explain(Modified(head, F.normalize), near))
    close(means(found.maps), np.zeros(B))  # the threshold is not on the map
    (text,) = texts
    assert "[0, 1, 2, 3, 4]" in text
    assert "ends in a normalisation" in text
    with silent():
        explain(head, near)
    itself = SimilarityDecomposition(head, head.layer).attribute_pair(X, Y, contrast="self")
    close((found.maps, found.other_maps), itself)


def test_embeddings_of_zeros_are_said_by_the_sides_names_and_their_maps_are_zero():
    encoder = OfActivations()
    images, others = HAND_A.repeat(3, 1, 1, 1), HAND_A.repeat(3, 1, 1, 1).flip(1)
    images[1], others[2] = 0, torch.nan
    found, texts = warned(lambda: explain(encoder, 0.9, images, others, internal_batch_size=1))
    assert found.explainable.tolist() == [True, False, False]
    assert found.accepted.tolist() == [True, False, False]
    assert not found.maps[1:].any()
    assert not found.other_maps[1:].any()
    assert texts == [
        "Embeddings are zero or not finite (images [1], others [2]): the maps that depend on them are zero."
    ]


def test_a_model_in_training_mode_is_said_once():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *pooled()).double()
    _, texts = warned(lambda: explain_verification(X, Y, encoder, encoder[2], 0.9, internal_batch_size=2))
    assert len([t for t in texts if "training mode" in t]) == 1


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"threshold": 1.1},
            r"a cosine, from -1 to 1, but got 1.1; .*\"euclidean\".* 1.1 is the cosine 0.395, or 0.45",
        ),
        ({"threshold": [0.5, 0.5, 0.5, 0.5, -2.0]}, "a cosine, from -1 to 1, but got -2"),
        ({"threshold": 75}, "from -1 to 1, but got 75"),
        ({"threshold": 0, "similarity": "euclidean"}, "a distance above 0, but got 0"),
        ({"threshold": -1.21, "similarity": "euclidean"}, "a distance above 0, but got -1.21"),
        ({"threshold": [0.5, 0.6]}, r"one number or 5, one for each pair, but got shape \(2,\)"),
        ({"threshold": torch.full((B, 1), 0.5)}, r"but got shape \(5, 1\)"),
        ({"threshold": float("nan")}, "`threshold` to be finite"),
        ({"threshold": True}, "`threshold` to be numbers, but got True"),
        ({"threshold": None}, "`threshold` to be numbers, but got None"),
        ({"threshold": "0.5"}, "`threshold` to be numbers, but got '0.5'"),
        ({"others": Y[:3]}, "`others` to be 5 images, one for each of `images`, or one, but got 3"),
        ({"others": Y[0]}, "`others` in the form of `inputs`"),
        ({"others": (Y, Y)}, "`others` in the form of `inputs`"),
        ({"images": [X]}, "`images` to be a tensor"),
        ({"internal_batch_size": 0}, "`internal_batch_size`"),
        ({"method": "ScoreCam"}, "ScoreCam has no threshold"),
        ({"method": "Relax"}, "Relax has no threshold"),
        ({"method": "CorrespondenceMap"}, "CorrespondenceMap has no threshold"),
        ({"method": "LabelFreeActivationMap"}, "LabelFreeActivationMap has no threshold"),
        ({"method": "GradCam"}, "`method` of explain_verification to be one of"),
        ({"method": "FeatureActivationMap", "similarity": "euclidean"}, "no threshold for distances"),
        ({"method": "RelevanceCam", "similarity": "euclidean"}, "no threshold for distances"),
        ({"dimension_weights": lambda z, s: s}, "no `dimension_weights`"),
        ({"n_step": 8}, "explain_verification got an option 'n_step'"),
        ({"similarity": "cosin"}, "'cosin'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        explain(**change)


def test_distances_of_pytorch_metric_learning_whose_thresholds_mean_something_else_are_refused():
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    squared = distances.LpDistance(normalize_embeddings=False, power=2)
    for distance in (squared, distances.LpDistance()):
        with pytest.raises(ValueError, match=r'"cosine", "dot" or "euclidean", but got LpDistance. .* 1 - d \* d / 2'):
            explain(threshold=0.1, similarity=distance)
    close(explain(similarity=distances.CosineSimilarity()).maps, explain().maps)


def test_a_list_of_layers_is_refused():
    with pytest.raises(ValueError, match="`layer` to be one module"):
        explain_verification(X, Y, POOLED, [POOLED.early, POOLED.layer], 0.9)


def test_thresholds_of_numpy_and_of_one_row():
    expected = explain(threshold=0.97)
    for threshold in (np.float32(0.97), np.full(B, 0.97), torch.tensor(0.97), torch.tensor([0.97]), [0.97] * B):
        close(explain(threshold=threshold).maps, expected.maps, atol=1e-7)


# Figures and files


def colours(axis):
    """The overlay of a map: how much of it is red, and how much blue."""
    r, _, b, opacity = np.moveaxis(axis.images[-1].get_array(), -1, 0)
    return (opacity * (r > b)).sum(), (opacity * (b > r)).sum()


def test_a_figure_shows_both_parts_on_both_images_and_the_decision():
    images, others = X.sigmoid(), Y.sigmoid()
    theta = F.cosine_similarity(*(helpers.run(POOLED, x)[0] for x in (images, others))).median().item() - 1e-9
    found = explain(images=images, others=others, threshold=theta)
    assert 0 < found.accepted.sum() < B
    rows = [3, 1]
    _, axes = found.visualize(rows, use_pyplot=False)
    assert axes.shape == (2, 4)
    for axis_row, i in zip(axes, rows):
        said = axis_row[0].get_xlabel()
        assert f"pair {i}: {'accepted' if found.accepted[i] else 'rejected'}" in said
        assert f"cosine {found.scores[i]:.4g}, threshold {theta:.4g}" in said
        for axis, M in zip(axis_row[1::2], (found.maps[i], found.other_maps[i])):
            M = M.numpy()
            assert f"for {M.clip(0).mean():.3g}, against {(-M).clip(0).mean():.3g}" in axis.get_xlabel()
            assert "no place" not in axis.get_xlabel()
            red, blue = colours(axis)
            assert (red > 0) == (M.max() > 0)
            assert (blue > 0) == (M.min() < 0)


def test_rounding_of_half_precision_is_no_share_that_no_place_has():
    encoder, sides = seeded(PooledEncoder).half(), [x.sigmoid().half() for x in (X, Y)]
    found = explain(encoder, 0.5, *sides)
    assert found.missing[0].abs().max() > 1e-6
    _, axes = found.visualize([0, 1], use_pyplot=False)
    assert not any("no place" in axis.get_xlabel() for axis in axes.flat)


@pytest.mark.parametrize("scale", ["all", "row", 90])
def test_what_is_for_is_red_in_a_figure_in_which_nothing_is_against(scale):
    found = explain(images=X.sigmoid(), others=Y.sigmoid(), threshold=-0.9)
    assert found.maps.min() >= 0
    assert found.other_maps.min() >= 0
    _, axes = found.visualize([0, 1], scale=scale, use_pyplot=False)
    for axis in axes[:, 1::2].flat:
        red, blue = colours(axis)
        assert red > 0
        assert blue == 0


def test_a_figure_says_what_no_place_has_and_each_method_s_own_parts():
    images, others = X.sigmoid(), Y.sigmoid()
    with_bias, _ = warned(lambda: explain(HEAD, 0.9, images, others))
    _, axes = with_bias.visualize(0, use_pyplot=False)
    for axis, missing in zip(axes[0, 1::2], with_bias.missing):
        assert f"no place {missing[0]:.3g}" in axis.get_xlabel()
    fam, _ = warned(lambda: explain(HEAD, 0.9, images, others, method="FeatureActivationMap"))
    _, axes = fam.visualize(torch.tensor([0]), use_pyplot=False)
    assert "no place" not in axes[0, 1].get_xlabel()


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([5], "numbers of 5 pairs"),
        (-1, "numbers of 5 pairs"),
        ([0.0], "numbers of 5 pairs"),
        (torch.tensor([True] * B), r"mask.nonzero\(\)"),
        ([], "1 to 50 pairs, but 0"),
        ([0] * 51, r"1 to 50 pairs, but 51 .* nearest to the threshold"),
    ],
)
def test_pairs_that_a_figure_cannot_show(indices, message):
    with pytest.raises(ValueError, match=message):
        explain().visualize(indices)


def test_files_and_copies_have_the_numbers_and_neither_encoder_nor_images():
    class Unpicklable(PooledEncoder):
        pass

    found = explain(seeded(Unpicklable), images=random(B, 3, 64, 64))
    data = pickle.dumps(found)
    assert len(data) < 50_000
    for other in (pickle.loads(data), copy.copy(found), copy.deepcopy(found)):
        assert isinstance(other, VerificationExplanation)
        close(other.maps, found.maps)
        assert other.accepted.tolist() == found.accepted.tolist()
        assert repr(other) == repr(found)
        with pytest.raises(ValueError, match="visualize_pair"):
            other.visualize()
    assert not found.maps.requires_grad


# The page


def test_the_page_s_example_runs_and_its_decision_is_torch_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    images, others = ((x.sigmoid() - 0.5) / 0.2 for x in (X, Y))
    names = {"images": images, "others": others, "encoder": POOLED, "layer": POOLED.layer, "mean": mean, "std": std}
    with silent():
        exec(block, names)
    assert names["axes"].shape == (B, 4)
    assert (tmp_path / "why.png").stat().st_size > 10_000
    said = torch.cosine_similarity(POOLED(images), POOLED(others)) >= 0.6
    assert names["found"].accepted.tolist() == said.tolist()


@pytest.mark.parametrize("t", [0.02, 0.06, 0.08, 0.3])
def test_the_page_s_table_of_decisions(t):
    z, s = (helpers.run(POOLED, x)[0] for x in (X, Y))
    unit = Modified(POOLED, F.normalize)
    u, v = F.normalize(z), F.normalize(s)
    decisions = {
        "`cosine_similarity(a, b) >= t`": (POOLED, F.cosine_similarity(z, s) >= t),
        "cosine distance, `1 - cosine <= t`": (POOLED, 1 - F.cosine_similarity(z, s) <= t),
        "dot product `>= t`": (POOLED, (z * s).sum(1) >= t),
        "`pairwise_distance(a, b) <= t` (contrastive loss, embeddings of any length)": (
            POOLED,
            (z - s).norm(dim=1) <= t,
        ),
        "squared distance `<= t`": (POOLED, (z - s).square().sum(1) <= t),
        "a distance of embeddings of length 1": (unit, (u - v).norm(dim=1) <= t),
    }
    rows = dict(re.findall(r"^\| (.+?) \| (.*`threshold=.+) \|$", PAGE, re.M))
    assert set(decisions) == set(rows) - {"a threshold for each pair, person or camera"}
    for name, (encoder, expected) in decisions.items():
        options = eval(f"dict({rows[name].split('`')[1]})", {"t": t})
        assert explain(encoder, **options).accepted.tolist() == expected.tolist()


# Real encoders


def real(file, name):
    """An encoder of the folder's encoders.py, or of its signed_encoders.py, which imports that."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("encoders", file):
            spec = importlib.util.spec_from_file_location(f"pretrained_{module}", Path(DATA) / f"{module}.py")
            found = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, module, found)
            spec.loader.exec_module(found)
    return found.load(name)


@functools.cache
def cifar(split, count):
    """Images of CIFAR-10, so many of each class, and their classes."""
    images, labels = [], []
    with zipfile.ZipFile(Path(DATA) / "photos" / "cifar10.zip") as zipped:
        names = [n for n in sorted(zipped.namelist()) if n.startswith(f"{split}/") and n.endswith(".jpg")]
        classes = sorted({n.split("/")[1] for n in names})
        for number, name in enumerate(classes):
            for n in [n for n in names if n.split("/")[1] == name][:count]:
                images.append(Image.open(io.BytesIO(zipped.read(n))).convert("RGB"))
                labels.append(number)
    return images, np.array(labels)


def pairs_of(labels, count):
    """Numbers of images, of the same class and of two classes by turns."""
    generator, found = np.random.default_rng(0), []
    while len(found) < count:
        i, j = generator.integers(len(labels), size=2)
        if i != j and (labels[i] == labels[j]) == (len(found) % 2 == 0):
            found.append((i, j))
    return np.array(found).T


def best_threshold(scores, same):
    return max(scores, key=lambda t: ((scores >= t) == same).mean())


def without(images, values, share=0.2):
    """Images whose places of the largest values (B, 1, h, w) are their mean colour."""
    size = images.shape[2:]
    values = F.interpolate(values, size, mode="bilinear").flatten(1)
    gone = torch.zeros_like(values).scatter_(1, values.topk(int(share * values.shape[1]), 1).indices, 1)
    gone = gone.reshape(-1, 1, *size)
    return images * (1 - gone) + images.mean((2, 3), keepdim=True) * gone


needs_data = pytest.mark.skipif(DATA is None, reason="set CAPTUM_FAM_DATA to the folder of pretrained encoders")


def verified(encoder, transform, layer, count=30, **options):
    """Pairs of CIFAR-10 at the threshold that tells them apart best, in NumPy."""
    photos, labels = cifar("test", 12)
    one, two = pairs_of(labels, count)
    images, others = (torch.stack([transform(photos[i]) for i in side]) for side in (one, two))
    same = labels[one] == labels[two]
    with torch.no_grad():
        z, s = encoder(images).double().numpy(), encoder(others).double().numpy()
    scores = (z * s).sum(1) / np.linalg.norm(z, axis=1) / np.linalg.norm(s, axis=1)
    theta = float(best_threshold(scores, same))
    found, texts = warned(lambda: explain_verification(images, others, encoder, layer, theta, **options))
    close(found.scores, scores, rtol=0, atol=1e-5, check_dtype=False)
    sure = np.abs(scores - theta) > 1e-5
    assert (found.accepted.numpy() == (scores >= theta))[sure].all()
    assert (found.accepted.numpy() == same).mean() > 0.65
    return found, texts, images, others, scores - theta


def effects(encoder, images, others, maps):
    """How the cosine changes without a fifth of the image: that of the largest values, and controls."""

    def cosine(x):
        with torch.no_grad():
            return F.cosine_similarity(encoder(x), encoder(others)).numpy()

    score = cosine(images)
    chance = torch.rand(maps.shape, generator=torch.Generator().manual_seed(0))
    kinds = {"for": maps, "against": -maps, "chance": chance, "another pair's": maps.roll(7, 0)}
    return {name: cosine(without(images, values)) - score for name, values in kinds.items()}


@needs_data
def test_a_real_encoder_without_biases_behind_its_layer():
    real_encoder = real("encoders", "resnet20_cifar10")
    net = real_encoder.net
    found, texts, images, others, margins = verified(net, real_encoder.transform, real_encoder.layer)
    assert texts == []
    close(means(found.maps), margins, rtol=0, atol=1e-5)
    close(means(found.other_maps), margins, rtol=0, atol=1e-5)
    mean = {name: change.mean() for name, change in effects(net, images, others, found.maps).items()}
    assert mean["for"] < min(mean["chance"], mean["another pair's"]) - 0.01
    assert mean["against"] > max(mean["chance"], mean["another pair's"], 0) + 0.01


@needs_data
def test_a_real_encoder_with_batch_norms_and_an_affine_head():
    real_encoder = real("signed_encoders", "protonet_cifar100")
    net = real_encoder.net
    found, texts, images, others, margins = verified(net, real_encoder.transform, real_encoder.layer, n_steps=4)
    for M, missing in zip((found.maps, found.other_maps), found.missing):
        close(means(M) + missing, margins, rtol=0, atol=1e-5)
    assert any("belongs to the baseline" in t for t in texts)  # some of these maps are of the other sign
    change = effects(net, images, others, found.maps)
    assert change["for"].mean() < min(change["chance"].mean(), change["another pair's"].mean()) - 0.01
    assert change["against"].mean() > 0.01
    assert (change["for"] < change["against"]).mean() > 0.6


@needs_data
def test_an_affine_head_trained_here():
    real_encoder = real("encoders", "resnet20_cifar10")
    photos, labels = cifar("train", 20)
    with torch.no_grad():
        features = torch.cat([real_encoder.net(torch.stack([real_encoder.transform(p)])) for p in photos])
    torch.manual_seed(0)
    head = nn.Linear(64, 16)
    same = torch.from_numpy(labels[:, None] == labels).float()
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for _ in range(60):
        z = F.normalize(head(features))
        loss = F.binary_cross_entropy_with_logits(10 * (z @ z.T - 0.5), same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder = nn.Sequential(real_encoder.net, head).eval()
    found, _, _, others, margins = verified(encoder, real_encoder.transform, real_encoder.layer)
    with torch.no_grad():
        z, s = encoder(found._origin[0][0]).numpy(), encoder(others).numpy()
    theta = found.thresholds[0].item()
    bias = head.bias.detach().numpy().astype(np.float64)
    expected = [oracle.decomposition_weights(a, b[None], 0, "cosine", threshold=theta) @ bias for a, b in zip(z, s)]
    close(found.missing[0], np.array(expected), rtol=1e-3, atol=1e-5, check_dtype=False)
    close(means(found.maps), margins - np.array(expected), rtol=0, atol=1e-4)
