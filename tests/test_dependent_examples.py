"""Encoders whose examples depend on each other, and points of a path that have no weight or no finite embedding."""

import pytest
import torch
import torch.nn.functional as F
from encoders import random, seeded
from helpers import close, run, silent
from test_integrated_places import Curved, S, X, by_hand, mean_map, places, weights_of_cosine
from torch import nn

from captum_fam import CorrespondenceMap, SimilarityDecomposition


def attended(z):
    return z + torch.softmax(z @ z.T, 1) @ z


def pooled(a):
    return F.gelu(a).mean((2, 3))


MIXERS = {
    "less the mean of the batch": lambda self, x, h, a: pooled(a) - pooled(a).mean(0),
    "attention over the batch": lambda self, x, h, a: attended(pooled(a)),
    "batch norm as a function": lambda self, x, h, a: F.batch_norm(pooled(a), None, None, training=True),
    "softmax over the batch": lambda self, x, h, a: pooled(a).softmax(0),
    "two halves of a batch": lambda self, x, h, a: torch.cat([pooled(a), pooled(h)])[: len(x)] * pooled(h),
}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("n_steps", [None, 3])
def test_examples_that_depend_on_each_other_have_the_gradient_of_all_their_scores(mixer, n_steps):
    encoder = seeded(lambda: Curved(MIXERS[mixer]))
    z, A = run(encoder, X)
    f = weights_of_cosine(z, S[1:2])
    if n_steps is None:
        A = A.requires_grad_()
        handle = encoder.layer.register_forward_hook(lambda m, i, o: A)
        (g,) = torch.autograd.grad((f * encoder(X)).sum(), A)
        handle.remove()
        terms = (g * A).detach()
    else:
        terms = by_hand(encoder, f, X, baseline=mean_map, n=n_steps)
    maps = SimilarityDecomposition(encoder, encoder.layer, n_steps=n_steps, channel_weights="jacobian").attribute(
        X, 1, reference_embedding=S
    )
    close(maps, terms.sum(1, keepdim=True) * 64, atol=1e-10)


def test_a_single_example_is_not_mixed_with_the_points_of_its_path():
    encoder = seeded(lambda: Curved(MIXERS["attention over the batch"]))
    f = weights_of_cosine(encoder(X[:1]).detach(), S[1:2])
    expected = by_hand(encoder, f, X[:1], baseline=mean_map).sum(1, keepdim=True) * 64
    close(places(encoder).attribute(X[:1], 1, reference_embedding=S), expected)
    close(places(encoder).attribute_all(X[:1], reference_embedding=S)[:, 1:2], expected)


UNDEFINED = {  # where the layer is zero, or all its places are the same
    "a root": lambda self, x, h, a: a.sqrt().mean((2, 3)),
    "a standard deviation": lambda self, x, h, a: a.mean((2, 3)) + a.var((2, 3)).sqrt(),
}


@pytest.mark.parametrize("head", UNDEFINED)
@pytest.mark.parametrize("delta", [False, True])
def test_points_that_have_no_weight_need_no_gradient(head, delta):
    encoder = seeded(lambda: Curved(UNDEFINED[head]))
    encoder.layer = nn.Sequential(encoder.layer, nn.ReLU()).double()
    f = weights_of_cosine(encoder(X).detach(), S[1:2])
    with silent():
        found = places(encoder).attribute(X, 1, reference_embedding=S, return_convergence_delta=delta)
    maps = found[0] if delta else found
    close(maps, by_hand(encoder, f, X, baseline=mean_map).sum(1, keepdim=True) * 64)


@pytest.mark.parametrize("size", [None, 2, 3, 100])
def test_a_path_that_crosses_what_is_not_finite_has_no_map_however_it_is_cut(size):
    def broken(self, x, h, a):
        spread = (a - a.mean((2, 3), keepdim=True)).abs().amax((1, 2, 3))
        return pooled(a).masked_fill((spread < self.least)[:, None], torch.nan)

    encoder = seeded(lambda: Curved(broken))
    _, A = run(seeded(Curved), X)
    encoder.least = 0.3 * (A - A.mean((2, 3), keepdim=True)).abs().amax()  # at the first of three nodes
    with pytest.warns(UserWarning, match=r"not finite \(inputs \[0, 1, 2\]\)"):
        maps = places(encoder).attribute(X, 1, reference_embedding=S, internal_batch_size=size)
    assert maps.shape == (3, 1, 8, 8)
    assert not maps.any()


def test_a_baseline_without_an_embedding_costs_the_delta_alone():
    encoder = seeded(lambda: Curved(lambda self, x, h, a: (lambda v: v / v.norm(dim=1, keepdim=True))(pooled(a))))
    encoder.head = nn.Identity()
    method = places(encoder, baseline="zero")
    with silent():
        expected = method.attribute(X, 1, reference_embedding=S)
    with pytest.warns(UserWarning, match="embedding of the baseline is not finite.*another `baseline`"):
        maps, delta = method.attribute(X, 1, reference_embedding=S, return_convergence_delta=True)
    close(maps, expected)
    assert delta.isnan().all()


@pytest.mark.parametrize("transform", [lambda a: 2 * a, lambda a: F.avg_pool2d(a, 2), lambda a: torch.cat([a, a], 1)])
def test_a_transform_that_is_no_selection_is_refused(transform):
    encoder = seeded(Curved)
    with pytest.raises(ValueError, match=r"`reshape_transform` to select and reorder.*scales, pools or repeats"):
        places(encoder, reshape_transform=transform).attribute(X, 1, reference_embedding=S)


@pytest.mark.filterwarnings("ignore:Layer 'pool' .AdaptiveAvgPool2d. has one place, as after a pooling")
def test_the_mean_of_one_place_is_named_as_no_baseline():
    encoder = seeded(lambda: Curved(lambda self, x, h, a: torch.tanh(self.pool(a)).flatten(1)))
    encoder.pool = nn.AdaptiveAvgPool2d(1)
    with pytest.warns(UserWarning, match=r'Layer \'pool\'.*one place.*baseline="zero"'):
        maps = places(encoder, encoder.pool).attribute(X, 1, reference_embedding=S)
    assert not maps.any()
    assert places(encoder, encoder.pool, baseline="zero").attribute(X, 1, reference_embedding=S).any()


def test_cosines_of_places_are_never_larger_than_one():
    encoder = seeded(Curved).float()
    x = random(2, 3, 8, 8).float()
    correspondence = CorrespondenceMap(encoder, encoder.layer)
    assert correspondence.attribute(x, reference=x).max() <= 1
    assert correspondence.attribute_matrix(x, x).abs().max() <= 1


def test_arguments_of_the_inputs_are_not_given_to_as_many_other_images():
    encoder = seeded(lambda: Curved(lambda self, x, h, a, shift: pooled(a + shift)))
    correspondence = CorrespondenceMap(encoder, encoder.layer, background=random(3, 3, 8, 8, seed=5))
    with pytest.raises(ValueError, match=r"`additional_forward_args`.*3 inputs.*`background`"):
        correspondence.attribute(X, additional_forward_args=random(3, 4, 1, 1), reference=X)


def test_an_encoder_that_remembers_the_pass_before_is_refused():
    def remember(self, x, h, a):
        before, self.kept = getattr(self, "kept", 0), pooled(h + a).mean(0)  # which takes a pass for each point
        return pooled(h + a) + before

    encoder = seeded(lambda: Curved(remember))
    with pytest.raises(RuntimeError, match="depend on the pass before it"):
        places(encoder).attribute(X, 1, reference_embedding=S)
