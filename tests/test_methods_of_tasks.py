"""Every method in every task: its maps are those of the method itself, called by hand."""

import copy
import pickle
import warnings

import helpers
import pytest
import torch
from encoders import HeadEncoder, PooledEncoder, random, seeded

from captum_fam import (
    CorrespondenceMap,
    FeatureActivationMap,
    Hits,
    SimilarityDecomposition,
    explain_episode,
    explain_hits,
    prototypes,
)
from captum_fam.methods.by_name import OF_SIMILARITIES

QUERIES = random(3, 3, 8, 8)
SUPPORT, LABELS = random(6, 3, 8, 8, seed=2), [4, 4, 7, 7, 9, 9]
HITS = random(3, 4, 3, 8, 8, seed=3)
OPTIONS = {"Fame": {"n_steps": 3}, "Relax": {"n_samples": 20}}
TERMS = ["FeatureActivationMap", "SimilarityDecomposition", "IntegratedDecomposition", "RelevanceCam"]
ENCODER = seeded(PooledEncoder)
HEAD = seeded(HeadEncoder)
each_method = pytest.mark.parametrize("name", OF_SIMILARITIES)
each_contrasting = pytest.mark.parametrize("name", [n for n in OF_SIMILARITIES if n != "LabelFreeActivationMap"])
quiet = pytest.mark.filterwarnings("ignore:The mean of a contrast", "ignore:The places of layer", "ignore:Setting")


def made(name, encoder=ENCODER, **options):
    kind = OF_SIMILARITIES[name]
    return kind(encoder, *([] if name in ("Fame", "Relax") else [encoder.layer]), **OPTIONS.get(name, {}), **options)


def by_hand(method, x, s, images, **asked):
    """A map for each reference, from a call of attribute for each."""
    asked = {key: value for key, value in asked.items() if value is not None}
    given = {"reference": images} if isinstance(method, CorrespondenceMap) else {"reference_embedding": s}
    return torch.stack([method.attribute(x, target=k, **given, **asked)[:, 0] for k in range(len(s))], 1)


def close(one, other):
    helpers.close(one, other, rtol=1e-6, atol=1e-9)


@quiet
@each_method
def test_an_episode_has_the_maps_of_its_method(name):
    p = prototypes(ENCODER(SUPPORT).detach(), LABELS)
    episode = explain_episode(ENCODER, ENCODER.layer, QUERIES, SUPPORT, LABELS, method=name, **OPTIONS.get(name, {}))
    method = made(name)
    if name == "CorrespondenceMap":  # of a class, the best of its images
        each = by_hand(method, QUERIES, SUPPORT, SUPPORT)
        expected = each.reshape(3, 3, 2, *each.shape[2:]).amax(2)
    else:
        expected = by_hand(method, QUERIES, p, None)
    close(episode.maps, expected)
    close(episode.scores, torch.cosine_similarity(ENCODER(QUERIES).detach()[:, None], p, dim=2))
    assert (episode.route != "") == (name in TERMS[:3])
    close(pickle.loads(pickle.dumps(episode)).maps, episode.maps)


@quiet
@each_contrasting
@pytest.mark.parametrize("other", [9, "rest"])
def test_contrasts_of_an_episode_are_those_of_its_method(name, other):
    options = OPTIONS.get(name, {})
    episode = explain_episode(ENCODER, ENCODER.layer, QUERIES, SUPPORT, LABELS, method=name, **options)
    p, K = prototypes(ENCODER(SUPPORT).detach(), LABELS), 3
    if name == "CorrespondenceMap":
        best = episode.maps
        less = best[:, 2] if other == 9 else best[:, 1:].mean(1)
        expected = best[:, :1] - less[:, None]
    else:
        expected = by_hand(made(name), QUERIES, p, None, contrast="rest" if other == "rest" else 2)[:, :1]
    close(episode.contrast(4, other), expected)
    whole = explain_episode(ENCODER, ENCODER.layer, QUERIES, SUPPORT, LABELS, method=name, contrast=other, **options)
    close(whole.maps, torch.cat([episode.contrast(label, other) for label in (4, 7, 9)], 1))
    close(whole.contrast(7, 4), episode.contrast(7, 4))  # what explains a difference is the same
    assert whole.maps.shape[1] == K


