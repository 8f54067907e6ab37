"""Metrics against those of pytorch-grad-cam and Quantus, where both can say the same."""

import functools

import helpers
import numpy as np
import pytest
import torch
from encoders import BranchedEncoder, HeadEncoder, PooledEncoder, ResidualEncoder, random, seeded
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from captum_fam import SimilarityScore
from captum_fam.metrics import (
    average_drop,
    average_increase,
    cascading_randomization,
    deletion,
    energy_pointing_game,
    pointing_game,
    relevance_rank_accuracy,
    road,
)
from captum_fam.metrics._road import imputed

many = settings(deadline=None, max_examples=40)


close = functools.partial(helpers.close, rtol=1e-5, atol=1e-6, check_dtype=False)


# pytorch-grad-cam


@pytest.fixture
def peer_road(monkeypatch):
    """pytorch-grad-cam's ROAD without noise."""
    module = pytest.importorskip("pytorch_grad_cam.metrics.road")
    monkeypatch.setattr(module.NoisyLinearImputer.__init__, "__defaults__", (0.0, module.neighbors_weights))
    return module


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # theirs, of NumPy
@given(hnp.arrays(np.float32, (2, 5, 6), elements=st.floats(-8, 8, width=16)), hnp.arrays(np.bool_, (5, 6)))
@many
def test_imputation_is_that_of_pytorch_grad_cam(image, missing):
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road").NoisyLinearImputer(noise=0)
    assume(missing.any() and not missing.all())
    image, missing = torch.from_numpy(image), torch.from_numpy(missing)
    close(imputed(image, missing), peer(image, (~missing).float()), rtol=1e-4, atol=1e-4)


def a_score(size):
    """An encoder's similarity to three references, inputs of distinct values, and maps with an order to them."""
    encoder = seeded(HeadEncoder).float()
    score = SimilarityScore(encoder, 50 * random(3, 4, dtype=torch.float32), "dot")
    x = random(2, 3, *size, dtype=torch.float32)
    places = size[0] * size[1]
    order = [torch.randperm(places, generator=torch.Generator().manual_seed(s)) for s in (3, 4)]
    return score, x, torch.stack(order).reshape(2, 1, *size) / 256  # distinct, and exact in single precision


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("size", [(10, 10), (8, 10), (5, 4)])  # tens of pixels: the percentiles fall between values
def test_road_is_that_of_pytorch_grad_cam(peer_road, size):
    score, x, maps = a_score(size)
    targets = [lambda output: output[1], lambda output: output[2]]
    expected = peer_road.ROADCombined()(x, maps[:, 0].numpy(), targets, score)
    close(road(score, x, maps, target=[1, 2], noise=0).score, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).min() > 1e-2


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("percentile", [10, 40, 90])
def test_what_is_left_after_a_removal_is_that_of_pytorch_grad_cam(peer_road, percentile):
    score, x, maps = a_score((10, 10))
    found = road(score, x, maps, target=1, noise=0, percentages=[100 - percentile])  # theirs is what stays
    for scores, peer in ((found.morf, peer_road.ROADMostRelevantFirst), (found.lerf, peer_road.ROADLeastRelevantFirst)):
        expected = peer(percentile)(x, maps[:, 0].numpy(), [lambda output: output[1]] * 2, score, return_diff=False)
        close(scores[:, 0], expected, rtol=1e-4)


def test_drop_and_increase_are_those_of_pytorch_grad_cam_but_for_their_unit():
    peer = pytest.importorskip("pytorch_grad_cam.metrics.cam_mult_image")
    score, x, maps = a_score((4, 5))
    masks = (maps - maps.amin((2, 3), keepdim=True)) / (
        maps.amax((2, 3), keepdim=True) - maps.amin((2, 3), keepdim=True)
    )
    arguments = (x, masks[:, 0].numpy(), [lambda output: output[1]] * 2, score)
    with torch.no_grad():
        span = (score(x) - score(torch.zeros_like(x)))[:, 1].abs()
    drop = torch.from_numpy(peer.DropInConfidence()(*arguments))
    close(average_drop(score, x, maps, "zero", target=1), (drop / span).clamp(max=1), rtol=1e-4)
    close(average_increase(score, x, maps, "zero", target=1), peer.IncreaseInConfidence()(*arguments))


