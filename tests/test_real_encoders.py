"""The package on real pretrained encoders and photographs, where CAPTUM_FAM_DATA names a folder that has them."""

import importlib.util
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import close
from PIL import Image

from captum_fam import FeatureActivationMap, SimilarityScore, demo
from captum_fam.metrics import rank_correlation

DATA = os.environ.get("CAPTUM_FAM_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="set CAPTUM_FAM_DATA to the folder of pretrained encoders")


@pytest.fixture(scope="module")
def load():
    spec = importlib.util.spec_from_file_location("pretrained_encoders", Path(DATA) / "encoders.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load


@pytest.fixture(scope="module")
def clothing():
    with zipfile.ZipFile(Path(DATA) / "photos" / "clothing.zip") as zipped:
        names = sorted(n for n in zipped.namelist() if n.startswith("test/") and n.endswith(".jpg"))[::60]
        return [Image.open(io.BytesIO(zipped.read(n))).convert("RGB") for n in names]


def test_fam_and_contrast_on_imagenet_features_find_the_right_half_of_a_collage(load):
    encoder, photos = load("mobilenet_v2_imagenet"), list(demo.photographs().values())
    shares = [
        demo.shares(maps[0], 1, 2).diagonal()
        for left, right in [(0, 1), (2, 3), (4, 5)]
        for maps in _plain_and_contrast(encoder, photos[left], photos[right])
    ]
    plain, contrast = torch.cat(shares[::2]), torch.cat(shares[1::2])
    assert plain.mean() > 0.6
    assert contrast.mean() > 0.95


def _plain_and_contrast(encoder, left, right):
    query = torch.cat([encoder.transform(left), encoder.transform(right)], 2)[None]
    fam = FeatureActivationMap(encoder.net, encoder.layer)
    s = fam.embed(torch.stack([encoder.transform(demo.another_view(p)) for p in (left, right)]))
    return [fam.attribute_all(query, reference_embedding=s, contrast=c) for c in (None, "rest")]


@pytest.mark.parametrize("name", ["mobilenet_v1_025_imagenet", "resnet20_cifar10"])
def test_an_encoder_that_pools_by_the_mean_is_aligned(load, clothing, name):
    encoder = load(name)
    images = torch.stack([encoder.transform(photo) for photo in clothing])
    auto, aligned = (
        FeatureActivationMap(encoder.net, encoder.layer, channel_weights=c).attribute_all(images, reference=images)
        for c in ("auto", "aligned")
    )
    assert torch.equal(auto, aligned)


@pytest.mark.parametrize("name", ["protonet_miniimagenet", "protonet_orobix"])
def test_each_place_of_a_prototypical_network_has_the_weights_of_its_own_dimensions(load, clothing, name):
    encoder = load(name)
    images = torch.stack([encoder.transform(photo) for photo in clothing])
    fam = FeatureActivationMap(SimilarityScore(encoder.net, encoder.net(images[:2]), "euclidean"), encoder.layer)
    maps = fam.attribute(images[2:], target=1)
    A = encoder.net.features(images[2:]).detach()
    z, s = A.flatten(1), fam.embed(images[1:2])
    c = -((z - s) ** 2)
    low, high = c.amin(1, keepdim=True), c.amax(1, keepdim=True)
    f = ((c - low) / (high - low) * z.sign()).reshape(A.shape)  # each dimension is a (channel, place) pair
    close(maps, (f * A).sum(1, keepdim=True) * A[0, 0].numel(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["half", "autocast"])
@pytest.mark.parametrize("channel_weights", ["auto", "jacobian"])
@pytest.mark.parametrize("name", ["mobilenet_v2_imagenet", "resnet20_cifar10"])
def test_maps_in_half_precision_rank_places_as_in_single_precision(load, clothing, name, channel_weights, way, dtype):
    encoder = load(name)
    images = torch.stack([encoder.transform(photo) for photo in clothing])
    fam = FeatureActivationMap(encoder.net, encoder.layer, channel_weights=channel_weights)
    expected = fam.attribute_all(images, reference=images)
    if way == "half":
        encoder.net.to(dtype)
        images = images.to(dtype)
    with torch.autocast("cpu", dtype, enabled=way == "autocast"):
        found = fam.attribute_all(images, reference=images)
    assert found.dtype == dtype
    correlations = rank_correlation(*(maps.flatten(0, 1)[:, None].float() for maps in (found, expected)))
    # bfloat16 has 8 bits: single pairs may lie lower, as do the activations themselves.
    assert correlations.mean() > 0.99
    assert correlations.min() > (0.999 if dtype == torch.float16 else 0.98)