@quiet
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("asked", [{"contrast": "self"}, {"threshold": 0.4}])
def test_an_episode_less_the_querys_own(name, asked):
    p = prototypes(HEAD(SUPPORT).detach(), LABELS)
    expected = by_hand(made(name, HEAD), QUERIES, p, None, **asked)
    episode = explain_episode(HEAD, HEAD.layer, QUERIES, SUPPORT, LABELS, method=name)
    for k, label in enumerate((4, 7, 9)):
        other = {"other": "self"} if "contrast" in asked else asked
        close(episode.contrast(label, **other), expected[:, k : k + 1])
    for most in (None, 2):
        whole = explain_episode(
            HEAD, HEAD.layer, QUERIES, SUPPORT, LABELS, method=name, internal_batch_size=most, **asked
        )
        close(whole.maps, expected)


@quiet
@each_method
@pytest.mark.parametrize("most", [None, 2])
def test_hits_have_the_maps_of_their_method_on_both_sides(name, most):
    options = OPTIONS.get(name, {})
    found = explain_hits(QUERIES, HITS, ENCODER, ENCODER.layer, method=name, internal_batch_size=most, **options)
    method, s = made(name), ENCODER(HITS.flatten(0, 1)).detach().reshape(3, 4, -1)
    for b in range(3):
        close(found.maps[b], by_hand(method, QUERIES[b : b + 1], s[b], HITS[b])[0])
        z = ENCODER(QUERIES[b : b + 1]).detach()
        close(found.hit_maps[b], by_hand(method, HITS[b], z, QUERIES[b : b + 1])[:, 0])
        close(found.similarities[b], torch.cosine_similarity(z, s[b]))
    assert found.ids == [[0, 1, 2, 3]] * 3
    assert found.scores is None


@quiet
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("asked", [{"contrast": "self"}, {"threshold": 0.4}])
def test_hits_less_what_each_side_has_with_itself(name, asked):
    found = explain_hits(QUERIES, HITS, HEAD, HEAD.layer, method=name, **asked)
    plain = explain_hits(QUERIES, HITS, HEAD, HEAD.layer, method=name)
    method, s = made(name, HEAD), HEAD(HITS.flatten(0, 1)).detach().reshape(3, 4, -1)
    for b in range(3):
        z = HEAD(QUERIES[b : b + 1]).detach()
        close(found.maps[b], by_hand(method, QUERIES[b : b + 1], s[b], None, **asked)[0])
        close(found.hit_maps[b], by_hand(method, HITS[b], z, None, **asked)[:, 0])
    other = {"other": "self"} if "contrast" in asked else asked
    close(plain.contrast(2, **other), found.maps[:, 2:3])


@quiet
@each_contrasting
@pytest.mark.parametrize("contrast", [1, "rest"])
def test_hits_rather_than_others(name, contrast):
    options = OPTIONS.get(name, {})
    found = explain_hits(QUERIES, HITS, ENCODER, ENCODER.layer, method=name, contrast=contrast, **options)
    plain = explain_hits(QUERIES, HITS, ENCODER, ENCODER.layer, method=name, **options)
    method, s = made(name), ENCODER(HITS.flatten(0, 1)).detach().reshape(3, 4, -1)
    for b in range(3):
        expected = by_hand(method, QUERIES[b : b + 1], s[b], HITS[b], contrast=contrast)[0]
        close(found.maps[b], expected)
        close(plain.contrast(3, contrast)[b, 0], expected[3])
    assert found.hit_maps is None  # a hit knows of no other
    assert plain.hit_maps.shape[:2] == (3, 4)


@pytest.mark.parametrize("asked", [{"contrast": 1}, {"contrast": "rest"}, {"contrast": "self"}, {"threshold": 0.4}])
def test_a_method_that_knows_of_no_reference_has_no_contrast(asked):
    options = {"method": "LabelFreeActivationMap"}
    with pytest.raises(ValueError, match="knows of no reference, so it has neither"):
        explain_hits(QUERIES, HITS, ENCODER, ENCODER.layer, **options, **asked)
    found = explain_hits(QUERIES, HITS, ENCODER, ENCODER.layer, **options)
    other = {"other": asked["contrast"]} if "contrast" in asked else asked
    with pytest.raises(ValueError, match="knows of no reference, so it has neither"):
        found.contrast(0, **other)
    episode = explain_episode(ENCODER, ENCODER.layer, QUERIES, SUPPORT, LABELS, **options)
    with pytest.raises(ValueError, match="knows of no reference, so it has neither"):
        episode.contrast(
            4, **({"other": 7 if asked.get("contrast") == 1 else asked["contrast"]} if "contrast" in asked else asked)
        )


