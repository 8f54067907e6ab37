"""Encoders that do odd things with their own tensors and gradients are explained as they are."""

import gc

import pytest
import reference as oracle
import torch
import torch.nn.functional as F
from captum.attr import LayerGradientXActivation
from encoders import HeadEncoder, PooledEncoder, random, seeded
from helpers import close
from torch import nn
from torch.utils.checkpoint import checkpoint

from captum_fam import FeatureActivationMap, SimilarityDecomposition
from captum_fam.engine.recording import Recording

X = random(2, 3, 8, 8)


class Checkpointed(nn.Module):
    """Two equal layers, whose weights have the shape of their inputs, recomputed in backward."""

    def __init__(self):
        super().__init__()
        self.layer, self.first, self.second = nn.Conv1d(3, 4, 1), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        a = self.layer(x).flatten(1)
        return checkpoint(lambda a: self.second(self.first(a).relu()), a, use_reentrant=False)


def test_a_checkpointed_part_has_the_same_maps_in_a_batch_of_any_size():
    encoder, x, s = seeded(Checkpointed), random(8, 3, 2), random(1, 8, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer, reshape_transform=lambda a: a)
    one_by_one = torch.cat([fam.attribute(row[None], reference_embedding=s) for row in x])
    close(fam.attribute(x, reference_embedding=s), one_by_one)


class Adapting(nn.Module):
    """Takes a gradient of a weight in its forward pass, and goes another way where that fails."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        a = self.layer(x).relu().mean((2, 3))
        with torch.enable_grad():
            try:
                (g,) = torch.autograd.grad(self.head(a).square().sum(), self.head.weight, create_graph=True)
            except Exception:
                g = torch.ones_like(self.head.weight)
        return a @ (self.head.weight + g).T


def test_an_encoder_that_catches_the_error_of_its_own_gradients_is_explained_as_it_is():
    encoder, s = seeded(Adapting), random(1, 4, seed=2)
    z = encoder(X).detach().numpy()
    f = torch.from_numpy(oracle.np.stack([oracle.pair_weights(row, s.numpy(), 0, "cosine") for row in z]))
    terms = LayerGradientXActivation(lambda x: (f * encoder(x)).sum(1), encoder.layer).attribute(X).detach()
    maps = FeatureActivationMap(encoder, encoder.layer).attribute(X, reference_embedding=s)
    close(maps, terms.sum(1, keepdim=True) * terms[0, 0].numel())


class Static(nn.Module):
    """Writes each embedding to the same tensor, as compiled engines do."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Conv2d(3, 4, 3), torch.zeros(2, 4, dtype=torch.float64)

    def forward(self, x):
        with torch.no_grad():
            return self.out.copy_(self.layer(x).mean((2, 3)))


def test_an_embedding_outlives_the_next_call_of_the_encoder():
    encoder, other = seeded(Static), random(2, 3, 8, 8, seed=5)
    decomposition = SimilarityDecomposition(encoder, encoder.layer)
    cosine = F.cosine_similarity(encoder(X).clone(), encoder(other).clone())
    close(decomposition.attribute(X, reference=other).mean((1, 2, 3)), cosine)
    for maps in decomposition.attribute_pair(X, other):
        close(maps.mean((1, 2, 3)), cosine)


def test_embeddings_share_no_memory_with_the_inputs():
    x = random(2, 6)
    FeatureActivationMap(nn.Sequential(nn.Identity()), nn.Identity()).embed(x).zero_()
    assert x.all()


def test_one_chunk_is_gone_before_the_next_goes_through_the_encoder():
    encoder, alive = seeded(HeadEncoder), []
    forward = encoder.forward

    def count(x):
        gc.collect()
        alive.append(sum(type(o) is Recording for o in gc.get_objects()))
        return forward(x)

    gc.collect()  # of other tests
    before = sum(type(o) is Recording for o in gc.get_objects())
    encoder.forward = count
    fam = FeatureActivationMap(encoder, encoder.layer)
    fam.attribute(X, reference_embedding=random(1, 4), internal_batch_size=1)
    assert alive == [before] * len(X)


class SometimesAligned(nn.Module):
    """Five times the mean after a ReLU: the mean itself, scaled, where the layer is not negative."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        return 5 * self.layer(x).relu().mean((2, 3))


@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition])
def test_both_sides_of_a_pair_take_one_route(method):
    encoder, positive, signed = SometimesAligned(), random(1, 3, 4, 4).abs(), random(1, 3, 4, 4, seed=2)
    explainer = method(encoder, encoder.layer)
    here, there = explainer.attribute_pair(positive, signed)
    both = explainer.attribute(torch.cat([positive, signed]), reference=torch.cat([signed, positive]))
    close(torch.cat([here, there]), both)


def test_layers_of_a_function_are_told_apart_in_what_is_said_of_them():
    encoder = seeded(PooledEncoder)
    unused = nn.Conv2d(3, 6, 1).double()

    def forward(x):
        unused(x)
        return 2 * encoder(x) + 1

    fam = FeatureActivationMap(forward, [encoder.conv2, unused])
    with pytest.warns(UserWarning, match="does not depend on layer Conv2d"):
        fam.attribute(X, reference_embedding=random(1, 6))


def test_only_references_that_are_compared_are_named():
    encoder, s = seeded(HeadEncoder), random(3, 4, seed=2)
    s[2] = 0
    x = X.clone()
    x[0] = torch.nan
    fam = FeatureActivationMap(encoder, encoder.layer)
    with pytest.warns(UserWarning, match=r"\(inputs \[0\]\)"):
        fam.attribute(x, 0, reference_embedding=s, contrast=1)