# Quantus

DISTINCT = hnp.arrays(np.float64, (3, 1, 4, 5), elements=st.integers(-500, 500).map(float), unique=True)
MASKS = hnp.arrays(np.bool_, (3, 1, 4, 5)).filter(lambda m: m.any((1, 2, 3)).all())


def peer(name):
    """A metric of Quantus that reads maps as they are."""
    return getattr(pytest.importorskip("quantus"), name)(abs=False, normalise=False, disable_warnings=True)


@given(DISTINCT, MASKS)
@many
def test_a_pointing_game_of_distinct_values_is_that_of_quantus(maps, masks):
    expected = peer("PointingGame").evaluate_batch(a_batch=maps, s_batch=masks)
    close(pointing_game(torch.from_numpy(maps), torch.from_numpy(masks)), expected)


@given(DISTINCT, MASKS)
@many
def test_energy_of_maps_without_negative_values_is_the_mass_accuracy_of_quantus(maps, masks):
    maps = np.abs(maps)
    expected = peer("RelevanceMassAccuracy").evaluate_batch(a_batch=maps, s_batch=masks)
    close(energy_pointing_game(torch.from_numpy(maps), torch.from_numpy(masks)), expected)


@given(DISTINCT, MASKS)
@many
def test_energy_is_the_positive_attribution_localisation_of_quantus(maps, masks):
    quantus = pytest.importorskip("quantus")
    metric = quantus.AttributionLocalisation(
        positive_attributions=True, abs=True, normalise=False, disable_warnings=True
    )
    expected = metric.evaluate_batch(x_batch=np.zeros((3, 3, 4, 5)), a_batch=maps, s_batch=masks)
    close(energy_pointing_game(torch.from_numpy(maps), torch.from_numpy(masks)), expected)


@given(DISTINCT, MASKS)
@many
def test_a_rank_accuracy_of_distinct_values_is_that_of_quantus(maps, masks):
    expected = peer("RelevanceRankAccuracy").evaluate_batch(a_batch=maps, s_batch=masks)
    close(relevance_rank_accuracy(torch.from_numpy(maps), torch.from_numpy(masks)), expected)


def test_deletion_is_the_pixel_flipping_of_quantus():
    quantus = pytest.importorskip("quantus")
    encoder = seeded(lambda: PooledEncoder(in_channels=1)).float()
    score = SimilarityScore(encoder, random(3, 6, dtype=torch.float32), "dot").eval()
    x = random(1, 1, 4, 5, dtype=torch.float32).abs()
    x[0, 0, 0, 0] = 0  # their black is the smallest value of the input
    maps = torch.randperm(20, generator=torch.Generator().manual_seed(5)).reshape(1, 1, 4, 5).float()
    metric = quantus.PixelFlipping(features_in_step=2, normalise=False, disable_warnings=True)
    expected = metric(score, x.numpy(), np.array([1]), maps.numpy(), softmax=False, device="cpu")
    found = deletion(score, x, maps, "zero", target=1, n_steps=10)
    close(found.scores[:, 1:], expected, rtol=1e-4)
    assert found.scores.std() > 1e-3


@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder, ResidualEncoder, BranchedEncoder])
def test_modules_are_randomised_in_the_order_of_quantus(kind):
    quantus = pytest.importorskip("quantus.helpers.model.pytorch_model")
    encoder = nn.Sequential(seeded(kind), nn.BatchNorm1d(6) if kind is not HeadEncoder else nn.LayerNorm(4))
    model = quantus.PyTorchModel(encoder, softmax=False, device="cpu")
    with torch.random.fork_rng(devices=[]):  # it sets the global seed
        expected = [name for name, _ in model.get_random_layer_generator(order="top_down")]
    assert cascading_randomization(lambda x: x, encoder, random(1, 3, 3)).modules == expected
    assert len(expected) > 2