def test_a_method_that_compares_places_needs_images():
    s = ENCODER(HITS.flatten(0, 1)).detach().reshape(3, 4, -1)
    with pytest.raises(ValueError, match="compares places: pass the images of the hits, or a `gallery`"):
        explain_hits(QUERIES, Hits(embeddings=s), ENCODER, ENCODER.layer, method="CorrespondenceMap")


@pytest.mark.parametrize("name", ["ScoreCam", "CorrespondenceMap", "Fame", "Relax"])
@pytest.mark.parametrize("asked", [{"contrast": "self"}, {"threshold": 0.4}])
def test_a_method_without_an_own_share_says_so(name, asked):
    options = OPTIONS.get(name, {})
    with pytest.raises(ValueError, match=rf"{name} .*no (threshold|contrast)"):
        explain_hits(QUERIES, HITS, ENCODER, ENCODER.layer, method=name, **asked, **options)
    with pytest.raises(ValueError, match=rf"{name} .*no (threshold|contrast)"):
        explain_episode(ENCODER, ENCODER.layer, QUERIES, SUPPORT, LABELS, method=name, **asked, **options)


def test_an_unknown_option_names_the_function_that_was_called():
    with pytest.raises(TypeError, match=r"^explain_episode got an option 'normalise' .* Did you mean 'normalize'\?$"):
        explain_episode(ENCODER, ENCODER.layer, QUERIES, SUPPORT, LABELS, normalise=None)
    with pytest.raises(TypeError, match=r"^explain_hits got an option 'n_step' that SimilarityDecomposition does not"):
        explain_hits(QUERIES, HITS, ENCODER, ENCODER.layer, method=SimilarityDecomposition, n_step=4)


def test_methods_that_need_no_layer():
    made_of = explain_hits(QUERIES, HITS, ENCODER, None, method="IntegratedDecomposition")
    assert made_of.maps.shape[:2] == (3, 4)
    assert explain_hits(QUERIES, HITS, ENCODER, None, method="Relax", n_samples=4).maps.shape == (3, 4, 8, 8)
    with pytest.raises(TypeError, match="Expected `layer` to be a module"):
        explain_hits(QUERIES, HITS, ENCODER, None)


def test_a_method_of_ones_own_is_taken():
    class Mine(SimilarityDecomposition):
        pass

    close(
        explain_hits(QUERIES, HITS, ENCODER, ENCODER.layer, method=Mine).maps,
        explain_hits(QUERIES, HITS, ENCODER, ENCODER.layer, method="SimilarityDecomposition").maps,
    )


