"""Encoders that average a layer's places first: all places share a gradient, and what lies behind the mean gives it."""

import pytest
import torch
from encoders import random
from helpers import close
from torch import nn

from captum_fam import FeatureActivationMap, SimilarityDecomposition, channels_last, patch_tokens
from captum_fam.engine import recording
from captum_fam.engine.pools import pools_of
from captum_fam.engine.recording import Recording

HEAD = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
MEANS = {
    "adaptive pooling": lambda x: nn.functional.adaptive_avg_pool2d(x, 1).flatten(1),
    "mean": lambda x: x.mean((2, 3)),
    "mean that keeps its dimensions": lambda x: x.mean((-1, -2), keepdim=True)[:, :, 0, 0],
    "mean over channels, too": lambda x: x.mean((1, 2, 3))[:, None].expand(-1, 6),
}
OTHERS = {
    "maximum": lambda x: x.amax((2, 3)),
    "an activation function between": lambda x: x.relu().mean((2, 3)),
    "powers": lambda x: x.pow(3).mean((2, 3)),
    "the mean, and more": lambda x: x.mean((2, 3)) + x.amax((2, 3)),
    "two means": lambda x: x.mean((2, 3)) + x.mean((2, 3)).square(),
    "the mean over rows alone": lambda x: x.mean(2).flatten(1)[:, :6],
    "the mean over examples": lambda x: x.mean((0, 2, 3)).expand(len(x), -1),
}


def graph(pool):
    a = random(2, 6, 3, 5).requires_grad_()
    return a, HEAD(pool(a.clone()))


@pytest.mark.parametrize("pool", MEANS.values(), ids=MEANS)
def test_a_mean_has_the_gradient_of_all_its_places(pool):
    a, z = graph(pool)
    (found,) = pools_of(z, [a])
    u = random(2, 4, seed=2)
    (of_mean,) = torch.autograd.grad(z, [found.edge], u, retain_graph=True)
    (of_places,) = torch.autograd.grad(z, a, u)
    numbers = found.numbers(a.shape).flatten(1).long()
    close(of_mean.reshape(2, -1).gather(1, numbers).reshape(a.shape) / found.places, of_places)


@pytest.mark.parametrize("pool", [OTHERS[name] for name in OTHERS if "rows" not in name])
def test_what_is_no_mean_of_places_is_none(pool):
    a, z = graph(pool)
    assert pools_of(z, [a]) is None


def test_of_several_layers_each_must_be_averaged():
    a = random(2, 6, 3, 5).requires_grad_()
    b = random(2, 6, 3, 5, seed=2).requires_grad_()
    z = HEAD(a.clone().mean((2, 3)) + b.clone().mean((2, 3)))
    assert [pool.places for pool in pools_of(z, [a, b])] == [15, 15]
    z = HEAD(a.clone().mean((2, 3)) + b.clone().amax((2, 3)))
    assert pools_of(z, [a, b]) is None
    assert pools_of(z.detach(), [a]) is None


class Encoder(nn.Module):
    """A layer of six channels, what becomes of its activations, and a head."""

    def __init__(self, pool, to_map):
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3, stride=2)
        self.layer, self.pool, self.head = nn.Sequential(nn.Tanh(), to_map), pool, HEAD

    def forward(self, x):
        return self.head(self.pool(self.layer(self.features(x))))


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Tokens(nn.Module):
    """Patches after a class token, which is the first patch."""

    def forward(self, x):
        tokens = x.flatten(2).mT
        return torch.cat([tokens[:, :1], tokens], 1)


ENCODERS = {
    **{name: (pool, nn.Identity(), None, True) for name, pool in MEANS.items()},
    **{name: (pool, nn.Identity(), None, False) for name, pool in OTHERS.items() if "examples" not in name},
    "channels last": (lambda x: x.mean((1, 2)), ChannelsLast(), channels_last, True),
    "tokens": (lambda x: x.mean(1), Tokens(), patch_tokens(4, 7), True),
}


def forbidden(*_):
    raise AssertionError("a gradient at every place")


@pytest.mark.parametrize("n_steps", [None, 2], ids=["first order", "path"])
@pytest.mark.parametrize("references", [1, 3, 40])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.filterwarnings("ignore:The places of layer")
def test_maps_are_those_of_the_gradients_at_every_place(monkeypatch, name, references, n_steps):
    pool, to_map, transform, is_mean = ENCODERS[name]
    torch.manual_seed(0)
    encoder = Encoder(pool, to_map).double().eval()
    X, s = random(2, 3, 10, 16), random(references, 4, seed=2)
    options = {"reshape_transform": transform, "channel_weights": "jacobian", "n_steps": n_steps}
    for method in (FeatureActivationMap, SimilarityDecomposition):
        explainer = method(encoder, encoder.layer, **options)
        with monkeypatch.context() as patch:
            patch.setattr(Recording, "shared_gradients", lambda *_: None)
            expected = explainer.attribute_all(X, reference_embedding=s)
        assert expected.any()
        close(explainer.attribute_all(X, reference_embedding=s), expected)
    if is_mean:
        monkeypatch.setattr(Recording, "gradients", forbidden)
        monkeypatch.setattr(Recording, "place_products", forbidden)
        close(explainer.attribute_all(X, reference_embedding=s), expected)


def test_gradients_by_the_mean_are_found_a_few_at_a_time(monkeypatch):
    encoder = Encoder(MEANS["mean"], nn.Identity()).double().eval()
    compute, at_once = recording._vector_jacobian_products, []

    def watched(output, by, rows):
        at_once.append(len(rows))
        return compute(output, by, rows)

    monkeypatch.setattr(recording, "_vector_jacobian_products", watched)
    monkeypatch.setattr(recording, "_AT_ONCE", 24)  # values: two rows for two images of six channels
    fam = FeatureActivationMap(encoder, encoder.layer)
    fam.attribute_all(random(2, 3, 10, 16), reference_embedding=random(3, 4, seed=2))
    assert at_once == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    encoder = Encoder(MEANS["mean"], nn.Identity()).double().eval()
    X, s = random(2, 3, 10, 16), random(30, 4, seed=2)
    expected = FeatureActivationMap(encoder, encoder.layer).attribute_all(X, reference_embedding=s)
    head = encoder.head
    encoder.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    encoder.head.load_state_dict(head.state_dict())
    found = FeatureActivationMap(encoder.to(dtype), encoder.layer).attribute_all(
        X.to(dtype), reference_embedding=s.to(dtype)
    )
    assert found.dtype == dtype
    close(found.double(), expected, rtol=0, atol=float(expected.abs().max()) * 0.05)


@pytest.mark.filterwarnings("ignore:The embedding does not depend")
def test_a_part_without_a_gradient_behind_the_mean():
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    encoder = Encoder(lambda x: NoGradient.apply(x.mean((2, 3))), nn.Identity()).double().eval()
    maps = FeatureActivationMap(encoder, encoder.layer).attribute_all(
        random(2, 3, 10, 16), reference_embedding=random(3, 4)
    )
    assert not maps.any()
