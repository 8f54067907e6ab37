"""CorrespondenceMap, against best matches of places written a second time in NumPy."""

import gc
from itertools import chain

import numpy as np
import pytest
import torch
from encoders import CONV, Function, OfActivations, PooledEncoder, TokenEncoder, TwoInputEncoder, pooled, random, seeded
from helpers import arrays, close, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_fam import CorrespondenceMap, channels_last, patch_tokens
from captum_fam.engine import correspondence

X, OWN = random(3, 3, 8, 8), [2, 0, 4]
SHELF, OTHERS = random(5, 3, 6, 10, seed=2), random(4, 3, 12, 8, seed=3)  # of other sizes than the inputs


def cosines(A, R):
    """The cosine (N, N') of each place of A (C, *spatial) and each of R; 0 where one of them is zero."""
    a, r = (V.astype(np.float64).reshape(len(V), -1).T for V in (A, R))
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(r, axis=1)
    return np.divide(a @ r.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def best(A, R):
    return cosines(A, R).max(1).reshape(A.shape[1:])


def expected(A, R, less=()):
    """The map of activations A for those of a reference, less the mean of those for others."""
    return best(A, R) - (sum(best(A, other) for other in less) / len(less) if len(less) else 0)


# What is taken away: the arguments, and the activations of that from those of references R and others, for an input
# of this number with this reference
LESS = {
    "nothing": ({}, lambda R, others, b, own: []),
    "a number": ({"contrast": 3}, lambda R, others, b, own: [R[3]]),
    "a number from the end": ({"contrast": -1}, lambda R, others, b, own: [R[4]]),
    "a list": ({"contrast": [4, 1, 2]}, lambda R, others, b, own: [R[[4, 1, 2][b]]]),
    "a tensor": ({"contrast": torch.tensor([1, 0, 3])}, lambda R, others, b, own: [R[[1, 0, 3][b]]]),
    "the rest": ({"contrast": "rest"}, lambda R, others, b, own: np.delete(R, own, 0)),
    "images": ({"contrast": OTHERS}, lambda R, others, b, own: others),
    "a tuple of images": ({"contrast": (OTHERS,)}, lambda R, others, b, own: others),
}
FOR_ALL = {name: LESS[name] for name in ("nothing", "the rest", "images")}


def explainer(encoder=None, **options):
    encoder = seeded(PooledEncoder) if encoder is None else encoder
    return CorrespondenceMap(encoder, encoder.layer, **options)


def of_activations(**options):
    """Compares places of its own inputs."""
    return explainer(OfActivations(), **options)


def on_a_line(*places):
    """An image of these places, (1, C, 1, N)."""
    return torch.tensor(places).double().T[None, :, None]


# Values


def test_the_best_matches_of_three_places_by_hand():
    x = on_a_line([3, 4], [1, 0], [0, -2])
    shelf = [on_a_line([4, 3], [0, 0], [-1, 0]), on_a_line([0, 1], [0, 1], [1, 0]), on_a_line([1, 1], [2, 2], [5, 5])]
    shelf, r, plain = torch.cat(shelf), 0.5**0.5, of_activations()
    less_rest = [0.96 - (0.8 + 1.4 * r) / 2, 0.8 - (1 + r) / 2, r / 2]
    close(plain.attribute(x, reference=shelf[:1]), [[[[0.96, 0.8, 0]]]])
    close(plain.attribute(x, 0, reference=shelf, contrast=1), [[[[0.16, -0.2, 0]]]])
    close(plain.attribute(x, 0, reference=shelf, contrast="rest"), [[[less_rest]]])
    close(of_activations(background=shelf[1:]).attribute(x, reference=shelf[:1]), [[[less_rest]]])
    close(plain.attribute_all(x, reference=shelf)[0, :, 0], [[0.96, 0.8, 0], [0.8, 1, 0], [1.4 * r, r, -r]])
    close(plain.attribute_pair(x, shelf[:1])[1], [[[[0.96, 0, 0]]]])
    close(plain.attribute_matrix(x, shelf[:1]), [[[0.96, 0, -0.6], [0.8, 0, -1], [-0.6, 0, 0]]])


@pytest.mark.parametrize("less", LESS)
def test_a_map_is_the_best_match_of_each_place_less_that_of_others(less):
    correspondence = explainer()
    (A, R, others), (options, of) = (arrays(correspondence.forward_func, t)[1] for t in (X, SHELF, OTHERS)), LESS[less]
    maps = correspondence.attribute(X, OWN, reference=SHELF, **options)
    assert maps.shape == (3, 1, 4, 4)
    for b, k in enumerate(OWN):
        close(maps[b, 0], expected(A[b], R[k], of(R, others, b, k)))


@pytest.mark.parametrize("less", FOR_ALL)
def test_the_maps_for_all_references_are_those_of_each(less):
    correspondence = explainer()
    (A, R, others), (options, of) = (arrays(correspondence.forward_func, t)[1] for t in (X, SHELF, OTHERS)), LESS[less]
    maps = correspondence.attribute_all(X, reference=SHELF, **options)
    assert maps.shape == (3, 5, 4, 4)
    for b in range(3):
        for k in range(5):
            close(maps[b, k], expected(A[b], R[k], of(R, others, b, k)))


def test_a_background_is_taken_away_wherever_no_contrast_is_given():
    plain, correspondence = explainer(), explainer(background=OTHERS)
    for method, own in (("attribute", [OWN]), ("attribute_all", [])):
        found = getattr(correspondence, method)(X, *own, reference=SHELF)
        close(found, getattr(plain, method)(X, *own, reference=SHELF, contrast=OTHERS), 0, 0)
    for contrast in (1, "rest", SHELF):
        options = {"reference": SHELF, "contrast": contrast}
        close(correspondence.attribute(X, OWN, **options), plain.attribute(X, OWN, **options), 0, 0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("background", [None, OTHERS], ids=["plain", "background"])
def test_a_pair_has_the_maps_of_both_sides(background, shared):
    correspondence, references = explainer(background=background), SHELF[:1] if shared else SHELF[:3]
    A, R, others = (arrays(correspondence.forward_func, t)[1] for t in (X, references, OTHERS))
    here, there = correspondence.attribute_pair(X, references)
    assert here.shape == (3, 1, 4, 4)
    assert there.shape == (3, 1, 3, 5)
    for b in range(3):
        own, less = R[0 if shared else b], () if background is None else others
        close(here[b, 0], expected(A[b], own, less))
        close(there[b, 0], expected(own, A[b], less))


@pytest.mark.parametrize("shared", [True, False])
def test_the_matrix_has_the_cosine_of_each_two_places(shared):
    correspondence, references = explainer(background=OTHERS), SHELF[:1] if shared else SHELF[:3]
    A, R = (arrays(correspondence.forward_func, t)[1] for t in (X, references))
    matrix = correspondence.attribute_matrix(X, references)
    assert matrix.shape == (3, 16, 15)
    for b in range(3):
        close(matrix[b], cosines(A[b], R[0 if shared else b]))


@pytest.mark.parametrize("dim", CONV)
def test_layers_of_one_two_and_three_dimensions_have_maps(dim):
    encoder = seeded(lambda: PooledEncoder(dim))
    x, shelf = random(2, 3, *[6] * dim), random(2, 3, *[4] * dim, seed=2)
    A, R = (arrays(encoder, t)[1] for t in (x, shelf))
    maps = explainer(encoder).attribute(x, reference=shelf, contrast=[1, 0])
    assert maps.shape == (2, 1, *[3] * dim)
    for b in range(2):
        close(maps[b, 0], expected(A[b], R[b], [R[1 - b]]))
    assert explainer(encoder).attribute_matrix(x, shelf).shape == (2, 3**dim, 2**dim)


# Properties


@st.composite
def images(draw):
    """B inputs and K references with some places of zeros."""
    seed, C, B, K = (draw(st.integers(low, high)) for low, high in ((0, 10**6), (1, 5), (1, 3), (2, 4)))
    sizes = [tuple(draw(st.integers(1, 4)) for _ in range(2)) for _ in range(2)]
    values = [random(n, C, *size, seed=seed + i) for i, (n, size) in enumerate(zip((B, K), sizes))]
    return tuple(t * (random(len(t), 1, *t.shape[2:], seed=seed + 2 + i) > -1) for i, t in enumerate(values))


@given(images())
@settings(max_examples=30, deadline=None)
def test_best_matches_lie_between_minus_one_and_one_and_differences_between_minus_two_and_two(both):
    x, shelf = both
    assert of_activations().attribute_all(x, reference=shelf).abs().max() <= 1 + 1e-12
    assert of_activations().attribute_all(x, reference=shelf, contrast="rest").abs().max() <= 2 + 1e-12


@given(images(), st.integers(-200, 200), st.integers(-200, 200))
@settings(max_examples=30, deadline=None)
def test_the_size_of_activations_changes_nothing(both, here, there):
    x, shelf = both
    plain = of_activations().attribute_all(x, reference=shelf, contrast="rest")
    close(of_activations().attribute_all(x * 10.0**here, reference=shelf * 10.0**there, contrast="rest"), plain)


@given(images(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_references_places_and_of_the_channels_of_both_changes_nothing(both, order):
    x, shelf = both
    plain = of_activations().attribute_all(x, reference=shelf)
    places, channels = (order.sample(range(n), n) for n in (shelf[0, 0].numel(), x.shape[1]))
    moved = shelf.flatten(2)[..., places].reshape(shelf.shape)
    close(of_activations().attribute_all(x, reference=moved), plain)
    close(of_activations().attribute_all(x[:, channels], reference=shelf[:, channels]), plain)


@given(images())
@settings(max_examples=30, deadline=None)
def test_an_image_matches_itself_by_one_wherever_it_is_not_zero(both):
    for x in both:
        close(of_activations().attribute(x, reference=x), x.any(1, keepdim=True).double())


@given(images())
@settings(max_examples=30, deadline=None)
def test_swapped_sides_of_a_pair_have_swapped_maps(both):
    x, reference = both[0][:1], both[1][:1]
    for background in (None, both[1][1:]):
        correspondence = of_activations(background=background)
        here, there = correspondence.attribute_pair(x, reference)
        close(correspondence.attribute_pair(reference, x), (there, here))


@given(images())
@settings(max_examples=30, deadline=None)
def test_the_maximum_of_a_row_of_the_matrix_is_the_map_at_that_place(both):
    x, reference = both[0], both[1][:1]
    matrix = of_activations().attribute_matrix(x, reference)
    close(of_activations().attribute(x, reference=reference).flatten(1), matrix.amax(2))


@given(images())
@settings(max_examples=30, deadline=None)
def test_the_maps_less_the_rest_add_up_to_zero_over_the_references(both):
    maps = of_activations().attribute_all(both[0], reference=both[1], contrast="rest")
    close(maps.sum(1), torch.zeros_like(maps[:, 0]))


# Chunks


class Seen(nn.Module):
    """Notes the first value of each image that each pass takes."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.layer, self.passes = encoder, encoder.layer, []

    def forward(self, x):
        self.passes.append(x.flatten(1)[:, 0].tolist())
        return self.encoder(x)


def first_values(*tensors):
    return sorted(value for t in tensors for value in t.flatten(1)[:, 0].tolist())


def calling(method, *target, **options):
    return lambda c, **size: getattr(c, method)(X, *target, reference=SHELF, **options, **size)


CALLS = {f"less {name}": calling("attribute", OWN, **options) for name, (options, _) in LESS.items()}
CALLS |= {f"all less {name}": calling("attribute_all", **options) for name, (options, _) in FOR_ALL.items()}
each_call = pytest.mark.parametrize("call", CALLS)


@each_call
@pytest.mark.parametrize("size", [None, 1, 2, 100])
def test_images_go_through_the_encoder_once_and_no_more_at_once_than_asked_for(call, size):
    whole = CALLS[call](explainer())
    encoder = Seen(seeded(PooledEncoder))
    close(CALLS[call](explainer(encoder), internal_batch_size=size), whole)
    assert sorted(chain(*encoder.passes)) == first_values(X, SHELF, *[OTHERS] * ("images" in call))
    assert max(map(len, encoder.passes)) == min(size or 100, 5)


def test_a_background_goes_through_the_encoder_once_in_each_call():
    encoder = Seen(seeded(PooledEncoder))
    correspondence = explainer(encoder, background=OTHERS)
    assert not encoder.passes
    correspondence.attribute(X, OWN, reference=SHELF, internal_batch_size=2)
    assert max(map(len, encoder.passes)) == 2
    correspondence.attribute_all(X, reference=SHELF)
    assert sorted(chain(*encoder.passes)) == first_values(*[X, SHELF, OTHERS] * 2)
    encoder.passes.clear()
    correspondence.attribute_pair(X, SHELF[:3])
    assert sorted(chain(*encoder.passes)) == first_values(X, SHELF[:3], OTHERS)


def test_the_number_of_cosines_held_at_once_changes_no_map(monkeypatch):
    whole = [call(explainer()) for call in CALLS.values()]
    for most in (1, 40):
        monkeypatch.setattr(correspondence, "_AT_ONCE", most)
        close([call(explainer()) for call in CALLS.values()], whole)


class Living(nn.Module):
    """Activations of eleven channels, and how many values of such there are at the end of each pass."""

    def __init__(self):
        super().__init__()
        self.layer, self.rest, self.values, self.rows = nn.Conv2d(1, 11, 1), pooled(), [], []

    def forward(self, x):
        z = self.rest(self.layer(x))
        self.rows.append(len(x))
        found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and 11 in t.shape and t.ndim > 2]
        self.values.append(sum({t.data_ptr(): t.numel() for t in found}.values()))
        return z


@pytest.mark.parametrize("call", ["rest", "a number", "all", "background"])
def test_activations_of_many_references_are_not_all_held_at_once(call):
    def most_held(K):
        encoder, x, many = seeded(Living), random(1, 1, 5, 5), random(K, 1, 5, 5, seed=2)
        correspondence = explainer(encoder, background=many if call == "background" else None)
        gc.freeze()  # what there is by now is not counted
        try:
            if call == "all":
                correspondence.attribute_all(x, reference=many)
            elif call == "background":
                correspondence.attribute(x, reference=x)
            else:
                correspondence.attribute(x, 5, reference=many, contrast="rest" if call == "rest" else 70)
        finally:
            gc.unfreeze()
        assert max(encoder.rows) == 32
        assert sum(encoder.rows) == K + (2 if call == "background" else 1)
        return max(encoder.values)

    assert 32 * 11 * 25 <= most_held(300) == most_held(200) < 200 * 11 * 25


# Layers


def test_a_layer_that_gives_several_tensors_has_a_map_of_each():
    encoder = seeded(TwoInputEncoder)
    x, shelf, others = ((random(n, 3, 8, 8, seed=n), random(n, 1, 9, 9, seed=n + 9)) for n in (2, 3, 4))
    A, R, G = ([a.numpy() for a in run(encoder, *t)[1]] for t in (x, shelf, others))
    maps = explainer(encoder, background=others).attribute(x, [2, 1], reference=shelf)
    assert isinstance(maps, tuple)
    assert [M.shape for M in maps] == [(2, 1, 6, 6), (2, 1, 4, 4)]
    for M, a, r, g in zip(maps, A, R, G):
        for b, k in enumerate([2, 1]):
            close(M[b, 0], expected(a[b], r[k], g))
    close(explainer(encoder).attribute(x, [2, 1], reference=shelf, contrast=others), maps)


@pytest.mark.parametrize("less", FOR_ALL)
def test_a_list_of_layers_gives_a_list_of_the_maps_of_each(less):
    encoder, call = seeded(PooledEncoder), CALLS[f"all less {less}"]
    both = [encoder.early, encoder.layer]
    close(call(CorrespondenceMap(encoder, both)), [call(CorrespondenceMap(encoder, layer)) for layer in both])
    pairs = [CorrespondenceMap(encoder, layer).attribute_pair(X, SHELF[:3]) for layer in both]
    close(CorrespondenceMap(encoder, both).attribute_pair(X, SHELF[:3]), tuple(map(list, zip(*pairs))))
    matrices = [CorrespondenceMap(encoder, layer).attribute_matrix(X, SHELF[:3]) for layer in both]
    close(CorrespondenceMap(encoder, both).attribute_matrix(X, SHELF[:3]), matrices)


def test_the_layers_input_can_be_compared():
    encoder = seeded(PooledEncoder)
    early = CorrespondenceMap(encoder, encoder.early).attribute(X, OWN, reference=SHELF, contrast=OTHERS)
    later = CorrespondenceMap(encoder, encoder.conv2)
    close(later.attribute(X, OWN, None, True, reference=SHELF, contrast=OTHERS), early)


def test_the_layer_is_read_when_a_map_is_asked_for():
    encoder = seeded(PooledEncoder)
    correspondence = CorrespondenceMap(encoder, encoder.early)
    assert correspondence.attribute(X, reference=X).shape == (3, 1, 8, 8)
    correspondence.layer = encoder.layer
    assert correspondence.attribute(X, reference=X).shape == (3, 1, 4, 4)


@pytest.mark.parametrize("options", [{}, {"contrast": "rest"}, {"contrast": random(2, 3, 1, 2, seed=4)}], ids=list)
def test_relu_comes_after_all_that_is_taken_away(options):
    correspondence, options = of_activations(), {"reference": random(5, 3, 1, 2, seed=3), **options}
    best_match = correspondence.attribute_all(X, reference=options["reference"])
    signed = correspondence.attribute_all(X, **options)
    assert (best_match < 0).any()
    assert (signed < 0).any()
    close(correspondence.attribute_all(X, relu_attributions=True, **options), signed.clamp(min=0), 0, 0)
    close(correspondence.attribute(X, 2, None, False, True, **options), signed[:, 2:3].clamp(min=0))


@pytest.mark.parametrize(
    ("transform", "found"),
    [(None, lambda M: M), (patch_tokens(3, 3), lambda M: M), (lambda a: patch_tokens(3, 3)(a).mT, lambda M: M.T)],
    ids=["found", "patch_tokens", "own"],
)
def test_tokens_are_compared_without_the_class_token(transform, found):
    encoder, x, shelf = seeded(TokenEncoder), random(2, 3, 12, 12), random(2, 3, 12, 12, seed=2)
    A, R = (arrays(encoder, t)[1][:, 1:].swapaxes(1, 2).reshape(2, 6, 3, 3) for t in (x, shelf))
    maps = explainer(encoder, reshape_transform=transform).attribute(x, reference=shelf)
    for b in range(2):
        close(maps[b, 0], found(best(A[b], R[b])))


@pytest.mark.parametrize("transform", [None, channels_last], ids=["found", "channels_last"])
def test_maps_with_their_channels_last_are_compared_by_place(transform):
    encoder = seeded(PooledEncoder)
    to_last, mean = Function(lambda A: A.movedim(1, -1)), Function(lambda A: A.mean((1, 2)))
    last = nn.Sequential(Function(encoder.features), to_last, mean)
    maps = CorrespondenceMap(last, last[1], reshape_transform=transform).attribute(X, OWN, reference=SHELF, contrast=1)
    close(maps, explainer(encoder).attribute(X, OWN, reference=SHELF, contrast=1))


def test_a_layer_without_places_has_one():
    """As for FeatureActivationMap: what is pooled is a map of no dimensions."""
    encoder = OfActivations()
    maps = CorrespondenceMap(encoder, encoder[2]).attribute(X, OWN, reference=SHELF)
    close(maps, torch.stack([torch.cosine_similarity(X.mean((2, 3)), SHELF[OWN].mean((2, 3)))], 1))