def test_a_map_and_a_margin_of_opposite_sign_come_with_a_word():
    # The squared distance: what decides is the length of the prototypes, which no place of a query has.
    support = torch.cat([SUPPORT, SUPPORT * 3])
    labels = [*LABELS, 1, 1, 2, 2, 3, 3]
    options = {"similarity": "euclidean", "method": SimilarityDecomposition}
    episode = explain_episode(ENCODER, ENCODER.layer, QUERIES, support, labels, **options)
    margin, constant = episode.margin(4, 1), episode.constant(4, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mean = episode.contrast(4, 1).mean((1, 2, 3))
    close(mean + constant, margin)
    opposite = (mean * margin < 0).nonzero().flatten().tolist()
    assert opposite
    (text,) = [str(w.message) for w in caught]
    assert f"opposite signs (queries {opposite}; " in text
    assert "belongs to the references alone" in text


def test_what_needs_the_encoder_is_refused_in_a_copy():
    found = explain_hits(QUERIES, HITS, ENCODER, ENCODER.layer)
    copied = copy.copy(found)
    close(copied.contrast(0, 1), found.contrast(0, 1))
    for ask in (lambda c: c.contrast(0, "self"), lambda c: c.explore(), lambda c: c.visualize()):
        with pytest.raises(ValueError, match="A copy of an explanation, or one from a file"):
            ask(copied)


def test_fam_is_the_method_where_none_is_named():
    found = explain_hits(QUERIES, HITS, ENCODER, ENCODER.layer)
    close(found.maps[0], FeatureActivationMap(ENCODER, ENCODER.layer).attribute_all(QUERIES[:1], reference=HITS[0])[0])


def test_a_threshold_that_lies_on_the_other_side_of_the_map_comes_with_a_word():
    found = explain_hits(QUERIES, HITS, HEAD, HEAD.layer)
    names = found.similarities[:, 0]
    theta = names.mean().item()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        means = found.contrast(0, threshold=theta).mean((1, 2, 3))
    opposite = (means * (names - theta) < 0).nonzero().flatten().tolist()
    assert opposite
    assert f"opposite signs (queries {opposite}; " in str(caught[0].message)
    assert "SimilarityDecomposition do, pass it as `method`" in str(caught[0].message)
    with pytest.warns(UserWarning, match="This holds for [234] of the 4 references"):
        explain_hits(QUERIES, HITS, HEAD, HEAD.layer, threshold=theta)


def test_margins_are_those_of_the_contrasts():
    episode = explain_episode(HEAD, HEAD.layer, QUERIES, SUPPORT, LABELS, method=SimilarityDecomposition)
    close(episode.margin(7, threshold=0.3), episode.similarities[:, 1] - 0.3)
    assert not episode.margin(7, "self").any()
    with pytest.raises(ValueError, match="`other` or `threshold`"):
        episode.margin(7, 9, threshold=0.3)


def test_the_reason_of_opposite_signs_is_arithmetic_that_holds():
    options = {"similarity": "euclidean", "method": SimilarityDecomposition, "n_steps": 8, "baseline": "zero"}
    support = torch.cat([SUPPORT, SUPPORT * 3])
    episode = explain_episode(HEAD, HEAD.layer, QUERIES, support, [*LABELS, 1, 1, 2, 2, 3, 3], **options)
    for one in (4, 7, 9):
        for other in (1, 2, 3):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                mean = episode.contrast(one, other).mean((1, 2, 3))
            for warning in caught:
                first = int(str(warning.message).partition("[")[2].partition("]")[0].split(",")[0])
                rest = episode.margin(one, other)[first] - mean[first]
                holds = abs(rest - episode.constant(one, other)[first]) < 0.1 * rest.abs()
                assert ("belongs to the references alone" in str(warning.message)) == bool(holds)


def test_a_classifier_that_decides_by_a_distance_is_not_sent_in_a_circle():
    methods = pytest.importorskip("easyfsl.methods")
    protonet, labels = methods.PrototypicalNetworks(HEAD), [0, 0, 1, 1, 2, 2]
    for asked in ({"threshold": -1.0}, {"contrast": "self"}):
        with pytest.raises(ValueError, match=r"PrototypicalNetworks decides by a distance, .* explain SimpleShot"):
            explain_episode(protonet, HEAD.layer, QUERIES, SUPPORT, labels, **asked)
    episode = explain_episode(protonet, HEAD.layer, QUERIES, SUPPORT, labels)
    with pytest.raises(ValueError, match="decides by a distance"):
        episode.contrast(0, "self")
    own = explain_episode(methods.SimpleShot(HEAD), HEAD.layer, QUERIES, SUPPORT, labels, contrast="self")
    close(own.maps, explain_episode(HEAD, HEAD.layer, QUERIES, SUPPORT, labels, contrast="self").maps)


def test_of_what_adds_up_to_nothing_no_sum_is_missed():
    """Of "self", nothing is left to add up to; RELAX and best matches have no sum."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"method": SimilarityDecomposition, "contrast": "self"}
        explain_hits(QUERIES, HITS, HEAD, HEAD.layer, **options)
        explain_episode(HEAD, HEAD.layer, QUERIES, SUPPORT, LABELS, **options)
        for name in ("Relax", "Fame", "CorrespondenceMap"):
            found = explain_hits(QUERIES, HITS, HEAD, HEAD.layer, method=name, **OPTIONS.get(name, {}))
            for rank in range(4):
                found.contrast(rank, "rest")
    with pytest.warns(UserWarning, match="do not add up to the similarity"):
        explain_hits(QUERIES, HITS, HEAD, HEAD.layer, method=SimilarityDecomposition)
