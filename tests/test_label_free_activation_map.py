"""LabelFreeActivationMap: the mean of the activations, whatever is asked."""

import pytest
import torch
from encoders import CONV, FlatEncoder, HeadEncoder, OfActivations, PooledEncoder, random, seeded
from helpers import arrays, close

from captum_fam import LabelFreeActivationMap, SimilarityScore

X = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)


def test_a_label_free_map_by_hand():
    A = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 4.0], [8.0, -4.0]]]]).double()
    encoder = OfActivations()
    close(LabelFreeActivationMap(encoder, encoder.layer).attribute(A), [[[[0.5, 3.0], [5.5, 1.0]]]])


@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder, FlatEncoder])
@pytest.mark.parametrize("dim", CONV)
def test_a_label_free_map_is_the_mean_of_the_activations(dim, kind):
    encoder, x = seeded(lambda: kind(dim)), random(2, 3, *[6] * dim)
    maps = LabelFreeActivationMap(encoder, encoder.layer).attribute(x)
    close(maps, arrays(encoder, x)[1].mean(1, keepdims=True))
    of_input = LabelFreeActivationMap(encoder, encoder.layer).attribute(x, attribute_to_layer_input=True)
    close(of_input, arrays(encoder, x, layer=encoder.conv2)[1].mean(1, keepdims=True))


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


LESS = [{"contrast": 0}, {"contrast": [1, 2, 3]}, {"contrast": "rest"}, {"contrast": "self"}, {"threshold": 0.3}]


@pytest.mark.parametrize("less", LESS, ids=str)
def test_the_contrast_of_a_label_free_map_is_zero(less):
    encoder = seeded(PooledEncoder)
    lafam = LabelFreeActivationMap(encoder, encoder.layer)
    maps = lafam.attribute(X, 3, reference_embedding=REFERENCES, **less)
    assert maps.shape == (3, 1, 4, 4)
    assert not maps.any()
    if less not in LESS[:2]:
        assert not lafam.attribute_all(X, reference_embedding=REFERENCES, **less).any()


def test_all_label_free_maps_are_copies_of_one():
    encoder = seeded(PooledEncoder)
    lafam = LabelFreeActivationMap(encoder, encoder.layer)
    maps = lafam.attribute_all(X, reference_embedding=REFERENCES)
    close(maps, lafam.attribute(X).expand(3, 4, 4, 4), rtol=0, atol=0)


def test_a_label_free_map_without_the_sum_is_each_channels_share():
    encoder = seeded(PooledEncoder)
    terms = LabelFreeActivationMap(encoder, encoder.layer).attribute(X, attr_dim_summation=False)
    close(terms, arrays(encoder, X)[1] / 6)


def test_a_label_free_map_needs_no_reference():
    encoder = seeded(PooledEncoder)
    lafam = LabelFreeActivationMap(encoder, encoder.layer)
    mean = arrays(encoder, X)[1].mean(1, keepdims=True)
    close(lafam.attribute(X), mean)
    close(lafam.attribute_all(X), mean)
